"""The tiny pipeline as a folder and a backbone; lets the tests in this folder import `tiny_pixart`."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fewstep.models import Backbone, load_backbone, seeded_noise

sys.path.insert(0, str(Path(__file__).parent))

from tiny_pixart import PROMPTS, build_pipeline  # noqa: E402


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The saved pipeline; read-only for tests."""
    path = tmp_path_factory.mktemp("teacher") / "pixart"
    build_pipeline().save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def backbone(folder: Path) -> Backbone:
    """The loaded teacher; read-only for tests."""
    return load_backbone(folder)


@pytest.fixture
def batch(backbone: Backbone) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """x (3, 4, 8, 8), t (3,) and the condition of three prompts of different length."""
    return seeded_noise([1, 2, 3], backbone.latent_shape), torch.tensor([0.3, 0.7, 1.0]), backbone.encode(PROMPTS)
