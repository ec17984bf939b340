"""How things move in the embedded films, and the signal that drives their size: functions of a generator and a length.

Both are endless: the first frames of a longer film are those of a shorter one from the same generator.
"""

from __future__ import annotations

import math

import numpy as np

SIDE = 32
"""Side of a film's frames in pixels."""
MARGIN = 8.0
"""Nearest that a thing's centre comes to an edge, in pixels."""
MOTIONS = (
    "stays",
    "slides to the left",
    "slides to the right",
    "slides up",
    "slides down",
    "hops to the left",
    "hops to the right",
    "bounces around",
    "circles",
    "wanders",
)
"""What a caption says of a motion; where a thing reaches an edge it turns, so "to the right" is how it begins."""
_SLIDES = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}


def draw_path(motion: str, frames: int, rng: np.random.Generator) -> np.ndarray:
    """A random path of one of `MOTIONS`: the centre (frames, 2) as x, y in pixels, y downwards; 16, 16 is the middle.

    Speeds are 0.4 to 1.4 pixels a frame.
    """
    t = np.arange(frames)[:, None]
    start = rng.uniform(MARGIN, SIDE - MARGIN, 2)
    if motion == "stays":
        return np.repeat(start[None], frames, 0)
    if motion == "bounces around":
        angle = rng.uniform(0.35, math.pi / 2 - 0.35) + rng.integers(4) * math.pi / 2
        return _fold(start + t * rng.uniform(0.8, 1.4) * np.array([math.cos(angle), math.sin(angle)]))
    if motion == "circles":
        centre, radius = rng.uniform(15, 17, 2), rng.uniform(5, 7)
        angle = rng.uniform(0, 2 * math.pi) + t[:, 0] * rng.choice((-1, 1)) * 2 * math.pi / rng.uniform(16, 28)
        return centre + radius * np.stack([np.cos(angle), np.sin(angle)], 1)
    if motion == "wanders":
        heading = rng.uniform(0, 2 * math.pi)
        return _wander(start, heading, rng.standard_normal((frames, 2)))
    direction = np.array(_SLIDES[motion.split()[-1]])
    begin = MARGIN + rng.uniform(0, 0.4) * (SIDE - 2 * MARGIN)  # leaves room ahead before it turns
    start = np.where(direction > 0, begin, np.where(direction < 0, SIDE - begin, start))
    path = _fold(start + t * rng.uniform(0.4, 0.8) * direction)
    if motion.startswith("hops"):
        ground, height, period = rng.uniform(20, 24), rng.uniform(6, 10), rng.uniform(6, 9)
        path[:, 1] = ground - height * np.abs(np.sin(math.pi * (rng.random() + t[:, 0] / period)))
    return path


def _fold(path: np.ndarray) -> np.ndarray:
    """Straight lines reflected where they would come nearer to an edge than `MARGIN`."""
    room = SIDE - 2 * MARGIN
    return MARGIN + room - np.abs((path - MARGIN) % (2 * room) - room)


def _wander(position: np.ndarray, angle: float, pushes: np.ndarray) -> np.ndarray:
    """Pushed at random in every frame, never faster than 1.2 pixels a frame along an axis; turns at the edges."""
    velocity, path = 0.7 * np.array([math.cos(angle), math.sin(angle)]), []
    for push in pushes:
        path.append(position)
        velocity = np.clip(0.97 * velocity + 0.16 * push, -1.2, 1.2)
        velocity = np.where((position + velocity < MARGIN) | (position + velocity > SIDE - MARGIN), -velocity, velocity)
        position = position + velocity
    return np.array(path)


def draw_drive(frames: int, rng: np.random.Generator) -> np.ndarray:
    """A sound-like signal (frames,) in [0, 1]: the loudness of random syllables, 4 to 7 frames long, with pauses."""
    drive, start = np.zeros(frames), float(rng.uniform(-4, 2))
    while start < frames:
        length, loudness = rng.uniform(4, 7), rng.uniform(0.5, 1)
        phase = (np.arange(frames) - start) / length
        drive += np.where((phase > 0) & (phase < 1), loudness * np.sin(math.pi * phase) ** 2, 0)
        start += length + max(0.0, rng.normal(0, 2))
    return drive
