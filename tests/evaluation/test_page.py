"""The report page: everything handed in is there, nothing else is, and hostile text stays text."""

from __future__ import annotations

import base64
import hashlib
import io
import math
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from fewstep.errors import FewstepError
from fewstep.evaluation.page import Candidate, write_grid, write_page

HOSTILE = (
    """</script><script>alert(1)</script><img src=x onerror='alert(2)'> "quoted" & 'single' &amp; \u202e</style>"""
)
VOID = {"meta", "link", "img", "br"}


@dataclass
class Element:
    """A node of the parsed page; `text` is everything inside it, entities decoded."""

    tag: str
    attributes: dict[str, str | None]
    text: str = ""
    children: list[Element] = field(default_factory=list)

    def all(self, tag: str, css_class: str | None = None) -> list[Element]:
        found = [self] if self.tag == tag and css_class in (None, *(self.attributes.get("class") or "").split()) else []
        return found + [hit for child in self.children for hit in child.all(tag, css_class)]

    def one(self, tag: str, css_class: str | None = None) -> Element:
        (element,) = self.all(tag, css_class)
        return element

    def section(self, name: str) -> Element:
        (found,) = [s for s in self.all("section") if s.attributes.get("id") == name]
        return found


class Tree(HTMLParser):
    """Builds Elements and insists that every tag is closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.stack = [Element("root", {})]
        self.feed(html)
        self.close()
        assert len(self.stack) == 1, [e.tag for e in self.stack]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = Element(tag, dict(attrs))
        self.stack[-1].children.append(element)
        if tag not in VOID:
            self.stack.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.stack[-1].children.append(Element(tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop().tag == tag

    def handle_data(self, data: str) -> None:
        for element in self.stack:
            element.text += data


def parse(path: Path) -> Element:
    return Tree(path.read_text(encoding="utf-8")).stack[0]


def pictures(count: int, seed: int, side: int = 16) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (count, 3, side, side), dtype=np.uint8))


def candidates(count: int, side: int = 16) -> list[Candidate]:
    return [
        Candidate("teacher, 50 steps", pictures(count, 0, side), 100, 2.0, {"frechet": 1.25, "recall": 0.5}),
        Candidate("student, 4 steps", pictures(count, 1, side), 4, 0.05, {"frechet": 2.5, "recall": 0.75}),
        Candidate("student, 1 step", pictures(count, 2, side), 1, None, None),
    ]


def page(path: Path, **changes: Any) -> Path:
    """A page of two prompts, with every argument replaceable."""
    prompts = changes.get("prompts", ["a frog", "a red apple"])
    arguments: dict[str, Any] = {
        "title": "Title",
        "subtitle": "Subtitle",
        "candidates": candidates(len(prompts)),
        "prompts": prompts,
        "seeds": list(range(100, 100 + len(prompts))),
        "curves": None,
        "histograms": None,
        "value_labels": {},
        "settings": {},
        "notes": [],
    }
    return write_page(path / "page.html", **(arguments | changes))


def cells(row: Element) -> list[str]:
    return [cell.text for cell in row.children]


@pytest.mark.parametrize("count", [1, 12, 200])
def test_every_prompt_seed_and_candidate_has_its_place(tmp_path: Path, count: int) -> None:
    prompts = [f"prompt number {i}" for i in range(count)]
    table = parse(page(tmp_path, prompts=prompts)).section("pictures").one("table")
    head = cells(table.one("thead").children[0])
    assert head == ["prompt", "teacher, 50 steps100 calls", "student, 4 steps4 calls", "student, 1 step1 call"]
    rows = table.one("tbody").children
    assert [row.children[0].one("span").text for row in rows] == prompts
    assert [row.children[0].one("small").text for row in rows] == [f"seed {100 + i}" for i in range(count)]
    assert [len(row.all("img")) for row in rows] == [3] * count
    assert ["late" in (row.attributes.get("class") or "") for row in rows] == [i >= 24 for i in range(count)]


def test_a_page_of_few_prompts_has_no_button_to_show_more(tmp_path: Path) -> None:
    assert not parse(page(tmp_path)).all("button", "more")
    assert len(parse(page(tmp_path, prompts=["x"] * 25)).all("button", "more")) == 1


def test_pictures_decode_to_the_very_pixels(tmp_path: Path) -> None:
    given = candidates(3)
    table = parse(page(tmp_path, prompts=["a", "b", "c"], candidates=given)).section("pictures")
    for i, row in enumerate(table.one("tbody").children):
        for candidate, image in zip(given, row.all("img"), strict=True):
            kind, _, data = (image.attributes["src"] or "").partition(",")
            assert kind == "data:image/webp;base64"
            decoded = np.array(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB"))
            torch.testing.assert_close(torch.from_numpy(decoded).permute(2, 0, 1), candidate.images[i], rtol=0, atol=0)
            assert (image.attributes["width"], image.attributes["height"]) == ("16", "16")


def test_nothing_is_loaded_from_outside(tmp_path: Path) -> None:
    path = page(tmp_path, prompts=["see http://example.org/x.png"], notes=["https://example.org"])
    root = parse(path)

    def loads(element: Element) -> list[str]:
        names = ("src", "href", "srcset", "action", "data", "poster", "xlink:href")
        own = [element.attributes[name] or "" for name in names if name in element.attributes]
        return own + [hit for child in element.children for hit in loads(child)]

    assert loads(root)
    assert all(target.startswith("data:") for target in loads(root))
    style = "".join(s.text for s in root.all("style"))
    assert "url(" not in style
    assert "@import" not in style
    policies = [m.attributes["content"] or "" for m in root.all("meta") if "http-equiv" in m.attributes]
    digest = base64.b64encode(hashlib.sha256(root.one("script").text.encode()).digest()).decode()
    assert policies == [f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"]


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    one = Candidate(HOSTILE, pictures(1, 0), 4, 0.1, {HOSTILE: 0.5})
    arguments: dict[str, Any] = {
        "title": HOSTILE,
        "subtitle": HOSTILE,
        "candidates": [Candidate("teacher", pictures(1, 1), 8, 0.1, None), one],
        "prompts": [HOSTILE],
        "histograms": {HOSTILE: {HOSTILE: [0.25, 0.75]}},
        "value_labels": {HOSTILE: [HOSTILE, "b"]},
        "settings": {HOSTILE: {HOSTILE: HOSTILE}},
        "notes": [HOSTILE],
        "command": HOSTILE,
    }
    root = parse(page(tmp_path, **arguments))
    assert len(root.all("script")) == len(root.all("style")) == len(root.all("link")) == 1
    assert len(root.all("img")) == 3  # two pictures and the empty one of the dialog

    def handlers(element: Element) -> list[str]:
        own = [name for name in element.attributes if name.startswith("on")]
        return own + [hit for child in element.children for hit in handlers(child)]

    assert handlers(root) == []
    assert root.one("title").text == root.one("h1").text == HOSTILE
    assert root.one("p", "subtitle").text == HOSTILE
    assert root.section("pictures").one("tbody").one("span").text == HOSTILE
    assert root.section("variety").one("h3").text == root.section("variety").one("figcaption").text == HOSTILE
    assert cells(root.section("reproduce").one("table").one("tr")) == [f"{HOSTILE}.{HOSTILE}", HOSTILE]
    assert root.section("reproduce").one("code").text == root.section("notes").one("p").text == HOSTILE
    assert HOSTILE in root.section("scores").one("thead").text


def test_a_lone_surrogate_does_not_stop_the_page(tmp_path: Path) -> None:
    assert "broken ? prompt" in parse(page(tmp_path, prompts=["broken \ud800 prompt"])).section("pictures").text


def test_scores_are_marked_and_missing_ones_are_dashes(tmp_path: Path) -> None:
    given = [
        Candidate("a", pictures(1, 0), 100, 2.0, {"frechet": 1.25, "recall": 0.5, "oddness": 7.0, "mmd": 0.0003}),
        Candidate("b", pictures(1, 1), 4, 0.05, {"frechet": 31.5, "recall": 0.75, "oddness": 9.0}),
        Candidate("c", pictures(1, 2), 1, math.nan, {"frechet": math.nan, "recall": math.inf}),
        Candidate("d", pictures(1, 3), 1, None, None),
    ]
    table = parse(page(tmp_path, prompts=["x"], candidates=given)).section("scores").one("table")
    assert cells(table.one("thead").children[0]) == [
        *("sampler", "calls", "per picture"),
        *("Fréchet distance\xa0↓", "recall\xa0↑", "oddness\xa0", "mmd\xa0↓"),
    ]
    rows = table.one("tbody").children
    assert cells(rows[0]) == ["a", "100", "2 s", "1.25", "0.500", "7.00", "0.000300"]
    assert cells(rows[1]) == ["b", "4", "50 ms", "31.50", "0.750", "9.00", "—"]
    assert cells(rows[2]) == ["c", "1", "—", "—", "—", "—", "—"]
    assert cells(rows[3]) == ["d", "1", "—", "—", "—", "—", "—"]
    # The best of a column needs a known direction and a rival.
    assert [[cell.text for cell in row.all("td", "best")] for row in rows] == [["1.25"], ["0.750"], [], []]


def test_the_headline_compares_the_two_that_are_named(tmp_path: Path) -> None:
    root = parse(page(tmp_path, headline=("teacher, 50 steps", "student, 4 steps")))
    tiles = [cells(tile) for tile in root.one("div", "tiles").children]
    assert tiles == [
        ["25×", "fewer network calls", "4 instead of 100"],
        ["40×", "less time", "50 ms instead of 2 s per picture"],
        ["2.50", "Fréchet distance ↓", "teacher, 50 steps: 1.25"],
        ["0.750", "recall ↑", "teacher, 50 steps: 0.500"],
    ]
    assert [row.children[0].text for row in root.section("scores").all("tr", "chosen")] == ["student, 4 steps"]


def test_the_headline_by_default_goes_from_most_calls_to_the_last(tmp_path: Path) -> None:
    tiles = parse(page(tmp_path)).one("div", "tiles").children
    assert [cells(tile) for tile in tiles] == [["100×", "fewer network calls", "1 instead of 100"]]


def test_a_page_of_one_candidate(tmp_path: Path) -> None:
    root = parse(page(tmp_path, candidates=candidates(2)[:1]))
    assert cells(root.one("div", "tiles").children[0]) == ["100", "network calls per picture", "teacher, 50 steps"]


def test_histograms_stand_beside_the_uniform_law(tmp_path: Path) -> None:
    shares = {"teacher, 50 steps": [0.5, 0.5], "student, 4 steps": [0.125, 0.875]}
    labels = {"style": ["flat", "3d"]}
    section = parse(page(tmp_path, histograms={"style": shares}, value_labels=labels)).section("variety")
    assert [f.one("figcaption").text for f in section.all("figure")] == list(shares)
    for figure, expected in zip(section.all("figure"), (["50 %", "50 %"], ["12 %", "88 %"]), strict=True):
        texts = [text.text for text in figure.all("text")]
        assert texts == ["flat", expected[0], "3d", expected[1]]
        assert len(figure.all("path", "uniform")) == 1


def test_settings_and_nothing_that_was_not_given(tmp_path: Path) -> None:
    root = parse(page(tmp_path, settings={"steps": 4, "options": {"tau": {"law": "uniform"}, "w": 3.5}}))
    rows = [cells(row) for row in root.section("reproduce").one("table").all("tr")]
    assert rows == [["steps", "4"], ["options.tau.law", "uniform"], ["options.w", "3.5"]]
    ids = [s.attributes.get("id") for s in parse(page(tmp_path)).all("section")]
    assert ids == [None, "pictures", "scores"]


def test_training_curves_are_drawn_from_the_log(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text(
        '{"iteration": 1, "loss/student": 0.5, "rate/student": 1e-4, "metric/student/direction": 0.25}\n' * 3
    )
    section = parse(page(tmp_path, curves=log)).section("training")
    titles = [f.one("figcaption").text for f in section.all("figure")]
    assert titles == ["loss, student last 0.5", "student, direction last 0.25"]
    assert section.one("details").one("summary").text == "1 more"


def test_an_empty_log_leaves_the_section_out(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    log.touch()
    assert "training" not in [s.attributes.get("id") for s in parse(page(tmp_path, curves=log)).all("section")]


SHORT = pictures(1, 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": [1]}, "found 1 seeds, expected 2"),
        ({"candidates": []}, "expected at least one"),
        ({"candidates": [*candidates(2), *candidates(2)]}, "no name twice"),
        ({"candidates": [Candidate("a", SHORT, 1, None, None)]}, r"torch.uint8 \(1, 3, 16, 16\)"),
        ({"candidates": [Candidate("a", pictures(2, 0).float(), 1, None, None)]}, "found pictures torch.float32"),
        ({"candidates": [Candidate("a", pictures(2, 0)[:, :1], 1, None, None)]}, r"\(2, 1, 16, 16\)"),
        ({"prompts": [], "candidates": [Candidate("a", SHORT[:0], 1, None, None)]}, r"\(0, 3, 16, 16\)"),
        ({"headline": ("teacher, 50 steps", "nobody")}, r"found headline \['nobody'\]"),
        ({"curves": Path("nowhere/log.jsonl")}, "found no training log"),
        ({"histograms": {"style": {"student, 1 step": [0.5, 0.5]}}, "value_labels": {"style": ["flat"]}}, "label"),
        ({"histograms": {"style": {"student, 1 step": [0.5, 0.5]}}}, "0 labelled values"),
        ({"histograms": {"style": {"nobody": [1.0]}}, "value_labels": {"style": ["flat"]}}, "nobody"),
    ],
)
def test_what_does_not_belong_together_is_refused_and_the_old_page_stays(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    before = page(tmp_path).read_bytes()
    with pytest.raises(FewstepError, match=message):
        page(tmp_path, **changes)
    assert (tmp_path / "page.html").read_bytes() == before


def test_a_page_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = page(tmp_path).read_bytes()

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("fewstep.evaluation.pictures.os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        page(tmp_path, title="another")
    monkeypatch.undo()
    assert (tmp_path / "page.html").read_bytes() == before
    assert "another" in page(tmp_path, title="another").read_text()
    assert [p.name for p in tmp_path.iterdir()] == ["page.html"]


@pytest.mark.parametrize(
    ("side", "cell", "columns", "shown"), [(64, 128, 12, 5), (16, 128, 3, 3), (100, 200, 5, 5), (512, 256, 2, 2)]
)
def test_grid_has_each_picture_in_its_place(tmp_path: Path, side: int, cell: int, columns: int, shown: int) -> None:
    given = candidates(5, side)
    prompts = ["a frog", "an apple", "a very long prompt " * 20, "", "x" * 300]
    grid = Image.open(write_grid(tmp_path / "new" / "grid.png", given, prompts, columns)).convert("RGB")
    right, bottom = grid.width - 24, grid.height - 24
    left, top = right - shown * cell - (shown - 1) * 8, bottom - 3 * cell - 2 * 8
    assert left >= 24 + 160
    for row, candidate in enumerate(given):
        for column in range(shown):
            x, y = left + column * (cell + 8), top + row * (cell + 8)
            found = grid.crop((x, y, x + cell, y + cell))
            picture = Image.fromarray(candidate.images[column].permute(1, 2, 0).numpy())
            how = Image.Resampling.NEAREST if cell >= side else Image.Resampling.LANCZOS
            assert found.tobytes() == picture.resize((cell, cell), how).tobytes(), (row, column)
        label = grid.crop((0, top + row * (cell + 8), left, top + row * (cell + 8) + cell))
        assert label.getextrema() != ((255, 255),) * 3
    assert grid.crop((left, 0, left + cell, top)).getextrema() != ((255, 255),) * 3
    assert grid.crop((right, 0, grid.width, grid.height)).getextrema() == ((255, 255),) * 3


def test_grid_refuses_no_columns(tmp_path: Path) -> None:
    with pytest.raises(FewstepError, match="found columns = 0"):
        write_grid(tmp_path / "grid.png", candidates(1), ["a"], 0)
