"""One thread per process; the tiny pipeline for tests outside `tests/models`."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "models"))
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved random PixArt pipeline; read-only for tests."""
    from tiny_pixart import build_pipeline

    path = tmp_path_factory.mktemp("tiny") / "pixart"
    build_pipeline().save_pretrained(path)
    return path
