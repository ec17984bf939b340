"""Captioned scenes of the embedded data set, rendered from the sprite sheet while they are needed.

A scene is one thing in one art style at one placement on one background. Its caption names the thing and, each by
chance, the style, the background and the placement; what the caption leaves open really varies, uniformly, so the
variety of a generator can be measured exactly (`tests/data/test_scenes.py` checks the frequencies).
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from typing import TYPE_CHECKING

import numpy as np

from fewstep.data.things import BACKGROUNDS, PLACEMENTS, STYLES, THINGS

if TYPE_CHECKING:
    import torch

SIDE = 64
"""Side of a scene in pixels."""
SPRITE = 64
COLUMNS = 16
BACKGROUND_JITTER = 10
"""Largest shift of a background colour, per channel, of 255; uniform."""
HELD_OUT_ONE_IN = 8
"""One caption in so many is never used in any training (see `held_out`)."""
ATTRIBUTES = ("thing", "style", "background", "placement")
_SOME = {"fries", "grapes", "cherries", "broccoli", "corn", "cheese", "fire", "lightning"}
_PLACEMENT_WORDS = {"left": " on the left", "middle": " in the middle", "right": " on the right"}


@dataclass(frozen=True)
class Caption:
    """What a caption says: an index per attribute, or None where it is open.

    `small` says "small" without a side: the placement is then one of the three small ones.
    """

    thing: int
    style: int | None = None
    background: int | None = None
    placement: int | None = None
    small: bool = False

    def __str__(self) -> str:
        name = list(THINGS)[self.thing]
        placement = None if self.placement is None else list(PLACEMENTS)[self.placement]
        size = "big" if placement == "big" else "small" if placement or self.small else ""
        words = [w for w in (size, "" if self.style is None else STYLES[self.style], name) if w]
        article = "some" if name in _SOME else "an" if words[0][0] in "aeiou" and words[0] != "unicorn" else "a"
        text = " ".join([article, *words]) + _PLACEMENT_WORDS.get(placement or "", "")
        return text if self.background is None else f"{text} on a {list(BACKGROUNDS)[self.background]} background"

    def choices(self, attribute: str) -> range:
        """The values of an attribute that agree with this caption."""
        value = getattr(self, attribute)
        if value is not None:
            return range(value, value + 1)
        return range(1, len(PLACEMENTS)) if attribute == "placement" and self.small else range(COUNTS[attribute])


COUNTS = {"thing": len(THINGS), "style": len(STYLES), "background": len(BACKGROUNDS), "placement": len(PLACEMENTS)}


def held_out(caption: str) -> bool:
    """Whether a caption is kept for evaluation: neither the teacher nor a student is trained on it."""
    return zlib.crc32(caption.encode()) % HELD_OUT_ONE_IN == 0


def draw_caption(rng: np.random.Generator, *, for_evaluation: bool = False) -> Caption:
    """A random caption of the training set, or of the held-out one."""
    while True:
        thing = int(rng.integers(COUNTS["thing"]))
        style = int(rng.integers(COUNTS["style"])) if rng.random() < 0.5 else None
        background = int(rng.integers(COUNTS["background"])) if rng.random() < 0.5 else None
        how = rng.random()
        placement = 0 if how < 0.15 else int(rng.integers(1, COUNTS["placement"])) if how < 0.4 else None
        caption = Caption(thing, style, background, placement, small=0.4 <= how < 0.55)
        if held_out(str(caption)) == for_evaluation:
            return caption


class Scenes:
    """Renders scenes. Holds the 960 canvases (thing x style x placement) as bytes, 16 MB."""

    def __init__(self, sheet: str | None = None) -> None:
        self._sheet = sheet or str(files("fewstep") / "assets" / "sprites.webp")

    @cached_property
    def canvases(self) -> np.ndarray:
        """(thing, style, placement, 64, 64, 4) uint8, RGB premultiplied by alpha."""
        from PIL import Image

        sheet = Image.open(self._sheet).convert("RGBA")
        out = np.zeros((COUNTS["thing"], COUNTS["style"], COUNTS["placement"], SIDE, SIDE, 4), np.uint8)
        for i in range(COUNTS["thing"] * COUNTS["style"]):
            left, top = i % COLUMNS * SPRITE, i // COLUMNS * SPRITE
            sprite = sheet.crop((left, top, left + SPRITE, top + SPRITE)).convert("RGBa")
            for p, (side, shift) in enumerate(PLACEMENTS.values()):
                margin = (SIDE - side) // 2
                small = np.asarray(sprite.resize((side, side), Image.Resampling.LANCZOS))
                x = margin + shift
                out[i // COUNTS["style"], i % COUNTS["style"], p, margin : margin + side, x : x + side] = small
        return out

    def render(self, attributes: np.ndarray, rng: np.random.Generator) -> torch.Tensor:
        """(B, 4) attribute indices (thing, style, background, placement) -> (B, 3, 64, 64) float32 in [-1, 1]."""
        import torch

        thing, style, background, placement = attributes.T
        canvas = torch.from_numpy(self.canvases[thing, style, placement]).permute(0, 3, 1, 2).float() / 255
        colour = np.array(list(BACKGROUNDS.values()), np.float32)[background]
        colour = colour + rng.uniform(-BACKGROUND_JITTER, BACKGROUND_JITTER, colour.shape)
        flat = torch.from_numpy(np.clip(colour, 0, 255).astype(np.float32) / 255)[:, :, None, None]
        return (canvas[:, :3] + (1 - canvas[:, 3:]) * flat).clamp(0, 1) * 2 - 1

    def draw(
        self, count: int, rng: np.random.Generator, captions: list[Caption] | None = None
    ) -> tuple[torch.Tensor, list[Caption], np.ndarray]:
        """`count` scenes with their captions: images (B, 3, 64, 64) in [-1, 1], captions, attributes (B, 4)."""
        captions = captions or [draw_caption(rng) for _ in range(count)]
        attributes = np.array([[rng.choice(c.choices(a)) for a in ATTRIBUTES] for c in captions])
        return self.render(attributes, rng), captions, attributes
