"""The tiny pipelines of the model tests, as folders."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent / "models")]

from tiny_families import FAMILIES, save  # noqa: E402
from tiny_pixart import build_pipeline  # noqa: E402


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Saved pipelines by family, made when first asked for; read-only. "middle" is a wider PixArt."""
    import tiny_flows

    root = tmp_path_factory.mktemp("families")

    class Folders(dict):
        def __missing__(self, family: str) -> Path:
            if family in FAMILIES:
                self[family] = save(family, root)
            else:
                made = build_pipeline(sample_size=16, heads=4) if family == "middle" else _flow(tiny_flows, family)
                made.save_pretrained(root / family)
                self[family] = root / family
            return self[family]

    return Folders()


def _flow(module, family: str):
    name, _, kind = family.partition(" ")
    return getattr(module, name)(*([kind] if kind else []))
