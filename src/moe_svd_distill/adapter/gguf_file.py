"""An adapter as the GGUF file that llama.cpp loads beside a model: a pair for each of its tensors, experts in one.

llama.cpp adds ``alpha / rank · B (A x)`` with one alpha for the file and each tensor's own rank (`llama-adapter.h`), so
what another scale or another rank would change goes into B. The rows of B are turned as those of the tensor are.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from moe_svd_distill.adapter.low_rank_pairs import LowRankPairs
from moe_svd_distill.architecture.architecture import Architecture
from moe_svd_distill.checkpoints.llama_cpp.header import package_fault
from moe_svd_distill.checkpoints.llama_cpp.names import NAMINGS, OUTSIDE, Naming, Place, places_of
from moe_svd_distill.errors import BadDataError, shown
from moe_svd_distill.execution.planned import Planned, made
from moe_svd_distill.files.dtypes import dtype_code
from moe_svd_distill.files.writing import sync_file

_MERGE = "Merge the adapter (`merge`) and convert the merged model with llama.cpp's convert_hf_to_gguf.py"
_EMBEDDING, _, _HEAD = OUTSIDE


def write_gguf_adapter(pairs: LowRankPairs, architecture: Architecture, file: Path) -> int:
    """Write an adapter for llama.cpp, one tensor in memory at a time; it has no partial pairs (`refuse_partial`).

    Returns:
        How many tensors the file has: two for each tensor of llama.cpp that is changed.

    Raises:
        BadDataError: llama.cpp's names for this architecture are not known here, it applies no adapter to a matrix that
            this one changes, or a value is not finite.
        MissingInputError: The package gguf is not installed.
        CannotWriteError: The disk is full.
    """
    if fault := package_fault(f"{file} is to be a GGUF file"):
        raise fault
    import gguf
    import numpy as np

    model_type = architecture.config.get_text_config().model_type
    if model_type not in NAMINGS:
        what = f"the names that llama.cpp has for {shown(model_type)} are not known here (only {', '.join(NAMINGS)})"
        raise BadDataError(what, _MERGE)
    if pairs.head is not None:
        raise BadDataError("the adapter saves the head whole, and llama.cpp takes pairs alone", _MERGE)
    naming = NAMINGS[model_type]
    ((alpha, _),) = Counter(map(pairs.rank, pairs)).most_common(1)
    planned: dict[str, Planned] = {}
    for tensor, members in _by_tensor(naming, pairs, architecture).items():
        planned |= _planned_pair(tensor, members, pairs, architecture, alpha)
    writer = gguf.GGUFWriter(file, naming.architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(alpha))
    for name, plan in planned.items():
        kind = gguf.GGMLQuantizationType[dtype_code(plan.dtype)]
        size = plan.dtype.itemsize * torch.Size(plan.shape).numel()
        writer.add_tensor_info(name, plan.shape, np.dtype(np.float32), size, raw_dtype=kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        out = writer.fout[0]
        writer.write_padding(out, out.tell())
        for name in planned:  # its own way of writing an array does not say that the disk is full
            out.write(data := made(planned, name, file.name))
            writer.write_padding(out, data.nbytes)
    finally:
        writer.close()
    sync_file(file)
    return len(planned)


def _by_tensor(
    naming: Naming, pairs: LowRankPairs, architecture: Architecture
) -> dict[str, dict[int | None, tuple[str, Place]]]:
    """llama.cpp's tensors to the matrices that make them, by expert."""
    found: dict[str, dict[int | None, tuple[str, Place]]] = defaultdict(dict)
    lost = []
    ends = {architecture.embedding: _EMBEDDING, architecture.head: _HEAD}
    if architecture.tied or "output" in naming.without_adapter:
        ends.pop(architecture.head)
    if architecture.tied:
        ends.pop(architecture.embedding, None)  # llama.cpp would multiply by a pair that it stores for looking up rows
    for matrix in pairs:
        places = [Place(ends[matrix])] if matrix in ends else places_of(naming, matrix)
        if not places:
            lost.append(matrix)
        for place in places:
            found[place.tensor][place.expert] = (matrix, place)
    if lost:
        more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
        raise BadDataError(f"llama.cpp applies no adapter to {lost[0]}{more} of {naming.architecture}", _MERGE)
    return found


def _planned_pair(
    tensor: str,
    members: Mapping[int | None, tuple[str, Place]],
    pairs: LowRankPairs,
    architecture: Architecture,
    alpha: int,
) -> dict[str, Planned]:
    """The pair of one tensor, from those of all experts in their order, or a single one."""
    matrices = [members[expert][0] for expert in sorted(members, key=lambda expert: expert or 0)]
    place = next(iter(members.values()))[1]
    factors = [pairs.scale(matrix) * pairs.rank(matrix) / alpha for matrix in matrices]
    heads = getattr(architecture.config.get_text_config(), place.heads) if place.heads else 0

    def one_left(matrix: str, factor: float) -> Tensor:
        rows = pairs[matrix].left[place.rows]
        if any(factor != 1 for factor in factors):
            rows = factor * rows.float()
        return _turned(rows, heads) if heads else rows

    def stacked(made: list[Tensor]) -> Tensor:
        return made[0] if place.expert is None else torch.stack(made)

    def right() -> Tensor:  # A, (rank, in), or (experts, rank, in)
        return stacked([pairs[matrix].right for matrix in matrices])

    def left() -> Tensor:  # B, (out, rank), or (experts, out, rank)
        return stacked([one_left(*pair) for pair in zip(matrices, factors, strict=True)])

    a, b = right, left
    if tensor == _EMBEDDING:  # a row of A is looked up for each token, and B makes a hidden state of it
        a, b = left, lambda: right().T
    return {f"{tensor}.lora_{side}": _planned(make) for side, make in (("a", a), ("b", b))}


def _planned(make: Callable[[], Tensor]) -> Planned:
    """Made once for its shape and type, and again when its turn comes."""
    once = make()
    return Planned(tuple(once.shape), once.dtype, make)


def _turned(left: Tensor, heads: int) -> Tensor:
    """Rows of queries and keys as llama.cpp has them: those that rotary positions turn together lie side by side."""
    rows, rank = left.shape
    return left.reshape(heads, 2, rows // heads // 2, rank).transpose(1, 2).reshape(rows, rank)
