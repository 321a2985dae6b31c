"""Number formats: which one products and models run in on a device, and values that are no numbers."""

import torch
from torch import Tensor

_WIDE = 512


def matmul_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the device multiplies it in hardware, otherwise float32.

    CUDA devices and CPUs with AMX or AVX-512-BF16 have such instructions. On other CPUs a bfloat16 product is emulated
    and many times slower than the float32 one.
    """
    if device.type == "cuda":
        return torch.bfloat16
    if device.type == "cpu" and _cpu_multiplies_bfloat16():
        return torch.bfloat16
    return torch.float32


def compute_dtype(device: torch.device, width: int = 0) -> torch.dtype:
    """Type that a model computes in unless somebody asks for another.

    bfloat16 on a GPU, and on a CPU that multiplies it in hardware where the model is wide enough to gain by it (2.4
    times the products a second at a width of 896); elsewhere float32.

    Args:
        device: Where it computes.
        width: Of its residual stream; 0 where that is not known.
    """
    return matmul_dtype(device) if device.type != "cpu" or width >= _WIDE else torch.float32


def _cpu_multiplies_bfloat16() -> bool:
    for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        probe = getattr(torch.cpu, name, None)
        if probe is not None and bool(probe()):
            return True
    return False


def count_not_finite(tensor: Tensor) -> int:
    """How many of a tensor's entries are NaN or Inf; either makes the sum so, and few finite tensors' sums are."""
    if not tensor.is_floating_point() or bool(torch.isfinite(tensor.sum())):
        return 0
    return tensor.numel() - int(torch.isfinite(tensor).sum())
