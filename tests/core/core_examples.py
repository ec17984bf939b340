"""The processes that the tests of `core` run over, and an exact teacher for all of them."""

from __future__ import annotations

import torch
from torch import Tensor

from fewstep.core.process import VE, DiscreteVP, Flow, Process
from fewstep.core.tensors import Condition, expand

PROCESSES: dict[str, Process] = {
    "linear": DiscreteVP.linear(),
    "scaled_linear": DiscreteVP.scaled_linear(),
    "cosine": DiscreteVP.cosine(),
    "zero_snr": DiscreteVP.scaled_linear(zero_terminal=True),
    "short": DiscreteVP.linear(num_steps=10, beta_start=0.01, beta_end=0.5),
    "flow": Flow(),
    "ve": VE(),
}


class GaussianTeacher:
    """Denoiser of data N(mean, variance) per element, and the exact end of its probability-flow ODE."""

    def __init__(self, process: Process, mean: float = 0.5, variance: float = 0.3) -> None:
        self.process, self.mean, self.variance = process, mean, variance

    def __call__(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        alpha, sigma = expand(self.process.alpha(t), x), expand(self.process.sigma(t), x)
        gain = alpha * self.variance / (alpha.square() * self.variance + sigma.square())
        return self.mean + gain * (x - alpha * self.mean)

    def spread(self, t: Tensor) -> Tensor:
        """Standard deviation of x_t."""
        return (self.process.alpha(t).square() * self.variance + self.process.sigma(t).square()).sqrt()

    def flow_to(self, x: Tensor, t_from: Tensor, t_to: Tensor) -> Tensor:
        """The exact ODE solution: standardised samples stay where they are."""
        centred = x - self.process.alpha(t_from) * self.mean
        return self.process.alpha(t_to) * self.mean + centred * self.spread(t_to) / self.spread(t_from)


def network(x: Tensor, time: Tensor) -> Tensor:
    """A fixed, nonlinear, element-wise network output that depends on x and on a time in [0, 1000]."""
    time = expand(time / 1000, x)
    return torch.sin(1.7 * x + 2 * time) * (0.4 + 0.6 * time) - 0.3 * torch.tanh(x * x - time)
