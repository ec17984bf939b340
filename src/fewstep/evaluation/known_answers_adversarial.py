"""Known answers of DMD2 and f-distill: training on a Gaussian, and identities of one dimension by quadrature.

In one dimension with an affine student, teacher, critic and log ratio are closed forms, and the expectations over noise
are sums over Gauss-Hermite nodes: the methods' own losses then have exact gradients. Numbers are those of the cards
`dmd2.md` and `f_distill.md`, section 8, for the process of EDM (alpha = 1).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fewstep.core.process import VE, Process
from fewstep.core.streams import Draw
from fewstep.core.tensors import Condition, expand
from fewstep.evaluation.answer import Answer, at_most
from fewstep.evaluation.exact import GaussianTeacher
from fewstep.evaluation.known_answers_training import gaussian_teacher
from fewstep.evaluation.toy import LinearStudent, LogisticDiscriminator, PolynomialCritic, ToyRoles, distil
from fewstep.losses.adversarial import telling_loss
from fewstep.methods.base import Batch
from fewstep.methods.dmd2 import DMD2, DMD2Options

SETTINGS: dict[int, dict[str, Any]] = {
    1: {"iterations": 400, "batch": 512, "student_rate": 0.015, "critic_rate": 0.02},
    4: {"iterations": 700, "batch": 1024, "student_rate": 0.01, "critic_rate": 0.01},
}
"""Of the reference runs, by step count."""

ADVERSARIAL_MEANS = {0.0: 0.5, 0.1: 0.4751, 1.0: 0.3307, 10.0: 0.0832, 100.0: 0.0098}
"""Student's mean by the weight of the adversarial term, where the teacher is wrong by 0.5 (card dmd2, item 8)."""


def dmd2_options(steps: int, gan_weight: float) -> DMD2Options:
    """Settings of the reference runs. With more than one step the critic has to be told the call: a critic linear in x
    cannot tell the calls' laws apart, and their mixture alone is matched."""
    return DMD2Options(
        steps=steps, guidance_scale=1.0, critic_updates=2, gan_weight=gan_weight, critic_call_condition=steps > 1
    )


def prediction_errors(teacher: GaussianTeacher, student: LinearStudent, grid: Tensor) -> list[float]:
    """Relative Frobenius error of the covariance of every call's clean prediction; exact, fresh noise between calls."""
    process, right = teacher.process, teacher.covariances[0]
    basis = torch.eye(teacher.dimensions)
    entering = basis * process.noise_scale**2
    errors = []
    for time, landing in zip(grid[:-1], grid[1:], strict=True):
        matrix = student(basis, time.expand(len(basis)), {}).detach()
        covariance = matrix.T @ entering @ matrix
        errors.append(float((covariance - right).norm() / right.norm()))
        entering = process.alpha(landing).square() * covariance + process.sigma(landing).square() * basis
    return errors


def dmd2_gaussian(process: Process, steps: int, gan_weight: float, method: DMD2 | None = None) -> Iterator[Answer]:
    """The covariance of every call's clean prediction is the teacher's, within 5 %, from a start at 70 to 100 %."""
    method = method or DMD2(dmd2_options(steps, gan_weight))
    teacher = gaussian_teacher(process)
    grids = {steps: method.options.time_grid(steps)}
    student = LinearStudent(teacher, grids)
    critic = PolynomialCritic(teacher, grids, terms=8, to_top=True, from_zero=True)
    discriminator = LogisticDiscriminator(process, teacher.dimensions) if gan_weight else None
    distil(method, teacher, student, critic, discriminator=discriminator, real=teacher.sample, **SETTINGS[steps])
    errors = prediction_errors(teacher, student, grids[steps].float())
    name = f"dmd2 8 Gaussian, {process.name}, K={steps}, adversarial weight {gan_weight:g}: covariance error"
    yield at_most(f"{name}, last call", errors[-1], 0.05)
    if steps > 1:
        yield at_most(f"{name}, worst of the others", max(errors[:-1]), 0.05)


