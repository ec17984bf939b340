"""Which blocks of keys a block of queries sees: what a few tokens of each make of one another.

Legend: B batch, H heads, N tokens, D width of a head, b tokens of a block, n = ceil(N / b) blocks, k samples of each.
No gradient goes through a choice, which is a function of queries and keys alone: the samples of a layer's heads are
drawn once and for all (the release draws them anew in every call), so that a seed makes a picture, activation
checkpointing computes again what it saw, and training and sampling look at the same tokens.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from fewstep.core.tensors import at_least_float32

_AT_A_TIME = 2**26
"""Numbers of the samples' attention that are in memory at a time."""


@lru_cache(maxsize=512)
def sampled(layer: int, heads: int, block: int, samples: int) -> tuple[Tensor, Tensor]:
    """Places (H, k) in a block of the sampled queries, and of the sampled keys: others for each head, none twice."""
    numbers = torch.Generator().manual_seed(layer)
    queries, keys = torch.rand(2, heads, block, generator=numbers).argsort(-1)[..., :samples].sort(-1).values
    return queries, keys


@torch.no_grad()
def importance(query: Tensor, key: Tensor, block: int, places: tuple[Tensor, Tensor]) -> Tensor:
    """How much each block of queries looks at each block of keys: (B, H, n, n), rows sum to 1.

    Attention between sampled tokens, of which the largest of each pair of blocks counts (arXiv 2508.10774, section on
    adaptive block-sparse attention). A last block that is not full repeats its last token.

    Args:
        query: (B, H, N, D).
        key: (B, H, N, D).
        block: b.
        places: of `sampled`.
    """
    dtype, samples = at_least_float32(query.dtype), places[0].shape[-1]
    some_q, some_k = (_sampled(x, block, at).to(dtype) for x, at in zip((query, key), places, strict=True))
    rows = max(1, _AT_A_TIME // (some_k[..., 0].numel() * samples)) * samples
    parts = []
    for part in some_q.split(rows, 2):
        weights = torch.softmax(part @ some_k.mT * query.shape[-1] ** -0.5, -1)
        parts.append(weights.unflatten(3, (-1, samples)).unflatten(2, (-1, samples)).amax((3, 5)))
    largest = torch.cat(parts, 2)
    return largest / largest.sum(-1, keepdim=True)


def _sampled(x: Tensor, block: int, places: Tensor) -> Tensor:
    """(B, H, n k, D) of `x` (B, H, N, D)."""
    tokens = x.shape[2]
    starts = torch.arange(0, tokens, block)
    at = (starts[:, None] + places[:, None]).flatten(1).clamp(max=tokens - 1).to(x.device)  # (H, n k)
    return x.gather(2, at[None, :, :, None].expand(len(x), -1, -1, x.shape[-1]))


def seen_blocks(importance: Tensor, mass: float, least: float = 0.0, most: float = 1.0) -> Tensor:
    """The fewest blocks of each row whose importance sums to `mass`: bool (..., n, n).

    The block that crosses `mass` is seen (the release leaves it out). At least `least` n and at most `most` n blocks
    are seen, rounded down, and never none.
    """
    blocks = importance.shape[-1]
    if mass == 1 and int(most * blocks) == blocks:
        return torch.ones_like(importance, dtype=torch.bool)
    ordered, which = importance.double().sort(dim=-1, descending=True, stable=True)
    before, rank = ordered.cumsum(-1) - ordered, torch.arange(blocks, device=importance.device)
    seen = (before < mass) | (rank < int(least * blocks))
    seen &= rank < max(1, int(most * blocks))
    return torch.zeros_like(seen).scatter(-1, which, seen)
