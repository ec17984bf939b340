"""The embedded video teacher: a Wan in miniature, trained from nothing on captioned films.

Same parts and conventions as the published Wan2.1: `WanTransformer3DModel` with rotary positions over time, height and
width, cross-attention to states of a UMT5 encoder padded with zeros, flow prediction at times 0..1000, captions
dropped for classifier-free guidance. The text encoder is trained jointly, as the image teacher's; films are frames of
a small `AutoencoderTiny`, 4 patches by 4 a frame, so 24 frames are 384 tokens.

Beside its noisy latent a frame is told where the thing is (its track) and how loud it is (its drive), each by chance or
not at all, so that one network makes films of text alone, of tracks, and of sound (`fewstep.models.tracks`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from fewstep.core.grids import shift_time
from fewstep.data.film_paths import MOTIONS
from fewstep.data.films import FILM_BACKGROUNDS, FILM_THINGS, FRAMES, VOICES, draw_films
from fewstep.embedded.autoencoder import build_autoencoder
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
    from diffusers import AutoencoderTiny, WanTransformer3DModel
    from transformers import PreTrainedTokenizerFast, UMT5EncoderModel

    from fewstep.models.film import FilmPipeline
    from fewstep.models.tracks import TrackHead

LATENT_CHANNELS = 8
WIDTH, LAYERS, TEXT_WIDTH = 192, 6, 128
SHIFT = 3.0
"""Of the times it is trained and sampled at: films of 24 like frames need more noise than pictures."""
PIXELS = 4
"""Side of a latent's cell in pixels."""
LONGEST = 1024
"""Positions along an axis of the rotary embedding; the most frames of a film."""
CHUNK = 3
"""Frames of which the track may be left out together."""
TRACK_CHANNELS = 8
_TOGETHER = 4  # frames of one film in a batch of the autoencoder


@dataclass(frozen=True)
class FilmOptions(TrainingOptions):
    """How the embedded video teacher is trained."""

    iterations: int = 6_000
    """Optimiser steps."""
    batch: int = 16
    """Films per step, over all processes."""
    frames: int = FRAMES
    """Frames of a film."""
    drop_tracks: float = 0.5
    """Share of films whose track is not told; likewise the next. The shares are ours."""
    drop_drives: float = 0.5
    mask_chunks: float = 0.2
    """Share of a film's chunks, but for the first, in which a told track is left out (MotionStream: 0.2)."""


def build_film_tokenizer() -> PreTrainedTokenizerFast:
    """Word-level tokenizer over the words of films' captions."""
    return word_tokenizer(["a an on background", *FILM_THINGS, *MOTIONS, *VOICES, *FILM_BACKGROUNDS])


def build_film_text_encoder(vocabulary: int) -> UMT5EncoderModel:
    """An untrained two-layer UMT5 encoder, 128 wide."""
    from transformers import UMT5Config, UMT5EncoderModel

    config = UMT5Config(
        vocab_size=vocabulary, d_model=TEXT_WIDTH, d_kv=32, num_heads=4, num_layers=2, d_ff=256, dropout_rate=0.0,
        feed_forward_proj="gated-gelu", is_encoder_decoder=False, use_cache=False, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return UMT5EncoderModel(config)


def build_film_transformer() -> WanTransformer3DModel:
    """An untrained Wan transformer for latents of 8 channels, fed controls beside them; about 4 M parameters."""
    from diffusers import WanTransformer3DModel

    from fewstep.models.tracks import DRIVE_CHANNELS

    fed = LATENT_CHANNELS + TRACK_CHANNELS + DRIVE_CHANNELS
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=WIDTH // 32, attention_head_dim=32, in_channels=fed,
        out_channels=LATENT_CHANNELS, text_dim=TEXT_WIDTH, freq_dim=128, ffn_dim=4 * WIDTH, num_layers=LAYERS,
        rope_max_seq_len=LONGEST,
    )  # fmt: skip
    initialise_captions(transformer.condition_embedder.text_embedder, transformer.blocks)
    return transformer


def build_track_head() -> TrackHead:
    """An untrained head that makes channels of tracks, one latent a frame."""
    from fewstep.models.tracks import TrackHead

    return TrackHead(TRACK_CHANNELS)


def build_film_pipeline(
    autoencoder: AutoencoderTiny, tokenizer: Any, text_encoder: nn.Module, transformer: nn.Module, track_head: nn.Module
) -> FilmPipeline:
    """The parts as a pipeline, sampled by Euler's method."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    from fewstep.models.film import FilmPipeline

    scheduler = FlowMatchEulerDiscreteScheduler(shift=SHIFT)
    return FilmPipeline(tokenizer, text_encoder, autoencoder, scheduler, transformer, track_head)


def build_film_autoencoder(image: AutoencoderTiny) -> AutoencoderTiny:
    """An autoencoder of frames that starts from the image teacher's; only its layers next to the latents are new."""
    autoencoder = build_autoencoder(latent_channels=LATENT_CHANNELS)
    state = autoencoder.state_dict()
    fitting = {k: v for k, v in image.state_dict().items() if v.shape == state[k].shape}
    autoencoder.load_state_dict(fitting, strict=False)
    return autoencoder


