"""Conversations: what records of chat messages hold, and the text a tokenizer's chat template makes of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moe_svd_distill.errors import BadDataError, MissingInputError, shown

SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
}
"""`from` of the ShareGPT form to the role that chat templates know."""

FIXED_DATE = "26 Jul 2024"
"""What templates that write today's date write instead: the same record must be the same text tomorrow."""

_FIXED_CLOCK = "{%- macro strftime_now(format) -%}" + FIXED_DATE + "{%- endmacro -%}"


@dataclass(frozen=True)
class Chat:
    """One conversation, kept as JSON so that it can be compared and hashed.

    Attributes:
        record: `{"messages": [{"role", "content", …}], "tools": [...] or null}`, keys in the record's own order,
            because templates write tool calls out in it.
    """

    record: str

    @property
    def messages(self) -> list[dict[str, object]]:
        """Messages as a chat template takes them: every one with a `role` and a `content` string."""
        return list(json.loads(self.record)["messages"])

    @property
    def tools(self) -> list[dict[str, object]] | None:
        """JSON schemas of the tools that were offered, or None."""
        tools: list[dict[str, Any]] | None = json.loads(self.record)["tools"]
        return tools

    @property
    def content(self) -> str:
        """The conversation in one spelling, whatever the order of the keys was."""
        return json.dumps(json.loads(self.record), sort_keys=True, ensure_ascii=False)

    @property
    def said(self) -> str:
        """What the messages say, without roles."""
        return "\n".join(str(message["content"]) for message in self.messages)


def as_chat(value: Any, record: Mapping[str, Any]) -> Chat:
    """Read a list of messages, in either form; `record` may offer `tools` and a `system` prompt beside it.

    Content of None becomes empty, and lists of text parts become their text. The ShareGPT form (`from`, `value`) is
    translated to roles. Tool calls become `{"type", "function": {"name", "arguments"}}` with a mapping for arguments
    that are a string of JSON, as OpenAI's are, because chat templates write the arguments out as JSON themselves.

    Raises:
        ValueError: It is not a conversation of text; the message says what is wrong with which message.
    """
    if not isinstance(value, Sequence) or isinstance(value, str | bytes) or not value:
        raise ValueError("it is not a list of messages")
    messages = [_message(message, number) for number, message in enumerate(value, start=1)]
    system = record.get("system")
    if isinstance(system, str) and system.strip() and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    try:
        written = json.dumps({"messages": messages, "tools": _tools(record.get("tools"))}, ensure_ascii=False)
    except (TypeError, RecursionError) as error:  # dates and bytes of a parquet file, and what is nested without end
        raise ValueError(f"it holds what JSON cannot ({error})") from error
    return Chat(well_formed(written))


def well_formed(text: str) -> str:
    """The text with the replacement character for lone surrogates, which no tokenizer takes; itself if it has none."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def render_chat(chat: Chat, tokenizer: Any, *, where: str, begins: bool) -> str:
    """Apply the chat template of a transformers tokenizer.

    The token that begins a text is left away where encoding puts it there anyway, and white space after the last
    end-of-text token as well, so that packing finds the token and adds no second one.

    Args:
        chat: What to render.
        tokenizer: Loaded by transformers; its template runs in the sandbox of transformers.
        where: The record, for the error.
        begins: Whether encoding a text puts the begin-of-text token before it.

    Raises:
        MissingInputError: The tokenizer has no chat template.
        BadDataError: The template refuses the conversation, for example its order of roles, or refuses any.
    """
    messages, tools = chat.messages, chat.tools
    try:
        template = tokenizer.get_chat_template(None, tools)
    except ValueError as error:
        raise MissingInputError(
            f"{where} is a conversation, and the tokenizer in {tokenizer.name_or_path} has no chat template",
            "Put the chat_template.jinja of the model's instruct version into that folder, or calibrate on plain text",
        ) from error
    if "strftime_now" in template:
        template = _FIXED_CLOCK + template
    try:
        text = str(
            tokenizer.apply_chat_template(
                messages, tools=tools, chat_template=template, tokenize=False, add_generation_prompt=False
            )
        )
    except Exception as error:  # whatever a template does, besides raising on purpose
        if _refuses_anything(tokenizer, template):
            raise BadDataError(
                f"The chat template in {tokenizer.name_or_path} cannot render any conversation ({error})",
                "Fetch the tokenizer's files again, or calibrate on plain text",
            ) from error
        raise BadDataError(
            f"{where} cannot be rendered by the chat template in {tokenizer.name_or_path} ({error})",
            "Mend or remove the record",
        ) from error
    if begins and tokenizer.bos_token:
        text = text.removeprefix(tokenizer.bos_token)
    ended = text.rstrip()
    return ended if tokenizer.eos_token and ended.endswith(tokenizer.eos_token) else text


def _refuses_anything(tokenizer: Any, template: str) -> bool:
    plain = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    try:
        tokenizer.apply_chat_template(plain, chat_template=template, tokenize=False)
    except Exception:  # as above
        return True
    return False


def _message(message: Any, number: int) -> dict[str, object]:
    if not isinstance(message, Mapping):
        raise ValueError(f"message {number} is a {type(message).__name__}, expected role and content")
    if "role" in message:
        role, content, known = message["role"], message.get("content"), {"role", "content"}
        if not isinstance(role, str) or not role:
            raise ValueError(f"message {number} has the role {shown(role)}")
    elif "from" in message:
        role, content, known = SHAREGPT_ROLES.get(str(message["from"])), message.get("value"), {"from", "value"}
        if role is None:
            raise ValueError(f"message {number} is from {shown(message['from'])}, expected human, gpt, system or tool")
    else:
        raise ValueError(f"message {number} has neither role and content nor from and value")
    rest = {str(key): value for key, value in message.items() if key not in known and value is not None}
    calls = rest.pop("tool_calls", None) or rest.pop("function_call", None)
    if message.get("from") == "function_call":
        content, calls = None, content
    called = {"tool_calls": _tool_calls(calls, number)} if calls else {}
    return {"role": "tool" if role == "function" else role, "content": _text(content, number), **called, **rest}


def _text(content: Any, number: int) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, Sequence) and not isinstance(content, bytes):
        parts = []
        for part in content:
            if not isinstance(part, Mapping) or not isinstance(part.get("text"), str):
                kind = part.get("type", "unknown") if isinstance(part, Mapping) else type(part).__name__
                raise ValueError(f"message {number} holds a part that is not text ({shown(kind)})")
            parts.append(part["text"])
        return "".join(parts)
    raise ValueError(f"message {number} has content of type {type(content).__name__}, expected text")


def _tool_calls(content: Any, number: int) -> list[dict[str, object]]:
    try:
        calls = json.loads(content) if isinstance(content, str) else content
    except (ValueError, RecursionError) as error:
        raise ValueError(f"message {number} is a function call that is not JSON ({error})") from error
    return [_tool_call(call, number) for call in (calls if isinstance(calls, list) else [calls])]


def _tool_call(call: Any, number: int) -> dict[str, object]:
    if isinstance(call, Mapping) and "function" not in call:
        call = {"type": "function", "function": call}
    function = call["function"] if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise ValueError(f"message {number} is a function call without a name")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            read = json.loads(arguments or "{}")
        except (ValueError, RecursionError):
            read = arguments
        function = {**function, "arguments": read if isinstance(read, dict) else arguments}
    return {**call, "function": function}


def _tools(tools: Any) -> list[Any] | None:
    """Return tools as a list: many data sets keep them as a string of JSON."""
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"its tools are not JSON ({error})") from error
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise ValueError("its tools are not a list of JSON schemas")
    return tools
