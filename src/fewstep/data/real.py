"""Where the clean samples of a discriminator come from: scenes and films of the embedded data sets, or own images.

What a sample gets depends on its global number only, so it is the same after a resume and for any number of processes.
Images are encoded by the teacher's own autoencoder when they are needed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from copy import copy
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from fewstep.core.files import fingerprint
from fewstep.core.tensors import Condition
from fewstep.data.films import FRAMES, draw_films
from fewstep.data.prompts import shuffled
from fewstep.data.scenes import Scenes
from fewstep.errors import FewstepError


class Encoder(Protocol):
    """What real data need of a backbone."""

    def encode(self, prompts: Sequence[str]) -> Condition: ...

    def encode_images(self, images: Tensor) -> Tensor: ...


class Teller(Encoder, Protocol):
    """Likewise, of films."""

    def told(self, prompts: Sequence[str], tracks: Tensor | None, drives: Tensor | None) -> Condition: ...


class RealScenes:
    """An endless sequence of scenes of the embedded data set with their captions, none of them held out."""

    def __init__(self, backbone: Encoder, seed: int = 0) -> None:
        self._backbone, self._seed = backbone, seed

    @cached_property
    def _scenes(self) -> Scenes:
        return Scenes()

    def __call__(self, iteration: int, samples: Tensor) -> tuple[Tensor, Condition]:
        """Latents (B, ...) and conditions of global sample numbers (B,)."""
        images, captions = zip(*(self.scene(int(n)) for n in samples), strict=True)
        return self._backbone.encode_images(torch.stack(images)), self._backbone.encode(captions)

    def scene(self, sample: int) -> tuple[Tensor, str]:
        """Image (3, 64, 64) in [-1, 1] and caption of a global sample number."""
        images, captions, _ = self._scenes.draw(1, np.random.default_rng([self._seed, 7, sample]))
        return images[0], str(captions[0])


class RealFilms:
    """An endless sequence of films with their captions, none of them held out; `frames` long, as the backbone's.

    With `controls` the conditions also tell their tracks and drives, for runs whose prompts are `FilmClips`.
    """

    def __init__(self, backbone: Teller, frames: int = FRAMES, seed: int = 0, *, controls: bool = False) -> None:
        self._backbone, self._frames, self._seed, self._controls = backbone, frames, seed, controls

    def __call__(self, iteration: int, samples: Tensor) -> tuple[Tensor, Condition]:
        """Latents (B, ...) and conditions of global sample numbers (B,)."""
        films = draw_films(samples.tolist(), seed=self._seed, frames=self._frames)
        captions = [str(caption) for caption in films.captions]
        told = (films.tracks, films.drives) if self._controls else (None, None)
        return self._backbone.encode_images(films.pixels.transpose(1, 2)), self._backbone.told(captions, *told)


class RealImages:
    """Shuffled passes over images (N, 3, H, W), or videos (N, F, 3, H, W), with a text each.

    Args:
        backbone: the teacher's; its latents have to have the images' proportions.
        images: uint8, or floats in [-1, 1].
        texts: one per image.
        seed: of the order.

    Raises:
        FewstepError: no images, not one text each, or another shape or range.
    """

    def __init__(self, backbone: Encoder, images: Tensor, texts: Sequence[str], seed: int = 0) -> None:
        if images.ndim not in (4, 5) or images.shape[-3] != 3 or not 0 < len(images) == len(texts):
            raise FewstepError(
                f"found images of shape {tuple(images.shape)} and {len(texts)} texts, expected (N, 3, H, W), or "
                "(N, F, 3, H, W) for videos, with N texts and N at least 1, fix: pass one text "
                "each, channels before height"
            )
        if images.dtype != torch.uint8 and not bool((images.abs() <= 1).all()):
            raise FewstepError("found images beyond [-1, 1], expected uint8, or floats in [-1, 1], fix: rescale them")
        self._backbone, self._images, self.texts, self._seed = backbone, images, list(texts), seed

    def encoded_by(self, backbone: Encoder) -> RealImages:
        """The same data encoded by another `backbone`."""
        other = copy(self)
        other._backbone = backbone
        return other

    def digest(self) -> str:
        """A hash of images, texts and seed, which run.json keeps; reads every image once (about a second a GB)."""
        hashed = fingerprint(json.dumps([str(self._images.dtype), self._images.shape, self.texts, self._seed]).encode())
        for image in self._images:
            hashed.update(memoryview(image.cpu().contiguous().flatten().view(torch.uint8).numpy()))
        return str(hashed.hexdigest())

    def __call__(self, iteration: int, samples: Tensor) -> tuple[Tensor, Condition]:
        """Latents (B, ...) and conditions of global sample numbers (B,)."""
        places = [shuffled(int(n), len(self.texts), (self._seed, 8)) for n in samples]
        images = self._images[places]
        if images.dtype == torch.uint8:
            images = images.float() / 127.5 - 1
        return self._backbone.encode_images(images), self._backbone.encode([self.texts[place] for place in places])
