"""Numbers and features of single films: they are what `score_films` averages, and tell films from worse ones."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fewstep.data.films import FILM_THINGS, FilmCaption, draw_films
from fewstep.evaluation.film_numbers import film_features, film_numbers
from fewstep.evaluation.film_reading import Reading, read_films
from fewstep.evaluation.films import score_films
from fewstep.evaluation.metrics import frechet_distance
from fewstep.evaluation.quality import measure
from fewstep.models.videos import video_pixels

COUNT = 24


@pytest.fixture(scope="module")
def films() -> tuple[torch.Tensor, list[FilmCaption], Reading]:
    drawn = draw_films(range(COUNT), seed=3, frames=12)
    pixels = video_pixels(drawn.pixels)
    return pixels, drawn.captions, read_films(pixels)


def test_means_are_the_scores_and_captions_decide(films: tuple[torch.Tensor, list[FilmCaption], Reading]) -> None:
    pixels, captions, reading = films
    found, scores = film_numbers(pixels, captions, reading), score_films(pixels, captions)
    for name, wanted in (
        ("thing", scores.thing), ("fit", scores.fit), ("identity", scores.same_thing), ("speed", scores.amplitude),
        ("flicker/background", scores.flicker), ("drift/colour", scores.colour_drift),
        ("drift/background", scores.background_drift),
    ):  # fmt: skip
        assert found[name].shape == (COUNT,)
        assert float(found[name].mean()) == pytest.approx(wanted, rel=1e-5)
    assert float(found["following"].mean()) > 0.8
    other = [replace(caption, thing=(caption.thing + 1) % len(FILM_THINGS)) for caption in captions]
    assert not film_numbers(pixels, other, reading)["following"].any()
    ground = [replace(c, background=None if c.background is None else (c.background + 1) % 6) for c in captions]
    told = torch.tensor([caption.background is not None for caption in captions])
    changed = film_numbers(pixels, ground, reading)["following"]
    assert not changed[told].any()
    assert torch.equal(changed[~told], found["following"][~told])


def test_features_tell_films_that_move_otherwise(films: tuple[torch.Tensor, list[FilmCaption], Reading]) -> None:
    pixels, _, reading = films
    own = film_features(pixels, reading)
    assert own.shape == (COUNT, 18)
    assert bool(own.isfinite().all())
    half = frechet_distance(own[::2], own[1::2])
    frozen = pixels[:, :1].expand_as(pixels).contiguous()
    assert frechet_distance(own, film_features(frozen, read_films(frozen))) > 0.05
    assert half < 3
    assert frechet_distance(own, own) == pytest.approx(0, abs=1e-9)


def test_each_film_meets_its_own_caption(films: tuple[torch.Tensor, list[FilmCaption], Reading]) -> None:
    """Also in batches, of which the last is smaller."""
    pixels, captions, reading = films
    some = pixels[:5]
    found = measure(some.split(2), list(map(str, captions[:5])), {}, {}, films=captions[:5])
    assert found.features["films"].shape == (5, 1, 18)
    wanted = film_numbers(pixels, captions, reading)
    for name in ("following", "thing", "drift/background"):
        torch.testing.assert_close(found.numbers[name], wanted[name][:5])
