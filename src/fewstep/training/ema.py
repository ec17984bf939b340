"""The averaged student."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Ema:
    """Exponential moving average of parameters, kept in fp32 (fp64 for fp64 parameters).

    With n updates behind it, the decay in force is min(decay, (1 + n) / (10 + n)), so that the first iterations,
    which are far from the result, are soon forgotten. `decay` 0 keeps nothing: every method is then a no-op and
    `applied` leaves the parameters as they are. In memory it costs 4 bytes per parameter; an update is local, no
    network call.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self._parameters = dict(parameters) if decay else {}
        self.tensors: dict[str, Tensor] = {name: _full(p).clone() for name, p in self._parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """One step of the average towards the present parameters."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        for name, average in self.tensors.items():
            average.lerp_(_full(self._parameters[name]), 1 - decay)
        self.updates += 1

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within the context the parameters hold the average; afterwards they are what they were, bit for bit."""
        kept = {name: p.detach().clone() for name, p in self._parameters.items()}
        self._write(self.tensors)
        try:
            yield
        finally:
            self._write(kept)

    @torch.no_grad()
    def _write(self, values: Mapping[str, Tensor]) -> None:
        for name, parameter in self._parameters.items():
            parameter.copy_(values[name])


def _full(parameter: nn.Parameter) -> Tensor:
    return parameter.detach().to(torch.promote_types(parameter.dtype, torch.float32))
