"""The output head, and what follows it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeForCausalLM

from moe_svd_distill.errors import IncompatiblePairError
from moe_svd_distill.streaming import ScaledAdapter, load_head
from tests.streaming.conftest import Case
from tests.support import tiny


def test_an_adapter_is_rounded_once(sparse: Case) -> None:
    """In bf16 a small delta must not be rounded away before it is added."""
    pairs = tiny.random_pairs(sparse.folder)
    exact = tiny.truth(sparse.folder, pairs)["lm_head.weight"]
    head = load_head(sparse.checkpoint, dtype=torch.bfloat16, adapter=ScaledAdapter(sparse.adapter))
    assert torch.equal(head.weight, exact.bfloat16())
    assert head.bias is None


def test_another_type(sparse: Case) -> None:
    head = load_head(sparse.checkpoint, dtype=torch.float64)
    assert torch.equal(head.weight, tiny.hub_weights(sparse.folder)["lm_head.weight"].double())
    assert head.logits(torch.randn(2, 3, 32)).shape == (2, 3, 64)


def test_something_unknown_after_the_head_is_refused(sparse: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = Glm4MoeForCausalLM.forward

    def changed(self: Any, *arguments: Any, **keywords: Any) -> Any:
        output = forward(self, *arguments, **keywords)
        output.logits = output.logits - output.logits.mean(-1, keepdim=True)
        return output

    monkeypatch.setattr(Glm4MoeForCausalLM, "forward", changed)
    with pytest.raises(IncompatiblePairError, match="does something to its logits that is not known here"):
        load_head(sparse.checkpoint)
