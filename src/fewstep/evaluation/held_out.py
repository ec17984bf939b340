"""A student's samples against its teacher's for the same held-out prompts and seeds, by pixels alone: for any teacher.

It is what monitors judge a run by while it trains: cheap, without a judge's weights, and with the same prompts and
noise every time, so that its figures can be compared along a run. For figures to report there is `fewstep evaluate`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, unfold

from fewstep.evaluation.metrics import sliced_wasserstein
from fewstep.evaluation.scenes import contrast_and_clipping

Draw = Callable[[list[str], list[int]], Tensor]
"""prompts, seeds -> samples, uint8 (n, 3, H, W) or (n, F, 3, H, W)."""

PROMPTS, PER_PROMPT = 16, 2
FIRST_SEED = 7_000_000
"""Of the seeds, which no other evaluation uses."""
_PATCH, _PATCHES, _SMALLEST, _FRAMES = 7, 64, 16, 4


class HeldOut:
    """Prompts with the teacher's samples of them, which are drawn once, when they are first needed.

    Args:
        teacher: draws its samples, at its own steps and guidance: `PER_PROMPT` of each prompt.
        prompts: the first `PROMPTS` of them are taken.
    """

    def __init__(self, teacher: Draw, prompts: Sequence[str]) -> None:
        self._teacher = teacher
        self._texts = [prompt for prompt in prompts[:PROMPTS] for _ in range(PER_PROMPT)]
        self._seeds = list(range(FIRST_SEED, FIRST_SEED + len(self._texts)))
        self._theirs: Tensor | None = None

    def compare(self, student: Draw) -> dict[str, float]:
        """The figures of `compared` for the student's samples."""
        if self._theirs is None:
            self._theirs = self._teacher(self._texts, self._seeds)
        return compared(student(self._texts, self._seeds), self._theirs)


def compared(samples: Tensor, teachers: Tensor) -> dict[str, float]:
    """Figures of uint8 `samples` and of the teacher's, (N, 3, H, W) or (N, F, 3, H, W), `PER_PROMPT` of each prompt.

    - distance: sliced 2-Wasserstein distance of 7x7 patches with values in [0, 1], a mean over sizes (the picture's
      own, a half, a quarter, ..., down to 16 pixels), as Karras et al. 2018, but with the patches' means and scale
    - shift: mean of the values less the teacher's
    - contrast, sharpness, variety: standard deviation of the values, rms difference of neighbouring pixels, rms
      distance of two seeds of a prompt; each over the teacher's, 1: as the teacher
    - clipped: share of black and white values less the teacher's
    """
    own, theirs = (_figures(each) for each in (samples, teachers))
    ratios = ("contrast", "sharpness", "variety")
    told = {name: own[name] / max(theirs[name], 1e-6) for name in ratios}
    told |= {name: own[name] - theirs[name] for name in ("shift", "clipped")}
    levels = zip(_patches(samples), _patches(teachers), strict=True)
    distances = [sliced_wasserstein(a, b) for a, b in levels]
    return {"distance": sum(distances) / len(distances), **told}


def _figures(samples: Tensor) -> dict[str, float]:
    contrast, clipped = contrast_and_clipping(samples)
    values = samples.float() / 255
    across, down = values.diff(dim=-1).square().mean(), values.diff(dim=-2).square().mean()
    seeds = values.unflatten(0, (-1, PER_PROMPT)).flatten(2)  # (prompts, PER_PROMPT, elements)
    return {
        "contrast": float(contrast.mean()),
        "clipped": float(clipped.mean()),
        "shift": float(values.mean()),
        "sharpness": float(((across + down) / 2).sqrt()),
        "variety": float((seeds - seeds.mean(1, keepdim=True)).square().mean(2).sqrt().mean()),
    }


def _patches(samples: Tensor) -> list[Tensor]:
    """For each size, the same random patches of every picture: (N x 64, 147) with values in [0, 1]."""
    frames = samples if samples.ndim == 4 else samples[:, : min(_FRAMES, samples.shape[1])].flatten(0, 1)
    generator = torch.Generator().manual_seed(0)
    levels: list[list[Tensor]] = []
    places: list[Tensor] = []
    for frame in frames:  # one at a time, for the memory of large ones
        picture, level = frame[None].float() / 255, 0
        while True:
            found = unfold(picture, _PATCH, stride=2)[0].T  # (places, 147)
            if level == len(places):
                places.append(torch.randint(len(found), (_PATCHES,), generator=generator))
                levels.append([])
            levels[level].append(found[places[level]])
            if min(picture.shape[-2:]) < 2 * _SMALLEST:
                break
            picture, level = avg_pool2d(picture, 2), level + 1
    return [torch.cat(parts) for parts in levels]
