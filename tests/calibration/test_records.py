"""Records in the forms that data sets have, and records of any form at all."""

from __future__ import annotations

import json
import os
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moe_svd_distill.calibration.reading import read_text
from moe_svd_distill.calibration.records import document_of_record
from moe_svd_distill.calibration.text import tokenize
from moe_svd_distill.calibration.tokenizer import load_tokenizer
from moe_svd_distill.errors import BadDataError, DistillError
from tests.support.tokenizers import END, byte_level

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'critic' %}{{ raise_exception('no critics') }}{% endif %}"
    "{{ m.role }}:{{ m.content }}{% for call in m.tool_calls or [] %}"
    "({{ call.function.name }}"
    "{% for key, value in call.function.arguments.items() %} {{ key }}={{ value }}{% endfor %})"
    f"{{% endfor %}}{END}{{% endfor %}}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer whose template wants arguments of tool calls as a mapping."""
    texts = ["the cat sat on the mat and the dog sat"] * 4
    return byte_level(tmp_path_factory.mktemp("records") / "student", texts, 300, chat_template=TEMPLATE)


def _said(record: Any, folder: Path) -> str:
    document = document_of_record(record, "here:1")
    return document.text if document.chat is None else load_tokenizer(folder).render(document.chat, "here:1")


def test_alpaca(folder: Path) -> None:
    plain = {"instruction": "Add.", "input": "1 and 2", "output": "3"}
    assert _said(plain, folder) == f"user:Add.\n1 and 2{END}assistant:3{END}"
    for nothing in ({}, {"input": ""}, {"input": None}):
        assert _said({"instruction": "Add.", "output": "3", **nothing}, folder) == f"user:Add.{END}assistant:3{END}"
    full = {**plain, "system": "Be short.", "history": [["Hello", "Hi"]]}
    begin = f"system:Be short.{END}user:Hello{END}assistant:Hi{END}"
    assert _said(full, folder) == begin + _said(plain, folder)


@pytest.mark.parametrize("wrong", [{"instruction": 3}, {"output": ["x", 1]}, {"history": [["one"]]}, {"history": "x"}])
def test_alpaca_of_other_types_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(BadDataError, match="here:1 has no instruction and output of text"):
        document_of_record({"instruction": "Add.", "input": "x", "output": "3", **wrong}, "here:1")


