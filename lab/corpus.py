"""The text of the lab: Python's own standard library and its documentation, split by file.

Files are ordered by a hash of their relative path. Held-out text is taken first, then calibration text, then training
text, so no file is in two splits. Files with the same content count once.
"""

from __future__ import annotations

import hashlib
import json
import platform
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from lab.plan import TEXT

# Tests, tables without language, and pydoc_data (a copy of the documentation, which would leak held-out text).
# Build configuration holds paths of the machine that built Python.
_SKIPPED_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data", "__pycache__"}
)
_SKIPPED_PREFIXES = ("_sysconfigdata", "config-")
_SMALLEST, _LARGEST = 400, 200_000

HELDOUT_CHARACTERS = 190_000
CALIBRATION_CHARACTERS = 1_450_000
HELDOUT_CUT = 6_000
CALIBRATION_CUT = 16_000


@dataclass(frozen=True)
class Document:
    """One file: its kind and relative path, and its text."""

    source: str
    text: str

    @property
    def kind(self) -> str:
        """`stdlib` or `documentation`."""
        return self.source.split("/", 1)[0]

    @property
    def group(self) -> str:
        """The package or module it is of, by which text is divided; of other documentation, the manual or the page."""
        first, *rest = self.source.split("/")[1:]
        if self.kind == "documentation" and first == "library" and rest:
            return rest[0].removesuffix(".rst").split(".")[0].split("-")[0]
        return first.removesuffix(".py").removesuffix(".rst")

    @property
    def digest(self) -> str:
        """SHA-256 of the text."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    def cut(self, characters: int) -> Document:
        """Return the document's beginning, up to a whole line; the beginning is where a file's notices stand."""
        if len(self.text) <= characters:
            return self
        head = self.text[:characters]
        return Document(self.source, head[: head.rfind("\n") + 1] or head)


@dataclass(frozen=True)
class Corpus:
    """The three splits."""

    train: tuple[Document, ...]
    calibration: tuple[Document, ...]
    heldout: tuple[Document, ...]


def _read(paths: Iterable[Path], root: Path, kind: str) -> Iterator[Document]:
    for path in paths:
        relative = path.relative_to(root)
        if any(part in _SKIPPED_FOLDERS or part.startswith(_SKIPPED_PREFIXES) for part in relative.parts):
            continue
        try:
            text = path.read_bytes().decode("utf-8").replace("\r\n", "\n")
        except UnicodeDecodeError:
            continue
        if len(text) >= _SMALLEST:
            yield Document(f"{kind}/{relative.as_posix().removesuffix('.txt')}", text)


def collect(documentation: Path | None) -> list[Document]:
    """Read all documents, ordered by the hash of their relative path, without repetitions."""
    library = Path(sysconfig.get_paths()["stdlib"])
    found = list(_read(library.rglob("*.py"), library, "stdlib"))
    if documentation is not None:
        roots = sorted(documentation.rglob("_sources")) or [documentation]
        for root in roots:
            paths = [*root.rglob("*.rst"), *root.rglob("*.rst.txt")]
            found.extend(_read(paths, root, "documentation"))
    found.sort(key=lambda document: hashlib.sha256(document.source.encode()).digest())
    unique: dict[str, Document] = {}
    for document in found:
        unique.setdefault(document.digest, document)
    return list(unique.values())


def _take(documents: list[Document], characters: int, cut: int) -> tuple[list[Document], list[Document]]:
    """Take documents, an equal share of each kind, until their beginnings have `characters` in all; return the rest."""
    kinds = sorted({document.kind for document in documents})
    left = {kind: characters // max(1, len(kinds)) for kind in kinds}
    taken: list[Document] = []
    rest: list[Document] = []
    for document in documents:
        if left[document.kind] > 0:
            piece = document.cut(cut)
            left[document.kind] -= len(piece.text)
            taken.append(piece)
        else:
            rest.append(document)
    return taken, rest


def split(documents: list[Document]) -> Corpus:
    """Split by file into held-out, calibration and training text."""
    heldout, rest = _take(documents, HELDOUT_CHARACTERS, HELDOUT_CUT)
    calibration, rest = _take(rest, CALIBRATION_CHARACTERS, CALIBRATION_CUT)
    train = [document.cut(_LARGEST) for document in rest]
    return Corpus(tuple(train), tuple(calibration), tuple(heldout))


def _write_lines(path: Path, documents: Iterable[Document]) -> None:
    rows = (json.dumps({"source": d.source, "group": d.group, "text": d.text}, ensure_ascii=False) for d in documents)
    path.write_text("\n".join(rows) + "\n", encoding="utf-8", newline="\n")


def read_lines(path: Path) -> list[Document]:
    """Read documents written as one JSON object per line."""
    with path.open(encoding="utf-8") as lines:
        return [Document(row["source"], row["text"]) for row in map(json.loads, lines)]


def manifest(corpus: Corpus) -> dict[str, object]:
    """Describe the training text: the first 16 digits of every file's SHA-256, and one digest of them all."""
    files = {document.source: document.digest for document in sorted(corpus.train, key=lambda d: d.source)}
    total = hashlib.sha256("".join(f"{name} {digest}\n" for name, digest in files.items()).encode()).hexdigest()
    return {
        "python": platform.python_version(),
        "digest": total,
        "characters": sum(len(document.text) for document in corpus.train),
        "train": {name: digest[:16] for name, digest in files.items()},
    }


def publish(corpus: Corpus, folder: Path = TEXT) -> None:
    """Write calibration text, held-out text, the manifest of the training text and the licence notice."""
    folder.mkdir(parents=True, exist_ok=True)
    _write_lines(folder / "calibration.jsonl", corpus.calibration)
    _write_lines(folder / "heldout.jsonl", corpus.heldout)
    rows = json.dumps(manifest(corpus), indent=0, ensure_ascii=False)
    (folder / "MANIFEST.json").write_text(rows + "\n", encoding="utf-8")
    licence = (Path(sysconfig.get_paths()["stdlib"]) / "LICENSE.txt").read_text(encoding="utf-8")
    (folder / "NOTICE").write_text(_NOTICE.format(version=platform.python_version()) + licence, encoding="utf-8")


_NOTICE = """\
The texts in calibration.jsonl and heldout.jsonl are excerpts of the standard library of Python {version} and of the
documentation of Python 3.11. Each line names the file it was taken from; changes: files were cut at a length, nothing
else. The models of the lab were trained on other files of the same two works.

Copyright (c) 2001 Python Software Foundation; All Rights Reserved. Several files carry notices of their own, which are
kept at their beginning. The licence of Python and its documentation follows in full.

--------------------------------------------------------------------------------

"""
