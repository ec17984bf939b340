"""Every setting of TDM and the presets built from them. Section numbers are those of the card `tdm.md`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from torch import Tensor

from fewstep.losses.critic import CriticTarget, Importance
from fewstep.methods.matching_options import MOST, MatchingOptions, contradiction, require
from fewstep.methods.tau import TauRange, tau_bounds
from fewstep.unread import refuse_unread

if TYPE_CHECKING:
    from fewstep.methods.tdm import TDM

LandingTime = Literal["fixed", "random"]
LossOn = Literal["denoised", "landing"]
Segments = Literal["one", "all"]

_CHOICES: dict[str, tuple[str, ...]] = {
    "tau_range": get_args(TauRange),
    "landing": get_args(LandingTime),
    "critic_target": get_args(CriticTarget),
    "importance": get_args(Importance),
    "loss_on": get_args(LossOn),
    "segments": get_args(Segments),
}


@dataclass(frozen=True)
class TDMOptions(MatchingOptions):
    """Settings of TDM: those of all matching methods, and its own. Times are in [0, 1]: data at 0, noise at 1."""

    tau_range: TauRange = "separate"
    """`separate`: from the landing time to the call's own (paper); `to_T`: to the start of the grid (TDM-R1)."""
    landing: LandingTime = "fixed"
    """`fixed` on the grid (paper); `random`: at a uniform time within the segment (demo's randmid)."""
    segments: Segments = "one"
    """Calls that a loss visits per sample: `one` drawn at random (demo), or `all` of them (Flow-Factory)."""
    critic_target: CriticTarget = "exact"
    """`denoised`: the student's own prediction (paper); `exact`: eq. 10, right at every boundary, with its weight
    (beta/sigma)^2 (Phased DMD)."""
    importance: Importance = "none"
    """Density ratio in the critic's loss, for the denoised target only: `mean` is eq. 9 (demo), `clipped_sum` the true
    ratio within [1/20, 20] (Flow-Factory)."""
    critic_call_condition: bool = False
    """Tell the critic the landing time; advised by the authors with to_T, where its laws overlap (card 2.3)."""
    solver_weight: float = 0.0
    """Weight, 0 or more, of the squared distance of a landing point from where the guided teacher's own solver gets
    from the same input: progressive distillation on the student's path. Ours: the fixed point of guided matching is not
    what guided sampling samples (docs/findings/guided-fixed-point.md); this term keeps the student near the latter."""
    solver_substeps: int = 2
    """Steps of that solver in a segment, 1 or more; each costs two more forwards, one where there is no guidance."""
    solver_guidance: float | None = None
    """Guidance of that solver, 0 or more, 1 = none: that of the samples one wants; `guidance_scale` unless told. Guided
    matching at 4 steps rests below the guidance it is told, so give it more than the solver (ours:
    docs/findings/guided-fixed-point.md)."""
    loss_on: LossOn = "denoised"
    """What is pulled along the direction: the `denoised` sample (all released code) or the `landing` point (paper)."""

    def build(self) -> TDM:
        """The method with these settings."""
        from fewstep.methods.tdm import TDM

        return TDM(self)

    def validate(self) -> None:
        self.require_choices(_CHOICES)
        super().validate()
        self._validate_critic()
        self._validate_solver()
        counts = self.counts
        if self.segments == "all" and any(max(counts) % count for count in counts):
            raise contradiction(
                f"segments 'all' with step_counts {counts}",
                "counts that divide the largest, so that every call is visited equally often",
                "use 1, 2, 4, 8 or segments 'one'",
            )
        for count in counts:
            self._validate_segments(self.time_grid(count))

    def _validate_solver(self) -> None:
        require(self.solver_weight >= 0, "solver_weight", self.solver_weight, "0 or more", "use 0.5, or 0 for none")
        require(1 <= self.solver_substeps <= MOST, "solver_substeps", self.solver_substeps, f"1 to {MOST}", "use 2")
        if self.solver_guidance is not None:
            require(self.solver_guidance >= 0, "solver_guidance", self.solver_guidance, "0 or more", "1 means none")
        if not self.solver_weight:
            refuse_unread(self, ["solver_substeps", "solver_guidance"], "a solver_weight above 0")
        if self.solver_weight and (self.eta != 1 or self.landing != "fixed"):
            raise contradiction(
                f"solver_weight {self.solver_weight} with eta {self.eta} and landing {self.landing!r}",
                "a path of the solver's kind, eta 1 and landing 'fixed'",
                "set solver_weight to 0",
            )

    def _validate_critic(self) -> None:
        if self.critic_target == "exact" and self.importance != "none":
            raise contradiction(
                f"importance {self.importance!r} with the exact critic target",
                "no importance weight there, since the target already belongs to the law that is asked about",
                "set importance to 'none', or critic_target to 'denoised'",
            )
        if self.critic_target == "exact" and self.critic_weight == "beta_ratio":
            raise contradiction(
                "critic_weight 'beta_ratio' with the exact critic target",
                "another weight, since that target is always weighted by (beta/sigma)^2",
                "use critic_weight 'one', which then means just that factor",
            )
        uses_margin = self.critic_target == "exact" or self.importance == "clipped_sum" or self.landing == "random"
        if uses_margin and self.margin == 0:
            raise contradiction(
                "margin 0 with an exact critic target, a clipped_sum importance or a random landing",
                "a margin above 0, since these are singular where tau meets the landing point",
                "use margin 0.01",
            )

    def _validate_segments(self, grid: Tensor) -> None:
        """Every segment has room for tau, and for a random landing below it."""
        margin = self.margin if self.landing == "fixed" else 1.5 * self.margin
        low, high = tau_bounds(grid[1:], grid[:-1], margin=margin, tau_min=self.tau_min, shift=self.shift)
        if bool((low >= high).any()):
            narrow = int((high - low).argmin())
            raise contradiction(
                f"no room for tau in the segment [{grid[narrow + 1]:.4g}, {grid[narrow]:.4g}] with "
                f"tau_min {self.tau_min} and margin {self.margin}",
                "every segment to keep some",
                "lower margin or tau_min, or use fewer steps",
            )


def tdm() -> TDMOptions:
    """Our default: 4 steps, exact critic target, loss on the landing point."""
    return TDMOptions(loss_on="landing")


def tdm_paper() -> TDMOptions:
    """As published, with the authors' demo where the paper is silent (min-SNR, margins)."""
    return TDMOptions(
        critic_target="denoised",
        importance="mean",
        normaliser="none",
        metric="huber_vector",
        huber_c=0.00054,
        loss_on="landing",
    )


def tdm_unify() -> TDMOptions:
    """One student for 1, 2, 4 and 8 steps, told how many (paper: 1, 2, 4)."""
    return TDMOptions(step_counts=(1, 2, 4, 8), steps_condition=True, loss_on="landing")
