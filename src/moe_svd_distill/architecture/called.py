"""Which modules of a decoder are really called.

PEFT's pairs act in the forward of the module they are put around. Where an architecture reads a module's weight without
calling the module, an adapter changes nothing until it is merged.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from moe_svd_distill.architecture.skeleton import Skeleton

_TOKENS, _VALUE = 8, 0.01


class _Enough(Exception):  # noqa: N818 - not an error: the layers that were asked about have run
    pass


@torch.no_grad()
def never_called(skeleton: Skeleton, modules: Iterable[str], layers: int) -> set[str]:
    """Run the first layers on a few tokens, every weight a constant that takes no memory, and see what is called.

    Args:
        skeleton: The model; nothing of it is in memory, before and after.
        modules: Names of modules inside these layers.
        layers: How many layers to run.
    """
    waiting = {name: skeleton.model.get_submodule(name) for name in modules}
    called: set[int] = set()
    hooks = [module.register_forward_pre_hook(lambda module, _: called.add(id(module))) for module in waiting.values()]
    if layers < len(skeleton.originals):
        hooks.append(skeleton.originals[layers].register_forward_pre_hook(_stop))
    slots = list(skeleton.slots.values())
    try:
        for slot in slots:
            value = torch.tensor(_VALUE if slot.dtype.is_floating_point else 1, dtype=slot.dtype)
            slot.fill(value.expand(slot.shape))
        skeleton.decoder(input_ids=torch.arange(_TOKENS)[None] % skeleton.vocabulary, use_cache=False)
    except _Enough:
        pass
    finally:
        for hook in hooks:
            hook.remove()
        for slot in slots:
            slot.clear()
    return {name for name, module in waiting.items() if id(module) not in called}


def _stop(module: nn.Module, arguments: object) -> None:
    raise _Enough
