"""Phased DMD (Fan et al., arXiv 2510.27684): one expert per range of noise levels, trained one after the other.

The K calls of a student are cut into phases. The expert of a phase takes noise from where the phase before left it down
to the phase's boundary s, and laws are compared there: the sample x_s, itself noisy, is renoised to tau in (s, 1), and
teacher and critic are asked about that. The critic's target is the exact one (`losses.critic.exact_target`), without
which teacher minus critic would not be a difference of scores; earlier experts are frozen. Within a phase, calls before
a random one are made as in sampling, and that one jumps straight to the boundary. Section and equation numbers are
those of the card `phased_dmd.md`.

This method trains one phase, `options.phase`; `training.phases` runs all of them, each with a fresh critic. The student
of the roles is expected to pick the expert by time (`models.experts`).

Needs a critic. Where a phase has several calls, the published critic sees the jumps of all of them together, and only
their *mixture* is matched: one call may make up for what another cannot do, and the one that samples end with is then
off (docs/findings/random-truncation.md). `critic_call_condition`, or one call per phase, puts that right.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from fewstep.core.process import Process
from fewstep.core.rollout import Landing, Path
from fewstep.core.streams import Draw
from fewstep.core.tensors import Condition
from fewstep.losses.critic import CriticWeight, critic_weight, exact_target
from fewstep.methods.base import LANDING, Needs, Roles
from fewstep.methods.matching import Matching, Query
from fewstep.methods.matching_options import MatchingOptions, contradiction, require
from fewstep.methods.tau import tau_bounds

Intervals = Literal["nested", "disjoint"]
PullOn = Literal["denoised", "landing"]
PullWeight = Literal["one", "kl"]

_CHOICES: dict[str, tuple[str, ...]] = {
    "intervals": get_args(Intervals),
    "pull_on": get_args(PullOn),
    "pull_weight": get_args(PullWeight),
}


@dataclass(frozen=True)
class PhasedOptions(MatchingOptions):
    """Settings of Phased DMD: those of all matching methods, and its own. Times are in [0, 1]: data at 0."""

    phase_calls: tuple[int, ...] = (2, 2)
    """Network calls of each phase, noise first; they add up to `steps` (paper: 2, 2 and 1, 1, 1, 1)."""
    phase: int = 1
    """The phase that is trained, 1 to the number of phases; a run of all phases sets it itself."""
    intervals: Intervals = "nested"
    """Where laws are compared: `nested`, from the boundary to the start (paper), or `disjoint`, to the phase's own
    first call, as TDM has it (paper: worse)."""
    critic_weight: CriticWeight = "inverse_sigma"
    """Weight of the critic's squared x0 error; `inverse_sigma` is the error of flow velocity (paper)."""
    critic_clamp: float = 10.0
    """c in the further weight min(1, c beta^2) of the critic's error, above 0: its target's variance grows as 1/beta^2
    where tau meets the boundary (eq. 13: 10)."""
    critic_call_condition: bool = False
    """Tell the critic the time of the call whose jump it is asked about, so that each call's own law is matched and not
    the mixture of a phase's calls (paper: not told)."""
    critic_updates: int = 5
    """Critic updates per student update, 1 or more (paper: 5)."""
    pull_on: PullOn = "denoised"
    """What is pulled along the direction: the `denoised` sample (authors' code) or the `landing` point (paper)."""
    pull_weight: PullWeight = "one"
    """Weight of the direction: `one`, or `kl`, which makes it the very gradient of the divergence (eq. 10)."""

    @property
    def ends(self) -> tuple[int, ...]:
        """For each phase, the number of calls made when it is over; the phase's boundary is the grid's time there."""
        return tuple(sum(self.phase_calls[: phase + 1]) for phase in range(len(self.phase_calls)))

    def build(self) -> Phased:
        """The method with these settings."""
        return Phased(self)

    def validate(self) -> None:
        self.require_choices(_CHOICES)
        super().validate()
        calls, phases = self.phase_calls, len(self.phase_calls)
        require(bool(calls) and min(calls) >= 1, "phase_calls", calls, "1 or more calls in each phase", "use 2, 2")
        require(1 <= self.phase <= phases, "phase", self.phase, f"1 to {phases}", "leave it to the run")
        require(self.critic_clamp > 0, "critic_clamp", self.critic_clamp, "a number above 0", "use 10")
        require(self.margin > 0, "margin", 0, "a number above 0 (the target is singular at the boundary)", "use 0.01")
        if self.step_counts or sum(calls) != self.steps:
            raise contradiction(
                f"phase_calls {calls} for the step counts {self.counts}",
                "one step count, which the phases add up to",
                "set steps to their sum and leave step_counts empty",
            )
        grid = self.time_grid(self.steps)
        for phase in range(1, phases + 1):
            floor, ceiling = self._levels_of(phase, grid)
            low, high = tau_bounds(floor, ceiling, margin=self.margin, tau_min=self.tau_min, shift=self.shift)
            if bool((low >= high).any()):
                raise contradiction(
                    f"no room for tau in phase {phase}, between {float(floor):.4g} and {float(ceiling):.4g}",
                    "every phase to keep some",
                    "lower margin or tau_min, or use fewer phases",
                )

    def _levels_of(self, phase: int, grid: Tensor) -> tuple[Tensor, Tensor]:
        """Floor and ceiling (...,) of the levels of a phase, from grids (..., K+1)."""
        first = self.ends[phase - 1] - self.phase_calls[phase - 1]
        return grid[..., self.ends[phase - 1]], grid[..., 0 if self.intervals == "nested" else first]

    def levels(self, grid: Tensor) -> tuple[Tensor, Tensor]:
        """Floor, which is the boundary, and ceiling (B,) of the trained phase's levels; `grid` (B, K+1)."""
        return self._levels_of(self.phase, grid)


