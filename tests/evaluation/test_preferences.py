"""Votes: what they say, with intervals, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import binomtest

from fewstep.cli import main
from fewstep.errors import FewstepError
from fewstep.evaluation.intervals import Estimate
from fewstep.evaluation.preferences import FORMAT, Vote, percent, preferences, read_votes, wilson


def vote(choice: str, prompt: str = "p", a: str = "A", b: str = "B", voter: str = "v", seed: int = 0) -> Vote:
    return Vote("page", voter, prompt, seed, a, b, choice)


def write(path: Path, *votes: Vote, **changes: Any) -> Path:
    told = {"format": FORMAT, "page": "page", "votes": [dict(vars(each)) for each in votes]}
    path.write_text(json.dumps(told | changes))
    return path


@pytest.mark.parametrize(("wins", "count"), [(0, 5), (3, 7), (9, 9), (50, 120)])
def test_wilson_is_scipys(wins: int, count: int) -> None:
    expected = binomtest(wins, count).proportion_ci(0.95, method="wilson")
    found = wilson(wins / count, count)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_every_prompt_counts_once() -> None:
    """Three voters on one prompt are one trial, and where a candidate stands makes no difference."""
    votes = [vote("a", "p", voter=str(n)) for n in range(3)] + [vote("b", "q"), vote("equal", "r", a="B", b="A")]
    (first, second), (pair,) = preferences(votes)
    assert (pair.a, pair.b, pair.wins, pair.equal, pair.losses, pair.prompts) == ("A", "B", 3, 1, 1, 3)
    assert pair.share.value == pytest.approx((1 + 0 + 0.5) / 3)
    assert pair.share == wilson(pair.share.value, 3)
    assert (first.share.value, second.share.value) == pytest.approx((0.5, 0.5))
    turned = [vote({"a": "b", "b": "a"}.get(v.choice, v.choice), v.prompt, v.b, v.a, v.voter) for v in votes]
    assert {p.a: p.share.value for p in preferences(turned)[0]} == {p.a: p.share.value for p in preferences(votes)[0]}


def test_percentages_are_rounded_as_in_the_page() -> None:
    assert percent(Estimate(0.625, 0.125, 0.875)) == "63 % [13, 88]"


def test_the_most_preferred_comes_first_and_seeds_are_apart() -> None:
    votes = [vote("b", "p"), vote("b", "p", seed=1), vote("a", "p", a="C", b="A"), vote("a", "p", a="C", b="B")]
    alone, pairs = preferences(votes)
    assert [(p.a, p.share.value) for p in alone] == [("C", 1.0), ("B", 0.75), ("A", 0.0)]
    assert [(p.a, p.b, p.prompts) for p in pairs] == [("A", "B", 2), ("A", "C", 1), ("B", "C", 1)]


def test_a_later_answer_takes_the_place_of_an_earlier_one(tmp_path: Path) -> None:
    first = write(tmp_path / "1.json", vote("a"), vote("a", voter="w"))
    second = write(tmp_path / "2.json", vote("a", a="B", b="A"))
    found = read_votes([first, second, second])
    assert [(v.voter, v.a, v.choice) for v in found] == [("v", "B", "a"), ("w", "A", "a")]


@pytest.mark.parametrize(
    "content",
    [
        "no json",
        "[]",
        json.dumps({"format": "other", "page": "p", "votes": []}),
        json.dumps({"format": FORMAT, "page": "p", "votes": [{"voter": "v"}]}),
        json.dumps({"format": FORMAT, "page": "p", "votes": [{**vars(vote("both"))}]}),
        json.dumps({"format": FORMAT, "page": "p", "votes": [{**vars(vote("a", b="A"))}]}),
        json.dumps({"format": FORMAT, "page": "p", "votes": 3}),
    ],
)
def test_what_is_no_file_of_votes_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "votes.json").write_text(content)
    with pytest.raises(FewstepError, match=r"found no votes in .*votes\.json"):
        read_votes([tmp_path / "votes.json"])
    with pytest.raises(FewstepError, match="found no votes in"):
        read_votes([tmp_path / "nowhere.json"])


def test_votes_on_other_candidates_are_not_mixed(tmp_path: Path) -> None:
    files = [write(tmp_path / "1.json", vote("a")), write(tmp_path / "2.json", vote("a", "q"), page="another")]
    with pytest.raises(FewstepError, match="2 different sets of candidates"):
        read_votes(files)


def test_the_command_prints_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path / "votes.json", *[vote("a", str(n), "ours", "theirs") for n in range(8)])
    main(["compare", "--votes", str(file)])
    printed = capsys.readouterr().out
    assert "ours against theirs" in printed
    assert "100 % [68, 100]" in printed
    assert "8 votes of 1 voter" in printed
