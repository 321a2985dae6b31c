"""Files of records, read one record after another: JSON lines, JSON arrays and objects, CSV, parquet.

The form is told by what a file begins with, not by its name alone. No more of a record is read than is asked for.
"""

from __future__ import annotations

import codecs
import csv
import importlib
import json
import re
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any, NamedTuple

from pydantic_core import from_json

from moe_svd_distill.errors import BadDataError, MissingInputError, UsageError, shown

LINE_SUFFIXES = frozenset({".jsonl", ".ndjson"})
TABLE_SUFFIXES = frozenset({".csv", ".tsv"})
RECORD_SUFFIXES = LINE_SUFFIXES | TABLE_SUFFIXES | {".json", ".parquet"}

_PARQUET = b"PAR1"
_REFUSED = {
    b"\x1f\x8b": "compressed by gzip",
    b"\x28\xb5\x2f\xfd": "compressed by zstd",
    b"BZh": "compressed by bzip2",
    b"\xfd7zXZ": "compressed by xz",
    b"PK\x03\x04": "a zip archive (.zip, .xlsx, .docx)",
    b"ARROW1": "an Arrow file",
    b"\xff\xff\xff\xff": "an Arrow file",
    b"%PDF": "a PDF",
    b"SQLite format 3": "a database",
}
_CHUNK = 1 << 16
_BETWEEN = re.compile(r"[ \t\r\n,]*")
_ESCAPE = re.compile(r"\\(?:u[dD][89abAB]..\\u[dD][c-fC-F]..|u[dD][89a-fA-F]..|.)", re.DOTALL)


class Row(NamedTuple):
    """One record.

    Attributes:
        number: Its line, or which record of the file it is where lines do not count.
        record: What it holds.
        cut: Whether only its beginning was read.
    """

    number: int
    record: Any
    cut: bool = False


def rows(file: Path, longest: int) -> Iterator[Row]:
    """The records of a file, in its order.

    Args:
        file: A file of one of `RECORD_SUFFIXES`, or of parquet under another name.
        longest: Bytes to read of one record at most. A longer one of JSON is cut; what follows it in an array is not
            read.

    Raises:
        BadDataError: The file is not of its form, or not of text.
        MissingInputError: It cannot be read.
        UsageError: It needs a package that is missing.
    """
    try:
        with file.open("rb") as stream:
            if is_parquet(file, stream):
                yield from parquet_rows(file)
            elif file.suffix.lower() in TABLE_SUFFIXES:
                yield from _table(file, stream, longest)
            elif file.suffix.lower() in LINE_SUFFIXES and not stream.peek().lstrip().startswith(b"["):
                yield from _lines(file, stream, longest)
            else:
                yield from _values(file, stream, longest)
    except OSError as error:
        raise unreadable(file, error) from error


def is_parquet(file: Path, stream: BufferedReader) -> bool:
    """Whether a file just opened is parquet; its byte order mark, if it has one, is behind it then.

    Raises:
        BadDataError: It is a known kind of file that holds no text.
    """
    begin = stream.peek(16)
    for mark, kind in _REFUSED.items():
        if begin.startswith(mark):
            raise BadDataError(f"{file} is {kind}, not text", "Unpack or export it as text, JSON lines or parquet")
    if begin.startswith(codecs.BOM_UTF8):
        stream.read(len(codecs.BOM_UTF8))
    return begin.startswith(_PARQUET)


def text_of(file: Path, content: bytes, begin: int = 0, *, cut: bool = False) -> str:
    """Decode UTF-8, `begin` bytes into the text; if it was cut somewhere, without the piece of a last character.

    Raises:
        BadDataError: It is no text.
    """
    try:
        text, _ = codecs.utf_8_decode(content, "strict", not cut)
    except UnicodeDecodeError as error:
        raise BadDataError(
            f"{file} is not UTF-8 text (byte {begin + error.start})", "Convert it or leave it out"
        ) from error
    if "\0" in text:
        raise BadDataError(f"{file} is a binary file, not text", "Leave it out, or export it as text or JSON lines")
    return text


def unreadable(file: Path, error: OSError) -> MissingInputError:
    """The refusal of what the operating system does not hand out."""
    return MissingInputError(f"{file} cannot be read ({error.strerror})", "Check the path and its permissions")


