"""Students of videos behind the same API: films inline and by URL, their formats and speed, what is refused."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any
from urllib.request import urlopen

import openai
import pytest
import schemathesis
import torch
from hypothesis import HealthCheck, given, seed, settings
from live_server import SIZE, Serve, ask, draw  # type: ignore[import-not-found]
from PIL import Image
from schemathesis import GenerationMode
from torch import Tensor

from fewstep.evaluation import clips
from fewstep.evaluation.clips import has_films, moving_bytes

FRAMES = 5
PATH = "/v1/images/generations"


def play(prompts: Sequence[str], seeds: Sequence[int], steps: int) -> list[Tensor]:
    """(F, 3, H, W) each: the colour of `draw`, darker from frame to frame."""
    dim = torch.linspace(1, 0.5, FRAMES).view(-1, 1, 1, 1)
    return [(dim * picture).byte() for picture in draw(prompts, seeds, steps)]


@pytest.fixture(scope="module")
def url(serve: Serve) -> str:
    return serve(play, frames=FRAMES)


def asked(url: str, **fields: Any) -> tuple[bytes, dict[str, Any]]:
    """The first film of an answer, and the answer."""
    status, answer, _ = ask(url, {"prompt": "a frog", "seed": 3, "response_format": "b64_json", **fields})
    assert status == 200, answer
    return base64.b64decode(answer["data"][0]["b64_json"]), answer


@pytest.mark.parametrize("form", ["webp", "gif"])
def test_animations_of_every_frame_at_the_speed_that_is_asked(url: str, form: str) -> None:
    content, answer = asked(url, output_format=form, fps=10)
    assert (answer["output_format"], answer["size"], answer["frames"], answer["fps"]) == (form, "24x16", FRAMES, 10)
    with Image.open(io.BytesIO(content)) as film:
        assert (film.format, film.size, film.n_frames) == (form.upper(), SIZE, FRAMES)
        film.seek(2)
        film.load()
        assert film.info["duration"] == 100
    assert asked(url, output_format=form, fps=10)[0] == content
    assert content == moving_bytes(play(["a frog"], [3], 4)[0], form, 10)


@pytest.mark.skipif(not has_films(), reason="needs the extra video")
def test_films_are_mp4_unless_told_and_their_url_says_so(url: str) -> None:
    import imageio.v3 as imageio

    content, answer = asked(url)
    assert (answer["output_format"], answer["fps"]) == ("mp4", 8)
    assert imageio.imread(content, plugin="FFMPEG", extension=".mp4").shape == (FRAMES, SIZE[1], SIZE[0], 3)
    assert asked(url)[0] == content
    linked = ask(url, {"prompt": "a frog", "seed": 3})[1]["data"][0]["url"]
    fetched = urlopen(linked, timeout=30)
    assert (fetched.headers["Content-Type"], fetched.read()) == ("video/mp4", content)


def test_the_official_client_gets_films(url: str) -> None:
    api = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=30)
    made = api.images.generate(prompt="a frog", n=2, output_format="webp", extra_body={"seed": 1, "fps": 24})
    assert made.data is not None
    assert urlopen(str(made.data[1].url), timeout=30).headers["Content-Type"] == "image/webp"
    card = api.models.retrieve("tiny").model_dump()
    assert card["frames"] == FRAMES
    assert {"webp", "gif"} <= set(card["output_formats"])


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"output_format": "png"}, "output_format"),
        ({"output_format": "jpeg"}, "output_format"),
        ({"output_format": "avi"}, "output_format"),
        ({"fps": 0}, "fps"),
        ({"fps": 61}, "fps"),
        ({"fps": 12.5}, "fps"),
        ({"fps": "24"}, "fps"),
        ({"frames": 9}, "frames"),
    ],
)
def test_what_a_film_cannot_be_is_refused(url: str, change: dict[str, Any], param: str) -> None:
    status, answer, _ = ask(url, {"prompt": "x", **change})
    assert (status, answer["error"]["param"]) == (400, param)


def test_students_of_pictures_have_no_films(serve: Serve) -> None:
    url = serve()
    for change in ({"output_format": "mp4"}, {"output_format": "gif"}, {"fps": 16}):
        status, answer, _ = ask(url, {"prompt": "x", **change})
        assert (status, answer["error"]["param"]) == (400, next(iter(change)))


def test_without_the_extra_films_are_webp(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clips, "find_spec", lambda name: None)
    url = serve(play, frames=FRAMES)
    assert asked(url)[1]["output_format"] == "webp"
    assert ask(url, {"prompt": "x", "output_format": "mp4"})[0] == 400


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
def test_the_server_keeps_to_its_own_document(url: str, mode: GenerationMode) -> None:
    """No 500, only documented statuses, types and bodies; what the document allows is taken, and no more."""
    document = schemathesis.openapi.from_url(f"{url}/openapi.json")

    @seed(0)
    @settings(max_examples=15, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(case=document[PATH]["POST"].as_strategy(generation_mode=mode))
    def fuzz(case: Any) -> None:
        case.call_and_validate(timeout=30)

    fuzz()
