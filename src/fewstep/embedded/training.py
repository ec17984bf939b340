"""What the trainings of the embedded teachers share: loop, optimisers, rate, precision, words and how they enter."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fewstep.errors import FewstepError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TOKENS = 16
"""Longest caption in tokens, with the end mark."""
UNKNOWN_WORD = "something"
"""A word the vocabulary does not have, so that it becomes `<unk>`."""


@dataclass(frozen=True)
class TrainingOptions:
    """How any embedded teacher is trained."""

    iterations: int = 10_000
    """Optimiser steps."""
    batch: int = 64
    """Scenes or films per step, over all processes."""
    rate: float = 1e-3
    """Learning rate of Muon and AdamW; linear warm-up over 200 steps, constant, linear to zero over the last part."""
    cooldown: float = 0.25
    """The part of the iterations over which the rate falls to zero."""
    drop: float = 0.1
    """Share of captions replaced by the empty one, for guidance."""
    unknown: float = 0.05
    """Share of captions in which one word is replaced by `<unk>`."""
    ema: float = 0.998
    """Decay of the averaged weights that are saved, per step."""
    bf16: bool = False
    """Matrix products in bf16: 1.7 times faster on CPUs with AVX512-BF16, ten times slower on those without."""
    seed: int = 0


def word_tokenizer(phrases: Sequence[str]) -> PreTrainedTokenizerFast:
    """Word-level tokenizer over the words of `phrases`, for captions of `TOKENS` words at most with the end mark."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = " ".join(phrases).split()
    vocabulary = {w: i for i, w in enumerate(dict.fromkeys(["<pad>", "</s>", "<unk>", *words]))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=TOKENS
    )


@torch.no_grad()
def initialise_captions(projection: Any, blocks: nn.ModuleList) -> None:
    """Let captions enter at the scale of the residual stream, through cross-attention that starts silent.

    With PyTorch's default they enter at 1/20 of it (docs/findings/captions-too-quiet.md).
    """
    for linear, gain in ((projection.linear_1, 1.0), (projection.linear_2, 1.7)):
        nn.init.normal_(linear.weight, std=gain * linear.in_features**-0.5)
        nn.init.zeros_(linear.bias)
    for block in blocks:
        nn.init.zeros_(block.attn2.to_out[0].weight)


