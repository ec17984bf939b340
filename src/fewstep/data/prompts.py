"""Which prompt a sample of a distillation gets; the captions of the embedded data set. Files: `sources.py`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
from torch import Tensor

from fewstep.core.tensors import Condition
from fewstep.data.scenes import draw_caption


class PromptData:
    """Conditions for the trainer: sample n has prompt n of an endless sequence of shuffled passes over the list.

    What a sample gets depends on its number only, so it is the same after a resume and for any number of processes.
    Prompts are encoded when they are needed.
    """

    def __init__(self, encode: Callable[[Sequence[str]], Condition], prompts: Sequence[str], seed: int = 0) -> None:
        self._encode, self._prompts, self._seed = encode, prompts, seed

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
