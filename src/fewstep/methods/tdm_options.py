"""Every setting of TDM and the presets built from them. Section numbers are those of the card `tdm.md`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from torch import Tensor

from fewstep.core import grids
from fewstep.errors import FewstepError
from fewstep.losses.critic import CriticTarget, CriticWeight, Importance
from fewstep.losses.matching import Metric, Normaliser
from fewstep.methods.tau import TauLaw, TauRange, tau_bounds

if TYPE_CHECKING:
    from fewstep.methods.tdm import TDM

LandingTime = Literal["fixed", "random"]
LossOn = Literal["denoised", "landing"]
Segments = Literal["one", "all"]

_CHOICES: dict[str, tuple[str, ...]] = {
    "tau_range": get_args(TauRange),
    "tau_law": get_args(TauLaw),
    "landing": get_args(LandingTime),
    "critic_target": get_args(CriticTarget),
    "importance": get_args(Importance),
    "critic_weight": get_args(CriticWeight),
    "normaliser": get_args(Normaliser),
    "metric": get_args(Metric),
    "loss_on": get_args(LossOn),
    "segments": get_args(Segments),
}


@dataclass(frozen=True)
class TDMOptions:
    """Settings of TDM. Times are in [0, 1]: data at 0, noise at 1."""

    # The path
    steps: int = 4
    """Network calls K of the student, 1 or more; with step_counts, the one used when none is asked for (paper: 4)."""
    step_counts: tuple[int, ...] = ()
    """TDM-unify: each sample's K is drawn from these. Empty: always `steps` (paper: 1, 2, 4)."""
    steps_condition: bool = False
    """Tell K to student and critic; a student that is not told cannot serve two step counts (card 8.2, item 10)."""
    shift: float = 1.0
    """Shift of the time grid and of un-shifted time, above 0; 1 is uniform (paper), 3 usual for flows (TDM-R1)."""
    start_time: float = 1.0
    """Time of the first call, in (0, 1]; pure noise is taken for the law there (paper: 1; demo: 0.9)."""
    grid: tuple[float, ...] = ()
    """Times of the K calls, falling, within (0, 1], instead of the uniform or shifted grid; for a single step count."""
    eta: float = 1.0
    """Share of its own noise that a landing keeps, in [0, 1]: 1 is deterministic (paper), 0.9 Video-BLADE's."""

    # Where teacher and critic are asked
    tau_range: TauRange = "separate"
    """`separate`: from the landing time to the call's own (paper); `to_T`: to the start of the grid (TDM-R1)."""
    tau_law: TauLaw = "uniform"
    """`uniform` in t (demo), `uniform_unshifted` (TDM-R1) or `logit_normal`, cut to the range (Flow-Factory)."""
    logit_mean: float = 0.0
    """Mean of the logit-normal law (SD3: 0)."""
    logit_std: float = 1.0
    """Standard deviation of the logit-normal law, above 0 (SD3: 1)."""
    tau_min: float = 0.02
    """Lowest tau, a time in [0, 1) (demo: 20 of 1000 levels)."""
    margin: float = 0.01
    """Kept free at both ends of the tau range, in un-shifted time, [0, 0.5) (demo: 10 of 1000 at the upper end)."""
    landing: LandingTime = "fixed"
    """`fixed` on the grid (paper); `random`: at a uniform time within the segment (demo's randmid)."""
    segments: Segments = "one"
    """Calls that a loss visits per sample: `one` drawn at random (demo), or `all` of them (Flow-Factory)."""

    # The critic
    critic_target: CriticTarget = "exact"
    """`denoised`: the student's own prediction (paper); `exact`: eq. 10, right at every boundary, with its weight
    (beta/sigma)^2 (Phased DMD)."""
    importance: Importance = "none"
    """Density ratio in the critic's loss, for the denoised target only: `mean` is eq. 9 (demo), `clipped_sum` the true
    ratio within [1/20, 20] (Flow-Factory)."""
    critic_weight: CriticWeight = "min_snr"
    """Weight of the critic's squared x0 error: `min_snr` (demo), `inverse_sigma`, the error of velocity (TDM-R1),
    `beta_ratio`, (beta/sigma)^2, or `one`."""
    snr_cap: float = 5.0
    """Cap of min_snr, above 0; infinite means the plain error of eps (demo: 5)."""
    teacher_regularisation: float = 0.0
    """Weight, 0 or more, of the squared velocity difference of critic and teacher (TDM-R1: 0.02, BLADE: 0.5). Costs
    one more forward."""
    critic_call_condition: bool = False
    """Tell the critic the landing time; advised by the authors with to_T, where its laws overlap (card 2.3)."""
    critic_updates: int = 1
    """Critic updates per student update, 1 or more (paper: 1, Flow-Factory: 5)."""

    # The student
    guidance_scale: float = 3.5
    """Guidance of the teacher, 0 or more, 1 = none (paper: 3.5 for SD1.5 and PixArt, 8 for SDXL)."""
    normaliser: Normaliser = "dmd"
    """`dmd`: divide by each sample's mean distance of student and teacher (demo); `none` for one or two dimensions."""
    metric: Metric = "l2"
    """`l2` (TDM-R1), `huber_vector` (paper, eq. 7), `huber_elementwise` (demo)."""
    huber_c: float = 1e-3
    """Constant of the Huber metrics per element, in units of the data, above 0 (demo: 1e-3; paper: 0.00054)."""
    loss_on: LossOn = "denoised"
    """What is pulled along the direction: the `denoised` sample (all released code) or the `landing` point (paper)."""

    @property
    def counts(self) -> tuple[int, ...]:
        """The step counts that training draws from."""
        return self.step_counts or (self.steps,)

    def time_grid(self, steps: int) -> Tensor:
        """The K+1 times of a student with `steps` calls, float64 (`core.grids`)."""
        return grids.explicit(self.grid) if self.grid else grids.shifted(steps, self.shift, self.start_time)

    def build(self) -> TDM:
        """The method with these settings."""
        from fewstep.methods.tdm import TDM

        return TDM(self)

    def validate(self) -> None:
        """Refuses values out of range and settings that contradict each other.

        Raises:
            FewstepError: with what was found, what was expected and the likely fix.
        """
        for name, choices in _CHOICES.items():
            found = getattr(self, name)
            _require(found in choices, name, repr(found), f"one of {choices}", "choose one of them")
        self._validate_ranges()
        self._validate_path()
        self._validate_critic()
        for count in self.counts:
            self._validate_segments(self.time_grid(count))

    def _validate_ranges(self) -> None:
        above_zero = ("shift", "logit_std", "snr_cap", "huber_c")
        for name in above_zero:
            _require(getattr(self, name) > 0, name, getattr(self, name), "a number above 0", "leave it at its default")
        for name in ("teacher_regularisation", "guidance_scale"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more", "leave it at its default")
        _require(self.critic_updates >= 1, "critic_updates", self.critic_updates, "1 or more", "use 1 to 5")
        start = self.start_time
        _require(0 < start <= 1, "start_time", start, "a time in (0, 1]", "1 starts at the last noise level")
        _require(0 <= self.eta <= 1, "eta", self.eta, "a number in [0, 1]", "1 is the deterministic path")
        _require(0 <= self.tau_min < 1, "tau_min", self.tau_min, "a time in [0, 1)", "use 0.02")
        _require(0 <= self.margin < 0.5, "margin", self.margin, "a number in [0, 0.5)", "use 0.01")
        _require(self.margin + self.tau_min > 0, "tau_min", 0, "tau above 0, where scores exist", "use tau_min 0.02")

    def _validate_path(self) -> None:
        counts = self.counts
        _require(min(counts) >= 1, "step counts", counts, "1 or more", "use 1 to 8 steps")
        _require(len(set(counts)) == len(counts), "step_counts", counts, "each once", "drop the repeated ones")
        _require(self.steps in counts, "steps", self.steps, f"one of step_counts {counts}", "add it or change it")
        if self.steps_condition and not self.step_counts:
            raise _contradiction("steps_condition without step_counts", "a set of step counts to tell apart", "add one")
        if self.grid and (self.step_counts or len(self.grid) != self.steps):
            raise _contradiction(
                f"a grid of {len(self.grid)} calls for the step counts {counts}",
                "one time per call of a single step count",
                "set steps to the grid's length, or use shift instead of a grid",
            )
        if self.grid and self.start_time != 1:
            raise _contradiction(
                f"start_time {self.start_time} with a grid written out",
                "the start as the grid's first time",
                "leave start_time at 1",
            )
        if self.segments == "all" and any(max(counts) % count for count in counts):
            raise _contradiction(
                f"segments 'all' with step_counts {counts}",
                "counts that divide the largest, so that every call is visited equally often",
                "use 1, 2, 4, 8 or segments 'one'",
            )

    def _validate_critic(self) -> None:
        if self.critic_target == "exact" and self.importance != "none":
            raise _contradiction(
                f"importance {self.importance!r} with the exact critic target",
                "no importance weight there, since the target already belongs to the law that is asked about",
                "set importance to 'none', or critic_target to 'denoised'",
            )
        if self.critic_target == "exact" and self.critic_weight == "beta_ratio":
            raise _contradiction(
                "critic_weight 'beta_ratio' with the exact critic target",
                "another weight, since that target is always weighted by (beta/sigma)^2",
                "use critic_weight 'one', which then means just that factor",
            )
        uses_margin = self.critic_target == "exact" or self.importance == "clipped_sum" or self.landing == "random"
        if uses_margin and self.margin == 0:
            raise _contradiction(
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
            raise _contradiction(
                f"no room for tau in the segment [{grid[narrow + 1]:.4g}, {grid[narrow]:.4g}] with "
                f"tau_min {self.tau_min} and margin {self.margin}",
                "every segment to keep some",
                "lower margin or tau_min, or use fewer steps",
            )


def _require(good: bool, name: str, found: Any, expected: str, fix: str) -> None:
    if not good:
        raise FewstepError(f"found {name} = {found}, expected {expected}, fix: {fix}")


def _contradiction(found: str, expected: str, fix: str) -> FewstepError:
    return FewstepError(f"found {found}, expected {expected}, fix: {fix}")


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
