"""An adapter in another layout or for another class of the same student: the same changes under other keys."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from moe_svd_distill.adapter.adapter_file import read_json, shapes_of
from moe_svd_distill.adapter.configuration import (
    AdapterConfiguration,
    build_configuration,
    check_options,
    plain_configuration,
)
from moe_svd_distill.adapter.gguf_file import write_gguf_adapter
from moe_svd_distill.adapter.keys import AdapterKeys, planned_tensors
from moe_svd_distill.adapter.low_rank_pairs import LowRankPairs
from moe_svd_distill.adapter.naming import whole_key, whole_modules
from moe_svd_distill.adapter.peft_model import modules_of
from moe_svd_distill.adapter.settling import settle_keys
from moe_svd_distill.adapter.student import notes_on_student, student_of
from moe_svd_distill.adapter.verify import check_loads
from moe_svd_distill.architecture.architecture import Architecture
from moe_svd_distill.architecture.matrices import Kind
from moe_svd_distill.checkpoints import Checkpoint
from moe_svd_distill.errors import BadDataError
from moe_svd_distill.execution.planned import Planned, write_tensors
from moe_svd_distill.files.names import ADAPTER_FILE, CONFIGURATION_FILE, GGUF_ADAPTER_FILE
from moe_svd_distill.files.writing import new_folder, write_json

Format = Literal["peft", "plain", "fused", "gguf"]
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


@dataclass(frozen=True)
class ExportReport:
    """What was written.

    Attributes:
        output: The folder.
        tensors: In the adapter's file.
        loads: Whether PEFT on the installed transformers loads every tensor; `why_not` says why not. None of a file
            that is not for PEFT.
        limits: What should be known, and what programs that serve adapters make of it, a sentence each.
    """

    output: Path
    tensors: int
    loads: bool | None
    why_not: str
    limits: tuple[str, ...]


def export(
    adapter_folder: Path | str,
    output: Path | str,
    layout: Format,
    student: Checkpoint | Path | str | None = None,
    *,
    text_only: bool = False,
) -> ExportReport:
    """Write an adapter anew.

    Args:
        adapter_folder: The adapter.
        output: A new or empty folder.
        layout: peft: as PEFT on transformers 5 takes it, stored names first. plain: stored names alone, one pair for
            each stored matrix, in the configuration the shortest names that name nothing else. fused: one pair for all
            experts of a layer. gguf: a file that llama.cpp loads beside the model's, which are for text alone anyway.
        student: The student or its folder; default: the base model that the adapter names, if it lies here.
        text_only: For the student's class for text alone, where the checkpoint's own takes more than text.

    Raises:
        BadDataError: The adapter does not fit the student, or has a change that the layout has no name for.
        MissingInputError: A file of the adapter, or a package that writes the layout, is not there.
        IncompatiblePairError: There is no class for text alone.
        UsageError: No student is at hand.
        CannotWriteError: The output is not empty, or the disk is full.
    """
    source = Path(adapter_folder)
    architecture = student_of(student, read_json(source / CONFIGURATION_FILE), "an export")
    pairs = LowRankPairs(source, architecture)
    check_options(pairs.configuration, whole_modules(shapes_of(pairs.header)))
    pairs.refuse_partial()
    if layout == "gguf":
        return _for_llama_cpp(source, Path(output).absolute(), pairs, architecture)
    aimed = Architecture(architecture.checkpoint, text_only=True) if text_only else architecture
    keys = settle_keys(aimed)
    if layout == "fused":
        keys = keys.with_one_pair_a_parameter()
    base = str(pairs.configuration.get("base_model_name_or_path") or architecture.checkpoint.source)
    configuration, tensors = (_plain if layout == "plain" else _for_peft)(keys, pairs, base)
    if pairs.head is not None:
        head = pairs.read_head()
        module = aimed.head_slot.name.removesuffix(".weight")
        tensors[whole_key(module)] = Planned(tuple(head.shape), head.dtype, pairs.read_head)
    target = Path(output).absolute()
    with new_folder(target) as folder:
        write_tensors(tensors, folder / ADAPTER_FILE)
        write_json(folder / CONFIGURATION_FILE, configuration)
        why_not = ""
        try:
            check_loads(folder, architecture.checkpoint.config, text_only=text_only)
        except BadDataError as error:
            if layout != "plain":
                raise
            why_not = error.what
    limits = notes_on_student(source, architecture.checkpoint) + served(configuration, keys, pairs, layout)
    return ExportReport(target, len(tensors), not why_not, why_not, limits)


def _for_llama_cpp(source: Path, target: Path, pairs: LowRankPairs, architecture: Architecture) -> ExportReport:
    with new_folder(target) as folder:
        tensors = write_gguf_adapter(pairs, architecture, folder / GGUF_ADAPTER_FILE)
    use = f"llama.cpp: --lora {target / GGUF_ADAPTER_FILE} beside a GGUF file of {architecture.checkpoint.title}"
    return ExportReport(target, tensors, None, "", (*notes_on_student(source, architecture.checkpoint), use))


def served(configuration: AdapterConfiguration, keys: AdapterKeys, pairs: LowRankPairs, layout: str) -> tuple[str, ...]:
    """What programs that serve adapters need or refuse, from their sources (docs/head-formats.md)."""
    ranks = [configuration["r"], *configuration["rank_pattern"].values()]
    allowed = next((rank for rank in VLLM_RANKS if rank >= max(ranks)), None)
    found = [
        f"vLLM: --max-lora-rank {allowed}" if allowed else f"vLLM takes ranks up to {VLLM_RANKS[-1]}, not {max(ranks)}"
    ]
    if len(set(ranks)) > 1:
        found.append("SGLang wants one rank for all tensors, this has " + ", ".join(map(str, sorted(set(ranks)))))
    if pairs.head is not None:
        found.append("vLLM and SGLang take no head that is saved whole: merge it")
    changed = [target for target in keys.targets.values() if not set(target.names).isdisjoint(pairs)]
    if any(target.matrices and target.matrices[0].kind is Kind.PARAMETER for target in changed):
        found.append("SGLang takes no pair of a router")
    if layout != "plain" and any(not target.own_keys and len(target.names) > 1 for target in changed):
        found.append("SGLang reads no pair that is one for all experts; vLLM does for models it holds fused")
    if any(not target.matrices for target in changed):
        found.append("vLLM takes pairs of head and embeddings for some architectures only")
    return tuple(found)


def _for_peft(keys: AdapterKeys, pairs: LowRankPairs, base: str) -> tuple[AdapterConfiguration, dict[str, Planned]]:
    targets = keys.changed_by(list(pairs))
    ranks = {target.parameter: target.rank(pairs.rank) for target in targets}
    configuration = build_configuration(keys, ranks, base_model=base, whole_head=pairs.head is not None)
    modules = modules_of(keys.architecture, configuration) if any(not t.own_keys for t in targets) else {}
    return configuration, planned_tensors(keys, targets, modules, pairs)


def _plain(keys: AdapterKeys, pairs: LowRankPairs, base: str) -> tuple[AdapterConfiguration, dict[str, Planned]]:
    by_name = keys.architecture.by_name
    if nameless := next((name for name in pairs if name in by_name and not by_name[name].stored), None):
        raise BadDataError(
            f"{nameless} has no name of its own in the student's files: they hold all experts in one tensor",
            "Export with --format fused",
        )
    # Stored names whatever PEFT makes of them.
    targets = [replace(target, own_keys=True) for target in keys.changed_by(list(pairs))]
    ranks = {name.removesuffix(".weight"): pairs.rank(name) for name in pairs}
    head = (keys.architecture.head_slot.name.removesuffix(".weight"),) if pairs.head else ()
    architecture = keys.architecture
    modules = {name for name, _ in architecture.skeleton.model.named_modules()}
    stored = {name.removesuffix(".weight") for name in architecture.checkpoint}
    configuration = plain_configuration(ranks, base_model=base, whole=head, every=modules | stored)
    return configuration, planned_tensors(keys, targets, {}, pairs)
