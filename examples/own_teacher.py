"""Bring your own teacher: any PyTorch function of (x, t), here the exact denoiser of eight blobs on a ring.

    python examples/own_teacher.py [ITERATIONS]     # writes runs/own-teacher

The student is a small network of your own. It first imitates the teacher everywhere (teacher score matching), then TDM
makes its four steps land on the teacher's law. The distances at the end are to exact samples of the blobs.
"""

import math
import sys

import torch
from torch import Tensor, nn

from fewstep.core.process import Flow
from fewstep.core.solvers import ddim
from fewstep.methods import TDMOptions, TSMOptions
from fewstep.models import FunctionTeacher
from fewstep.training.loop import train
from fewstep.training.options import TrainOptions

ANGLES = torch.arange(8) * (2 * math.pi / 8)
BLOBS = 1.5 * torch.stack([ANGLES.cos(), ANGLES.sin()], 1)  # (8, 2)
WIDTH = 0.1


def my_posterior_mean(x: Tensor, t: Tensor) -> Tensor:
    """E[x0 | x] for x = (1 - t) x0 + t eps: x (B, 2), t (B,) in [0, 1] -> (B, 2). Your model's x0 prediction."""
    alpha, sigma = (1 - t)[:, None], t[:, None]
    spread = (alpha * WIDTH) ** 2 + sigma**2  # of x around alpha times a blob
    distance = (x[:, None] - alpha[:, None] * BLOBS).square().sum(2)  # (B, 8)
    share = torch.softmax(-distance / (2 * spread), 1)
    means = BLOBS + alpha[:, None] * WIDTH**2 / spread[:, None] * (x[:, None] - alpha[:, None] * BLOBS)
    return (share[..., None] * means).sum(1)


class MyNetwork(nn.Module):
    """(x (B, 2), t (B,)) -> flow, eps - x0 (B, 2)."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(7, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 2)
        )

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        angle = math.pi * t[:, None]
        return self.layers(torch.cat([x, t[:, None], angle.cos(), angle.sin(), x * t[:, None]], 1))


def distance(samples: Tensor, exact: Tensor) -> float:
    """Mean absolute difference of sorted projections: 0 for equal laws (sliced Wasserstein distance)."""
    directions = torch.stack([ANGLES.cos(), ANGLES.sin()])  # (2, 8)
    return float(((samples @ directions).sort(0).values - (exact @ directions).sort(0).values).abs().mean())


def main(iterations: int) -> None:
    torch.manual_seed(0)
    network, teacher = MyNetwork(), FunctionTeacher(my_posterior_mean, process=Flow(), null={})
    told = {"iterations": iterations, "batch": 256, "warmup": 0, "tensorboard": False}
    for method, rate in ((TSMOptions(), 2e-3), (TDMOptions(guidance_scale=1.0, normaliser="none"), 2e-4)):
        roles = teacher.roles(student=network, prediction="flow")  # the critic begins as a copy of the student
        options = TrainOptions(student_rate=rate, critic_rate=4 * rate, **told)
        out = f"runs/own-teacher/{method.build().name}"
        train(method.build(), roles, lambda iteration, samples: {}, options, out, noise_shape=(2,))
    noise, grid = torch.randn(4096, 2), TDMOptions().time_grid(4)
    exact = BLOBS[torch.randint(8, (4096,))] + WIDTH * torch.randn(4096, 2)
    with torch.no_grad():
        for name, denoise in (("teacher", roles.teacher), ("student", roles.student)):
            print(f"{name}, 4 calls: distance {distance(ddim(denoise, noise, grid, roles.process, {}), exact):.3f}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 500)
