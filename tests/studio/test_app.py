"""The page behind a live server, asked over HTTP by gradio's own client; and the command that starts it."""

from __future__ import annotations

import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("gradio", reason="the extra `studio` is not installed")

from gradio_client import Client
from gradio_client.exceptions import AppError

from fewstep import cli
from fewstep.errors import FewstepError
from fewstep.serving import server as server_module
from fewstep.serving.server import bind, make_server
from fewstep.studio.app import build_app
from fewstep.studio.desk import Desk, Drawing, Steps
from fewstep.studio.runs import RunsFolder

HERE = ("127.0.0.1", "::1", "localhost", None)


class Painter(Desk):
    """A desk without networks: pictures of one colour."""

    def __init__(self, known: dict[str, Steps]) -> None:
        super().__init__(lambda: {name: Path(name) for name in known}, "a-teacher")
        self.known = known

    def steps(self, student: str) -> Steps:
        if student == "broken":
            raise FewstepError("found an unreadable card")
        return self.known[student]

    def by_student(self, student: str, prompt: str, seed: int, steps: int) -> Drawing:
        self.steps(student)
        if prompt == "fail":
            raise RuntimeError("out of memory")
        if not prompt:
            raise FewstepError("found no prompt")
        return Drawing(torch.full((3, 4, 4), steps, dtype=torch.uint8), steps, steps, 0.1)

    def by_teacher(self, student: str | None, prompt: str, seed: int) -> Drawing:
        return Drawing(torch.zeros(3, 4, 4, dtype=torch.uint8), 50, 100, 2.0)

    def teacher_before(self, student: str | None, prompt: str, seed: int) -> Drawing | None:
        return None


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """serve(desk, runs) -> the address of a live studio; the test fails if it looks up or connects to others."""
    running: list[tuple[Any, threading.Thread]] = []
    outside: list[Any] = []
    connect, find = socket.socket.connect, socket.getaddrinfo

    def note(host: Any) -> None:
        if host not in HERE and threading.current_thread() is not threading.main_thread():  # where the client is
            outside.append(host)

    def connecting(self: socket.socket, address: Any) -> None:
        note(address[0] if isinstance(address, tuple) else None)
        connect(self, address)

    def finding(host: Any, *more: Any, **told: Any) -> Any:
        note(host)
        return find(host, *more, **told)

    monkeypatch.setattr(socket.socket, "connect", connecting)
    monkeypatch.setattr(socket, "getaddrinfo", finding)

    def start(desk: Desk, runs: Path) -> str:
        server, bound = make_server(build_app(desk, RunsFolder(runs), 60), grace=1), bind("127.0.0.1", 0)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
        thread.start()
        running.append((server, thread))
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        return f"http://127.0.0.1:{bound.getsockname()[1]}"

    yield start
    for server, thread in running:
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive()
    assert outside == []


def client(url: str) -> Client:
    return Client(url, verbose=False, analytics_enabled=False)


