"""Any function is a teacher; any module is a student, whatever it predicts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fewstep.core.guidance import guided
from fewstep.core.prediction import PREDICTIONS, from_denoised
from fewstep.core.process import DiscreteVP, Flow
from fewstep.core.tensors import expand
from fewstep.errors import FewstepError
from fewstep.models import FunctionTeacher


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.layer(torch.cat([x, t[:, None]], 1))


class Conditional(Network):
    def forward(self, x: Tensor, t: Tensor, condition: dict[str, Tensor]) -> Tensor:
        return super().forward(x, t) + condition["label"][:, None]


X, T = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([0.25, 0.75])


def test_a_function_in_two_lines() -> None:
    roles = FunctionTeacher(lambda x, t: x * (1 - t[:, None]), Flow()).roles(Network())
    assert torch.equal(roles.teacher(X, T, {}), X * (1 - T[:, None]))
    assert roles.student(X, T, {}).shape == X.shape
    assert roles.null({}) == {}


@pytest.mark.parametrize("kind", PREDICTIONS)
@pytest.mark.parametrize("process", [Flow(), DiscreteVP.linear()])
def test_every_prediction_kind_becomes_the_denoised_sample(kind: str, process) -> None:
    """Teacher and student that say the same thing in another kind are the same denoiser."""

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        return torch.tanh(x)

    def predict(x: Tensor, t: Tensor) -> Tensor:
        return from_denoised(kind, denoise(x, t), x, process.alpha(t), process.sigma(t))

    class Module(nn.Module):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return predict(x, t)

    roles = FunctionTeacher(predict, process, prediction=kind).roles(Module(), prediction=kind)
    torch.testing.assert_close(roles.teacher(X, T, {}), denoise(X, T))
    torch.testing.assert_close(roles.student(X, T, {}), denoise(X, T))


def test_critic_is_a_copy_unless_given() -> None:
    student, critic = Network(), Network()
    teacher = FunctionTeacher(lambda x, t: x, Flow())
    roles = teacher.roles(student)
    assert torch.equal(roles.critic(X, T, {}), roles.student(X, T, {}))
    assert not {id(p) for p in roles.critic_parameters()} & {id(p) for p in roles.student_parameters()}
    assert {id(p) for p in teacher.roles(student, critic).critic_parameters()} == {id(p) for p in critic.parameters()}


def test_conditions_reach_those_who_ask() -> None:
    null = {"label": torch.zeros(1)}

    def denoise(x: Tensor, t: Tensor, condition: dict[str, Tensor]) -> Tensor:
        assert "steps" not in condition  # the teacher is not told
        return x + expand(condition["label"], x)

    roles = FunctionTeacher(denoise, Flow(), null=null).roles(Conditional())
    condition = {"label": torch.tensor([1.0, 5.0]), "steps": torch.tensor([1.0, 4.0])}
    assert torch.equal(roles.teacher(X, T, condition), X + torch.tensor([[1.0], [5.0]]))
    assert torch.equal(roles.null(condition)["label"], torch.zeros(2))
    assert torch.equal(roles.null(condition)["steps"], condition["steps"])
    twice = guided(roles.teacher, X, T, condition, roles.null(condition), 2.0)
    torch.testing.assert_close(twice, X + 2 * torch.tensor([[1.0], [5.0]]))


def test_states_round_trip() -> None:
    teacher = FunctionTeacher(lambda x, t: x, Flow())
    first, second = teacher.roles(Network()), teacher.roles(Network())
    second.load_student_state(first.student_state())
    second.load_critic_state(first.critic_state())
    assert torch.equal(first.student(X, T, {}), second.student(X, T, {}))
    assert torch.equal(first.critic(X, T, {}), second.critic(X, T, {}))


def test_refusals() -> None:
    with pytest.raises(FewstepError, match="prediction type 'score'"):
        FunctionTeacher(lambda x, t: x, Flow(), prediction="score")
    roles = FunctionTeacher(lambda x, t: x, Flow()).roles(Network())
    with pytest.raises(FewstepError, match="null condition"):
        roles.null({"label": torch.zeros(2)})
