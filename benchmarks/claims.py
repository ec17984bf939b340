"""Claims of the papers, tried where every law is known: `python benchmarks/claims.py --out claims`.

Each claim is a handful of small trainings, each of a few seconds of one core, on mixtures in the plane: cosine process,
no guidance, networks of the mixtures' league at half their width and twice their rates, which begin as the teacher. A
claim's numbers are kept in OUT/<claim>.json as they come, and what is there already is not run again. It prints a
Markdown table per claim: mean over seeds ± half the distance of the largest and the smallest.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from functools import cache, partial
from pathlib import Path as File
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from fewstep.core import solvers
from fewstep.core.process import DiscreteVP
from fewstep.core.rollout import Landing, Path
from fewstep.core.streams import Draw
from fewstep.core.tensors import Condition
from fewstep.evaluation.exact import LABEL, MixtureTeacher
from fewstep.evaluation.known_answers_mixture import kept_share, mixture_teacher
from fewstep.evaluation.known_answers_phased import Phases
from fewstep.evaluation.metrics import sliced_wasserstein
from fewstep.evaluation.toy import MLPDiscriminator, ResidualMLP, distil
from fewstep.league.budget import phases
from fewstep.league.entries import unguided
from fewstep.league.mixtures import PLANE, samples, the_teacher
from fewstep.losses.divergence import clipped_ratio, divergence_weight
from fewstep.methods.base import Batch, Method, Roles
from fewstep.methods.dmd2 import DMD2, DMD2Options
from fewstep.methods.f_distill import FDistill, FDistillOptions
from fewstep.methods.matching import Query
from fewstep.methods.matching_options import MatchingOptions
from fewstep.methods.phased import PhasedOptions
from fewstep.methods.sid import DrawnPath, SiD, SiDOptions
from fewstep.methods.tdm_options import TDMOptions, tdm, tdm_paper
from fewstep.models.experts import switch_times

Numbers = dict[str, float]
Variant = Callable[[int], Numbers]
"""Of a seed."""

_BATCH, _WIDTH, _COUNT = 128, 64, 8000
_RATES = {"student_rate": 1e-3, "critic_rate": 4e-3, "discriminator_rate": 4e-3}


@dataclass(frozen=True)
class Claim:
    """What a paper says, in our words, and the trainings that try it."""

    paper: str
    says: str
    variants: Mapping[str, Variant]


def plane(options: Any, **changes: Any) -> Any:
    """The options as the mixtures' league has them, with changes."""
    there = {option.name for option in fields(options)}
    return replace(unguided(replace(options, **{k: v for k, v in PLANE.items() if k in there})), **changes)


def run(
    method: Any,
    teacher: MixtureTeacher,
    seed: int,
    iterations: int,
    *,
    start: MixtureTeacher | None = None,
    student: nn.Module | None = None,
    critic: nn.Module | None = None,
    width: int = _WIDTH,
    **settings: Any,
) -> nn.Module:
    """A trained student. Student and critic begin as the teacher, or as the sampler of another law `start`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        own, judge = ResidualMLP(start or teacher, width), MLPDiscriminator(teacher, _WIDTH)
        critic = critic or ResidualMLP(start or teacher, _WIDTH)
    needs = method.needs
    settings = {"batch": _BATCH, "average": max(0.0, min(0.99, 1 - 10 / iterations)), **_RATES, **settings}
    if needs.discriminator:
        settings = {"discriminator": judge, "real": teacher.sample, **settings}
    student = student or own
    distil(cast(Method, method), teacher, student, critic, iterations=iterations, seed=seed, **settings)
    return student


@cache
def scored(seed: int, options: Any, iterations: int, build: Any = None, **settings: Any) -> Numbers:
    """Distance to the law of a student of the ring of eight, and the smallest mode's share of its weight."""
    teacher = the_teacher()
    student = run((build or type(options).build)(options), teacher, seed, iterations, **settings)
    return distances(samples(student, teacher, options, options.steps, _COUNT), teacher)


def distances(made: Tensor, teacher: MixtureTeacher) -> Numbers:
    """Sliced W2, and the smallest mode's share of its weight."""
    return {"sliced W2": distance(made, teacher), "smallest mode": kept_share(made, teacher)}


