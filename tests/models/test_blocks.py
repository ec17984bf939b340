"""Blocks compiled one by one: the same losses, and a number of translations that does not grow with training."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_families import build_sdxl
from tiny_pixart import PROMPTS

from fewstep.errors import FewstepError
from fewstep.methods import preset
from fewstep.models import Backbone, build_roles
from fewstep.models.blocks import compile_blocks, repeated_blocks
from fewstep.training.log import read_log
from fewstep.training.loop import train
from fewstep.training.options import TrainOptions


def losses(backbone: Backbone, out: Path, compile_backend: str | None, iterations: int) -> list[tuple[float, float]]:
    options = TrainOptions(iterations=iterations, batch=3, warmup=0, log_every=1, checkpoint_every=0, tensorboard=False)
    told = backbone.encode(PROMPTS)
    result = train(
        preset("tdm").build(),
        build_roles(backbone, rank=4, checkpointing=True, compile_backend=compile_backend),
        lambda iteration, samples: {name: value[samples % 3] for name, value in told.items()},
        options,
        out,
        noise_shape=backbone.latent_shape,
    )
    return [(r["loss/student"], r["loss/critic"]) for r in read_log(result.log)]


def test_compiled_training_is_training(backbone: Backbone, tmp_path: Path) -> None:
    """With both adapters, none, checkpointing, guidance and sub-batches of the rollout: all variants of a block."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    try:
        found = losses(backbone, tmp_path / "compiled", "eager", 5)
        counters = torch._dynamo.utils.counters
        programs = counters["stats"]["unique_graphs"]
        assert 3 <= programs <= 12, dict(counters["stats"])  # roles x gradient x (one sample, several)
        assert not counters["graph_break"], dict(counters["graph_break"])
    finally:
        torch._dynamo.reset()
    torch.testing.assert_close(found, losses(backbone, tmp_path / "plain", None, 5), rtol=1e-5, atol=1e-5)


def test_blocks_of_a_transformer_and_of_a_unet(backbone: Backbone, tmp_path: Path) -> None:
    assert list(repeated_blocks(backbone.network)) == ["transformer_blocks.0", "transformer_blocks.1"]
    names = repeated_blocks(build_sdxl(tmp_path).unet)
    assert len(names) == 5
    assert all(".transformer_blocks." in name for name in names)


def test_a_network_without_blocks_is_refused() -> None:
    with pytest.raises(FewstepError, match="found a Linear without repeated blocks"):
        compile_blocks(torch.nn.Linear(1, 1), "eager")
