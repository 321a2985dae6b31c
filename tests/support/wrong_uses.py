"""Wrong uses of the program, each in a folder where everything it takes lies.

``python -m tests.support.wrong_uses`` writes what the program says to them to docs/messages.md.
"""

from __future__ import annotations

import io
import json
import os
import shlex
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import chdir, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

from moe_svd_distill.cli.main import main
from tests.support.models import saved

DOCUMENT = Path(__file__).parents[2] / "docs" / "messages.md"
_PAIR = "--teacher teacher --student student"
_NAME = "moe-svd-distill"


@dataclass(frozen=True)
class WrongUse:
    """What somebody types.

    Attributes:
        words: Behind the program's name.
        code: The exit code.
        named: What the line must name.
    """

    words: str
    code: int
    named: str


WRONG_USES = tuple(
    WrongUse(*row)
    for row in (
        ("destill recipe.yaml", 2, "distill"),
        ("frobnicate", 2, "--help"),
        ("distill --rnak 3", 2, "--rank"),
        ("distill --rank", 2, "--rank"),
        ("distill", 2, "teacher"),
        ("distill --teacher teacher", 2, "student"),
        (f"distill {_PAIR} --rank 0", 2, "at least 1"),
        (f"distill {_PAIR} --rank lots", 2, "full"),
        (f"distill {_PAIR} --head-rank most", 2, "auto"),
        (f"distill {_PAIR} --tokens 5", 2, "at least 512"),
        (f"distill {_PAIR} --tokens many", 2, "whole number"),
        (f"distill {_PAIR} --scale-search-tokens 1", 2, "at least 512"),
        (f"distill {_PAIR} --method magic", 2, "refined"),
        (f"distill {_PAIR} --preset fastest", 2, "balanced"),
        (f"distill {_PAIR} --projection magic", 2, "procrustes"),
        (f"distill {_PAIR} --depth-map sideways", 2, "endpoints"),
        (f"distill {_PAIR} --energy 2", 2, "at most 1"),
        (f"distill {_PAIR} --workers 0", 2, "at least 1"),
        (f"distill {_PAIR} --device tpu", 2, "cuda:N"),
        (f"distill {_PAIR} --seed -1", 2, "at least 0"),
        (f"distill {_PAIR} --head-format round", 2, "whole"),
        (f"distill {_PAIR} --vocabulary other", 2, "shared"),
        (f"distill {_PAIR} --set rank", 2, "KEY=VALUE"),
        (f"distill {_PAIR} --set rnak=3", 2, "'rank'"),
        (f"distill {_PAIR} --set training.epocs=3", 2, "'epochs'"),
        (f"distill {_PAIR} --set training.epochs=never", 2, "above 0"),
        (f"distill {_PAIR} --set training=3", 2, "epochs"),
        (f"distill {_PAIR} --set 'ranks=['", 2, "ranks"),
        (f"distill {_PAIR} --set threads=0", 2, "at least 1"),
        (f"distill {_PAIR} --set nan=ignore", 2, "zero"),
        (f"distill {_PAIR} --method refined", 2, "calibration"),
        (f"distill {_PAIR} --preset best", 2, "calibration"),
        (f"distill {_PAIR} --start zero", 2, "refined"),
        (f"distill {_PAIR} --method calibrated --calibration text.txt --set head=keep", 2, "head"),
        (f"distill {_PAIR} --output teacher", 2, "own folder"),
        ("distill none.yaml", 66, "init"),
        ("distill list.yaml", 65, "list"),
        ("distill broken.yaml", 65, "YAML"),
        ("distill teacher", 65, "teacher"),
        ("distill typing.yaml", 2, "'rank'"),
        (f"distill {_PAIR} --output notes.txt", 73, "--output"),
        (f"distill {_PAIR} --output foreign", 73, "thesis.tex"),
        (f"distill {_PAIR} --output finished", 73, "--force"),
        (f"plan {_PAIR} --output finished", 73, "--force"),
        (f"distill {_PAIR} --log-file teacher", 2, "--log-file"),
        (f"distill {_PAIR} --log-file notes.txt/run.log", 73, "--log-file"),
        (f"distill {_PAIR} --calibration none.txt", 66, "none.txt"),
        (f"distill {_PAIR} --method weights --calibration pictures", 65, "text"),
        (f"plan {_PAIR} --method calibrated --calibration text.txt", 66, "tokenizer"),
        (f"plan {_PAIR} --calibration none.txt", 66, "none.txt"),
        ("distill --teacher ./none --student student", 66, "none"),
        ("distill --teacher empty --student student", 66, "config.json"),
        ("distill --teacher pickled --student student", 65, "safetensors"),
        ("distill --teacher cut --student student", 65, "cut"),
        ("distill --teacher teacher --student scribbled", 65, "config.json"),
        ("distill --teacher teacher --student strange", 65, "kimi_k3"),
        ("distill --teacher teacher --student lacking", 65, "index"),
        ("distill --teacher teacher --student teacher", 79, "teacher"),
        (f"distill {_PAIR}", 79, "--calibration"),
        (f"plan {_PAIR}", 79, "--calibration"),
        (f"distill {_PAIR} --calibration text.txt", 79, "tokenizer"),
        ("init teacher", 2, "STUDENT"),
        ("inspect", 2, "MODEL"),
        ("inspect ./none", 66, "none"),
        ("inspect notes.txt", 66, "notes.txt"),
        ("evaluate none --text text.txt", 66, "none"),
        ("evaluate finished", 2, "--text"),
        ("evaluate finished --text text.txt --tokens 5", 2, "512"),
        ("evaluate finished --text text.txt --mode sideways", 2, "streamed"),
        ("evaluate finished --text text.txt --tokens few", 2, "512"),
        ("evaluate finished --text text.txt --dtype float8", 2, "bfloat16"),
        ("evaluate finished --benchmark-limit 3", 2, "--benchmark"),
        ("evaluate finished --benchmark humaneval", 2, "--run-generated-code"),
        ("verify none", 66, "none"),
        ("verify empty", 66, "adapter_model.safetensors"),
        ("verify finished", 65, "adapter_model.safetensors"),
        ("merge student", 2, "OUTPUT"),
        ("merge student merged", 66, "adapter_config.json"),
        ("export empty plain", 66, "empty"),
        ("export finished plain --format fancy", 2, "plain"),
        ("adapter-config none.safetensors", 66, "none.safetensors"),
        ("adapter-config notes.txt", 65, "notes.txt"),
        ("chat empty", 66, "adapter_config.json"),
        ("push empty me/adapter", 66, "empty"),
        ("push finished adapter", 2, "ORGANISATION/NAME"),
        ("reproduce empty", 66, "run.json"),
        ("clean none", 66, "none"),
        ("demo --pair twins", 2, "sibling"),
        ("completion tcsh", 2, "bash"),
    )
)


