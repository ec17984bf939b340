"""Attention over chosen blocks, three ways that are equal to rounding, gradients included.

Legend: B batch, H heads, N tokens, D width of a head, b tokens of a block, n = ceil(N / b) blocks, W global tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from fewstep.core.tensors import at_least_float32
from fewstep.errors import FewstepError

_GATHERED = 2**21
"""Numbers of keys that `gathered` copies together at a time."""
_SHORT = 1024
"""Tokens up to which a mask costs less than gathering."""
_TILE = 128
"""FlexAttention's blocks are whole numbers of these."""


class Coarse(NamedTuple):
    """Further keys that every query sees."""

    key: Tensor
    """(B, H, W, D)."""
    value: Tensor
    """(B, H, W, D)."""
    bias: Tensor
    """(W,) added to their scores."""


Attend = Callable[[Tensor, Tensor, Tensor, Tensor, int, Coarse | None], Tensor]
"""(query, key, value (B, H, N, D), seen (B, H, n, n) bool, b, coarse) -> (B, H, N, D)."""


def chosen_engine(name: str, device: torch.device, tokens: int, block: int) -> str:
    """The engine called `name`; for "auto" FlexAttention on a GPU, else by the number of tokens.

    Raises:
        FewstepError: FlexAttention where it has no backward, or with blocks that its kernels do not have.
    """
    fits = device.type == "cuda" and block % _TILE == 0
    if name == "flex" and not fits:
        raise FewstepError(
            f"found FlexAttention for blocks of {block} tokens on {device.type}, expected a GPU (it has no "
            f"backward elsewhere) and a multiple of {_TILE}, fix: --sparse-engine auto"
        )
    if name != "auto":
        return name
    return "flex" if fits else "masked" if tokens <= _SHORT else "gathered"


def masked(query: Tensor, key: Tensor, value: Tensor, seen: Tensor, block: int, coarse: Coarse | None) -> Tensor:
    """Dense attention under a mask: as much work as without one, and N x N numbers of memory."""
    tokens = query.shape[2]
    of_rows = seen.repeat_interleave(block, 2)[:, :, :tokens]
    bias = _bias(of_rows.repeat_interleave(block, 3)[..., :tokens], query)
    if coarse is not None:
        key, value = torch.cat([key, coarse.key], 2), torch.cat([value, coarse.value], 2)
        bias = torch.cat([bias, coarse.bias.to(bias).expand(*bias.shape[:3], -1)], 3)
    return scaled_dot_product_attention(query, key, value, attn_mask=bias)


def gathered(query: Tensor, key: Tensor, value: Tensor, seen: Tensor, block: int, coarse: Coarse | None) -> Tensor:
    """Attention of each block of queries over a copy of the blocks it sees: work and memory in proportion to these.

    Rows of blocks that see about as many are computed together.
    """
    tokens, blocks = query.shape[2], seen.shape[-1]
    filling = (0, 0, 0, blocks * block - tokens)
    queries, keys, values = (
        pad(part, filling).unflatten(2, (blocks, block)).flatten(0, 1) for part in (query, key, value)
    )
    real = torch.arange(blocks * block, device=query.device).view(blocks, block) < tokens
    parts = [
        _one_head(queries[head], keys[head], values[head], which, real, _of_head(coarse, head))
        for head, which in enumerate(seen.flatten(0, 1))
    ]
    return torch.stack(parts).unflatten(0, seen.shape[:2]).flatten(2, 3)[:, :, :tokens]


