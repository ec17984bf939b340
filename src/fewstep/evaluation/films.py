"""Exact measures of films of the embedded data set: path, identity, motion, flicker, drift, following of a drive.

Nothing here is learnt: the things of films are known drawings that `read_films` finds. Every measure is one number a
film. Chunks are `CHUNK` frames long, as causal students make them; "the first chunk" is the one that later frames
ought to agree with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from fewstep.data.films import FILM_BACKGROUNDS, LOUD, QUIET, VOICES, FilmCaption
from fewstep.data.things import BACKGROUNDS
from fewstep.evaluation.film_motion import name_motion
from fewstep.evaluation.film_reading import Reading, read_films

CHUNK = 3
"""Frames of the first chunk, and of a point of a drift curve."""
_SINGS = 0.25  # standard deviation of the side, in pixels, above which a thing sings


def centroid_error(reading: Reading, tracks: Tensor) -> Tensor:
    """Mean distance (B,) in pixels of the thing from its track (B, F, 2): MotionStream's end-point error."""
    return (reading.centres - tracks).norm(dim=2).mean(1)


def motion_amplitude(reading: Reading) -> Tensor:
    """Mean speed (B,) of the thing in pixels a frame."""
    return reading.centres.diff(dim=1).norm(dim=2).mean(1)


def quick_amplitude(films: Tensor) -> Tensor:
    """As `motion_amplitude`, without finding the thing: speed of the centre of all that differs from the background.

    For rewards: 30 times faster, and differentiable but for the median; wrong where a film shows more than one thing.

    Args:
        films: (B, F, 3, H, W) of any scale, floating.
    """
    plain = films.flatten(3).median(3).values[..., None, None]
    weight = (films - plain).square().sum(2)
    weight = weight / weight.sum((2, 3), keepdim=True).clamp(min=1e-9)
    across = torch.arange(films.shape[-1], device=films.device, dtype=films.dtype)
    down = torch.arange(films.shape[-2], device=films.device, dtype=films.dtype)
    centre = torch.stack([(weight.sum(2) * across).sum(2), (weight.sum(3) * down).sum(2)], 2)
    return (centre.diff(dim=1).square().sum(2) + 1e-12).sqrt().mean(1)


def drive_correlation(reading: Reading, drives: Tensor) -> Tensor:
    """Correlation (B,) of the thing's side with its drive (B, F); 0 where either never changes."""
    side, drive = (values - values.mean(1, keepdim=True) for values in (reading.sides, drives))
    size = side.norm(dim=1) * drive.norm(dim=1)
    return torch.where(size > 1e-3, (side * drive).sum(1) / size.clamp(min=1e-9), 0.0)


def flicker(films: Tensor, reading: Reading) -> Tensor:
    """Mean second difference in time (B,), in levels of 0 to 255, of what the thing covers in none of three frames.

    0 for every rendered film, however the thing moves.
    """
    values, covered = films.float(), reading.covered
    bent = (values[:, 2:] - 2 * values[:, 1:-1] + values[:, :-2]).abs().mean(2)
    free = ~(covered[:, 2:] | covered[:, 1:-1] | covered[:, :-2])
    return (bent * free).sum((1, 2, 3)) / free.sum((1, 2, 3)).clamp(min=1)


@dataclass(frozen=True)
class Drift:
    """How far each frame (B, F) is from the first chunk of its film."""

    thing: Tensor
    """1 where the frame shows the thing of the first chunk, else 0."""
    colour: Tensor
    """Distance of the thing's mean colour, in levels of 0 to 255 (root of the mean square over R, G, B)."""
    background: Tensor
    """Root mean square change of the background where both show it, in levels."""

    def curve(self, name: str) -> list[float]:
        """Means of one of the three over films and chunks of `CHUNK` frames, from the first chunk on."""
        chunks = getattr(self, name).split(CHUNK, 1)
        return [float(chunk.mean()) for chunk in chunks]


