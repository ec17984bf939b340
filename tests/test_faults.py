"""The harness of docs/resume.md, short: killed in checkpoints, exports and evaluations, a run ends as it would have."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

HARNESS = Path(__file__).parents[1] / "benchmarks" / "faults.py"


def test_a_distillation_that_is_killed_ends_as_an_undisturbed_one(tmp_path: Path) -> None:
    words = ["--out", str(tmp_path), "--kills", "7", "--iterations", "8", "--roles", "adapters", "--processes", "1"]
    ended = subprocess.run(
        [sys.executable, str(HARNESS), *words], capture_output=True, text=True, timeout=600, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-2000:]
    result = json.loads((tmp_path / "adapters-1" / "result.json").read_text())
    assert result["different"] == result["left over"] == []
    assert result["kills"] >= 5  # of seven: a run may be over before the last ones come
    moments = set(result["by moment"])
    assert any("evaluate" in moment for moment in moments)
    assert any("export" in moment for moment in moments)
    assert result["files"] > 20  # checkpoint, student, LoRA, log
