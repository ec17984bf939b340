"""Phases end to end on the tiny pipeline."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import fewstep
from fewstep import cli
from fewstep.api import RoleOptions
from fewstep.methods.phased import PhasedOptions
from fewstep.several import distill_phases
from fewstep.training.options import TrainOptions

PROMPTS = ["a frog", "a red apple on a blue background", "a 3d pizza"]
QUICK = TrainOptions(iterations=2, batch=4, warmup=1, log_every=1, tensorboard=False, student_rate=0.01)
OPTIONS = PhasedOptions(steps=3, phase_calls=(2, 1), grid=(1.0, 0.75, 0.5), critic_updates=1)


@pytest.mark.parametrize("kind", ["adapters", "copies"])
def test_phases_leave_earlier_experts_alone_and_the_folder_holds_them_all(
    kind: str, tmp_path: Path, tiny_teacher: Path
) -> None:
    teacher = fewstep.load_teacher(tiny_teacher)
    before = {name: value.clone() for name, value in teacher.backbone.network.state_dict().items()}
    student = distill_phases(
        teacher, OPTIONS, out=tmp_path, prompts=PROMPTS, roles=RoleOptions(roles=kind), train_options=QUICK
    )
    assert {path.name for path in tmp_path.iterdir()} == {"phase-1", "phase-2", "student"}
    assert student.grids.keys() == {3}
    assert student.card["method"] == "phased"
    assert all(torch.equal(value, before[name]) for name, value in teacher.backbone.network.state_dict().items())

    stored = load_file(tmp_path / "student" / "transformer" / "diffusion_pytorch_model.safetensors")
    first = {name: value for name, value in stored.items() if not name.startswith("later_experts.")}
    second = {name.removeprefix("later_experts.0."): stored[name] for name in stored.keys() - first.keys()}
    assert first.keys() == second.keys() == before.keys()
    moved = [name for name in before if not torch.equal(first[name], second[name])]
    assert moved
    if kind == "copies":  # the file is phase 1's own result, to the bit
        ended = load_file(tmp_path / "phase-1" / "checkpoints" / "000002" / "ema.safetensors")
        assert all(torch.equal(value, first[name]) for name, value in ended.items())

    again = distill_phases(
        teacher, OPTIONS, out=tmp_path, prompts=PROMPTS, roles=RoleOptions(roles=kind), train_options=QUICK, resume=True
    )
    seeds = [1, 2, 3]
    torch.testing.assert_close(again.latents(PROMPTS, seeds), student.latents(PROMPTS, seeds), rtol=0, atol=0)


def test_a_disjoint_run_with_four_experts_and_a_picture_in_every_phase(tmp_path: Path, tiny_teacher: Path) -> None:
    options = replace(OPTIONS, steps=4, phase_calls=(1, 1, 1, 1), grid=(), intervals="disjoint")
    options = replace(options, critic_call_condition=True)
    looks = replace(QUICK, sample_every=2)
    student = distill_phases(tiny_teacher, options, out=tmp_path, prompts=PROMPTS, train_options=looks)
    assert len(student.network.later_experts) == 3
    for phase in (1, 2, 3, 4):
        assert list((tmp_path / f"phase-{phase}" / "samples").glob("000002-4-steps.png"))
    assert fewstep.sample(tmp_path / "student", PROMPTS, 0).shape == (3, 3, 32, 32)


def test_the_command_has_no_options_that_parts_do_not_read(capsys: pytest.CaptureFixture[str]) -> None:
    for option in ("--start", "--held-out"):
        with pytest.raises(SystemExit) as stopped:
            cli.main(["msd", "tdm", "--part", "1", option, "x"])
        assert stopped.value.code == 2
        assert option in capsys.readouterr().err


def test_the_command_trains_one_part(tmp_path: Path, tiny_teacher: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from fewstep.commands.msd import main

    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join([*PROMPTS, "a blue frog"]))
    quick = ["--iterations", "1", "--warmup", "1", "--batch", "2", "--no-tensorboard", "--device", "cpu"]
    common = ["--teacher", str(tiny_teacher), "--out", str(tmp_path / "run"), "--prompts", str(prompts), *quick]
    for part in ("1", "2"):
        main(["tdm", "--part", part, "--parts", "2", "--steps", "2", *common])
        assert f"part-{part}/student" in capsys.readouterr().err
    assert fewstep.sample(tmp_path / "run", PROMPTS, 0).shape == (3, 3, 32, 32)
