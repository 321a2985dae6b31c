"""A head that is stored beside the embeddings it is said to be."""

from __future__ import annotations

from moe_svd_distill.checkpoints.checkpoint import Checkpoint
from moe_svd_distill.errors import BadDataError, shown

BLOCK_ROWS = 4096


def refuse_other_head(checkpoint: Checkpoint, head: str, embedding: str) -> None:
    """Refuse a model that ties its head to its embeddings and stores another one as well.

    transformers 5 takes the stored head, vLLM and earlier versions take the embeddings: whatever was made for the one
    would be wrong with the other.

    Args:
        checkpoint: The model.
        head: Stored name of its head.
        embedding: Stored name of the embeddings.

    Raises:
        BadDataError: The two differ.
    """
    import torch

    shapes = checkpoint[head].shape, checkpoint[embedding].shape
    same = shapes[0] == shapes[1] and all(
        torch.equal(*(checkpoint.read_rows(name, begin, begin + BLOCK_ROWS).float() for name in (head, embedding)))
        for begin in range(0, shapes[0][0], BLOCK_ROWS)
    )
    if not same:
        raise BadDataError(
            f"{checkpoint.title} ties its head to its embeddings, but {shown(head)} and {shown(embedding)} differ in "
            "its files: transformers 5 takes the head, other programs the embeddings",
            "Set tie_word_embeddings to false in config.json if the head is meant, else remove the head from the files",
        )
