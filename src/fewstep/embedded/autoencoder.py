"""The embedded teacher's autoencoder: 64x64 RGB <-> 16x16x4, a small diffusers `AutoencoderTiny`."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from fewstep.data.scenes import SIDE, Scenes
from fewstep.embedded.training import load_state, precision, save_state

if TYPE_CHECKING:
    from diffusers import AutoencoderTiny

LATENT_SHAPE = (4, 16, 16)
LATENT_NOISE = 0.1
"""Standard deviation of the noise added to latents in training, in units of their own; makes the decoder forgiving."""

CROP = 32
"""Side of the crops it is trained on, in pixels: four times as many for the same cost."""

Draw = Callable[[int, np.random.Generator], torch.Tensor]
"""(count, generator) -> images (count, 3, H, W) in [-1, 1]."""


def build_autoencoder(channels: int = 32, latent_channels: int = LATENT_SHAPE[0]) -> AutoencoderTiny:
    """An untrained autoencoder; factor 4 in each direction, about 0.3 M parameters."""
    from diffusers import AutoencoderTiny

    return AutoencoderTiny(
        encoder_block_out_channels=(channels,) * 3,
        decoder_block_out_channels=(channels,) * 3,
        num_encoder_blocks=(1, 1, 2),
        num_decoder_blocks=(3, 3, 1),
        latent_channels=latent_channels,
        scaling_factor=1.0,
    )


def autoencoder_loss(autoencoder: AutoencoderTiny, images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Mean square + half mean absolute error of the reconstruction from noised latents. images (B, 3, H, W), [-1, 1].

    A weak pull keeps the latents at mean 0 and standard deviation 1, so that they need no scaling factor.
    """
    latents = autoencoder.encoder(images)
    noise = torch.randn(latents.shape, generator=generator).to(latents)
    error = autoencoder.decoder(latents + LATENT_NOISE * noise) - images
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    pull = mean.square().mean() + (std - 1).square().mean()
    return error.square().mean() + 0.5 * error.abs().mean() + 0.05 * pull


def scene_crops() -> Draw:
    """Crops of scenes, at one place for all of a batch."""
    scenes = Scenes()

    def draw(count: int, rng: np.random.Generator) -> torch.Tensor:
        images, _, _ = scenes.draw(count, rng)
        top, left = rng.integers(0, SIDE - CROP + 1, 2)
        return images[:, :, top : top + CROP, left : left + CROP]

    return draw


def train_autoencoder(
    iterations: int,
    report: Callable[[int, float], None],
    *,
    start: AutoencoderTiny | None = None,
    draw: Draw | None = None,
    batch: int = 64,
    rate: float = 2e-3,
    seed: int = 0,
    bf16: bool = False,
    device: str = "cpu",
    state: Path | None = None,
    save_seconds: float = 300.0,
) -> AutoencoderTiny:
    """Train from nothing, or from `start`; `report(iteration, loss)` is called every 100 iterations and at the end.

    Trains on what `draw` gives, on crops of scenes unless told. With a file `state` it is resumable to the bit: the
    training continues from what is there, and writes there every `save_seconds`.
    """
    torch.manual_seed(seed)
    autoencoder = start or build_autoencoder()
    autoencoder = autoencoder.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimiser = torch.optim.AdamW(autoencoder.parameters(), lr=rate, betas=(0.9, 0.99), weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, iterations, pct_start=0.1)
    done, draw, saved = 0, draw or scene_crops(), time.monotonic()
    if state is not None and state.exists():
        done, _ = load_state(state, autoencoder, [optimiser], device)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, iterations, pct_start=0.1, last_epoch=done - 1)
    for iteration in range(done + 1, iterations + 1):
        rng = np.random.default_rng([seed, iteration])  # of an iteration alone, so that nothing of it has to be kept
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        images = draw(batch, rng)
        images = images.to(device, memory_format=torch.channels_last)
        with precision(bf16, device):
            loss = autoencoder_loss(autoencoder, images, generator)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(autoencoder.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        if iteration % 100 == 0 or iteration == iterations:
            report(iteration, loss.item())
        if state is not None and time.monotonic() - saved > save_seconds:
            save_state(state, autoencoder, [optimiser], iteration)
            saved = time.monotonic()
    return autoencoder.cpu()
