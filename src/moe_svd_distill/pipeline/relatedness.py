"""How related two models are, from a few rows of their embeddings."""

from __future__ import annotations

from moe_svd_distill.pipeline.pair import ModelPair

ROWS = 1024


def embedding_similarity(pair: ModelPair) -> float | None:
    """Mean cosine of embedding rows of the same number; exactly 1.0 only for identical embeddings.

    Up to ``ROWS`` rows, evenly spread, are read of each model. Rows of one lineage point the same way, those of models
    trained from different initial weights are at right angles.

    Args:
        pair: Teacher and student.

    Returns:
        The mean cosine, or None where the shapes differ.
    """
    import torch

    models = (pair.teacher, pair.student)
    names = [model.layout.find("embedding") for model in models]
    shapes = [model.shapes[name] for model, name in zip(models, names, strict=True) if name]
    if len(shapes) < 2 or shapes[0] != shapes[1]:
        return None
    tensors = [model.checkpoint.read(str(name)) for model, name in zip(models, names, strict=True)]
    step = max(1, shapes[0][0] // ROWS)
    rows = [tensor[::step] for tensor in tensors]
    if torch.equal(rows[0], rows[1]) and torch.equal(tensors[0], tensors[1]):
        return 1.0
    cosine = torch.nn.functional.cosine_similarity(rows[0].float(), rows[1].float(), dim=1)
    return min(float(cosine.nan_to_num(0.0).mean()), 1.0 - 1e-7)
