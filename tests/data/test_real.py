"""Real data and pairs: functions of the sample's number, encoded by the teacher's own parts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_pixart import PROMPTS

import fewstep
from fewstep.data.pairs import TeacherPairs
from fewstep.data.real import RealImages, RealScenes
from fewstep.data.scenes import held_out
from fewstep.errors import FewstepError


def test_scenes_are_encoded_so_that_they_decode_to_themselves_and_are_never_held_out() -> None:
    backbone = fewstep.load_teacher().backbone
    source = RealScenes(backbone)
    samples = torch.tensor([5, 100_003, 7])
    latents, condition = source(1, samples)
    again, _ = source(9, samples.flip(0))
    assert latents.shape == (3, *backbone.latent_shape)
    assert all(len(value) == 3 for value in condition.values())
    torch.testing.assert_close(again.flip(0), latents, rtol=1e-4, atol=1e-4)
    images = torch.stack([source.scene(int(n))[0] for n in samples])
    decoded = backbone.decode(latents).float() / 127.5 - 1
    assert (decoded - images).abs().mean() < 0.05
    assert not any(held_out(source.scene(n)[1]) for n in range(50))
    assert not torch.equal(source.scene(5)[0], RealScenes(backbone, seed=1).scene(5)[0])


def test_images_come_in_shuffled_passes_with_their_own_texts(tiny_teacher: Path) -> None:
    backbone = fewstep.load_teacher(tiny_teacher).backbone
    images = torch.arange(3, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 32, 32) * 100
    source = RealImages(backbone, images, PROMPTS)
    latents, condition = source(1, torch.arange(6))
    each = backbone.encode_images(images.float() / 127.5 - 1)
    nearest = torch.cdist(latents.flatten(1), each.flatten(1)).argmin(1)
    assert sorted(nearest[:3].tolist()) == sorted(nearest[3:].tolist()) == [0, 1, 2]
    for name, value in backbone.encode([PROMPTS[n] for n in nearest]).items():
        torch.testing.assert_close(condition[name], value)
    floats = RealImages(backbone, images.float() / 127.5 - 1, PROMPTS)
    torch.testing.assert_close(floats(1, torch.arange(6))[0], latents)


@pytest.mark.parametrize(
    ("images", "texts", "message"),
    [
        (torch.zeros(2, 3, 8, 8), ["a"], "1 texts"),
        (torch.zeros(0, 3, 8, 8), [], "0 texts"),
        (torch.zeros(1, 8, 8, 3), ["a"], "channels before height"),
        (torch.full((1, 3, 8, 8), 2.0), ["a"], r"beyond \[-1, 1\]"),
    ],
)
def test_images_that_cannot_be_right_are_refused(images: torch.Tensor, texts: list[str], message: str) -> None:
    with pytest.raises(FewstepError, match=message):
        RealImages(None, images, texts)


def test_pairs_are_the_teachers_own_samples_however_they_are_asked_for(tiny_teacher: Path) -> None:
    teacher = fewstep.load_teacher(tiny_teacher)
    samples = torch.tensor([3, 41, 20])
    first, second = (TeacherPairs(teacher, PROMPTS, 20, steps=2, guidance_scale=2.0) for _ in range(2))
    second(1, torch.tensor([7, 8]))  # another chunk first
    noise, made, condition = first(1, samples)
    for a, b in zip((noise, made), second(5, samples), strict=False):
        assert torch.equal(a, b)
    seed = next(n for n in range(20) if torch.equal(teacher.noise([n])[0], noise[0]))
    alone = teacher.latents([PROMPTS[seed % 3]], [seed], 2, guidance_scale=2.0)[0]
    torch.testing.assert_close(made[0], alone, rtol=1e-3, atol=1e-3 * float(alone.abs().max()))
    for name, value in teacher.encode([PROMPTS[seed % 3]]).items():
        assert torch.equal(condition[name][:1, : value.shape[1]], value)
