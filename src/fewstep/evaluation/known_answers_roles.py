"""Every method on a Gaussian through the real roles: adapters on one frozen network, full copies, and the mixed kind.

The other known answers train networks made for them. Here `build_roles` makes teacher, student and critic of one
network, as in a real run, so that a role that trains nothing, trains another one, or is told what it must not be, gives
a wrong covariance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from fewstep.core.guidance import Denoiser
from fewstep.core.process import Process
from fewstep.core.tensors import Condition
from fewstep.evaluation.answer import Answer, at_most
from fewstep.evaluation.exact import LABEL, NULL_LABEL, GaussianTeacher
from fewstep.evaluation.known_answers_adversarial import dmd2_options
from fewstep.evaluation.known_answers_decoupled import prompted, resting_variances, wider
from fewstep.evaluation.known_answers_training import covariance_errors, gaussian_options, gaussian_teacher
from fewstep.evaluation.toy import PolynomialCritic, alternate
from fewstep.methods.base import Method
from fewstep.methods.decoupled import DecoupledOptions
from fewstep.methods.f_distill import FDistill, FDistillOptions
from fewstep.methods.matching import LogRatio
from fewstep.methods.matching_options import MatchingOptions
from fewstep.methods.phased import PhasedOptions
from fewstep.methods.sid import SiDOptions
from fewstep.models.backbone import Backbone
from fewstep.models.roles import Kind, Roles, build_roles

_PROMPT_FACTOR = 2.0  # variance without the prompt over that with it, where a method is guided
RANK = 64
"""Of adapters: the random half of the update then spans most of what the features can say."""


class Network(nn.Module):
    """An exact denoiser and a correction, linear in x and polynomial in time, that is zero at first."""

    def __init__(self, exact: Denoiser, teacher: GaussianTeacher, segments: Tensor) -> None:
        super().__init__()
        self.exact = exact
        critic = PolynomialCritic(teacher, {len(segments) - 1: segments})
        self.features = critic.features
        self.correction = nn.Linear(len(critic.weight), teacher.dimensions, bias=False)
        nn.init.zeros_(self.correction.weight)

    def forward(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return self.exact(x, t, condition) + self.correction(self.features(x, t, condition))


class NetworkBackbone:
    """What `build_roles` asks of a backbone, for a `Network`."""

    device = torch.device("cpu")
    quantised = None

    def __init__(self, network: Network, process: Process) -> None:
        self.network, self.process = network.requires_grad_(False), process

    def call(self, network: nn.Module, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return network(x, t, condition)

    def null_condition(self) -> Condition:
        return {LABEL: torch.tensor([NULL_LABEL])}

    def adapter_targets(self, layers: str) -> list[str]:
        return ["correction"]


@dataclass(frozen=True)
class Run:
    """One method's reference run: settings under which its fixed point is the Gaussian's own, or a known other."""

    options: MatchingOptions
    iterations: int
    batch: int
    student_rate: float
    critic_rate: float
    segments: int = 4
    """Into which time is divided, with a polynomial of 6 terms each."""
    adapter_critic_factor: float = 0.5
    """Of the critic's rate through adapters."""


RUNS: dict[str, Callable[[], Run]] = {
    "tdm": lambda: Run(gaussian_options(2, "exact"), 700, 1024, 1e-3, 0.02, segments=2, adapter_critic_factor=1.0),
    "dmd2": lambda: Run(dmd2_options(1, 0.0), 400, 512, 3e-3, 0.02),
    "f-distill": lambda: Run(
        FDistillOptions(steps=1, guidance_scale=1.0, critic_updates=2, gan_weight=0.0), 400, 512, 3e-3, 0.02
    ),
    "sid": lambda: Run(SiDOptions(steps=1), 500, 1024, 8e-4, 0.02),
    "decoupled": lambda: Run(
        DecoupledOptions(steps=1, guidance_scale=1.5, normaliser="none", critic_updates=2), 400, 768, 3e-3, 0.015
    ),
    "phased": lambda: Run(
        PhasedOptions(steps=2, phase_calls=(1, 1), guidance_scale=1.0, critic_updates=1),
        600,
        1024,
        1e-3,
        0.02,
        segments=2,
    ),
}
"""By method. MSD's students are each trained as DMD2's; for teacher score matching see `known_answers_msd`."""


def through_roles(process: Process, name: str, kind: Kind, method: Method | None = None) -> Iterator[Answer]:
    """The covariance of what the student makes, within 5 %: a quarter of a minute at most.

    At the end of its path; of Phased DMD's first phase, where it ends. `method` is another than the run's own. A LoRA
    update is a product of two matrices, of which one starts at zero: it takes longer, and at the rate of a whole
    critic the other matrix, random at first, is thrown about (SiD's student then runs away).
    """
    run = RUNS[name]()
    options, law = run.options, gaussian_teacher(process)
    guided = isinstance(options, DecoupledOptions)
    iterations, critic_rate = run.iterations, run.critic_rate
    if kind == "adapters":
        iterations, critic_rate = int(1.5 * iterations), run.adapter_critic_factor * critic_rate
    grid = options.time_grid(options.steps)
    segments = torch.linspace(1, 0, run.segments + 1, dtype=torch.float64)
    network = Network(wider(law, _PROMPT_FACTOR) if guided else law, law, segments)
    roles = build_roles(cast(Backbone, NetworkBackbone(network, process)), kind, rank=RANK)
    own = FDistill(options, exact_ratio(law, roles)) if isinstance(options, FDistillOptions) else options.build()
    alternate(
        method or own,
        roles,
        {"params": roles.student_parameters(), "lr": run.student_rate},
        [{"params": roles.critic_parameters(), "lr": critic_rate}],
        dimensions=law.dimensions,
        iterations=iterations,
        batch=run.batch,
        condition=(lambda _: prompted(run.batch)) if guided else None,
    )
    told = prompted(law.dimensions) if guided else {}
    right = _wanted(law, options) if isinstance(options, DecoupledOptions) else law
    errors = covariance_errors(right, roles.student, grid, told)
    error = errors[0] if isinstance(options, PhasedOptions) else errors[-1]
    yield at_most(f"{name} through {kind}, {process.name}: covariance error", error, 0.05)


def exact_ratio(law: GaussianTeacher, roles: Roles) -> LogRatio:
    """log p/q of the law and of what a linear one-step student makes now, at noised samples."""
    basis = torch.eye(law.dimensions)

    @torch.no_grad()
    def ratio(x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        matrix = roles.student(basis, torch.ones(len(basis), dtype=t.dtype), {})
        made = GaussianTeacher(law.process, law.means[0], matrix.T @ matrix)
        return law.log_density(x, t, {}) - made.log_density(x, t, {})

    return ratio


def _wanted(law: GaussianTeacher, options: DecoupledOptions) -> GaussianTeacher:
    """The law at which guidance and matching cancel."""
    variances, axes = torch.linalg.eigh(law.covariances[0].double())
    rest = resting_variances(variances, _PROMPT_FACTOR, law.process, options, 0)
    return GaussianTeacher(law.process, law.means[0], ((axes * rest) @ axes.T).float())
