"""Cells are run once, by one process, to the end; what fails is kept and told."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from fewstep.cli import main
from fewstep.errors import FewstepError
from fewstep.league.cells import RESULT, Cell, cells, play, results
from fewstep.league.emoji import EmojiLeague
from fewstep.league.entries import Entry, entries
from fewstep.league.report import write_report
from fewstep.methods import Options
from fewstep.training.log import Log

RECORD = {"iterations": 3, "pairs": 0, "forwards": 10.0, "seconds": 60.0, "machine": "abacus, 1 thread"}


@dataclass
class Paper:
    """A league on paper."""

    settings: dict[str, Any] = field(default_factory=lambda: {"forwards": 10.0, "count": 200})
    run_: list[str] = field(default_factory=list)
    bad: str = ""
    name: str = "mixtures"

    def options(self, entry: Entry, steps: int) -> Options | None:
        return entry.options(steps)

    def run(self, cell: Cell, home: Path) -> dict[str, Any]:
        self.run_.append(cell.name)
        if cell.entry.name == self.bad:
            raise RuntimeError("it fell")
        value = 0.1 * (cell.seed + len(cell.entry.name))
        score = {"sliced W2": value, "MMD^2": value / 10, "smallest mode": 1 - value}
        return RECORD | {"scores": {str(cell.steps): score}}


def work(league: Paper, *names: str) -> list[Cell]:
    return cells(league, entries(names), [4], [0, 1])


def test_finished_cells_are_not_run_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    league = Paper()
    todo = work(league, "tdm", "dmd2")
    assert play(league, todo[:1], tmp_path) == []
    assert play(league, todo, tmp_path) == []
    assert league.run_ == [cell.name for cell in todo]
    assert "4 of 4 cells finished, 0 failed" in capsys.readouterr().out


def test_a_failed_cell_is_kept_and_the_others_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    league = Paper(bad="tdm")
    todo = work(league, "tdm", "dmd2")
    failed = ["tdm-4-steps-seed-0", "tdm-4-steps-seed-1"]
    assert play(league, todo, tmp_path) == failed
    assert "it fell" in capsys.readouterr().err
    kept = {result["cell"]: result.get("error") for result in results(tmp_path / "mixtures")}
    assert kept["tdm-4-steps-seed-0"] == "RuntimeError: it fell"
    assert kept["dmd2-4-steps-seed-0"] is None
    well = Paper()
    assert play(well, todo, tmp_path) == failed
    assert well.run_ == []
    assert play(well, todo, tmp_path, retry=True) == []
    assert well.run_ == failed


def test_a_cell_of_another_process_is_left_to_it(tmp_path: Path) -> None:
    league = Paper()
    todo = work(league, "tdm")
    taken = tmp_path / "mixtures" / todo[0].name
    hold = "import sys; from pathlib import Path; from fewstep.training.folder import locked\n"
    hold += "with locked(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", hold, str(taken)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        play(league, todo, tmp_path)
        assert league.run_ == [todo[1].name]
        other.kill()
    play(league, todo, tmp_path)
    assert league.run_ == [todo[1].name, todo[0].name]


def test_other_settings_are_refused_and_time_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    league = Paper()
    play(league, work(league, "tdm"), tmp_path, minutes=0)
    assert league.run_ == []
    assert "are not begun" in capsys.readouterr().out
    with pytest.raises(FewstepError, match="other settings"):
        play(Paper(settings={"forwards": 20.0, "count": 200}), work(league, "tdm"), tmp_path)


@pytest.mark.slow
def test_a_training_that_was_killed_ends_with_the_same_result(tmp_path: Path) -> None:
    league = EmojiLeague(24.0, 2, 16, "fp32", torch.device("cpu"))
    todo = cells(league, entries(["tdm"]), [4], [0])
    assert play(league, todo, tmp_path / "whole") == []

    def die(self: Log, iteration: int, record: object) -> None:
        if iteration == 3:
            raise KeyboardInterrupt
        original(self, iteration, record)  # type: ignore[arg-type]

    original = Log.write
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Log, "write", die)
        with pytest.raises(KeyboardInterrupt):
            play(league, todo, tmp_path / "killed")
    home = tmp_path / "killed" / "emoji" / todo[0].name
    assert (home / "run" / "checkpoints" / "000002").is_dir()
    assert not (home / RESULT).exists()
    assert play(league, todo, tmp_path / "killed") == []
    ends = [next(results(tmp_path / name / "emoji")) for name in ("whole", "killed")]
    for end in ends:
        del end["seconds"], end["scores"]["4"]["seconds"]
    assert ends[0] == ends[1]
    assert ends[0]["iterations"] == 3
    assert ends[0]["forwards"] == pytest.approx(23.25, rel=0.25)  # two samples draw few calls
    assert not list(home.glob("**/checkpoints"))
    weights = [
        next((tmp_path / name / "emoji").glob("*/run/student/transformer/*.safetensors")).read_bytes()
        for name in ("whole", "killed")
    ]
    assert weights[0] == weights[1]


def test_report_of_results(tmp_path: Path) -> None:
    league = Paper(bad="sid")
    play(league, work(league, "tdm", "dmd2", "sid"), tmp_path)
    document = tmp_path / "results.md"
    document.write_text("# Results\n\nBy hand.\n\n## Known answers\n\nLast.\n")
    assert write_report(tmp_path, document) == ["mixtures"]
    text = document.read_text()
    assert "| tdm | 0, 1 | 0.350 ± 0.050 | 35.00 ± 5.00 | 0.65 ± 0.05 | 3 ± 0 | 10 ± 0 | 60 ± 0 |" in text
    assert text.index("| tdm |") < text.index("| dmd2 |")  # the nearer one first
    assert "- sid-4-steps-seed-0: RuntimeError: it fell" in text
    assert "`fewstep league mixtures --forwards 10 --count 200`, seeds 0, 1, on abacus, 1 thread; 4 minutes" in text
    assert "| teacher, 8 steps |" in text
    assert text.index("By hand.") < text.index("<!-- league:mixtures -->") < text.index("## Known answers")
    assert text.endswith("Last.\n")

    moved = "By hand.\n\n<!-- league:mixtures -->\nold\n<!-- /league:mixtures -->\nEnd.\n"
    document.write_text(moved)
    write_report(tmp_path, document)
    assert "old" not in document.read_text()
    assert document.read_text().startswith("By hand.\n\n<!-- league:mixtures -->\n## The league")
    assert document.read_text().endswith("<!-- /league:mixtures -->\nEnd.\n")
    document.write_text("<!-- league:mixtures -->\n")
    with pytest.raises(FewstepError, match="both or none"):
        write_report(tmp_path, document)


def test_report_of_the_embedded_teacher(tmp_path: Path) -> None:
    home = tmp_path / "emoji"
    score = {"frechet": 38.91, "precision": 0.99, "recall": 0.98, "following": 0.961, "thing": 0.99, "seconds": 0.1}
    score |= {"contrast": 0.2, "clipped": 0.016, "style evenness": 0.98, "background evenness": 0.88}
    score["histograms"] = {"style": [0.45, 0.55]}
    result = {"cell": "a", "method": "tdm-unify", "steps": 4, "seed": 0, "scores": {"1": score, "4": score}} | RECORD
    (home / "a").mkdir(parents=True)
    (home / "a" / RESULT).write_text(json.dumps(result))
    (home / "settings.json").write_text(json.dumps({"forwards": 775.0, "count": 256}))
    document = tmp_path / "results.md"
    document.write_text("# Results\n")
    write_report(tmp_path, document)
    text = document.read_text()
    row = "| tdm-unify | 0 | 38.9 | 96.1 | 0.980 | 0.990 | 0.200 | 1.6 | 0.980 | 0.880 | 45 | 3 | 10 | 60 |"
    assert text.count(row) == 2
    assert "| teacher, 50 guided steps | 26.4 | 96.1 | 1.000 |" in text
    assert text.index("**1 step**") < text.index("**4 steps**")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["dance"], "found action 'dance'"),
        (["mixtures", "--only", "tdmm"], "found method 'tdmm'"),
        (["emoji", "--only", "tsm"], "makes no few-step student"),
        (["emoji", "--only", "dmd", "--steps", "4"], "found no training"),
        (["mixtures", "--steps", "0"], "1 or more"),
        (["mixtures", "--forwards", "3"], "raise --forwards"),
        (["mixtures", "--count", "3"], "2000 or more"),
        (["emoji", "--count", "5000"], "16 to 1024"),
        (["mixtures", "--batch", "0"], "1 or more"),
        (["report", "--out", "/nowhere"], "found no result in /nowhere"),
    ],
)
def test_bad_input_is_one_paragraph(words: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["league", *words])
    assert stopped.value.code == 2
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize("action", ["mixtures", "emoji", "report"])
def test_every_action_explains_its_options(action: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["league", action, "--help"])
    assert stopped.value.code == 0
    assert f"usage: fewstep league {action}" in capsys.readouterr().out
