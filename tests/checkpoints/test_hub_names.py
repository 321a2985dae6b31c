"""What counts as a hub id, and how the hub library's errors are worded; without any server."""

from __future__ import annotations

import errno

import pytest
from huggingface_hub import errors

from moe_svd_distill.checkpoints.hub import HubModel, parse_hub_id, redact, translate

SECRET = "hf_averysecrettoken"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("org/name", HubModel("org/name")),
        ("Qwen/Qwen3-30B-A3B_x.y@refs/pr/1", HubModel("Qwen/Qwen3-30B-A3B_x.y", "refs/pr/1")),
        ("org/name@0123abc", HubModel("org/name", "0123abc")),
        ("name", None),
        ("org/name/more", None),
        ("org/name@", None),
        ("org/name@a@b", None),
        ("org/..", None),
        ("org/na--me", None),
        ("org/name@../../x", None),
        ("/org/name", None),
        ("./org/name", None),
        ("org/name\n", None),
        ("örg/name", None),
    ],
)
def test_what_is_a_hub_id(text: str, expected: HubModel | None) -> None:
    assert parse_hub_id(text) == expected


def test_secrets_are_redacted() -> None:
    text = f"GET https://user:word@host/x?t={SECRET} Authorization: Bearer abc.def other-secret"
    assert redact(text, "other-secret") == "GET https://***@host/x?t=*** Authorization: Bearer *** ***"


@pytest.mark.parametrize(
    ("error", "exit_code"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), 73),
        (PermissionError(errno.EACCES, "Permission denied"), 73),
        (OSError("Consistency check failed: file should be of size 3"), 69),
        (TimeoutError(f"timed out with {SECRET}"), 69),
        (ValueError("something that the library should not raise"), 69),
        (errors.HFValidationError("bad name"), 66),
        (errors.LocalEntryNotFoundError("nothing in the cache"), 69),
    ],
)
def test_errors_without_an_answer(error: Exception, exit_code: int) -> None:
    translated = translate(error, "org/name", SECRET)
    assert translated.exit_code == exit_code
    assert SECRET not in str(translated)
    assert "org/name" in translated.what
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        assert translated.what == "Cannot write org/name into the hub's cache: the disk is full"
        assert "HF_HOME" in translated.action
