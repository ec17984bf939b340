"""Lets the tests in this folder import what they share, also with those of the attention."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "attention")]

from tiny_causal import keep_float64  # noqa: E402


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny Wans made in float64 compute in it throughout."""
    keep_float64(monkeypatch)
