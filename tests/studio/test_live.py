"""A film that follows a pointer: chunks, events, and the page in a real browser with a tiny random student."""

from __future__ import annotations

import json
import shutil
import sys
import threading
import time
import urllib.error
import urllib.request
from base64 import b64decode
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("fastapi", reason="the extra `studio` is not installed")

from fastapi import FastAPI

import fewstep
from fewstep.attention import Layout
from fewstep.core import grids
from fewstep.errors import FewstepError
from fewstep.serving.server import bind, make_server
from fewstep.streaming.student import CausalStudent
from fewstep.studio.desk import Desk
from fewstep.studio.live import Live, Told
from fewstep.studio.live_routes import live_routes

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))

import tiny_flows  # noqa: E402

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def causal(folder: Path, source: Any, frames: int) -> CausalStudent:
    """A random student of chunks of 3."""
    source().save_pretrained(folder)
    backbone = fewstep.load_teacher(folder, num_frames=frames).backbone
    layout, grid = Layout(3, sink=1, window=1), {2: grids.shifted(2, 5.0)}
    return CausalStudent(backbone, backbone.network, grid, {}, 0.0, layout, backbone.causal(backbone.network))


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> CausalStudent:
    return causal(tmp_path_factory.mktemp("films"), tiny_flows.film, 6)


class OneStudent(Desk):
    """A desk with a student in memory, and what it was told to do."""

    def __init__(self, student: CausalStudent) -> None:
        super().__init__(dict, None)
        self.student = student

    def streamers(self) -> list[str]:
        return ["tiny"]

    def streamer(self, student: str) -> CausalStudent:
        if student != "tiny":
            raise FewstepError(f"found no student {student!r}")
        return self.student


