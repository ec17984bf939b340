"""Real data, pairs and discriminators in the training loop: filled in, resumed to the bit, refused where missing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import training_toy as toy
from safetensors.torch import load_file
from torch import Tensor, nn

from fewstep.core.process import Flow
from fewstep.core.tensors import Condition
from fewstep.errors import FewstepError
from fewstep.methods import DMD2Options, Options, preset
from fewstep.methods.base import Batch, Roles
from fewstep.methods.dmd2 import DMD2
from fewstep.models import FunctionTeacher
from fewstep.models.roles import Roles as ModelRoles
from fewstep.training.log import read_log
from fewstep.training.loop import TrainResult, train

OPTIONS = DMD2Options(steps=2, critic_updates=2, guidance_scale=1.0, gan_weight=0.1)


class Telling(nn.Module):
    """Logits (B, 2) of x, t and the mean it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2 * toy.DIMENSIONS + 1, 8), nn.Tanh(), nn.Linear(8, 2))

    def forward(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return self.layers(torch.cat([x, condition["mean"].to(x), t[:, None].to(x)], 1))


def roles_with(discriminator: bool = True, dtype: torch.dtype = torch.float32) -> ModelRoles:
    torch.manual_seed(5)
    backbone = FunctionTeacher(toy.ToyRoles().teacher, Flow(), null={"mean": torch.zeros(1, toy.DIMENSIONS)})
    student, telling = toy.Net(8).to(dtype), Telling().to(dtype)
    return backbone.roles(student, discriminator=telling if discriminator else None)


def real(iteration: int, samples: Tensor) -> tuple[Tensor, Condition]:
    """Clean samples that depend on their number only."""
    condition = toy.toy_data(iteration, samples)
    spread = toy.SPREAD * torch.sin(samples[:, None] * torch.arange(1.0, toy.DIMENSIONS + 1))
    return condition["mean"] + spread, condition


def pairs(iteration: int, samples: Tensor) -> tuple[Tensor, Tensor, Condition]:
    clean, condition = real(iteration, samples)
    return (clean - condition["mean"]) / toy.SPREAD, clean, condition


def run(out: Path, roles: ModelRoles, options: Options = OPTIONS, resume: bool = False, **changes: Any) -> TrainResult:
    return train(
        options.build(),
        roles,
        toy.toy_data,
        toy.toy_options(**changes),
        out,
        noise_shape=(toy.DIMENSIONS,),
        real=real,
        pairs=pairs,
        resume=resume,
    )


def test_a_run_with_a_discriminator_resumes_to_the_bit(tmp_path: Path) -> None:
    run(tmp_path / "whole", roles_with(), iterations=6, schedule="constant")
    run(tmp_path / "parts", roles_with(), iterations=3, schedule="constant")
    run(tmp_path / "parts", roles_with(), iterations=6, schedule="constant", resume=True)
    folder = "checkpoints/000006"
    for name in ("student", "critic", "critic_optimiser", "ema"):
        whole, parts = (tmp_path / kind / folder / f"{name}.safetensors" for kind in ("whole", "parts"))
        assert whole.read_bytes() == parts.read_bytes()
    names = load_file(tmp_path / "whole" / folder / "critic_optimiser.safetensors").keys()
    assert "discriminator.layers.0.weight.exp_avg_sq" in names


def test_checkpoints_without_a_discriminator_hold_no_trace_of_one(tmp_path: Path) -> None:
    run(tmp_path, roles_with(discriminator=False), replace(OPTIONS, gan_weight=0.0), iterations=2)
    assert not any("discriminator" in name for name in load_file(tmp_path / "checkpoints/000002/critic.safetensors"))
    assert "forwards/discriminator" not in read_log(tmp_path / "log.jsonl")[-1]


def test_forwards_of_the_discriminator_are_counted_and_timed(tmp_path: Path) -> None:
    method = OPTIONS.build()
    records = read_log(run(tmp_path, roles_with(), iterations=8, batch=64, log_every=1).log)
    assert all(record["forwards/discriminator"] == 5 for record in records)  # twice per critic update, once after
    total = sum(value for record in records for name, value in record.items() if name.startswith("forwards/"))
    assert total / len(records) == pytest.approx(method.forwards(), rel=0.05)


@pytest.mark.parametrize("microbatch", [1, 3])
def test_accumulation_equals_the_whole_batch(tmp_path: Path, microbatch: int) -> None:
    whole, parts = (roles_with(dtype=torch.float64) for _ in range(2))
    run(tmp_path / "whole", whole, iterations=3)
    run(tmp_path / "parts", parts, iterations=3, microbatch=microbatch)
    for a, b in ((whole.student_state(), parts.student_state()), (whole.critic_state(), parts.critic_state())):
        torch.testing.assert_close(b, a, rtol=0, atol=1e-9)


def test_an_update_has_gradients_of_its_own_role_alone(tmp_path: Path) -> None:
    """Of the critic's none are in memory in the student's update, and that leaves none in critic and discriminator."""
    roles = roles_with()
    seen: list[Tensor | None] = []

    class Watching(DMD2):
        def student_loss(self, path: Any, roles_: Roles, draw: Any) -> Any:
            seen.extend(p.grad for p in [*roles.critic_parameters(), *roles.student_parameters()])
            return super().student_loss(path, roles_, draw)

    train(
        Watching(OPTIONS), roles, toy.toy_data, toy.toy_options(iterations=2), tmp_path,
        noise_shape=(toy.DIMENSIONS,), real=real,
    )  # fmt: skip
    assert seen
    assert all(gradient is None for gradient in [*seen, *(p.grad for p in roles.critic_parameters())])


def test_real_data_and_pairs_follow_from_the_samples_numbers(tmp_path: Path) -> None:
    batches: list[Batch] = []

    class Watching(DMD2):
        def rollout(self, batch: Batch, roles: Roles, draw: Any) -> Any:
            batches.append(batch)
            return super().rollout(batch, roles, draw)

    options = replace(OPTIONS, steps=1, regression_weight=0.25)
    train(
        Watching(options), roles_with(), toy.toy_data, toy.toy_options(iterations=2, microbatch=3), tmp_path,
        noise_shape=(toy.DIMENSIONS,), real=real, pairs=pairs,
    )  # fmt: skip
    assert len(batches) == 6
    for batch in batches:
        torch.testing.assert_close(batch.real[0], real(0, batch.samples)[0])
        torch.testing.assert_close(batch.pairs[1], pairs(0, batch.samples)[1])


@pytest.mark.parametrize(
    ("missing", "options", "message"),
    [
        ("discriminator", OPTIONS, "without a discriminator.*build the roles with discriminator="),
        ("real", OPTIONS, "without real data.*pass real="),
        ("real", replace(preset("f-distill"), gan_weight=0.0), "without real data"),
        ("pairs", preset("dmd"), "without pairs.*pass pairs="),
    ],
)
def test_what_is_missing_is_said_at_the_start(tmp_path: Path, missing: str, options: Options, message: str) -> None:
    given = {name: value for name, value in {"real": real, "pairs": pairs}.items() if name != missing}
    with pytest.raises(FewstepError, match=message):
        train(
            options.build(), roles_with(missing != "discriminator"), toy.toy_data, toy.toy_options(), tmp_path / "run",
            noise_shape=(toy.DIMENSIONS,), **given,
        )  # fmt: skip
    assert not (tmp_path / "run").exists()


def test_sources_that_the_method_does_not_need_are_not_asked(tmp_path: Path) -> None:
    def refuse(iteration: int, samples: Tensor) -> Any:
        raise AssertionError

    options = replace(OPTIONS, gan_weight=0.0)
    train(
        options.build(), roles_with(False), toy.toy_data, toy.toy_options(iterations=2), tmp_path,
        noise_shape=(toy.DIMENSIONS,), real=refuse, pairs=refuse,
    )  # fmt: skip
