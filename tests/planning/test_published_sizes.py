"""A plan at a published size: PixArt-XL-2 from a folder of configs, as `benchmarks/plan_real_sizes.py` makes it."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from plan_real_sizes import PUBLISHED, planned, save_configs  # noqa: E402
from training_step import BACKBONES  # noqa: E402


def test_pixart_xl_from_its_configs(tmp_path: Path) -> None:
    save_configs(BACKBONES["pixart-512"]("meta"), tmp_path)
    assert not list(tmp_path.rglob("*.safetensors"))
    told = argparse.Namespace(batch=32, microbatch=1, gpus=1, rank=32, shard=False)
    found = planned(tmp_path, "adapters", told)
    numbers, parts = found["parameters"], found["bytes_per_gpu"]
    assert numbers["frozen"] == pytest.approx(PUBLISHED["pixart-512"], rel=0.01)
    assert parts["frozen weights"] == pytest.approx(2 * numbers["frozen"], rel=0.01)  # bfloat16
    assert parts["trained weights"] == 4 * (numbers["student"] + numbers["critic"])
    assert parts["gradients"] == 4 * numbers["student"] == 4 * numbers["critic"]  # of one role at a time
    assert found["operations_per_forward"] == pytest.approx(2 * 1024 * numbers["frozen"], rel=0.25)  # 1024 tokens
    assert found["fits"]
