"""Settings that all methods of distribution matching share: the path, the noise levels, critic, student, divergence.

Each method's own options extend these and set their defaults; what a paper has and what ours is, is said there. So the
parts of one method can be had in another by options alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal, get_args

from torch import Tensor

from fewstep.core import grids
from fewstep.errors import FewstepError
from fewstep.losses.critic import CriticWeight
from fewstep.losses.divergence import Divergence
from fewstep.losses.matching import Metric, Normaliser
from fewstep.methods.tau import TauLaw, tau_bounds
from fewstep.unread import refuse_unread

if TYPE_CHECKING:
    from fewstep.methods.base import ChainNoise, Method

MOST = 1000
"""Above it a number of calls, updates or bins is taken for a mistake."""
Guidance = Literal["coupled", "decoupled"]
GuidanceLevels = Literal["cleaner", "full", "shared", "noisier"]

_CHOICES: dict[str, tuple[str, ...]] = {
    "tau_law": get_args(TauLaw),
    "critic_weight": get_args(CriticWeight),
    "normaliser": get_args(Normaliser),
    "metric": get_args(Metric),
    "divergence": get_args(Divergence),
    "guidance": get_args(Guidance),
    "guidance_levels": get_args(GuidanceLevels),
}


@dataclass(frozen=True)
class MatchingOptions:
    """Settings shared by the methods of distribution matching. Times are in [0, 1]: data at 0, noise at 1."""

    # The path
    steps: int = 4
    """Network calls K of the student, 1 or more. With step_counts nothing reads it: the largest of them is used when
    none is asked for."""
    step_counts: tuple[int, ...] = ()
    """Each sample's K is drawn from these (TDM-unify). Empty: always `steps`."""
    steps_condition: bool = False
    """Tell K to student and critic; a student that is not told cannot serve two step counts (card tdm 8.2, item 10)."""
    shift: float = 1.0
    """Shift of the time grid and of un-shifted time, above 0; 1 is uniform, 3 usual for flows."""
    start_time: float = 1.0
    """Time of the first call, in (0, 1]; pure noise is taken for the law there (TDM's demo: 0.9)."""
    grid: tuple[float, ...] = ()
    """Times of the K calls, falling, within (0, 1], instead of the uniform or shifted grid; for a single step count."""
    eta: float = 1.0
    """Share of its own noise that a step keeps, in [0, 1]: 1 is deterministic, 0 fresh noise at every step."""

    # Where teacher and critic are asked
    tau_law: TauLaw = "uniform"
    """`uniform` in t, `uniform_unshifted` (TDM-R1) or `logit_normal`, cut to the range (Flow-Factory)."""
    logit_mean: float = 0.0
    """Mean of the logit-normal law (SD3: 0)."""
    logit_std: float = 1.0
    """Standard deviation of the logit-normal law, above 0 (SD3: 1)."""
    tau_min: float = 0.02
    """Lowest tau, a time in [0, 1) (DMD: 20 of 1000 levels)."""
    margin: float = 0.01
    """Kept free at both ends of the tau range, in un-shifted time, [0, 0.5)."""

    # The critic
    critic_weight: CriticWeight = "min_snr"
    """Weight of the critic's squared x0 error: `min_snr` (TDM's demo), `inverse_sigma`, the error of velocity (TDM-R1),
    `snr`, the error of eps (DMD on Stable Diffusion), `beta_ratio`, (beta/sigma)^2, or `one`."""
    snr_cap: float = 5.0
    """Cap of min_snr, above 0 (TDM's demo: 5)."""
    teacher_regularisation: float = 0.0
    """Weight, 0 or more, of the squared velocity difference of critic and teacher (TDM-R1: 0.02, BLADE: 0.5). Costs
    one more forward."""
    critic_updates: int = 1
    """Critic updates per student update, 1 or more (TDM: 1, DMD2: 5 to 10)."""

    # The student
    guidance_scale: float = 3.5
    """Guidance of the teacher, 0 or more, 1 = none (TDM: 3.5 for SD1.5 and PixArt, 8 for SDXL)."""
    motion_guidance: float = 0.0
    """Guidance of what frames are told (tracks, a drive) beside that of text, 0 or more, 0 = none (MotionStream: 1.5
    with text at 3). Three answers of the teacher in one call; prompts have to come with controls."""
    guidance: Guidance = "coupled"
    """`coupled`: one query of the guided teacher; `decoupled`: guidance is a term of its own, with noise levels and a
    normaliser of its own (Decoupled DMD). Costs one more forward, unless the levels are shared."""
    guidance_levels: GuidanceLevels = "cleaner"
    """Decoupled guidance is asked about at levels `cleaner` than the student's call (the paper), over the `full` range,
    at those of the matching term (`shared`), or, to see what that does, at `noisier` ones."""
    joint_normaliser: bool = False
    """Decoupled terms are divided by one number, that of coupled guidance, and not each by its own."""
    normaliser: Normaliser = "dmd"
    """`dmd`: divide by each sample's mean distance of student and teacher; `none` for one or two dimensions."""
    metric: Metric = "l2"
    """`l2` (DMD, TDM-R1), `huber_vector` (TDM's paper, eq. 7), `huber_elementwise` (TDM's demo)."""
    huber_c: float = 1e-3
    """Constant of the Huber metrics per element, in units of the data, above 0 (TDM's paper: 0.00054)."""

    # Divergence and discriminator
    divergence: Divergence = "reverse_kl"
    """What is descended; all but `reverse_kl` weight each sample by a function of the density ratio of teacher and
    student (f-distill), which a discriminator provides unless the method is given a ratio of its own."""
    ratio_clip: tuple[float, float] = (0.1, 20.0)
    """Density ratios are kept between these (f-distill's code)."""
    ratio_bins: int = 10
    """Bins of tau in which the ratio's mean is set to 1, 1 or more (f-distill's code: 10)."""
    gan_weight: float = 0.0
    """Weight of the student's adversarial loss, 0 or more; above 0 it needs real data (DMD2: 1e-3 to 5e-3)."""
    discriminator_weight: float = 0.01
    """Weight of the discriminator's loss beside the critic's, above 0 (DMD2: 1e-2)."""

    @property
    def may_be_infinite(self) -> tuple[str, ...]:
        """Options for which infinity has a meaning."""
        return ()

    @property
    def chain_noise(self) -> ChainNoise:
        """New noise at every step."""
        return "fresh"

    @property
    def counts(self) -> tuple[int, ...]:
        """The step counts that training draws from."""
        return self.step_counts or (self.steps,)

    def time_grid(self, steps: int) -> Tensor:
        """The K+1 times of a student with `steps` calls, float64 (`core.grids`)."""
        return grids.explicit(self.grid) if self.grid else grids.shifted(steps, self.shift, self.start_time)

    def build(self) -> Method:
        """The method with these settings."""
        raise NotImplementedError

    def validate(self) -> None:
        """Refuses values out of range and settings that contradict each other.

        Raises:
            FewstepError: with what was found, what was expected and the likely fix.
        """
        self.require_choices(_CHOICES)
        require_finite(self, *self.may_be_infinite)
        self._validate_ranges()
        self._validate_path()
        self._validate_terms()
        self._validate_unread()

    def require_choices(self, choices: dict[str, tuple[str, ...]]) -> None:
        """Refuses a value that is not among those named for its field."""
        for name, allowed in choices.items():
            found = getattr(self, name)
            require(found in allowed, name, repr(found), f"one of {allowed}", "choose one of them")

    def _validate_ranges(self) -> None:
        above_zero = ("shift", "logit_std", "snr_cap", "huber_c", "discriminator_weight")
        for name in above_zero:
            require(getattr(self, name) > 0, name, getattr(self, name), "a number above 0", "leave it at its default")
        for name in ("teacher_regularisation", "guidance_scale", "motion_guidance", "gan_weight"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more", "leave it at its default")
        require(1 <= self.critic_updates <= MOST, "critic_updates", self.critic_updates, f"1 to {MOST}", "use 1 to 5")
        require(1 <= self.ratio_bins <= MOST, "ratio_bins", self.ratio_bins, f"1 to {MOST}", "use 10")
        low, high = self.ratio_clip
        require(0 < low < 1 < high, "ratio_clip", self.ratio_clip, "numbers below and above 1", "use (0.1, 20)")
        start = self.start_time
        require(0 < start <= 1, "start_time", start, "a time in (0, 1]", "1 starts at the last noise level")
        require(0 <= self.eta <= 1, "eta", self.eta, "a number in [0, 1]", "1 is the deterministic path")
        require(0 <= self.tau_min < 1, "tau_min", self.tau_min, "a time in [0, 1)", "use 0.02")
        require(0 <= self.margin < 0.5, "margin", self.margin, "a number in [0, 0.5)", "use 0.01")
        require(self.margin + self.tau_min > 0, "tau_min", 0, "tau above 0, where scores exist", "use tau_min 0.02")

    def _validate_path(self) -> None:
        counts = self.counts
        require(min(counts) >= 1, "step counts", counts, "1 or more", "use 1 to 8 steps")
        require(max(counts) <= MOST, "step counts", counts, f"{MOST} or fewer", "use 1 to 8 steps")
        require(len(set(counts)) == len(counts), "step_counts", counts, "each once", "drop the repeated ones")
        require(self.steps in counts, "steps", self.steps, f"one of step_counts {counts}", "add it or change it")
        if self.step_counts and self.steps not in (type(self).steps, max(counts)):
            raise contradiction(
                f"steps {self.steps} with the step counts {counts}",
                "the largest of them, which such a student makes unless it is asked for another",
                "leave steps out and ask for a count when sampling",
            )
        if self.steps_condition and not self.step_counts:
            raise contradiction("steps_condition without step_counts", "a set of step counts to tell apart", "add one")
        if self.grid and (self.step_counts or len(self.grid) != self.steps):
            raise contradiction(
                f"a grid of {len(self.grid)} calls for the step counts {counts}",
                "one time per call of a single step count",
                "set steps to the grid's length, or use shift instead of a grid",
            )
        if self.grid and self.start_time != 1:
            raise contradiction(
                f"start_time {self.start_time} with a grid written out",
                "the start as the grid's first time",
                "leave start_time at 1",
            )

    def _validate_terms(self) -> None:
        if self.motion_guidance and self.guidance == "decoupled":
            raise contradiction(
                f"motion_guidance {self.motion_guidance} with guidance 'decoupled'",
                "guidance of text and motion in one term",
                "set motion_guidance to 0, or guidance to 'coupled'",
            )
        if self.joint_normaliser and self.guidance_levels != "shared":
            raise contradiction(
                f"joint_normaliser with guidance_levels {self.guidance_levels!r}",
                "one query for both terms, of which the normaliser can be taken",
                "set guidance_levels to 'shared'",
            )
        if self.guidance == "decoupled" and self.guidance_levels == "cleaner":
            for grid in map(self.time_grid, self.counts):
                low, high = tau_bounds(grid[-1], grid[-2], margin=self.margin, tau_min=self.tau_min, shift=self.shift)
                if low >= high:
                    raise contradiction(
                        f"no room for guidance at levels cleaner than the last call's, {float(grid[-2]):.4g}",
                        "room between tau_min and that, less the margins",
                        "lower tau_min or margin, or use fewer steps",
                    )

    def _validate_unread(self) -> None:
        """Refuses options that nothing reads in the place of passing them over."""
        guided, apart = self.guidance_scale != 1, self.guidance == "decoupled"
        for names, read, beside in (
            (("logit_mean", "logit_std"), self.tau_law == "logit_normal", "tau_law 'logit_normal'"),
            (("snr_cap",), self.critic_weight == "min_snr", "critic_weight 'min_snr'"),
            (("huber_c",), self.metric != "l2", "a Huber metric"),
            (("guidance",), guided, "a guidance_scale other than 1"),
            (("guidance_levels", "joint_normaliser"), guided and apart, "guidance 'decoupled' of a scale other than 1"),
            (("joint_normaliser",), self.normaliser != "none", "a normaliser"),
            (("ratio_clip", "ratio_bins"), self.divergence != "reverse_kl", "a divergence other than 'reverse_kl'"),
            (
                ("discriminator_weight",),
                self.gan_weight > 0 or self.divergence != "reverse_kl",
                "a gan_weight above 0, or a divergence other than 'reverse_kl',",
            ),
        ):
            if not read:
                refuse_unread(self, names, beside)


def require(good: bool, name: str, found: Any, expected: str, fix: str) -> None:
    """Raises a FewstepError about the option `name` unless `good`."""
    if not good:
        raise FewstepError(f"found {name} = {found}, expected {expected}, fix: {fix}")


def require_finite(options: Any, *but: str) -> None:
    """Refuses nan and infinity in any field of a dataclass `but` those named."""
    for entry in (entry for entry in fields(options) if entry.name not in but):
        value = getattr(options, entry.name)
        numbers = value if isinstance(value, tuple) else (value,)
        good = all(math.isfinite(number) for number in numbers if isinstance(number, float))
        require(good, entry.name, value, "a finite number", "leave it at its default")


def contradiction(found: str, expected: str, fix: str) -> FewstepError:
    """The error about options that do not go together."""
    return FewstepError(f"found {found}, expected {expected}, fix: {fix}")
