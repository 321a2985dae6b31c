"""A conversation as the text that a tokenizer's chat template makes of it."""

from __future__ import annotations

from typing import Any

from moe_svd_distill.calibration.chat import Chat
from moe_svd_distill.errors import BadDataError, MissingInputError

FIXED_DATE = "26 Jul 2024"
"""What templates that write today's date write instead: the same record must be the same text tomorrow."""

_FIXED_CLOCK = "{%- macro strftime_now(format) -%}" + FIXED_DATE + "{%- endmacro -%}"


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
        BadDataError: The template refuses the conversation, for example its order of roles.
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
        raise BadDataError(
            f"{where} cannot be rendered by the chat template in {tokenizer.name_or_path} ({error})",
            "Mend or remove the record",
        ) from error
    if begins and tokenizer.bos_token:
        text = text.removeprefix(tokenizer.bos_token)
    ended = text.rstrip()
    return ended if tokenizer.eos_token and ended.endswith(tokenizer.eos_token) else text
