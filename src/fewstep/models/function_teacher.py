"""Any function as a teacher, with networks of your own as student and critic.

    teacher = FunctionTeacher(lambda x, t: posterior_mean(x, t), process=Flow())
    roles = teacher.roles(student=MyNetwork(), prediction="flow")

`MyNetwork()(x, t)` or `MyNetwork()(x, t, condition)` gets t in [0, 1] as (B,) and predicts in the named kind.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from fewstep.core.prediction import PREDICTIONS, to_denoised
from fewstep.core.process import Process
from fewstep.core.tensors import Condition
from fewstep.errors import FewstepError
from fewstep.models.roles import Discriminator, Roles, Seat


class FunctionTeacher:
    """A denoiser that is a function, an exact solution or a frozen module.

    Args:
        denoise: f(x (B, ...), t (B,)) or f(x, t, condition) -> the denoised sample (B, ...), or what `prediction`
            names.
        process: the noising process that its times mean.
        prediction: what it returns, one of `fewstep.core.prediction.PREDICTIONS`.
        null: one row of the condition that means "no condition", for guidance; not needed without conditions, and {}
            where guidance is never used.
    """

    def __init__(
        self, denoise: Callable[..., Tensor], process: Process, *, prediction: str = "x0", null: Condition | None = None
    ) -> None:
        self.process = process
        self.zero_null = True  # zeros may well be what its user means
        self._null = null
        self.network: nn.Module = _Predicting(denoise, prediction).requires_grad_(False)

    def roles(
        self,
        student: nn.Module,
        critic: nn.Module | None = None,
        *,
        prediction: str = "x0",
        discriminator: nn.Module | None = None,
    ) -> Roles:
        """Seat `student` and `critic` (a copy of the student unless given); both predict in the kind `prediction`.

        `discriminator`(x, t, condition) -> logits (B, heads), for methods that need one.
        """
        critic = copy.deepcopy(student) if critic is None else critic
        seats = [Seat(_Predicting(network, prediction).requires_grad_(True)) for network in (student, critic)]
        judge = None if discriminator is None else Discriminator(discriminator.requires_grad_(True))
        return Roles(self, Seat(self.network), seats[0], seats[1], judge)

    def call(self, network: nn.Module, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """One call of teacher, student or critic, as a denoised sample."""
        assert isinstance(network, _Predicting)
        return to_denoised(
            network.prediction, network(x, t, condition), x, self.process.alpha(t), self.process.sigma(t)
        )

    def null_condition(self) -> Condition:
        """One row that means "no condition"."""
        if self._null is None:
            raise FewstepError(
                "found conditions but no null condition, expected one row of each that means no condition, "
                "fix: FunctionTeacher(..., null={...}), or null={} where guidance_scale is 1"
            )
        return self._null


class _Predicting(nn.Module):
    """A function or module, what it predicts, and whether it looks at conditions."""

    def __init__(self, function: Callable[..., Any], prediction: str) -> None:
        super().__init__()
        if prediction not in PREDICTIONS:
            raise FewstepError(
                f"found prediction type {prediction!r}, expected one of {PREDICTIONS}, "
                "fix: name what the function returns"
            )
        self.prediction = prediction
        self.function = function
        self._conditional = _takes_condition(function)

    def forward(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return self.function(x, t, condition) if self._conditional else self.function(x, t)


def _takes_condition(function: Callable[..., Any]) -> bool:
    """Whether a function (or the forward of a module) of x and t has room for a third argument."""
    signature = inspect.signature(function.forward if isinstance(function, nn.Module) else function)
    try:
        signature.bind(None, None, None)
    except TypeError:
        return False
    return True
