"""Card 8.1: identities that hold to rounding, each through the code that training runs."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from fewstep.core.guidance import guided, guided_parts
from fewstep.core.prediction import PREDICTIONS
from fewstep.core.process import Process
from fewstep.core.renoise import renoise
from fewstep.core.streams import Streams
from fewstep.core.tensors import Condition, expand
from fewstep.evaluation.answer import Answer, at_most
from fewstep.evaluation.exact import LABEL, NULL_LABEL, GaussianTeacher, MixtureTeacher, PredictingAs, ring
from fewstep.evaluation.toy import ToyRoles
from fewstep.losses.critic import mixed_noise
from fewstep.losses.matching import metric
from fewstep.methods.base import Batch
from fewstep.methods.tau import tau_bounds
from fewstep.methods.tdm import TDM
from fewstep.methods.tdm_options import TDMOptions

_COUNT = 64


class Shifted(nn.Module):
    """A denoiser plus a trainable constant (d,), whose gradient is that of the denoised sample."""

    def __init__(self, model: MixtureTeacher | PredictingAs, shift: Tensor) -> None:
        super().__init__()
        self.model = model
        self.shift = nn.Parameter(shift)

    def forward(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return self.model(x, t, condition) + self.shift


def identities(process: Process) -> Iterator[Answer]:
    """Items 1 to 7 of card 8.1."""
    yield at_most(f"1 kernel composes to the marginal, {process.name}", kernel_error(process), 1e-9)
    yield at_most(f"2 loss is the same for eps, v, flow, x0, {process.name}", parameterisation_error(process), 1e-5)
    yield at_most(f"3 gradient is -direction/(m d), {process.name}", gradient_error(process), 1e-9)
    yield at_most(f"4 both forms of guidance agree, {process.name}", guidance_error(process), 1e-9)
    yield at_most(f"5 mixed noise explains x_tau, {process.name}", mixed_noise_error(process), 1e-9)
    yield at_most(f"6 segments tile the time axis, {process.name}", segment_error(process), 1e-9)
    yield at_most(f"7 huber_vector has gradient norm at most 1, {process.name}", huber_gradient_norm(), 1.0)


def kernel_error(process: Process) -> float:
    """Variance at tau by way of the landing point against the variance at tau, for data of variance 2."""
    s, t = torch.meshgrid(*2 * [torch.linspace(0, 1, 101, dtype=torch.float64)], indexing="ij")
    later = (t >= s) & (process.alpha(s) > 0)
    s, t = s[later], t[later]
    r, beta = process.transition(s, t)
    variance = 2 * process.alpha(s) ** 2 + process.sigma(s) ** 2
    return float((r**2 * variance + beta**2 - 2 * process.alpha(t) ** 2 - process.sigma(t) ** 2).abs().max())


def parameterisation_error(process: Process) -> float:
    """Largest relative difference of critic and student loss over the four kinds of network output.

    The path starts just below t = 1, where eps says nothing about the clean sample on a flow process.
    """
    teacher = ring(process, [1, 2, 3], 1.5, 0.3, torch.float64)
    method = TDM(TDMOptions(grid=(0.98, 0.75, 0.5, 0.25), guidance_scale=1.0))
    losses = []
    for kind in PREDICTIONS:
        network = PredictingAs(teacher, kind)
        roles = ToyRoles(network, Shifted(network, torch.full((2,), 0.1)), Shifted(network, torch.full((2,), -0.1)))
        draw = Streams(0).at(0, range(_COUNT))
        path = method.rollout(Batch({}, torch.arange(_COUNT), (2,), torch.float64), roles, draw)
        both = method.critic_loss(path, roles, draw), method.student_loss(path, roles, draw)
        losses.append(torch.cat([loss.values.detach() for loss in both]))
    first = losses[-1]
    return max(float(((loss - first) / first).abs().max()) for loss in losses)


def gradient_error(process: Process) -> float:
    """Autograd of the student's loss against -direction / (m d), the direction computed by hand."""
    mean, spread = torch.zeros(3, dtype=torch.float64), torch.eye(3, dtype=torch.float64)
    teacher = GaussianTeacher(process, mean, spread)
    student, critic = Shifted(teacher, mean + 0.2), Shifted(teacher, mean - 0.3)
    method = TDM(TDMOptions(steps=1, guidance_scale=1.0, normaliser="none"))
    roles = ToyRoles(teacher, student, critic)
    draw = Streams(0).at(0, range(_COUNT))
    path = method.rollout(Batch({}, torch.arange(_COUNT), (3,), torch.float64), roles, draw)
    method.student_loss(path, roles, draw).values.sum().backward()
    direction = 0.3 * _COUNT  # teacher - critic is 0.3 everywhere
    stray = critic.shift.grad is not None
    return float("inf") if stray else float((student.shift.grad + direction / 3).abs().max())


def guidance_error(process: Process) -> float:
    """uncond + w (cond - uncond) against cond + (w - 1)(cond - uncond), and w = 1 against the plain call."""
    teacher = ring(process, [1, 2, 3, 4], 1.5, 0.3, torch.float64)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(_COUNT, 2, generator=generator, dtype=torch.float64)
    t = torch.linspace(0.05, 0.95, _COUNT, dtype=torch.float64)
    condition = {LABEL: torch.arange(_COUNT) % 2}
    null = {LABEL: torch.full((_COUNT,), NULL_LABEL)}
    told, untold = guided_parts(teacher, x, t, condition, null)
    second_form = told + 2.5 * (told - untold)
    plain = guided(teacher, x, t, condition, {}, 1.0) - teacher(x, t, condition)
    return float(max((guided(teacher, x, t, condition, null, 3.5) - second_form).abs().max(), plain.abs().max()))


def mixed_noise_error(process: Process) -> float:
    """x_tau against alpha_tau denoised + sigma_tau eps_mix."""
    denoised, eps, noise = torch.randn(3, _COUNT, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    s = torch.linspace(0, 0.9, _COUNT, dtype=torch.float64)
    tau = s + 0.05
    landed = expand(process.alpha(s), eps) * denoised + expand(process.sigma(s), eps) * eps
    mixed = mixed_noise(process, eps, noise, s, tau)
    rebuilt = expand(process.alpha(tau), eps) * denoised + expand(process.sigma(tau), eps) * mixed
    return float((rebuilt - renoise(process, landed, s, tau, noise)).abs().max())


def segment_error(process: Process) -> float:
    """Without margins, the tau ranges of a path's calls leave neither gap nor overlap."""
    worst = 0.0
    for options in (
        TDMOptions(),
        TDMOptions(steps=8),
        TDMOptions(shift=3.0),
        TDMOptions(grid=(1.0, 0.856, 0.665, 0.4)),
    ):
        grid = options.time_grid(options.steps)
        low, high = tau_bounds(grid[1:], grid[:-1], margin=0.0, tau_min=0.0, shift=options.shift)
        gaps = torch.cat([low[:-1] - high[1:], high[:1] - grid[0], low[-1:]])
        worst = max(worst, float(gaps.abs().max()))
    return worst


def huber_gradient_norm() -> float:
    """Largest gradient norm, times sqrt(d), over differences of very different size."""
    direction = torch.randn(_COUNT, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    difference = (direction * torch.logspace(-6, 3, _COUNT, dtype=torch.float64)[:, None]).requires_grad_()
    metric("huber_vector", difference, 0.00054).sum().backward()
    return float(difference.grad.norm(dim=1).max() * 4)
