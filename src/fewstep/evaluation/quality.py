"""How good are samples, relative to a teacher or a reference set, with intervals: the work behind `fewstep evaluate`.

Samples are drawn once into a folder (`samples.py`); everything here reads them from there. All intervals are bootstraps
over prompts (`intervals.py`). What a figure is called says what it is: `frechet/judge` is the Fréchet distance in the
judge's features, `score/clip` the mean of the score `clip`.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewstep.data.films import FilmCaption
from fewstep.data.scenes import ATTRIBUTES, Caption
from fewstep.embedded.judge import Judge
from fewstep.evaluation.film_numbers import SPACE, film_features, film_numbers
from fewstep.evaluation.film_reading import read_films
from fewstep.evaluation.intervals import Estimate, estimate, mean_of
from fewstep.evaluation.metrics import KernelDistance, frechet_distance, neighbours, spread
from fewstep.evaluation.motion import motion_and_flicker
from fewstep.evaluation.scenes import contrast_and_clipping, evenness, histogram, judge_features, named_rightly
from fewstep.evaluation.scores import Score
from fewstep.evaluation.spaces import Embed
from fewstep.models.student import Student
from fewstep.models.teacher import Teacher
from fewstep.training.progress import peak_memory

FRAMES = 8
"""Most frames of a video whose features and scores are taken, evenly spaced from the first to the last."""

Row = dict[str, Estimate]


@dataclass(frozen=True)
class Plan:
    """Which samples: `per_prompt` of each prompt, with seeds that count up from `first_seed`, prompt by prompt."""

    prompts: Sequence[str]
    per_prompt: int = 1
    first_seed: int = 0

    @property
    def texts(self) -> list[str]:
        """The prompt of every sample."""
        return [prompt for prompt in self.prompts for _ in range(self.per_prompt)]

    @property
    def seeds(self) -> list[int]:
        """The seed of every sample."""
        return list(range(self.first_seed, self.first_seed + len(self.prompts) * self.per_prompt))


@dataclass
class Measured:
    """What was found out about each of N samples, in order."""

    features: dict[str, Tensor] = field(default_factory=dict)
    """By space: (N, F, D), F frames of videos, 1 of pictures."""
    numbers: dict[str, Tensor] = field(default_factory=dict)
    """By name: (N,), whose mean is reported."""
    named: np.ndarray | None = None
    """(N, 4) attributes that the judge names, of the embedded data set."""


@torch.no_grad()
def measure(
    samples: Iterable[Tensor],
    texts: Sequence[str],
    spaces: Mapping[str, Embed],
    scores: Mapping[str, Score],
    *,
    partners: Iterable[Tensor] | None = None,
    judge: Judge | None = None,
    films: Sequence[FilmCaption] | None = None,
) -> Measured:
    """Go once through samples, batch by batch, and note what all figures need.

    Args:
        samples: uint8 (n, 3, H, W) or (n, F, 3, H, W), as `SampleSet.read` gives them.
        texts: their prompts.
        spaces: to take features in.
        scores: to give each sample.
        partners: samples of the teacher from the same noise, whose pixels are compared.
        judge: names the attributes of embedded scenes, where told.
        films: captions of all samples, where these are films of the embedded data set: they get features and numbers
            of their own (`film_numbers`).
    """
    features: dict[str, list[Tensor]] = {name: [] for name in spaces}
    numbers: dict[str, list[Tensor]] = {}
    named = []
    others = iter(partners) if partners is not None else None
    done = 0
    for part in samples:
        prompts = list(texts[done : done + len(part)])
        done += len(part)
        frames = _frames(part)
        flat = frames.flatten(0, 1)
        for name, embed in spaces.items():
            features[name].append(embed(flat).unflatten(0, frames.shape[:2]))
        found = dict(zip(("contrast", "clipped"), contrast_and_clipping(part), strict=True))
        for name, score in scores.items():
            each = score(flat, [prompt for prompt in prompts for _ in range(frames.shape[1])])
            found[f"score/{name}"] = each.view(len(part), -1).mean(1)
        if part.ndim == 5:
            moves = torch.tensor([motion_and_flicker(video) for video in part])
            found["motion"], found["flicker"] = moves.unbind(1)
        if others is not None:
            gap = (part.float() - next(others).float()) / 255
            found["paired/pixels"] = gap.flatten(1).square().mean(1).sqrt()
        if films is not None:
            reading = read_films(part)
            features.setdefault(SPACE, []).append(film_features(part, reading)[:, None])
            found |= film_numbers(part, films[done - len(part) : done], reading)
        if judge is not None:
            named.append(judge_features(judge, part)[1])
        for name, values in found.items():
            numbers.setdefault(name, []).append(values)
    return Measured(
        {name: torch.cat(parts) for name, parts in features.items()},
        {name: torch.cat(parts) for name, parts in numbers.items()},
        np.concatenate(named) if named else None,
    )


def _frames(samples: Tensor) -> Tensor:
    """(n, F, 3, H, W) of a batch: of videos at most `FRAMES`, of pictures one."""
    if samples.ndim == 4:
        return samples[:, None]
    count = samples.shape[1]
    return samples[:, torch.linspace(0, count - 1, min(FRAMES, count)).round().long()]


@dataclass(frozen=True)
class Reference:
    """What samples are compared with."""

    features: Mapping[str, Tensor]
    """By space: (M, F, D)."""
    by_prompt: bool
    """Whether it has as many samples of the same prompts in the same order, so that it is resampled with them."""


def quality(
    found: Measured,
    counts: Tensor,
    *,
    reference: Reference | None = None,
    paired: Measured | None = None,
    captions: Sequence[Caption] | None = None,
) -> Row:
    """All figures of one set of samples.

    Args:
        found: of `measure`.
        counts: resamples of the prompts (R, P), of `drawn_counts`.
        reference: what distances are to.
        paired: the teacher's samples from the same noise.
        captions: of every sample, for the embedded data set.
    """
    prompts = counts.shape[1]
    row: Row = {}
    for name, features in found.features.items():
        if reference is not None:
            row |= _distances(name, features, reference.features[name], reference.by_prompt, counts)
        if len(features) > prompts:
            row |= _variety(name, features, reference, counts)
        if paired is not None:
            gap = (features - paired.features[name]).norm(dim=2).mean(1)
            row[f"paired/{name}"] = mean_of(gap.view(prompts, -1).mean(1), counts)
    if captions is not None and found.named is not None:
        row |= _scenes(found.named, captions, counts)
    for name, values in found.numbers.items():
        row[name] = mean_of(values.view(prompts, -1).mean(1), counts)
    return row


def _distances(name: str, features: Tensor, theirs: Tensor, by_prompt: bool, counts: Tensor) -> Row:
    """Distances to the reference set in one space."""
    prompts = counts.shape[1]
    generated, real = features.flatten(0, 1).double(), theirs.flatten(0, 1).double()

    def of_generated(count: Tensor) -> Tensor:
        return count.repeat_interleave(len(generated) // prompts)

    def of_real(count: Tensor) -> Tensor | None:
        return count.repeat_interleave(len(real) // prompts) if by_prompt else None

    each = torch.arange(prompts)
    same = (each.repeat_interleave(len(real) // prompts), each.repeat_interleave(len(generated) // prompts))
    kernel, near = KernelDistance(real, generated, same if by_prompt else None), neighbours(real, generated)

    def share(each: Tensor, resampled: bool) -> Estimate:
        return mean_of(each.view(prompts, -1).mean(1), counts) if resampled else Estimate(float(each.mean()))

    return {
        f"frechet/{name}": estimate(
            lambda count: frechet_distance(real, generated, of_real(count), of_generated(count)), counts
        ),
        f"kernel/{name}": estimate(lambda count: kernel(of_real(count), of_generated(count)), counts),
        f"precision/{name}": share(near.precise, True),
        f"recall/{name}": share(near.recalled, by_prompt),
        f"density/{name}": share(near.density, True),
        f"coverage/{name}": share(near.covered, by_prompt),
    }


def _variety(name: str, features: Tensor, reference: Reference | None, counts: Tensor) -> Row:
    """Mean distance of two seeds' samples of a prompt; relative to the reference's where that has the same prompts."""
    prompts = counts.shape[1]
    mine = spread(features.mean(1).unflatten(0, (prompts, -1)))
    row = {f"variety/{name}": mean_of(mine, counts)}
    if reference is not None and reference.by_prompt:
        theirs = spread(reference.features[name].mean(1).unflatten(0, (prompts, -1)))
        row[f"variety ratio/{name}"] = estimate(lambda count: float(count @ mine / (count @ theirs)), counts)
    return row


def _scenes(named: np.ndarray, captions: Sequence[Caption], counts: Tensor) -> Row:
    """Prompt-following and evenness of the embedded data set, as in `scenes.SceneScores`."""
    prompts = counts.shape[1]
    right = torch.from_numpy(named_rightly(named, captions)).double()
    row = {
        "following": mean_of(right.all(1).double().view(prompts, -1).mean(1), counts),
        "thing": mean_of(right[:, 0].view(prompts, -1).mean(1), counts),
    }
    for a, attribute in enumerate(ATTRIBUTES):
        if attribute != "thing":

            def even(count: Tensor, a: int = a, attribute: str = attribute) -> float:
                each = count.repeat_interleave(len(captions) // prompts).numpy()
                return evenness(histogram(named[:, a], captions, attribute, each))

            row[f"evenness/{attribute}"] = estimate(even, counts)
    return row


@dataclass(frozen=True)
class Cost:
    """What a sample costs on this machine."""

    calls: int
    """Network calls; guided steps count 2."""
    seconds: float
    """Median time of a sample drawn alone, with its prompt encoded and decoded."""
    peak_gib: float
    """Most memory so far: of the device, or of this process on the CPU."""


def measure_cost(
    model: Teacher | Student, prompt: str, steps: int, guidance_scale: float | None = None, repeats: int = 3
) -> Cost:
    """Draw one sample `repeats` times after a first one that is not counted; guidance is for teachers."""
    device = model.backbone.device
    more: dict[str, Any] = {"guidance_scale": guidance_scale} if isinstance(model, Teacher) else {}
    times = []
    for n in range(repeats + 1):
        start = time.perf_counter()
        model.sample([prompt], [n], steps, **more)  # what it returns is on the CPU: nothing is pending
        times.append(time.perf_counter() - start)
    calls = model.calls(steps, guidance_scale) if isinstance(model, Teacher) else steps
    return Cost(calls, sorted(times[1:])[repeats // 2], peak_memory(device))
