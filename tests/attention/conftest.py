"""A tiny stock Wan that computes in float64 throughout, and what it is told."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from tiny_causal import TinyWan  # noqa: E402


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wan's blocks call `.float()` on what they add up; here that leaves float64 alone."""
    to_float = torch.Tensor.float

    def kept(self: torch.Tensor, *more: Any, **told: Any) -> torch.Tensor:
        return self if self.dtype == torch.float64 else to_float(self, *more, **told)

    monkeypatch.setattr(torch.Tensor, "float", kept)


@pytest.fixture
def wan(exact: None) -> TinyWan:
    """In float64."""
    return TinyWan(torch.float64)
