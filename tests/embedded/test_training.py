"""The embedded teacher's own training: parts, losses, resume."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from fewstep.data.scenes import COUNTS, draw_caption
from fewstep.embedded.autoencoder import LATENT_SHAPE, build_autoencoder
from fewstep.embedded.judge import Judge
from fewstep.embedded.teacher import (
    JITTERS,
    Latents,
    TeacherOptions,
    TeacherTraining,
    build_tokenizer,
    diffusion_loss,
    noise_schedule,
)
from fewstep.embedded.training import TOKENS, UNKNOWN_WORD, learning_rate


def test_every_caption_fits_the_vocabulary_and_the_length() -> None:
    tokenizer, rng = build_tokenizer(), np.random.default_rng(0)
    unknown = tokenizer.unk_token_id
    for _ in range(1000):
        ids = tokenizer(str(draw_caption(rng))).input_ids
        assert unknown not in ids
        assert len(ids) <= TOKENS
        assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer(UNKNOWN_WORD).input_ids[0] == unknown


def test_autoencoder_maps_pictures_to_latents_and_back() -> None:
    autoencoder = build_autoencoder()
    latents = autoencoder.encode(torch.zeros(2, 3, 64, 64)).latents
    assert latents.shape == (2, *LATENT_SHAPE)
    assert autoencoder.decode(latents).sample.shape == (2, 3, 64, 64)


def test_the_noise_schedule_is_diffusers_linear_one() -> None:
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear")
    torch.testing.assert_close(noise_schedule().float(), scheduler.alphas_cumprod, rtol=1e-4, atol=1e-7)


def test_the_loss_is_zero_at_the_truth_and_its_gradient_stays_apart() -> None:
    generator = torch.Generator().manual_seed(0)
    x0, noise = (torch.randn(6, 4, 5, 5, generator=generator) for _ in range(2))
    index = torch.tensor([0, 1, 50, 300, 700, 999])
    options = TeacherOptions(min_snr=5.0, velocity_cap=200.0)
    exact = torch.cat([noise, -torch.ones_like(noise)], 1)  # the noise, and the posterior's own log variance
    assert diffusion_loss(exact, x0, noise, index, options).abs().max() < 1e-5
    wrong = (torch.cat([noise + 0.3, 0.2 * torch.ones_like(noise)], 1)).requires_grad_()
    losses = diffusion_loss(wrong, x0, noise, index, options)
    bar = noise_schedule()[index]
    weight = torch.where(bar / (1 - bar) > 5, 5 * (1 - bar) / bar**2, (1 / bar).clamp(max=200)).float()
    assert (losses > 0.0899 * weight).all()  # the weighted noise error, plus a positive bound
    losses.sum().backward()
    predicted, mix = wrong.grad.chunk(2, 1)
    expected = 2 * 0.3 / 100 * weight
    torch.testing.assert_close(predicted.mean((1, 2, 3)), expected, rtol=1e-4, atol=0)  # the bound does not reach it
    assert (mix.abs().sum((1, 2, 3)) > 0).all()


def test_rate_rises_holds_and_falls() -> None:
    options = TeacherOptions(iterations=2000, rate=1.0, cooldown=0.25)
    rates = [learning_rate(i, options) for i in range(2000)]
    assert rates[0] == pytest.approx(1 / 200)
    assert rates[199] == rates[1499] == 1.0
    assert rates[1750] == pytest.approx(0.5, abs=0.01)
    assert 0 < rates[-1] < 0.01


@pytest.fixture(scope="module")
def latents() -> Latents:
    generator = torch.Generator().manual_seed(0)
    return Latents(torch.randn(*COUNTS.values(), JITTERS, *LATENT_SHAPE, generator=generator).half())


def test_latents_agree_with_their_captions(latents: Latents) -> None:
    marked = Latents(torch.arange(120.0).view(120, 1, 1, 1, 1, 1, 1, 1).expand(latents.latents.shape).half())
    drawn, captions = marked.draw(50, np.random.default_rng(0))
    from fewstep.data.things import THINGS

    for latent, caption in zip(drawn, captions, strict=True):
        assert list(THINGS)[int(latent[0, 0, 0])] in caption


def test_training_resumes_to_the_bit(latents: Latents, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    options = TeacherOptions(iterations=4, batch=4)
    straight = TeacherTraining(latents, options)
    for _ in range(4):
        straight.step()
    first = TeacherTraining(latents, options)
    first.step()
    first.step()
    first.save(tmp_path / "state.safetensors")
    second = TeacherTraining(latents, options)
    second.load(tmp_path / "state.safetensors")
    for _ in range(2):
        second.step()
    assert second.iteration == 4
    for name, value in straight.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[name]), name
        assert torch.equal(straight.average[name], second.average[name]), name


def test_judge_round_trip(tmp_path: Path) -> None:
    judge = Judge().eval()
    judge.save(tmp_path / "judge.safetensors")
    images = torch.rand(3, 3, 64, 64) * 2 - 1
    loaded = Judge.load(tmp_path / "judge.safetensors")
    torch.testing.assert_close(loaded.features(images), judge.features(images), rtol=0.02, atol=0.02)
    assert loaded.attributes(images).shape == (3, 4)
