"""The roles as the loop hands them to a method: in the wanted precision, timed and counted."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Any, Literal

import torch
from torch import Tensor

from fewstep.core.guidance import Denoiser
from fewstep.core.tensors import Condition
from fewstep.methods.base import Roles
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
    Everything else of `roles` is passed through. The backward pass is the loop's own to time.
    """

    def __init__(self, roles: Roles, precision: Literal["fp32", "bf16", "fp16"], device: torch.device) -> None:
        self._roles = roles
        self._device = device
        self._dtype = _DTYPES.get(precision)
        self.watch = Stopwatch(device)
        self.rows: Counter[str] = Counter()

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
        with self.watch("rollout" if rollout else role):
            with torch.autocast(self._device.type, self._dtype, enabled=self._dtype is not None):
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
        total, data = self._total, self._spent.pop("data", 0.0)
        record = {f"forwards/{role}": rows / self._batch for role, rows in sorted(self._networks.rows.items())}
        record |= {
            "time/iteration_s": total / self._iterations,
            "time/images_per_s": self._iterations * self._batch / total,
            "time/rollout_share": self._spent["rollout"] / total,
            "time/network_share": sum(self._spent.values()) / total,
            "time/data_share": data / total,
            "memory/peak_gib": peak_memory(self._device),
        }
        self._iterations, self._total, self._spent = 0, 0.0, defaultdict(float)
        return record
