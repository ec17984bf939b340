"""The data set is what its documentation says: uniform where captions are silent, right where they speak."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fewstep.data.scenes import ATTRIBUTES, COUNTS, Caption, Scenes, draw_caption, held_out
from fewstep.data.things import BACKGROUNDS, PLACEMENTS, STYLES, THINGS

FROG = list(THINGS).index("frog")


@pytest.fixture(scope="module")
def scenes() -> Scenes:
    return Scenes()


@pytest.mark.parametrize(
    ("caption", "text"),
    [
        (Caption(FROG), "a frog"),
        (Caption(FROG, style=1, background=6), "a 3d frog on a blue background"),
        (Caption(FROG, placement=0), "a big frog"),
        (Caption(FROG, style=0, placement=1), "a small flat frog on the left"),
        (Caption(FROG, small=True), "a small frog"),
        (Caption(list(THINGS).index("octopus")), "an octopus"),
        (Caption(list(THINGS).index("unicorn")), "a unicorn"),
        (Caption(list(THINGS).index("fries"), background=0), "some fries on a white background"),
    ],
)
def test_captions_read_as_plain_words(caption: Caption, text: str) -> None:
    assert str(caption) == text


def test_open_attributes_are_uniform_and_stated_ones_hold(scenes: Scenes) -> None:
    rng = np.random.default_rng(0)
    count = 4000
    caption = Caption(FROG, style=1)
    _, _, attributes = scenes.draw(count, rng, [caption] * count)
    assert set(attributes[:, 0]) == {FROG}
    assert set(attributes[:, 1]) == {1}
    for column, name in ((2, "background"), (3, "placement")):
        shares = np.bincount(attributes[:, column], minlength=COUNTS[name]) / count
        np.testing.assert_allclose(shares, 1 / COUNTS[name], atol=0.03)


def test_small_leaves_only_the_side_open(scenes: Scenes) -> None:
    rng = np.random.default_rng(0)
    _, _, attributes = scenes.draw(600, rng, [Caption(FROG, small=True)] * 600)
    assert set(attributes[:, 3]) == {1, 2, 3}


def test_held_out_captions_are_one_in_eight_and_never_drawn_for_training() -> None:
    rng = np.random.default_rng(0)
    training = {str(draw_caption(rng)) for _ in range(2000)}
    evaluation = {str(draw_caption(rng, for_evaluation=True)) for _ in range(500)}
    assert not any(held_out(text) for text in training)
    assert all(held_out(text) for text in evaluation)
    everything = {
        str(Caption(t, s, b, p))
        for t in range(COUNTS["thing"])
        for s in (None, 0, 1)
        for b in (None, 0, 5)
        for p in (None, 0, 1)
    }
    assert abs(sum(held_out(text) for text in everything) / len(everything) - 1 / 8) < 0.03


def test_pictures_show_the_stated_background_and_side(scenes: Scenes) -> None:
    rng = np.random.default_rng(0)
    blue = list(BACKGROUNDS).index("blue")
    left, right = list(PLACEMENTS).index("left"), list(PLACEMENTS).index("right")
    images = scenes.render(np.array([[FROG, 0, blue, left], [FROG, 0, blue, right]]), rng)
    assert images.shape == (2, 3, 64, 64)
    assert images.abs().max() <= 1
    corner = (images[:, :, 0, 0] + 1) * 127.5
    torch.testing.assert_close(corner, torch.tensor([BACKGROUNDS["blue"]] * 2).float(), rtol=0, atol=10.5)
    ink = (images - images[:, :, :1, :1]).abs().sum(1).gt(0.1).float()
    centre = (ink * torch.arange(64.0)).sum((1, 2)) / ink.sum((1, 2))
    assert centre[0] < 26
    assert centre[1] > 38


def test_every_sprite_is_drawn(scenes: Scenes) -> None:
    opacity = scenes.canvases[..., 3].reshape(len(THINGS) * len(STYLES), len(PLACEMENTS), -1).mean(-1) / 255
    assert scenes.canvases.shape[:3] == (120, 2, 4)
    assert opacity.min() > 0.06
    things = scenes.canvases[:, :, 0].reshape(240, -1).astype(np.float32)
    assert len(np.unique(things, axis=0)) == 240


def test_attributes_are_in_the_order_of_counts() -> None:
    assert tuple(COUNTS) == ATTRIBUTES
