"""Causal students whose weights two processes share (the checks are in sharded_causal.py)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import sharded_causal as pair
import tiny_flows
from tests.two_processes import said, start

import fewstep
from fewstep.api import RoleOptions


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the two said, and the student that one process made before."""
    folder = tmp_path_factory.mktemp("causal")
    tiny_flows.wan().save_pretrained(folder / "wan")
    teacher = fewstep.load_teacher(folder / "wan", **pair.SIZE)  # type: ignore[arg-type]
    told = {"prompts": tiny_flows.PROMPTS[:2], "roles": RoleOptions(roles="copies")}
    settings = replace(pair.TRAIN, student_rate=1e-2)
    fewstep.distill(teacher, pair.OPTIONS, out=folder / "start", train_options=settings, **told)  # type: ignore[arg-type]
    start(pair.__file__, folder)
    return folder


@pytest.mark.parametrize("check", pair.CHECKS)
def test_the_two_say(folder: Path, check: str) -> None:
    assert said(folder, check) == ["well", "well"]
