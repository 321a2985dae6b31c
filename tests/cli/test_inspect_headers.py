"""inspect of published models from their headers: every tensor placed, parameters counted, without torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from moe_svd_distill.checkpoints import open_checkpoint
from moe_svd_distill.pipeline.pair import open_model
from tests.support import real_headers

# Published: parameters, and those that one token goes through, in billions. Where the numbers come from:
PUBLISHED = {
    "Qwen3-Coder-480B-A35B": (480, 35),  # its name
    "Qwen3-30B-A3B": (30.5, 3.3),  # model card
    "GLM-4.6": (355, 32),  # report of GLM-4.5, which has the same sizes
    "DeepSeek-V3": (671, 37),  # report; the hub holds 14 more for multi-token prediction
    "Kimi-K2": (1026, 32),  # "1T, 32B"; the hub counts 1,026
    "gpt-oss-120b": (116.83, 5.13),  # model card, which leaves embeddings out of the second
}


def by_hand(c: dict[str, Any]) -> tuple[int, int]:
    """All parameters and those one token goes through, from config.json and the architecture's definition."""
    hidden, layers, heads = c["hidden_size"], c["num_hidden_layers"], c["num_attention_heads"]
    experts = c.get("num_experts") or c.get("n_routed_experts") or c["num_local_experts"]
    dense, shared, width = c.get("first_k_dense_replace", 0), c.get("n_shared_experts", 0), c["intermediate_size"]
    if "kv_lora_rank" in c:
        nope, rope, value = c["qk_nope_head_dim"], c["qk_rope_head_dim"], c["v_head_dim"]
        q, kv = c["q_lora_rank"], c["kv_lora_rank"]
        attention = hidden * q + q + q * heads * (nope + rope)
        attention += hidden * (kv + rope) + kv + kv * heads * (nope + value) + heads * value * hidden
    else:
        queries, keys = heads * c["head_dim"], c["num_key_value_heads"] * c["head_dim"]
        attention = 2 * hidden * queries + 2 * hidden * keys
        attention += (queries + 2 * keys) * bool(c.get("attention_bias"))
        if c["model_type"] == "gpt_oss":
            attention += hidden + heads  # bias of the output, sinks
        else:
            attention += 2 * c["head_dim"]  # norms of queries and keys
    expert = 3 * hidden * c.get("moe_intermediate_size", width)
    router = experts * hidden
    if c["model_type"] == "gpt_oss":
        expert += 2 * width + hidden
        router += experts
    elif shared:
        router += experts  # the correction bias
    outside = 2 * c["vocab_size"] * hidden + hidden + layers * (attention + 2 * hidden) + dense * 3 * hidden * width
    outside += (layers - dense) * (router + shared * expert)
    return outside + (layers - dense) * experts * expert, outside + (layers - dense) * c["num_experts_per_tok"] * expert


def inspected(folder: Path) -> dict[str, Any]:
    """What inspect says, in a process that must not import torch."""
    code = (
        f"import sys; sys.argv=['moe-svd-distill','inspect',{str(folder)!r},'--json']\n"
        "from moe_svd_distill.cli import main\n"
        "try: main()\n"
        "except SystemExit as left: assert left.code in (0, None)\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    facts: dict[str, Any] = json.loads(done.stdout)
    return facts


@pytest.mark.parametrize("model", sorted(PUBLISHED))
def test_every_tensor_is_placed_and_the_parameters_are_those_published(model: str, tmp_path: Path) -> None:
    config = real_headers.CONFIGS[model]
    folder = real_headers.write(model, tmp_path / "m")
    facts = inspected(folder)
    total, active = by_hand(config)
    assert facts["parameters"] == pytest.approx(total, rel=1e-3)
    assert facts["active_parameters"] == pytest.approx(active, rel=1e-3)
    published = PUBLISHED[model]
    assert facts["parameters"] / 1e9 == pytest.approx(published[0], rel=1e-2)
    without_embedding = facts["active_parameters"] - facts["embedding_parameters"]
    assert without_embedding / 1e9 <= published[1] * 1.04
    assert facts["active_parameters"] / 1e9 >= published[1] * 0.99
    assert facts["without_role"] == {}
    assert (facts["layers"], facts["hidden"]) == (config["num_hidden_layers"], config["hidden_size"])
    layers = config["num_hidden_layers"] - config.get("first_k_dense_replace", 0)
    assert facts["roles"]["experts.gate"] == facts["roles"]["experts.down"] == layers * facts["experts"]
    extra = [name for name in facts["not_used"] if f".layers.{config['num_hidden_layers']}." in name]
    assert len(extra) == len(facts["not_used"])
    assert bool(extra) == bool(config.get("num_nextn_predict_layers"))


@pytest.mark.parametrize("model", sorted(PUBLISHED))
def test_every_stored_tensor_is_accounted_for(model: str, tmp_path: Path) -> None:
    opened = open_model(str(real_headers.write(model, tmp_path / "m")), headers_only=True)
    placed = {meaning.view.stored for meaning in opened.layout.meanings.values()} | set(opened.layout.ignored)
    companions = opened.checkpoint.companions
    assert {companions.get(name, name) for name in opened.checkpoint.stored} == placed
    quantised = "quantization_config" in real_headers.CONFIGS[model]
    assert bool(companions) == quantised == (opened.checkpoint.quantisation is not None)


def test_the_files_are_holes(tmp_path: Path) -> None:
    folder = real_headers.write("Qwen3-30B-A3B", tmp_path / "m")
    assert open_checkpoint(folder).total_bytes > 60e9
    assert sum(512 * file.stat().st_blocks for file in folder.iterdir()) < 10e6