def distance(made: Tensor, teacher: MixtureTeacher) -> float:
    """Sliced W2 to samples of the law."""
    return sliced_wasserstein(made, teacher.sample(len(made), torch.Generator().manual_seed(2)), 64)


# DMD2


def two_time_scales() -> Mapping[str, Variant]:
    o = plane(DMD2Options(steps=2), gan_weight=0.0)
    once, five = replace(o, critic_updates=1), replace(o, critic_updates=5)
    return {
        "1 critic update, 100 iterations": partial(scored, options=once, iterations=100),
        "5 critic updates, 100 iterations": partial(scored, options=five, iterations=100),
        "1, as many forwards as 5": partial(
            scored, options=once, iterations=int(100 * five.build().forwards() / once.build().forwards())
        ),
    }  # fmt: skip


class FromData(Path):
    """A path whose calls after the first are given noised real data, not what the calls before them made."""

    def input(self, call: Tensor) -> Tensor:
        assert self.real is not None
        t, _ = self.times(call)
        noised = solvers.land(self.process, self.real[0], self._inputs[0] / self.process.noise_scale, t)
        return torch.where((call == 0)[:, None], self._inputs[0], noised)

    @torch.no_grad()
    def landing(self, call: Tensor) -> Landing:
        return self.land(self._student, call)


class WithoutSimulation(DMD2):
    """DMD2 with inputs of noised data."""

    def rollout(self, batch: Batch, roles: Roles, draw: Draw) -> Path:
        path = super().rollout(batch, roles, draw)
        noise = path.input(torch.zeros_like(path.steps)) / roles.process.noise_scale
        other = FromData(roles.student, noise, path.grid, roles.process, path.condition, 0.0, path._extra_noise)
        other.real = batch.real
        return other


def backward_simulation() -> Mapping[str, Variant]:
    found: dict[str, Variant] = {}
    for steps in (4,):
        o = plane(DMD2Options(steps=steps), gan_weight=0.0, critic_updates=2)
        found[f"K = {steps}, simulated"] = partial(scored, options=o, iterations=100)
        found[f"K = {steps}, noised data"] = partial(
            scored, options=o, iterations=100, build=WithoutSimulation, real=the_teacher().sample
        )
    return found


def wrong_teacher(seed: int, gan_weight: float) -> Numbers:
    """The teacher is 0.4 to the right of the data."""
    right = the_teacher()
    shift = torch.tensor([0.4, 0.0])
    teacher = MixtureTeacher(right.process, right.weights, right.means + shift, right.covariances)
    o = plane(DMD2Options(steps=2), gan_weight=gan_weight, critic_updates=2)
    student = run(o.build(), teacher, seed, 100, **({"real": right.sample} if gan_weight else {}))
    made = samples(student, teacher, o, 2, _COUNT)
    left = (made.mean(0) - right.moments(0.0)[0])[0]
    return {"mean's error": float(left)} | distances(made, right)


# f-distill


def two_modes(small: float) -> MixtureTeacher:
    """Modes at -1.5 and 1.5, std 0.3, the first with weight `small`."""
    means = torch.tensor([[-1.5, 0.0], [1.5, 0.0]])
    covariances = (0.3**2 * torch.eye(2)).expand(2, 2, 2)
    return MixtureTeacher(DiscreteVP.cosine(), torch.tensor([small, 1 - small]), means, covariances)


def recovery(seed: int, divergence: Any, iterations: int) -> Numbers:
    """Share of a mode of weight 0.5 that a 2-step student begins with at 0.05."""
    teacher = two_modes(0.5)
    o = plane(FDistillOptions(steps=2), divergence=divergence, gan_weight=0.0, critic_updates=2)
    student = run(o.build(), teacher, seed, iterations, start=two_modes(0.05))
    made = samples(student, teacher, o, 2, _COUNT)
    return {"share of the small mode": float((made[:, 0] < 0).float().mean())}


def divergences() -> Mapping[str, Variant]:
    kinds = ("reverse_kl", "jensen_shannon", "forward_kl")
    return {kind: partial(recovery, divergence=kind, iterations=60) for kind in kinds}


