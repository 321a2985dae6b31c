"""What an error says of another library's error."""

from __future__ import annotations

import pytest

from moe_svd_distill.errors import BadDataError, reason_of

ADVICE = (
    "The repository /m contains custom code which must be executed to correctly load the model. You can inspect it at "
    "https://hf.co//m .\nPlease pass the argument `trust_remote_code=True` to allow custom code to be run."
)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("one\ntwo", "one"),
        ("Several faults:\n\n  - layers is -1\nmore", "Several faults: - layers is -1"),
        ("a:\nb:\nc\nd", "a: b: c"),
        ("only this:", "only this:"),
        ("", "ValueError"),
    ],
)
def test_a_reason_is_not_cut_off_at_a_colon(text: str, reason: str) -> None:
    assert reason_of(ValueError(text)) == reason


@pytest.mark.parametrize("text", [ADVICE, f"cannot be loaded ({ADVICE})", "set trust_remote_code=True"])
def test_nobody_is_told_to_run_the_code_of_a_model(text: str) -> None:
    error = BadDataError(text, "Add a tokenizer.json")
    assert "trust_remote_code" not in str(error)
    assert "never done here" in str(error)
    assert str(error).count("(") == str(error).count(")")
