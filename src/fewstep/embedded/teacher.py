"""The embedded teacher: a PixArt-alpha in miniature, trained from nothing on the captioned scenes.

Same parts and conventions as the published PixArt-alpha: `PixArtTransformer2DModel`, cross-attention to T5 states,
noise prediction with learned variance, linear betas 1e-4..0.02 over 1000 steps, captions dropped for classifier-free
guidance. The text encoder is a two-layer T5 trained jointly: it is 1 MB and lies in the pipeline folder, where a
pre-trained encoder (MiniLM: 45 MB in fp16) would have to be an extra download for plain diffusers to load the folder.
The price is a closed vocabulary: words it has never seen become `<unk>`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fewstep.data.scenes import ATTRIBUTES, COUNTS, Scenes, draw_caption
from fewstep.data.things import BACKGROUNDS, STYLES, THINGS
from fewstep.embedded.autoencoder import LATENT_SHAPE
from fewstep.errors import FewstepError

if TYPE_CHECKING:
    from diffusers import AutoencoderTiny, PixArtAlphaPipeline, PixArtTransformer2DModel
    from transformers import PreTrainedTokenizerFast, T5EncoderModel

TOKENS = 16
"""Longest caption in tokens, with the end mark."""
STEPS = 1000
BETAS = (1e-4, 0.02)
WIDTH, LAYERS = 192, 6
UNKNOWN_WORD = "something"
"""A word the vocabulary does not have, so that it becomes `<unk>`."""
JITTERS = 4
"""Background shifts rendered per (thing, style, background, placement) for training."""


@dataclass(frozen=True)
class TeacherOptions:
    """How the embedded teacher is trained."""

    iterations: int = 10_000
    """Optimiser steps."""
    batch: int = 64
    """Scenes per step, over all processes."""
    rate: float = 1e-3
    """Learning rate of Muon and AdamW; linear warm-up over 200 steps, constant, linear to zero over the last part."""
    cooldown: float = 0.25
    """The part of the iterations over which the rate falls to zero."""
    drop: float = 0.1
    """Share of captions replaced by the empty one, for guidance."""
    unknown: float = 0.05
    """Share of captions in which one word is replaced by `<unk>`."""
    min_snr: float = 5.0
    """Cap of the SNR at the low-noise end of the loss's weight (Hang et al. 2023); see `diffusion_loss`."""
    velocity_cap: float = 150.0
    """Cap of the loss's weight at the high-noise end; see `diffusion_loss`."""
    ema: float = 0.998
    """Decay of the averaged weights that are saved, per step."""
    bf16: bool = False
    """Matrix products in bf16: 1.7 times faster on CPUs with AVX512-BF16, ten times slower on those without."""
    seed: int = 0


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Word-level tokenizer over the words of the captions; pads with `<pad>`, ends with `</s>`."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    grammar = "a an some big small on the left in middle right background"
    words = " ".join([grammar, *THINGS, *STYLES, *BACKGROUNDS]).split()
    vocabulary = {w: i for i, w in enumerate(dict.fromkeys(["<pad>", "</s>", "<unk>", *words]))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=TOKENS
    )


def build_text_encoder(vocabulary: int) -> T5EncoderModel:
    """An untrained two-layer T5 encoder, 128 wide."""
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=vocabulary, d_model=128, d_kv=32, num_heads=4, num_layers=2, d_ff=256, dropout_rate=0.0,
        feed_forward_proj="gated-gelu", is_encoder_decoder=False, use_cache=False, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return T5EncoderModel(config)


def build_transformer() -> PixArtTransformer2DModel:
    """An untrained PixArt transformer for 4x16x16 latents, about 4 M parameters."""
    from diffusers import PixArtTransformer2DModel

    transformer = PixArtTransformer2DModel(
        num_attention_heads=WIDTH // 32, attention_head_dim=32, num_layers=LAYERS, cross_attention_dim=WIDTH,
        in_channels=LATENT_SHAPE[0], out_channels=2 * LATENT_SHAPE[0], sample_size=LATENT_SHAPE[1], patch_size=2,
        caption_channels=128, use_additional_conditions=False,
    )  # fmt: skip
    initialise_captions(transformer)
    return transformer


@torch.no_grad()
def initialise_captions(transformer: PixArtTransformer2DModel) -> None:
    """Let captions enter at the scale of the residual stream, through cross-attention that starts silent.

    With PyTorch's default they enter at 1/20 of it (docs/findings/captions-too-quiet.md).
    """
    projection = transformer.caption_projection
    for linear, gain in ((projection.linear_1, 1.0), (projection.linear_2, 1.7)):
        nn.init.normal_(linear.weight, std=gain * linear.in_features**-0.5)
        nn.init.zeros_(linear.bias)
    for block in transformer.transformer_blocks:
        nn.init.zeros_(block.attn2.to_out[0].weight)


