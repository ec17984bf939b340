"""Where a distillation's conditions come from: prompts of a file, or captions of the embedded data set."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from torch import Tensor

from fewstep.core.tensors import Condition
from fewstep.data.scenes import draw_caption
from fewstep.errors import FewstepError

LONGEST = 4_000
"""Characters of a prompt above which it is taken for a mistake."""


def read_prompts(path: str | Path) -> list[str]:
    """The prompts of a text file, one a line; empty lines are skipped.

    Raises:
        FewstepError: no such file, not UTF-8 text, control characters, an absurdly long line (with its number), or
            nothing in it.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise FewstepError(
            f"found no readable prompts file at {path} ({error.strerror}), expected a text file with one prompt a "
            "line, fix: check the path"
        ) from error
    prompts = []
    for number, line in enumerate(data.splitlines(), start=1):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
        except UnicodeDecodeError as error:
            raise _bad_line(path, number, "bytes that are not UTF-8", "save the file as UTF-8") from error
        if any(ord(character) < 32 and character != "\t" for character in text):
            raise _bad_line(path, number, "control characters (a binary file?)", "pass a plain text file")
        if len(text) > LONGEST:
            raise _bad_line(path, number, f"{len(text)} characters", f"keep prompts below {LONGEST}")
        if text:
            prompts.append(text)
    if not prompts:
        raise FewstepError(f"found no prompt in {path}, expected at least one line of text, fix: write one on a line")
    return prompts


def _bad_line(path: Path, number: int, found: str, fix: str) -> FewstepError:
    return FewstepError(f"found {found} in line {number} of {path}, expected one prompt of plain text, fix: {fix}")


class PromptData:
    """Conditions for the trainer: sample n has prompt n of an endless sequence of shuffled passes over the list.

    What a sample gets depends on its number only, so it is the same after a resume and for any number of processes.
    Prompts are encoded when they are needed.
    """

    def __init__(self, encode: Callable[[Sequence[str]], Condition], prompts: Sequence[str], seed: int = 0) -> None:
        self._encode, self._prompts, self._seed = encode, list(prompts), seed

    def __call__(self, iteration: int, samples: Tensor) -> Condition:
        """The condition of global sample numbers (B,)."""
        return self._encode([self.prompt(int(n)) for n in samples])

    def prompt(self, sample: int) -> str:
        """The prompt of a global sample number."""
        return self._prompts[shuffled(sample, len(self._prompts), (self._seed, 3))]


def shuffled(sample: int, count: int, key: tuple[int, ...]) -> int:
    """Which of `count` things comes at place `sample` of endless shuffled passes over them; `key` seeds the orders."""
    turn, place = divmod(sample, count)
    return int(_order(count, (*key, turn))[place])


@lru_cache(maxsize=8)
def _order(count: int, key: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(key).permutation(count)


def training_captions(count: int = 8192, seed: int = 0) -> list[str]:
    """Captions of the embedded data set for a distillation; none of them is held out for evaluation."""
    rng = np.random.default_rng([seed, 5])
    return [str(draw_caption(rng)) for _ in range(count)]
