"""Votes of the report's blind test, and what they say: a preference table with intervals.

Each prompt counts once: its votes on two candidates (1, 1/2 for equal, 0) are averaged, and the mean of these over the
prompts has Wilson's interval for as many trials as there are prompts. Votes on one prompt are no independent trials,
and averages in [0, 1] vary less than coin tosses, so the interval is rather too wide than too narrow. The page computes
the same (`assets/page/votes.js`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fewstep.errors import FewstepError
from fewstep.evaluation.intervals import Estimate

FORMAT = "fewstep-votes-1"
_Z = 1.959963984540054  # of intervals.LEVEL
_WORTH = {"a": 1.0, "equal": 0.5, "b": 0.0}


@dataclass(frozen=True)
class Vote:
    """One answer: of two pictures of a prompt and seed, which is better."""

    page: str
    """Hash of the candidates and their settings (`page_pictures.page_id`)."""
    voter: str
    prompt: str
    seed: int
    a: str
    """Name of a candidate, as `b` is."""
    b: str
    choice: str
    """"a", "b" or "equal"."""

    @property
    def question(self) -> tuple[object, ...]:
        """What was asked of whom; a later answer takes the place of an earlier one."""
        return self.voter, self.prompt, self.seed, frozenset((self.a, self.b))


@dataclass(frozen=True)
class Preference:
    """How often one candidate was preferred to another, or to all others (`b` None)."""

    a: str
    b: str | None
    wins: int
    equal: int
    losses: int
    prompts: int
    share: Estimate
    """Of the wins, equal ones half, every prompt counting once; 95 % interval."""


def wilson(share: float, count: int) -> Estimate:
    """Wilson's 95 % interval of a share in [0, 1] of `count` trials (Wilson 1927)."""
    if count < 1:
        raise FewstepError(f"found {count} trials, expected 1 or more, fix: collect votes first")
    middle = (share + _Z**2 / (2 * count)) / (1 + _Z**2 / count)
    half = _Z / (1 + _Z**2 / count) * math.sqrt(share * (1 - share) / count + (_Z / (2 * count)) ** 2)
    return Estimate(share, max(0.0, middle - half), min(1.0, middle + half))


def read_votes(paths: Iterable[Path]) -> list[Vote]:
    """The votes of files that the page saved, each question answered once by each voter.

    Raises:
        FewstepError: a file that is none, or votes on different candidates, which cannot be counted together.
    """
    votes: dict[tuple[object, ...], Vote] = {}
    for path in paths:
        for vote in _read(path):
            votes[vote.question] = vote
    pages = {vote.page for vote in votes.values()}
    if len(pages) > 1:
        raise FewstepError(
            f"found votes on {len(pages)} different sets of candidates, expected one, since equal names may mean "
            "different models, fix: count the files of each page by themselves"
        )
    return list(votes.values())


def _read(path: Path) -> list[Vote]:
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        if told["format"] != FORMAT:
            raise ValueError(f"format {told['format']!r}")
        return [_vote(str(told["page"]), each) for each in told["votes"]]
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise FewstepError(
            f"found no votes in {path} ({type(error).__name__}: {error}), expected a file that the page's blind test "
            f"saved ({FORMAT}), fix: check the path"
        ) from error


def _vote(page: str, each: Mapping[str, Any]) -> Vote:
    told = {name: str(each[name]) for name in ("voter", "prompt", "a", "b", "choice")}
    vote = Vote(page=page, seed=int(each["seed"]), **told)
    if vote.choice not in _WORTH or vote.a == vote.b:
        raise ValueError(f"{vote.choice!r} of {vote.a!r} and {vote.b!r}")
    return vote


def preferences(votes: Sequence[Vote]) -> tuple[list[Preference], list[Preference]]:
    """What the votes say: of each candidate against all others, the most preferred first, and of each pair."""
    names = list(dict.fromkeys(name for vote in votes for name in (vote.a, vote.b)))
    alone = [_preference(votes, name, None) for name in names]
    pairs = [
        _preference(among, a, b)
        for i, a in enumerate(names)
        for b in names[i + 1 :]
        if (among := [vote for vote in votes if {vote.a, vote.b} == {a, b}])
    ]
    return sorted(alone, key=lambda p: -p.share.value), pairs


def _preference(votes: Sequence[Vote], a: str, b: str | None) -> Preference:
    worth: dict[tuple[str, int], list[float]] = {}
    for vote in votes:
        if a in (vote.a, vote.b):
            value = _WORTH[vote.choice]
            worth.setdefault((vote.prompt, vote.seed), []).append(value if a == vote.a else 1 - value)
    every = [value for values in worth.values() for value in values]
    share = sum(sum(values) / len(values) for values in worth.values()) / len(worth)
    return Preference(a, b, every.count(1.0), every.count(0.5), every.count(0.0), len(worth), wilson(share, len(worth)))


def preference_table(votes: Sequence[Vote]) -> None:
    """Prints both tables."""
    from rich.console import Console
    from rich.table import Table

    if not votes:
        raise FewstepError("found no vote in these files, expected some, fix: vote on the page, then save the votes")
    console = Console()
    voters = len({vote.voter for vote in votes})
    for title, rows in zip(("against all others", "pair by pair"), preferences(votes), strict=True):
        table = Table(title=f"Preferred, {title}", title_justify="left", caption="equal counts half; 95 % intervals")
        for name in ("", "preferred", "won", "equal", "lost", "prompts"):
            table.add_column(name, justify="right" if name else "left")
        for row in rows:
            numbers = (str(n) for n in (row.wins, row.equal, row.losses, row.prompts))
            table.add_row(row.a if row.b is None else f"{row.a} against {row.b}", percent(row.share), *numbers)
        console.print(table)
    console.print(f"{len(votes)} votes of {voters} voter{'s' * (voters != 1)}")


def percent(share: Estimate) -> str:
    """A share with its interval, in per cent, halves rounded up as in the page."""
    assert share.low is not None
    assert share.high is not None
    value, low, high = (math.floor(100 * each + 0.5) for each in (share.value, share.low, share.high))
    return f"{value} % [{low}, {high}]"