def build_pipeline(
    autoencoder: AutoencoderTiny, tokenizer: Any, text_encoder: nn.Module, transformer: nn.Module
) -> PixArtAlphaPipeline:
    """The parts as an ordinary pipeline; DDIM with the spacing whose last step lands on clean data."""
    from diffusers import DDIMScheduler, PixArtAlphaPipeline

    scheduler = DDIMScheduler(
        num_train_timesteps=STEPS, beta_start=BETAS[0], beta_end=BETAS[1], beta_schedule="linear",
        timestep_spacing="trailing", clip_sample=False, set_alpha_to_one=True, steps_offset=0,
    )  # fmt: skip
    return PixArtAlphaPipeline(tokenizer, text_encoder, autoencoder, transformer, scheduler)


@dataclass(frozen=True)
class Latents:
    """Latents of every (thing, style, background, placement) at a few background shifts; drawn with captions."""

    latents: torch.Tensor
    """(120, 2, 8, 4, JITTERS, 4, 16, 16) float16."""

    @classmethod
    def encode(cls, autoencoder: AutoencoderTiny, seed: int) -> Latents:
        """Render and encode all of them: 30,720 scenes, about 5 ms each on one core."""
        scenes, rng = Scenes(), np.random.default_rng([seed, 1])
        attributes = np.indices(tuple(COUNTS.values())).reshape(len(ATTRIBUTES), -1).T.repeat(JITTERS, 0)
        parts = []
        with torch.no_grad():
            for part in np.array_split(attributes, max(1, len(attributes) // 64)):
                parts.append(autoencoder.encode(scenes.render(part, rng)).latents.half())
        return cls(torch.cat(parts).unflatten(0, (*COUNTS.values(), JITTERS)))

    def draw(self, count: int, rng: np.random.Generator) -> tuple[torch.Tensor, list[str]]:
        """`count` latents (B, 4, 16, 16) with captions of the training set."""
        captions = [draw_caption(rng) for _ in range(count)]
        attributes = np.array([[rng.choice(c.choices(a)) for a in ATTRIBUTES] for c in captions])
        index = (*attributes.T, rng.integers(JITTERS, size=count))
        return self.latents[index].float(), [str(c) for c in captions]


def noise_schedule() -> torch.Tensor:
    """Cumulative products alpha_bar (1000,), float64."""
    return torch.cumprod(1 - torch.linspace(*BETAS, STEPS, dtype=torch.float64), 0)


def diffusion_loss(
    output: torch.Tensor, x0: torch.Tensor, noise: torch.Tensor, index: torch.Tensor, options: TeacherOptions
) -> torch.Tensor:
    """Weighted noise error, plus 1e-3 times the variational bound of the learned variance; (B,).

    The weight is min(1 + 1/SNR, velocity_cap) min(1, min_snr / SNR): the error of velocity where noise prevails,
    min-SNR where it does not. With the plain noise error a small network neither gets precise enough at t = 999, where
    alpha is 0.006 and an error of 0.02 in eps is one of 3 in x0, nor has a reason to read captions; without the cap,
    precision there drowns everything else (docs/findings).

    output (B, 2C, ...): noise prediction, then the interpolation between the two extreme log variances in [-1, 1]
    (Nichol & Dhariwal 2021, eq. 15-16; the bound does not reach the noise prediction).
    """
    bar = noise_schedule().to(output.device)
    previous = torch.cat([bar.new_ones(1), bar[:-1]])
    beta = 1 - bar / previous
    posterior = beta * (1 - previous) / (1 - bar)
    posterior[0] = posterior[1]
    at = lambda table: table[index].float().view(-1, *[1] * (x0.ndim - 1))  # noqa: E731
    predicted, mix = output.chunk(2, dim=1)
    error = (predicted - noise).square().flatten(1).mean(1)
    snr = (bar / (1 - bar))[index].float()
    log_variance = 0.5 * (mix + 1) * at(beta.log()) + 0.5 * (1 - mix) * at(posterior.log())
    # The means of posterior and model differ by beta / sqrt(alpha (1 - bar)) times the noise error.
    gap = at(beta / ((1 - beta) * (1 - bar)).sqrt()) * (predicted.detach() - noise)
    bound = 0.5 * (log_variance - at(posterior.log()) + (at(posterior) + gap.square()) / log_variance.exp() - 1)
    weight = (1 + 1 / snr).clamp(max=options.velocity_cap) * (options.min_snr / snr).clamp(max=1)
    return error * weight + 1e-3 * bound.flatten(1).mean(1)


class TeacherModel(nn.Module):
    """Text encoder and transformer, trained together."""

    def __init__(self) -> None:
        super().__init__()
        self.tokenizer = build_tokenizer()
        self.text_encoder = build_text_encoder(len(self.tokenizer))
        self.transformer = build_transformer()
        _exempt(self.transformer.pos_embed.proj)  # noise in and noise out: bf16 has too few digits for t = 999
        _exempt(self.transformer.proj_out)

    def forward(self, x: torch.Tensor, index: torch.Tensor, captions: list[str]) -> torch.Tensor:
        tokens = self.tokenizer(captions, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt")
        tokens = tokens.to(x.device)
        states = self.text_encoder(tokens.input_ids, attention_mask=tokens.attention_mask)[0]
        extra = {"resolution": None, "aspect_ratio": None}
        return self.transformer(
            x, encoder_hidden_states=states, encoder_attention_mask=tokens.attention_mask, timestep=index,
            added_cond_kwargs=extra,
        ).sample  # fmt: skip


def build_optimisers(model: TeacherModel) -> list[torch.optim.Optimizer]:
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
def _precision(bf16: bool, device: str) -> Iterator[None]:
    """Matrix products in bf16 if wanted; attention by plain products then, whose backward pass is fast on CPUs."""
    if not bf16:
        yield
        return
    with sdpa_kernel(SDPBackend.MATH), torch.autocast(torch.device(device).type, torch.bfloat16):
        yield


def _exempt(module: nn.Module) -> None:
    """Let `module` work in fp32 under autocast."""
    forward = module.forward

    def exact(x: torch.Tensor) -> torch.Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return forward(x.float())

    module.forward = exact  # type: ignore[method-assign]


def learning_rate(iteration: int, options: TeacherOptions) -> float:
    """The rate of an iteration (0-based)."""
    left = (options.iterations - iteration) / max(1.0, options.cooldown * options.iterations)
    return options.rate * min(1.0, (iteration + 1) / 200, left)


def _blur_words(caption: str, options: TeacherOptions, rng: np.random.Generator) -> str:
    draw = rng.random()
    if draw < options.drop:
        return ""
    if draw < options.drop + options.unknown:
        words = caption.split()
        words[rng.integers(len(words))] = UNKNOWN_WORD
        return " ".join(words)
    return caption


class TeacherTraining:
    """The whole state of a training; `run` is its loop, `save` and `load` make it resumable."""

    def __init__(self, data: Latents, options: TeacherOptions, device: str = "cpu", rank: int = 0, world: int = 1):
        torch.manual_seed(options.seed)
        self.data, self.options, self.device, self.rank, self.world = data, options, device, rank, world
        self.model = TeacherModel().to(device)
        self.average = {k: v.clone() for k, v in self.model.state_dict().items()}
        self.optimisers = build_optimisers(self.model)
        self.iteration = 0

    def step(self) -> float:
        """One optimiser step; the loss of this process."""
        o = self.options
        rng = np.random.default_rng([o.seed, self.iteration, self.rank])
        x0, captions = self.data.draw(o.batch // self.world, rng)
        captions = [_blur_words(c, o, rng) for c in captions]
        x0 = x0.to(self.device)
        noise = torch.from_numpy(rng.standard_normal(x0.shape, np.float32)).to(self.device)
        index = torch.from_numpy((rng.permutation(len(x0)) + rng.random(len(x0))) / len(x0) * STEPS).long()
        index = index.to(self.device)
        bar = noise_schedule().to(self.device)[index].float().view(-1, 1, 1, 1)
        with _precision(o.bf16, self.device):
            output = self.model(bar.sqrt() * x0 + (1 - bar).sqrt() * noise, index, captions)
        loss = diffusion_loss(output, x0, noise, index, o).mean()
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
        from safetensors.torch import save_file

        state = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        state |= {f"average.{k}": v for k, v in self.average.items()}
        for o, optimiser in enumerate(self.optimisers):
            for i, slot in optimiser.state_dict()["state"].items():
                state |= {f"optimiser.{o}.{i}.{k}": torch.as_tensor(v) for k, v in slot.items()}
        temporary = path.with_suffix(".tmp")
        save_file({k: v.contiguous().clone() for k, v in state.items()}, temporary, {"iteration": str(self.iteration)})
        temporary.replace(path)

    def load(self, path: Path) -> None:
        """Continue from a file written by `save`."""
        from safetensors import safe_open

        with safe_open(path, "pt", device=self.device) as f:  # type: ignore[no-untyped-call]
            self.iteration = int(f.metadata()["iteration"])
            part = lambda name: {k.removeprefix(name): f.get_tensor(k) for k in f.keys() if k.startswith(name)}  # noqa: E731, SIM118
            self.model.load_state_dict(part("model."))
            self.average = part("average.")
            for o, optimiser in enumerate(self.optimisers):
                slots: dict[int, dict[str, torch.Tensor]] = {}
                for key, value in part(f"optimiser.{o}.").items():
                    i, name = key.split(".")
                    slots.setdefault(int(i), {})[name] = value
                optimiser.load_state_dict({"state": slots, "param_groups": optimiser.state_dict()["param_groups"]})

    def start_from(self, folder: Path) -> None:
        """Take over the weights of a pipeline folder written by `build.export`; the optimiser starts anew."""
        from safetensors.torch import load_file

        parts = {"text_encoder": "model", "transformer": "diffusion_pytorch_model"}
        for part, file in parts.items():
            weights = load_file(folder / part / f"{file}.safetensors")
            getattr(self.model, part).load_state_dict({k: v.float() for k, v in weights.items()}, strict=False)
        self.average = {k: v.clone() for k, v in self.model.state_dict().items()}

    def averaged(self) -> TeacherModel:
        """The model with the averaged weights."""
        model = TeacherModel().to(self.device)
        model.load_state_dict(self.average)
        return model.eval()
