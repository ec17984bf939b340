"""Compares the numbers of an iteration with the table of conditions. Knows no networks, files or processes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from fewstep.training.monitors.conditions import CONDITIONS, Action, Condition

_DECAY = 0.97  # of the running level, a geometric mean, and of the scatter about it
_SCATTER = math.log(10) / 3  # of a number's logarithm; where it is larger, distances are taken in units of it
_SHOWN = ("metric/", "logit_gap")  # beside levels; others are in the log as they are
_LEAP = math.log(2)  # by hardly more does one observation lift the level, so that an explosion does not become usual
_QUIET = 100  # iterations for which a condition, once told, is not told again; what is skipped is told each time


@dataclass(frozen=True)
class Alarm:
    """A condition that was met."""

    name: str
    number: str
    """What was out of its range."""
    iteration: int
    since: int
    """Iteration at which it was first out of its range, without a break."""
    value: float
    healthy: str
    advice: str
    action: Action
    """What is done where alarms are acted on."""

    def text(self) -> str:
        """One sentence for a person."""
        return (
            f"alarm {self.name} at iteration {self.iteration}: found {self.number} = {self.value:.4g}, healthy is "
            f"{self.healthy}; {self.advice}"
        )

    def record(self) -> dict[str, Any]:
        """For a line of `log.jsonl`; a value that is not finite is None."""
        told = asdict(self)
        return told | {"value": self.value if math.isfinite(self.value) else None}


class Watch:
    """Streaks and running levels of all conditions, as plain numbers that a checkpoint keeps."""

    def __init__(self) -> None:
        self.streaks: dict[str, int] = {}
        self.since: dict[str, int] = {}
        self.quiet: dict[str, int] = {}
        self.levels: dict[str, list[float]] = {}
        """Number -> [observations, mean logarithm, variance of the logarithm]."""

    def look(self, iteration: int, numbers: Mapping[str, float]) -> list[Alarm]:
        """The conditions that are met now and were not told lately."""
        numbers = {**numbers, **derived(numbers)}
        alarms = []
        for condition in CONDITIONS:
            for name in condition.numbers:
                if name in numbers:
                    value = self._compared(condition, name, numbers[name])
                    if value is not None and self._met(condition, name, value, iteration):
                        alarms.append(self._alarm(condition, name, value, iteration))
        for condition in (each for each in CONDITIONS if each.settles):
            for name in condition.numbers:
                self._learn(condition, name, numbers.get(name, math.nan))
        return alarms

    def shown(self, numbers: Mapping[str, float]) -> dict[str, float]:
        """What the log tells of an iteration: monitor/NUMBER as it is compared with its range."""
        told: dict[str, float] = {}
        numbers = {**numbers, **derived(numbers)}
        for condition in CONDITIONS:
            shown = [name for name in condition.numbers if condition.settles or name.startswith(_SHOWN)]
            for name in (name for name in shown if name in numbers):
                value = self._compared(condition, name, numbers[name])
                if value is not None:
                    prefix = "growth/" if condition.settles else ""
                    told[f"monitor/{prefix}{name.removeprefix('metric/')}"] = value
        return told

    def forget(self) -> None:
        """After a roll-back: streaks and levels were those of weights that are no more."""
        self.streaks, self.since, self.levels = {}, {}, {}

    def state(self) -> dict[str, Any]:
        """What `load` takes, as JSON."""
        return {name: dict(getattr(self, name)) for name in ("streaks", "since", "quiet", "levels")}

    def load(self, state: Mapping[str, Any]) -> None:
        self.streaks, self.since, self.quiet = (
            {name: int(value) for name, value in state[each].items()} for each in ("streaks", "since", "quiet")
        )
        levels = {name: [*map(float, level), 0.0][:3] for name, level in state["levels"].items()}
        self.levels = {name: [int(count), *more] for name, (count, *more) in levels.items()}  # no scatter before

    def _met(self, condition: Condition, name: str, value: float, iteration: int) -> bool:
        """Counts; whether the condition is to be told."""
        key = f"{condition.name} {name}"
        if condition.low <= value <= condition.high:
            self.streaks.pop(key, None)
            self.since.pop(key, None)
            return False
        self.streaks[key] = self.streaks.get(key, 0) + 1
        self.since.setdefault(key, iteration)
        if self.streaks[key] < condition.after or iteration < self.quiet.get(key, 0):
            return False
        self.quiet[key] = iteration + (0 if condition.action == "skip" else _QUIET)
        return True

    def _alarm(self, condition: Condition, name: str, value: float, iteration: int) -> Alarm:
        since = self.since[f"{condition.name} {name}"]
        return Alarm(
            condition.name, name, iteration, since, value, condition.healthy(), condition.advice, condition.action
        )

    def _compared(self, condition: Condition, name: str, value: float) -> float | None:
        """The number, or its ratio to its running level; None before there is one, and for what is not finite.

        Of a number that scatters widely by itself, as losses of one or two samples do, 10 times the level is 3 standard
        deviations of its logarithm.
        """
        if not math.isfinite(value):
            return None  # which the condition not-finite tells
        if not condition.settles:
            return value
        count, level, variance = self.levels.get(name, [0, 0.0, 0.0])
        if count < condition.settles or value == 0:
            return None if value else 0.0
        return math.exp((math.log(abs(value)) - level) * min(1.0, _SCATTER / max(_SCATTER, math.sqrt(variance))))

    def _learn(self, condition: Condition, name: str, value: float) -> None:
        if not math.isfinite(value) or value == 0:
            return
        count, level, variance = self.levels.get(name, [0, 0.0, 0.0])
        further = wider = math.log(abs(value)) - level
        if count >= condition.settles:
            scatter = math.sqrt(variance)
            further, wider = min(further, max(_LEAP, 2 * scatter)), min(further, max(_LEAP, scatter))
        keep = min(_DECAY, count / (count + 1))
        variance = keep * (variance + (1 - keep) * wider**2)
        self.levels[name] = [count + 1, level + (1 - keep) * further, variance]


def derived(numbers: Mapping[str, float]) -> dict[str, float]:
    """Numbers that follow from others: how far apart the discriminator's logits are."""
    real, fake = (numbers.get(f"metric/critic/logit_{side}") for side in ("real", "fake"))
    return {} if real is None or fake is None else {"logit_gap": abs(real - fake)}