def test_prompt_and_completion(folder: Path) -> None:
    assert _said({"prompt": "The sky is", "completion": " blue."}, folder) == "The sky is blue."
    turns = {"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]}
    assert _said(turns, folder) == f"user:a{END}assistant:b{END}"


def _called(call: Any, field: str = "tool_calls") -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": None, field: call}]}


@pytest.mark.parametrize(
    "call",
    [
        [{"type": "function", "id": "1", "function": {"name": "find", "arguments": '{"what": "cat"}'}}],
        [{"type": "function", "function": {"name": "find", "arguments": {"what": "cat"}}}],
        [{"name": "find", "arguments": '{"what": "cat"}'}],
        '[{"name": "find", "arguments": {"what": "cat"}}]',
    ],
)
def test_arguments_of_tool_calls_are_a_mapping_however_they_are_written(call: Any, folder: Path) -> None:
    assert _said(_called(call), folder) == f"user:a{END}assistant:(find what=cat){END}"


def test_other_spellings_of_tool_calls(folder: Path) -> None:
    old = _called({"name": "find", "arguments": '{"what": "cat"}'}, "function_call")
    old["messages"].append({"role": "function", "name": "find", "content": "1"})
    assert _said(old, folder) == f"user:a{END}assistant:(find what=cat){END}tool:1{END}"
    sharegpt = [
        {"from": "human", "value": "a"},
        {"from": "function_call", "value": '{"name": "find", "arguments": "{\\"what\\": \\"cat\\"}"}'},
    ]
    assert _said({"conversations": sharegpt}, folder) == f"user:a{END}assistant:(find what=cat){END}"
    assert (
        _said(_called([{"function": {"name": "now", "arguments": ""}}]), folder) == f"user:a{END}assistant:(now){END}"
    )
    with pytest.raises(BadDataError, match="message 2 is a function call without a name"):
        document_of_record(_called([{"function": {"arguments": "{}"}}]), "here:1")


def test_arguments_that_are_no_mapping_are_the_records_fault(folder: Path) -> None:
    with pytest.raises(BadDataError, match="here:1 cannot be rendered"):
        _said(_called([{"name": "find", "arguments": "not JSON"}]), folder)


def test_a_broken_template_is_not_the_records_fault(tmp_path: Path) -> None:
    for template in ("{{ nonsense(3) }}", "{% for m in messages %}", "{{ messages[0].content.upper.x.y }}"):
        broken = byte_level(tmp_path / str(len(template)), ["the cat"] * 4, 300, chat_template=template)
        with pytest.raises(BadDataError, match=r"^The chat template in .* cannot render any conversation"):
            _said({"messages": [{"role": "user", "content": "a"}]}, broken)


@pytest.mark.parametrize(
    "record",
    [
        {"text": "a \ud800 cat"},
        {"messages": [{"role": "user", "content": "a \udfff cat"}]},
        {"instruction": "a \ud83d", "output": "b"},
        _called([{"name": "find", "arguments": '{"a": "\\ud800 x"}'}]),
    ],
)
def test_a_lone_surrogate_becomes_the_replacement_character(record: Any, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(record))
    assert "\ufffd" in _said(json.loads(json.dumps(record)), folder)
    tokenize(read_text([tmp_path / "a.jsonl"]).documents, load_tokenizer(folder), length=2)


def test_a_surrogate_pair_in_two_escapes_is_one_character(folder: Path) -> None:
    assert _said(json.loads('{"text": "\\ud83d\\ude00 \\ud83d"}'), folder) == "\U0001f600 \ufffd"


_CHARACTERS = st.characters() | st.sampled_from('\ud800\udfff\x00\r\n\u2028\ufeff{}"\\')
_TEXT = st.text(_CHARACTERS, max_size=20)
_ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | _TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_TEXT, inner, max_size=3),
    max_leaves=6,
)
_MAYBE_TEXT = _TEXT | _ANY
_CALL = st.fixed_dictionaries(
    {"name": _TEXT | _ANY},
    optional={"arguments": _ANY | st.builds(json.dumps, _ANY), "function": _ANY, "type": st.just("function")},
)
_CALLS = st.lists(_CALL | st.builds(lambda call: {"type": "function", "function": call}, _CALL), max_size=2)
_ROLE = st.sampled_from(["user", "assistant", "system", "tool", "function", "critic", ""]) | _ANY
_MESSAGE = st.fixed_dictionaries(
    {"role": _ROLE, "content": _MAYBE_TEXT | st.lists(st.fixed_dictionaries({"type": _TEXT, "text": _MAYBE_TEXT}))},
    optional={"tool_calls": _CALLS | st.builds(json.dumps, _CALLS) | _ANY, "function_call": _CALL | _ANY},
)
_TURN = st.fixed_dictionaries(
    {"from": st.sampled_from(["human", "gpt", "function_call", "observation"]) | _ANY, "value": _MAYBE_TEXT}
)
_BESIDE = {"system": _MAYBE_TEXT, "tools": _ANY | st.builds(json.dumps, _ANY), "group": _ANY}
RECORDS = st.one_of(
    st.fixed_dictionaries({"text": _MAYBE_TEXT}, optional=_BESIDE),
    st.fixed_dictionaries({"messages": st.lists(_MESSAGE | _TURN, max_size=3) | _ANY}, optional=_BESIDE),
    st.fixed_dictionaries({"conversations": st.lists(_TURN | _MESSAGE, max_size=3) | _ANY}, optional=_BESIDE),
    st.fixed_dictionaries(
        {"instruction": _MAYBE_TEXT, "output": _MAYBE_TEXT},
        optional={"input": _MAYBE_TEXT, "history": st.lists(st.lists(_MAYBE_TEXT, max_size=3), max_size=2) | _ANY},
    ),
    st.fixed_dictionaries({"prompt": st.lists(_MESSAGE) | _MAYBE_TEXT, "completion": st.lists(_MESSAGE) | _MAYBE_TEXT}),
    _ANY,
)


def _broken(written: str) -> st.SearchStrategy[str]:
    return st.just(written) | st.integers(0, len(written)).map(lambda place: written[:place])


FILES = st.tuples(
    st.sampled_from([".jsonl", ".json", ".csv", ".tsv", ".txt"]),
    st.lists(RECORDS, max_size=3).flatmap(
        lambda records: _broken("\n".join(json.dumps(r) for r in records)) | _broken(json.dumps(records, indent=1))
    )
    | _TEXT,
    st.sampled_from([1 << 22, 40, 3]),
)


@settings(
    max_examples=int(os.environ.get("RECORDS", "80")),
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(file=FILES)
def test_nothing_that_a_file_holds_is_an_internal_error(file: tuple[str, str, int], folder: Path) -> None:
    suffix, content, limit = file
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / f"a{suffix}"
        path.write_bytes(content.encode("utf-8", "surrogatepass"))
        for named in (path, path.parent):
            try:
                documents = read_text([named], limit_characters=limit).documents
                tokenizer = load_tokenizer(folder)
                for document in documents:
                    tokenize([document], tokenizer, length=2)
            except DistillError as error:
                said = str(error)
                assert len(said.splitlines()) == 1, said


def test_nested_without_end(tmp_path: Path) -> None:
    for name, content in (("a.jsonl", "[" * 100_000), ("b.json", '{"text": ' * 100_000), ("c.json", "[" * 100_000)):
        (tmp_path / name).write_text(content)
        with pytest.raises(BadDataError):
            read_text([tmp_path / name])
    deep = '{"messages": [{"role": "user", "content": "a"}], "tools": [{"a": ' + "[" * 900 + "]" * 900 + "}]}"
    (tmp_path / "d.jsonl").write_text(deep)
    with suppress(DistillError):
        read_text([tmp_path / "d.jsonl"])
