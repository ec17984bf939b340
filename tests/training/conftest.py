"""Lets the tests in this folder, and the processes they start, import `training_toy`; starts two processes for some."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from tests.two_processes import start

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "models"))  # for tiny pipelines


@pytest.fixture(scope="session")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs of one process and of two, resumed by the other number, and what the two said."""
    import chain_pair
    import sharded_pair
    import tiny_flows
    from tiny_pixart import build_pipeline

    folder = tmp_path_factory.mktemp("pair")
    build_pipeline().save_pretrained(folder / "pixart")
    tiny_flows.wan("a14b").save_pretrained(folder / "wan")
    sharded_pair.alone(folder)
    chain_pair.alone(folder)
    start(sharded_pair.__file__, folder)
    return folder
