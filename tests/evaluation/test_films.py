"""The measures are exact on rendered films with known values, and tell what is broken in broken ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fewstep.data.film_paths import MOTIONS, draw_path
from fewstep.data.films import FILM_THINGS, FilmBatch, FilmCaption, draw_films, render_films
from fewstep.errors import FewstepError
from fewstep.evaluation.film_motion import name_motion
from fewstep.evaluation.film_reading import Reading, read_films
from fewstep.evaluation.films import (
    centroid_error,
    drift,
    drive_correlation,
    flicker,
    motion_amplitude,
    name_attributes,
    quick_amplitude,
    score_films,
)
from fewstep.models.videos import video_pixels


@pytest.fixture(scope="module")
def films() -> FilmBatch:
    """One singing film of each thing, all motions twice."""
    captions = [FilmCaption(thing, thing % len(MOTIONS), 1) for thing in range(len(FILM_THINGS))]
    return draw_films(range(len(captions)), seed=1, captions=captions)


@pytest.fixture(scope="module")
def pixels(films: FilmBatch) -> torch.Tensor:
    return video_pixels(films.pixels)


@pytest.fixture(scope="module")
def reading(pixels: torch.Tensor) -> Reading:
    return read_films(pixels)


def test_every_thing_is_found_to_a_fraction_of_a_pixel(films: FilmBatch, reading: Reading) -> None:
    things = torch.from_numpy(films.attributes[:, 0])
    assert (reading.things == things[:, None]).all()
    assert (reading.centres - films.tracks).norm(dim=2).max() < 0.1
    sides = 13 + 3.25 * films.drives
    assert (reading.sides - sides).abs().mean() < 0.05
    assert reading.fit.mean() > 0.9


def test_rendered_films_score_their_known_values(films: FilmBatch, pixels: torch.Tensor, reading: Reading) -> None:
    assert centroid_error(reading, films.tracks).max() < 0.05
    true = films.tracks.diff(dim=1).norm(dim=2).mean(1)
    torch.testing.assert_close(motion_amplitude(reading), true, rtol=0, atol=0.02)
    assert drive_correlation(reading, films.drives).min() > 0.99
    assert flicker(pixels, reading).max() < 0.1
    away = drift(pixels, reading)
    assert (away.thing == 1).all()
    assert away.background.max() < 0.8  # of 255: rounding, and the softest edges of things
    assert away.colour.mean() < 1.5
    assert (name_attributes(reading) == films.attributes).mean(0).min() > 0.9


def test_a_shifted_track_is_off_by_the_shift(films: FilmBatch, reading: Reading) -> None:
    error = centroid_error(reading, films.tracks + torch.tensor([3.0, 4.0]))
    torch.testing.assert_close(error, torch.full((20,), 5.0), rtol=0, atol=0.05)


def test_shuffled_frames_leave_the_track_and_move_more(films: FilmBatch, pixels: torch.Tensor) -> None:
    order = torch.from_numpy(np.random.default_rng(0).permutation(24))
    moving = [i for i, a in enumerate(films.attributes) if MOTIONS[a[1]] != "stays"]
    shuffled, tracks = read_films(pixels[moving][:, order]), films.tracks[moving]
    assert centroid_error(shuffled, tracks).min() > 1.5
    true = tracks.diff(dim=1).norm(dim=2).mean(1)
    assert (motion_amplitude(shuffled) > 2 * true).all()
    assert drive_correlation(shuffled, films.drives[moving]).abs().mean() < 0.4


def test_a_frozen_film_neither_moves_nor_follows(films: FilmBatch, pixels: torch.Tensor) -> None:
    frozen = pixels[:, :1].expand_as(pixels)
    reading = read_films(frozen)
    assert motion_amplitude(reading).max() == 0
    assert drive_correlation(reading, films.drives).abs().max() == 0
    assert flicker(frozen, reading).max() == 0
    assert set(name_attributes(reading)[:, 1]) == {MOTIONS.index("stays")}


def test_a_changed_background_is_measured_in_levels(films: FilmBatch) -> None:
    half = films.pixels.clone()
    half[:, :, 12:] -= 20 / 127.5  # the whole frame, thing and all, is 20 levels darker
    pixels = video_pixels(half)
    away = drift(pixels, read_films(pixels))
    torch.testing.assert_close(away.background[:, 12:].mean(1), torch.full((20,), 20.0), rtol=0, atol=0.5)
    assert away.background[:, :12].max() < 0.8
    assert (away.curve("background")[3] < 1) and (away.curve("background")[4] > 19)  # noqa: PT018
    assert away.colour[:, 12:].mean() > 10


def test_another_thing_halfway_is_a_lost_identity(films: FilmBatch) -> None:
    things = torch.from_numpy(films.attributes[:, 0])
    other = render_films((things + 7) % 20, films.tracks, films.drives, films.backgrounds)
    half = torch.cat([films.pixels[:, :, :18], other[:, :, 18:]], 2)
    pixels = video_pixels(half)
    away = drift(pixels, read_films(pixels))
    assert away.thing[:, :18].mean() == 1
    assert away.thing[:, 18:].mean() == 0
    assert score_films(pixels, films.captions).thing == pytest.approx(0.75)
    wrong = score_films(video_pixels(other), films.captions)
    assert wrong.thing == 0
    assert wrong.same_thing == 1


def test_flicker_is_of_the_background_alone(films: FilmBatch, reading: Reading) -> None:
    noise = torch.from_numpy(np.random.default_rng(0).choice([-4.0, 4.0], (20, 1, 24, 1, 1))).float() / 127.5
    flickering = video_pixels((films.pixels + noise).clamp(-1, 1))
    assert 4 < flicker(flickering, reading).mean() < 16  # second differences of +-4 levels
    assert flicker(flickering, reading).mean() > 50 * flicker(video_pixels(films.pixels), reading).mean()


def test_silent_drives_do_not_correlate(reading: Reading) -> None:
    assert (drive_correlation(reading, torch.zeros(20, 24)) == 0).all()


def test_the_quick_amplitude_agrees_and_has_a_gradient(films: FilmBatch) -> None:
    chosen = films.pixels[:8].clone().requires_grad_()
    quick = quick_amplitude(chosen.transpose(1, 2))
    true = films.tracks[:8].diff(dim=1).norm(dim=2).mean(1)
    assert np.corrcoef(quick.detach(), true)[0, 1] > 0.95
    (gradient,) = torch.autograd.grad(quick.sum(), chosen)
    assert gradient.abs().sum() > 0


def test_motions_are_named_under_noise() -> None:
    rng = np.random.default_rng(0)
    hits = np.zeros(len(MOTIONS))
    for i, motion in enumerate(MOTIONS):
        for _ in range(30):
            path = draw_path(motion, 24, rng) + rng.normal(0, 0.1, (24, 2))
            hits[i] += name_motion(path) == i
    assert hits.min() / 30 >= 0.7  # wandering may look like another
    assert hits.sum() / 300 > 0.95


def test_scores_without_statements_and_other_shapes(films: FilmBatch, pixels: torch.Tensor) -> None:
    scores = score_films(pixels[:2], [FilmCaption(0), FilmCaption(1)])
    assert np.isnan(scores.motion)
    assert scores.error is None
    assert len(scores.curves["thing"]) == 8
    with pytest.raises(FewstepError, match="expected uint8"):
        read_films(films.pixels)
