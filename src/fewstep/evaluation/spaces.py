"""Feature spaces: what makes numbers of pictures, for distances between sets of them.

A space is named `NAME` or `NAME=SOURCE` and is a function of uint8 images (N, 3, H, W) to features (N, D). The judge of
the embedded data set is shipped; the others are read from a folder or Hub id (safetensors only; nothing is unpickled,
no remote code runs). A space of your own is a line in `SPACES`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from fewstep.embedded.build import JUDGE_FILE, shipped
from fewstep.embedded.judge import Judge
from fewstep.errors import FewstepError

BATCH = 32
"""Images that a network sees at a time."""

Embed = Callable[[Tensor], Tensor]
"""uint8 images (N, 3, H, W) -> features (N, D), float32 on the CPU."""


def load_space(spec: str, device: str | torch.device = "cpu") -> tuple[str, Embed]:
    """The name and function of a space written `NAME` or `NAME=SOURCE`.

    Raises:
        FewstepError: no such space, or no weights where it looks for them.
    """
    name, _, source = spec.partition("=")
    if name not in SPACES:
        raise FewstepError(f"found feature space {name!r}, expected one of {', '.join(SPACES)}, fix: choose one")
    return name, SPACES[name](source, torch.device(device))


def _judge(source: str, device: torch.device) -> Embed:
    """Features of the embedded judge; of 64x64 images only."""
    if source:
        raise FewstepError(f"found judge={source}, expected no source, since it is shipped, fix: write judge")
    judge = Judge.load(shipped(JUDGE_FILE)).to(device)

    def embed(images: Tensor) -> Tensor:
        if images.shape[2:] != (64, 64):
            raise FewstepError(
                f"found images of {images.shape[3]}x{images.shape[2]} for the judge, expected the 64x64 scenes it was "
                "trained on, fix: choose another space, such as --spaces dinov2"
            )
        return in_batches(lambda part: judge.features(part.to(device).float() / 127.5 - 1), images)

    return embed


def _clip(source: str, device: torch.device) -> Embed:
    """Projected image embeddings of CLIP."""
    clip = Clip.load(source or CLIP, device)
    return clip.embed_images


def _dinov2(source: str, device: torch.device) -> Embed:
    """The class token of DINOv2 after its last norm."""
    from transformers import Dinov2Model

    source = source or DINOV2
    network = pretrained(Dinov2Model, source, device)
    prepare = Preparation.of(source)
    return lambda images: in_batches(lambda part: network(prepare(part).to(device)).pooler_output, images)


def _inception(source: str, device: torch.device) -> Embed:
    """The 2048 features of the published FID, from a file of safetensors."""
    from fewstep.evaluation.inception import Inception

    if not source or not Path(source).is_file():
        raise FewstepError(
            f"found {source or 'no file'} for the space inception, expected the weights of "
            "pt_inception-2015-12-05-6726825d as safetensors, fix: convert them as docs/evaluation.md shows, then "
            "inception=FILE.safetensors"
        )
    network = Inception.load(Path(source)).to(device)
    return lambda images: in_batches(lambda part: network(part.to(device)), images)


SPACES: dict[str, Callable[[str, torch.device], Embed]] = {
    "judge": _judge,
    "clip": _clip,
    "dinov2": _dinov2,
    "inception": _inception,
}
"""By name: source (empty: the usual one), device -> the function."""
CLIP = "openai/clip-vit-large-patch14"
DINOV2 = "facebook/dinov2-base"


@torch.no_grad()
def in_batches(embed: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """`embed` of a few images at a time; the results on the CPU."""
    return torch.cat([embed(part).float().cpu() for part in images.split(BATCH)])


def pretrained(kind: Any, source: str, device: torch.device) -> Any:
    """A frozen transformers model of class `kind` from a folder or Hub id, float32.

    Raises:
        FewstepError: nothing there, not in transformers' format, or not as safetensors.
    """
    try:
        network = kind.from_pretrained(source, use_safetensors=True, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise FewstepError(
            f"found no usable {kind.__name__} at {source} ({str(error).splitlines()[0]}), expected a folder or Hub id "
            "in transformers' format with safetensors weights, fix: pass NAME=FOLDER, or convert pickled weights "
            "where you trust them"
        ) from error
    return network.requires_grad_(False).eval().to(device)


@dataclass(frozen=True)
class Preparation:
    """How a transformers model wants its images: shorter side to `size`, the middle `crop`, then normalised."""

    size: int
    crop: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of(cls, source: str) -> Preparation:
        """What `preprocessor_config.json` of a folder or Hub id says.

        Raises:
            FewstepError: no such file, or one that says something else.
        """
        from transformers.image_processing_base import ImageProcessingMixin

        try:
            told, _ = ImageProcessingMixin.get_image_processor_dict(source)
            size, crop = told["size"], told.get("crop_size") or told["size"]
            size = size if isinstance(size, int) else size.get("shortest_edge") or size["height"]
            crop = crop if isinstance(crop, int) else crop.get("height") or crop["shortest_edge"]
            return cls(size, crop, tuple(told["image_mean"]), tuple(told["image_std"]))
        except (OSError, KeyError, TypeError) as error:
            raise FewstepError(
                f"found no usable preprocessor_config.json at {source} ({error}), expected size, image_mean and "
                "image_std, fix: save the model with its processor"
            ) from error

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 (N, 3, H, W) on the CPU -> (N, 3, crop, crop), bicubic with antialiasing in bytes, as in Pillow."""
        height, width = images.shape[2:]
        scale = self.size / min(height, width)
        sides = (max(self.crop, int(height * scale)), max(self.crop, int(width * scale)))
        small = interpolate(images, size=sides, mode="bicubic", antialias=True)
        top, left = (sides[0] - self.crop) // 2, (sides[1] - self.crop) // 2
        middle = small[:, :, top : top + self.crop, left : left + self.crop].float() / 255
        mean, std = (torch.tensor(x).view(1, 3, 1, 1) for x in (self.mean, self.std))
        return (middle - mean) / std


class Clip:
    """A CLIP model with its tokenizer: embeddings of images and texts in one space."""

    def __init__(self, network: Any, tokenizer: Any, prepare: Preparation) -> None:
        self.network, self.tokenizer, self.prepare = network, tokenizer, prepare

    @classmethod
    def load(cls, source: str, device: torch.device) -> Clip:
        """From a folder or Hub id in transformers' format; raises FewstepError as `pretrained`."""
        from transformers import CLIPModel, CLIPTokenizer

        network = pretrained(CLIPModel, source, device)
        return cls(network, CLIPTokenizer.from_pretrained(source), Preparation.of(source))

    def embed_images(self, images: Tensor) -> Tensor:
        """uint8 (N, 3, H, W) -> (N, D), not normalised."""

        def embed(part: Tensor) -> Tensor:
            pooled = self.network.vision_model(self.prepare(part).to(self.network.device)).pooler_output
            return self.network.visual_projection(pooled)

        return in_batches(embed, images)

    @torch.no_grad()
    def embed_texts(self, texts: list[str]) -> Tensor:
        """N texts -> (N, D), not normalised; cut to the length that the model knows."""
        length = self.network.config.text_config.max_position_embeddings
        told = self.tokenizer(texts, padding=True, truncation=True, max_length=length, return_tensors="pt")
        pooled = self.network.text_model(
            input_ids=told["input_ids"].to(self.network.device),
            attention_mask=told["attention_mask"].to(self.network.device),
        ).pooler_output
        return self.network.text_projection(pooled).float().cpu()