def status(url: str, data: bytes | None = None) -> int:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data), timeout=60) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def test_a_session(serve: Any, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Draws, watches runs, is told what goes wrong; nothing but answers is served."""
    known = {"aware": Steps((1, 2, 4), aware=True), "fixed": Steps((4,), aware=False)}
    url = serve(Painter(known), folder)
    asked = client(url)

    both = asked.predict("aware", "a frog", 0, 3, None, True, api_name="/draw")
    assert "2 network calls" in both  # the slider at 3, of 1, 2 and 4
    assert "100 network calls" in both
    assert "50 times fewer network calls" in both
    alone = asked.predict("aware", "a frog", 0, 4, None, False, api_name="/draw")
    assert alone.count("<img") == 1
    moved = asked.predict("aware", "a frog", 0, 1, None, True, api_name="/draw_student")
    assert "1 network call<" in moved
    assert "Press Draw for the teacher" in moved
    assert "4 network calls" in asked.predict("fixed", "a frog", 0, 1, 4, False, api_name="/draw_student")

    _, slider, choice, tick = asked.predict("fixed", api_name="/choose")
    assert (slider["visible"], choice["visible"], [value for _, value in choice["choices"]]) == (False, True, [4])
    assert tick["label"] == "Beside its teacher (a-teacher)"
    _, slider, choice, _ = asked.predict("aware", api_name="/choose")
    assert (slider["visible"], slider["maximum"], choice["visible"]) == (True, 4, False)

    for words, message in (
        (("", 0), "found no prompt"),
        (("a frog", -1), "found seed -1"),
        (("fail", 0), "out of memory"),
    ):
        with pytest.raises(AppError, match=message):
            asked.predict("aware", *words, 4, None, False, api_name="/draw_student")
    told = capfd.readouterr().err
    assert told.count("Traceback") == 1  # of what nobody foresaw
    assert "RuntimeError: out of memory" in told

    assert 'data-run="going"' in asked.predict("", api_name="/runs")
    assert "critic-lag at iteration 30" in asked.predict("going", False, api_name="/run")
    assert "found no run" in asked.predict("../secret", False, api_name="/run")
    with pytest.raises(AppError, match="found no run"):
        asked.predict("../secret", api_name="/settings")
    assert asked.predict("", False, api_name="/run") == ""

    picture = folder / "done" / "samples" / "000010-4-steps.png"
    for path in (picture, folder / "done" / "run.json", Path("/etc/passwd"), "../../etc/passwd", "pyproject.toml"):
        assert status(f"{url}/gradio_api/file={path}") == 404
        assert status(f"{url}/gradio_api/file/{path}") == 404
        assert status(f"{url}/static/..%2f..%2f{path}") in (403, 404)
    assert status(f"{url}/gradio_api/upload", b"x") == 404
    assert status(f"{url}/gradio_api/proxy=http://127.0.0.1:1/") == 404
    assert status(f"{url}/docs") == 404
    assert status(f"{url}/live") == status(f"{url}/live/students") == 200
    with urllib.request.urlopen(f"{url}/config", timeout=60) as answer:
        config = answer.read().decode()
    assert '"analytics_enabled":false' in config
    assert '"is_colab":false' in config


def test_without_students_and_runs_the_teacher_draws(serve: Any, tmp_path: Path) -> None:
    url = serve(Painter({}), tmp_path / "nowhere")
    html = client(url).predict(None, "a frog", 0, 1, None, True, api_name="/draw")
    assert html.count("<img") == 1
    assert "Teacher" in html


def test_a_student_that_cannot_be_read_is_told_when_it_is_to_draw(serve: Any, tmp_path: Path) -> None:
    asked = client(serve(Painter({"broken": Steps((4,), aware=False)}), tmp_path))
    with pytest.raises(AppError, match="unreadable card"):
        asked.predict("broken", "a frog", 0, 1, None, False, api_name="/draw_student")


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What `fewstep studio` would greet with; it does not serve."""
    told: list[str] = []

    def run(app: Any, bound: socket.socket, grace: float, greeting: str) -> None:
        bound.close()
        told.append(greeting)

    monkeypatch.setattr(server_module, "run", run)
    return told


@pytest.mark.parametrize(("host", "warned"), [("127.0.0.1", False), ("localhost", False), ("0.0.0.0", True)])
def test_the_command_warns_when_others_can_reach_it(
    host: str, warned: bool, started: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cli.main(["studio", "--runs", str(tmp_path), "--host", host, "--port", "0", "--device", "cpu"])
    assert f"http://{host}:" in started[0]
    assert ("can be reached from other machines" in capsys.readouterr().err) is warned


@pytest.mark.parametrize(
    ("words", "message"),
    [(["--refresh", "0"], "1 or more seconds"), (["--student", "nowhere"], "no student at nowhere")],
)
def test_the_command_refuses(
    words: list[str], message: str, started: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        cli.main(["studio", "--port", "0", "--device", "cpu", *words])
    assert message in capsys.readouterr().err
    assert started == []
