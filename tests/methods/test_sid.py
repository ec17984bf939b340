"""Few-step SiD over toy roles: who gets gradients and through what, the chain, what it learns.

T numbers here and in the other files of SiD are those of the card sid_few_step.md, section 8; T1, T2, T5 and T8 are in
tests/losses/test_fisher.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sid_toy import COUNT, VARIANTS, WatchedRoles, batch, critic_loss, draw, gradient, labels, student_loss, walk
from torch import Tensor, nn

from fewstep.core.process import DiscreteVP, Flow, Process
from fewstep.core.solvers import ddim, lcm
from fewstep.core.streams import Draw
from fewstep.core.tensors import expand
from fewstep.evaluation.known_answers_sid import sid_gaussian, sid_gaussian_errors
from fewstep.evaluation.toy import ToyRoles
from fewstep.losses.fisher import fisher_loss, fisher_weight
from fewstep.methods.base import Loss, Roles
from fewstep.methods.sid import DrawnPath, SiD, SiDOptions
from fewstep.methods.tdm import TDM
from fewstep.methods.tdm_options import TDMOptions


@pytest.mark.parametrize("process", [Flow(), DiscreteVP.cosine()], ids=lambda p: p.name)
@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_trains_only_who_it_should(name: str, process: Process) -> None:
    roles = WatchedRoles(process)
    loss = critic_loss(VARIANTS[name], roles)
    assert loss.values.shape == (COUNT,)
    loss.values.mean().backward()
    judged = VARIANTS[name].gan_weight > 0
    assert all(p.grad.abs().sum() > 0 for p in roles.critic_network.parameters())
    assert (roles.head.grad is not None) == judged  # T11
    assert all(p.grad is None for p in roles.of_student())

    roles = WatchedRoles(process)
    loss = student_loss(VARIANTS[name], roles)
    assert loss.values.shape == (COUNT,)
    assert loss.values.isfinite().all()
    loss.values.mean().backward()
    assert all(p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in roles.of_student())
    assert all(p.grad is None for p in roles.of_critic())
    assert all(not metric.requires_grad and metric.ndim == 0 for metric in loss.metrics.values())


def test_gradient_flows_through_teacher_and_critic() -> None:
    """T4: that of the formula with everything attached; each detached part changes it."""
    options, roles = SiDOptions(alpha=0.7), WatchedRoles(Flow())
    found = gradient(options, roles)
    _, x, tau, told, _ = roles.made("teacher")[0]

    path = walk(options, roles)[1]
    sample = path.land(roles.student, path.call).denoised
    alpha, sigma = expand(roles.process.alpha(tau), x), expand(roles.process.sigma(tau), x)
    noised = alpha * sample + (x - alpha * sample).detach()
    torch.testing.assert_close(noised, x)
    assert float(sigma.detach().min()) > 0
    real, fake = roles.teacher(noised, tau, told), roles.critic(noised, tau, told)
    values = fisher_weight("alpha", roles.process, tau) * fisher_loss(sample, real, fake, 0.7)
    torch.testing.assert_close(found, torch.cat(torch.autograd.grad(values.mean(), roles.of_student())))

    for detached in [("teacher",), ("critic",), ("teacher", "critic")]:
        other = gradient(options, WatchedRoles(Flow(), detached))
        assert not torch.allclose(found, other, rtol=0.05), detached


def test_tdm_does_not_care_whether_they_are_attached() -> None:
    """T4, the other side."""
    method, gradients = TDM(TDMOptions()), []
    for roles in (WatchedRoles(Flow()), WatchedRoles(Flow(), ("teacher", "critic"))):
        loss = method.student_loss(method.rollout(batch(), roles, draw()), roles, draw()).values.mean()
        gradients.append(torch.cat(torch.autograd.grad(loss, roles.of_student())))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=0)


def test_with_both_detached_it_is_distribution_matching() -> None:
    """Which is why that mistake would go unnoticed in what a student learns, but not in T4."""
    roles, options = WatchedRoles(Flow(), ("teacher", "critic")), SiDOptions(alpha=0.3)
    found = gradient(options, roles)
    (_, x, tau, told, _), (_, same, *_) = roles.made("teacher")[0], roles.made("critic")[0]
    assert torch.equal(x, same)
    direction = roles.teacher(x, tau, told) - roles.critic(x, tau, told)
    path = walk(options, roles)[1]
    sample = path.land(roles.student, path.call).denoised
    values = -(1 - tau) * (direction * sample).mean(1)
    torch.testing.assert_close(found, torch.cat(torch.autograd.grad(values.mean(), roles.of_student())))


def test_gradient_is_affine_in_alpha() -> None:
    low, middle, high = (gradient(SiDOptions(alpha=alpha), WatchedRoles(Flow())) for alpha in (0.0, 0.6, 1.2))
    torch.testing.assert_close(middle, (low + high) / 2)


@pytest.mark.parametrize("kind", ["eps", "v", "flow"])
@pytest.mark.parametrize("name", ["none", "lsg"])
def test_losses_do_not_depend_on_what_the_networks_predict(name: str, kind: str) -> None:
    """T6."""
    plain, spoken = (WatchedRoles(DiscreteVP.linear(), kind=kind) for kind in ("x0", kind))
    for of in (student_loss, critic_loss):
        torch.testing.assert_close(
            of(VARIANTS[name], plain).values, of(VARIANTS[name], spoken).values, rtol=1e-6, atol=0
        )
    torch.testing.assert_close(gradient(VARIANTS[name], plain), gradient(VARIANTS[name], spoken), rtol=1e-6, atol=0)


def test_weight_and_normaliser_divide_the_loss() -> None:
    plain, weighted, legacy = (
        student_loss(options, WatchedRoles(Flow())).values
        for options in (SiDOptions(weight="one"), SiDOptions(), SiDOptions(weight="one", normaliser="dmd"))
    )
    roles = WatchedRoles(Flow())
    student_loss(SiDOptions(), roles)
    path = walk(SiDOptions(), roles)[1]
    _, x, tau, told, _ = roles.made("teacher")[0]
    torch.testing.assert_close(weighted, (1 - tau) * plain)
    distance = (path.landing(path.call).denoised - roles.exact(x, tau, told)).abs().mean(1)
    torch.testing.assert_close(legacy, plain / distance)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, 1.2])
@pytest.mark.parametrize("steps", [1, 4])
def test_student_of_the_teachers_law_rests(steps: int, alpha: float) -> None:
    """T3: the best critic of such a student is the teacher, here of four modes."""
    roles = WatchedRoles(Flow())
    nn.init.ones_(roles.critic_network.gain)
    nn.init.zeros_(roles.critic_network.offset)
    found = gradient(SiDOptions(steps=steps, alpha=alpha), roles)
    torch.testing.assert_close(found, torch.zeros_like(found), rtol=0, atol=1e-12)


# The chain and the drawn call


def chain(options: SiDOptions, roles: WatchedRoles) -> tuple[DrawnPath, list[Tensor], list[Tensor]]:
    """The path, and the input and the clean prediction of each call."""
    path = walk(options, roles)[1]
    calls = [torch.full((COUNT,), call) for call in range(options.steps)]
    return path, [path.input(call) for call in calls], [path.landing(call).denoised for call in calls]


def test_times_are_those_of_the_card() -> None:
    """T7."""
    assert SiDOptions().time_grid(4).tolist() == [1, 0.75, 0.5, 0.25, 0]
    assert SiDOptions(start_time=0.625).time_grid(1).tolist() == [0.625, 0]


def test_without_new_noise_the_chain_is_the_deterministic_sampler() -> None:
    """T7: DDIM's, which for a flow is Euler's."""
    roles = WatchedRoles(Flow())
    path, inputs, denoised = chain(SiDOptions(eta=1.0), roles)
    grid = SiDOptions().time_grid(4)
    torch.testing.assert_close(ddim(roles.student, inputs[0], grid, roles.process, labels()), denoised[-1])
    for call in range(3):
        velocity = (inputs[call] - denoised[call]) / grid[call]
        torch.testing.assert_close(inputs[call + 1], inputs[call] + (grid[call + 1] - grid[call]) * velocity)


@pytest.mark.parametrize("process", [Flow(), DiscreteVP.cosine()], ids=lambda p: p.name)
@pytest.mark.parametrize("chain_noise", ["fresh", "fixed"])
def test_with_new_noise_the_chain_is_the_sampler_that_renoises(chain_noise: Any, process: Process) -> None:
    """T7: what is compared at call k is what a student of k + 1 calls would make of the same noise."""
    roles = WatchedRoles(process)
    _, inputs, denoised = chain(SiDOptions(chain_noise=chain_noise), roles)
    start = inputs[0] / process.noise_scale

    def noise(call: int, shape: Any) -> Tensor:
        return start if chain_noise == "fixed" else draw().normal(f"extra {call}", shape, torch.float64)

    seen: list[Tensor] = []
    lcm(
        roles.student, inputs[0], SiDOptions().time_grid(4), process, labels(), noise=noise,
        callback=lambda k, x, predicted: seen.append(predicted.detach()),
    )  # fmt: skip
    torch.testing.assert_close(torch.stack(seen), torch.stack(denoised))


def test_fixed_noise_is_the_paths_own_first() -> None:
    """T7."""
    _, inputs, denoised = chain(SiDOptions(chain_noise="fixed"), WatchedRoles(Flow()))
    for call, t in enumerate((0.75, 0.5, 0.25)):
        torch.testing.assert_close(inputs[call + 1], (1 - t) * denoised[call] + t * inputs[0])


def test_fresh_noise_is_new_at_every_step() -> None:
    """T7."""
    _, inputs, denoised = chain(SiDOptions(), WatchedRoles(Flow()))
    noises = [inputs[0]]
    noises += [(inputs[n + 1] - (1 - t) * denoised[n]) / t for n, t in enumerate((0.75, 0.5, 0.25))]
    overlaps = torch.corrcoef(torch.stack([noise.flatten() for noise in noises])) - torch.eye(4)
    assert overlaps.abs().max() < 0.5
    assert all(0.7 < float(noise.std()) < 1.3 for noise in noises)


def test_only_the_drawn_call_carries_gradient() -> None:
    """T7: one call of the student, at the detached input of the drawn step, compared as a clean sample."""
    for iteration in range(6):
        roles = WatchedRoles(Flow())
        method, path = walk(SiDOptions(), roles, iteration)
        method.student_loss(path, roles, draw(iteration))
        (attached,) = [call for call in roles.made("student") if call[4]]
        assert not attached[1].requires_grad
        torch.testing.assert_close(attached[1], path.input(path.call))
        assert attached[2].unique().tolist() == [1 - 0.25 * int(path.call[0])]
        assert len(roles.made("student")) == 1 + int(path.call[0])  # nothing beyond the drawn call


def test_one_call_is_drawn_per_iteration_for_all() -> None:
    """Critic and student look at the same one, and all are drawn alike."""
    drawn = []
    for iteration in range(200):
        roles = WatchedRoles(Flow())
        path = walk(SiDOptions(), roles, iteration)[1]
        assert len(path.call.unique()) == 1
        drawn.append(int(path.call[0]))
    assert torch.tensor(drawn).bincount(minlength=4).min() > 30
    method, path = walk(SiDOptions(), roles, 3)
    clean = path.landing(path.call).denoised
    for of in (method.critic_loss, method.student_loss):
        before = len(roles.made("critic"))
        of(path, roles, draw(3))
        _, x, tau, *_ = roles.made("critic")[before]
        noise = (x - expand(1 - tau, x) * clean) / expand(tau, x)
        assert 0.7 < float(noise.detach().std()) < 1.3


def test_critic_regresses_to_the_clean_prediction_at_any_level() -> None:
    options, levels = SiDOptions(critic_weight="one"), []
    for iteration in range(20):
        roles = WatchedRoles(Flow())
        loss = critic_loss(options, roles, iteration).values
        _, x, tau, told, _ = roles.made("critic")[0]
        path = walk(options, roles, iteration)[1]
        error = roles.critic(x, tau, told) - path.landing(path.call).denoised
        torch.testing.assert_close(loss, error.square().mean(1))
        levels.append(tau)
    quantiles = torch.cat(levels).quantile(torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95], dtype=torch.float64))
    assert quantiles.tolist() == pytest.approx([0.13, 0.41, 0.67, 0.86, 0.97], abs=0.06)


def test_statistics_of_each_step_are_logged() -> None:
    found = set()
    for iteration in range(30):
        roles = WatchedRoles(Flow())
        metrics = student_loss(SiDOptions(), roles, iteration).metrics
        path = walk(SiDOptions(), roles, iteration)[1]
        call, clean = int(path.call[0]), path.landing(path.call).denoised.float()
        torch.testing.assert_close(metrics[f"call_{call}_denoised_mean"], clean.mean())
        torch.testing.assert_close(metrics[f"call_{call}_denoised_std"], clean.std())
        torch.testing.assert_close(metrics[f"call_{call}_student_loss"], metrics["student_loss"])
        found |= {name for name in metrics if name.startswith("call_")}
    names = ("student_loss", "fisher", "denoised_mean", "denoised_std")
    assert found == {f"call_{call}_{name}" for call in range(4) for name in names}


# End to end


class Reversed(SiD):
    """Walks away from the teacher."""

    def student_loss(self, path: Any, roles: Roles, draw: Draw) -> Loss:
        loss = super().student_loss(path, roles, draw)
        return Loss(-loss.values, loss.metrics)


class DetachedTeacher(SiD):
    """Takes the teacher for a constant."""

    def student_loss(self, path: Any, roles: Any, draw: Draw) -> Loss:
        cut = ToyRoles(roles.teacher, roles.student, roles.critic)
        cut.teacher, cut.null = lambda *asked: roles.teacher(*asked).detach(), roles.null
        return super().student_loss(path, cut, draw)


def test_trained_student_has_the_teachers_covariance() -> None:
    torch.set_num_threads(1)
    for answer in sid_gaussian(Flow(), 1):
        assert answer.passed, f"{answer.name}: {answer.measured:.4g}, expected {answer.limit}"


@pytest.mark.parametrize("broken", [Reversed, DetachedTeacher])
def test_broken_method_misses_it(broken: type[SiD]) -> None:
    torch.set_num_threads(1)
    error = sid_gaussian_errors(Flow(), broken(SiDOptions(steps=1)))[-1]
    assert not error <= 0.1
