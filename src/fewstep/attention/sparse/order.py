"""The order in which tokens of a picture or video come to blocks: along a curve that stays near where it is.

The curve is the generalised Hilbert ("Gilbert") one of J. Cerveny, for boxes of any size. Its steps have length 1, and
where sides are odd a few are longer.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

_Edge = tuple[int, int, int]
"""Of a box, along one axis in either direction."""
Grid = tuple[int, int, int]
"""Tokens of a sample: frames, rows, columns; 1 frame for a picture."""


@lru_cache(maxsize=16)
def gilbert(grid: Grid) -> Tensor:
    """(N,) int64: the token, counted frame by frame and row by row, at each place of the curve."""
    frames, rows, columns = grid
    sides = [(columns, 0, 0), (0, rows, 0), (0, 0, frames)]
    places = _walk(*sorted(sides, key=sum, reverse=True))  # the longest is walked along
    return torch.from_numpy(places @ np.array([1, columns, columns * rows]))


def inverse(order: Tensor) -> Tensor:
    """(N,) the place of each token in `order`."""
    places = torch.empty_like(order)
    places[order] = torch.arange(len(order), device=order.device)
    return places


@lru_cache(maxsize=4096)
def _walk(a: _Edge, b: _Edge, c: _Edge) -> np.ndarray:
    """Places (n, 3) of the box with edges a, b and c, from its corner at 0 to the other end of edge a."""
    edges = [np.array(edge) for edge in (a, b, c)]
    long, wide, deep = (int(abs(edge).sum()) for edge in edges)
    if not long * wide * deep:
        return np.zeros((0, 3), np.int64)
    for edge, others in zip(edges, (wide * deep, long * deep, long * wide), strict=True):
        if others == 1:
            return np.arange(abs(edge).sum())[:, None] * np.sign(edge)
    half_a, half_b, half_c = (_half(edge) for edge in edges)
    whole_a, whole_b, whole_c = edges
    rest_a, rest_b, rest_c = whole_a - half_a, whole_b - half_b, whole_c - half_c
    end_a, end_b, end_c = whole_a - np.sign(a), half_b - np.sign(b), half_c - np.sign(c)
    here, far_c = np.zeros(3, np.int64), whole_c - np.sign(c)
    if 2 * long > 3 * wide and 2 * long > 3 * deep:  # a long box: two halves
        parts = [(here, half_a, whole_b, whole_c), (half_a, rest_a, whole_b, whole_c)]
    elif 3 * wide > 4 * deep:  # a flat one: across, along, and back
        parts = [
            (here, half_b, whole_c, half_a),
            (half_b, whole_a, rest_b, whole_c),
            (end_a + end_b, -half_b, whole_c, -rest_a),
        ]
    elif 3 * deep > 4 * wide:
        parts = [
            (here, half_c, half_a, whole_b),
            (half_c, whole_a, whole_b, rest_c),
            (end_a + end_c, -half_c, -rest_a, whole_b),
        ]
    else:
        parts = [
            (here, half_b, half_c, half_a),
            (half_b, whole_c, half_a, rest_b),
            (end_b + far_c, whole_a, -half_b, -rest_c),
            (end_a + half_b + far_c, -whole_c, -rest_a, rest_b),
            (end_a + end_b, -half_b, half_c, -rest_a),
        ]
    return np.concatenate([at + _walk(*(tuple(map(int, edge)) for edge in box)) for at, *box in parts])


def _half(edge: np.ndarray) -> np.ndarray:
    """Half of an edge, of even length if the edge has more than two places, so that the curve can come back."""
    length = int(abs(edge).sum())
    half = length // 2
    return (half + (half % 2 if length > 2 else 0)) * np.sign(edge)
