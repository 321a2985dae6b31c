"""Which type a model computes in."""

from __future__ import annotations

import pytest
import torch

from moe_svd_distill.algebra import dtypes


@pytest.mark.parametrize(
    ("device", "in_hardware", "width", "expected"),
    [
        ("cuda", False, 0, torch.bfloat16),
        ("cpu", True, 896, torch.bfloat16),
        ("cpu", True, 128, torch.float32),  # nothing to gain
        ("cpu", True, 0, torch.float32),  # not known
        ("cpu", False, 4096, torch.float32),
    ],
)
def test_the_type_follows_from_device_and_width(
    monkeypatch: pytest.MonkeyPatch, device: str, in_hardware: bool, width: int, expected: torch.dtype
) -> None:
    monkeypatch.setattr(dtypes, "_cpu_multiplies_bfloat16", lambda: in_hardware)
    assert dtypes.compute_dtype(torch.device(device), width) == expected
