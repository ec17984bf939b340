"""The benchmark of a training step: it runs, adds up, and a round on a GPU measures every published network."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import gpu_round  # noqa: E402
import training_step  # noqa: E402
from plan_real_sizes import PUBLISHED  # noqa: E402


def told(**more: Any) -> argparse.Namespace:
    usual = {
        "device": "cpu", "batch": 2, "microbatch": 0, "iterations": 1, "rank": 2, "base_dtype": "float32",
        "precision": "fp32", "optimiser": "adamw", "checkpointing": False, "compile": False,
    }  # fmt: skip
    return argparse.Namespace(**usual | more)


def test_a_step_is_measured() -> None:
    row = training_step.measure("tiny", "adapters", told())
    assert 6.25 <= row["forwards_per_sample"] <= 9.25  # as the steps of the two samples were drawn; 7.75 on average
    assert row["ratio"] == pytest.approx(row["iteration_seconds"] / row["bare_seconds"])
    assert row["paper_hours"] == pytest.approx(row["iteration_seconds"] / 2 * 500 * 32 / 3600)
    assert row["planned_bytes"] > 0
    assert row["plan_error"] == pytest.approx(row["planned_bytes"] / row["peak_bytes"] - 1)


@pytest.mark.parametrize("name", PUBLISHED)
def test_networks_have_their_published_size(name: str) -> None:
    network = training_step.BACKBONES[name]("meta").network
    assert sum(p.numel() for p in network.parameters()) == pytest.approx(PUBLISHED[name], rel=0.01)


def test_a_gpu_round_measures_all_published_networks(tmp_path: Path, monkeypatch, capsys) -> None:
    """Both arrangements of each, in a process of its own; a second round measures nothing again."""
    asked: list[list[str]] = []
    names = ("forwards_per_sample", "iteration_seconds", "ratio", "peak_bytes", "planned_bytes", "plan_error")

    def run(command: list[Any], **more: Any) -> Any:
        words = [str(word) for word in command[2:]]
        if "--child" not in words:  # the round starts the benchmark
            monkeypatch.setattr(sys, "argv", ["training_step.py", *words])
            training_step.main()
            return None
        asked.append(words)
        about = {"backbone": words[0], "roles": words[2], "batch": int(words[words.index("--batch") + 1])}
        row = about | dict.fromkeys((*names, "paper_hours"), 1.0) | {"checkpointing": "--checkpointing" in words}
        return subprocess.CompletedProcess(command, 0, stdout=json.dumps(row))

    monkeypatch.setattr(subprocess, "run", run)
    for _ in range(2):
        gpu_round.step(tmp_path, 600)
    assert {(words[0], words[2]) for words in asked} == {
        (n, kind) for n in PUBLISHED for kind in ("adapters", "copies")
    }
    assert len(asked) == 2 * len(PUBLISHED)
    assert all(words[words.index("--device") + 1] == "cuda" for words in asked)
    assert {row["backbone"] for row in json.loads((tmp_path / "steps.json").read_text())} == PUBLISHED.keys()
    assert "| wan-1.3b | copies | 2 | yes |" in capsys.readouterr().out
