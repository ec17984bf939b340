"""Rotary positions of video tokens at any frame times: those of Wan, whose own table begins at 0 and ends at 1023.

Legend: F frames of h x w tokens, N = F h w tokens, H heads of width D, of which two sixths (rounded down to even) turn
with the row, as many with the column, and the rest with time.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fewstep.core.tensors import at_least_float32

_THETA = 10000.0


def rotary_table(times: Sequence[int], height: int, width: int, head_width: int, like: Tensor) -> Tensor:
    """cos and sin (2, N, 1, D / 2) of frames at `times`, on the device of `like` and in its dtype, at least float32.

    Angles are computed in float64, as diffusers' are, so that times of 40,000 keep their digits.
    """
    of_space = 2 * (head_width // 6)
    sizes = (len(times), height, width)
    places = (torch.tensor(list(times)), torch.arange(height), torch.arange(width))
    parts = []
    for axis, part in enumerate((head_width - 2 * of_space, of_space, of_space)):
        frequencies = 1.0 / _THETA ** (torch.arange(0, part, 2, dtype=torch.float64) / part)
        angles = torch.outer(places[axis].double(), frequencies)
        turns = torch.stack([angles.cos(), angles.sin()]).to(like.device, at_least_float32(like.dtype))
        along = [2, *(size if other == axis else 1 for other, size in enumerate(sizes)), -1]
        parts.append(turns.view(along).expand(2, *sizes, -1))
    return torch.cat(parts, -1).flatten(1, 3).unsqueeze(2)


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Queries or keys (B, N, H, D) turned by a `rotary_table` of N tokens, in their own dtype."""
    cos, sin = table
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([first * cos - second * sin, first * sin + second * cos], -1).flatten(-2).to(x.dtype)
