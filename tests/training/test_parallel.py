"""Two processes under torchrun give what one does."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import training_toy as toy
from safetensors.torch import load_file

from fewstep.errors import FewstepError
from fewstep.training import checkpoint, loop
from fewstep.training.log import read_log
from fewstep.training.parallel import Group


def test_two_processes_equal_one(tmp_path: Path) -> None:
    settings = ["--batch", "9", "--microbatch", "2", "--float64"]  # shares of 5 and 4, in parts of 2, 2, 1 and 2, 2
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", toy.__file__]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, str(tmp_path / "two"), *settings], check=True, timeout=120, env=environment)
    one = toy.run(tmp_path / "one", roles=toy.ToyRoles(dtype=torch.float64), batch=9)

    for group in ("student", "critic", "ema", "student_optimiser", "critic_optimiser"):
        first, second = (
            load_file(tmp_path / name / "checkpoints/000012" / f"{group}.safetensors") for name in ("one", "two")
        )
        torch.testing.assert_close(second, first, rtol=0, atol=1e-9)
    for a, b in zip(read_log(one.log), read_log(tmp_path / "two/log.jsonl"), strict=True):
        shared = [name for name in a if name.startswith(("iteration", "loss/", "metric/", "gradient_norm/"))]
        assert [a[name] for name in shared] == pytest.approx([b[name] for name in shared], abs=1e-6)


def test_a_signal_to_one_of_two_processes_stops_both_with_a_checkpoint(tmp_path: Path) -> None:
    """Whichever of them it comes to; the run then goes on where it was."""
    out = tmp_path / "run"
    command = [sys.executable, toy.__file__, str(out), "--iterations", "1000000"]
    meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    both = [
        subprocess.Popen(
            command, env={**os.environ, **meet, "RANK": str(rank), "LOCAL_RANK": str(rank)}, stderr=subprocess.PIPE
        )
        for rank in (0, 1)
    ]
    try:
        log, end = out / "log.jsonl", time.monotonic() + 300
        while not (log.is_file() and log.stat().st_size) and time.monotonic() < end:
            time.sleep(0.05)
        both[1].send_signal(signal.SIGTERM)
        said = [process.communicate(timeout=300)[1].decode() for process in both]
    finally:
        for process in both:
            process.kill()
    assert [process.returncode for process in both] == [143, 143], said
    found = checkpoint.newest(out / "checkpoints")
    assert found is not None
    assert f"stopped after iteration {found.iteration}, saved " in said[0]
    assert read_log(log)[-1]["iteration"] == found.iteration // 2 * 2


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_shares_cover_the_batch_once() -> None:
    samples = torch.arange(20, 30)
    shares = [Group(rank, 4).share(samples) for rank in range(4)]
    assert torch.cat(shares).equal(samples)
    assert sorted(len(share) for share in shares) == [2, 2, 3, 3]


def test_fewer_samples_than_processes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "process_group", lambda device: nullcontext(Group(0, 3)))
    with pytest.raises(FewstepError, match="found batch = 2 for 3 processes"):
        toy.run(tmp_path / "run", batch=2)
    assert not (tmp_path / "run").exists()
