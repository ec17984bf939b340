"""The report page: everything handed in is there, nothing else is, and hostile text stays text."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))

from page_examples import Element, candidates, cells, data, decoded, numbers, page, parse, pictures, scripts

from fewstep.errors import FewstepError
from fewstep.evaluation.intervals import Estimate
from fewstep.evaluation.page import Candidate
from fewstep.evaluation.preferences import Vote

HOSTILE = (
    """</script><script>alert(1)</script><img src=x onerror='alert(2)'> "quoted" & 'single' &amp; \u202e</style>"""
)


@pytest.mark.parametrize("count", [1, 24, 60])
def test_every_prompt_seed_and_candidate_has_its_place(tmp_path: Path, count: int) -> None:
    prompts = [f"prompt number {i}" for i in range(count)]
    given = candidates(count)
    root = parse(page(tmp_path, prompts=prompts, candidates=given))
    told = data(root)
    assert (told["prompts"], told["seeds"]) == (prompts, [100 + i for i in range(count)])
    assert [(c["name"], c["calls"], c["width"], c["height"]) for c in told["candidates"]] == [
        (c.name, c.calls, 16, 16) for c in given
    ]
    blocks = scripts(root, "text/plain")
    assert [block.attributes["id"] for block in blocks] == [f"block-{n}" for n in range(-(-count // 24))]
    lines = [line for block in blocks for line in block.text.split("\n")]
    assert [len(block.text.split("\n")) for block in blocks[:-1]] == [24 * 3] * (len(blocks) - 1)
    for n, line in enumerate(lines):
        expected = given[n % 3].images[n // 3].permute(1, 2, 0).numpy()
        np.testing.assert_array_equal(decoded(line), expected)
    assert len(lines) == 3 * count


def test_pictures_come_after_all_else(tmp_path: Path) -> None:
    html = page(tmp_path, notes=["the last note"]).read_text()
    assert html.index("the last note") < html.index('id="data"') < html.index("use strict") < html.index('id="block-0"')


def test_nothing_is_loaded_from_outside(tmp_path: Path) -> None:
    path = page(tmp_path, prompts=["see http://example.org/x.png"], notes=["https://example.org"])
    root = parse(path)

    def loads(element: Element) -> list[str]:
        names = ("src", "href", "srcset", "action", "data", "poster", "xlink:href")
        own = [element.attributes[name] or "" for name in names if name in element.attributes]
        return own + [hit for child in element.children for hit in loads(child)]

    assert loads(root)
    assert all(target.startswith(("data:", "#")) for target in loads(root))
    style = "".join(s.text for s in root.all("style"))
    assert "url(" not in style
    assert "@import" not in style
    policies = [m.attributes["content"] or "" for m in root.all("meta") if "http-equiv" in m.attributes]
    digest = base64.b64encode(hashlib.sha256(scripts(root)[0].text.encode()).digest()).decode()
    assert policies == [f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"]


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text(json.dumps({"iteration": 1, f"loss/{HOSTILE}": 0.5}) + "\n")
    one = Candidate(HOSTILE, pictures(1, 0), 4, 0.1, {HOSTILE: Estimate(0.5)}, {HOSTILE: HOSTILE})
    arguments: dict[str, Any] = {
        "title": HOSTILE,
        "subtitle": HOSTILE,
        "candidates": [Candidate("teacher", pictures(1, 1), 8, 0.1), one],
        "prompts": [HOSTILE],
        "histograms": {HOSTILE: {HOSTILE: [0.25, 0.75]}},
        "value_labels": {HOSTILE: [HOSTILE, "b"]},
        "settings": {HOSTILE: {HOSTILE: HOSTILE}},
        "notes": [HOSTILE],
        "command": HOSTILE,
        "votes": [Vote("page", "voter", HOSTILE, 1, "teacher", HOSTILE, "a")],
        "runs": {HOSTILE: log},
    }
    root = parse(page(tmp_path, **arguments))
    assert [each.attributes.get("type") for each in root.all("script")] == ["application/json", None, "text/plain"]
    assert len(root.all("style")) == len(root.all("link")) == 1
    assert all(set(image.attributes) == {"alt"} for image in root.all("img"))  # those that the script fills

    def handlers(element: Element) -> list[str]:
        own = [name for name in element.attributes if name.startswith("on")]
        return own + [hit for child in element.children for hit in handlers(child)]

    assert handlers(root) == []
    assert root.one("title").text == root.one("h1").text == HOSTILE
    assert root.one("p", "subtitle").text == HOSTILE
    assert (data(root)["prompts"], data(root)["candidates"][1]["name"]) == ([HOSTILE], HOSTILE)
    assert root.section("variety").one("h3").text == root.section("variety").one("figcaption").text == HOSTILE
    differing, of_all = root.section("reproduce").all("table")
    assert cells(differing.one("tbody").one("tr")) == [HOSTILE, "—", HOSTILE]
    assert cells(of_all.one("tr")) == [f"{HOSTILE}.{HOSTILE}", HOSTILE]
    assert root.section("reproduce").one("code").text == root.section("notes").all("p")[0].text == HOSTILE
    assert HOSTILE in root.section("scores").one("thead").text
    assert HOSTILE in root.section("preferences").text
    assert root.section("training").one("p", "legend").text == HOSTILE


def test_a_lone_surrogate_does_not_stop_the_page(tmp_path: Path) -> None:
    root = parse(page(tmp_path, prompts=["broken \ud800 prompt"], notes=["broken \ud800 note"]))
    assert data(root)["prompts"] == ["broken \ud800 prompt"]
    assert "broken ? note" in root.section("notes").text


def test_figures_are_marked_and_missing_ones_are_dashes(tmp_path: Path) -> None:
    sure = {"frechet/judge": Estimate(1.25, 1.0, 1.5), "evenness/style": Estimate(0.5), "contrast": Estimate(7.0)}
    given = [
        Candidate("a", pictures(1, 0), 100, 2.0, sure | numbers(mmd=0.0003)),
        Candidate("b", pictures(1, 1), 4, 0.05, {**numbers(contrast=9.0), "frechet/judge": Estimate(31.5, 30.0, 33.0)}),
        Candidate("c", pictures(1, 2), 4, math.nan, {"frechet/judge": Estimate(math.nan)}),
        Candidate("d", pictures(1, 3), 1, None, {"evenness/style": Estimate(0.75)}),
    ]
    table = parse(page(tmp_path, prompts=["x"], candidates=given)).section("scores").one("table")
    assert cells(table.one("thead").children[0]) == ["", "a", "b", "c", "d"]
    rows = table.one("tbody").children
    assert [cells(row) for row in rows] == [
        ["network calls ↓", "100", "4", "4", "1"],
        ["time per picture ↓", "2 s", "50 ms", "—", "—"],
        ["Fréchet distance, judge\xa0↓", "1.25 [1.00, 1.50]", "31.50 [30.00, 33.00]", "—", "—"],
        ["evenness, style\xa0↑", "0.500", "—", "—", "0.750"],
        ["contrast\xa0", "7.00", "9.00", "—", "—"],
        ["mmd\xa0↓", "0.000300", "—", "—", "—"],
    ]
    # The best of a row needs a known direction and a rival that is worse.
    best = [[cell.text for cell in row.all("td", "best")] for row in rows]
    assert best == [["1"], ["50 ms"], ["1.25 [1.00, 1.50]"], ["0.750"], [], []]
    assert [head.text for head in table.all("th", "chosen")] == ["d"]


def test_the_headline_compares_the_two_that_are_named(tmp_path: Path) -> None:
    root = parse(page(tmp_path, pair=("teacher, 50 steps", "student, 4 steps")))
    tiles = [cells(tile) for tile in root.one("div", "tiles").children]
    assert tiles == [
        ["25×", "fewer network calls", "4 instead of 100"],
        ["40×", "less time", "50 ms instead of 2 s per picture"],
        ["2.50", "Fréchet distance ↓", "teacher, 50 steps: 1.25"],
        ["0.750", "recall ↑", "teacher, 50 steps: 0.500"],
    ]
    assert [head.text for head in root.section("scores").all("th", "chosen")] == ["student, 4 steps"]


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


def test_settings_that_differ_are_told_apart(tmp_path: Path) -> None:
    given = [
        Candidate("a", pictures(2, 0), 4, None, settings={"steps": 4, "card": {"rank": 32, "method": "tdm"}}),
        Candidate("b", pictures(2, 1), 2, None, settings={"steps": 2, "card": {"rank": 32}}),
    ]
    section = parse(page(tmp_path, candidates=given, settings={"seed": 0})).section("reproduce")
    assert [each.text for each in section.all("summary")] == ["What differs: 2", "What is equal: 1", "This comparison"]
    differ, equal, own = section.all("table")
    assert [cells(r) for r in differ.one("tbody").children] == [["steps", "4", "2"], ["card.method", "tdm", "—"]]
    assert [cells(r) for r in equal.one("tbody").children] == [["card.rank", "32", "32"]]
    assert [cells(r) for r in own.all("tr")] == [["seed", "0"]]


def test_nothing_that_was_not_given_is_there(tmp_path: Path) -> None:
    root = parse(page(tmp_path))
    (report,) = [view for view in root.all("div", "view") if view.attributes["id"] == "report"]
    ids = [s.attributes.get("id") for s in report.all("section")]
    assert ids == [None, "pictures", "scores", "notes"]


def test_votes_are_tabulated(tmp_path: Path) -> None:
    one, other = "teacher, 50 steps", "student, 4 steps"
    votes = [
        Vote("page", "v", "a frog", 100, one, other, "a"),
        Vote("page", "v", "a red apple", 101, other, one, "equal"),
    ]
    alone, pairs = parse(page(tmp_path, votes=votes)).section("preferences").all("tbody")
    assert cells(alone.children[0]) == [one, "75 % [20, 97]", "1", "1", "0", "2"]
    assert cells(pairs.one("tr")) == [f"{one} against {other}", "75 % [20, 97]", "1", "1", "0", "2"]


def test_training_curves_of_several_runs_lie_over_each_other(tmp_path: Path) -> None:
    logs = {}
    for name, more in (("first", {}), ("second", {"loss/critic": 0.75})):
        logs[name] = tmp_path / f"{name}.jsonl"
        record = {"iteration": 1, "loss/student": 0.5, "rate/student": 1e-4, "metric/student/direction": 0.25, **more}
        logs[name].write_text(f"{json.dumps(record)}\n" * 3)
    section = parse(page(tmp_path, runs=logs)).section("training")
    titles = [f.one("figcaption").text for f in section.all("figure")]
    assert titles == ["loss, student last 0.5, 0.5", "loss, critic last 0.75", "student, direction last 0.25, 0.25"]
    assert section.one("details").one("summary").text == "1 more"
    assert [each.text for each in section.one("p", "legend").children] == ["first", "second"]
    lines = [[p.attributes["class"] for p in f.all("path", "line")] for f in section.all("figure")]
    assert lines == [["line", "line run-1"], ["line run-1"], ["line", "line run-1"]]


def test_an_empty_log_leaves_the_section_out(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    log.touch()
    root = parse(page(tmp_path, runs={"run": log}))
    assert "training" not in [s.attributes.get("id") for s in root.all("section")]


SHORT = pictures(1, 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": [1]}, "found 1 seeds, expected 2"),
        ({"candidates": []}, "expected at least one"),
        ({"candidates": [*candidates(2), *candidates(2)]}, "no name twice"),
        ({"candidates": [Candidate("a", SHORT, 1, None)]}, r"found 1 pictures torch.uint8 \(3, 16, 16\)"),
        ({"candidates": [Candidate("a", pictures(2, 0).float(), 1, None)]}, "found 2 pictures torch.float32"),
        ({"candidates": [Candidate("a", pictures(2, 0)[:, :1], 1, None)]}, r"\(1, 16, 16\)"),
        ({"prompts": [], "candidates": [Candidate("a", SHORT[:0], 1, None)]}, "found 0 pictures"),
        ({"pair": ("teacher, 50 steps", "nobody")}, r"found pair \['nobody'\]"),
        ({"runs": {"a": Path("nowhere/log.jsonl")}}, "found no training log"),
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
