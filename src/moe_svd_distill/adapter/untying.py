"""A tied student merged with a head of its own: the tensor that its files lack, and the files that say it is tied.

Loaders take the head from the embeddings while config.json ties the two, whatever else is in the weights files. So the
merged model has a ``lm_head.weight``, an index that lists it, and a config.json that ties nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from moe_svd_distill.adapter.low_rank_pairs import LowRankPairs
from moe_svd_distill.adapter.rewriting import Addition
from moe_svd_distill.adapter.whole_head import replaced_blocks
from moe_svd_distill.architecture.architecture import Architecture
from moe_svd_distill.checkpoints import Checkpoint
from moe_svd_distill.checkpoints.layout import CONFIG, INDEX
from moe_svd_distill.files.reading import json_object, locate, read_small
from moe_svd_distill.files.writing import json_text

Added = tuple[Path, Addition]


def added_head(pairs: LowRankPairs, architecture: Architecture) -> Added | None:
    """The head saved whole and the weights file to add it to, which is that of the embeddings, in their dtype.

    None where nothing is saved whole, or where the student has the tensor already.
    """
    checkpoint, name = architecture.checkpoint, architecture.head
    if pairs.head is None or name in checkpoint:
        return None
    info, head = checkpoint[architecture.embedding], pairs.read_head()
    blocks = replaced_blocks(head, checkpoint.read(architecture.embedding).dtype, name)
    return info.file, Addition(name, info.dtype, (head.shape[0], head.shape[1]), blocks)


def untied_files(checkpoint: Checkpoint, addition: Added | None) -> Mapping[str, bytes]:
    """The files beside the weights that change when a tied student gets a head of its own, by name.

    Args:
        checkpoint: The tied student.
        addition: What its files lack, if they do.
    """
    config = dict(checkpoint.config)
    if isinstance(text := config.get("text_config"), dict) and "tie_word_embeddings" in text:
        config["text_config"] = text | {"tie_word_embeddings": False}
    changed = {CONFIG: json_text(config | {"tie_word_embeddings": False}).encode()}
    if addition is not None and (checkpoint.folder / INDEX).exists():
        file, head = addition
        index = json_object(read_small(locate(checkpoint.folder, INDEX)), INDEX, unique_keys=True)
        index["weight_map"][head.name] = file.relative_to(checkpoint.folder).as_posix()
        metadata = index.get("metadata")
        if isinstance(metadata, dict) and isinstance(size := metadata.get("total_size"), int):
            metadata["total_size"] = size + head.bytes
        if isinstance(metadata, dict) and isinstance(count := metadata.get("total_parameters"), int):
            metadata["total_parameters"] = count + head.shape[0] * head.shape[1]
        changed[INDEX] = json_text(index).encode()
    return changed
