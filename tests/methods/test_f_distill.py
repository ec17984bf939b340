"""f-distill against its card: weights, both normalisations, where ratios come from, what less mode-seeking keeps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace

import pytest
import torch
from scipy.optimize import root
from torch import Tensor, nn

from fewstep.core.process import VE, Flow
from fewstep.core.rollout import Landing, Path
from fewstep.core.streams import Streams
from fewstep.core.tensors import Condition
from fewstep.evaluation.exact import MixtureTeacher, ring
from fewstep.evaluation.known_answers_adversarial import Affine, ExactRoles, normal_law
from fewstep.evaluation.toy import BulkDraw, LogisticDiscriminator, ToyRoles
from fewstep.losses.divergence import DIVERGENCES, clipped_ratio, divergence_weight, mean_one_by_time
from fewstep.losses.matching import match
from fewstep.methods import DMD2Options, FDistillOptions, preset
from fewstep.methods.base import Batch
from fewstep.methods.dmd2 import DMD2
from fewstep.methods.f_distill import FDistill

COUNT = 64
PLAIN = FDistillOptions(guidance_scale=1.0, critic_updates=1)
SCALAR = FDistillOptions(steps=1, guidance_scale=1.0, normaliser="none", gan_weight=0.0)


class TwoHeads(nn.Module):
    """Two discriminators side by side that say different things."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList(LogisticDiscriminator(Flow(), 2).double() for _ in range(2))
        for seed, head in enumerate(self.heads):
            nn.init.normal_(head.weight, std=0.3, generator=torch.Generator().manual_seed(seed))
        self.rows = 0

    def forward(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        self.rows += len(x)
        return torch.cat([head(x, t, condition) for head in self.heads], 1)


class Shifted(nn.Module):
    """The teacher and a trainable offset."""

    def __init__(self, teacher: MixtureTeacher, offset: float) -> None:
        super().__init__()
        self.teacher = [teacher]
        self.offset = nn.Parameter(torch.full((2,), offset, dtype=torch.float64))

    def forward(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return self.teacher[0](x, t, condition) + self.offset


def setting(discriminator: nn.Module | None = None) -> tuple[ToyRoles, Batch]:
    teacher = ring(Flow(), [1, 2, 3], 1.5, 0.3, torch.float64)
    roles = ToyRoles(teacher, Shifted(teacher, 0.1), Shifted(teacher, -0.1), discriminator or TwoHeads())
    clean = teacher.sample(COUNT, torch.Generator().manual_seed(1))
    return roles, Batch({}, torch.arange(COUNT), (2,), torch.float64, real=(clean, {}))


def losses(method: DMD2) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """(critic's values, student's values, metrics) of one iteration."""
    roles, batch = setting()
    draw = Streams(0).at(0, batch.samples)
    path = method.rollout(batch, roles, draw)
    critic, student = method.critic_loss(path, roles, draw), method.student_loss(path, roles, draw)
    return critic.values.detach(), student.values.detach(), critic.metrics | student.metrics


def test_reverse_kl_is_dmd2_to_the_bit() -> None:
    """Card item 10."""
    options = replace(preset("dmd2"), critic_updates=1, gan_weight=0.01)
    values = {field.name: getattr(options, field.name) for field in fields(DMD2Options)}
    for a, b in zip(losses(DMD2(options))[:2], losses(FDistill(FDistillOptions(**values)))[:2], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_samples_loss_is_dmd2s_times_its_weight(name: str) -> None:
    """Both stages: ratio of the mean logit, mean 1 in bins of tau, weight, mean 1 in the batch."""
    seen: dict[str, Tensor] = {}

    def log_ratio(x: Tensor, tau: Tensor, condition: Condition) -> Tensor:
        seen.update(tau=tau, log_ratio=TwoHeads()(x, tau, condition).mean(1))
        return seen["log_ratio"]

    reverse = replace(PLAIN, gan_weight=0.0, divergence="reverse_kl")
    options = reverse if name == "reverse_kl" else replace(reverse, divergence=name, ratio_bins=4)
    plain = losses(FDistill(reverse))[1]
    given = losses(FDistill(options, log_ratio))[1]
    own = losses(FDistill(options))[1]
    if name == "reverse_kl":
        assert not seen
        assert torch.equal(given, plain)
        return
    ratio = mean_one_by_time(clipped_ratio(seen["log_ratio"], (0.1, 20.0)), seen["tau"], 4)
    weight = divergence_weight(name, ratio)
    torch.testing.assert_close(given, plain * weight / weight.mean())
    torch.testing.assert_close(own, given)  # a discriminator's heads are averaged before the exponential
    assert not torch.allclose(given, plain)


def test_the_ratio_costs_no_forward_beside_the_adversarial_term() -> None:
    for options, log_ratio, rows in (
        (PLAIN, None, 3),
        (replace(PLAIN, gan_weight=0.0), None, 3),
        (replace(PLAIN, gan_weight=0.0), lambda x, tau, condition: torch.zeros_like(tau), 0),
        (replace(PLAIN, gan_weight=0.0, divergence="reverse_kl"), None, 0),
    ):
        discriminator = TwoHeads()
        roles, batch = setting(discriminator)
        draw = Streams(0).at(0, batch.samples)
        method = FDistill(options, log_ratio)
        path = method.rollout(batch, roles, draw)
        method.critic_loss(path, roles, draw)
        method.student_loss(path, roles, draw)
        assert discriminator.rows == rows * COUNT
        assert method.needs.discriminator == method.needs.real_data == (rows > 0)
        assert method.forwards() == pytest.approx(FDistill(replace(PLAIN, gan_weight=0.01)).forwards() - 3 + rows)


def test_weights_have_mean_one_and_carry_no_gradient() -> None:
    """Card item 5; the effective share of the samples is logged."""
    metrics = losses(FDistill(replace(PLAIN, divergence="forward_kl")))[2]
    assert 0 < metrics["weight_min"] < 1 < metrics["weight_max"]
    assert 0 < metrics["weight_effective_share"] < 1
    assert not any(value.requires_grad for value in metrics.values())


@pytest.mark.parametrize("name", DIVERGENCES)
def test_equal_laws_weigh_all_samples_alike(name: str) -> None:
    """Card item 5: at p = q every divergence is DMD2."""
    options = replace(PLAIN, gan_weight=0.0)
    plain = losses(FDistill(replace(options, divergence="reverse_kl")))[1]
    equal = losses(FDistill(replace(options, divergence=name), lambda x, tau, condition: torch.zeros_like(tau)))[1]
    torch.testing.assert_close(equal, plain)


class HalfWay(FDistill):
    """Matches laws at tau = 1/2 alone."""

    def _levels(self, path: Path, landing: Landing) -> tuple[Tensor, Tensor]:
        half, margin = torch.full_like(landing.t, 0.5), self.options.margin
        return half - margin, half + margin


@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_mere_shift_has_one_gradient_for_every_divergence(name: str) -> None:
    """Card item 5's special case: scores of equal Gaussians differ by a constant, and weights average to 1."""
    process = VE()
    student = Affine(0.0, 0.6, process.noise_scale)
    roles = ExactRoles(normal_law(process, 0.5, 0.6), student)
    method = HalfWay(replace(SCALAR, divergence=name), roles.log_ratio)
    draw = BulkDraw(256, torch.Generator().manual_seed(0))
    path = method.rollout(Batch({}, torch.arange(256), (1,), torch.float64), roles, draw)
    loss = method.student_loss(path, roles, draw).values.mean()
    found = float(torch.autograd.grad(loss, student.mean)[0])
    share = float(process.sigma(torch.tensor(0.5)) ** 2)
    assert found == pytest.approx(-0.5 * share / (0.36 + share), rel=1e-5)


FIXED_POINTS = {
    "forward_kl": (-0.2500, 1.1931),
    "jensen_shannon": (-0.2492, 1.1792),
    "squared_hellinger": (-0.2485, 1.1699),
    "jeffreys": (-0.2461, 1.1341),
    "reverse_kl": (-0.2453, 1.0930),
    "softened_reverse_kl": (-0.2462, 1.0438),
}
"""Mean and std of a Gaussian student of 0.7 N(-1, 0.3^2) + 0.3 N(1.5, 0.4^2), over EDM's noise levels, differences of
denoised samples weighted alike, as the method does (item 3). Reverse KL is the card's own number (dmd2, item 11);
the card's others weight scores alike, where the reverse KL has several points of rest."""


def pull_on_a_gaussian(name: str, point: Sequence[float], of_scores: bool) -> list[float]:
    """Mean pull on mean and std of a Gaussian student over EDM's levels; differences of scores weighted alike, or, as
    in the method, of denoised samples."""
    process, (mean, std) = VE(), point
    low, high = process.sigma_min ** (1 / 7), process.sigma_max ** (1 / 7)
    sigma = (low + torch.arange(20, 981, 8, dtype=torch.float64) / 999 * (high - low)) ** 7
    means = torch.tensor([[-1.0], [1.5]], dtype=torch.float64)
    covariances = torch.tensor([[[0.09]], [[0.16]]], dtype=torch.float64)
    teacher = MixtureTeacher(process, torch.tensor([0.7, 0.3], dtype=torch.float64), means, covariances)
    u = torch.linspace(-9, 9, 1501, dtype=torch.float64)
    levels = sigma[:, None].expand(-1, len(u))
    t = process.time_of(levels).flatten()
    share = torch.exp(-0.5 * u.square()) / torch.exp(-0.5 * u.square()).sum()
    spread = (std**2 + levels.square()).sqrt()
    x = mean + spread * u
    column = x.flatten()[:, None]
    log_p = teacher.log_density(column, t, {}).view(x.shape)
    of_teacher = (teacher(column, t, {}).view(x.shape) - x) / levels.square()
    log_q = -0.5 * u.square() - spread.log()
    weight = divergence_weight(name, (log_p - log_q).exp())
    if not of_scores:
        weight = levels.square() * weight
    weighted = share * weight * (of_teacher + u / spread)
    return [float(weighted.sum(1).mean()), float((weighted * std * u / spread).sum(1).mean())]


@pytest.mark.parametrize("name", FIXED_POINTS)
def test_a_gaussian_student_comes_to_rest_where_the_card_says(name: str) -> None:
    """Forward KL matches the teacher's moments; the others' spread falls in the order of their mode-seeking."""
    found = root(lambda point: pull_on_a_gaussian(name, point, of_scores=False), [-0.2, 1.1], tol=1e-8)
    assert found.success
    assert tuple(found.x) == pytest.approx(FIXED_POINTS[name], abs=2e-4)


@pytest.mark.parametrize(
    ("name", "card", "found"),
    [
        ("forward_kl", (-0.2500, 1.1931), (-0.2500, 1.1931)),
        ("jensen_shannon", (-0.2171, 1.1886), (-0.2164, 1.1887)),
        ("squared_hellinger", (-0.1927, 1.1685), (-0.1906, 1.1689)),
    ],
)
def test_with_scores_weighted_alike_the_calm_divergences_rest_near_the_cards_numbers(
    name: str, card: tuple[float, float], found: tuple[float, float]
) -> None:
    """Item 3's own weights; forward KL rests at the teacher's moments for any."""
    rest = root(lambda point: pull_on_a_gaussian(name, point, of_scores=True), card, tol=1e-8)
    assert rest.success
    assert tuple(rest.x) == pytest.approx(found, abs=1e-4)
    assert tuple(rest.x) == pytest.approx(card, abs=2.5e-3)


def test_with_scores_weighted_alike_the_reverse_kl_does_not_rest_at_the_cards_numbers() -> None:
    """It has two points of rest, and the card's is between them (docs/findings/dmd2-mixture-critic.md)."""
    assert pull_on_a_gaussian("reverse_kl", (-0.1206, 1.0114), of_scores=True)[0] == pytest.approx(0.0217, abs=2e-4)
    for rest in ((0.1001, 1.0806), (-0.2414, 0.9539)):
        assert max(map(abs, pull_on_a_gaussian("reverse_kl", rest, of_scores=True))) < 1e-4


def test_softened_reverse_kl_without_a_discriminators_loss_is_the_exact_adversarial_direction() -> None:
    """Card item 7: 1/(1 + r) for the non-saturating loss, r/(1 + r) for the saturating one."""
    logit = torch.linspace(-4, 4, 9, dtype=torch.float64, requires_grad=True)
    (non_saturating,) = torch.autograd.grad(torch.nn.functional.softplus(-logit).sum(), logit)
    (saturating,) = torch.autograd.grad(-torch.nn.functional.softplus(logit).sum(), logit)
    ratio = logit.detach().exp()
    torch.testing.assert_close(-non_saturating, divergence_weight("softened_reverse_kl", ratio))
    torch.testing.assert_close(-saturating, divergence_weight("jensen_shannon", ratio))


class LowNoise(FDistill):
    """Matches laws where modes are apart."""

    def _levels(self, path: Path, landing: Landing) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(landing.t), torch.full_like(landing.t, 0.4)


def mass_of_the_far_mode(name: str) -> float:
    """Share of an affine student's samples above 0 after training from the left of two equal modes at -2 and 2.

    Critic and ratio are exact throughout.
    """
    process, count, iterations = Flow(), 512, 200
    means = torch.tensor([[-2.0], [2.0]], dtype=torch.float64)
    covariances = torch.full((2, 1, 1), 0.09, dtype=torch.float64)
    teacher = MixtureTeacher(process, torch.ones(2, dtype=torch.float64), means, covariances)
    student = Affine(-1.0, 1.0, process.noise_scale)
    roles = ExactRoles(teacher, student)
    method = LowNoise(replace(SCALAR, divergence=name), roles.log_ratio)
    draw = BulkDraw(count, torch.Generator().manual_seed(0))
    adam = torch.optim.Adam(student.parameters(), 0.02)
    for iteration in range(iterations):
        adam.param_groups[0]["lr"] = 0.02 * (1 - iteration / iterations)
        path = method.rollout(Batch({}, torch.arange(count), (1,), torch.float64), roles, draw)
        loss = method.student_loss(path, roles, draw).values.mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
    below = torch.distributions.Normal(student.mean.detach(), student.std.detach()).cdf(torch.tensor(0.0))
    return 1 - float(below)


def test_less_mode_seeking_keeps_the_far_mode() -> None:
    """Card item 9 with an exact ratio: the reverse KL lets go of it, Jensen-Shannon and forward KL do not."""
    kept = [mass_of_the_far_mode(name) for name in ("reverse_kl", "jensen_shannon", "forward_kl")]
    assert kept[0] < 1e-3
    assert 0.4 < kept[1] < kept[2] < 0.55


def test_preset_is_jensen_shannon_on_the_teachers_features() -> None:
    options = preset("f-distill")
    needs = options.build().needs
    assert options.divergence == "jensen_shannon"
    assert (options.ratio_clip, options.ratio_bins, options.critic_updates) == ((0.1, 20.0), 10, 5)
    assert needs.discriminator
    assert needs.real_data
    assert needs.features == "teacher"


def test_the_weight_leaves_the_matching_losss_direction_as_it_is() -> None:
    """A weight above 0 scales a sample's gradient and never turns it."""
    sample = torch.randn(4, 3, dtype=torch.float64).requires_grad_()
    direction, ones = torch.randn(4, 3, dtype=torch.float64), torch.ones(4, dtype=torch.float64)
    weight = divergence_weight("jensen_shannon", torch.tensor([0.1, 1.0, 5.0, 20.0], dtype=torch.float64))
    (weight * match(sample, direction, normaliser=ones, metric_kind="l2", c=1.0)).sum().backward()
    torch.testing.assert_close(sample.grad, -weight[:, None] * direction / 3)


def test_a_class_that_is_rarer_in_the_real_batch_is_taken_for_unlikely() -> None:
    """Card msd.md, item 8: priors that differ add a constant per class to the logit, which moves the ratio and so the
    weights, and leaves the reverse KL alone; so a part's discriminator is shown scenes of that part only."""
    rare = torch.arange(COUNT) % 2 == 0
    prior = torch.where(rare, 0.2 / 0.5, 0.8 / 0.5).double().log()
    for name, same in (("reverse_kl", True), ("jensen_shannon", False)):
        options = replace(PLAIN, gan_weight=0.0, divergence=name)
        fair, biased = (
            losses(FDistill(options, lambda x, tau, condition, bias=bias: bias + 0 * tau))[1]
            for bias in (torch.zeros(COUNT, dtype=torch.float64), prior)
        )
        assert torch.equal(fair, biased) == same
        if not same:
            change = biased / fair
            assert change[rare].max() < change[~rare].min()