def drift(films: Tensor, reading: Reading) -> Drift:
    """Identity against the first chunk of uint8 films (B, F, 3, 32, 32)."""
    values, free = films.float(), ~reading.covered[:, :, None]
    first = reading.things[:, :CHUNK].mode(1, keepdim=True).values
    opacity = reading.opacity[:, :, None]
    colour = (values * opacity).sum((3, 4)) / opacity.sum((3, 4)).clamp(min=1e-6)
    off = colour - colour[:, :CHUNK].mean(1, keepdim=True)
    shown = free[:, :CHUNK].sum(1, keepdim=True)
    known = (values * free)[:, :CHUNK].sum(1, keepdim=True) / shown.clamp(min=1)
    both = (free & (shown > 0)).float()
    change = ((values - known).square() * both).sum((2, 3, 4)) / (3 * both.sum((2, 3, 4))).clamp(min=1)
    return Drift((reading.things == first).float(), off.square().mean(2).sqrt(), change.sqrt())


def name_attributes(reading: Reading) -> np.ndarray:
    """What films show, as attributes (B, 4) in the order of `FILM_COUNTS`: most frequent thing, motion, voice, ground.

    Motion by `name_motion`; a thing sings whose side varies; the background is the colour nearest to the median.
    """
    palette = torch.tensor([BACKGROUNDS[name] for name in FILM_BACKGROUNDS], dtype=torch.float32)
    ground = torch.cdist(reading.colours.median(1).values, palette).argmin(1)
    voice = torch.where(reading.sides.std(1) > _SINGS, VOICES.index("singing"), VOICES.index("silent"))
    motion = torch.tensor([name_motion(track.double().numpy()) for track in reading.centres])
    return torch.stack([reading.things.mode(1).values, motion, voice, ground], 1).numpy()


@dataclass(frozen=True)
class FilmScores:
    """Means over films; what needs a track or a drive is None without."""

    films: int
    thing: float
    """Share of frames that show the caption's thing."""
    motion: float
    """Share of films that move as the caption says, of those whose caption says it; likewise the next two."""
    voice: float
    background: float
    fit: float
    """Share of what differs from the background that the thing's drawing explains."""
    amplitude: float
    """Speed in pixels a frame."""
    flicker: float
    """Levels of 0 to 255."""
    same_thing: float
    """Share of frames that show the thing of the first chunk."""
    colour_drift: float
    """Levels, of frames after the first chunk; likewise the next."""
    background_drift: float
    outside: float
    """Share of frames whose thing has a size that films do not have, by more than a pixel."""
    curves: dict[str, list[float]]
    """Per field of `Drift` its means over chunks of `CHUNK` frames."""
    error: float | None = None
    """Pixels from the track."""
    correlation: float | None = None
    """Of the side with the drive, over films whose drive is not silent."""


def score_films(
    films: Tensor, captions: Sequence[FilmCaption], *, tracks: Tensor | None = None, drives: Tensor | None = None
) -> FilmScores:
    """Scores of uint8 films (B, F, 3, 32, 32) of `captions`, against tracks (B, F, 2) and drives (B, F) where given."""
    reading = read_films(films)
    named, away = name_attributes(reading), drift(films, reading)
    right = reading.things == torch.tensor([c.thing for c in captions])[:, None]

    def stated(column: int, name: str) -> float:
        told = [(named[i, column] == getattr(c, name)) for i, c in enumerate(captions) if getattr(c, name) is not None]
        return float(np.mean(told)) if told else float("nan")

    followed = None
    if drives is not None and (loud := drives.amax(1) > 0).any():
        followed = float(drive_correlation(reading, drives)[loud].mean())
    return FilmScores(
        films=len(films),
        thing=float(right.float().mean()),
        motion=stated(1, "motion"),
        voice=stated(2, "voice"),
        background=stated(3, "background"),
        fit=float(reading.fit.mean()),
        amplitude=float(motion_amplitude(reading).mean()),
        flicker=float(flicker(films, reading).mean()),
        same_thing=float(away.thing.mean()),
        colour_drift=float(away.colour[:, CHUNK:].mean()),
        background_drift=float(away.background[:, CHUNK:].mean()),
        outside=float(((reading.sides < QUIET - 1) | (reading.sides > LOUD + 1)).float().mean()),
        curves={field.name: away.curve(field.name) for field in fields(Drift)},
        error=None if tracks is None else float(centroid_error(reading, tracks).mean()),
        correlation=followed,
    )
