"""The HTML: what is shown, that pictures are in it, and that nothing from files or users is more than text."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from fewstep.studio.desk import Drawing
from fewstep.studio.pages import ago, gallery, overview, pair, settings, text
from fewstep.studio.runs import RunsFolder


def pictures(html: str) -> list[Image.Image]:
    """The pictures within a page."""
    found = re.findall(r'src="data:image/\w+;base64,([^"]+)"', html)
    assert html.count("<img") == len(found)  # none is fetched from anywhere
    return [Image.open(io.BytesIO(base64.b64decode(data))) for data in found]


def drawing(value: int, steps: int, calls: int, seconds: float, frames: int = 0) -> Drawing:
    shape = (frames, 3, 8, 16) if frames else (3, 8, 16)
    return Drawing(torch.full(shape, value, dtype=torch.uint8), steps, calls, seconds)


def test_text_does_nothing() -> None:
    assert text("<script>'x'</script>") == "&lt;script&gt;&#x27;x&#x27;&lt;/script&gt;"
    assert not set(text("${1+1} {{this}} `x`")) & set("${}`")


def test_student_and_teacher_side_by_side() -> None:
    html = pair(drawing(10, 4, 4, 0.5), drawing(200, 50, 100, 12.4), "waiting")
    student, teacher = pictures(html)
    assert (student.size, student.getpixel((0, 0)), teacher.getpixel((0, 0))) == ((16, 8), (10,) * 3, (200,) * 3)
    assert re.findall(r"<span>([^<]+)</span>", html) == [
        "4 steps", "4 network calls", "0.50 s", "50 steps", "100 network calls", "12 s",
    ]  # fmt: skip
    assert "25 times fewer network calls than its teacher, 24.8 times faster here" in html
    assert "waiting" not in html


def test_alone_and_waiting() -> None:
    html = pair(drawing(10, 1, 1, 0.5), None, "press <Draw>")
    assert len(pictures(html)) == 1
    assert "1 step<" in html
    assert "1 network call<" in html
    assert "press &lt;Draw&gt;" in html
    assert "fewer" not in html
    slow = pair(drawing(1, 4, 4, 2.0), drawing(1, 4, 8, 1.0), "")
    assert "2 times fewer" in slow
    assert "faster" not in slow


def test_a_video_moves() -> None:
    html = pair(
        Drawing(torch.arange(3, dtype=torch.uint8)[:, None, None, None].expand(3, 3, 8, 8) * 80, 4, 4, 1), None, ""
    )
    assert pictures(html)[0].n_frames == 3


def test_a_card_for_every_run(folder: Path) -> None:
    html = gallery(RunsFolder(folder), "going")
    assert set(re.findall(r'data-run="([^"]+)" aria-pressed="(\w+)"', html)) == {
        ("done", "false"), ("going", "true"), ("phased/phase-1", "false"),
    }  # fmt: skip
    assert len(pictures(html)) == 3
    assert "iteration 20 of 20, finished" in html
    assert "iteration 30 of 100, last line" in html
    assert "<b>dmd2" not in html
    assert "&lt;b&gt;dmd2" in html


def test_no_runs(tmp_path: Path) -> None:
    assert "No runs in" in gallery(RunsFolder(tmp_path / "nowhere"), "")


def test_curves_samples_and_alarms_of_a_run(folder: Path) -> None:
    html = overview(RunsFolder(folder), "going", every_curve=False)
    assert html.count('<svg class="curve"') == 1
    assert [picture.size for picture in pictures(html)] == [(64, 32)] * 3
    assert [int(found) for found in re.findall(r"<figcaption>iteration (\d+), 4 steps", html)] == [30, 10, 20]
    found = "critic-lag at iteration 30: found metric/student/critic_lag = 1.5, healthy is at most 1.2"
    assert f"{found}; raise critic_updates" in html
    assert overview(RunsFolder(folder), "going", every_curve=True).count('<svg class="curve"') == 2


def test_a_log_that_grows_is_read_again(folder: Path) -> None:
    runs = RunsFolder(folder)
    before = overview(runs, "done", every_curve=False)
    with (folder / "done" / "log.jsonl").open("a") as log:
        log.write('{"iteration": 21, "loss/critic": 1.0}\n')
    assert before.count("<svg") == 1
    assert overview(runs, "done", every_curve=False).count("<svg") == 2


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("run.json", "{", "found an unreadable run.json"),
        ("log.jsonl", "nonsense\n", "iteration 0 of 20"),
        ("samples/000020-4-steps.png", "no picture", "a picture that cannot be read"),
    ],
)
def test_what_cannot_be_read_says_so(folder: Path, file: str, content: str, message: str) -> None:
    (folder / "done" / file).write_text(content)
    assert message in overview(RunsFolder(folder), "done", every_curve=False)
    assert "done" in gallery(RunsFolder(folder), "")


def test_a_run_without_a_log_and_one_that_is_gone(folder: Path) -> None:
    (folder / "done" / "log.jsonl").unlink()
    assert "No log yet" in overview(RunsFolder(folder), "done", every_curve=False)
    assert "found no run &#x27;../secret&#x27;" in overview(RunsFolder(folder), "../secret", every_curve=False)


def test_settings_are_text(folder: Path) -> None:
    runs = RunsFolder(folder)
    assert "&lt;b&gt;dmd2&lt;/b&gt;" in settings(runs.run("going"))


@pytest.mark.parametrize(
    ("seconds", "words"), [(-1, "0 s"), (5, "5 s"), (119, "119 s"), (300, "5 min"), (9e4, "25 h"), (3e5, "3 days")]
)
def test_time_spans(seconds: float, words: str) -> None:
    assert ago(seconds) == words
