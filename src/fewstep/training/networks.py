"""The roles as the loop hands them to a method: in the wanted precision, timed and counted."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Any, Literal

import torch
from torch import Tensor

from fewstep.core.guidance import Denoiser
from fewstep.core.tensors import Condition, index_condition
from fewstep.methods.base import Roles
from fewstep.training.parallel import agreement
from fewstep.training.progress import peak_memory

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Stopwatch:
    """Seconds by name. On CUDA they are the GPU's own, from events, and nothing waits until `take`."""

    def __init__(self, device: torch.device) -> None:
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] | None = (
            [] if device.type == "cuda" else None
        )
        self._seconds: defaultdict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        if self._events is None:
            start = perf_counter()
            yield
            self._seconds[name] += perf_counter() - start
        else:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            yield
            end.record()
            self._events.append((name, start, end))

    def take(self) -> dict[str, float]:
        """The seconds since the last call of `take`."""
        for name, start, end in self._events or ():
            end.synchronize()
            self._seconds[name] += start.elapsed_time(end) / 1000
        if self._events is not None:
            self._events.clear()
        taken, self._seconds = self._seconds, defaultdict(float)
        return taken


class Networks:
    """Stands for `roles` in front of a method.

    A call of teacher, student, critic or discriminator runs under autocast to `precision` and comes back in the dtype
    of its input, so that all arithmetic of the methods stays in fp32. Its time goes to the stopwatch under the role's
    name, or "rollout" for a student call without gradient; `rows` counts the samples each role was called with.
    Everything else of `roles` is passed through. The backward pass is the loop's own to time, by `timed`.

    Sharded networks gather their weights call by call, for which all processes have to make the same calls, while their
    samples may ask for rollouts of different length. So, once `in_step` was called, a process that is through with its
    rollout repeats its student's call for one row, to no purpose of its own, for as long as another one still walks.
    """

    def __init__(self, roles: Roles, precision: Literal["fp32", "bf16", "fp16"], device: torch.device) -> None:
        self._roles = roles
        self._device = device
        self._dtype = _DTYPES.get(precision)
        self.watch = Stopwatch(device)
        self.rows: Counter[str] = Counter()
        self._roots: list[Any] = []
        self._any: Callable[[bool], bool] = bool
        self._idle: tuple[Tensor, Tensor, Condition] | None = None

    def in_step(self) -> None:
        """For roles that are sharded: from now on all processes make the same calls. Each of them calls this."""
        self._roots = list(getattr(self._roles, "sharded", ()))
        self._any = agreement()

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Around every backward pass, to time it and to have the weights there that it needs.

        FSDP gathers a block again when the gradient of its output arrives. What lies outside the blocks waits for the
        gradient of the network's output, and where a discriminator reads blocks there is none.
        """
        self._let_others_walk()
        with self.watch(name):
            for root in self._roots:
                root.unshard()
            yield
            for root in self._roots:
                root.reshard()

    def _let_others_walk(self) -> None:
        """Idle calls of the student until no process is in its rollout any more."""
        while self._roots and self._any(False):
            assert self._idle is not None  # whoever walks has begun with a call of the student, as we have
            with torch.no_grad(), self._autocast():
                self._roles.student(*self._idle)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self._device.type, self._dtype, enabled=self._dtype is not None)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._roles, name)

    def teacher(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return self._call("teacher", self._roles.teacher, x, t, condition)

    def student(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return self._call("student", self._roles.student, x, t, condition)

    def critic(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return self._call("critic", self._roles.critic, x, t, condition)

    def discriminator(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return self._call("discriminator", self._roles.discriminator, x, t, condition)

    def log_ratio(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return self._call("discriminator", self._roles.log_ratio, x, t, condition)

    def _call(self, role: str, network: Denoiser, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        self.rows[role] += len(x)
        rollout = role == "student" and not torch.is_grad_enabled()
        if self._roots:
            if role == "student":
                self._idle = x[:1].detach(), t[:1], index_condition(condition, torch.zeros(1, dtype=torch.long))
            if rollout:
                self._any(True)
            else:
                self._let_others_walk()
        with self.watch("rollout" if rollout else role):
            with self._autocast():
                denoised = network(x, t, condition)
            return denoised.to(x.dtype)


class Meter:
    """Seconds and calls, summed over the iterations since the last `take`."""

    def __init__(self, networks: Networks, batch: int, device: torch.device) -> None:
        self._networks, self._batch, self._device = networks, batch, device
        self._iterations, self._total, self._spent = 0, 0.0, defaultdict[str, float](float)

    def __enter__(self) -> None:
        self._networks.rows.clear()
        self._start = perf_counter()

    def __exit__(self, *exception: object) -> None:
        for name, seconds in self._networks.watch.take().items():
            self._spent[name] += seconds
        self._total += perf_counter() - self._start
        self._iterations += 1

    def take(self) -> dict[str, float]:
        total, data, monitors = self._total, self._spent.pop("data", 0.0), self._spent.pop("monitors", 0.0)
        record = {f"forwards/{role}": rows / self._batch for role, rows in sorted(self._networks.rows.items())}
        record |= {
            "time/iteration_s": total / self._iterations,
            "time/images_per_s": self._iterations * self._batch / total,
            "time/rollout_share": self._spent["rollout"] / total,
            "time/network_share": sum(self._spent.values()) / total,
            "time/data_share": data / total,
            "time/monitors_share": monitors / total,
            "memory/peak_gib": peak_memory(self._device),
        }
        self._iterations, self._total, self._spent = 0, 0.0, defaultdict(float)
        return record
