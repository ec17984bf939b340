"""Films are functions of (seed, index), agree with their captions, and their tracks and drives are what is drawn."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fewstep.data.film_paths import MARGIN, MOTIONS, SIDE, draw_drive, draw_path
from fewstep.data.films import (
    FILM_BACKGROUNDS,
    FILM_COUNTS,
    FILM_THINGS,
    LOUD,
    QUIET,
    FilmCaption,
    draw_film_caption,
    draw_films,
    draw_things,
    film_sprites,
    render_films,
)
from fewstep.data.scenes import held_out
from fewstep.data.things import BACKGROUNDS

FROG = FILM_THINGS.index("frog")


@pytest.mark.parametrize(
    ("caption", "text"),
    [
        (FilmCaption(FROG), "a frog"),
        (FilmCaption(FROG, 6, None, 3), "a frog hops to the right on a green background"),
        (FilmCaption(FROG, 9, 1), "a singing frog wanders"),
        (FilmCaption(FILM_THINGS.index("octopus"), voice=0, background=4), "a silent octopus on a blue background"),
        (FilmCaption(FILM_THINGS.index("octopus"), 8), "an octopus circles"),
    ],
)
def test_captions_read_as_plain_words(caption: FilmCaption, text: str) -> None:
    assert str(caption) == text


def test_a_film_depends_on_seed_and_index_alone() -> None:
    together, alone = draw_films([3, 8, 5], seed=4), draw_films([8], seed=4)
    assert together.captions[1] == alone.captions[0]
    assert torch.equal(together.pixels[1], alone.pixels[0])
    assert torch.equal(together.tracks[1], alone.tracks[0])
    others = draw_films([8], seed=5).pixels, draw_films([8], seed=4, for_evaluation=True).pixels
    assert not any(torch.equal(alone.pixels, other) for other in others)


def test_longer_films_begin_as_shorter_ones() -> None:
    captions = [FilmCaption(FROG, motion, 1) for motion in range(len(MOTIONS))]
    short, long = (draw_films(range(10), frames=frames, captions=captions) for frames in (9, 60))
    torch.testing.assert_close(long.tracks[:, :9], short.tracks)
    torch.testing.assert_close(long.drives[:, :9], short.drives)
    torch.testing.assert_close(long.pixels[:, :, :9], short.pixels)


def test_shapes_ranges_and_what_is_never_there() -> None:
    films = draw_films(range(6), frames=12)
    assert films.pixels.shape == (6, 3, 12, 32, 32)
    assert films.tracks.shape == (6, 12, 2)
    assert films.drives.shape == (6, 12)
    assert films.pixels.abs().max() <= 1 + 1e-5
    silent = torch.from_numpy(films.attributes[:, 2] == 0)
    assert (films.drives[silent] == 0).all()
    assert (films.drives[~silent].amax(1) > 0.1).all()


def test_open_attributes_are_uniform_and_stated_ones_hold() -> None:
    films = draw_films(range(600), frames=1, captions=[FilmCaption(FROG, voice=1)] * 600)
    assert set(films.attributes[:, 0]) == {FROG}
    assert set(films.attributes[:, 2]) == {1}
    for column, name in ((1, "motion"), (3, "background")):
        shares = np.bincount(films.attributes[:, column], minlength=FILM_COUNTS[name]) / 600
        np.testing.assert_allclose(shares, 1 / FILM_COUNTS[name], atol=0.05)


def test_held_out_captions_are_never_trained_on() -> None:
    rng = np.random.default_rng(0)
    assert not any(held_out(str(draw_film_caption(rng))) for _ in range(500))
    assert all(held_out(str(draw_film_caption(rng, for_evaluation=True))) for _ in range(100))


@pytest.mark.parametrize("motion", MOTIONS)
def test_paths_stay_inside_and_move_as_described(motion: str) -> None:
    rng = np.random.default_rng(1)
    for _ in range(20):
        path = draw_path(motion, 300, rng)
        assert path.shape == (300, 2)
        assert path.min() >= MARGIN - 1e-9
        assert path.max() <= SIDE - MARGIN + 1e-9
        step = np.diff(path[:8], axis=0)
        forward = {"left": -step[:, 0], "right": step[:, 0], "up": -step[:, 1], "down": step[:, 1]}
        word = motion.split()[-1]
        if word in forward:
            assert (forward[word] > 0.3).all()
        elif motion == "stays":
            assert (path == path[0]).all()
        else:
            assert np.ptp(path, axis=0).max() > 5


def test_a_drive_has_loud_and_quiet_frames() -> None:
    drive = draw_drive(2000, np.random.default_rng(0))
    assert 0 <= drive.min() < 0.01
    assert 0.8 < drive.max() <= 1
    assert 0.2 < drive.mean() < 0.5
    assert np.corrcoef(drive[:-1], drive[1:])[0, 1] > 0.5  # smooth, and yet
    assert abs(np.corrcoef(drive[:-12], drive[12:])[0, 1]) < 0.2  # not a beat


def test_things_are_drawn_where_and_as_large_as_told() -> None:
    things = torch.arange(len(FILM_THINGS))
    centre, shifted = torch.tensor([[16.0, 16.0]]).expand(20, 2), torch.tensor([[13.5, 20.25]]).expand(20, 2)
    across = (torch.arange(SIDE) + 0.5).view(1, 1, SIDE)

    def mass(centres: torch.Tensor, side: float) -> tuple[torch.Tensor, torch.Tensor]:
        opacity = draw_things(things, centres, torch.full((20,), side))[:, 3]
        total = opacity.sum((1, 2))
        x, y = ((opacity * axis).sum((1, 2)) / total for axis in (across, across.mT))
        return total, torch.stack([x, y], 1)

    quiet, at = mass(centre, QUIET)
    loud, _ = mass(centre, LOUD)
    _, moved = mass(shifted, QUIET)
    torch.testing.assert_close(loud / quiet, torch.full((20,), (LOUD / QUIET) ** 2), rtol=2e-3, atol=0)
    torch.testing.assert_close(moved - at, shifted - centre, rtol=0, atol=5e-3)
    expected = film_sprites()[:, 3].mean((1, 2)) * QUIET**2
    torch.testing.assert_close(quiet, expected, rtol=5e-3, atol=0)


def test_the_background_is_the_films_without_their_things_and_near_its_colour() -> None:
    films = draw_films(range(4), frames=3)
    far = (films.tracks - 4).norm(dim=2) > 18  # the upper left corner is uncovered
    corner = films.pixels[:, :, :, :3, :3].transpose(1, 2)
    told = films.backgrounds[:, None, :, :3, :3].expand_as(corner)
    assert far.any()
    torch.testing.assert_close(corner[far], told[far])
    colours = torch.tensor([BACKGROUNDS[FILM_BACKGROUNDS[i]] for i in films.attributes[:, 3]])
    torch.testing.assert_close((films.backgrounds.mean((2, 3)) + 1) * 127.5, colours.float(), rtol=0, atol=14)


def test_films_follow_drawn_paths() -> None:
    track = torch.stack([torch.linspace(8, 24, 5), torch.linspace(24, 8, 5)], 1)[None]
    background = torch.zeros(1, 3, SIDE, SIDE)
    film = render_films(torch.tensor([FILM_THINGS.index("heart")]), track, torch.zeros(1, 5), background)
    weight = film.abs().sum(1)[0]
    across = torch.arange(SIDE) + 0.5
    x = (weight.sum(1) * across).sum(1) / weight.sum((1, 2))
    torch.testing.assert_close(x.diff(), torch.full((4,), 4.0), rtol=0, atol=0.02)
