"""DMD2 against its card: exact gradients by quadrature, who gets gradients, what it costs, where it comes to rest."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from ring_toy import COUNT, WatchedRoles, batch, draw
from torch import Tensor, nn

from fewstep.core.process import VE, DiscreteVP, Flow, Process
from fewstep.core.renoise import renoise
from fewstep.core.rollout import Landing, Path
from fewstep.core.solvers import lcm
from fewstep.core.streams import Draw, Streams
from fewstep.core.tensors import Condition
from fewstep.errors import FewstepError
from fewstep.evaluation.exact import LABEL
from fewstep.evaluation.known_answers_adversarial import (
    Affine,
    ExactRoles,
    QuadratureDraw,
    adversarial_fixed_points,
    density_ratio,
    dmd2_gaussian,
    dmd2_options,
    normal_law,
    scalar_options,
    student_gradient,
)
from fewstep.evaluation.toy import BulkDraw, ToyRoles
from fewstep.losses.matching import normaliser
from fewstep.methods import DMD2Options, preset
from fewstep.methods.base import LANDING, STEPS, Batch, Loss, Roles
from fewstep.methods.dmd2 import DMD2
from fewstep.methods.matching import Query

MEAN, STD, SIGMA = -0.5, 0.6, 0.7  # the student of the card's numbers, and the noise level
PROCESSES = [Flow(), DiscreteVP.cosine()]


def iterate(method: DMD2, roles: WatchedRoles, iteration: int = 0) -> dict[str, Tensor]:
    numbers = draw(iteration)
    path = method.rollout(batch(roles), roles, numbers)
    critics = [method.critic_loss(path, roles, numbers.sub(update)) for update in range(method.critic_updates)]
    student = method.student_loss(path, roles, numbers)
    return {"critic": critics[0].values, "student": student.values, **critics[0].metrics, **student.metrics}


VARIANTS = {
    "default": {},
    "plain teacher": {"guidance_scale": 1.0},
    "one step": {"steps": 1},
    "no discriminator": {"gan_weight": 0.0},
    "told the call": {"critic_call_condition": True},
    "regression": {"steps": 1, "regression_weight": 0.25},
    "as DMD": {"steps": 1, "critic_updates": 1, "gan_weight": 0.0, "regression_weight": 0.25},
    "own noise": {"eta": 1.0},
    "flow": {"shift": 3.0, "critic_weight": "inverse_sigma"},
    "several step counts": {"step_counts": (1, 2, 4), "steps_condition": True},
    "decoupled": {"guidance": "decoupled"},
}


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: p.name)
@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_trains_only_who_it_should(name: str, process: Process) -> None:
    """The critic's loss reaches critic and discriminator, the student's the student; through them, but not into it."""
    method, roles = DMD2(DMD2Options(**VARIANTS[name])), WatchedRoles(process)
    students, critics = roles.parameters("student"), roles.parameters("critic")
    judges = roles.parameters("discriminator") if method.needs.discriminator else []
    path = method.rollout(batch(roles), roles, draw())

    loss = method.critic_loss(path, roles, draw())
    assert loss.values.shape == (COUNT,)
    assert loss.values.isfinite().all()
    found = torch.autograd.grad(loss.values.mean(), critics + judges + students, allow_unused=True)
    assert all(gradient.abs().sum() > 0 for gradient in found[: len(critics + judges)])
    assert all(gradient is None for gradient in found[len(critics + judges) :])

    loss = method.student_loss(path, roles, draw())
    assert loss.values.shape == (COUNT,)
    assert loss.values.isfinite().all()
    found = torch.autograd.grad(loss.values.mean(), students + critics, allow_unused=True)
    assert all(gradient.abs().sum() > 0 for gradient in found[: len(students)])
    assert all(gradient is None for gradient in found[len(students) :])
    assert all(not metric.requires_grad and metric.ndim == 0 for metric in loss.metrics.values())


@pytest.mark.parametrize("name", VARIANTS)
def test_forwards_are_what_is_claimed(name: str) -> None:
    method, roles = DMD2(DMD2Options(**VARIANTS[name])), WatchedRoles(Flow())
    iterations = 40
    for iteration in range(iterations):
        iterate(method, roles, iteration)
    made = sum(len(x) for _, x, *_ in roles.calls) / COUNT / iterations
    assert made == pytest.approx(method.forwards(), rel=0.04)


def test_forwards_in_the_docstring_are_right() -> None:
    assert DMD2Options().build().forwards() == pytest.approx(24, abs=0.5)
    assert DMD2Options(steps=1).build().forwards() == 21


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: p.name)
def test_backward_simulation_is_the_sampler(process: Process) -> None:
    """The sampler with fresh noise makes the very path that training walks, and what is compared is its prediction."""
    method, roles = DMD2(DMD2Options()), WatchedRoles(process)
    path = method.rollout(batch(roles), roles, draw())
    predictions: list[Tensor] = []
    lcm(
        roles.networks["student"],
        draw().normal("noise", (2,), torch.float64),
        method.options.time_grid(4),
        process,
        batch(roles).condition,
        noise=lambda k, shape: draw().normal(f"extra {k}", shape, torch.float64),
        callback=lambda k, x, denoised: predictions.append(denoised.detach()),
    )
    for call in range(4):
        clean = method._compared(path, path.landing(torch.full((COUNT,), call)), draw())
        torch.testing.assert_close(clean.x, predictions[call])
        torch.testing.assert_close(clean.t, torch.zeros(COUNT, dtype=torch.float64))


def test_steps_are_those_of_the_paper_and_all_drawn_alike() -> None:
    grid = DMD2Options().time_grid(4)
    assert (grid[:-1] * 1000 - 1).round().tolist() == [999, 749, 499, 249]
    calls = Streams(0).at(0, range(4000)).integers("call", 4).bincount()
    assert (calls - 1000).abs().max() < 120


def test_no_step_is_simulated_beyond_the_drawn_one_and_no_graph_reaches_back() -> None:
    method, roles = DMD2(DMD2Options()), WatchedRoles(Flow())
    path = method.rollout(batch(roles), roles, draw())
    method.student_loss(path, roles, draw())
    call = draw().sub("student").integers("call", path.steps)
    assert sum(len(x) for _, x, *_ in roles.made("student")) == int((call + 1).sum())
    assert not any(x.requires_grad for _, x, *_ in roles.made("student"))


def test_what_the_student_is_asked_about_is_its_own_and_never_data() -> None:
    """Card item 10: pure noise at the first call and only there, and real data change no point of the path."""
    method, roles, inputs = DMD2(DMD2Options()), WatchedRoles(Flow()), []
    for shift in (0.0, 5.0):
        told = batch(roles)
        assert told.real is not None
        other = replace(told, real=(told.real[0] + shift, told.real[1]))
        path = method.rollout(other, roles, draw())
        inputs.append([path.input(torch.full((COUNT,), call)) for call in range(4)])
    noise = draw().normal("noise", (2,), torch.float64)
    for call, (one, another) in enumerate(zip(*inputs, strict=True)):
        assert torch.equal(one, another)
        assert torch.equal(one, noise) == (call == 0)


def test_backward_simulation_has_the_students_variance_and_not_the_datas() -> None:
    """Card item 10: at the second call alpha^2 a^2 + sigma^2, where a noised datum has alpha^2 tau^2 + sigma^2."""
    process, count, gain = DiscreteVP.cosine(), 200_000, 0.4
    law = normal_law(process, 0.0, 0.8)
    roles = ToyRoles(law, lambda x, t, condition: gain * x, law)
    method = DMD2(replace(scalar_options(), steps=2))
    numbers = BulkDraw(count, torch.Generator().manual_seed(0))
    path = method.rollout(Batch({}, torch.arange(count), (1,), torch.float64), roles, numbers)
    t = torch.tensor(0.5)
    right = float((process.alpha(t) * gain) ** 2 + process.sigma(t) ** 2)
    assert float(path.input(torch.ones(count, dtype=torch.long)).var()) == pytest.approx(right, rel=0.02)
    assert right != pytest.approx(float((process.alpha(t) * 0.8) ** 2 + process.sigma(t) ** 2), rel=0.1)


def test_levels_are_the_whole_axis_but_for_its_ends() -> None:
    method, roles = DMD2(DMD2Options(gan_weight=0.0)), WatchedRoles(Flow())
    for iteration in range(40):
        iterate(method, roles, iteration)
    tau = torch.cat([tau for _, _, tau, _ in roles.made("critic")])
    assert 0.02 <= tau.min() < 0.022
    assert 0.978 < tau.max() <= 0.98


def test_the_gradient_is_that_of_the_divergence() -> None:
    """Card items 1 and 2: (m - mu)/(tau^2 + sigma^2) and s (1/(tau^2 + sigma^2) - 1/(s^2 + sigma^2))."""
    process = VE()
    roles = ExactRoles(normal_law(process, 0.3, 0.8), Affine(MEAN, STD, process.noise_scale))
    assert student_gradient(scalar_options(), roles, SIGMA) == pytest.approx((-0.707965, -0.174909), abs=1e-6)


def test_descent_direction_is_the_papers_formula() -> None:
    """d loss / d x = (fake - real) / mean |x - real| / elements (card section 2, g)."""
    method, roles = DMD2(DMD2Options(gan_weight=0.0, guidance_scale=2.5, steps=1)), WatchedRoles(Flow())
    path = method.rollout(batch(roles), roles, draw())
    values = method.student_loss(path, roles, draw()).values
    found = torch.stack([torch.autograd.grad(v, roles.parameters("student")[1], retain_graph=True)[0] for v in values])
    ((_, x_tau, tau, told),) = roles.made("critic")
    with torch.no_grad():
        told_real, untold = roles.exact(x_tau, tau, told), roles.exact(x_tau, tau, roles.null(told))
        real = untold + 2.5 * (told_real - untold)
        fake = roles.networks["critic"](x_tau, tau, told)
        clean = path.landing(torch.zeros(COUNT, dtype=torch.long)).denoised
    expected = (fake - real) / (clean - real).abs().mean(1, keepdim=True) / 2
    torch.testing.assert_close(found, expected)


def test_nothing_pulls_at_the_start_without_guidance_and_guidance_alone_with_it() -> None:
    """Card item 3: with the critic a copy of the teacher the update is zero to the bit, and else prop. to scale - 1."""
    gradients = {}
    for scale in (1.0, 2.0, 4.0):
        roles = WatchedRoles(Flow())
        roles.critic = roles.exact
        options = DMD2Options(gan_weight=0.0, guidance_scale=scale, normaliser="none")
        path = DMD2(options).rollout(batch(roles), roles, draw())
        loss = DMD2(options).student_loss(path, roles, draw()).values.sum()
        gradients[scale] = torch.autograd.grad(loss, roles.parameters("student"))[1]
    assert torch.equal(gradients[1.0], torch.zeros(2, dtype=torch.float64))
    torch.testing.assert_close(gradients[4.0], 3 * gradients[2.0])


def test_nothing_pulls_at_the_optimum_for_any_sample() -> None:
    """Card item 4: not only on average."""
    process = VE()
    student = Affine(0.3, 0.8, process.noise_scale)
    roles = ExactRoles(normal_law(process, 0.3, 0.8), student)
    method = DMD2(scalar_options())
    numbers = QuadratureDraw(0.5, method.options, nodes=8)
    path = method.rollout(Batch({}, numbers.samples, (1,), torch.float64), roles, numbers)
    values = method.student_loss(path, roles, numbers).values
    assert float(values.detach().max()) < 1e-25


def test_normaliser_of_a_gaussian_is_its_closed_form() -> None:
    """Card item 5: mean |x - real| tends to sqrt(2/pi) tau sigma / sqrt(tau^2 + sigma^2) as dimensions grow."""
    dimensions, tau, sigma = 40_000, 0.8, 0.7
    generator = torch.Generator().manual_seed(0)
    x, noise = (torch.randn(2, dimensions, generator=generator, dtype=torch.float64) for _ in range(2))
    real = tau**2 / (tau**2 + sigma**2) * (tau * x + sigma * noise)
    right = math.sqrt(2 / math.pi) * tau * sigma / math.hypot(tau, sigma)
    torch.testing.assert_close(normaliser("dmd", tau * x, real), torch.full((2,), right).double(), rtol=0.02, atol=0)


def test_the_exact_denoiser_is_the_critics_optimum() -> None:
    """Card item 6: at (s^2 x + sigma^2 m) / (s^2 + sigma^2) the critic's loss has no slope, elsewhere it has."""

    class Line(nn.Module):
        def __init__(self, slope: float, offset: float) -> None:
            super().__init__()
            self.coefficients = nn.Parameter(torch.tensor([slope, offset], dtype=torch.float64))

        def forward(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
            return self.coefficients[0] * x + self.coefficients[1]

    process, variance = VE(), STD**2 + SIGMA**2
    method = DMD2(scalar_options())
    numbers = QuadratureDraw(float(process.time_of(torch.tensor(SIGMA))), method.options)
    slopes = {}
    for shift in (0.0, 0.1):
        critic = Line(STD**2 / variance + shift, SIGMA**2 * MEAN / variance)
        roles = ToyRoles(normal_law(process, 0.3, 0.8), Affine(MEAN, STD, process.noise_scale), critic)
        path = method.rollout(Batch({}, numbers.samples, (1,), torch.float64), roles, numbers)
        loss = (numbers.weights * method.critic_loss(path, roles, numbers).values).sum()
        slopes[shift] = float(torch.autograd.grad(loss, critic.coefficients)[0].norm())
    assert slopes[0.0] < 1e-6  # the level is kept in float32
    assert slopes[0.1] > 0.01


def test_the_adversarial_gradient_is_matching_weighted_by_one_over_one_plus_r() -> None:
    """Card item 7: the best discriminator's non-saturating loss descends the softened reverse KL."""
    process = VE()
    roles = ExactRoles(normal_law(process, 0.3, 0.8), Affine(MEAN, STD, process.noise_scale))
    plain = student_gradient(scalar_options(), roles, SIGMA)
    both = student_gradient(scalar_options(gan_weight=1.0), roles, SIGMA)
    found = [b - a for a, b in zip(plain, both, strict=True)]
    assert found == pytest.approx([-0.365955, -0.023621], abs=1e-5)  # the table's row of the softened reverse KL


def test_real_data_correct_a_teacher_that_is_wrong() -> None:
    """Card item 8."""
    for answer in adversarial_fixed_points():
        assert answer.passed, answer


def test_a_trained_logit_is_the_log_ratio() -> None:
    """Card item 7, the classifier itself."""
    for answer in density_ratio(Flow()):
        assert answer.passed, answer


@pytest.mark.parametrize(("updates", "expected"), [(1, (0.975, 0.975)), (5, (0.880, 0.880)), (10, (0.872, 0.687))])
def test_two_time_scales_are_the_linear_model(updates: int, expected: tuple[float, float]) -> None:
    """Card item 9: means of student and critic follow e <- e - a f, f <- f + rho (e - f), which oscillates for few f.

    The matrix of one whole iteration of the method, rates set for a = 0.1 and rho = 0.05, has the card's eigenvalues.
    """
    process, std = VE(), 0.8
    options = replace(scalar_options(), critic_updates=updates, critic_weight="one")
    numbers = QuadratureDraw(float(process.time_of(torch.tensor(SIGMA))), options, nodes=8)
    share = SIGMA**2 / (std**2 + SIGMA**2)

    class Centred(nn.Module):
        """The exact denoiser of N(mean, std^2)."""

        def __init__(self, mean: float) -> None:
            super().__init__()
            self.mean = nn.Parameter(torch.tensor(mean, dtype=torch.float64))

        def forward(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
            return (1 - share) * x + share * self.mean

    def iteration(student_error: float, critic_error: float) -> tuple[float, float]:
        student, critic, method = Affine(student_error, std, process.noise_scale), Centred(critic_error), DMD2(options)
        roles = ToyRoles(normal_law(process, 0.0, std), student, critic)
        for step in range(1 + updates):  # the student first, as in the card
            path = method.rollout(Batch({}, numbers.samples, (1,), torch.float64), roles, numbers)
            loss = method.student_loss if step == 0 else method.critic_loss
            parameter, rate = (student.mean, 0.1 / share) if step == 0 else (critic.mean, 0.05 / (2 * share**2))
            value = (numbers.weights * loss(path, roles, numbers).values).sum()
            with torch.no_grad():
                parameter -= rate * torch.autograd.grad(value, parameter)[0]
        return float(student.mean.detach()), float(critic.mean.detach())

    columns = [iteration(1.0, 0.0), iteration(0.0, 1.0)]
    values = torch.linalg.eigvals(torch.tensor(columns, dtype=torch.float64).T)
    assert sorted(values.abs().tolist(), reverse=True) == pytest.approx(expected, abs=1e-3)
    assert bool((values.imag.abs() > 1e-6).any()) == (updates < 10)


def test_regression_adds_the_distance_to_the_teachers_samples() -> None:
    plain, regressed = (WatchedRoles(Flow()) for _ in range(2))
    first = iterate(DMD2(DMD2Options(steps=1)), plain)["student"]
    second = iterate(DMD2(DMD2Options(steps=1, regression_weight=0.25)), regressed)["student"]
    noise, made, told = batch(plain).pairs
    with torch.no_grad():
        denoised = plain.networks["student"](noise, torch.ones(COUNT, dtype=torch.float64), told)
    torch.testing.assert_close(second - first, 0.25 * (denoised - made).square().mean(1))


def test_the_critic_is_told_the_call_and_teacher_and_discriminator_are_not() -> None:
    options = DMD2Options(critic_call_condition=True, step_counts=(2, 4), steps_condition=True)
    method, roles = DMD2(options), WatchedRoles(Flow())
    for iteration in range(4):
        iterate(method, roles, iteration)
    told = torch.cat([told[LANDING] for *_, told in roles.made("critic")])
    assert set(told.tolist()) == {0.0, 0.25, 0.5, 0.75}
    assert all(STEPS in told for *_, told in roles.made("critic") + roles.made("student"))
    for *_, condition in roles.made("teacher") + roles.made("discriminator"):
        assert condition.keys() == {LABEL}
    assert method.needs.landing_condition


def test_the_discriminator_sees_real_and_fake_at_one_level() -> None:
    method, roles = DMD2(DMD2Options(critic_updates=1)), WatchedRoles(Flow())
    metrics = iterate(method, roles)
    real, fake, fooled = roles.made("discriminator")
    assert torch.equal(real[2], fake[2])
    assert not torch.equal(real[1], fake[1])
    asked = roles.made("critic")
    assert torch.equal(fake[1], asked[0][1])
    assert torch.equal(fooled[1].detach(), asked[1][1])
    assert {"logit_real", "logit_fake", "discriminator_loss", "adversarial_loss"} <= metrics.keys()


def test_presets_are_the_papers() -> None:
    two, one = preset("dmd2"), preset("dmd")
    assert (two.counts, two.critic_updates, two.gan_weight, two.discriminator_weight) == ((4,), 5, 5e-3, 1e-2)
    assert (one.counts, one.critic_updates, one.gan_weight, one.regression_weight) == ((1,), 1, 0.0, 0.25)
    assert two.build().needs.discriminator
    assert two.build().needs.real_data
    assert two.build().needs.features == "critic"
    assert one.build().needs.pairs
    assert not one.build().needs.discriminator


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"regression_weight": -1.0, "steps": 1}, "regression_weight = -1"),
        ({"regression_weight": 0.25}, "a student of one step"),
        ({"regression_weight": 0.25, "steps": 2, "step_counts": (1, 2)}, "a student of one step"),
        ({"tau_min": 0.99}, "tau_min 0.99 with margin"),
        ({"gan_weight": -1.0}, "gan_weight = -1"),
        ({"discriminator_weight": 0.0}, "discriminator_weight = 0"),
    ],
)
def test_bad_settings_are_refused_with_a_fix(changes: dict[str, object], message: str) -> None:
    with pytest.raises(FewstepError, match=message) as caught:
        replace(DMD2Options(), **changes).build()
    assert "fix:" in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [(DMD2Options(), "without real data"), (preset("dmd"), "without pairs")],
)
def test_a_batch_that_lacks_something_is_refused(options: DMD2Options, message: str) -> None:
    bare = Batch({}, torch.arange(2), (2,), torch.float64)
    with pytest.raises(FewstepError, match=message):
        options.build().rollout(bare, WatchedRoles(Flow()), Streams(0).at(0, range(2)))


