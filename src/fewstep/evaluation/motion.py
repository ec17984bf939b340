"""How much a video moves, and how much it flickers, by matching blocks of successive frames."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, pad

BLOCK = 8
"""Side of a block in pixels."""
REACH = 7
"""Farthest displacement that is looked for, in pixels a frame along each axis."""


def motion_and_flicker(video: Tensor) -> tuple[float, float]:
    """How a video (F, 3, H, W), uint8, changes from frame to frame; (0, 0) for a single one.

    Every block of 8x8 grey pixels is looked for in the next frame, up to 7 pixels away along each axis; of equal
    matches the nearest is taken. Costs 225 comparisons of each frame with the next.

    Returns:
        motion: mean length of the displacements, in pixels a frame. Flat blocks count as still.
        flicker: mean absolute difference to the best match, in [0, 1]: what changes and is no movement.
    """
    grey = video.float().mean(1, keepdim=True) / 255
    if len(grey) < 2:
        return 0.0, 0.0
    before, after = grey[:-1], grey[1:]
    height, width = grey.shape[2:]
    padded = pad(after, (REACH,) * 4, value=float("inf"))  # a block never leaves the picture
    moves = [(y, x) for y in range(-REACH, REACH + 1) for x in range(-REACH, REACH + 1)]
    moves.sort(key=lambda move: move[0] ** 2 + move[1] ** 2)
    best = torch.full(avg_pool2d(before, BLOCK).shape, float("inf"))
    length = torch.zeros_like(best)
    for y, x in moves:
        moved = padded[:, :, REACH + y : REACH + y + height, REACH + x : REACH + x + width]
        found = avg_pool2d((before - moved).abs(), BLOCK)
        closer = found < best - 1e-6
        best = torch.where(closer, found, best)
        length = torch.where(closer, torch.full_like(length, (y * y + x * x) ** 0.5), length)
    return float(length.mean()), float(best.mean())
