"""The bookkeeping of `benchmarks/claims.py`; its trainings are not run here."""

from __future__ import annotations

from pathlib import Path

from benchmarks.claims import Claim, kept, table


def test_what_is_there_is_not_run_again(tmp_path: Path) -> None:
    ran: list[int] = []

    def measure(seed: int) -> dict[str, float]:
        ran.append(seed)
        return {"error": float(seed)}

    claim = Claim("paper", "says", {"one": measure})
    kept(tmp_path, "claim", claim, [0])
    found = kept(tmp_path, "claim", claim, [0, 1])
    assert ran == [0, 1]
    assert [path.name for path in tmp_path.iterdir()] == ["claim.json"]
    assert table(found).splitlines() == ["| variant | error |", "|---|---|", "| one | 0.500 ± 0.500 |"]
