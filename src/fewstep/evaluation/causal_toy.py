"""Videos whose law is known: frames x_0 ~ N(0, I), x_i = A x_(i-1) + N(0, Q), with exact teacher and critic.

The student makes frame i in K calls from noise and the frame before: call k answers a_k x_(i-1) + b_k x. The exact
causal law is among these, and the critic is the exact denoiser of the law that the student has at the drawn exit.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fewstep.attention import Layout
from fewstep.core.guidance import Denoiser
from fewstep.core.process import Flow, Process
from fewstep.core.tensors import Condition
from fewstep.streaming import Memory

D, FRAMES = 2, 4
_ANGLE = torch.tensor(0.6, dtype=torch.float64)
A = 0.8 * torch.tensor([[_ANGLE.cos(), -_ANGLE.sin()], [_ANGLE.sin(), _ANGLE.cos()]], dtype=torch.float64)
Q = 0.36 * torch.eye(D, dtype=torch.float64)


def covariance(first: Tensor, step: Tensor, noise: Tensor) -> Tensor:
    """(F D, F D) of F frames, frame by frame."""
    covariances = [first]
    for _ in range(1, FRAMES):
        covariances.append(step @ covariances[-1] @ step.T + noise)
    rows = []
    for i in range(FRAMES):
        row = []
        for j in range(FRAMES):
            low, high = min(i, j), max(i, j)
            block = torch.linalg.matrix_power(step, high - low) @ covariances[low]
            row.append(block if i >= j else block.T)
        rows.append(torch.cat(row, 1))
    return torch.cat(rows)


def exact_denoiser(x: Tensor, t: Tensor, law: Tensor) -> Tensor:
    """E[x_0 | x_t] of videos (B, D, F) with covariance `law`."""
    values, vectors = torch.linalg.eigh(law)
    alpha, sigma = Flow().alpha(t)[:, None], Flow().sigma(t)[:, None]
    flat = x.transpose(1, 2).flatten(1) @ vectors
    made = (alpha * values / (alpha**2 * values + sigma**2) * flat) @ vectors.T
    return made.unflatten(1, (FRAMES, D)).transpose(1, 2)


class ArStudent(nn.Module):
    """Begins with frames that know nothing of each other."""

    def __init__(self, times: Tensor) -> None:
        super().__init__()
        self.times = times
        calls, eye = len(times), torch.eye(D, dtype=torch.float64)
        self.a = nn.Parameter(torch.zeros(calls, D, D, dtype=torch.float64))
        self.b = nn.Parameter(eye.repeat(calls, 1, 1))
        self.first = nn.Parameter(1.2 * eye.repeat(calls, 1, 1))
        self.exit_call = 0
        """The latest call."""

    def forward(self, x: Tensor, t: Tensor, before: Tensor | None) -> Tensor:
        """x (B, D, 1) and the frame before, if there is one."""
        self.exit_call = call = int((self.times - t[0]).abs().argmin())
        frame = x[:, :, 0]
        if before is None:
            return (frame @ self.first[call].T).unsqueeze(2)
        return (before[:, :, 0] @ self.a[call].T + frame @ self.b[call].T).unsqueeze(2)

    @torch.no_grad()
    def law(self, exit_call: int) -> tuple[Tensor, Tensor, Tensor]:
        """Covariance of the first frame, transition, and covariance of its noise, for videos that stop there."""
        eye = torch.eye(D, dtype=torch.float64)
        first, step, noise = torch.zeros_like(eye), torch.zeros_like(eye), torch.zeros_like(eye)
        for call in range(exit_call + 1):
            t = float(self.times[call])
            into = t * t * eye  # of the new noise in the call's input; all of it in the first call's
            keep = 0.0 if call == 0 else 1 - t
            input_first, input_step, input_noise = keep**2 * first + into, keep * step, keep**2 * noise + into
            first = self.first[call] @ input_first @ self.first[call].T
            step = self.a[call] + self.b[call] @ input_step
            noise = self.b[call] @ input_noise @ self.b[call].T
        return first, step, noise


class ArMemory:
    """The frame before."""

    def __init__(self, student: ArStudent) -> None:
        self._student = student
        self._before: Tensor | None = None

    def denoise(self, x: Tensor, t: Tensor) -> Tensor:
        return self._student(x, t, self._before)

    def remember(self, x: Tensor) -> None:
        self._before = x.detach()

    def snapshot(self) -> ArMemory:
        twin = ArMemory(self._student)
        twin._before = self._before
        return twin


class ArRoles:
    """Exact teacher and critic; the critic knows where the latest video stopped."""

    process: Process = Flow()

    def __init__(self, student: ArStudent) -> None:
        self.network = student

    @property
    def causal(self) -> ArRoles:
        return self

    def memory(self, student: Denoiser, layout: Layout, condition: Condition) -> Memory:
        return ArMemory(self.network)

    def parallel(
        self,
        student: Denoiser,
        layout: Layout,
        x: Tensor,
        t: Tensor,
        condition: Condition,
        clean: Tensor | None = None,
    ) -> Tensor:
        raise NotImplementedError

    def student(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        raise NotImplementedError("a causal student is called through its memory")

    def teacher(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return exact_denoiser(x, t, covariance(torch.eye(D, dtype=torch.float64), A, Q))

    def critic(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return exact_denoiser(x, t, covariance(*self.network.law(self.network.exit_call)))

    def null(self, condition: Condition) -> Condition:
        return condition

    def discriminator(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        raise NotImplementedError

    def log_ratio(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        raise NotImplementedError
