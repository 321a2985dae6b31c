"""How related two models are: sizes, vocabulary, and lineage from a few rows of a few tensors."""

from __future__ import annotations

from dataclasses import asdict

from moe_svd_distill.errors import DistillError
from moe_svd_distill.pairing.lineage import (
    Relatedness,
    SizeDifference,
    Vocabularies,
    VocabularyRelation,
    judge,
    shapes_agree,
)
from moe_svd_distill.pipeline.pair import ModelPair

ROWS = 1024


def measure_relatedness(pair: ModelPair, *, sample_weights: bool = True) -> Relatedness:
    """Compare two models within seconds, whatever their size; at most 64 MiB of weights are read of each.

    Args:
        pair: Teacher and student.
        sample_weights: Whether weights may be read; without, the lineage stays unknown.
    """
    from moe_svd_distill.pipeline.probing import probe_pair

    families = (pair.teacher.layout.model_type, pair.student.layout.model_type)
    differences = size_differences(pair)
    vocabulary = relate_vocabularies(pair)
    same_shape = shapes_agree(families, differences)
    if not sample_weights:
        lineage, reason = judge((), same_shape=same_shape, all_alike=False)
        skipped = ("lineage: only the headers were read, because the weights are not on this machine",)
        return Relatedness(families, differences, vocabulary, (), skipped, lineage, reason, (0, 0))
    found = probe_pair(pair, vocabulary, same_shape=same_shape)
    lineage, reason = judge(found.probes, same_shape=same_shape, all_alike=found.all_alike)
    return Relatedness(
        families, differences, vocabulary, found.probes, found.skipped, lineage, reason, found.bytes_read
    )


def weights_at_hand(pair: ModelPair) -> bool:
    """Whether every weights file of both models is on this machine."""
    models = (pair.teacher, pair.student)
    return all(file.exists() for model in models for file in {info.file for info in model.checkpoint.stored.values()})


def size_differences(pair: ModelPair) -> tuple[SizeDifference, ...]:
    """Every size that differs."""
    teacher, student = asdict(pair.teacher.layout.geometry), asdict(pair.student.layout.geometry)
    return tuple(
        SizeDifference(name, int(size), int(student[name])) for name, size in teacher.items() if size != student[name]
    )


def relate_vocabularies(pair: ModelPair) -> VocabularyRelation:
    """Whether both number their tokens alike; unknown where a tokenizer is missing or unreadable."""
    from moe_svd_distill.calibration.vocabulary import compare_vocabularies

    sizes = (pair.teacher.layout.geometry.vocabulary, pair.student.layout.geometry.vocabulary)
    try:
        found = compare_vocabularies(pair.teacher.checkpoint.folder, pair.student.checkpoint.folder)
    except DistillError as error:
        return VocabularyRelation(Vocabularies.UNKNOWN, min(sizes), reasons=(error.what,))
    reasons = tuple(found.reasons)
    if sizes[0] != sizes[1]:
        reasons += (f"the teacher's embeddings have {sizes[0]} rows and the student's {sizes[1]}",)
    if not found.equal:
        kind, reasons = Vocabularies.DIFFERENT, (*reasons, found.overlap)
    else:
        kind = Vocabularies.PADDED if reasons else Vocabularies.EQUAL
    return VocabularyRelation(kind, min(found.shared, *sizes), found.common, reasons)


def embedding_similarity(pair: ModelPair) -> float | None:
    """Mean cosine of embedding rows of the same number; exactly 1.0 only for identical embeddings.

    Up to ``ROWS`` rows, evenly spread, are read of each model. Rows of one lineage point the same way, those of models
    trained from different initial weights are at right angles.

    Args:
        pair: Teacher and student.

    Returns:
        The mean cosine, or None where the shapes differ or the weights are not on this machine.
    """
    import torch

    models = (pair.teacher, pair.student)
    names = [model.layout.find("embedding") for model in models]
    shapes = [model.shapes[name] for model, name in zip(models, names, strict=True) if name]
    if len(shapes) < 2 or shapes[0] != shapes[1] or not weights_at_hand(pair):
        return None
    tensors = [model.checkpoint.read(str(name)) for model, name in zip(models, names, strict=True)]
    step = max(1, shapes[0][0] // ROWS)
    rows = [tensor[::step] for tensor in tensors]
    if torch.equal(rows[0], rows[1]) and torch.equal(tensors[0], tensors[1]):
        return 1.0
    cosine = torch.nn.functional.cosine_similarity(rows[0].float(), rows[1].float(), dim=1)
    return min(float(cosine.nan_to_num(0.0).mean()), 1.0 - 1e-7)
