"""Teachers that are diffusers pipelines, and the seam where a new network family is added.

A `Backbone` holds a loaded pipeline and knows everything about its family that the rest of the library must not: how
the network is called, what it predicts, how prompts are encoded, which layers take adapters. It is a border: inside,
integer timesteps, learned variances and text masks; outside, `call(network, x, t, condition) -> denoised` with t in [0,
1].

**A new family** is a subclass of `Backbone` with its abstract methods (see `stable_diffusion_3.py`; pieces that several
families need are in `pipelines.py`), registered by the class name that `model_index.json` gives its network, or its
pipeline where networks of one class serve several families:

    from fewstep.models import Backbone, register_backbone

    @register_backbone("MyTransformer2DModel")
    class Mine(Backbone):
        ...

How a folder finds its adapter, also one of another package, is in `loading.py` and docs/backbones.md.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from fewstep.attention import CausalSeat
from fewstep.attention.sparse import SparseOptions, make_sparse
from fewstep.attention.sparse.adaptive import Sequence as Tokens
from fewstep.attention.sparse.engines import chosen_engine
from fewstep.attention.sparse.order import Grid
from fewstep.core import grids
from fewstep.core.process import Process, process_from_scheduler
from fewstep.core.shards import is_sharded
from fewstep.core.tensors import Condition
from fewstep.errors import FewstepError
from fewstep.models.deferred import Deferred
from fewstep.models.pipelines import rebuilt, stand_in
from fewstep.models.recipes import Recipe
from fewstep.models.sizes import Side, check_size

BACKBONES: dict[str, type[Backbone]] = {}
"""Adapters by the class name of the pipeline or network in `model_index.json`; filled by `register_backbone`."""

Predict = Callable[[Tensor, Tensor], Tensor]
_Kind = TypeVar("_Kind", bound="type[Backbone]")


class Backbone(ABC):
    """A frozen pipeline as a teacher.

    Args:
        pipeline: the loaded diffusers pipeline; its network is frozen and put in eval mode.
        source: the folder or Hub id it came from.
    """

    pipeline_classes: ClassVar[tuple[str, ...]] = ()
    """Where not empty: the pipelines this adapter imitates; others are refused."""

    part_modules: ClassVar[tuple[str, ...]] = ()
    """Modules, beside those of diffusers and transformers, that parts of such pipelines may come from."""

    network_name: ClassVar[str] = "transformer"
    """Name of the network among the pipeline's parts."""

    output_name: ClassVar[str] = "images"
    """Name of the samples in what the pipeline's call returns."""

    recipe: ClassVar[Recipe] = Recipe()
    """What the family is distilled with unless the user says otherwise."""

    makes_films: ClassVar[bool] = False
    """Whether its videos are films of the embedded data set, whose captions and data are known and can be scored."""

    frame_rate: int = 16
    """Frames a second that videos are made for."""

    teacher_steps: int = 50
    """Steps of the teacher unless told otherwise."""

    teacher_guidance: float = 3.5
    """Guidance scale of the teacher unless told otherwise, 1 for none."""

    embedded_guidance: float | None = None
    """Where not None: the guidance scale that the network itself is told, by all roles and in every call, because
    classifier-free guidance was distilled into it (FLUX.1-dev, LCM). `teacher_guidance` then is 1."""

    comfyui_key: Callable[[str, Mapping[str, Any]], str] | None = None
    """(layer, config of the network) -> what ComfyUI calls the layer in a LoRA file (`fewstep.models.comfyui`); None
    where it has no such model."""
    zero_null: bool = False
    """Whether the condition of the empty prompt is meant to be zeros."""
    quantised: str | None = None
    """What the blocks of `network` are rounded to, if they are (`fewstep.models.quantised`)."""

    revision: str | None = None
    """Of the Hub id that `source` is."""

    adapter_layers: ClassVar[tuple[str, ...]] = ()
    """Ends of the names of the linear layers that take adapters by default."""

    self_attention: ClassVar[tuple[str, ...]] = ()
    """Ends of the names of the attention among the sample's tokens, with those of a text where both are joined."""

    text_first: ClassVar[bool] = True
    """Whether tokens of a text, where they are joined with the sample's, come first."""

    def __init__(self, pipeline: Any, source: str) -> None:
        self.pipeline, self.source = pipeline, source
        self.folder: Path | None = None
        """Where the pipeline's files are on this disk, where `load_backbone` has loaded it."""
        self.told_size: dict[str, int] = {}
        """What of `size` is not the pipeline's own choice: see `set_size`."""
        self.network: nn.Module = getattr(pipeline, self.network_name).requires_grad_(False).eval()
        """The teacher's network. Shared, never trained: see `fewstep.models.roles` for what is."""
        for part in self.pipeline.components.values():
            if isinstance(part, nn.Module):
                part.requires_grad_(False).eval()
        process, prediction = process_from_scheduler(pipeline.scheduler.config)
        self.process: Process = process
        self.prediction: str = prediction
        """What the network predicts, one of `fewstep.core.prediction.PREDICTIONS`."""
        self._null: Condition | None = None
        self.deferred: Deferred | None = None
        """Where the network's weights are, if they are still on disk (`load_backbone(..., defer=True)`)."""

    @property
    def size(self) -> dict[str, int]:
        """All sides of a decoded sample, as arguments of the pipeline's call."""
        return {name: side.usual for name, side in self.sides.items()} | self.told_size

    def set_size(self, told: Mapping[str, int]) -> None:
        """Make samples of another size from now on, teacher and students alike.

        Args:
            told: some of `sides`, in pixels or frames.

        Raises:
            FewstepError: a side that the family does not have or cannot make.
        """
        check_size(self.sides, told, type(self).__name__)
        self.told_size = {**self.told_size, **told}

    def _square(self, side: int, multiple: int) -> dict[str, Side]:
        """`sides` of images that the pipeline makes square; both numbers are in latents, not pixels."""
        scale = self.pipeline.vae_scale_factor
        return dict.fromkeys(("height", "width"), Side(side * scale, multiple * scale))

    @property
    def latent_sides(self) -> tuple[int, int]:
        """Height and width of the latents of images."""
        scale = self.pipeline.vae_scale_factor
        return self.size["height"] // scale, self.size["width"] // scale

    @property
    def sides(self) -> dict[str, Side]:
        """The sides that can be chosen when the teacher is loaded: of "height", "width" and "num_frames"; none here."""
        return {}

    @property
    @abstractmethod
    def latent_shape(self) -> tuple[int, ...]:
        """Shape of one latent, without the batch axis."""

    @property
    def sample_batch(self) -> int:
        """Samples drawn and decoded at a time unless told: 16 of 512-pixel images, 1 of videos, never above 32."""
        return min(32, max(1, 2**18 // math.prod(self.latent_shape)))

    @abstractmethod
    def call(self, network: nn.Module, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """One forward of `network` (the teacher's or one of the same family) as a denoised sample.

        Args:
            network: of the class of `self.network`, or its steps-aware kind.
            x: (B, *latent_shape), any float dtype; the network is fed its own.
            t: (B,) in [0, 1].
            condition: what `encode` returns; steps-aware networks also read "steps" and "landing", others ignore them.

        Returns:
            (B, *latent_shape) in the dtype of `x`.
        """

    @abstractmethod
    def encode(self, prompts: Sequence[str]) -> Condition:
        """What the pipeline itself makes of `prompts`, one row each, on the backbone's device; no gradient."""

    def controls(self, tracks: Tensor | None, drives: Tensor | None) -> Condition:
        """Tracks (B, F, 2), or (B, N, F, 2), and drives (B, F) of videos as the condition `CONTROLS`, frame by frame.

        Args:
            tracks: x, y in pixels, nan where nothing is said.
            drives: in [0, 1], likewise. One of the two may be None.

        Raises:
            FewstepError: the family reads none, as all but the films; or shapes that do not fit.
        """
        raise FewstepError(
            f"found tracks or drives for {type(self).__name__}, expected a teacher that reads them (controlled films, "
            "docs/video.md) or a student of it, fix: leave them out"
        )

    def told(self, prompts: Sequence[str], tracks: Tensor | None = None, drives: Tensor | None = None) -> Condition:
        """What `prompts` become, with `controls` where tracks or drives are given."""
        condition = self.encode(prompts)
        return condition if tracks is None and drives is None else condition | self.controls(tracks, drives)

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """(B, *latent_shape) -> uint8 on the CPU, the very pixels the pipeline returns.

        Images are (B, 3, H, W), videos (B, F, 3, H, W).
        """

    def stream_decoder(self) -> Callable[[Tensor], Tensor]:
        """decode(latents (B, C, n, h, w)) for chunk after chunk of one stream -> its frames (B, F, 3, H, W) uint8.

        Joined, they are what `decode` makes of the joined chunks, rounding apart.

        Raises:
            FewstepError: the family has no causal students, as all but Wan.
        """
        raise FewstepError(
            f"found a {type(self).__name__} to be decoded as it comes, expected a family of causal students (Wan), "
            "fix: decode whole samples"
        )

    def steps_aware(self) -> nn.Module:
        """The network as its steps-aware kind, sharing the teacher's weights; new weights make no difference yet.

        Raises:
            FewstepError: the family has no such kind, as all but PixArt.
        """
        raise FewstepError(
            f"found a {type(self.network).__name__} that is to be told its step count or landing time, expected a "
            "family with a steps-aware network (PixArt), fix: choose a method for a single step count (tdm instead of "
            "tdm-unify) and leave steps_condition and critic_call_condition off"
        )

    def causal(self, network: nn.Module) -> CausalSeat:
        """Make `network` (a student's, of the family of the teacher's) able to generate videos chunk by chunk.

        Raises:
            FewstepError: the family has no causal students, as all but Wan.
        """
        raise FewstepError(
            f"found a {type(self.network).__name__} for a causal student, expected a WanTransformer3DModel, "
            "fix: choose a Wan teacher, or a method that makes whole samples"
        )

    @property
    def token_grid(self) -> Grid:
        """Frames, rows and columns of the tokens of a sample.

        Raises:
            FewstepError: the family does not say so, and has no sparse students.
        """
        raise FewstepError(
            f"found a {type(self.network).__name__} to be made sparse, expected a family that says where its "
            "tokens lie (Wan, CogVideoX, PixArt, SD3, FLUX), fix: leave --sparse at dense"
        )

    def sparse(self, network: nn.Module, options: SparseOptions, active: Callable[[], bool] = lambda: True) -> None:
        """Let `network` (of the family of the teacher's) attend sparsely whenever `active`, in place.

        Raises:
            FewstepError: the family has no sparse students, or the engine is not for this device.
        """
        chosen_engine(options.engine, self.device, math.prod(self.token_grid), options.block)
        make_sparse(network, self.self_attention, lambda: Tokens(self.token_grid, self.text_first), options, active)

    def pipeline_with(self, network: nn.Module, scheduler: Any) -> Any:
        """A pipeline of the teacher's other parts around a student's plain or steps-aware `network`."""
        return rebuilt(self.pipeline, **{self.network_name: network, "scheduler": scheduler})

    def teacher_grid(self, steps: int) -> Tensor:
        """The time grid (steps + 1,) on which the family's own pipeline samples the teacher, shift included."""
        return grids.from_scheduler(self.pipeline.scheduler, steps, self.process)

    def rows_at_a_time(self, told: int | None) -> int:
        """How many samples to draw at a time, where the caller says `told`.

        Raises:
            FewstepError: fewer than one.
        """
        if told is not None and told < 1:
            raise FewstepError(f"found batch = {told}, expected 1 or more samples at a time, fix: leave it out")
        return self.sample_batch if told is None else told

    @property
    def student_call(self) -> dict[str, Any]:
        """Arguments, besides prompt and steps, with which the stock pipeline samples a student at its own size."""
        scale = 1 if self.embedded_guidance is None else self.embedded_guidance
        return {"guidance_scale": scale, **self.told_size}

    @property
    def network_parts(self) -> dict[str, str]:
        """The parts of the pipeline that `network` is, each with how the names of its layers begin in `network`."""
        return {self.network_name: ""}

    @abstractmethod
    def run_pipeline(self, predict: Predict, scheduler: Any, noise: Tensor, **call: Any) -> Tensor:
        """Latents that the family's own pipeline makes of `noise`, with `predict` in place of its network.

        Args:
            predict: (x (B, *latent_shape), `process.network_time` (B,)) -> what `prediction` says a network would
                predict, of the shape of x. Where the family's own network is called by other numbers or returns another
                sign, the stand-in converts.
            scheduler: drives the pipeline.
            noise: (B, *latent_shape) standard normal.
            call: arguments of the pipeline's call, such as num_inference_steps.
        """

    def stock_pipeline(self, forward: Callable[..., tuple[Tensor]], scheduler: Any) -> Any:
        """The teacher's pipeline, silent, with the function `forward` in place of its network's: for `run_pipeline`."""
        pipeline = self.pipeline_with(stand_in(self.network, forward, self.device), scheduler)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    @classmethod
    def pipeline_class(cls, name: str) -> Any:
        """What to load the pipeline class `name` of `model_index.json` with."""
        from diffusers import DiffusionPipeline

        return DiffusionPipeline

    def null_condition(self) -> Condition:
        """The encoded empty prompt, one row: the unconditional input of guidance. Encoded once."""
        if self._null is None:
            self._null = self.encode([""])
        return self._null

    def tapped_blocks(self, network: nn.Module) -> list[nn.Module]:
        """The modules of `network` (the teacher's or one of its kind) whose features a discriminator reads.

        In the order of their calls; `block_tokens` makes tokens of what they return. An adapter that does not say so
        has no discriminators.
        """
        raise FewstepError(
            f"found {type(self).__name__}, which does not say where its features are, expected tapped_blocks and "
            "feature_width in the adapter, fix: write them (see fewstep.models.pixart), or choose a method without a "
            "discriminator"
        )

    def block_tokens(self, output: Any) -> Tensor:
        """What a tapped block returned as tokens (B, N, C) of the width C of `feature_width`."""
        return output

    @property
    def feature_width(self) -> int:
        """C, the width of the features of `tapped_blocks`."""
        raise NotImplementedError

    def encode_images(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W), or videos (B, F, 3, H, W), in [-1, 1] as latents (B, *latent_shape).

        By the pipeline's own autoencoder.

        Needed where images are real data of a discriminator.
        """
        raise NotImplementedError(f"{type(self).__name__} does not encode images")

    def adapter_targets(self, layers: str) -> list[str]:
        """Names for PEFT's `target_modules`: "attention+ff" (the family's usual layers) or "all-linear"."""
        if layers == "attention+ff":
            return list(self.adapter_layers)
        if layers == "all-linear":
            return [name for name, module in self.network.named_modules() if isinstance(module, nn.Linear)]
        raise FewstepError(
            f"found adapter layers {layers!r}, expected 'attention+ff' or 'all-linear', fix: name one of these"
        )

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device if self.deferred is None else self.deferred.device

    @property
    def at_hand(self) -> bool:
        """Whether the network can be called here and now: its weights are neither on disk nor spread over processes."""
        return self.deferred is None and not is_sharded(next(self.network.parameters()))

    def to(self, device: str | torch.device) -> Backbone:
        """Move every part; dtypes stay. Call before roles are built: they share or copy what is there."""
        self.pipeline.to(device)
        self._null = None
        return self


class SeededNoise:
    """Standard normal numbers as a diffusers pipeline draws them with one generator per sample, call after call."""

    def __init__(self, seeds: Sequence[int]) -> None:
        if odd := [seed for seed in seeds if not -(2**63) <= seed < 2**64]:
            raise FewstepError(f"found seed {odd[0]}, expected a number of 64 bits, fix: choose another")
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, shape: Sequence[int]) -> Tensor:
        """The next (B, *shape) numbers, float32 on the CPU."""
        return torch.stack([torch.randn(*shape, generator=generator) for generator in self._generators])


def seeded_noise(seeds: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Standard normal (B, *shape) float32 on the CPU, one generator per seed.

    The numbers a diffusers pipeline draws with `generator=[torch.Generator().manual_seed(s) for s in seeds]`.
    """
    return SeededNoise(seeds)(shape)


def register_backbone(name: str) -> Callable[[_Kind], _Kind]:
    """Class decorator: use this adapter where `model_index.json` says that the pipeline, or its network, is a `name`.

    An adapter for the pipeline's class goes before one for the network's.
    """

    def register(kind: _Kind) -> _Kind:
        BACKBONES[name] = kind
        return kind

    return register
