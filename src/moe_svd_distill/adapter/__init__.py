"""Assembling, checking and merging what comes out: a PEFT LoRA adapter in the hub checkpoint's layout.

Nothing here imports torch, transformers or peft before a function that needs it runs.
"""

from moe_svd_distill.adapter.configuration import build_configuration
from moe_svd_distill.adapter.load_check import LoadReport, check_loads
from moe_svd_distill.adapter.naming import lora_keys, parse_key

__all__ = ["LoadReport", "build_configuration", "check_loads", "lora_keys", "parse_key"]
