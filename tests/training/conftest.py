"""Lets the tests in this folder, and the processes they start, import `training_toy`; starts two processes for some."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

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
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, sharded_pair.__file__, str(folder)], timeout=1800, env=environment)  # tests look at it
    return folder
