"""A tiny stock Wan that computes in float64 throughout; lets the tests in this folder import what they share."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from tiny_causal import TinyWan, keep_float64  # noqa: E402


@pytest.fixture
def wan(monkeypatch: pytest.MonkeyPatch) -> TinyWan:
    """In float64."""
    keep_float64(monkeypatch)
    return TinyWan(torch.float64)
