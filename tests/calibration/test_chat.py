"""Conversations: reading them, and rendering them with a tokenizer's chat template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moe_svd_distill.calibration.chat import FIXED_DATE
from moe_svd_distill.calibration.documents import Document, cut_long_documents, without
from moe_svd_distill.calibration.reading import read_text
from moe_svd_distill.calibration.text import tokenize
from moe_svd_distill.calibration.tokenizer import load_tokenizer
from moe_svd_distill.errors import BadDataError, MissingInputError
from tests.support.tokenizers import END, byte_level, sentencepiece

TEMPLATE = (
    "{{ bos_token }}{% for tool in tools or [] %}[{{ tool.name }}]{% endfor %}"
    "{% for m in messages %}{% if m.role == 'critic' %}{{ raise_exception('no critics') }}{% endif %}"
    "{{ m.role }}:{{ m.content }}"
    "{% for call in m.tool_calls or [] %}({{ call.function.name }} {{ call.function.arguments | tojson }}){% endfor %}"
    f"{END}\n{{% endfor %}}"
)
TALK = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat on the mat"}]
TEXTS = ["the cat sat on the mat and the dog sat"] * 4


def _records(folder: Path, *records: Any) -> Path:
    file = folder / "talks.jsonl"
    file.write_text("\n".join(json.dumps(record) for record in records))
    return file


def _rendered(file: Path, folder: Path, **options: Any) -> str:
    (document,) = read_text([file], **options).documents
    assert document.chat is not None
    return load_tokenizer(folder).render(document.chat, document.source)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return byte_level(tmp_path / "student", TEXTS, 300, bos_token=END, chat_template=TEMPLATE)


def test_messages_are_rendered_by_the_template_and_packed(tmp_path: Path, folder: Path) -> None:
    documents = read_text([_records(tmp_path, {"messages": TALK}, {"text": "the dog sat on the mat"})]).documents
    tokenizer = load_tokenizer(folder)
    packed = tokenize(documents, tokenizer, length=8)
    text = f"{END}user:the cat{END}\nassistant:sat on the mat{END}"
    flat = tokenizer.encode([text, f"the dog sat on the mat{END}"])
    assert packed.sequences.flatten().tolist() == [token for ids in flat for token in ids][: packed.sequences.size]
    assert packed.sources[0].endswith("talks.jsonl:1")


@pytest.mark.parametrize("begins", [True, False])
def test_the_token_that_begins_a_text_is_there_once(tmp_path: Path, begins: bool) -> None:
    folder = sentencepiece(tmp_path / "student", TEXTS, 400, begins=begins, chat_template=TEMPLATE)
    packed = tokenize(read_text([_records(tmp_path, {"messages": TALK})]).documents, load_tokenizer(folder), length=4)
    begin = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]["<begin>"]
    assert packed.sequences.flatten().tolist().count(begin) == 1
    assert packed.sequences[0, 0] == begin


def test_the_sharegpt_form_says_the_same(tmp_path: Path, folder: Path) -> None:
    there = {"conversations": [{"from": "human", "value": "the cat"}, {"from": "gpt", "value": "sat on the mat"}]}
    first = _rendered(_records(tmp_path, {"messages": TALK}), folder)
    assert _rendered(_records(tmp_path, there), folder) == first
    with_system = _rendered(_records(tmp_path, {**there, "system": "Be short."}), folder)
    assert with_system == first.replace("user:", f"system:Be short.{END}\nuser:", 1)


def test_tools_and_absent_content(tmp_path: Path, folder: Path) -> None:
    call = {"type": "function", "function": {"name": "find", "arguments": {"what": "cat"}}}
    messages = [TALK[0], {"role": "assistant", "content": None, "tool_calls": [call]}, {"role": "tool", "content": "1"}]
    schema = [{"name": "find"}]
    expected = f'{END}[find]user:the cat{END}\nassistant:(find {{"what": "cat"}}){END}\ntool:1{END}'
    assert _rendered(_records(tmp_path, {"messages": messages, "tools": json.dumps(schema)}), folder) == expected
    sharegpt = [
        {"from": "human", "value": "the cat"},
        {"from": "function_call", "value": '{"name": "find", "arguments": {"what": "cat"}}'},
        {"from": "observation", "value": "1"},
    ]
    assert _rendered(_records(tmp_path, {"conversations": sharegpt, "tools": schema}), folder) == expected


def test_parts_of_text_are_joined_and_a_picture_is_refused(tmp_path: Path, folder: Path) -> None:
    parts = [{"type": "text", "text": "the "}, {"type": "text", "text": "cat"}]
    expected = _rendered(_records(tmp_path, {"messages": TALK}), folder)
    assert (
        _rendered(_records(tmp_path, {"messages": [{"role": "user", "content": parts}, TALK[1]]}), folder) == expected
    )
    picture = {"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}]}
    with pytest.raises(BadDataError, match=r"talks\.jsonl:1 .*message 1 holds a part that is not text \('image'\)"):
        read_text([_records(tmp_path, picture)])


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"prompt": "x"}, r"talks\.jsonl:2 has no text in the field 'text' and no messages .*found: prompt"),
        ({"messages": []}, r"talks\.jsonl:2 .*not a list of messages"),
        ({"messages": [{"role": "user", "content": 3}]}, "message 1 has content of type int"),
        ({"messages": [{"speaker": "me"}]}, "neither role and content nor from and value"),
        ({"messages": ["hello"]}, "message 1 is a str"),
        ({"conversations": [{"from": "narrator", "value": "x"}]}, "from 'narrator'"),
        ({"messages": TALK, "tools": "{"}, "tools are not JSON"),
    ],
)
def test_records_that_are_neither_are_named(tmp_path: Path, record: Any, said: str) -> None:
    with pytest.raises(BadDataError, match=said):
        read_text([_records(tmp_path, {"messages": TALK}, record)])


def test_a_named_field_holds_text_or_messages(tmp_path: Path, folder: Path) -> None:
    file = _records(tmp_path, {"text": "not this", "talk": TALK, "body": "this"})
    assert read_text([file], field="body").documents[0].text == "this"
    assert "assistant:sat" in _rendered(file, folder, field="talk")
    assert read_text([file]).documents[0].text == "not this"
    with pytest.raises(BadDataError, match="field 'missing'"):
        read_text([file], field="missing")


def test_a_tokenizer_without_a_template_is_refused_in_one_line(tmp_path: Path) -> None:
    folder = byte_level(tmp_path / "plain", TEXTS, 300)
    documents = read_text([_records(tmp_path, {"messages": TALK})]).documents
    with pytest.raises(MissingInputError, match=r"talks\.jsonl:1 .*no chat template.*chat_template\.jinja") as refusal:
        tokenize(documents, load_tokenizer(folder), length=4)
    assert "\n" not in str(refusal.value)


def test_what_the_template_refuses_is_named(tmp_path: Path, folder: Path) -> None:
    critic = _records(tmp_path, {"messages": [{"role": "critic", "content": "bad"}]})
    with pytest.raises(BadDataError, match=r"talks\.jsonl:1 cannot be rendered .*no critics"):
        tokenize(read_text([critic]).documents, load_tokenizer(folder), length=4)


def test_the_same_conversation_is_the_same_text_tomorrow(tmp_path: Path) -> None:
    template = "{{ strftime_now('%d %b %Y') }} " + TEMPLATE
    folder = byte_level(tmp_path / "dated", TEXTS, 300, bos_token=END, chat_template=template)
    assert _rendered(_records(tmp_path, {"messages": TALK}), folder).startswith(FIXED_DATE)


def test_a_used_conversation_is_recognised_rendered_or_not_and_in_any_key_order(tmp_path: Path, folder: Path) -> None:
    documents = read_text([_records(tmp_path, {"messages": TALK})]).documents
    used = tokenize(documents, load_tokenizer(folder), length=4).digests
    turned = _records(tmp_path, {"messages": [dict(reversed(message.items())) for message in TALK]}, {"text": "new"})
    assert [document.text for document in without(read_text([turned]).documents, used)] == ["new"]


def test_a_conversation_is_not_cut_before_it_is_rendered(tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "the cat\n" * 4000}]
    (document,) = read_text([_records(tmp_path, {"messages": talk})]).documents
    assert cut_long_documents([document]) == (document,)
    assert len(cut_long_documents([Document("text", document.text)])) > 1
