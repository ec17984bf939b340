"""The student's own trajectory: computed as far as asked, and nothing twice."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.core.guidance import Denoiser
from fewstep.core.process import Process
from fewstep.core.solvers import Noise, fresh_noise, land, mix_noise, noise_at
from fewstep.core.tensors import Condition, at_least_float32, index_condition
from fewstep.errors import FewstepError


@dataclass(frozen=True)
class Landing:
    """Where one student call lands: x = alpha_t denoised + sigma_t eps_hat, exactly."""

    x: Tensor
    """(B, ...) the landing point x_{t_i}."""
    denoised: Tensor
    """(B, ...) the student's prediction of the clean sample."""
    eps_hat: Tensor
    """(B, ...) the noise landed with: the student's own, mixed with fresh noise where eta < 1."""
    t: Tensor
    """(B,) landing time t_i."""
    t_from: Tensor
    """(B,) time of the call, t_{i+1}."""
    condition: Condition
    """What the student was told."""


class Path:
    """The trajectory of a few-step student from pure noise, for a batch whose samples may have different step counts.

    Call k (0 to K-1) is made at grid[k] and lands on grid[k+1] by `core.solvers.ddim_step`, so the whole path is what
    `core.solvers.ddim` samples with the same noise. Points are computed when first asked for, without gradient, by
    student calls on just the samples that need them: a sample asked for call k costs k calls for its input, one more
    for its `landing`, and never the same call twice.

    Args:
        student: denoiser; used for everything but `land`, which is handed its own.
        noise: (B, ...) standard normal; scaled by `process.noise_scale` here.
        grid: (K+1,) for all samples, or (B, Kmax+1) with each row's own grid followed by zeros (`core.grids.stack`).
        process: the noising process.
        condition: what the student is told, batch axis 0 (B rows).
        eta: share of the predicted noise kept in each landing, in [0, 1]; 1 is deterministic (`solvers.mix_noise`).
        extra_noise: extra_noise(k, shape of one sample) -> (B, *shape) standard normal for call k; needed if eta < 1.
            The same numbers serve `landing`, `land` and the path itself.
    """

    def __init__(
        self,
        student: Denoiser,
        noise: Tensor,
        grid: Tensor,
        process: Process,
        condition: Condition,
        eta: float = 1.0,
        extra_noise: Noise | None = None,
    ) -> None:
        if not 0 <= eta <= 1 or (eta < 1 and extra_noise is None):
            raise FewstepError(
                f"found eta = {eta} {'with' if extra_noise else 'without'} extra noise, expected eta in [0, 1] and "
                "noise for every eta below 1, fix: pass extra_noise or eta = 1"
            )
        self.process, self.condition, self.eta = process, condition, eta
        self.grid = grid.detach().cpu().double().expand(len(noise), -1)
        """(B, Kmax+1) float64 on the CPU."""
        self.steps = (self.grid > 0).sum(1)
        """(B,) long on the CPU: the step count of each sample."""
        self.real: tuple[Tensor, Condition] | None = None
        """Clean data with conditions, to be told from what the student makes; none unless a method puts it here."""
        self.pairs: tuple[Tensor, Tensor, Condition] | None = None
        """Noise, the teacher's samples from it and their conditions; likewise."""
        self._student, self._extra_noise = student, extra_noise
        calls = int(self.steps.max())
        self._inputs = noise.new_empty(calls + 1, *noise.shape)
        self._inputs[0] = noise.detach() * process.noise_scale
        self._denoised = torch.empty_like(self._inputs[:calls])
        self._eps = torch.empty_like(self._denoised)
        self._reached = torch.zeros(len(noise), dtype=torch.long)  # calls made so far, per sample
        self._fresh: dict[int, Tensor] = {}

    def times(self, call: Tensor) -> tuple[Tensor, Tensor]:
        """(time of the call, landing time), each (B,), on the device of the samples; `call` (B,) long."""
        return self._times(torch.arange(len(self.steps)), self._checked(call))

    def input(self, call: Tensor) -> Tensor:
        """(B, ...) x at grid[call], without gradient; `call` (B,) long in [0, steps)."""
        call = self._checked(call)
        self._advance(call)
        return self._inputs[self._at(call)]

    def landing(self, call: Tensor) -> Landing:
        """Where the path's own student call lands, without gradient."""
        call = self._checked(call)
        self._advance(call + 1)
        t_from, t = self.times(call)
        here = self._at(call)
        x = self._inputs[self._at(call + 1)]
        return Landing(x, self._denoised[here], self._eps[here], t, t_from, self.condition)

    def land(self, student: Denoiser, call: Tensor) -> Landing:
        """One call of `student` at the detached `input(call)`, with gradient if the grad mode is on.

        The gradient reaches the parameters of `student` through this one call only, not the path before it.
        """
        call = self._checked(call)
        x = self.input(call)
        t_from, t = self.times(call)
        denoised = student(x, t_from, self.condition).to(x.dtype)
        eps = self._landing_noise(x, denoised, t_from, torch.arange(len(x)), call)
        return Landing(land(self.process, denoised, eps, t), denoised, eps, t, t_from, self.condition)

    def landing_at(self, landing: Landing, t: Tensor) -> Landing:
        """The same prediction landed on other times `t` (B,), such as one within the segment; no network call."""
        t = t.to(landing.t)
        x = land(self.process, landing.denoised, landing.eps_hat, t)
        return Landing(x, landing.denoised, landing.eps_hat, t, landing.t_from, landing.condition)

    def _checked(self, call: Tensor) -> Tensor:
        call = call.cpu()
        if bool(((call < 0) | (call >= self.steps)).any()):
            raise FewstepError(
                f"found calls {call.tolist()}, expected each in [0, steps) with steps {self.steps.tolist()}, "
                "fix: draw the call below the sample's own step count"
            )
        return call

    def _at(self, call: Tensor) -> tuple[Tensor, Tensor]:
        """Index of each sample's own row in a (calls, B, ...) store."""
        device = self._inputs.device
        return call.to(device), torch.arange(len(call), device=device)

    def _times(self, rows: Tensor, call: Tensor) -> tuple[Tensor, Tensor]:
        """Times of `call` and of its landing for the samples `rows`."""
        device, dtype = self._inputs.device, at_least_float32(self._inputs.dtype)
        return self.grid[rows, call].to(device, dtype), self.grid[rows, call + 1].to(device, dtype)

    @torch.no_grad()
    def _advance(self, target: Tensor) -> None:
        """Make calls until every sample has made `target` (B,) of them."""
        while len(rows := (self._reached < target).nonzero().flatten()):
            call = self._reached[rows]
            here = (call.to(self._inputs.device), rows.to(self._inputs.device))
            x = self._inputs[here]
            t_from, t = self._times(rows, call)
            denoised = self._student(x, t_from, index_condition(self.condition, rows)).to(x.dtype)
            eps = self._landing_noise(x, denoised, t_from, rows, call)
            self._denoised[here], self._eps[here] = denoised, eps
            self._inputs[here[0] + 1, here[1]] = land(self.process, denoised, eps, t)
            self._reached[rows] += 1

    def _landing_noise(self, x: Tensor, denoised: Tensor, t_from: Tensor, rows: Tensor, call: Tensor) -> Tensor:
        """The eps that the samples `rows` land with after their `call`."""
        eps = noise_at(self.process, x, denoised, t_from)
        if self.eta == 1:
            return eps
        fresh = torch.stack([self._fresh_noise(k)[row] for row, k in zip(rows.tolist(), call.tolist(), strict=True)])
        return mix_noise(eps, fresh, self.eta)

    def _fresh_noise(self, k: int) -> Tensor:
        if k not in self._fresh:
            self._fresh[k] = fresh_noise(self._extra_noise, k, self._inputs[0])
        return self._fresh[k]


class DrawnPath(Path):
    """A path with the call (B,) that all losses of an iteration look at."""

    call: Tensor
