"""The blocks of a network: where nearly all of its weights and time are.

There are two notions of them, as neither serves both uses. Programs are compiled, and layers rounded, for what repeats
(`repeated_blocks`): the transformer blocks inside a UNet's levels, of which one program serves many; a level would be a
program of its own. Weights are gathered for all there is (`outermost_blocks`): a UNet's levels, since the convolutions
between its transformer blocks would else lie with the rest of the network, whole for as long as it computes; and blocks
that diffusers does not name. In a transformer they are the same modules but for such ones.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fewstep.errors import FewstepError

_VARIANTS = 64
"""Programs that torch may compile for one class of block: roles x gradient on or off x kinds of sizes, and room."""


def repeated_blocks(network: nn.Module) -> dict[str, nn.Module]:
    """The blocks of `network` by name: modules of the classes that diffusers names, as far as they stand in lists.

    Of a network of several networks (Wan2.2-A14B), those of all. Empty where a class names none.
    """
    kinds: Any = {
        name
        for module in network.modules()
        for name in getattr(module, "_repeated_blocks", None) or getattr(module, "_no_split_modules", None) or ()
    }
    lists = [(name, module) for name, module in network.named_modules() if isinstance(module, nn.ModuleList)]
    return {
        f"{name}.{index}": block
        for name, blocks in lists
        for index, block in enumerate(blocks)
        if type(block).__name__ in kinds
    }


def outermost_blocks(network: nn.Module) -> list[nn.Module]:
    """The entries of a network's outermost lists of modules: blocks of a transformer, levels of a UNet."""
    found: list[nn.Module] = []
    for child in network.children():
        lists = isinstance(network, nn.ModuleList) and not isinstance(child, nn.ModuleList)
        if not lists:
            found += outermost_blocks(child)
        elif any(True for _ in child.parameters()):
            found.append(child)
    return found


def compile_blocks(network: nn.Module, backend: str) -> None:
    """Let torch.compile translate each repeated block when it is first called; the rest of the network stays as it is.

    Blocks of one class share their programs. There is one for each adapter that may be active, with and without
    gradient, and for one sample and several; other sizes are the same program (`dynamic`), so that the number of
    translations does not grow with training.

    Raises:
        FewstepError: the network names no repeated blocks.
    """
    blocks = repeated_blocks(network)
    if not blocks:
        raise FewstepError(
            f"found a {type(network).__name__} without repeated blocks to compile, expected a network of diffusers "
            "that names them (_repeated_blocks), fix: leave --compile out"
        )
    settings: Any = torch._dynamo.config
    limit = "recompile_limit" if hasattr(settings, "recompile_limit") else "cache_size_limit"  # the second: torch 2.6
    setattr(settings, limit, max(getattr(settings, limit), _VARIANTS))
    for block in blocks.values():
        block.compile(backend=backend, dynamic=True)
