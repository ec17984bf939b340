"""Scores of single pictures: how well each fits its prompt, or how people would like it.

A score is named `NAME` or `NAME=SOURCE` and is a function of uint8 images (N, 3, H, W) and N prompts to (N,) numbers,
higher is better. Weights come from a folder or Hub id in transformers' format (safetensors only). Some published ones
exist as pickles in a format of their own only: then the error says which, and what to pass. A score of your own is a
line in `SCORES`.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, linear, normalize

from fewstep.core.files import read_weights
from fewstep.errors import FewstepError
from fewstep.evaluation.spaces import CLIP, Clip

Score = Callable[[Tensor, list[str]], Tensor]
"""uint8 images (N, 3, H, W), N prompts -> (N,) float32 on the CPU."""

PICKSCORE = "yuvalkirstain/PickScore_v1"
HEAD = "head.safetensors"
"""File beside a CLIP model: the linear layers of the aesthetic score."""


def load_score(spec: str, device: str | torch.device = "cpu") -> tuple[str, Score]:
    """The name and function of a score written `NAME` or `NAME=SOURCE`.

    Raises:
        FewstepError: no such score, or no weights where it looks for them.
    """
    name, _, source = spec.partition("=")
    if name not in SCORES:
        raise FewstepError(f"found score {name!r}, expected one of {', '.join(SCORES)}, fix: choose one")
    return name, SCORES[name](source, torch.device(device))


def _cosine(clip: Clip) -> Score:
    return lambda images, prompts: cosine_similarity(clip.embed_images(images), clip.embed_texts(prompts))


def _clip(source: str, device: torch.device) -> Score:
    """CLIP score (Hessel et al. 2021, without its factor of 2.5): 100 times the cosine, at least 0."""
    cosine = _cosine(Clip.load(source or CLIP, device))
    return lambda images, prompts: 100 * cosine(images, prompts).clamp(min=0)


def _pickscore(source: str, device: torch.device) -> Score:
    """PickScore (Kirstain et al. 2023): the cosine by the temperature of a CLIP-H tuned on choices; about 20."""
    clip = Clip.load(source or PICKSCORE, device)
    cosine, scale = _cosine(clip), float(clip.network.logit_scale.exp())
    return lambda images, prompts: scale * cosine(images, prompts)


def _hps(source: str, device: torch.device) -> Score:
    """HPS v2.1 (Wu et al. 2023): 100 times the cosine of a CLIP-H tuned on people's choices; about 30."""
    if not source:
        raise FewstepError(
            "found no weights for hpsv2.1, expected a CLIP ViT-H/14 folder in transformers' format, since the release "
            "(xswu/HPSv2, HPS_v2.1_compressed.pt) is a pickle for open_clip, fix: convert it where you trust it, then "
            "hpsv2.1=FOLDER"
        )
    cosine = _cosine(Clip.load(source, device))
    return lambda images, prompts: 100 * cosine(images, prompts)


def _aesthetic(source: str, device: torch.device) -> Score:
    """LAION's aesthetic score, 1 to 10: linear layers on the normalised embedding of CLIP ViT-L/14; prompts unread."""
    head = Path(source) / HEAD
    if not source or not head.is_file():
        raise FewstepError(
            f"found no {HEAD} for the aesthetic score in {source or 'no folder'}, expected a folder with CLIP ViT-L/14 "
            "in transformers' format and that file, since the release (sac+logos+ava1-l14-linearMSE.pth) is a pickle, "
            "fix: convert it as docs/evaluation.md shows, then aesthetic=FOLDER"
        )
    clip, layers = Clip.load(source, device), _linear_layers(head)

    def score(images: Tensor, prompts: list[str]) -> Tensor:
        x = normalize(clip.embed_images(images), dim=-1)
        for weight, bias in layers:
            x = linear(x, weight, bias)
        return x[:, 0]

    return score


def _linear_layers(path: Path) -> list[tuple[Tensor, Tensor]]:
    """Weights and biases of `layers.N.weight`, `layers.N.bias`, in the order of N; they end in one number."""
    tensors = read_weights(path)
    numbers = sorted(int(name.split(".")[1]) for name in tensors if name.endswith(".weight"))
    layers = [(tensors[f"layers.{n}.weight"].float(), tensors[f"layers.{n}.bias"].float()) for n in numbers]
    widths = [weight.shape for weight, _ in layers]
    if not widths or widths[-1][0] != 1 or any(a[0] != b[1] for a, b in pairwise(widths)):
        raise FewstepError(
            f"found layers of shapes {[tuple(w) for w in widths]} in {path}, expected a chain that ends in one number, "
            "fix: save the tensors of the released MLP under their names"
        )
    return layers


def _image_reward(source: str, device: torch.device) -> Score:
    raise FewstepError(
        "found no ImageReward in transformers' format, expected one, since the release (THUDM/ImageReward, "
        "ImageReward.pt) is a pickle of a network of its own, fix: install image-reward where you trust its pickle and "
        "add fewstep.evaluation.scores.SCORES['imagereward'] = a function that returns its score"
    )


SCORES: dict[str, Callable[[str, torch.device], Score]] = {
    "clip": _clip,
    "pickscore": _pickscore,
    "hpsv2.1": _hps,
    "aesthetic": _aesthetic,
    "imagereward": _image_reward,
}
"""By name: source (empty: the usual one), device -> the function."""
