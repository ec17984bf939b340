"""The embedded teacher: a PixArt-alpha in miniature, trained from nothing on the captioned scenes.

Same parts and conventions as the published PixArt-alpha: `PixArtTransformer2DModel`, cross-attention to T5 states,
noise prediction with learned variance, linear betas 1e-4..0.02 over 1000 steps, captions dropped for classifier-free
guidance. The text encoder is a two-layer T5 trained jointly: it is 1 MB and lies in the pipeline folder, where a
pre-trained encoder (MiniLM: 45 MB in fp16) would have to be an extra download for plain diffusers to load the folder.
The price is a closed vocabulary: words it has never seen become `<unk>`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from fewstep.data.scenes import ATTRIBUTES, COUNTS, Scenes, draw_caption
from fewstep.data.things import BACKGROUNDS, STYLES, THINGS
from fewstep.embedded.autoencoder import LATENT_SHAPE
from fewstep.embedded.training import (
    TOKENS,
    Training,
    TrainingOptions,
    blur_words,
    exempt,
    initialise_captions,
    precision,
    word_tokenizer,
)

if TYPE_CHECKING:
    from diffusers import AutoencoderTiny, PixArtAlphaPipeline, PixArtTransformer2DModel
    from transformers import PreTrainedTokenizerFast, T5EncoderModel

STEPS = 1000
BETAS = (1e-4, 0.02)
WIDTH, LAYERS = 192, 6
JITTERS = 4
"""Background shifts rendered per (thing, style, background, placement) for training."""


@dataclass(frozen=True)
class TeacherOptions(TrainingOptions):
    """How the embedded image teacher is trained."""

    min_snr: float = 5.0
    """Cap of the SNR at the low-noise end of the loss's weight (Hang et al. 2023); see `diffusion_loss`."""
    velocity_cap: float = 150.0
    """Cap of the loss's weight at the high-noise end; see `diffusion_loss`."""


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Word-level tokenizer over the words of the captions; pads with `<pad>`, ends with `</s>`."""
    grammar = "a an some big small on the left in middle right background"
    return word_tokenizer([grammar, *THINGS, *STYLES, *BACKGROUNDS])


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
    initialise_captions(transformer.caption_projection, transformer.transformer_blocks)
    return transformer


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
        exempt(self.transformer.pos_embed.proj)  # noise in and noise out: bf16 has too few digits for t = 999
        exempt(self.transformer.proj_out)

    def forward(self, x: torch.Tensor, index: torch.Tensor, captions: list[str]) -> torch.Tensor:
        tokens = self.tokenizer(captions, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt")
        tokens = tokens.to(x.device)
        states = self.text_encoder(tokens.input_ids, attention_mask=tokens.attention_mask)[0]
        extra = {"resolution": None, "aspect_ratio": None}
        return self.transformer(
            x, encoder_hidden_states=states, encoder_attention_mask=tokens.attention_mask, timestep=index,
            added_cond_kwargs=extra,
        ).sample  # fmt: skip


class TeacherTraining(Training):
    """Training of the image teacher on latents of scenes."""

    options: TeacherOptions

    def __init__(self, data: Latents, options: TeacherOptions, device: str = "cpu", rank: int = 0, world: int = 1):
        super().__init__(options, device, rank, world)
        self.data = data

    def new_model(self) -> TeacherModel:
        return TeacherModel()

    def loss(self, rng: np.random.Generator) -> torch.Tensor:
        o = self.options
        x0, captions = self.data.draw(o.batch // self.world, rng)
        captions = [blur_words(c, o, rng) for c in captions]
        x0 = x0.to(self.device)
        noise = torch.from_numpy(rng.standard_normal(x0.shape, np.float32)).to(self.device)
        index = torch.from_numpy((rng.permutation(len(x0)) + rng.random(len(x0))) / len(x0) * STEPS).long()
        index = index.to(self.device)
        bar = noise_schedule().to(self.device)[index].float().view(-1, 1, 1, 1)
        with precision(o.bf16, self.device):
            output = self.model(bar.sqrt() * x0 + (1 - bar).sqrt() * noise, index, captions)
        return diffusion_loss(output, x0, noise, index, o).mean()
