"""All that a run carries from one iteration to the next, and its way to disk and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from fewstep.errors import FewstepError
from fewstep.training import checkpoint
from fewstep.training.ema import Ema
from fewstep.training.parallel import Group
from fewstep.training.trainee import Trainee, copy_tensors


@dataclass(frozen=True)
class State:
    """The trained networks with their optimisers, and the average of the student."""

    student: Trainee
    critic: Trainee | None
    """With the discriminator; None for methods that train neither."""
    ema: Ema

    @property
    def trainees(self) -> list[Trainee]:
        """Those there are."""
        return [self.student] if self.critic is None else [self.student, self.critic]

    @property
    def sharded(self) -> bool:
        """Whether every process holds only its part."""
        return self.student.sharded

    def bytes(self) -> int:
        """Size of a checkpoint: the parameters, two moments of each, and the average."""
        trained = [parameter for trainee in self.trainees for parameter in trainee.parameters.values()]
        return sum(3 * p.nbytes for p in trained) + sum(a.nbytes for a in self.ema.tensors.values())

    def save(
        self, parent: Path, iteration: int, about: Mapping[str, Any], *, keep: int, extra: Callable[[Path], None]
    ) -> Path:
        """Writes the checkpoint of `iteration`; `about` describes the run. See `checkpoint.save`."""
        groups, facts = self._contents()
        return checkpoint.save(parent, iteration, groups, {**about, **facts}, keep=keep, extra=extra)

    def give(self) -> None:
        """What the other processes do while the first one is in `save`, where the state is sharded."""
        checkpoint.give(self._contents()[0])

    def student_tensors(self) -> Mapping[str, Tensor]:
        """The student as it is exported: its average, if one is kept."""
        return self.ema.tensors or self.student.parameters

    def _contents(self) -> tuple[dict[str, Mapping[str, Tensor]], dict[str, Any]]:
        """Tensors by group, and facts for state.json."""
        groups: dict[str, Mapping[str, Tensor]] = {"ema": self.ema.tensors}
        facts: dict[str, Any] = {"ema_updates": self.ema.updates}
        for trainee in self.trainees:
            groups |= {trainee.role: trainee.parameters, f"{trainee.role}_optimiser": trainee.tensors()}
            facts[f"{trainee.role}_loss_scaler"] = trainee.scaler.state_dict()
        return groups, facts

    def restore(
        self, parent: Path, found: checkpoint.Checkpoint | None, group: Group, iterations: int
    ) -> tuple[int, dict[str, Any]]:
        """Takes over the checkpoint that the first process has `found`, if any; its iteration and state, else 0, {}.

        FewstepError if that is beyond `iterations`. Without a checkpoint the first process gives its parameters to all;
        not sharded ones, which every process has read from the same files or drawn from the same seed.
        """
        device = next(iter(self.student.parameters.values())).device
        reached = group.largest(0 if found is None else found.iteration, device)
        if reached == 0:
            if self.sharded:
                return 0, {}
            group.same_([p.detach() for trainee in self.trainees for p in trainee.parameters.values()])
            group.same_(self.ema.tensors.values())
            return 0, {}
        found = found or checkpoint.inspected(parent, reached)
        if found.iteration > iterations:
            raise FewstepError(
                f"found the run already at iteration {found.iteration}, expected at most iterations = {iterations}, "
                "fix: raise --iterations or choose another --out"
            )
        self.take(found)
        return found.iteration, found.state

    def take(self, found: checkpoint.Checkpoint) -> None:
        """Takes over a checkpoint of this run.

        Raises:
            FewstepError: its state.json lacks what this run needs.
        """
        try:
            scalers = {trainee.role: dict(found.state[f"{trainee.role}_loss_scaler"]) for trainee in self.trainees}
            updates = int(found.state["ema_updates"])
        except (LookupError, TypeError, ValueError, OverflowError) as error:
            raise FewstepError(
                f"found a state.json in {found.folder} without what this run needs ({type(error).__name__}: {error}), "
                "expected loss scales and updates, fix: move this checkpoint away, so that the one before is used"
            ) from error
        for trainee in self.trainees:
            optimiser = found.tensors(f"{trainee.role}_optimiser")
            trainee.load(found.tensors(trainee.role), optimiser, scalers[trainee.role])
        copy_tensors(self.ema.tensors, found.tensors("ema"), "ema")
        self.ema.updates = updates