def effective_share(seed: int, divergence: Any, clip: tuple[float, float]) -> Numbers:
    """Kish's share (sum h)^2 / (n sum h^2) of 512 samples of N(0, 1), teacher N(d, 1)."""
    x = torch.randn(512, generator=torch.Generator().manual_seed(seed))
    found = {}
    for gap in (1.0, 2.0, 3.0):
        weight = divergence_weight(divergence, clipped_ratio(gap * x - gap**2 / 2, clip))
        found[f"d = {gap:g}"] = float(weight.mean() ** 2 / weight.square().mean())
    return found


def effective_shares() -> Mapping[str, Variant]:
    kinds = ("softened_reverse_kl", "jensen_shannon", "squared_hellinger", "jeffreys", "forward_kl")
    exact = {kind: partial(effective_share, divergence=kind, clip=(1e-6, 1e6)) for kind in kinds}
    return exact | {"forward_kl, clipped": partial(effective_share, divergence="forward_kl", clip=(0.1, 20.0))}


class Unnormalised(FDistill):
    """h(r) of the clipped ratio as it is, with neither of the two normalisations."""

    def _sample_weight(self, roles: Roles, query: Query, condition: Condition) -> Tensor:
        log_ratio = roles.log_ratio(query.x, query.tau, condition)
        return divergence_weight(self.options.divergence, clipped_ratio(log_ratio, self.options.ratio_clip))


def normalisations() -> Mapping[str, Variant]:
    found: dict[str, Variant] = {}
    for kind in ("forward_kl",):
        o = plane(FDistillOptions(steps=2), divergence=kind, gan_weight=0.0, critic_updates=2)
        found[f"{kind}, both"] = partial(scored, options=o, iterations=100)
        found[f"{kind}, neither"] = partial(scored, options=o, iterations=100, build=Unnormalised)
    return found


# SiD


class Through(DrawnPath):
    """A path through all of whose calls the gradient flows."""

    def land(self, student: Any, call: Tensor) -> Landing:
        x, everyone = self._inputs[0], torch.arange(len(call))
        for k in range(int(call[0]) + 1):
            t_from, t = self.times(torch.full_like(call, k))
            denoised = student(x, t_from, self.condition)
            eps = self._landing_noise(x, denoised, t_from, everyone, torch.full_like(call, k))
            x = solvers.land(self.process, denoised, eps, t)
        return Landing(x, denoised, eps, t, t_from, self.condition)


class LastStep(SiD):
    """The law of the last call alone, with the gradient through all of them."""

    def rollout(self, batch: Batch, roles: Roles, draw: Draw) -> DrawnPath:
        path = super().rollout(batch, roles, draw)
        noise = path.input(torch.zeros_like(path.steps)) / roles.process.noise_scale
        other = Through(roles.student, noise, path.grid, roles.process, path.condition, path.eta, path._extra_noise)
        other.call = path.steps - 1
        return other


def fixed_noise(seed: int, options: SiDOptions, iterations: int) -> Numbers:
    """Sampled as trained: with the noise of the start again at every step."""
    teacher = the_teacher()
    student = run(options.build(), teacher, seed, iterations)
    noise = torch.randn(_COUNT, 2, generator=torch.Generator().manual_seed(1))
    grid = options.time_grid(options.steps)
    path = Path(student, noise, grid, teacher.process, {}, options.eta, lambda call, shape: noise)
    return distances(path.landing(path.steps - 1).x, teacher)


def alphas() -> Mapping[str, Variant]:
    found: dict[str, Variant] = {}
    for steps, alpha in ((k, a) for k in (1,) for a in (0.5, 1.0, 1.2)):
        o = plane(SiDOptions(steps=steps), alpha=alpha)
        found[f"K = {steps}, alpha {alpha:g}"] = partial(scored, options=o, iterations=100)
    return found


# TDM


def match_clean(**changes: Any) -> DMD2Options:
    """TDM's deterministic path, but of each call the clean prediction is matched, at all levels."""
    return cast(DMD2Options, plane(DMD2Options(), eta=1.0, gan_weight=0.0, critic_updates=1, **changes))


