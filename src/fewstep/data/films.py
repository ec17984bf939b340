"""Captioned films of the embedded data set: one thing moves over a background that stays, rendered while needed.

A film is a function of (seed, index): a thing, how it moves, whether it sings, a background, and the accidents of
each. Its caption names the thing and, each by chance, the rest; what it leaves open really varies, uniformly. With a
film come its track (the thing's centre in every frame) and its drive, a sound-like signal that sets the thing's size,
so that what follows text, tracks or sound can be measured exactly (`fewstep.evaluation.films`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING

import numpy as np

from fewstep.data.film_paths import MOTIONS, SIDE, draw_drive, draw_path
from fewstep.data.scenes import held_out
from fewstep.data.things import BACKGROUNDS, STYLES, THINGS

if TYPE_CHECKING:
    import torch
    from torch import Tensor

FRAMES = 24
"""Frames of a film unless told otherwise; 8 chunks of 3."""
FILM_THINGS = (
    "frog", "cat", "pig", "panda", "penguin", "chick", "fish", "crab", "ladybug", "bee", "octopus", "whale",
    "strawberry", "pumpkin", "ghost", "soccer ball", "car", "rocket", "heart", "star",
)  # fmt: skip
"""Things of films, in the flat style: those that are still recognisable at 13 pixels and unlike the others."""
FILM_BACKGROUNDS = ("gray", "pink", "yellow", "green", "blue", "purple")
VOICES = ("silent", "singing")
FILM_COUNTS = {
    "thing": len(FILM_THINGS), "motion": len(MOTIONS), "voice": len(VOICES), "background": len(FILM_BACKGROUNDS),
}  # fmt: skip
QUIET, LOUD = 13.0, 16.25
"""Side of a thing in pixels at drive 0 and 1; linear between."""
TEXTURE = 14.0
"""Largest departure of a background's lightness from its colour, of 255."""
_SPRITE = 32


@dataclass(frozen=True)
class FilmCaption:
    """What a film's caption says: an index per attribute, or None where it is open."""

    thing: int
    motion: int | None = None
    voice: int | None = None
    background: int | None = None

    def __str__(self) -> str:
        words = [FILM_THINGS[self.thing]] if self.voice is None else [VOICES[self.voice], FILM_THINGS[self.thing]]
        text = " ".join(["an" if words[0] == "octopus" else "a", *words])
        if self.motion is not None:
            text = f"{text} {MOTIONS[self.motion]}"
        return text if self.background is None else f"{text} on a {FILM_BACKGROUNDS[self.background]} background"

    def choices(self, attribute: str) -> range:
        """The values of an attribute of `FILM_COUNTS` that agree with this caption."""
        value = getattr(self, attribute)
        return range(FILM_COUNTS[attribute]) if value is None else range(value, value + 1)


def draw_film_caption(rng: np.random.Generator, *, for_evaluation: bool = False) -> FilmCaption:
    """A random caption of the training set, or of the held-out one (`fewstep.data.scenes.held_out`)."""
    stated = {"motion": 0.8, "voice": 0.5, "background": 0.6}
    while True:
        values = {a: int(rng.integers(FILM_COUNTS[a])) if rng.random() < p else None for a, p in stated.items()}
        caption = FilmCaption(int(rng.integers(len(FILM_THINGS))), **values)
        if held_out(str(caption)) == for_evaluation:
            return caption


def film_training_captions(count: int = 8192, seed: int = 0) -> list[str]:
    """Captions of the first films for a distillation; none is held out. `FilmClips` has them with tracks and drives."""
    return [film_caption(index, seed) for index in range(count)]


def film_caption(index: int, seed: int = 0) -> str:
    """That of a training film of `draw_films`, with nothing else of it drawn."""
    return str(draw_film_caption(_stream(index, seed, 0, False)))


@dataclass(frozen=True)
class FilmBatch:
    """Films with everything that is known of them."""

    pixels: Tensor
    """(B, 3, F, 32, 32) float32 in [-1, 1]."""
    captions: list[FilmCaption]
    attributes: np.ndarray
    """(B, 4) indices in the order of `FILM_COUNTS`."""
    tracks: Tensor
    """(B, F, 2) float32: centre of the thing as x, y in pixels, y downwards."""
    drives: Tensor
    """(B, F) float32 in [0, 1]; zeros for silent things."""
    backgrounds: Tensor
    """(B, 3, 32, 32) float32 in [-1, 1]: what the films show without their things."""


def draw_films(
    indices: Sequence[int] | np.ndarray,
    *,
    seed: int = 0,
    frames: int = FRAMES,
    for_evaluation: bool = False,
    captions: Sequence[FilmCaption] | None = None,
    device: str | torch.device = "cpu",
) -> FilmBatch:
    """The films of `indices`, each a function of (seed, index) alone.

    Longer films begin as shorter ones do.

    Args:
        indices: any numbers from 0.
        for_evaluation: with captions of the held-out set instead of the training set.
        captions: where given, those of the films, one per index.
        device: where to render; the numbers agree between devices to rounding.
    """
    import torch

    told, attributes, tracks, drives, backgrounds = [], [], [], [], []
    for row, index in enumerate(indices):
        script = draw_script(
            int(index), seed, frames, for_evaluation=for_evaluation, caption=captions[row] if captions else None
        )
        told.append(script.caption)
        attributes.append(script.attributes)
        tracks.append(script.track)
        drives.append(script.drive)
        backgrounds.append(draw_background(script.attributes[3], _stream(int(index), seed, 3, for_evaluation)))
    things = torch.tensor([values[0] for values in attributes], device=device)
    track, drive = (torch.from_numpy(np.stack(rows).astype(np.float32)).to(device) for rows in (tracks, drives))
    ground = torch.stack(backgrounds).to(device)
    return FilmBatch(render_films(things, track, drive, ground), told, np.array(attributes), track, drive, ground)


