"""One row of the table of known answers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Answer:
    """What was measured and what it had to be."""

    name: str
    measured: float
    limit: str
    """Such as "<= 0.05"."""
    passed: bool


def at_most(name: str, measured: float, limit: float) -> Answer:
    """Passed if `measured` is a number not above `limit`."""
    return Answer(name, float(measured), f"<= {limit:.4g}", bool(measured <= limit))


def at_least(name: str, measured: float, limit: float) -> Answer:
    """Passed if `measured` is a number not below `limit`."""
    return Answer(name, float(measured), f">= {limit:.4g}", bool(measured >= limit))
