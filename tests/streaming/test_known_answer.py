"""Self Forcing reaches the exact law of an autoregressive process, and Re-DMD does what its toy does."""

from __future__ import annotations

from dataclasses import replace

import torch
from ar_video import FRAMES, A, ArRoles, ArStudent, D, Q

from fewstep.core.streams import Streams
from fewstep.evaluation.toy import BulkDraw
from fewstep.methods import SelfForcingOptions, SelfForcingSiDOptions
from fewstep.methods.base import Batch, Method

PLAIN = {"steps": 2, "chunk": 1, "shift": 1.0, "guidance_scale": 1.0, "normaliser": "none", "tau_law": "uniform"}
BATCH = 128
EYE = torch.eye(D, dtype=torch.float64)


def train(method: Method, roles: ArRoles, iterations: int) -> None:
    draw = BulkDraw(BATCH, torch.Generator().manual_seed(0))
    batch = Batch({}, torch.arange(BATCH), (D, FRAMES), torch.float64)
    adam = torch.optim.Adam(roles.network.parameters(), 0.03, betas=(0.0, 0.99))
    for iteration in range(iterations):
        for group in adam.param_groups:
            group["lr"] = 0.03 * (1 - iteration / iterations)
        path = method.rollout(batch, roles, draw)
        adam.zero_grad()
        method.student_loss(path, roles, draw).values.mean().backward()
        adam.step()


def errors(student: ArStudent) -> list[float]:
    """Of first covariance, transition and noise, at each exit: the largest deviation from the truth."""
    truth = (torch.eye(D, dtype=torch.float64), A, Q)
    return [
        max(float((found - true).abs().max()) for found, true in zip(student.law(call), truth, strict=True))
        for call in range(len(student.times))
    ]


def test_dmd_reaches_the_causal_law_at_every_exit() -> None:
    options = SelfForcingOptions(**PLAIN)
    student = ArStudent(options.time_grid(2)[:-1])
    before = errors(student)
    train(options.build(), ArRoles(student), 250)
    assert min(before) > 0.4
    assert max(errors(student)) < 0.1


def test_sid_reaches_it_too() -> None:
    options = SelfForcingSiDOptions(**PLAIN, alpha=0.5)
    student = ArStudent(options.time_grid(2)[:-1])
    train(options.build(), ArRoles(student), 250)
    assert max(errors(student)) < 0.1


def test_with_the_sign_reversed_it_does_not() -> None:
    options = SelfForcingOptions(**PLAIN)
    student = ArStudent(options.time_grid(2)[:-1])
    train(options.build(), ArRoles(student, flipped=True), 60)
    assert min(errors(student)) > 0.6


def test_the_critics_best_is_the_exact_denoiser_of_the_students_law() -> None:
    """V10: scaled up or down, its loss on the student's own videos is higher."""
    options = SelfForcingOptions(**PLAIN)
    roles, method = ArRoles(ArStudent(options.time_grid(2)[:-1])), options.build()
    exact, found = roles.critic, {}
    for scale in (0.9, 1.0, 1.1):
        roles.critic = lambda x, t, condition, s=scale: s * exact(x, t, condition)  # type: ignore[method-assign, misc]
        draw = BulkDraw(4096, torch.Generator().manual_seed(0))
        path = method.rollout(Batch({}, torch.arange(4096), (D, FRAMES), torch.float64), roles, draw)
        found[scale] = float(method.critic_loss(path, roles, draw).values.mean())
    assert found[1.0] < min(found[0.9], found[1.1])


def test_the_law_is_a_fixed_point() -> None:
    """Teacher and critic agree on the exact student: no gradient, whatever is drawn (V9, M6, R11)."""
    options = SelfForcingOptions(**PLAIN)
    student = ArStudent(options.time_grid(2)[:-1])
    with torch.no_grad():
        student.a[0], student.b[0], student.first[0] = A, 0.6 * EYE, EYE
        student.a[1], student.b[1], student.first[1] = 0, 0, 0
        half = 0.5 * 0.36 * 0.5 + 0.25  # variance of the last call's input, given the frame before
        gain = (0.36 / half) ** 0.5
        student.b[1] = gain * EYE
        student.a[1] = A - gain * 0.5 * A
        student.first[1] = (1 / 0.5) ** 0.5 * EYE
    assert max(errors(student)) < 1e-12
    method, roles = options.build(), ArRoles(student)
    for iteration in range(4):
        draw = Streams(0).at(iteration, range(8))
        path = method.rollout(Batch({}, torch.arange(8), (D, FRAMES), torch.float64), roles, draw)
        method.student_loss(path, roles, draw).values.mean().backward()
    for parameter in student.parameters():
        assert parameter.grad is None or parameter.grad.abs().max() < 1e-12
    assert replace(options, steps=1).build().forwards() < method.forwards()
