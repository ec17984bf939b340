"""The report in a real browser: nothing is fetched, text stays text, keys work, votes are kept, saved and counted.

Needs playwright (of the extra `dev`) and a Chromium on this machine; skipped with the reason where one is missing.
"""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fewstep.evaluation.page import Candidate, write_page
from fewstep.evaluation.preferences import percent, preferences, read_votes

api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install 'fewstep[dev]'")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")

NAMES = ["teacher, 50 steps", "student, 4 steps", "student <b>1</b> step"]
HOSTILE = "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'>"
COUNT = 60


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    colours = np.zeros((len(NAMES), COUNT, 3, 8, 8), dtype=np.uint8)
    for candidate in range(len(NAMES)):
        for prompt in range(COUNT):
            colours[candidate, prompt] = np.array([80 * candidate, 4 * prompt, 255]).reshape(3, 1, 1)
    given = [Candidate(name, torch.from_numpy(c), 4, 0.1) for name, c in zip(NAMES, colours, strict=True)]
    prompts = [HOSTILE, *(f"prompt number {i}" for i in range(1, COUNT))]
    return write_page(
        tmp_path_factory.mktemp("page") / "compare.html", title=HOSTILE, subtitle="s", candidates=given,
        prompts=prompts, seeds=list(range(COUNT)), runs={}, histograms={}, value_labels={}, settings={}, notes=[],
    )  # fmt: skip


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with api.sync_playwright() as started:
        found = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def page(browser: Any, report: Path) -> Iterator[Any]:
    """A phone's screen with the report on it; anything that the page complains of, or asks the network for, fails."""
    context = browser.new_context(viewport={"width": 360, "height": 740}, accept_downloads=True)
    context.set_default_timeout(120_000)
    opened = context.new_page()
    wrong: list[str] = []
    opened.on("pageerror", lambda error: wrong.append(str(error)))
    opened.on("console", lambda message: wrong.append(message.text))
    opened.on("request", lambda r: wrong.append(r.url) if not r.url.startswith(("file:", "data:", "blob:")) else None)
    opened.goto(report.as_uri())
    yield opened
    context.close()
    assert wrong == []


def colour(page: Any, selector: str) -> list[int]:
    """What an image shows."""
    return page.locator(selector).evaluate(
        "async (image) => { await image.decode(); const pen = document.createElement('canvas').getContext('2d');"
        "pen.drawImage(image, 0, 0); return [...pen.getImageData(1, 1, 1, 1).data] }"
    )[:3]


def shown_prompts(page: Any) -> list[str]:
    return page.locator("#grid h3 span").all_text_contents()


def test_the_grid_has_leaves_a_search_and_the_right_pictures(page: Any) -> None:
    assert shown_prompts(page) == [HOSTILE, *(f"prompt number {i}" for i in range(1, 24))]
    assert page.locator("h1").text_content() == HOSTILE
    assert page.evaluate("window.hacked") is None
    page.get_by_role("button", name="Next ›").click()
    assert shown_prompts(page)[0] == "prompt number 24"
    assert colour(page, '#grid [data-row="30"][data-column="2"] img') == [160, 120, 255]
    assert (
        page.locator('#grid [data-row="30"][data-column="2"] img').get_attribute("alt")
        == f"{NAMES[2]}: prompt number 30"
    )
    page.fill("#find", "number 59")
    assert shown_prompts(page) == ["prompt number 59"]
    page.fill("#find", "nobody")
    assert "No prompt has these words" in page.locator("#grid").text_content()
    page.fill("#find", "")
    page.locator("details.choose summary").first.click()
    page.get_by_label(NAMES[0]).first.uncheck()
    assert page.locator("#grid article").first.locator("img").count() == 2


def test_a_picture_is_enlarged_and_keys_go_on(page: Any) -> None:
    page.locator('#grid [data-row="23"][data-column="0"]').click()
    zoom = page.locator("dialog.zoom")
    assert NAMES[0] in zoom.text_content()
    assert page.locator("dialog.zoom img").bounding_box()["height"] > 250
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    assert colour(page, "dialog.zoom img") == [80, 96, 255]
    assert "prompt number 24 (seed 24)" in zoom.text_content()
    page.keyboard.press("Escape")
    focused = page.evaluate("[document.activeElement.dataset.row, document.activeElement.dataset.column]")
    assert focused == ["24", "1"]
    assert shown_prompts(page)[0] == "prompt number 24"