def each_count(seed: int, options: TDMOptions, iterations: int) -> Numbers:
    """Sliced W2 of one student walked in 1, 2 and 4 steps."""
    teacher = the_teacher()
    student = run(options.build(), teacher, seed, iterations)
    counts = {steps: samples(student, teacher, options, steps, _COUNT) for steps in (1, 2, 4)}
    return {f"K = {steps}": distance(made, teacher) for steps, made in counts.items()}


def each_solver(seed: int, options: TDMOptions, iterations: int) -> Numbers:
    """Sliced W2 of one student walked by three solvers."""
    teacher = the_teacher()
    student = run(options.build(), teacher, seed, iterations)
    noise = torch.randn(_COUNT, 2, generator=torch.Generator().manual_seed(1)) * teacher.process.noise_scale
    found = {}
    for solver in (solvers.ddim, solvers.dpmpp_2m):
        with torch.no_grad():
            made = solver(student, noise, options.time_grid(options.steps), teacher.process, {})
        found[solver.__name__] = distance(made, teacher)
    return found


def coverage(seed: int, options: MatchingOptions, forwards: float) -> Numbers:
    """Of the grid of 25 modes, at equal network forwards."""
    teacher = mixture_teacher(DiscreteVP.cosine(), "grid of 25")
    method = options.build()
    student = run(method, teacher, seed, int(forwards / cast(Any, method).forwards()))
    return distances(samples(student, teacher, options, options.steps, _COUNT), teacher)


# Phased DMD and MSD


