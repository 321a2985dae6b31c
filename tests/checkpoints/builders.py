"""Small real models on disk, whole and broken, for the tests of every room that reads a checkpoint."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

CONFIG: dict[str, Any] = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 2}


def tiny_tensors(layers: int = 2, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    """A few tensors with the names of a dense model."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    tensors = {"model.embed_tokens.weight": random(32, 8), "model.norm.weight": random(8)}
    for layer in range(layers):
        tensors[f"model.layers.{layer}.self_attn.q_proj.weight"] = random(8, 8)
        tensors[f"model.layers.{layer}.mlp.up_proj.weight"] = random(16, 8)
    return tensors


def write_model(
    folder: Path,
    *,
    tensors: Mapping[str, torch.Tensor] | None = None,
    shards: int = 1,
    index: bool = True,
    config: Mapping[str, Any] | None = CONFIG,
) -> Path:
    """Write a model as one file or as shards, with or without an index; the names go round the shards in turn."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = tiny_tensors() if tensors is None else tensors
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(dict(tensors), folder / "model.safetensors")
        return folder
    names = list(tensors)
    weight_map: dict[str, str] = {}
    for number in range(shards):
        mine = names[number::shards]
        save_file({name: tensors[name] for name in mine}, folder / shard_name(number + 1, shards))
        weight_map |= dict.fromkeys(mine, shard_name(number + 1, shards))
    if index:
        write_index(folder, weight_map)
    return folder


def shard_name(number: int, total: int) -> str:
    """The usual name of a shard."""
    return f"model-{number:05d}-of-{total:05d}.safetensors"


def write_index(folder: Path, weight_map: Mapping[str, Any]) -> None:
    """Write the index of a sharded model."""
    index = {"metadata": {"total_size": 0}, "weight_map": dict(weight_map)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def read_index(folder: Path) -> dict[str, str]:
    """The index's mapping from tensor to file."""
    weight_map: dict[str, str] = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    return weight_map


def entry(dtype: str, shape: Sequence[int], begin: int, end: int) -> dict[str, Any]:
    """One tensor's entry in a header."""
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def safetensors_bytes(header: Mapping[str, Any] | bytes, data: bytes = b"", *, length: int | None = None) -> bytes:
    """The bytes of a file with any header whatever, and any stated length of it."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    if not isinstance(header, bytes):
        text += b" " * (-len(text) % 8)  # as the library does, so that elements are aligned
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def sparse_model(folder: Path, mebibytes: int, count: int) -> Path:
    """A model of which the weights take no room on the disk: all zeros."""
    size = (mebibytes << 20) // count
    header = {f"t{i}": entry("BF16", [size // 2048, 1024], i * size, (i + 1) * size) for i in range(count)}
    write_model(folder)
    raw = safetensors_bytes(header)
    (folder / "model.safetensors").write_bytes(raw)
    os.truncate(folder / "model.safetensors", len(raw) + (mebibytes << 20))
    return folder
