"""Adaptive block-sparse attention of queries, keys and values: order, choice, global tokens, and back."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from fewstep.attention.sparse.choosing import importance, sampled, seen_blocks
from fewstep.attention.sparse.engines import ENGINES, Coarse, chosen_engine
from fewstep.attention.sparse.options import SparseOptions
from fewstep.attention.sparse.order import Grid, gilbert, inverse
from fewstep.core.tensors import at_least_float32
from fewstep.errors import FewstepError


class Sequence(NamedTuple):
    """What the tokens of a call are."""

    grid: Grid
    """Of those of the sample."""
    text_first: bool
    """Whether tokens of a text, if there are any, come before those of the sample or after."""


def sparse_attention(
    query: Tensor, key: Tensor, value: Tensor, sequence: Sequence, options: SparseOptions, layer: int = 0
) -> Tensor:
    """What self-attention makes of (B, H, N, D), each block of queries seeing the blocks of keys that matter to it.

    Tokens of a text see and are seen by all; so are the few tokens of the sample that share a block with them.

    Args:
        query: (B, H, N, D), positions applied.
        key: likewise.
        value: likewise.
        sequence: what the N tokens are.
        options: what is seen.
        layer: number of the layer, for the choice of samples.

    Returns:
        (B, H, N, D) in the dtype of `value`.

    Raises:
        FewstepError: fewer tokens than the sample has.
    """
    tokens = query.shape[2]
    visual = sequence.grid[0] * sequence.grid[1] * sequence.grid[2]
    if tokens < visual:
        raise FewstepError(
            f"found {tokens} tokens of a sample of {sequence.grid} (frames, rows, columns), expected {visual} or more, "
            "fix: sample at the size that the backbone is set to"
        )
    order, back = _orders(sequence, tokens, options.order, str(query.device))
    query, key, value = (part[:, :, order] for part in (query, key, value))
    places = sampled(layer, query.shape[1], options.block, options.samples)
    seen = seen_blocks(importance(query, key, options.block, places), options.mass, options.least, options.most)
    if tokens > visual:
        first = visual // options.block
        seen[..., first:, :] = True
        seen[..., first:] = True
    coarse = pooled(key[:, :, :visual], value[:, :, :visual], options.window) if options.kind == "asa-gt" else None
    attend = ENGINES[chosen_engine(options.engine, query.device, tokens, options.block)]
    return attend(query, key, value, seen, options.block, coarse)[:, :, back]


def pooled(key: Tensor, value: Tensor, window: int) -> Coarse:
    """Global tokens: means of `window` neighbours in the order of the curve, worth as many tokens as they stand for.

    ASA_GT (arXiv 2508.10774): they join the softmax with ln(window) added to their scores. They stand for all tokens,
    also for those that are seen one by one.
    """
    tokens = key.shape[2]
    sizes = torch.full((-(-tokens // window),), float(window), dtype=at_least_float32(key.dtype), device=key.device)
    if tokens % window:
        sizes[-1] = tokens % window
    means = [
        torch.cat([part, part.new_zeros(*part.shape[:2], -tokens % window, part.shape[3])], 2)
        .unflatten(2, (-1, window))
        .sum(3)
        / sizes.to(part.dtype)[:, None]
        for part in (key, value)
    ]
    return Coarse(means[0], means[1], sizes.log())


@lru_cache(maxsize=16)
def _orders(sequence: Sequence, tokens: int, order: str, device: str) -> tuple[Tensor, Tensor]:
    """Tokens in the order of blocks, those of the text last; and the way back."""
    frames, rows, columns = sequence.grid
    visual = frames * rows * columns
    curve = gilbert(sequence.grid) if order == "gilbert" else torch.arange(visual)
    start = tokens - visual if sequence.text_first else 0
    text = torch.arange(start) if sequence.text_first else torch.arange(visual, tokens)
    whole = torch.cat([curve + start, text])
    return whole.to(device), inverse(whole).to(device)