def test_the_slider_divides_two_candidates_and_zooms(page: Any) -> None:
    page.locator('#grid [data-row="5"][data-column="2"]').click()
    page.get_by_role("button", name="Slider").click()
    assert page.locator("#pair-text").text_content() == "prompt number 5 seed 5"
    left, right = "#stage .layer:nth-child(1) img", "#stage .layer:nth-child(2) img"
    assert (colour(page, left), colour(page, right)) == ([0, 20, 255], [160, 20, 255])
    clip = "getComputedStyle(document.querySelectorAll('.layer')[1]).clipPath"
    assert page.evaluate(clip) == "inset(0px 0px 0px 50%)"
    page.focus("#stage")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")
    assert page.evaluate(clip) == "inset(0px 0px 0px 40%)"
    box = page.locator("#stage").bounding_box()
    page.mouse.move(box["x"] + 0.5 * box["width"], box["y"] + 20)
    page.mouse.down()
    page.mouse.move(box["x"] + 0.75 * box["width"], box["y"] + 20)
    page.mouse.up()
    assert page.evaluate(clip) == "inset(0px 0px 0px 75%)"
    page.keyboard.press("+")
    assert page.locator("#zoomed").text_content() == "2×"
    scales = "layers.map((layer) => new DOMMatrix(getComputedStyle(layer.querySelector('img')).transform).a)"
    assert page.evaluate(scales) == [2, 2]
    page.keyboard.press("PageDown")
    assert page.locator("#pair-text").text_content() == "prompt number 6 seed 6"
    page.select_option("#layout", "beside")
    boxes = [page.locator(f"#stage .layer:nth-child({n})").bounding_box() for n in (1, 2)]
    assert boxes[0]["x"] + boxes[0]["width"] <= boxes[1]["x"]
    assert not page.locator("#divider").is_visible()