class Phased(Matching):
    """One phase of Phased DMD with the given options; see `PhasedOptions` for every setting and its source."""

    name: ClassVar[str] = "phased"
    title: ClassVar[str] = "Phased Distribution Matching Distillation"
    paper: ClassVar[str] = "arXiv 2510.27684"
    options: PhasedOptions

    @property
    def needs(self) -> Needs:
        return replace(super().needs, landing_condition=self.options.critic_call_condition)

    def forwards(self, steps: int | None = None) -> float:
        """Expected network forwards per sample and iteration: those of the earlier phases' calls, and of this one."""
        calls = self.options.phase_calls[self.options.phase - 1]
        return self._first_call + super().forwards(calls)

    @property
    def _first_call(self) -> int:
        o = self.options
        return o.ends[o.phase - 1] - o.phase_calls[o.phase - 1]

    def _visits(self, path: Path, draw: Draw) -> list[tuple[Tensor, Draw]]:
        """A random call of the phase, per sample."""
        calls = self.options.phase_calls[self.options.phase - 1]
        return [(self._first_call + draw.integers("call", calls), draw)]

    def _compared(self, path: Path, landing: Landing, draw: Draw) -> Landing:
        """The call's jump straight to the boundary."""
        return path.landing_at(landing, self.options.levels(path.grid)[0])

    def _levels(self, path: Path, landing: Landing) -> tuple[Tensor, Tensor]:
        """From the boundary upwards."""
        floor, ceiling = self.options.levels(path.grid)
        return floor.to(landing.t), ceiling.to(landing.t)

    def _critic_target(self, process: Process, landing: Landing, query: Query) -> tuple[Tensor, Tensor]:
        """Eq. 11 to 13."""
        o = self.options
        _, beta = process.transition(landing.t, query.tau)
        weight = critic_weight(o.critic_weight, process, landing.t, query.tau, o.snr_cap)
        clamp = (o.critic_clamp * beta.square()).clamp(max=1)
        return exact_target(process, query.x, landing.t, query.tau, query.noise), weight * clamp

    def _critic_condition(self, landing: Landing) -> Condition:
        """The prompt, and the time of the call if the critic is to be told it; networks read it as "landing"."""
        if not self.options.critic_call_condition:
            return landing.condition
        return landing.condition | {LANDING: landing.t_from}

    def _sample_weight(self, roles: Roles, query: Query, condition: Condition) -> Tensor:
        weight = super()._sample_weight(roles, query, condition)
        if self.options.pull_weight == "one":
            return weight
        o = self.options
        boundary = torch.full_like(query.tau, float(o.levels(o.time_grid(o.steps))[0]))
        return weight * kl_weight(roles.process, boundary, query.tau)

    def _pulled(self, landing: Landing) -> Tensor:
        return landing.denoised if self.options.pull_on == "denoised" else landing.x


def kl_weight(process: Process, boundary: Tensor, tau: Tensor) -> Tensor:
    """alpha_tau r / sigma_tau^2, shape (B,): times teacher minus critic it is -dKL/dx_s of a sample (eq. 10).

    Eq. 10 has velocities, whose difference is -(alpha + sigma)/sigma times that of denoised samples.
    """
    r, _ = process.transition(boundary, tau)
    return process.alpha(tau) * r / process.sigma(tau).square()


def phased() -> PhasedOptions:
    """Our default: two phases of two calls, loss on the denoised sample with DMD's normaliser (authors' code)."""
    return PhasedOptions()


def phased_paper() -> PhasedOptions:
    """As the paper states it for flow teachers of shift 5 (Wan); it does not say how training is guided."""
    return PhasedOptions(
        shift=5.0,
        tau_law="uniform_unshifted",
        normaliser="none",
        pull_on="landing",
        pull_weight="kl",
        guidance_scale=4.0,
    )