def in_phases(
    seed: int, options: PhasedOptions, iterations: int, carried: bool = False, one_network: bool = False
) -> Numbers:
    """`iterations` in all; `carried`: the critic goes on from phase to phase; `one_network`: so does the student."""
    teacher, student = the_teacher(), None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + 1000)
        critic = ResidualMLP(teacher, _WIDTH) if carried else None
    steps = phases(options)
    for step in cast(list[PhasedOptions], steps):
        trained: nn.Module | None = student
        if student is not None and not one_network:
            switch = switch_times(step.time_grid(step.steps), step.ends)[step.phase - 2]
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed + step.phase)
                trained = Phases(student, ResidualMLP(teacher, _WIDTH), switch)
        student = run(step.build(), teacher, seed, iterations // len(steps), student=trained, critic=critic)
    assert student is not None
    return distances(samples(student, teacher, options, options.steps, _COUNT), teacher)


def phased_variants() -> Mapping[str, Variant]:
    two = plane(PhasedOptions(), critic_updates=2)
    four = replace(two, phase_calls=(1, 1, 1, 1))
    ways = {
        "2 phases, nested (published)": (two, {}),
        "2 phases, disjoint": (replace(two, intervals="disjoint"), {}),
        "2 phases, critic carried over": (two, {"carried": True}),
        "2 phases, one network": (two, {"one_network": True}),
        "4 phases, nested": (four, {}),
    }
    return {name: partial(in_phases, options=o, iterations=200, **more) for name, (o, more) in ways.items()}


def flower(process: DiscreteVP) -> MixtureTeacher:
    """Four classes on a circle of radius 2, each of four modes on a circle of 0.7."""
    angle = torch.arange(4) * torch.pi / 2
    petals = torch.stack([angle.cos(), angle.sin()], 1)
    means = (2 * petals[:, None] + 0.7 * petals[None]).flatten(0, 1)
    covariances = (0.15**2 * torch.eye(2)).expand(16, 2, 2)
    return MixtureTeacher(process, torch.ones(16), means, covariances, classes=[k // 4 for k in range(16)])


def students(seed: int, parts: list[list[int]], batch: int, width: int, iterations: int = 100) -> Numbers:
    """One-step students by TDM, one per part of the classes; mean sliced W2 over classes."""
    teacher = flower(DiscreteVP.cosine())
    o = plane(tdm(), steps=1)
    noise = torch.randn(2000, 2, generator=torch.Generator().manual_seed(1)) * teacher.process.noise_scale
    found = []
    for part in parts:
        labels = torch.tensor(part)
        drawn = partial(_labels, labels, batch)
        student = run(o.build(), teacher, seed, iterations, condition=drawn, batch=batch, width=width)
        for label in part:
            told = {LABEL: torch.full((2000,), label)}
            with torch.no_grad():
                made = solvers.ddim(student, noise, o.time_grid(1), teacher.process, told)
            data = teacher.sample(2000, torch.Generator().manual_seed(2), label)
            found.append(sliced_wasserstein(made, data, 64))
    return {"sliced W2, mean over classes": sum(found) / len(found)}


def _labels(labels: Tensor, batch: int, generator: torch.Generator) -> Condition:
    return {LABEL: labels[torch.randint(len(labels), (batch,), generator=generator)]}


def msd_variants() -> Mapping[str, Variant]:
    one, four = [[0, 1, 2, 3]], [[0], [1], [2], [3]]
    found: dict[str, Variant] = {}
    found["width 8, 1 student, batch 256"] = partial(students, parts=one, batch=256, width=8)
    found["width 8, 4 students, batch 64 each"] = partial(students, parts=four, batch=64, width=8)
    found["width 8, 1 student, batch 64, 4 times as long"] = partial(
        students, parts=one, batch=64, width=8, iterations=400
    )
    return found


# In numbers alone: no training by the library


def partition(seed: int, parts: int, contiguous: bool) -> Numbers:
    """MSD: a thousand conditions y in [0, 1] whose samples have mean y^2, students affine in y, one per part."""
    rng = np.random.default_rng(seed)
    y = np.sort(rng.uniform(size=1000))
    groups = np.array_split(y if contiguous else rng.permutation(y), parts)
    fits = [np.polynomial.Polynomial.fit(group, group**2, 1) for group in groups]
    errors = [(fit(group) - group**2) ** 2 for fit, group in zip(fits, groups, strict=True)]
    return {"squared error, 1e-6": 1e6 * float(np.concatenate(errors).mean())}


def partitions() -> Mapping[str, Variant]:
    cases = [(1, True), (2, True), (2, False), (4, True), (4, False), (8, True), (8, False)]
    kind = {True: "contiguous", False: "random"}
    return {f"{k} students, {kind[c]}": partial(partition, parts=k, contiguous=c) for k, c in cases}


def one_level(seed: int, t: float, starts: int = 4) -> Numbers:
    """Phased DMD's appendix: an affine student N(m, s^2), far off, under the exact pull at one flow time.

    Teacher 0.7 N(-1, 0.3^2) + 0.3 N(1.5, 0.4^2), s = 0.2 at first, m from N(0, 3^2); expectations by quadrature.
    """
    share, mean, var = np.array([0.7, 0.3]), np.array([-1.0, 1.5]), np.array([0.09, 0.16])
    nodes, mass = np.polynomial.hermite_e.hermegauss(16)
    z, n = (axis.ravel() for axis in np.meshgrid(nodes, nodes, indexing="ij"))
    weight = np.outer(mass, mass).ravel() / mass.sum() ** 2
    m, s = 3 * np.random.default_rng(seed).normal(size=(starts, 1)), np.full((starts, 1), 0.2)
    for _ in range(1000):
        x = (1 - t) * (m + s * z) + t * n
        spread = (1 - t) ** 2 * var + t**2
        gap = x[..., None] - (1 - t) * mean
        log = np.log(share) - gap**2 / (2 * spread) - np.log(spread) / 2
        post = np.exp(log - log.max(-1, keepdims=True))
        real = (post / post.sum(-1, keepdims=True) * (mean + (1 - t) * var / spread * gap)).sum(-1)
        fake = m + (1 - t) * s**2 / ((1 - t) ** 2 * s**2 + t**2) * (x - (1 - t) * m)
        by_m = ((real - fake) * weight).sum(-1, keepdims=True)
        by_s = ((real - fake) * weight * z).sum(-1, keepdims=True)
        m, s = m + 0.5 * by_m, np.abs(s + 0.5 * by_s)
    return {"starts left in the smaller mode": float((m > 1).mean()), "mean": float(m.mean()), "std": float(s.mean())}


def one_levels() -> Mapping[str, Variant]:
    return {f"t = {t}": partial(one_level, t=t) for t in (0.357, 0.882)}


def time_scales(seed: int, updates: int, rate: float, student_rate: float = 0.1) -> Numbers:
    """DMD2: student's mean e and critic's f; e falls by student_rate f, then f goes `rate` of the way to e, `updates`
    times, each with noise of its own in proportion to its rate. Root mean square of e over 2000 steps at rest."""
    rng = np.random.default_rng(seed)
    e, f, late = 1.0, 1.0, []
    for step in range(2500):
        e -= student_rate * f
        for noise in rng.normal(size=updates):
            f += rate * (e - f + noise)
        if step >= 500:
            late.append(e)
    left = (1 - rate) ** updates
    decay = np.abs(np.linalg.eigvals([[1, -student_rate], [1 - left, left - student_rate * (1 - left)]])).max()
    return {"error kept per student update": float(decay), "rms at rest": float(np.sqrt(np.mean(np.square(late))))}


def linear_time_scales() -> Mapping[str, Variant]:
    cases = {"1 update": (1, 0.05), "5 updates": (5, 0.05), "10 updates": (10, 0.05), "1 update, rate x 5": (1, 0.25)}
    return {name: partial(time_scales, updates=k, rate=rate) for name, (k, rate) in cases.items()}


def sid_descent(seed: int, alpha: float) -> Numbers:
    """SiD: student N(m, s^2), data N(0, 1), exact critic, levels 0.3, 1 and 3 of a VE process, descent at rate 0.05.

    Steps until mean and std are within 0.02 of the data's, over eight starts; the gradient takes the critic as frozen.
    """
    rng = np.random.default_rng(seed)
    m, s = rng.normal(0, 2, 8), rng.uniform(0.3, 3, 8)
    needed = np.full(8, 5000.0)
    for step in range(5000):
        by_m, by_s = np.zeros(8), np.zeros(8)
        for var in (0.09, 1.0, 9.0):
            real, fake = 1 / (1 + var), s**2 / (s**2 + var)  # slopes of the denoisers
            slope, gap = real - fake, real * m - m  # of their difference at m: real * m against m
            # d L / d sample = slope (f - x) + gap (real - 1) - 2 alpha gap slope, all affine in sample and noise
            by_m += slope * (real * m - m) + gap * (real - 1) - 2 * alpha * gap * slope
            by_s += s * (2 * slope * (real - 1) - 2 * alpha * slope**2)
        m, s = m - 0.05 * by_m, s - 0.05 * by_s
        there = (np.abs(m) < 0.02) & (np.abs(s - 1) < 0.02)
        needed = np.where(there & (needed == 5000), step + 1, needed)
    return {"steps, mean of starts": float(needed.mean()), "steps, slowest": float(needed.max())}


def sid_descents() -> Mapping[str, Variant]:
    return {f"alpha {alpha:g}": partial(sid_descent, alpha=alpha) for alpha in (0.0, 0.5, 1.0, 1.2)}


def batch_noise(seed: int, divergence: str, normalised: bool) -> Numbers:
    """f-distill: spread over batches of 128 of the pull on the mean, over its mean.

    Student N(0, 1), teacher N(d, 1.2^2).
    """
    x = np.random.default_rng(seed).normal(size=(2000, 128))
    found = {}
    for gap in (1.0, 2.0):
        ratio = (np.exp(x**2 / 2 - (x - gap) ** 2 / (2 * 1.44)) / 1.2).clip(0.1, 20)
        if normalised:
            ratio = ratio / ratio.mean(1, keepdims=True)
        weight = {"forward_kl": ratio, "jensen_shannon": ratio / (1 + ratio)}[divergence]
        pull = ((gap - x) / 1.44 + x) * (weight / weight.mean(1, keepdims=True) if normalised else weight)
        found[f"d = {gap:g}"] = float(pull.mean(1).std() / pull.mean(1).mean())
    return found


def batch_noises() -> Mapping[str, Variant]:
    return {
        f"{kind}, {'both' if both else 'neither'}": partial(batch_noise, divergence=kind, normalised=both)
        for kind in ("forward_kl", "jensen_shannon")
        for both in (True, False)
    }


def rank_correlation(seed: int, divergence: str, broad: bool) -> Numbers:
    """f-distill: Spearman's, over the student's samples, of weight and size of the score difference, at noise 0.5.

    Teacher 0.7 N(-1, 0.3^2) + 0.3 N(1.5, 0.4^2); the student has the shares the other way round, or is one `broad`
    normal law of the teacher's mean and variance.
    """
    rng = np.random.default_rng(seed)
    modes = np.array([[0.7, -1.0, 0.34], [0.3, 1.5, 0.41]])  # share, mean, noised variance
    student = np.array([[1.0, -0.25, 1.6735]]) if broad else modes * [0, 1, 1] + [[0.3, 0, 0], [0.7, 0, 0]]
    pick = rng.choice(len(student), size=4000, p=student[:, 0])
    x = (student[pick, 1] + np.sqrt(student[pick, 2]) * rng.normal(size=4000))[:, None]

    def law(parts: Any) -> tuple[Any, Any]:
        share, mean, var = parts.T
        density = share * np.exp(-((x - mean) ** 2) / (2 * var)) / np.sqrt(var)
        return density.sum(1), (density * (mean - x) / var).sum(1) / density.sum(1)

    (p, real), (q, fake) = law(modes), law(student)
    weight = {"forward_kl": p / q, "jensen_shannon": p / (p + q)}[divergence]
    ranks = [np.argsort(np.argsort(values)) for values in (weight, np.abs(real - fake))]
    return {"rank correlation": float(np.corrcoef(*ranks)[0, 1])}


def rank_correlations() -> Mapping[str, Variant]:
    return {
        "student with the shares swapped": partial(rank_correlation, divergence="jensen_shannon", broad=False),
        "student one broad normal law": partial(rank_correlation, divergence="jensen_shannon", broad=True),
    }


def claims() -> dict[str, Claim]:
    """All of them by name."""
    t, paper = plane(tdm()), plane(tdm_paper())
    aware = replace(t, step_counts=(1, 2, 4), steps_condition=True)
    tdm_run = partial(partial, scored, iterations=100)
    sid_run = partial(partial, scored, iterations=100)
    sid4 = plane(SiDOptions(steps=4))
    return {
        "two-time-scales": Claim("DMD2", "five critic updates do what regression did, one does not", two_time_scales()),
        "backward-simulation": Claim("DMD2", "worse without", backward_simulation()),
        "teacher-error": Claim(
            "DMD2", "the adversarial term makes up for the teacher's error",
            {f"weight {w:g}": partial(wrong_teacher, gan_weight=w) for w in (0.0, 1.0)},
        ),
        "recovery": Claim("f-distill", "forward KL and JS seek modes less", divergences()),
        "variance": Claim("f-distill", "forward KL and Jeffreys have large variance, JS small", effective_shares()),
        "normalisation": Claim("f-distill", "the loss fluctuates without normalisation", normalisations()),
        "alpha": Claim("SiD", "1 or 1.2 work better than the unbiased 0.5", alphas()),
        "last-step": Claim(
            "SiD", "the mixture of steps is as good as the last step with gradients through all",
            {"mixture": sid_run(options=sid4), "last step": sid_run(options=sid4, build=LastStep)},
        ),
        "chain-noise": Claim(
            "SiD", "fresh, fixed and DDIM noise are equally good",
            {
                "fresh": sid_run(options=sid4), "ddim": sid_run(options=replace(sid4, eta=1.0)),
                "fixed": partial(fixed_noise, options=replace(sid4, chain_noise="fixed"), iterations=100),
            },
        ),
        "noisy-or-clean": Claim(
            "TDM", "matching clean predictions breaks the deterministic path",
            {f"K = {k}, {name}": tdm_run(options=o)
             for k in (4,)
             for name, o in (("noisy", replace(t, steps=k)), ("clean", match_clean(steps=k)))},
        ),
        "step-condition": Claim(
            "TDM", "a student of several step counts must be told which, above all for one step",
            {
                "told": partial(each_count, options=aware, iterations=120),
                "not told": partial(each_count, options=replace(aware, steps_condition=False), iterations=120),
                "trained for 4 alone": partial(each_count, options=t, iterations=120),
            },
        ),
        "importance": Claim(
            "TDM", "better with importance weights",
            {name: tdm_run(options=o) for name, o in {
                "none": replace(paper, importance="none"), "mean (published)": paper,
                "none needed: exact target": replace(paper, critic_target="exact", importance="none"),
            }.items()},
        ),
        "huber": Claim(
            "TDM", "better with Huber's metric than with squares",
            {
                "huber_vector": tdm_run(options=paper),
                "l2": tdm_run(options=replace(paper, metric="l2", huber_c=t.huber_c)),
            },
        ),
        "solver": Claim(
            "TDM", "trained with DDIM, better sampled with DPM-Solver",
            {f"K = {k}": partial(each_solver, options=replace(t, steps=k), iterations=100) for k in (4,)},
        ),
        "tau-range": Claim(
            "TDM-R1", "levels up to the start, with a critic that is told the call",
            {
                "own segment": tdm_run(options=t),
                "to the start": tdm_run(options=replace(t, tau_range="to_T")),
                "to the start, critic told": tdm_run(options=replace(t, tau_range="to_T", critic_call_condition=True)),
            },
        ),
        "landing": Claim("TDM", "the authors' demo has random landing points, the paper fixed ones",
                         {kind: tdm_run(options=replace(t, landing=kind)) for kind in ("fixed", "random")}),
        "coverage": Claim(
            "TDM", "keeps more modes than DMD2",
            {
                "tdm": partial(coverage, options=t, forwards=1600),
                "dmd2": partial(coverage, options=plane(DMD2Options()), forwards=1600),
                "dmd2 without GAN": partial(coverage, options=plane(DMD2Options(), gan_weight=0.0), forwards=1600),
            },
        ),
        "phases": Claim("Phased DMD", "nested better than disjoint; four phases better than two", phased_variants()),
        "several-students": Claim("MSD", "several students beat one of the same size", msd_variants()),
        "partition": Claim("MSD", "parts of neighbours better than random ones", partitions()),
        "one-level": Claim("Phased DMD", "matching at t = 0.357 alone fails, at 0.882 works", one_levels()),
        "alpha-descent": Claim("SiD", "1 or 1.2 get there faster than the unbiased 0.5", sid_descents()),
        "batch-noise": Claim("f-distill", "the update fluctuates without the two normalisations", batch_noises()),
        "weight-and-score": Claim(
            "f-distill", "samples of large score difference weigh less", rank_correlations()
        ),
        "linear-time-scales": Claim(
            "DMD2", "five updates are the best trade, ten stable but slow, a higher rate is worse", linear_time_scales()
        ),
    }  # fmt: skip


def kept(home: File, name: str, claim: Claim, seeds: list[int]) -> dict[str, dict[str, Numbers]]:
    """Numbers by variant and seed: those of OUT/<name>.json, and those still missing, each written as it comes."""
    file = home / f"{name}.json"
    found: dict[str, dict[str, Numbers]] = json.loads(file.read_text()) if file.exists() else {}
    for variant, measure in claim.variants.items():
        for seed in seeds:
            if str(seed) in found.setdefault(variant, {}):
                continue
            start = time.process_time()
            numbers = measure(seed)
            found[variant][str(seed)] = numbers | {"seconds": time.process_time() - start}
            fresh = file.with_suffix(".part")
            fresh.write_text(json.dumps(found, indent=1))
            fresh.replace(file)
    return found


def table(found: Mapping[str, Mapping[str, Numbers]]) -> str:
    """Markdown: a row per variant, mean over seeds ± half the distance of the largest and the smallest."""
    names = [name for name in next(iter(next(iter(found.values())).values())) if name != "seconds"]
    rows = [f"| variant | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for variant, by_seed in found.items():
        values = [[numbers[name] for numbers in by_seed.values()] for name in names]
        cells = [f"{sum(v) / len(v):.3f} ± {(max(v) - min(v)) / 2:.3f}" for v in values]
        rows.append(f"| {variant} | {' | '.join(cells)} |")
    return "\n".join(rows)


def main() -> None:
    """Run and print."""
    everyone = claims()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=File, required=True, help="folder of the JSON files")
    parser.add_argument("--only", nargs="*", default=list(everyone), choices=list(everyone), metavar="CLAIM")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1])
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.only:
        claim = everyone[name]
        found = kept(args.out, name, claim, args.seeds)
        print(f"\n**{name}** ({claim.paper}: {claim.says})\n\n{table(found)}", flush=True)


if __name__ == "__main__":
    main()