def test_films_under_the_slider_begin_together(browser: Any, tmp_path: Path) -> None:
    """Also where one of them was chosen later: both are decoded anew, and show the same frame."""
    shades = torch.linspace(0, 250, 40).byte().view(40, 1, 1, 1).expand(1, 40, 3, 16, 16)
    given = [Candidate(name, shades, 4, 0.1, fps=5) for name in ("a", "b", "c")]
    told: dict[str, Any] = {"runs": {}, "histograms": {}, "value_labels": {}, "settings": {}, "notes": []}
    path = write_page(
        tmp_path / "films.html", title="t", subtitle="s", candidates=given, prompts=["x"], seeds=[0], **told
    )
    page = browser.new_page(viewport={"width": 900, "height": 900})
    page.set_default_timeout(120_000)
    page.goto(f"{path.as_uri()}#pair")
    page.wait_for_timeout(1500)
    page.select_option("#right", "1")
    sources = page.locator("#stage .layer img").evaluate_all("(images) => images.map((image) => image.src)")
    assert [source.rpartition("#")[2] for source in sources] == [sources[0].rpartition("#")[2]] * 2
    assert sources[0].rpartition("#")[2].isdecimal()
    page.wait_for_timeout(1500)
    seen = Image.open(io.BytesIO(page.locator("#stage").screenshot())).convert("L")
    left, right = (seen.getpixel((round(share * seen.width), seen.height // 2)) for share in (0.25, 0.75))
    assert abs(left - right) <= 13  # at most two of forty shades apart, 0.4 seconds
    page.close()


def test_votes_are_blind_kept_saved_and_counted_alike(page: Any, report: Path, tmp_path: Path) -> None:
    page.get_by_role("link", name="Blind test").click()
    visible = page.locator("#blind").inner_text()
    sources = page.locator("#duel img").evaluate_all("images => images.map((image) => image.alt + image.title)")
    assert not any(name in visible or name in "".join(sources) for name in NAMES)
    for key in ("ArrowLeft", "ArrowDown", "ArrowRight", "ArrowLeft", "Backspace", "ArrowLeft"):
        page.keyboard.press(key)
    page.get_by_role("button", name="Left", exact=False).last.click()
    assert page.locator("#count").text_content() == "5 votes"
    page.fill("#voter", "Ann, <b>")
    page.keyboard.press("ArrowLeft")  # typing a name is no vote
    page.locator("#voter").blur()
    page.keyboard.press("ArrowLeft")
    with page.expect_download() as download:
        page.get_by_role("button", name="Save votes").click()
    download.value.save_as(tmp_path / "votes.json")
    votes = read_votes([tmp_path / "votes.json"])
    assert len(votes) == 6
    assert {vote.voter for vote in votes} >= {"Ann, <b>"}

    page.reload()
    page.locator("#result summary").click()
    body = page.locator("#result .scores").first.locator("tbody tr")
    rows = body.evaluate_all("rows => rows.map((row) => [...row.cells].map((cell) => cell.textContent))")
    expected = [
        [p.a, percent(p.share), *map(str, (p.wins, p.equal, p.losses, p.prompts))] for p in preferences(votes)[0]
    ]
    assert sorted(rows) == sorted(expected)

    page.on("dialog", lambda dialog: dialog.accept())
    page.get_by_role("button", name="Delete votes").click()
    assert page.locator("#count").text_content() == "0 votes"
    page.set_input_files("#load", tmp_path / "votes.json")
    page.get_by_text("6 votes read from votes.json.").wait_for()
    other = tmp_path / "other.json"
    other.write_text(json.dumps(json.loads((tmp_path / "votes.json").read_text()) | {"page": "another"}))
    page.set_input_files("#load", other)
    page.get_by_text("other.json was not read: votes on other candidates.").wait_for()
    assert page.evaluate("window.hacked") is None


def test_two_thousand_prompts_cost_no_more_elements_than_few(browser: Any, tmp_path: Path) -> None:
    """What is in the document is a leaf; pictures of the last one are right, and so is what a search finds."""
    count = 2000
    number = np.arange(count)
    colours = np.zeros((2, count, 3, 4, 4), dtype=np.uint8)
    colours[:, :, 0], colours[:, :, 1] = (part[None, :, None, None] for part in (number % 256, number // 256))
    colours[1, :, 2] = 255
    given = [Candidate(name, torch.from_numpy(c), 4, 0.1) for name, c in zip("ab", colours, strict=True)]
    path = write_page(
        tmp_path / "many.html", title="many", subtitle="s", candidates=given, prompts=[f"prompt {i}" for i in number],
        seeds=list(range(count)), runs={}, histograms={}, value_labels={}, settings={}, notes=[],
    )  # fmt: skip
    context = browser.new_context()
    context.set_default_timeout(120_000)
    opened = context.new_page()
    opened.goto(path.as_uri())
    opened.get_by_role("button", name="Last").click()
    assert shown_prompts(opened) == [f"prompt {i}" for i in range(1992, 2000)]
    assert colour(opened, '#grid [data-row="1999"][data-column="1"] img') == [1999 % 256, 1999 // 256, 255]
    opened.fill("#find", "prompt 1234")
    assert shown_prompts(opened) == ["prompt 1234"]
    assert colour(opened, '#grid [data-row="1234"][data-column="0"] img') == [1234 % 256, 1234 // 256, 0]
    opened.fill("#find", "")
    assert opened.locator("#grid img").count() == 2 * 24
    assert opened.evaluate("blocks.size") <= 6
    context.close()


def test_it_fits_a_phone_and_has_two_palettes(page: Any) -> None:
    for view in ("report", "pair", "blind"):
        page.evaluate(f"location.hash = '{view}'")
        page.locator(f"#{view}").wait_for()
        assert page.evaluate("document.documentElement.scrollWidth") == 360
    paper = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(paper)
    page.emulate_media(color_scheme="dark")
    dark = page.evaluate(paper)
    assert dark != light
    page.locator("#theme").click()
    assert page.evaluate(paper) == light
    page.locator("#theme").click()
    page.emulate_media(color_scheme="light")
    assert page.evaluate(paper) == dark
    page.reload()
    assert page.evaluate(paper) == dark


def test_pictures_that_are_still_on_their_way_come_later(browser: Any, report: Path, tmp_path: Path) -> None:
    """The page works before its end has been read."""
    html = report.read_text()
    cut = html.index('<script type="text/plain" id="block-0"')
    context = browser.new_context()
    opened = context.new_page()
    opened.goto("about:blank")
    opened.evaluate("(html) => { document.open(); document.write(html); }", html[:cut])
    opened.locator("#grid article").first.wait_for()
    assert opened.locator("#grid img[src]").count() == 0
    opened.evaluate("(html) => { document.write(html); document.close(); }", html[cut:])
    opened.locator('#grid [data-row="3"][data-column="1"] img[src]').wait_for()
    assert colour(opened, '#grid [data-row="3"][data-column="1"] img') == [80, 12, 255]
    context.close()
