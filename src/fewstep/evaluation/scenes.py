"""How good are samples of the embedded data set: quality, prompt-following and variety, in the judge's eyes.

Every figure is relative to a reference set of the same size from the same prompts (usually the teacher's guided 50-step
samples with other seeds): Fréchet distance and precision/recall in the judge's features. Prompt-following needs no
reference. Variety is exact: where a caption leaves an attribute open, the data has all its values equally often.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fewstep.data.scenes import ATTRIBUTES, COUNTS, Caption, draw_caption
from fewstep.embedded.judge import Judge
from fewstep.evaluation.metrics import frechet_distance, precision_recall


@dataclass(frozen=True)
class SceneScores:
    """What the judge says of a set of images."""

    images: int
    """How many; distances of sets of different size are not comparable."""
    frechet: float
    """Fréchet distance to the reference set; lower is better, 0 is equal."""
    precision: float
    """Share of images that look like some reference image."""
    recall: float
    """Share of reference images that look like some image: variety."""
    following: float
    """Share of images on which everything that the caption states is right."""
    thing: float
    """Share of images of the right thing."""
    contrast: float
    """Mean over the images of the standard deviation of their values, which lie in [0, 1]."""
    clipped: float
    """Share of values that are black or white to within a grey level: what saturation ends in."""
    evenness: dict[str, float]
    """Per open attribute: entropy over its largest possible value; 1 is uniform."""
    histograms: dict[str, list[float]]
    """Per attribute: shares of its values among the images whose caption leaves it open."""

    def row(self) -> dict[str, float]:
        """The plain numbers, for a table."""
        return {
            "frechet": self.frechet,
            "precision": self.precision,
            "recall": self.recall,
            "following": self.following,
            "thing": self.thing,
            "contrast": self.contrast,
            "clipped": self.clipped,
            **{f"{name} evenness": value for name, value in self.evenness.items()},
        }


def evaluation_captions(count: int, seed: int = 0) -> list[Caption]:
    """`count` held-out captions; the same for the same seed."""
    rng = np.random.default_rng([seed, 7])
    return [draw_caption(rng, for_evaluation=True) for _ in range(count)]


@torch.no_grad()
def judge_features(judge: Judge, images: Tensor) -> tuple[Tensor, np.ndarray]:
    """uint8 images (N, 3, 64, 64) -> features (N, 128), attributes (N, 4)."""
    parts = [part.float() / 127.5 - 1 for part in images.split(256)]
    features = torch.cat([judge.features(part) for part in parts])
    return features, np.concatenate([judge.attributes(part) for part in parts])


def score_scenes(judge: Judge, images: Tensor, captions: list[Caption], reference: Tensor) -> SceneScores:
    """Scores of uint8 images (N, 3, 64, 64) of `captions`, against reference features (N, 128)."""
    features, named = judge_features(judge, images)
    size = min(len(features), len(reference))
    precision, recall = precision_recall(reference[:size], features[:size])
    right = named_rightly(named, captions)
    contrast, clipped = contrast_and_clipping(images)
    histograms = {name: histogram(named[:, a], captions, name) for a, name in enumerate(ATTRIBUTES) if name != "thing"}
    return SceneScores(
        images=size,
        frechet=frechet_distance(reference[:size], features[:size]),
        precision=precision,
        recall=recall,
        following=float(right.all(1).mean()),
        thing=float(right[:, 0].mean()),
        contrast=float(contrast.mean()),
        clipped=float(clipped.mean()),
        evenness={name: evenness(shares) for name, shares in histograms.items()},
        histograms=histograms,
    )


def named_rightly(named: np.ndarray, captions: Sequence[Caption]) -> np.ndarray:
    """Attributes (N, 4) that the judge named -> whether each agrees with the caption, (N, 4)."""
    return np.array(
        [[named[i, a] in c.choices(name) for a, name in enumerate(ATTRIBUTES)] for i, c in enumerate(captions)]
    )


def contrast_and_clipping(images: Tensor) -> tuple[Tensor, Tensor]:
    """uint8 (N, ...) -> of each sample the standard deviation of its values in [0, 1], the share of black or white."""
    flat = images.flatten(1)
    return flat.float().std(1) / 255, ((flat <= 1) | (flat >= 254)).float().mean(1)


def histogram(
    named: np.ndarray, captions: Sequence[Caption], attribute: str, counts: np.ndarray | None = None
) -> list[float]:
    """Shares of an attribute's values (N,) among the images whose caption leaves it wholly open, each counted so."""
    is_open = np.array([len(c.choices(attribute)) == COUNTS[attribute] for c in captions])
    weights = None if counts is None else counts[is_open]
    found = np.bincount(named[is_open], weights, minlength=COUNTS[attribute])
    return [float(n) for n in found / max(1, found.sum())]


def evenness(shares: Sequence[float]) -> float:
    """Entropy of shares over that of the uniform law."""
    return -sum(p * math.log(p) for p in shares if p > 0) / math.log(len(shares))