def flex(query: Tensor, key: Tensor, value: Tensor, seen: Tensor, block: int, coarse: Coarse | None) -> Tensor:
    """FlexAttention with a block mask; compiled on a GPU. On the CPU forward only."""
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    tokens, blocks = query.shape[2], seen.shape[-1]
    filling = (0, 0, 0, blocks * block - tokens)
    query, key, value = (pad(part.to(value.dtype), filling) for part in (query, key, value))
    bias = torch.zeros(blocks * block, dtype=at_least_float32(value.dtype), device=query.device)
    bias[tokens:] = -torch.inf
    if coarse is not None:
        further = (0, 0, 0, -len(coarse.bias) % block)
        key = torch.cat([key, pad(coarse.key.to(key.dtype), further)], 2)
        value = torch.cat([value, pad(coarse.value.to(value.dtype), further)], 2)
        bias = torch.cat([bias, pad(coarse.bias.to(bias), further[2:], value=-torch.inf)])
        seen = torch.cat([seen, seen.new_ones(*seen.shape[:3], (len(bias) - blocks * block) // block)], 3)
    full, ragged = seen.clone(), seen.clone()
    part_filled = torch.isinf(bias).view(-1, block).any(1)
    full[..., part_filled], ragged[..., ~part_filled] = False, False

    def visible(row: Tensor, head: Tensor, asking: Tensor, told: Tensor) -> Tensor:
        return seen[row, head, asking // block, told // block] & (bias[told] > -torch.inf)

    def weighed(score: Tensor, row: Tensor, head: Tensor, asking: Tensor, told: Tensor) -> Tensor:
        return score + bias[told]

    mask = BlockMask.from_kv_blocks(
        *_listed(ragged), *_listed(full), BLOCK_SIZE=block, mask_mod=visible, seq_lengths=(blocks * block, len(bias))
    )
    attend: Any = _compiled() if query.device.type == "cuda" else flex_attention
    return attend(query, key, value, score_mod=weighed, block_mask=mask)[:, :, :tokens]


ENGINES: dict[str, Attend] = {"flex": flex, "gathered": gathered, "masked": masked}


def _bias(visible: Tensor, like: Tensor) -> Tensor:
    return torch.zeros_like(visible, dtype=like.dtype).masked_fill(~visible, -torch.inf)


def _of_head(coarse: Coarse | None, head: int) -> Coarse | None:
    """Keys and values (W, D) of one row and head, counted through."""
    if coarse is None:
        return None
    return Coarse(coarse.key.flatten(0, 1)[head], coarse.value.flatten(0, 1)[head], coarse.bias)


def _one_head(query: Tensor, key: Tensor, value: Tensor, seen: Tensor, real: Tensor, coarse: Coarse | None) -> Tensor:
    """(n, b, D) of blocks (n, b, D); `seen` is (n, n), `real` says which tokens of the blocks (n, b) there are."""
    counts, order = seen.sum(1).sort(descending=True)
    many = counts.tolist()
    which = seen.to(torch.uint8).argsort(dim=1, descending=True, stable=True)  # the seen ones first
    flat_key, flat_value = key.flatten(1), value.flatten(1)
    start, parts = 0, []
    while start < len(many):
        width = many[start]
        together = max(1, _GATHERED // (width * flat_key.shape[1]))
        alike = [place for place in range(start, min(start + together, len(many))) if many[place] >= 0.75 * width]
        rows = order[start : start + len(alike)]
        blocks = which[rows, :width]  # (r, width)
        visible = seen[rows].gather(1, blocks)[:, :, None] & real[blocks]
        bias = _bias(visible.flatten(1), query)
        told, values = (x[blocks.flatten()].view(len(rows), -1, query.shape[-1]) for x in (flat_key, flat_value))
        if coarse is not None:
            told, values = (
                torch.cat([x, more.expand(len(rows), -1, -1)], 1)
                for x, more in ((told, coarse.key), (values, coarse.value))
            )
            bias = torch.cat([bias, coarse.bias.to(bias).expand(len(rows), -1)], 1)
        parts.append(scaled_dot_product_attention(query[rows], told, values, attn_mask=bias[:, None]))
        start += len(alike)
    return torch.cat(parts)[order.argsort()]


def _listed(seen: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers of blocks in each row (B, H, n) and which (B, H, n, m), as FlexAttention wants them."""
    which = seen.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)
    return seen.sum(-1, dtype=torch.int32), which.to(torch.int32)


@lru_cache(maxsize=1)
def _compiled() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)
