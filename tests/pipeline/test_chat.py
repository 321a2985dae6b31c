"""Talking to a student with its adapter and without it."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from moe_svd_distill.cli.main import main
from moe_svd_distill.errors import MissingInputError
from moe_svd_distill.evaluation.loading import fastest_dtype
from moe_svd_distill.pipeline.chat import ChatSettings, ChatStudent
from tests.support import tiny
from tests.support.heads import with_tokenizer

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
SHORT = ChatSettings(new_tokens=6, device="cpu")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory, tokenizer: Path) -> Path:
    folder = tmp_path_factory.mktemp("chat")
    size = len(json.loads((tokenizer / "tokenizer.json").read_text())["model"]["vocab"])
    student = with_tokenizer(tiny.save_student(folder / "student", "qwen3_moe", vocab_size=size), tokenizer)
    made = tiny.save_adapter(folder / "adapter", student, tiny.random_pairs(student))
    file = made / "adapter_model.safetensors"
    save_file({name: tensor * (9 if "lora_B" in name else 1) for name, tensor in load_file(file).items()}, file)
    return made


def student_of(adapter: Path) -> str:
    return str(adapter.parent / "student")


def test_with_and_without_the_adapter(adapter: Path) -> None:
    chat = ChatStudent(adapter, student_of(adapter), SHORT)
    told: list[str] = []
    adapted = chat.answer("the file is", "adapted", told.append)
    assert "".join(told) == adapted
    untouched = chat.answer("the file is", "student")
    assert untouched != adapted
    assert chat.answer("the file is", "adapted") == adapted
    plain = tiny.load_model(Path(student_of(adapter)), fastest_dtype("cpu"))
    read = chat._tokenizer("the file is", return_tensors="pt")
    written = plain.generate(**read, max_new_tokens=6, do_sample=False)[0, read["input_ids"].shape[1] :]
    assert untouched == chat._tokenizer.decode(written, skip_special_tokens=True)


def test_a_template_and_what_was_said_before(adapter: Path) -> None:
    settings = ChatSettings(new_tokens=3, device="cpu", remember=True)
    chat = ChatStudent(adapter, student_of(adapter), settings)
    assert not chat.templated
    chat._tokenizer.chat_template, chat.templated = TEMPLATE, True
    first = chat.answer("one", "adapted")
    read = chat._read(chat._said["adapted"], "")
    assert chat._tokenizer.decode(read["input_ids"][0]) == f"[user]one[assistant]{first}[assistant]"
    assert chat._said["student"] == []


def test_what_is_drawn_depends_on_the_seed_alone(adapter: Path) -> None:
    drawn = []
    for seed in (1, 1, 2):
        chat = ChatStudent(adapter, student_of(adapter), ChatSettings(12, 1.5, seed, "cpu"))
        torch.manual_seed(7)
        drawn.append(chat.answer("the", "adapted"))
    assert drawn[0] == drawn[1] != drawn[2]


def test_prompts_from_a_pipe(
    adapter: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["chat", str(adapter), "--student", student_of(adapter), "--tokens", "4", "--device", "cpu"]
    for extra, count in (([], 2), (["--side-by-side"], 4)):
        monkeypatch.setattr("sys.stdin", io.StringIO("the file\n\nis read"))
        with pytest.raises(SystemExit) as left:
            main([*words, *extra, "--json"])
        assert left.value.code == 0
        found = json.loads(capsys.readouterr().out)
        assert [each["prompt"] for each in found] == ["the file", "is read"]
        assert sum(len(each["answers"]) for each in found) == count
    monkeypatch.setattr("sys.stdin", io.StringIO("the file\n"))
    with pytest.raises(SystemExit):
        main([*words, "--side-by-side"])
    said = capsys.readouterr().out
    assert said.startswith("student: ")
    assert "with the adapter: " in said


def test_what_cannot_be_done_is_one_line(adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(MissingInputError, match="holds no adapter"):
        ChatStudent(tmp_path)
    for words, code in ((["--untouched", "--side-by-side"], 2), (["--temperature", "-1"], 2), (["--device", "tpu"], 2)):
        with pytest.raises(SystemExit) as left:
            main(["chat", str(adapter), "--student", student_of(adapter), *words])
        assert left.value.code == code
        assert len(capsys.readouterr().err.strip().splitlines()) == 1