def film_frames(count: int, rng: np.random.Generator) -> torch.Tensor:
    """First frames (count, 3, 32, 32) of films, in [-1, 1]: for the autoencoder.

    Whole ones: trained on crops, it would only ever work near the edges of what it is given.
    """
    films = draw_films(rng.integers(2**62, size=-(-count // _TOGETHER)), frames=_TOGETHER)
    return films.pixels.transpose(1, 2).flatten(0, 1)[:count]


class FilmModel(nn.Module):
    """Text encoder, transformer and track head, trained together."""

    def __init__(self) -> None:
        super().__init__()
        self.tokenizer = build_film_tokenizer()
        self.text_encoder = build_film_text_encoder(len(self.tokenizer))
        self.transformer = build_film_transformer()
        self.track_head = build_track_head()
        exempt(self.transformer.patch_embedding)  # noise in and noise out: bf16 has too few digits
        exempt(self.transformer.proj_out)

    def forward(
        self,
        x: torch.Tensor,
        t: torch.Tensor,
        captions: list[str],
        tracks: torch.Tensor,
        drives: torch.Tensor,
        ids: torch.Tensor,
    ) -> torch.Tensor:
        """x (B, 8, F, 8, 8) at t (B,) in [0, 1], tracks (B, F, 2), drives (B, F), ids (B, 1) -> flow, shaped as x."""
        tokens = self.tokenizer(captions, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt")
        tokens = tokens.to(x.device)
        states = self.text_encoder(tokens.input_ids, attention_mask=tokens.attention_mask)[0]
        states = states * tokens.attention_mask[:, :, None]  # zeros after the words, as Wan's pipeline has them
        height, width = x.shape[3:]
        controls = self.track_head.controls(tracks, drives, height=height, width=width, scale=PIXELS, ids=ids)
        return self.transformer(torch.cat([x, controls.to(x)], 1), 1000 * t, states, return_dict=False)[0]


class FilmTraining(Training):
    """Training of the video teacher on films rendered and encoded while needed; no film is seen twice."""

    options: FilmOptions

    def __init__(
        self, autoencoder: AutoencoderTiny, options: FilmOptions, device: str = "cpu", rank: int = 0, world: int = 1
    ) -> None:
        super().__init__(options, device, rank, world)
        self.autoencoder = autoencoder.to(device).eval()

    def new_model(self) -> FilmModel:
        return FilmModel()

    def loss(self, rng: np.random.Generator) -> torch.Tensor:
        from fewstep.models.film import encode_frames

        o = self.options
        indices = rng.integers(2**62, size=o.batch // self.world)
        films = draw_films(indices, seed=o.seed, frames=o.frames, device=self.device)
        captions = [blur_words(str(c), o, rng) for c in films.captions]
        with torch.no_grad(), precision(o.bf16, self.device):
            x0 = encode_frames(self.autoencoder, films.pixels)
        noise = torch.from_numpy(rng.standard_normal(x0.shape, np.float32)).to(self.device)
        even = torch.from_numpy((rng.permutation(len(x0)) + rng.random(len(x0))) / len(x0))
        t = shift_time(even, SHIFT).float().to(self.device)
        at = t.view(-1, 1, 1, 1, 1)
        tracks, drives, ids = (part.to(self.device) for part in told_controls(films.tracks, films.drives, o, rng))
        with precision(o.bf16, self.device):
            output = self.model((1 - at) * x0 + at * noise, t, captions, tracks, drives, ids)
        return (output - (noise - x0)).square().mean()


def told_controls(
    tracks: torch.Tensor, drives: torch.Tensor, options: FilmOptions, rng: np.random.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What of tracks (B, F, 2) and drives (B, F) is told, nan for the rest, and random numbers (B, 1) of the tracks."""
    from fewstep.models.tracks import TRACK_IDS

    batch, frames = drives.shape
    untold = rng.random((batch, -(-frames // CHUNK))) < options.mask_chunks
    untold[:, 0] = False
    untold |= rng.random((batch, 1)) < options.drop_tracks
    by_frame = torch.from_numpy(untold.repeat(CHUNK, 1)[:, :frames]).to(tracks.device)
    silent = torch.from_numpy(rng.random((batch, 1)) < options.drop_drives).to(drives.device)
    ids = torch.from_numpy(rng.integers(TRACK_IDS, size=(batch, 1)))
    nothing = float("nan")
    return tracks.masked_fill(by_frame[..., None], nothing), drives.masked_fill(silent, nothing), ids
