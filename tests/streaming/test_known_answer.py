"""What lies behind the known answer of Self Forcing (`fewstep.evaluation.known_answers_causal`)."""

from __future__ import annotations

import torch

from fewstep.core.streams import Streams
from fewstep.evaluation.causal_toy import FRAMES, A, ArRoles, ArStudent, D
from fewstep.evaluation.known_answers_causal import CAUSAL_OPTIONS, law_errors, train_causal
from fewstep.evaluation.toy import BulkDraw
from fewstep.methods.base import Batch

OPTIONS = CAUSAL_OPTIONS["DMD"]
EYE = torch.eye(D, dtype=torch.float64)


def new_student() -> ArStudent:
    return ArStudent(OPTIONS.time_grid(2)[:-1])


def test_with_the_sign_reversed_the_law_is_not_reached() -> None:
    class Reversed(ArRoles):
        def teacher(self, *asked: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            return super().critic(*asked)

        def critic(self, *asked: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            return super().teacher(*asked)

    student = new_student()
    assert min(law_errors(student)) > 0.4
    train_causal(OPTIONS.build(), Reversed(student), 60)
    assert min(law_errors(student)) > 0.6


def test_the_critics_best_is_the_exact_denoiser_of_the_students_law() -> None:
    """V10: scaled up or down, its loss on the student's own videos is higher."""
    roles, method = ArRoles(new_student()), OPTIONS.build()
    exact, found = roles.critic, {}
    for scale in (0.9, 1.0, 1.1):
        roles.critic = lambda x, t, condition, s=scale: s * exact(x, t, condition)  # type: ignore[method-assign, misc]
        draw = BulkDraw(4096, torch.Generator().manual_seed(0))
        path = method.rollout(Batch({}, torch.arange(4096), (D, FRAMES), torch.float64), roles, draw)
        found[scale] = float(method.critic_loss(path, roles, draw).values.mean())
    assert found[1.0] < min(found[0.9], found[1.1])


def test_the_law_is_a_fixed_point() -> None:
    """Teacher and critic agree on the exact student: no gradient, whatever is drawn (V9, M6, R11)."""
    student = new_student()
    t = 0.5  # of the last call
    gain = (0.36 / (0.36 * (1 - t) ** 2 + t**2)) ** 0.5  # its input's variance, given the frame before, to the data's
    with torch.no_grad():
        student.a[0], student.b[0], student.first[0] = A, 0.6 * EYE, EYE
        student.a[1], student.b[1] = A - gain * (1 - t) * A, gain * EYE
        student.first[1] = EYE / ((1 - t) ** 2 + t**2) ** 0.5
    assert max(law_errors(student)) < 1e-12
    method, roles = OPTIONS.build(), ArRoles(student)
    for iteration in range(4):
        draw = Streams(0).at(iteration, range(8))
        path = method.rollout(Batch({}, torch.arange(8), (D, FRAMES), torch.float64), roles, draw)
        method.student_loss(path, roles, draw).values.mean().backward()
    for parameter in student.parameters():
        assert parameter.grad is None or parameter.grad.abs().max() < 1e-12
