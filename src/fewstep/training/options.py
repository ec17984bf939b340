"""What a training run can be told, and the learning rate that follows from it."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

from fewstep.errors import FewstepError
from fewstep.training.optimisers import Optimiser, require
from fewstep.unread import refuse_unread

#: Options that may change when a run is resumed: they decide what is written and when, or only the rounding.
FREE_ON_RESUME = frozenset(
    {
        *("microbatch", "log_every", "sample_every", "evaluate_every", "checkpoint_every", "keep", "tensorboard"),
        *("tracker", "on_alarm", "patience", "log_most", "sample_most"),
    }
)


_MOST, _LARGEST_BATCH = 2**31, 2**20
"""Counts above them are taken for a mistake."""


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Everything the trainer reads. What the *method* reads (steps, guidance, critic updates) is in its own options.

    "Ours" as a source means chosen for the embedded teacher with adapters; "paper" is TDM, arXiv 2503.06674.
    """

    iterations: int = 400
    """Iterations, 1 or more; each is one student update and its critic updates. Ours; paper: 500 to 20k."""
    batch: int = 32
    """Samples per iteration over all processes together, 1 or more. Paper: 32 for PixArt-alpha."""
    microbatch: int = 0
    """Samples per forward pass and process; 0: the whole share at once. Changes memory, not the result."""
    seed: int = 0
    """Seed of every random draw, 0 or more."""
    student_rate: float = 1e-4
    """Peak learning rate of the student, 0 or more. BLADE: 1e-4 for adapters; paper: 2e-6 for all weights."""
    critic_rate: float = 4e-4
    """Peak learning rate of the critic, 0 or more. TDM-R1: 4 times the student's; paper: 10 times."""
    optimiser: Optimiser = "adamw"
    """`adamw`, or `adamw8bit` with moments of a byte each (bitsandbytes): a quarter of the optimiser's memory."""
    beta1: float = 0.0
    """AdamW's decay of the mean gradient, [0, 1). Paper: 0 on every backbone."""
    beta2: float = 0.999
    """AdamW's decay of the mean squared gradient, [0, 1). Paper: 0.999 (released code 0.95)."""
    weight_decay: float = 0.01
    """AdamW's weight decay, 0 or more. Released code: 0.01."""
    schedule: Literal["constant", "cosine"] = "constant"
    """Course of both learning rates after the warm-up. TDM-R1: constant; released code: cosine."""
    warmup: int = 10
    """Iterations of linear rise of both rates, 0 or more. Ours; released code 50 of 10,000."""
    final_rate: float = 0.0
    """Share of the peak rate that the cosine schedule ends at, [0, 1]. Ours."""
    student_clip: float = 1.0
    """Largest norm of the student's whole gradient; 0: no clipping. Paper: 1."""
    critic_clip: float = 1.0
    """Largest norm of the critic's whole gradient; 0: no clipping. TDM-R1: 1."""
    ema_decay: float = 0.99
    """Decay per iteration of the averaged student, [0, 1); 0: no average is kept. Ours; TDM-R1 0.9."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Arithmetic inside the networks; losses, optimisers and averages stay fp32. On most CPUs bf16 is far slower."""
    log_every: int = 10
    """Iterations between lines of `log.jsonl`; here and below there is one at the last iteration, for 0 only there."""
    log_most: int = 10_000
    """Lines of the log, TensorBoard's and trackers' too, before they become rarer: after so many they come half as
    often, and half as often again whenever the run has doubled, so that no run fills a disk. 0: never. Evaluations and
    alarms are always told."""
    sample_every: int = 0
    """Iterations between sample grids; above 0 it needs a sample hook."""
    sample_most: int = 100
    """Sample grids (one for each number of steps) before they become rarer, as lines of the log do. 0: never."""
    evaluate_every: int = 0
    """Iterations between evaluations; above 0 it needs an evaluate hook."""
    checkpoint_every: int = 100
    """Iterations between checkpoints. A signal that stops the run saves one too."""
    keep: int = 3
    """Checkpoints kept, the newest ones, 1 or more."""
    tensorboard: bool = True
    """Also write the log as TensorBoard events."""
    tracker: str = "none"
    """Where else the log goes: `wandb`, `mlflow` or `trackio`, each an extra of that name; `none`: nowhere."""

    on_alarm: Literal["warn", "act", "off"] = "warn"
    """What monitors do (docs/monitors.md): `warn` tells; `act` also skips bad steps, rolls back with lower rates, or
    stops; `off` does not look. A loss that is not finite stops the run unless they `act`."""
    patience: int = 0
    """Evaluations without a better score after which the run ends; 0: it never ends early."""

    def validate(self) -> None:
        """Raises FewstepError that names the first option outside its range."""
        for name in ("iterations", "batch", "keep"):
            self._require(name, getattr(self, name) >= 1, "at least 1")
        never_negative = ("microbatch", "seed", "warmup", "student_rate", "critic_rate", "weight_decay", "student_clip")
        every = ("critic_clip", "log_every", "sample_every", "evaluate_every", "checkpoint_every", "patience")
        most = ("log_most", "sample_most")
        for name in never_negative + every + most:
            self._require(name, 0 <= getattr(self, name) < math.inf, "a finite number, 0 or more")
        for name in ("iterations", "warmup", "keep", *every[1:], *most):
            self._require(name, getattr(self, name) < _MOST, f"below {_MOST}")
        for name in ("batch", "microbatch"):
            self._require(name, getattr(self, name) <= _LARGEST_BATCH, f"at most {_LARGEST_BATCH}")
        self._require("seed", self.seed < 2**63, "below 2^63")
        for name in ("beta1", "beta2", "ema_decay"):
            self._require(name, 0 <= getattr(self, name) < 1, "at least 0 and below 1")
        self._require("final_rate", 0 <= self.final_rate <= 1, "between 0 and 1")
        self._require("optimiser", self.optimiser in get_args(Optimiser), "adamw or adamw8bit")
        require(self.optimiser)
        self._require("schedule", self.schedule in ("constant", "cosine"), "constant or cosine")
        self._require("precision", self.precision in ("fp32", "bf16", "fp16"), "fp32, bf16 or fp16")
        self._require("on_alarm", self.on_alarm in ("warn", "act", "off"), "warn, act or off")
        may_wait = self.evaluate_every > 0 or not self.patience
        self._require("patience", may_wait, "0 where evaluate_every is 0, as nothing is scored")
        self._require("warmup", self.warmup <= self.iterations, f"at most iterations = {self.iterations}")
        if self.schedule == "constant":
            refuse_unread(self, ["final_rate"], "schedule 'cosine'")
        for name in ("log", "sample"):
            if not getattr(self, f"{name}_every"):
                refuse_unread(self, [f"{name}_most"], f"{name}_every above 0")

    def _require(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            flag = name.replace("_", "-")
            raise FewstepError(f"found {name} = {getattr(self, name)!r}, expected {expected}, fix: change --{flag}")

    def rate(self, role: str, iteration: int) -> float:
        """Learning rate of `role`, "student" or "critic", at `iteration` (1, 2, ...).

        Linear over the first `warmup` iterations; then constant, or half a cosine from the peak down to
        `final_rate` x peak, which the iteration after the last would have.
        """
        peak = self.student_rate if role == "student" else self.critic_rate
        if iteration <= self.warmup:
            return peak * iteration / self.warmup
        if self.schedule == "constant":
            return peak
        done = (iteration - self.warmup) / (self.iterations - self.warmup + 1)  # (0, 1)
        return peak * (self.final_rate + (1 - self.final_rate) * 0.5 * (1 + math.cos(math.pi * done)))

    def due(self, every: int, iteration: int, most: int = 0) -> bool:
        """Whether what happens `every` so many iterations, and at the last one, happens after `iteration`.

        Above 0, after `most` times it happens half as often, and half as often again whenever the number of iterations
        has doubled: `most` / 2 times for each doubling. A function of the iteration alone, so that a resumed run does
        what an undisturbed one does.
        """
        if most > 0 and every > 0:
            every <<= ((iteration - 1) // (every * most)).bit_length()
        return iteration == self.iterations or (every > 0 and iteration % every == 0)

    def deciding(self) -> dict[str, Any]:
        """The options that decide the result and must therefore be the same when a run is resumed.

        `iterations` decides it only through the cosine schedule: a run at constant rates may be continued for longer.
        """
        free = FREE_ON_RESUME if self.schedule == "cosine" else FREE_ON_RESUME | {"iterations"}
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in free}


def refuse_sharded(options: TrainOptions, processes: int, quantised: str | None = None) -> None:
    """Refuses what `processes` that share all weights among them cannot do.

    Raises:
        FewstepError: a rounded base, a batch that is no multiple of them, 8-bit moments, or fp16.
    """
    if quantised is not None:
        raise FewstepError(
            f"found a base in {quantised} for a sharded run, expected bfloat16 or float32, since rounded weights are "
            "not divided, fix: --base-dtype bfloat16, or leave --shard off"
        )
    if options.optimiser != "adamw":
        raise FewstepError(
            f"found optimiser = {options.optimiser} for a sharded run, expected adamw, whose moments are divided among "
            "the processes, fix: --optimiser adamw, or leave --shard off"
        )
    if options.batch % processes:
        raise FewstepError(
            f"found batch = {options.batch} for {processes} processes that share their weights, expected a multiple, "
            "so that all make the same calls, fix: change --batch or the number of processes"
        )
    if options.precision == "fp16":
        raise FewstepError(
            "found precision fp16 for sharded roles, expected fp32 or bf16 (a loss scale would have to be agreed on), "
            "fix: --precision bf16"
        )
