"""Which of the described motions a measured path is, by what it leaves unexplained: rules, not a network.

An axis rests, or goes straight with at most two turns, or neither; a path may be a circle. On the paths of rendered
films the rules are right on about 95 of 100; wandering is what no other description fits, and some wander straight.
"""

from __future__ import annotations

from functools import cache
from itertools import combinations

import numpy as np

from fewstep.data.film_paths import MOTIONS

DESCRIBED = 24
"""Frames from the start that a description is about."""
_RESTS, _STRAIGHT, _ROUND = 0.45, 0.3, 0.5  # RMS in pixels that each of these may leave


def name_motion(track: np.ndarray) -> int:
    """Index into `MOTIONS` of a path (F, 2) of 8 frames or more; only the first 24 count."""
    track = track[:DESCRIBED]
    rests = track.std(0) < _RESTS
    if rests.all():
        return MOTIONS.index("stays")
    forward = [int(np.median(np.diff(track[:7, axis])) > 0) for axis in (0, 1)]
    straight = [_straight(track[:, axis]) for axis in (0, 1)]
    if rests[0] and straight[1]:
        return MOTIONS.index(("slides up", "slides down")[forward[1]])
    if rests[1] and straight[0]:
        return MOTIONS.index(("slides to the left", "slides to the right")[forward[0]])
    if all(straight):
        return MOTIONS.index("bounces around")
    if _round(track):
        return MOTIONS.index("circles")
    if straight[0] and _arcs(track[:, 1]):
        return MOTIONS.index(("hops to the left", "hops to the right")[forward[0]])
    return MOTIONS.index("wanders")


def _straight(path: np.ndarray) -> bool:
    """Whether (F,) is straight lines of one speed that meet in at most two turns."""
    left = np.einsum("kij,j->ki", _unexplained(len(path)), path)
    return float(np.sqrt(np.square(left).mean(1).min())) < _STRAIGHT


@cache
def _unexplained(frames: int) -> np.ndarray:
    """What is left of (F,) by lines with turns at every pair of frames: matrices (pairs, F, F)."""
    t = np.arange(frames, dtype=float)
    matrices = []
    for first, second in combinations(np.arange(0.0, frames, 0.5), 2):
        line = t - 2 * np.maximum(t - first, 0) + 2 * np.maximum(t - second, 0)  # there, back, there again
        basis, _ = np.linalg.qr(np.stack([np.ones(frames), line], 1))
        matrices.append(np.eye(frames) - basis @ basis.T)
    return np.array(matrices)


def _round(track: np.ndarray) -> bool:
    """Whether (F, 2) lies on a circle of 4 to 9 pixels and goes round it one way, at least a third."""
    x, y = track.T
    solution = np.linalg.lstsq(np.stack([x, y, np.ones(len(x))], 1), x**2 + y**2, rcond=None)[0]
    centre = solution[:2] / 2
    radius = np.sqrt(max(solution[2] + centre @ centre, 0.0))
    away = track - centre
    turned = np.diff(np.unwrap(np.arctan2(away[:, 1], away[:, 0])))
    off = np.sqrt(np.square(np.hypot(*away.T) - radius).mean())
    return bool(4 < radius < 9 and off < _ROUND and abs(turned.sum()) > 2.1 and abs(np.sign(turned).mean()) > 0.9)


def _arcs(height: np.ndarray) -> bool:
    """Whether (F,) lands at one height again and again: at least two turns from falling to rising, all low."""
    fall = np.diff(height)  # y points down
    landings = [i for i in range(1, len(fall)) if fall[i - 1] > 0.3 and fall[i] < -0.3]
    ground = height.max()
    return len(landings) >= 2 and all(ground - height[i] < 3 for i in landings)
