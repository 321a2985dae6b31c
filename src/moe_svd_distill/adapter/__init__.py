"""Assembling, checking and merging what comes out: a PEFT LoRA adapter in the hub checkpoint's layout.

Nothing here imports torch, transformers or peft before a function that needs it runs.
"""

from moe_svd_distill.adapter.adapter_file import (
    ADAPTER_FILE,
    CONFIGURATION_FILE,
    RECORD_FILE,
    adapter_header,
    shapes_of,
    write_json,
)
from moe_svd_distill.adapter.agreement import Agreement, check_agreement
from moe_svd_distill.adapter.configuration import build_configuration
from moe_svd_distill.adapter.digest import sha256_of
from moe_svd_distill.adapter.inference import Inference, infer_family
from moe_svd_distill.adapter.key_repair import repair_keys, repaired_keys, unmatched_keys
from moe_svd_distill.adapter.load_check import LoadReport, check_loads
from moe_svd_distill.adapter.low_rank_pairs import LowRankPair, LowRankPairs
from moe_svd_distill.adapter.merge import MergeReport, merge
from moe_svd_distill.adapter.naming import is_embedding, lora_keys, parse_key, whole_key
from moe_svd_distill.adapter.pair_shapes import PairShape, WholeShape, pair_shapes, whole_shapes
from moe_svd_distill.adapter.random_control import write_random_control
from moe_svd_distill.adapter.rebuild import inference_of, rebuild_configuration
from moe_svd_distill.adapter.scaling import scaled_copy
from moe_svd_distill.adapter.verify import VerifyReport, verify

__all__ = [
    "ADAPTER_FILE",
    "CONFIGURATION_FILE",
    "RECORD_FILE",
    "Agreement",
    "Inference",
    "LoadReport",
    "LowRankPair",
    "LowRankPairs",
    "MergeReport",
    "PairShape",
    "VerifyReport",
    "WholeShape",
    "adapter_header",
    "build_configuration",
    "check_agreement",
    "check_loads",
    "infer_family",
    "inference_of",
    "is_embedding",
    "lora_keys",
    "merge",
    "pair_shapes",
    "parse_key",
    "rebuild_configuration",
    "repair_keys",
    "repaired_keys",
    "scaled_copy",
    "sha256_of",
    "shapes_of",
    "unmatched_keys",
    "verify",
    "whole_key",
    "whole_shapes",
    "write_json",
    "write_random_control",
]