def test_a_chunk_goes_from_where_the_pointer_was_to_where_it_is(
    student: CausalStudent, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    controls = student.backbone.controls

    def listening(tracks: Any, drives: Any) -> Any:
        asked.append((tracks, drives))
        return controls(tracks, drives)

    monkeypatch.setattr(student.backbone, "controls", listening)
    live = Live(student, "a frog", 0, nullcontext())
    asked.clear()
    film = live.chunks(0.0)
    width, height = student.backbone.size["width"], student.backbone.size["height"]
    for number, told in enumerate((Told(), Told(0.5, 0.25, at=11.0), Told(0.8, 0.25, loud=0.7, at=12.0))):
        live.tell(Told(**{**vars(told), "shown": number}))
        made = next(film)
        assert made is not None
        assert (made.number, made.at) == (number, told.at)
        assert made.frames.shape == (3, 3, height, width)
        assert made.frames.dtype == torch.uint8
        assert next(film) is None  # no further than it has been shown
    (nowhere, silent), (still, _), (moving, loud) = asked
    assert nowhere.isnan().all()
    assert silent.isnan().all()
    assert torch.equal(still, torch.tensor([[[0.5 * width, 0.25 * height]] * 3]))
    torch.testing.assert_close(moving[0, :, 0], width * torch.tensor([0.6, 0.7, 0.8]))
    assert torch.equal(loud, torch.full((1, 3), 0.7))
    live.tell(Told(at=13.0, shown=9, paused=True))
    assert next(film) is None
    live.tell(Told(at=12.5, shown=9))  # told before, and late
    assert next(film) is None
    live.tell(Told(at=14.0, shown=9))
    resumed = next(film)
    assert resumed is not None
    assert resumed.number == 3  # the film goes on
    live.stop()
    assert list(film) == []


def test_a_student_that_reads_no_tracks_is_refused(tmp_path: Path) -> None:
    plain = causal(tmp_path, tiny_flows.wan, 9)
    with pytest.raises(FewstepError, match="found tracks or drives for Wan"):
        Live(plain, "a frog", 0, nullcontext())


@pytest.fixture(scope="module")
def address(student: CausalStudent) -> Iterator[str]:
    """Of a live server with the page and nothing else."""
    app = FastAPI()
    live_routes(app, OneStudent(student))
    server, bound = make_server(app, grace=1), bind("127.0.0.1", 0)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    yield f"http://127.0.0.1:{bound.getsockname()[1]}"
    server.should_exit = True
    thread.join(60)
    assert not thread.is_alive()


def events(url: str) -> Iterator[tuple[str, Any]]:
    with urllib.request.urlopen(url, timeout=120) as answer:
        name = ""
        for line in map(bytes.decode, answer):
            if line.startswith("event: "):
                name = line.removeprefix("event: ").strip()
            elif line.startswith("data: "):
                yield name, json.loads(line.removeprefix("data: "))


def tell(address: str, **told: Any) -> int:
    asked = urllib.request.Request(
        f"{address}/live/pointer", json.dumps(told).encode(), {"content-type": "application/json"}
    )
    try:
        with urllib.request.urlopen(asked, timeout=120) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def test_events_are_the_film(address: str, student: CausalStudent) -> None:
    film = events(f"{address}/live/film?film=a&student=tiny&prompt=a+frog&seed=3")
    plain = student.stream("a frog", 3)
    for number in range(2):
        name, made = next(film)
        assert (name, made["number"]) == ("chunk", number)
        frames = torch.stack([torch.tensor(list(b64decode(frame))) for frame in made["frames"]]).byte()
        expected = student.backbone.decode(next(plain))[0].permute(0, 2, 3, 1)
        assert torch.equal(frames.view(expected.shape), expected)
        assert tell(address, film="a", shown=number + 1) == 204
    assert tell(address, film="another", shown=9) == 410
    assert tell(address, film="a", x=2.0) == 422
    second = events(f"{address}/live/film?film=b&student=tiny&prompt=a+frog")
    assert next(second)[1]["number"] == 0
    assert [name for name, _ in film] in (["chunk"], [])  # the first has ended, perhaps with one that was under way
    assert tell(address, film="a", shown=9) == 410
    assert [*events(f"{address}/live/film?film=c&student=none&prompt=a")] == [
        ("problem", {"message": "found no student 'none'"})
    ]
    second.close()  # type: ignore[attr-defined]


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_in_a_browser_the_film_follows_the_mouse(address: str, student: CausalStudent) -> None:
    """Drawn on, paused, resumed; frames a second and latency are shown; nothing is asked of other machines."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install 'fewstep[dev]'")
    with api.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 900, "height": 700})
        page.set_default_timeout(120_000)
        wrong: list[str] = []
        told: list[Any] = []
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)

        def asked(request: Any) -> None:
            if not request.url.startswith((address, "data:")):
                wrong.append(request.url)
            if request.url.endswith("/live/pointer"):
                told.append(json.loads(request.post_data))

        page.on("request", asked)
        page.goto(f"{address}/live")
        page.wait_for_selector("#student option", state="attached")
        page.click("#start")
        page.wait_for_function("shown >= 2")
        box = page.locator("#stage").bounding_box()
        page.mouse.move(box["x"] + 0.25 * box["width"], box["y"] + 0.5 * box["height"])
        page.mouse.down()
        page.mouse.move(box["x"] + 0.75 * box["width"], box["y"] + 0.5 * box["height"], steps=5)
        page.mouse.up()
        page.wait_for_function(f"shown >= {told[-1]['shown'] + 3}")
        assert told[-1]["x"] == pytest.approx(0.75, abs=0.01)
        assert told[-1]["y"] == pytest.approx(0.5, abs=0.01)
        drawn = "[...document.getElementById('film').getContext('2d').getImageData(0, 0, 16, 16).data]"
        size = student.backbone.size
        assert page.evaluate("[document.getElementById('film').width, document.getElementById('film').height]") == [
            size["width"], size["height"],
        ]  # fmt: skip
        assert len(set(page.evaluate(drawn))) > 2
        assert float(page.text_content("#fps")) > 0
        assert page.text_content("#latency").endswith(" ms")
        page.click("#pause")
        still, number = page.evaluate(drawn), page.evaluate("shown")
        page.wait_for_timeout(400)
        assert (page.evaluate(drawn), page.evaluate("shown")) == (still, number)
        page.click("#pause")
        page.wait_for_function(f"shown >= {number + 2}")
        page.click("#release")
        page.wait_for_function(f"shown >= {number + 4}")
        assert told[-1]["x"] is None
        browser.close()
    assert wrong == []
