"""What the loop asks after each iteration: is all well, and if not, what now?

The first process alone looks at the numbers; what it decides is sent to the others, so that all do the same. All that
it remembers is in the checkpoint, so that a resumed run decides as an undisturbed one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from fewstep.core.shards import is_sharded
from fewstep.errors import FewstepError
from fewstep.training import checkpoint
from fewstep.training.monitors.best import FOLDER, GROUP, SCORE, Best, drop_later, save_best
from fewstep.training.monitors.watch import Alarm, Watch
from fewstep.training.options import TrainOptions
from fewstep.training.parallel import Group
from fewstep.training.state import State
from fewstep.training.trainee import Update

SLOWER = 0.5
"""By what a roll-back multiplies the learning rates."""
MOST_ROLL_BACKS = 3
"""So many; the next one stops the run."""
_SAMPLED = (64, 16)  # so many tensors of a role, so many numbers of each, tell whether it moves

Step = Literal["go on", "roll back", "finish", "stop"]
_STEPS: tuple[Step, ...] = ("go on", "roll back", "finish", "stop")


@dataclass(frozen=True)
class Decision:
    """The same in every process."""

    step: Step = "go on"
    to: int = 0
    """Iteration of the checkpoint that is rolled back to."""
    best: bool = False
    """The student that was just evaluated is the best so far."""


class Alarmed(FewstepError):
    """An alarm has stopped a run."""


class Guard:
    """Watches one run in the folder `out`."""

    def __init__(self, options: TrainOptions, state: State, group: Group, out: Path) -> None:
        self._options, self._state, self._group, self._out = options, state, group, out
        self._watch, self._best = Watch(), Best()
        self._roll_backs = 0
        self._improved = False
        self._watches = options.on_alarm != "off"
        self._views = {trainee.role: _views(list(trainee.parameters.values())) for trainee in state.trainees}
        self._before: dict[str, Tensor] = {}

    def begin(self, iteration: int, told: Mapping[str, Any]) -> bool:
        """Goes on from the checkpoint of `iteration`, whose memory is `told`; whether there is more to do."""
        if told:
            try:
                self._watch.load(told["watch"])
                self._best.load(told["best"])
                self._roll_backs = int(told["roll_backs"])
            except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
                raise FewstepError(
                    f"found a checkpoint of iteration {iteration} in {self._out} whose state.json tells nothing that "
                    f"monitors can go on from ({type(error).__name__}: {error}), expected what a run writes, fix: move "
                    "this checkpoint away, so that the one before is used"
                ) from error
            for trainee in self._state.trainees:
                trainee.slowed = SLOWER**self._roll_backs
        if self._group.leads:
            drop_later(self._out, iteration)
        self._remember()
        return not self._patience_is_over()

    def memory(self) -> dict[str, Any]:
        """What `begin` takes, for a checkpoint's state."""
        return {"watch": self._watch.state(), "best": self._best.state(), "roll_backs": self._roll_backs}

    def look(self, iteration: int, updates: Mapping[str, Update], numbers: Mapping[str, float]) -> list[Alarm]:
        """Alarms of an iteration and its numbers; none in the processes that do not lead."""
        if not self._watches or not self._group.leads:
            return []
        return self._watch.look(iteration, {**numbers, **self._finite(updates), **self._movement(updates)})

    def shown(self, numbers: Mapping[str, float]) -> dict[str, float]:
        """For the log."""
        return self._watch.shown(numbers) if self._watches and self._group.leads else {}

    def judge(self, iteration: int, evaluated: Mapping[str, float]) -> list[Alarm]:
        """Alarms of an evaluation, keys evaluate/NAME; notes whether its student is the best so far."""
        if self._options.patience and evaluated and SCORE not in evaluated:
            raise FewstepError(
                f"found patience = {self._options.patience} and an evaluation without a score, expected one to compare "
                "students by, fix: return a number called score from the evaluate hook, or set patience to 0"
            )
        self._improved = self._best.improves(iteration, evaluated)
        if not self._watches or not evaluated or not self._group.leads:
            return []
        return self._watch.look(iteration, {**evaluated, **self._best.behind(evaluated)})

    def decide(self, alarms: Sequence[Alarm]) -> Decision:
        """What all processes do now; every process calls this."""
        mine = self._decide(alarms) if self._group.leads else Decision()
        sent = torch.tensor([_STEPS.index(mine.step), mine.to, int(mine.best)], device=self._device)
        self._group.same_([sent])
        step, to, best = sent.tolist() if self._group.size > 1 else (_STEPS.index(mine.step), mine.to, mine.best)
        return Decision(_STEPS[step], to, bool(best))

    def done(self, alarm: Alarm, decision: Decision) -> dict[str, Any]:
        """What is done about an alarm, for its line in the log."""
        acted = alarm.action if alarm.action == "skip" else decision.step
        return {"done": acted if self._options.on_alarm == "act" and acted != "go on" else "told", "to": decision.to}

    def carry_out(self, decision: Decision, iteration: int, alarms: Sequence[Alarm], about: Mapping[str, Any]) -> None:
        """Keeps the best student, which `about` describes, and rolls back; every process calls this.

        Raises:
            Alarmed: the decision is to stop.
        """
        if decision.best and self._group.leads:
            save_best(self._out, iteration, self._state.student_tensors(), about)
        elif decision.best and self._state.sharded:
            checkpoint.give({GROUP: self._state.student_tensors()})
        if decision.step == "roll back":
            self._roll_back(decision.to)
        if decision.step == "stop":
            raise self._stopped(alarms, iteration)

    @property
    def best(self) -> str:
        """A sentence about the best student."""
        known = f"the best score, {self._best.score:.4g}, was at iteration {self._best.iteration}"
        return known if self._best.iteration else "there was no score"

    def _roll_back(self, to: int) -> None:
        """Weights, optimisers and average as in the checkpoint of iteration `to`; lower rates from now on."""
        self._state.take(checkpoint.inspected(self._out / "checkpoints", to))
        self._roll_backs += 1
        for trainee in self._state.trainees:
            trainee.slowed = SLOWER**self._roll_backs
        self._watch.forget()
        self._remember()

    def _stopped(self, alarms: Sequence[Alarm], iteration: int) -> Alarmed:
        """The error that ends a run."""
        last = next((alarm for alarm in alarms if alarm.action in ("stop", "roll back")), None)
        told = last.text() if last else f"an alarm at iteration {iteration}, see the first process"
        if last and last.action == "roll back":
            told += f" ({self._roll_backs} roll-backs did not help, or there is no checkpoint from before)"
        kept = f", and the best student is in {self._out / FOLDER}" if self._best.iteration else ""
        return Alarmed(
            f"{told}; the run has stopped, its checkpoints are in {self._out / 'checkpoints'}{kept}. "
            "--on-alarm warn goes on whatever happens"
        )

    @property
    def _device(self) -> torch.device:
        return next(iter(self._state.student.parameters.values())).device

    def _decide(self, alarms: Sequence[Alarm]) -> Decision:
        best, self._improved = self._improved, False
        if self._patience_is_over():
            return Decision("finish", best=best)
        if self._options.on_alarm != "act":
            return Decision(best=best)
        actions = {alarm.action for alarm in alarms}
        if "stop" in actions:
            return Decision("stop", best=best)
        if "roll back" in actions:
            since = min(alarm.since for alarm in alarms if alarm.action == "roll back")
            found = checkpoint.newest(self._out / "checkpoints", before=since)
            if found is None or self._roll_backs == MOST_ROLL_BACKS:
                return Decision("stop", best=best)
            return Decision("roll back", found.iteration, best)
        return Decision("finish" if "finish" in actions else "go on", best=best)

    def _patience_is_over(self) -> bool:
        return 0 < self._options.patience <= self._best.since

    def _finite(self, updates: Mapping[str, Update]) -> dict[str, float]:
        """finite/ROLE: 1 or 0. A gradient beyond fp16 is the loss scale's business."""
        fp16 = self._options.precision == "fp16"
        return {
            f"finite/{role}": float(update.stepped or (fp16 and math.isfinite(update.loss)))
            for role, update in updates.items()
        }

    def _movement(self, updates: Mapping[str, Update]) -> dict[str, float]:
        """moved/ROLE: 1 if its weights are not what they were an iteration ago; of roles that were to step."""
        moved = {}
        for role, views in self._views.items():
            now = _joined(views)
            if updates[role].stepped:
                moved[f"moved/{role}"] = float(not torch.equal(now, self._before[role]))
            self._before[role] = now
        return moved

    def _remember(self) -> None:
        self._before = {role: _joined(views) for role, views in self._views.items()}


def _views(parameters: Sequence[Tensor]) -> list[Tensor]:
    """Some numbers of some tensors, as they are at any time; of sharded ones this process's part."""
    most, numbers = _SAMPLED
    step = -(-len(parameters) // most)
    views = []
    for parameter in parameters[::step]:
        own: Tensor = parameter.to_local() if is_sharded(parameter) else parameter  # type: ignore[operator]
        if own.numel():
            views.append(own.detach().as_strided((min(numbers, own.numel()),), (1,)))
    return views


def _joined(views: Sequence[Tensor]) -> Tensor:
    return torch.cat([view.float() for view in views]) if views else torch.zeros(0)