class Affine(nn.Module):
    """z -> mean + std z of the standard normal z that x = `scale` z is, whatever the time."""

    def __init__(self, mean: float, std: float, scale: float) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.tensor(mean, dtype=torch.float64))
        self.std = nn.Parameter(torch.tensor(std, dtype=torch.float64))
        self.scale = scale

    def forward(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return self.mean + self.std / self.scale * x

    def law(self, process: Process) -> GaussianTeacher:
        """The law of its samples, as an exact denoiser without gradient."""
        return normal_law(process, float(self.mean.detach()), float(self.std.detach()))


def normal_law(process: Process, mean: float, std: float) -> GaussianTeacher:
    """N(mean, std^2) in one dimension, float64."""
    centre = torch.tensor([mean], dtype=torch.float64)
    return GaussianTeacher(process, centre, torch.tensor([[std**2]], dtype=torch.float64))


class QuadratureDraw(Draw):
    """Gauss-Hermite nodes for the noise of the path and of renoising, at one noise level; `weights` sum to 1.

    Args:
        tau: the level of every query, within the options' range.
        options: of the method that draws.
        nodes: per axis; B is its square.
    """

    def __init__(self, tau: float, options: DMD2Options, nodes: int = 48) -> None:
        points, shares = (torch.from_numpy(part) for part in np.polynomial.hermite_e.hermegauss(nodes))
        self.noise, self.renoise = (part.reshape(-1, 1) for part in torch.meshgrid(points, points, indexing="ij"))
        self.weights = torch.outer(shares, shares).flatten() / shares.sum() ** 2
        super().__init__((), range(len(self.weights)))
        low = max(options.margin, options.tau_min)
        self._place = (tau - low) / (1 - options.margin - low)

    def sub(self, name: str | int) -> QuadratureDraw:
        return self

    def normal(
        self,
        name: str,
        shape: Sequence[int],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        return (self.noise if name == "noise" else self.renoise).to(dtype)

    def uniform(self, name: str) -> Tensor:
        return torch.full((len(self.weights),), self._place, dtype=torch.float64)

    def integers(self, name: str, high: int | Tensor) -> Tensor:
        return torch.zeros(len(self.weights), dtype=torch.long)


class ExactRoles(ToyRoles):
    """Teacher and student of one dimension, with the critic and the discriminator that are best for the student."""

    def __init__(self, teacher: GaussianTeacher, student: Affine, data: GaussianTeacher | None = None) -> None:
        self.data, self.affine = data or teacher, student
        super().__init__(teacher, student, self._exact_critic, self._exact_logit)

    def _exact_critic(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return self.affine.law(self.process)(x, t, condition)

    def _exact_logit(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return (self.data.log_density(x, t, {}) - self.affine.law(self.process).log_density(x, t, {}))[:, None]


def student_gradient(options: DMD2Options, roles: ExactRoles, sigma: float) -> tuple[float, float]:
    """Gradient of the student's loss by its mean and std, at the noise level `sigma`, in units of scores.

    The method moves denoised samples, whose difference is sigma^2 times that of the scores.
    """
    process = roles.process
    assert isinstance(process, VE)
    draw = QuadratureDraw(float(process.time_of(torch.tensor(sigma))), options)
    batch = Batch({}, draw.samples, (1,), torch.float64, real=(draw.noise, {}))
    method = DMD2(replace(options, gan_weight=sigma**2 * options.gan_weight))
    values = method.student_loss(method.rollout(batch, roles, draw), roles, draw).values
    by_mean, by_std = torch.autograd.grad((draw.weights * values).sum(), [roles.affine.mean, roles.affine.std])
    return float(by_mean) / sigma**2, float(by_std) / sigma**2


def scalar_options(gan_weight: float = 0.0) -> DMD2Options:
    """One step, unguided, without the normaliser, which has no mean in one dimension."""
    return DMD2Options(steps=1, guidance_scale=1.0, normaliser="none", gan_weight=gan_weight)


def adversarial_mean(gan_weight: float) -> float:
    """Where the student's mean comes to rest: the teacher says 0.5, the data 0, both with std 0.8; sigma is 0.7."""
    process = VE()
    student = Affine(0.0, 0.8, process.noise_scale)
    roles = ExactRoles(normal_law(process, 0.5, 0.8), student, normal_law(process, 0.0, 0.8))
    low, high = -0.1, 0.6
    for _ in range(24):
        middle = (low + high) / 2
        nn.init.constant_(student.mean, middle)
        rises = student_gradient(scalar_options(gan_weight), roles, 0.7)[0] > 0
        low, high = (low, middle) if rises else (middle, high)
    return (low + high) / 2


def adversarial_fixed_points() -> Iterator[Answer]:
    """Real data pull the student off a teacher that is wrong, the more the larger the adversarial weight."""
    for weight, right in ADVERSARIAL_MEANS.items():
        name = f"dmd2 8.8 adversarial weight {weight:g}: distance of the student's mean from {right:.4f}"
        yield at_most(name, abs(adversarial_mean(weight) - right), 1e-4)


def logit_error(process: Process, times: Sequence[float] = (0.1, 0.3, 0.6, 0.9)) -> float:
    """Largest rms error, over `times`, of a logistic head trained to tell N(0.3, 0.8^2) from N(-0.5, 0.6^2), renoised.

    Relative to the rms of the closed-form logit over the mixture of both. A polynomial of the time suits a flow; on
    other processes the ratio changes too fast near the data.
    """
    data, fake = normal_law(process, 0.3, 0.8), normal_law(process, -0.5, 0.6)
    head = LogisticDiscriminator(process, 1, terms=8).double()
    adam = torch.optim.Adam(head.parameters(), 0.05)
    generator = torch.Generator().manual_seed(0)

    def noised(law: GaussianTeacher, t: Tensor) -> Tensor:
        noise = torch.randn(len(t), 1, generator=generator, dtype=torch.float64)
        clean = law.sample(len(t), generator)
        return expand(process.alpha(t), clean) * clean + expand(process.sigma(t), clean) * noise

    iterations = 400
    for iteration in range(iterations):
        adam.param_groups[0]["lr"] = 0.05 * (1 - iteration / iterations)
        t = 0.02 + 0.96 * torch.rand(4096, generator=generator, dtype=torch.float64)
        loss = telling_loss(head(noised(data, t), t, {}), head(noised(fake, t), t, {})).mean()
        adam.zero_grad()
        loss.backward()
        adam.step()

    errors = []
    for time in times:
        t = torch.full((4096,), time, dtype=torch.float64)
        x = torch.cat([noised(data, t), noised(fake, t)])
        t = torch.cat([t, t])
        right = data.log_density(x, t, {}) - fake.log_density(x, t, {})
        with torch.no_grad():
            errors.append(float((head(x, t, {})[:, 0] - right).square().mean().sqrt() / right.square().mean().sqrt()))
    return max(errors)


def density_ratio(process: Process) -> Iterator[Answer]:
    """A logistic head finds the closed-form log ratio of two Gaussians at every noise level."""
    yield at_most(f"dmd2 8.7 {process.name}: relative error of the trained logit", logit_error(process), 0.1)