def _lines(file: Path, stream: BufferedReader, longest: int) -> Iterator[Row]:
    number = begin = 0
    while line := stream.readline(longest):
        number += 1
        rest = b"" if line.endswith(b"\n") else stream.readline(_CHUNK)
        cut = bool(rest)
        text = text_of(file, line, begin, cut=cut)
        begin += len(line) + len(rest)
        while cut and not rest.endswith(b"\n") and (rest := stream.readline(_CHUNK)):
            begin += len(rest)
        if text and not text.isspace():
            yield Row(number, _value(text, f"{file}:{number}", "a line of JSON", cut=cut), cut)


def _values(file: Path, stream: BufferedReader, longest: int) -> Iterator[Row]:
    """Objects one after another, in arrays or not."""
    decoder, scan = codecs.getincrementaldecoder("utf-8")(), json.JSONDecoder().raw_decode
    text, at, begin, number, in_array, ended = "", 0, 0, 0, False, False
    while True:
        at = _BETWEEN.match(text, at).end()  # type: ignore[union-attr]
        if text.startswith("]" if in_array else "[", at):
            in_array, at = not in_array, at + 1
            continue
        value, after = None, 0
        if at < len(text):
            try:
                value, after = scan(text, at)
            except (ValueError, RecursionError):
                after = 0
        if after and (ended or after < len(text)):
            number += 1
            yield Row(number, value)
            at = after
        elif not ended and len(text) - at < longest:
            chunk = stream.read(max(_CHUNK, len(text) - at))
            ended = not chunk
            try:
                text, at = text[at:] + decoder.decode(chunk, ended), 0
            except UnicodeDecodeError as error:
                raise BadDataError(
                    f"{file} is not UTF-8 text (near byte {begin + error.start})", "Convert it or leave it out"
                ) from error
            begin += len(chunk)
        elif at == len(text) and not in_array:
            return
        else:
            where = f"{file}:{number + 1}"
            yield Row(number + 1, _value(text[at : at + longest], where, "JSON", cut=not ended), True)
            return


def _value(text: str, where: str, form: str, *, cut: bool) -> Any:
    try:
        if cut:
            try:
                return from_json(text, allow_partial="trailing-strings")
            except ValueError:
                return from_json(_without_lone_surrogates(text), allow_partial="trailing-strings")
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadDataError(f"{where} is not {form} ({error})", "Mend or remove it") from error


def _without_lone_surrogates(text: str) -> str:
    """JSON text that a strict reader takes."""
    return _ESCAPE.sub(lambda found: "\\ufffd" if re.fullmatch(r"\\u[dD].{3}", found[0]) else found[0], text)


def _table(file: Path, stream: BufferedReader, longest: int) -> Iterator[Row]:
    csv.field_size_limit(longest)
    lines = _text_lines(file, stream, longest)
    header = next(lines, "")
    delimiter = "\t" if file.suffix.lower() == ".tsv" else max(",;\t|", key=header.count)

    def all_lines() -> Iterator[str]:
        yield header
        yield from lines

    reader = csv.DictReader(all_lines(), delimiter=delimiter)
    try:
        names = reader.fieldnames or ()
        if twice := next((name for name in names if name and list(names).count(name) > 1), None):
            raise BadDataError(f"{file}:1 has the field {shown(twice)} twice", "Rename or remove one of them")
        for record in reader:
            if None in record:
                raise BadDataError(
                    f"{file}:{reader.line_num} has more fields than the {len(reader.fieldnames or ())} of its header",
                    "Mend the file",
                )
            yield Row(reader.line_num, record)
    except csv.Error as error:
        raise BadDataError(f"{file}:{reader.line_num} is not CSV ({error})", "Save it as JSON lines") from error


def _text_lines(file: Path, stream: BufferedReader, longest: int) -> Iterator[str]:
    begin = 0
    while line := stream.readline(longest):
        if len(line) == longest and not line.endswith(b"\n"):
            raise BadDataError(f"{file} has a line of more than {longest:,} bytes", "Save it as JSON lines")
        yield text_of(file, line, begin)
        begin += len(line)


def parquet_rows(file: Path) -> Iterator[Row]:
    """As `rows`, of a file that is parquet."""
    try:
        library = importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise UsageError(
            f"{file} is parquet, which needs the package 'pyarrow' ({error})",
            "Install it with: pip install 'moe-svd-distill[datasets]'",
        ) from error
    number = 0
    try:
        with library.ParquetFile(file, buffer_size=1 << 20, pre_buffer=False) as table:
            for batch in table.iter_batches(batch_size=16, use_threads=False):
                for record in batch.to_pylist():
                    number += 1
                    yield Row(number, record)
    except Exception as error:  # whatever pyarrow meets in damaged files
        raise BadDataError(
            f"{file} is not readable as parquet ({error})", "Write it again, or as JSON lines"
        ) from error
