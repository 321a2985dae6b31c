"""Text: pieces of code and documents of pinned packages, divided by package; and English prose of a Debian package."""

from __future__ import annotations

import hashlib
import json
import random
import re
import shutil
import subprocess
import tarfile
import zipfile
from collections.abc import Callable, Iterable
from html.parser import HTMLParser
from pathlib import Path

from benchmarks.real_pair.fetch import download
from benchmarks.real_pair.places import Places, pins
from benchmarks.real_pair.rows import digest_of, file_digest

_WANTED = re.compile(r"(\.py|\.md|\.rst|/METADATA)$")
_UNWANTED = re.compile(r"(_vendor|/tests?/|licen[cs]e)", re.IGNORECASE)
_SHORTEST, _LONGEST, _PIECES = 800, 4000, 60


def make_text(places: Places) -> None:
    """Write train, calibration and held-out text, and prose where apt can fetch it; each with its `group`."""
    wanted, stamp = pins(), places.root / "text" / "made-from"
    if stamp.is_file() and stamp.read_text() == digest_of([wanted["text"], wanted["prose"]]):
        print(f"{stamp.parent} is there", flush=True)
        return
    folder = places.root / "packages"
    divided = {
        part: {requirement.partition("==")[0]: requirement for requirement in requirements}
        for part, requirements in wanted["text"].items()
    }
    download([each for part in divided.values() for each in part.values()], folder)
    stamp.parent.mkdir(parents=True, exist_ok=True)
    files = {file.name.split("-")[0]: file for file in sorted(folder.iterdir())}
    seen: set[str] = set()
    for part, packages in divided.items():
        pieces = {name: _pieces(files[name]) for name in packages}
        _write(places.text(part), _in_turn(pieces, seen))
    complete = _prose(places, wanted["prose"]["package"])
    for part in divided:
        print(f"{part}: {file_digest(places.text(part))}", flush=True)
    if complete:
        stamp.write_text(digest_of([wanted["text"], wanted["prose"]]))


def _in_turn(pieces: dict[str, list[dict[str, str]]], seen: set[str]) -> Iterable[dict[str, str]]:
    """A piece of each package after another, and none that begins as one before, in whatever part."""
    order = sorted(pieces, key=lambda name: hashlib.sha1(name.encode()).hexdigest())
    for number in range(_PIECES):
        for name in order:
            for piece in pieces[name][number : number + 1]:
                begin = re.sub(r"\s+", " ", piece["text"][:300])
                digest = hashlib.sha1(begin.encode()).hexdigest()
                if digest not in seen:
                    seen.add(digest)
                    yield piece


def _pieces(package: Path) -> list[dict[str, str]]:
    """Up to 60 pieces of up to 4,000 characters, one of a file, from where a line begins."""
    chance = random.Random(f"pkgs/{package.name}")
    names, read = _opened(package)
    names = [name for name in names if _WANTED.search(name) and not _UNWANTED.search(name)]
    chance.shuffle(names)
    found: list[dict[str, str]] = []
    for name in names:
        try:
            text = read(name).decode("utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        if name.endswith("METADATA"):
            text = text.split("\n\n", 1)[-1]
        if len(text) < _SHORTEST:
            continue
        if len(text) > _LONGEST:
            begin = chance.randrange(0, len(text) - 3000)
            begin = text.rfind("\n", 0, begin) + 1
            text = text[begin : begin + _LONGEST]
            text = text[: text.rfind("\n") + 1]
            if len(text) < _SHORTEST:
                continue
        found.append({"text": text, "group": package.name.split("-")[0], "name": name})
        if len(found) == _PIECES:
            break
    return found


def _opened(package: Path) -> tuple[list[str], Callable[[str], bytes]]:
    if package.suffix == ".whl":
        archive = zipfile.ZipFile(package)
        return archive.namelist(), archive.read
    tar = tarfile.open(package)  # noqa: SIM115
    members = {member.name: member for member in tar.getmembers() if member.isfile()}

    def read(name: str) -> bytes:
        stream = tar.extractfile(members[name])
        return stream.read() if stream else b""

    return list(members), read


def _write(path: Path, rows: Iterable[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _prose(places: Places, package: str) -> bool:
    """Prose of a Debian package; False, and why, where it cannot be had."""
    folder = places.root / "prose"
    pages = _pages(folder)
    if not pages:
        if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
            print("no apt here: the prose columns are left out", flush=True)
            return False
        folder.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(["apt-get", "download", package], cwd=folder, check=False)
        archives = sorted(folder.glob(f"{package}_*.deb"))
        if done.returncode or not archives:
            print(f"apt-get could not download {package}: the prose columns are left out", flush=True)
            return False
        subprocess.run(["dpkg-deb", "-x", str(archives[-1]), str(folder / f"x-{package}")], check=True)
        pages = _pages(folder)
    rows = []
    for page in pages:
        reader = _Words()
        reader.feed(page.read_text(encoding="utf-8", errors="replace"))
        text = re.sub(r"\n\s*\n+", "\n\n", "".join(reader.words)).strip()
        if len(text) < 6000:
            continue
        begin = random.Random(f"prose/{page.relative_to(folder)}").randrange(0, len(text) - _LONGEST)
        begin = text.rfind("\n", 0, begin) + 1
        rows.append({"text": text[begin : begin + _LONGEST], "group": page.name})
    random.Random(0).shuffle(rows)
    _write(places.text("prose"), rows)
    return True


def _pages(folder: Path) -> list[Path]:
    return sorted(folder.glob("x-*/usr/share/doc/*/html/sec*.html"))


class _Words(HTMLParser):
    """The words of a page, without scripts, with a line for each paragraph."""

    def __init__(self) -> None:
        super().__init__()
        self.words: list[str] = []
        self._hidden = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("p", "br", "h1", "h2", "h3", "li", "blockquote"):
            self.words.append("\n")
        if tag in ("script", "style", "head"):
            self._hidden += 1

    def handle_endtag(self, tag: str) -> None:
        if tag in ("script", "style", "head"):
            self._hidden -= 1

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self.words.append(re.sub(r"\s+", " ", data))