@pytest.mark.parametrize("process", [Flow(), DiscreteVP.linear()], ids=lambda p: p.name)
@pytest.mark.parametrize(("steps", "gan_weight"), [(1, 5e-3), (4, 0.0)])
def test_known_answer(process: Process, steps: int, gan_weight: float) -> None:
    for answer in dmd2_gaussian(process, steps, gan_weight):
        assert answer.passed, answer


class Reversed(DMD2):
    """Walks away from the teacher."""

    def student_loss(self, path: Path, roles: Roles, draw: Draw) -> Loss:
        loss = super().student_loss(path, roles, draw)
        return Loss(-loss.values, loss.metrics)


class OneLevel(DMD2):
    """Asks at high noise only, where laws hardly differ."""

    def _query(self, path: Path, landing: Landing, draw: Draw) -> Query:
        query = super()._query(path, landing, draw)
        tau = torch.full_like(query.tau, 0.95)
        return Query(renoise(path.process, landing.x.detach(), landing.t, tau, query.noise), tau, query.noise)


@pytest.mark.parametrize("broken", [Reversed, OneLevel])
def test_a_broken_method_fails_the_known_answer(broken: type[DMD2]) -> None:
    method = broken(dmd2_options(1, 0.0))
    assert not all(answer.passed for answer in dmd2_gaussian(Flow(), 1, 0.0, method))
