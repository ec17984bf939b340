"""Commands that write on a disk that is full say so in a sentence, and leave nothing half-written."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tiny_pixart import PROMPTS

from fewstep.cli import main
from fewstep.core import grids
from fewstep.models import build_roles, load_backbone, save_student


@contextmanager
def files_below(limit: int) -> Iterator[None]:
    """No file may grow beyond `limit` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def refused(capsys: pytest.CaptureFixture[str], limit: int, *words: object) -> str:
    """What the command says as it ends with 2."""
    with files_below(limit), pytest.raises(SystemExit) as stopped:
        main([str(word) for word in words])
    assert stopped.value.code == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "found no room left while writing in" in said
    assert "fix: free some space on its disk, then run the same again" in said
    return said


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize(("limit", "to"), [(1_000, "diffusers"), (50_000, "merged"), (50_000, "lora")])
def test_an_export(tmp_path: Path, tiny_teacher: Path, capsys: pytest.CaptureFixture[str], limit: int, to: str) -> None:
    roles = build_roles(load_backbone(tiny_teacher), "adapters", rank=32)
    source = save_student(tmp_path / "mine", roles, [grids.uniform(2)], method="tdm", form="lora")
    old = save_student(tmp_path / "out", roles, [grids.uniform(2)], method="old", form="lora")
    before = {path: path.read_bytes() for path in old.rglob("*") if path.is_file()}
    said = refused(capsys, limit, "export", source, "--to", to, "--out", old)
    assert str(old) in said
    assert {path.name for path in tmp_path.iterdir()} == {"mine", "out"}
    assert {path: path.read_bytes() for path in old.rglob("*") if path.is_file()} == before


def test_a_cache(tmp_path: Path, tiny_teacher: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(f"{prompt} {n}" for prompt in PROMPTS for n in range(30)))
    words = ["cache", "--teacher", tiny_teacher, "--prompts", prompts, "--cache", tmp_path / "cache", "--device", "cpu"]
    refused(capsys, 5_000, *words)
    assert files(tmp_path / "cache") == [".lock", "index.json", "null.safetensors"]
    main([str(word) for word in words])  # goes on


def test_an_evaluation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--steps", 1, "--count", 6, "--guidance-scale", 1, "--resamples", 0, "--device", "cpu"]
    said = refused(capsys, 1_000, "evaluate", "--student", "emoji", *words, "--samples", tmp_path / "samples")
    assert str(tmp_path / "samples") in said
    assert files(tmp_path / "samples") == ["samples.json"]