@dataclass(frozen=True)
class Script:
    """What is known of a film before it is drawn."""

    caption: FilmCaption
    attributes: list[int]
    """Indices in the order of `FILM_COUNTS`."""
    track: np.ndarray
    """(F, 2), see `FilmBatch.tracks`."""
    drive: np.ndarray
    """(F,)"""


def draw_script(
    index: int, seed: int, frames: int, *, for_evaluation: bool = False, caption: FilmCaption | None = None
) -> Script:
    """The script of a film of `draw_films`, which costs nothing beside rendering."""
    words, path, sound = (_stream(index, seed, stream, for_evaluation) for stream in range(3))
    caption = caption or draw_film_caption(words, for_evaluation=for_evaluation)
    values = [int(words.choice(caption.choices(name))) for name in FILM_COUNTS]
    drive = draw_drive(frames, sound) if VOICES[values[2]] == "singing" else np.zeros(frames)
    return Script(caption, values, draw_path(MOTIONS[values[1]], frames, path), drive)


def _stream(index: int, seed: int, stream: int, for_evaluation: bool) -> np.random.Generator:
    return np.random.default_rng([seed, index, stream, for_evaluation])


def draw_background(colour: int, rng: np.random.Generator) -> Tensor:
    """A colour of `FILM_BACKGROUNDS` with smooth random lightness: (3, 32, 32) float32 in [-1, 1]."""
    import torch
    from torch.nn.functional import interpolate

    coarse = torch.from_numpy(rng.uniform(-TEXTURE, TEXTURE, (1, 1, 5, 5)).astype(np.float32))
    texture = interpolate(coarse, size=(SIDE, SIDE), mode="bilinear", align_corners=True)[0]
    base = torch.tensor(BACKGROUNDS[FILM_BACKGROUNDS[colour]], dtype=torch.float32).view(3, 1, 1)
    return ((base + texture) / 127.5 - 1).clamp(-1, 1)


def render_films(things: Tensor, tracks: Tensor, drives: Tensor, backgrounds: Tensor) -> Tensor:
    """Films of things on any paths, drawn ones as well: (B, 3, F, 32, 32) float32 in [-1, 1].

    Args:
        things: (B,) indices into `FILM_THINGS`.
        tracks: (B, F, 2) centres as x, y in pixels.
        drives: (B, F) in [0, 1].
        backgrounds: (B, 3, 32, 32) in [-1, 1].
    """
    batch, frames = drives.shape
    sides = QUIET + (LOUD - QUIET) * drives
    drawn = draw_things(things.repeat_interleave(frames), tracks.flatten(0, 1), sides.flatten())
    drawn = drawn.unflatten(0, (batch, frames)).transpose(1, 2)
    return drawn[:, :3] + (1 - drawn[:, 3:]) * backgrounds[:, :, None]


def draw_things(things: Tensor, centres: Tensor, sides: Tensor) -> Tensor:
    """Things alone: (N, 4, 32, 32) float32, RGB in [-1, 1] times opacity, and opacity in [0, 1].

    Exact to a quarter of a pixel's area: a pixel is the mean of 4x4 points of the bilinearly magnified drawing.

    Args:
        things: (N,) indices into `FILM_THINGS`.
        centres: (N, 2) x, y in pixels.
        sides: (N,) in pixels.
    """
    across, down = (_spread(centres[:, axis], sides) for axis in (0, 1))
    return down[:, None] @ (film_sprites().to(things.device)[things] @ across[:, None].transpose(2, 3))


def _spread(centre: Tensor, side: Tensor) -> Tensor:
    """Weight (N, 32, 32) of each texel along one axis in each pixel of it."""
    import torch

    points = (torch.arange(4 * SIDE, device=centre.device) + 0.5) / 4
    texel = ((points - centre[:, None]) / side[:, None] + 0.5) * _SPRITE - 0.5
    weights = (1 - (texel[:, :, None] - torch.arange(_SPRITE, device=centre.device)).abs()).clamp(min=0)
    return weights.unflatten(1, (SIDE, 4)).mean(2)


@cache
def film_sprites() -> Tensor:
    """The drawings of `FILM_THINGS`: (20, 4, 32, 32) float32, RGB in [-1, 1] times opacity, and opacity."""
    import torch
    from PIL import Image

    sheet = Image.open(str(files("fewstep") / "assets" / "sprites.webp")).convert("RGBA")
    size, columns, cells = 64, sheet.width // 64, []
    for name in FILM_THINGS:
        row, column = divmod(list(THINGS).index(name) * len(STYLES) + STYLES.index("flat"), columns)
        cell = sheet.crop((column * size, row * size, (column + 1) * size, (row + 1) * size)).convert("RGBa")
        cells.append(np.asarray(cell.resize((_SPRITE, _SPRITE), Image.Resampling.LANCZOS)))
    sprites = torch.from_numpy(np.stack(cells)).permute(0, 3, 1, 2).float() / 255
    opacity = sprites[:, 3:]
    colour = torch.minimum(sprites[:, :3], opacity)  # Lanczos overshoots
    return torch.cat([2 * colour - opacity, opacity], 1)
