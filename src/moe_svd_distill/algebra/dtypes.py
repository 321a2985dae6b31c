"""Which number format the large matrix products should run in on a given device."""

import torch


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


def _cpu_multiplies_bfloat16() -> bool:
    for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        probe = getattr(torch.cpu, name, None)
        if probe is not None and bool(probe()):
            return True
    return False
