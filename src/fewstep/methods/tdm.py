"""TDM: Trajectory Distribution Matching (Luo, Hu, Sun, Cai, Tang, arXiv 2503.06674, ICCV 2025), and TDM-unify.

A K-step student walks its own deterministic path x_{t_K} -> ... -> x_{t_0}. For every landing point x_{t_i}, the law of
its renoised version x_tau, tau in the segment above it, is matched to the teacher's by the difference of two scores:
the frozen teacher's, and that of a critic trained on the student's own landing points. No images, no teacher sampling;
the gradient goes through one student call. Equation numbers are those of the card `tdm.md`.

Needs a critic and, for a set of step counts, networks that read the condition "steps". At K = 4, guided, with one
critic update, it costs 7.75 expected network forwards per sample and iteration.

Signs of failure: `real_fake_cosine` falls (the critic lags: more critic updates or a higher critic rate);
`denoised_std` grows (saturation: less guidance); few samples dominate the loss (normaliser "dmd" in one or two
dimensions).
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from fewstep.core import grids
from fewstep.core.guidance import guided
from fewstep.core.process import Process
from fewstep.core.rollout import Landing, Path
from fewstep.core.solvers import ddim_step, land
from fewstep.core.streams import Draw
from fewstep.core.tensors import Condition
from fewstep.losses.critic import beta_ratio, critic_weight, exact_target, importance_weight
from fewstep.losses.matching import metric
from fewstep.methods.base import LANDING, Needs, Roles
from fewstep.methods.matching import Matching, Query, prompt_of
from fewstep.methods.tdm_options import TDMOptions


class TDM(Matching):
    """Trajectory Distribution Matching with the given options; see `TDMOptions` for every setting and its source."""

    name: ClassVar[str] = "tdm"
    title: ClassVar[str] = "Trajectory Distribution Matching"
    paper: ClassVar[str] = "arXiv 2503.06674"
    options: TDMOptions

    @property
    def needs(self) -> Needs:
        return replace(super().needs, landing_condition=self.options.critic_call_condition)

    def forwards(self, steps: int | None = None) -> float:
        if steps is None or self.options.segments == "one":
            return super().forwards(steps)
        return steps + max(self.options.counts) * self._forwards_of_losses()

    def _forwards_of_losses(self) -> float:
        o = self.options
        solver = o.solver_substeps * (1 if self._solver_guidance == 1 else 2) if o.solver_weight else 0
        return super()._forwards_of_losses() + solver

    def _visits(self, path: Path, draw: Draw) -> list[tuple[Tensor, Draw]]:
        """One call per sample, or all in turn."""
        if self.options.segments == "one":
            return super()._visits(path, draw)
        return [(index % path.steps, draw.sub(index)) for index in range(int(path.steps.max()))]

    def _compared(self, path: Path, landing: Landing, draw: Draw) -> Landing:
        """The landing point x_{t_i}: on the grid, or at a random time within its segment."""
        o = self.options
        if o.landing == "fixed":
            return landing
        low, high = (grids.unshift_time(t.double(), o.shift) for t in (landing.t, landing.t_from))
        u = torch.lerp(low, high - 3 * o.margin, draw.uniform("landing").to(low))  # leaves tau a margin's width
        return path.landing_at(landing, grids.shift_time(u, o.shift))

    def _levels(self, path: Path, landing: Landing) -> tuple[Tensor, Tensor]:
        """From the landing time upwards (card 2.3)."""
        top = landing.t_from if self.options.tau_range == "separate" else path.grid[:, 0].to(landing.t)
        return landing.t, top

    def _critic_target(self, process: Process, landing: Landing, query: Query) -> tuple[Tensor, Tensor]:
        o = self.options
        weight = critic_weight(o.critic_weight, process, landing.t, query.tau, o.snr_cap)
        if o.critic_target == "exact":
            target = exact_target(process, query.x, landing.t, query.tau, query.noise)  # eq. 10
            return target, weight * beta_ratio(process, landing.t, query.tau)
        ratio = importance_weight(o.importance, process, landing.eps_hat, query.noise, landing.t, query.tau)  # eq. 9
        return landing.denoised, weight * ratio

    def _critic_condition(self, landing: Landing) -> Condition:
        """The prompt, K if the student is told it, and the landing time if the critic is to be told."""
        if not self.options.critic_call_condition:
            return landing.condition
        return landing.condition | {LANDING: landing.t}

    def _further_terms(self, roles: Roles, landing: Landing, query: Query) -> dict[str, tuple[float, Tensor]]:
        """How far the landing point is from the guided teacher's own, from the same input."""
        terms = super()._further_terms(roles, landing, query)
        if self.options.solver_weight:
            distance = metric("l2", landing.x - self._solver_landing(roles, landing), c=0.0)
            terms["solver"] = self.options.solver_weight, distance
        return terms

    @property
    def _solver_guidance(self) -> float:
        told = self.options.solver_guidance
        return self.options.guidance_scale if told is None else told

    @torch.no_grad()
    def _solver_landing(self, roles: Roles, landing: Landing) -> Tensor:
        """(B, ...) where the guided teacher's DDIM gets in `solver_substeps` steps of equal length."""
        o, process, condition = self.options, roles.process, prompt_of(landing.condition)
        x, t = land(process, landing.denoised, landing.eps_hat, landing.t_from), landing.t_from  # the call's own input
        for step in range(1, o.solver_substeps + 1):
            to = torch.lerp(landing.t_from, landing.t, step / o.solver_substeps)
            denoised = guided(roles.teacher, x, t, condition, roles.null(condition), self._solver_guidance)
            x, t = ddim_step(process, x, denoised, t, to), to
        return x

    def _pulled(self, landing: Landing) -> Tensor:
        return landing.denoised if self.options.loss_on == "denoised" else landing.x
