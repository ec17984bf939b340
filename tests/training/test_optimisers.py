"""AdamW with 8-bit moments: learns, is as small as planned, and goes on to the bit from a checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training_toy import ToyRoles, run

from fewstep.errors import FewstepError
from fewstep.training import optimisers
from fewstep.training.options import TrainOptions


def test_eight_bits_resume_to_the_bit(tmp_path: Path) -> None:
    """Wide enough that some tensors are rounded and some are not."""
    runs = {"optimiser": "adamw8bit", "iterations": 6, "schedule": "constant"}
    whole, first, second = (ToyRoles(hidden=600) for _ in range(3))
    run(tmp_path / "whole", roles=whole, **runs)
    run(tmp_path / "halves", roles=first, **runs | {"iterations": 3})
    run(tmp_path / "halves", roles=second, resume=True, **runs)
    for one, other in zip(whole.student_parameters(), second.student_parameters(), strict=True):
        assert torch.equal(one, other)
    files = [tmp_path / name / "checkpoints/000006/critic_optimiser.safetensors" for name in ("whole", "halves")]
    saved = [load_file(path) for path in files]
    assert {name for name, value in saved[0].items() if value.dtype == torch.uint8} == {
        "inner.weight.state1", "inner.weight.state2",
    }  # fmt: skip
    assert saved[0].keys() == saved[1].keys()
    assert all(torch.equal(saved[0][name], saved[1][name]) for name in saved[0])


@pytest.mark.parametrize("kind", ["adamw", "adamw8bit"])
@pytest.mark.parametrize("numbers", [100, 4095, 4096, 5000])
def test_bytes_are_as_planned(kind: optimisers.Optimiser, numbers: int) -> None:
    parameter = torch.nn.Parameter(torch.zeros(numbers))
    made = optimisers.make_optimiser(kind, [parameter], (0.0, 0.999), 0.0)
    parameter.grad = torch.ones_like(parameter)
    made.step()
    state = optimisers.tensors(made, ["one"])
    shared = (".qmap1", ".qmap2") if kind == "adamw" else (".qmap1", ".qmap2", ".step")
    own = [value for name, value in state.items() if not name.endswith(shared)]
    assert sum(value.nbytes for value in own) == optimisers.state_bytes(kind, numbers)


def test_a_missing_package_names_the_extra(monkeypatch) -> None:
    monkeypatch.setattr(optimisers, "find_spec", lambda name: None)
    with pytest.raises(FewstepError, match=r"pip install 'fewstep\[bitsandbytes\]'"):
        TrainOptions(optimiser="adamw8bit").validate()
