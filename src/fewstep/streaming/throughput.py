"""How fast a chain of processes makes chunks, by numbers alone (card live_avatar.md, section 2).

A stage is what one process does with a chunk. Stage j can take chunk i once it has given away chunk i - 1 and the stage
before has given away chunk i, so that all stages work at once on chunks of their own.
"""

from __future__ import annotations

from collections.abc import Sequence

from fewstep.errors import FewstepError


def chain_seconds(stages: Sequence[float], chunks: int, *, drained: bool = False) -> float:
    """Seconds for `chunks` (M, 1 or more) of a chain whose stages take `stages` (T, seconds a chunk, 0 or more).

    sum + (M - 1) max, which is (T + M - 1) tau where all take tau. `drained`: the second chunk waits for the first to
    come out, since that becomes the sink: one chunk's way through the chain more, less what it would have overlapped.

    Raises:
        FewstepError: no stage, a negative time, or no chunk.
    """
    if not stages or min(stages) < 0 or chunks < 1:
        raise FewstepError(
            f"found stages {list(stages)} and {chunks} chunks, expected times of 0 or more and 1 chunk or more, "
            "fix: tell the seconds that each process takes for a chunk"
        )
    through, slowest = sum(stages), max(stages)
    if not drained or chunks == 1:
        return through + (chunks - 1) * slowest
    return 2 * through + (chunks - 2) * slowest


def chain_speedup(steps: int, chunks: int, *, drained: bool = False) -> float:
    """One process's seconds over those of `steps` equal stages: T M / (T + M - 1), which goes towards T."""
    return steps * chunks / chain_seconds([1.0] * steps, chunks, drained=drained)