def build_optimisers(model: nn.Module) -> list[torch.optim.Optimizer]:
    """Muon (Jordan et al. 2024) for the matrices inside the networks, AdamW for what goes in, comes out or is a vector.

    On the same scenes, 200 steps of Muon lowered the loss as far as thousands of AdamW's would have
    (docs/findings/teacher-optimiser.md).
    """
    if not hasattr(torch.optim, "Muon"):
        raise FewstepError(
            f"found torch {torch.__version__}, expected 2.9 or newer for training the teacher (its optimiser is Muon), "
            "fix: pip install -U torch"
        )
    inside: list[nn.Parameter] = []
    outside: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        edge = parameter.ndim != 2 or any(part in name for part in ("shared", "relative", "table", "proj_out"))
        (outside if edge else inside).append(parameter)
    return [
        torch.optim.Muon(inside, lr=0.0, weight_decay=1e-2, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(outside, lr=0.0, betas=(0.9, 0.99), weight_decay=1e-2),
    ]


@contextmanager
def precision(bf16: bool, device: str) -> Iterator[None]:
    """Matrix products in bf16 if wanted; attention by plain products then, whose backward pass is fast on CPUs."""
    if not bf16:
        yield
        return
    with sdpa_kernel(SDPBackend.MATH), torch.autocast(torch.device(device).type, torch.bfloat16):
        yield


def exempt(module: nn.Module) -> None:
    """Let `module` work in fp32 under autocast."""
    forward = module.forward

    def exact(x: torch.Tensor) -> torch.Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return forward(x.float())

    module.forward = exact  # type: ignore[method-assign]


def learning_rate(iteration: int, options: TrainingOptions) -> float:
    """The rate of an iteration (0-based)."""
    left = (options.iterations - iteration) / max(1.0, options.cooldown * options.iterations)
    return options.rate * min(1.0, (iteration + 1) / 200, left)


def blur_words(caption: str, options: TrainingOptions, rng: np.random.Generator) -> str:
    """A caption as it is trained on: by chance dropped, or with a word replaced by `UNKNOWN_WORD`."""
    draw = rng.random()
    if draw < options.drop:
        return ""
    if draw < options.drop + options.unknown:
        words = caption.split()
        words[rng.integers(len(words))] = UNKNOWN_WORD
        return " ".join(words)
    return caption


class Training(ABC):
    """The whole state of a training; `run` is its loop, `save` and `load` make it resumable."""

    options: TrainingOptions

    def __init__(self, options: TrainingOptions, device: str = "cpu", rank: int = 0, world: int = 1):
        torch.manual_seed(options.seed)
        self.options, self.device, self.rank, self.world = options, device, rank, world
        self.model = self.new_model().to(device)
        self.average = {k: v.clone() for k, v in self.model.state_dict().items()}
        self.optimisers = build_optimisers(self.model)
        self.iteration = 0

    @abstractmethod
    def new_model(self) -> nn.Module:
        """An untrained model: `tokenizer`, `text_encoder` and `transformer`."""

    @abstractmethod
    def loss(self, rng: np.random.Generator) -> torch.Tensor:
        """Mean loss of this process's part of a batch drawn by `rng`."""

    def step(self) -> float:
        """One optimiser step; the loss of this process."""
        o = self.options
        loss = self.loss(np.random.default_rng([o.seed, self.iteration, self.rank]))
        self.model.zero_grad(set_to_none=True)
        loss.backward()
        self._reduce()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = learning_rate(self.iteration, o)
            optimiser.step()
        self.iteration += 1
        decay = min(o.ema, self.iteration / (self.iteration + 20))
        current = self.model.state_dict()
        torch._foreach_lerp_([self.average[k] for k in current], list(current.values()), 1 - decay)
        return loss.item()

    def _reduce(self) -> None:
        if self.world > 1:
            gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
            flat = torch._utils._flatten_dense_tensors(gradients)
            torch.distributed.all_reduce(flat)
            flat /= self.world
            for gradient, mean in zip(gradients, torch._utils._unflatten_dense_tensors(flat, gradients), strict=True):
                gradient.copy_(mean)

    def run(self, report: int = 50) -> Iterator[tuple[int, float]]:
        """Train to the end; yields (iteration, mean loss) every `report` iterations and at the end."""
        losses: list[float] = []
        while self.iteration < self.options.iterations:
            losses.append(self.step())
            if not math.isfinite(losses[-1]):
                raise FloatingPointError(f"The teacher's loss is {losses[-1]} at iteration {self.iteration}.")
            if self.iteration % report == 0 or self.iteration == self.options.iterations:
                yield self.iteration, float(np.mean(losses))
                losses = []

    def save(self, path: Path) -> None:
        """Write weights, averages, optimiser state and the iteration to one safetensors file, atomically."""
        average = {f"average.{k}": v for k, v in self.average.items()}
        save_state(path, self.model, self.optimisers, self.iteration, average)

    def load(self, path: Path) -> None:
        """Continue from a file written by `save`."""
        self.iteration, others = load_state(path, self.model, self.optimisers, self.device)
        self.average = {k.removeprefix("average."): v for k, v in others.items()}

    def start_from(self, folder: Path) -> None:
        """Take over the weights of a pipeline folder written by `build.export`; the optimiser starts anew."""
        from safetensors.torch import load_file

        parts = {"text_encoder": "model", "transformer": "diffusion_pytorch_model"}
        for part, file in parts.items():
            weights = load_file(folder / part / f"{file}.safetensors")
            getattr(self.model, part).load_state_dict({k: v.float() for k, v in weights.items()}, strict=False)
        self.average = {k: v.clone() for k, v in self.model.state_dict().items()}

    def averaged(self) -> Any:
        """The model with the averaged weights."""
        model = self.new_model().to(self.device)
        model.load_state_dict(self.average)
        return model.eval()


def save_state(
    path: Path,
    model: nn.Module,
    optimisers: Sequence[torch.optim.Optimizer],
    iteration: int,
    others: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write a training's weights, optimisers' state, iteration and `others` to a safetensors file, atomically."""
    from safetensors.torch import save_file

    state = {f"model.{k}": v for k, v in model.state_dict().items()} | (others or {})
    for o, optimiser in enumerate(optimisers):
        for i, slot in optimiser.state_dict()["state"].items():
            state |= {f"optimiser.{o}.{i}.{k}": torch.as_tensor(v) for k, v in slot.items()}
    temporary = path.with_suffix(".tmp")
    save_file({k: v.contiguous().clone() for k, v in state.items()}, temporary, {"iteration": str(iteration)})
    temporary.replace(path)


def load_state(
    path: Path, model: nn.Module, optimisers: Sequence[torch.optim.Optimizer], device: str
) -> tuple[int, dict[str, torch.Tensor]]:
    """Put back what `save_state` wrote; the iteration and the others are returned."""
    from safetensors import safe_open

    with safe_open(path, "pt", device=device) as f:  # type: ignore[no-untyped-call]
        iteration, tensors = int(f.metadata()["iteration"]), {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118
    part = lambda name: {k.removeprefix(name): tensors.pop(k) for k in list(tensors) if k.startswith(name)}  # noqa: E731
    model.load_state_dict(part("model."))
    for o, optimiser in enumerate(optimisers):
        slots: dict[int, dict[str, torch.Tensor]] = {}
        for key, value in part(f"optimiser.{o}.").items():
            i, name = key.split(".")
            slots.setdefault(int(i), {})[name] = value
        optimiser.load_state_dict({"state": slots, "param_groups": optimiser.state_dict()["param_groups"]})
    return iteration, tensors