def prepare(folder: Path) -> Path:
    """Lay out what the wrong uses take."""
    teacher, student = saved("qwen3_moe", folder / "teacher", seed=1), saved("qwen3_moe", folder / "student", seed=2)
    (folder / "empty").mkdir()
    (folder / "pictures").mkdir()
    (folder / "pictures" / "cat.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0")
    (folder / "foreign").mkdir()
    (folder / "foreign" / "thesis.tex").write_text("years of work")
    (folder / "finished").mkdir()
    (folder / "finished" / "run.json").write_text(json.dumps({"recipe": {"teacher": "other", "student": "student"}}))
    (folder / "finished" / "adapter_config.json").write_text("{}")
    (folder / "finished" / "adapter_model.safetensors").write_bytes(b"half of a file")
    (folder / "notes.txt").write_text("notes")
    (folder / "text.txt").write_text("some words\n")
    (folder / "list.yaml").write_text("- teacher\n- student\n")
    (folder / "broken.yaml").write_text("teacher: [t\n")
    (folder / "typing.yaml").write_text("teacher: teacher\nstudent: student\nrnak: 3\n")
    pickled = folder / "pickled"
    pickled.mkdir()
    shutil.copy(teacher / "config.json", pickled)
    (pickled / "pytorch_model.bin").write_bytes(b"pickle")
    cut = Path(shutil.copytree(teacher, folder / "cut")) / "model.safetensors"
    cut.write_bytes(cut.read_bytes()[:-4])
    scribbled = Path(shutil.copytree(student, folder / "scribbled"))
    (scribbled / "config.json").write_text("{ model_type:")
    strange = Path(shutil.copytree(student, folder / "strange")) / "config.json"
    strange.write_text(json.dumps(json.loads(strange.read_text()) | {"model_type": "kimi_k3"}))
    lacking = Path(shutil.copytree(student, folder / "lacking"))
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "model.safetensors"}}
    (lacking / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def said(use: WrongUse, folder: Path) -> tuple[int, str]:
    """Exit code and the last line on standard error, of a run in this process; paths begin in the folder."""
    out, error = io.StringIO(), io.StringIO()
    words = shlex.split(use.words)
    with chdir(folder), _no_settings(), redirect_stdout(out), redirect_stderr(error):
        try:
            main(words)
        except SystemExit as left:
            code = int(left.code or 0)
    lines = [line for line in error.getvalue().splitlines() if line.startswith(f"{_NAME}: ")]
    assert len(lines) == 1, error.getvalue()
    return code, lines[0].replace(f"{folder.resolve()}/", "").replace(f"{folder}/", "")


def row(use: WrongUse, code: int, line: str) -> str:
    """A row of docs/messages.md."""
    cells = (f"`{_NAME} {use.words}`", str(code), line.removeprefix(f"{_NAME}: "))
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def document(rows: Iterator[str]) -> str:
    """All of docs/messages.md."""
    head = (
        "# What the program says to mistakes\n"
        "Generated (`python -m tests.support.wrong_uses`) and compared by a test. `teacher` and `student` are folders\n"
        "of models, `finished` holds the adapter of another pair, `empty` nothing. With `--json` the line is\n"
        '`{"error": …, "exit_code": …}` on standard output; `--debug` adds a traceback.\n\n'
        "Exit codes: 0 complete; 2 usage; 65 bad data; 66 missing input; 69 a hub or store cannot be reached; 73\n"
        "cannot write; 75 incomplete, run the same command again; 78 the pair is incompatible; 79 nothing to\n"
        "transfer; 130 and 143 stopped by Ctrl-C and SIGTERM (finished parts are kept); 141 output unread.\n\n"
        "| command | exit code | message |\n| --- | --- | --- |\n"
    )
    return head + "\n".join(rows) + "\n"


@contextmanager
def _no_settings() -> Iterator[None]:
    before = dict(os.environ)
    for name in [name for name in before if name.startswith("MOE_SVD_DISTILL_")]:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def write() -> None:
    """Write docs/messages.md anew."""
    with tempfile.TemporaryDirectory() as name:
        folder = prepare(Path(name))
        DOCUMENT.write_text(document(row(use, *said(use, folder)) for use in WRONG_USES), encoding="utf-8")


if __name__ == "__main__":
    write()
