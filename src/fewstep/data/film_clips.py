"""Captions of films that come with tracks and drives: what a student of the controlled film teacher is trained on.

    fewstep distill motionstream --teacher runs/video-teacher/film-teacher --prompts films
    fewstep.distill(teacher, "motionstream", prompts=FilmClips())

They are the scripts of the films (`fewstep.data.films`), which need not be rendered: a method that matches
distributions sees no data, only what is asked of the student.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from fewstep.core.tensors import Condition
from fewstep.data.films import draw_script, film_caption
from fewstep.data.prompts import PromptData, shuffled
from fewstep.data.sources import Prompts


class FilmClips(Prompts):
    """Captions of the training films, clip n that of film n, with the film's track and drive.

    Args:
        count: how many.
        seed: of the films.
        drop_tracks: share of clips whose track is left open, in [0, 1], so that the student can do without as well.
        drop_drives: likewise.
    """

    def __init__(self, count: int = 8192, seed: int = 0, drop_tracks: float = 0.2, drop_drives: float = 0.5) -> None:
        self._count, self._seed, self.left_out = count, seed, (drop_tracks, drop_drives)

    def __len__(self) -> int:
        return self._count

    def _text(self, at: int) -> str:
        return film_caption(at, self._seed)

    def told(self, places: Sequence[int], frames: int) -> dict[str, Tensor]:
        """`tracks` (B, frames, 2) and `drives` (B, frames) of the clips `places`, nan where they are left open."""
        tracks, drives = [], []
        for place in places:
            script = draw_script(place, self._seed, frames)
            no_track, no_drive = np.random.default_rng([self._seed, place, 11]).random(2) < self.left_out
            tracks.append(np.full_like(script.track, np.nan) if no_track else script.track)
            drives.append(np.full_like(script.drive, np.nan) if no_drive else script.drive)
        parts = {"tracks": tracks, "drives": drives}
        return {name: torch.from_numpy(np.stack(rows).astype(np.float32)) for name, rows in parts.items()}


class Teller(Protocol):
    """What clips need of a backbone."""

    @property
    def latent_shape(self) -> tuple[int, ...]: ...

    def encode(self, prompts: Sequence[str]) -> Condition: ...

    def told(self, prompts: Sequence[str], tracks: Tensor | None, drives: Tensor | None) -> Condition: ...


class ClipData(PromptData):
    """Conditions for the trainer, tracks and drives among them: sample n has clip n of shuffled passes over them."""

    def __init__(self, backbone: Teller, clips: FilmClips, seed: int = 0) -> None:
        super().__init__(backbone.encode, clips, seed)
        self._backbone, self._clips = backbone, clips

    def __call__(self, iteration: int, samples: Tensor) -> Condition:
        """The condition of global sample numbers (B,)."""
        places = [shuffled(int(n), len(self._clips), (self._seed, 3)) for n in samples]
        controls = self._clips.told(places, self._backbone.latent_shape[1])
        return self._backbone.told([self._clips[place] for place in places], controls["tracks"], controls["drives"])
