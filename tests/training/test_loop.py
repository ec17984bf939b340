"""What one iteration does, and what the loop does around it."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import training_toy as toy
from torch import Tensor, nn

from fewstep.core.process import Flow
from fewstep.core.streams import Draw
from fewstep.errors import FewstepError
from fewstep.methods import DecoupledOptions, preset
from fewstep.methods.base import Loss, Roles
from fewstep.models.function_teacher import FunctionTeacher
from fewstep.training import checkpoint
from fewstep.training.log import read_log
from fewstep.training.loop import Hooks, train
from fewstep.training.networks import Stopwatch
from fewstep.training.options import TrainOptions
from fewstep.training.parallel import Group
from fewstep.training.signals import Stopped, StopRequest
from fewstep.training.trainee import Trainee


def _trainee(parameters: Mapping[str, nn.Parameter], **settings: Any) -> Trainee:
    options = TrainOptions(batch=2, warmup=0, **settings)
    return Trainee("student", parameters, options, Group(0, 1), Stopwatch(torch.device("cpu")))


def _weights(roles: toy.ToyRoles) -> dict[str, Tensor]:
    return {**roles.student_state(), **{f"critic.{name}": value for name, value in roles.critic_state().items()}}


def test_an_update_is_clipped_adamw_on_the_mean_over_samples() -> None:
    parameter = nn.Parameter(torch.tensor([2.0, -1.0], dtype=torch.float64))
    trainee = _trainee({"w": parameter}, student_rate=0.1, weight_decay=0.5, student_clip=1.0, beta2=0.75)
    inputs = torch.tensor([[3.0, 0.0], [3.0, -8.0]], dtype=torch.float64)  # gradient of the mean: (3, -4), norm 5
    update = trainee.update([Loss((inputs * parameter).sum(1))], 1)
    assert update.loss == pytest.approx((6 + 14) / 2)
    assert update.gradient_norm == pytest.approx(5)
    clipped = torch.tensor([0.6, -0.8], dtype=torch.float64)
    step = clipped / (clipped.abs() + 1e-8)  # beta1 = 0, bias correction of the first step
    expected = torch.tensor([2.0, -1.0], dtype=torch.float64) * (1 - 0.1 * 0.5) - 0.1 * step
    torch.testing.assert_close(parameter.detach(), expected)


def test_clip_zero_means_no_clipping() -> None:
    parameter = nn.Parameter(torch.tensor([0.0]))
    trainee = _trainee({"w": parameter}, student_clip=0.0)
    trainee.update([Loss(parameter * 1e4 * torch.ones(2))], 1)
    torch.testing.assert_close(trainee.tensors()["w.exp_avg"], torch.tensor([1e4]))  # beta1 = 0: the gradient
    assert parameter.grad is None


@pytest.mark.parametrize("microbatch", [1, 3, 8])
def test_accumulation_equals_the_whole_batch(tmp_path: Path, microbatch: int) -> None:
    whole, parts = (toy.ToyRoles(dtype=torch.float64) for _ in range(2))
    toy.run(tmp_path / "whole", roles=whole, iterations=4)
    toy.run(tmp_path / "parts", roles=parts, iterations=4, microbatch=microbatch)
    torch.testing.assert_close(_weights(parts), _weights(whole), rtol=0, atol=1e-9)
    for a, b in zip(read_log(tmp_path / "whole/log.jsonl"), read_log(tmp_path / "parts/log.jsonl"), strict=True):
        shared = [name for name in a if name.startswith(("loss/", "metric/", "gradient_norm/", "forwards/"))]
        assert [a[name] for name in shared] == pytest.approx([b[name] for name in shared], abs=1e-6)


def test_both_roles_learn(tmp_path: Path) -> None:
    roles = toy.ToyRoles(hidden=16)
    condition = {"mean": torch.ones(256, toy.DIMENSIONS)}
    noise, ones = torch.randn(256, toy.DIMENSIONS), torch.ones(256)

    def error() -> float:
        return (roles.student(noise, ones, condition).mean(0) - 1).abs().mean().item()

    before = error()
    toy.run(tmp_path, roles=roles, iterations=100, checkpoint_every=0, student_rate=1e-2, critic_rate=2e-2, batch=16)
    assert error() < 0.4 * before


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_reduced_precision_is_inside_the_networks_only(tmp_path: Path, precision: str) -> None:
    seen = {}

    class Roles(toy.ToyRoles):
        def student(self, x: Tensor, t: Tensor, condition: dict[str, Tensor]) -> Tensor:
            seen["inside"] = self.student_net.inner(torch.ones(1, 2 * toy.DIMENSIONS + 1)).dtype
            return super().student(x, t, condition).to(seen["inside"])

    class Method(toy.ToyMethod):
        def student_loss(self, path: Any, roles: Any, draw: Draw) -> Loss:
            loss = super().student_loss(path, roles, draw)
            seen["outside"] = loss.values.dtype
            return loss

    roles = Roles()
    toy.run(tmp_path, roles=roles, method=Method(), iterations=4, precision=precision)
    assert seen == {"inside": {"bf16": torch.bfloat16, "fp16": torch.float16}[precision], "outside": torch.float32}
    assert {value.dtype for value in _weights(roles).values()} == {torch.float32}
    assert all(value.isfinite().all() for value in _weights(roles).values())


def test_an_overflow_in_fp16_skips_the_step_and_halves_the_scale() -> None:
    parameter = nn.Parameter(torch.tensor([1.0]))
    trainee = _trainee({"w": parameter}, precision="fp16")
    before = trainee.scaler.get_scale()
    trainee.update([Loss(parameter * 1e38 * torch.ones(2))], 1)  # finite, but not when scaled
    assert trainee.scaler.get_scale() == before / 2
    assert parameter.item() == 1.0
    trainee.update([Loss(parameter * torch.ones(2))], 2)
    assert parameter.item() < 1.0


def test_fp16_resumes_with_its_loss_scale(tmp_path: Path) -> None:
    toy.run(tmp_path / "whole", iterations=6, precision="fp16", schedule="constant")
    toy.run(tmp_path / "parts", iterations=3, precision="fp16", schedule="constant")
    toy.run(tmp_path / "parts", iterations=6, precision="fp16", schedule="constant", resume=True)
    for name in ("student.safetensors", "critic_optimiser.safetensors", "ema.safetensors"):
        whole, parts = (tmp_path / kind / "checkpoints/000006" / name for kind in ("whole", "parts"))
        assert whole.read_bytes() == parts.read_bytes()
    state = json.loads((tmp_path / "parts/checkpoints/000006/state.json").read_text())
    assert state["student_loss_scaler"]["_growth_tracker"] == 6


@pytest.mark.parametrize("role", ["student", "critic"])
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_what_is_not_finite_stops_the_run_before_it_does_harm(tmp_path: Path, role: str, what: str) -> None:
    class Method(toy.ToyMethod):
        calls = 0

        def _spoil(self, loss: Loss, name: str) -> Loss:
            if name != role:
                return loss
            self.calls += 1
            if self.calls < (4 if role == "student" else 7):  # iteration 4; two critic updates in each
                return loss
            if what == "loss":
                return Loss(loss.values * torch.nan)
            zero = loss.values - loss.values.detach()
            return Loss(loss.values.detach() + (zero * 1e30) * 1e30)  # finite value, infinite slope

        def critic_loss(self, path: Any, roles: Roles, draw: Draw) -> Loss:
            return self._spoil(super().critic_loss(path, roles, draw), "critic")

        def student_loss(self, path: Any, roles: Roles, draw: Draw) -> Loss:
            return self._spoil(super().student_loss(path, roles, draw), "student")

    roles = toy.ToyRoles()
    with pytest.raises(FewstepError, match=rf"found a {role} loss of .* at iteration 4, .*lower {role}_rate"):
        toy.run(tmp_path, roles=roles, method=Method())
    assert all(value.isfinite().all() for value in _weights(roles).values())
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["000003"]


@pytest.mark.parametrize("trap", ["frozen", "misdirected"])
def test_a_loss_that_reaches_no_parameter_is_an_error(tmp_path: Path, trap: str) -> None:
    roles = toy.ToyRoles()

    class Method(toy.ToyMethod):
        def student_loss(self, path: Any, roles: Any, draw: Draw) -> Loss:
            if trap == "frozen":  # what a switch of adapters can do
                return Loss(super().student_loss(path, roles, draw).values.detach())
            return self.critic_loss(path, roles, draw)

    with pytest.raises(FewstepError, match="no gradient for the student at iteration 1"):
        toy.run(tmp_path, roles=roles, method=Method())


def test_the_loop_does_as_many_iterations_as_asked_and_logs_what_they_cost(tmp_path: Path) -> None:
    asked: list[tuple[int, list[int]]] = []

    def data(iteration: int, samples: Tensor) -> dict[str, Tensor]:
        asked.append((iteration, samples.tolist()))
        return toy.toy_data(iteration, samples)

    options = toy.toy_options(iterations=5, batch=3, log_every=2)
    result = train(toy.ToyMethod(), toy.ToyRoles(), data, options, tmp_path, noise_shape=(toy.DIMENSIONS,))
    assert asked == [(i, [3 * i - 3, 3 * i - 2, 3 * i - 1]) for i in (1, 2, 3, 4, 5)]
    assert result.iteration == 5
    assert result.checkpoint == tmp_path / "checkpoints" / "000005"
    records = read_log(result.log)
    assert [record["iteration"] for record in records] == [2, 4, 5]
    assert {name for name in records[0] if not name.startswith(("time/", "memory/"))} == {
        "iteration",
        *(f"{kind}/{role}" for kind in ("loss", "gradient_norm", "rate") for role in ("student", "critic")),
        *("metric/critic/error", "metric/student/pull"),
        *("forwards/student", "forwards/critic", "forwards/teacher"),
    }
    for record in records:
        assert (record["forwards/student"], record["forwards/critic"], record["forwards/teacher"]) == (3, 3, 1)
        assert 0 < record["time/rollout_share"] < record["time/network_share"] < 1 - record["time/data_share"] < 1
        assert record["time/images_per_s"] == pytest.approx(3 / record["time/iteration_s"])
        assert record["memory/peak_gib"] > 0.05
    about = json.loads((tmp_path / "run.json").read_text())
    assert about["options"]["log_every"] == 2
    assert about["configuration"]["method"] == {"name": "toy", "steps": 2, "critic_updates": 2}


def test_hooks_see_the_average_and_leave_no_trace(tmp_path: Path) -> None:
    seen: dict[str, list[Any]] = {"sample": [], "evaluate": [], "save": [], "log": []}
    roles = toy.ToyRoles()

    def now(name: str, iteration: int) -> None:
        assert not torch.is_grad_enabled() or name == "log"
        torch.randn(7)  # global random numbers are free to use
        seen[name].append((iteration, roles.student_net.outer.bias.detach().clone()))

    def evaluate(iteration: int) -> dict[str, float]:
        now("evaluate", iteration)
        return {"distance": iteration / 2}

    def save(iteration: int, folder: Path) -> None:
        now("save", iteration)
        (folder / "note.txt").write_text("exported")

    hooks = Hooks(lambda i: now("sample", i), evaluate, save, lambda i, record: now("log", i))
    result = toy.run(
        tmp_path / "with", roles=roles, hooks=hooks, iterations=6, sample_every=4, evaluate_every=3, log_every=2
    )
    plain = toy.ToyRoles()
    toy.run(tmp_path / "without", roles=plain, iterations=6)
    torch.testing.assert_close(_weights(roles), _weights(plain), rtol=0, atol=0)

    assert {name: [i for i, _ in calls] for name, calls in seen.items()} == {
        "sample": [4, 6],
        "evaluate": [3, 6],
        "save": [3, 6],
        "log": [2, 3, 4, 6],
    }
    average = result.ema.tensors["outer.bias"]
    assert not torch.equal(average, roles.student_net.outer.bias)
    for name in ("sample", "evaluate", "save"):
        assert torch.equal(seen[name][-1][1], average)
    assert torch.equal(seen["log"][-1][1], roles.student_net.outer.bias)
    assert (result.checkpoint / "note.txt").read_text() == "exported"
    evaluated = {r["iteration"]: r["evaluate/distance"] for r in read_log(result.log) if "evaluate/distance" in r}
    assert evaluated == {3: 1.5, 6: 3.0}


def test_the_log_and_sample_grids_of_a_long_run_stay_bounded_also_across_a_resume(tmp_path: Path) -> None:
    drawn: list[int] = []
    hooks = Hooks(sample=drawn.append)
    more: dict[str, Any] = {"log_every": 1, "log_most": 3, "sample_every": 2, "sample_most": 2, "tensorboard": True}
    for iterations, resume in ((5, False), (24, True)):
        result = toy.run(
            tmp_path, hooks=hooks, iterations=iterations, schedule="constant", warmup=0, resume=resume, **more
        )
    lines = [record["iteration"] for record in read_log(result.log)]
    assert lines == [1, 2, 3, 4, 5, 6, 8, 12, 16, 24]  # 5 was the end
    assert drawn == [2, 4, 5, 8, 16, 24]
    events = b"".join(path.read_bytes() for path in (tmp_path / "tensorboard").iterdir())
    assert events.count(b"loss/student") == len(lines)


def test_a_frequency_without_a_hook_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FewstepError, match=r"sample_every = 2 .*fix: pass Hooks\(sample=...\)"):
        toy.run(tmp_path, sample_every=2)


def test_layers_that_draw_by_themselves_resume_too(tmp_path: Path) -> None:
    class Roles(toy.ToyRoles):
        def student(self, x: Tensor, t: Tensor, condition: dict[str, Tensor]) -> Tensor:
            return nn.functional.dropout(super().student(x, t, condition), 0.5)

    whole, parts = Roles(), Roles()
    toy.run(tmp_path / "whole", roles=whole, iterations=4, schedule="constant")
    toy.run(tmp_path / "parts", roles=parts, iterations=2, schedule="constant")
    torch.manual_seed(12345)
    toy.run(tmp_path / "parts", roles=parts, iterations=4, schedule="constant", resume=True)
    torch.testing.assert_close(_weights(parts), _weights(whole), rtol=0, atol=0)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_says_how_to_go_on_and_loses_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], number: signal.Signals, code: int
) -> None:
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    hooks = Hooks(log=lambda iteration, record: os.kill(os.getpid(), number) if iteration == 4 else None)
    with pytest.raises(Stopped) as stopped:
        toy.run(tmp_path / "stopped", hooks=hooks)
    assert stopped.value.code == code
    assert "stopped after iteration 4, saved" in capsys.readouterr().err
    assert sorted(p.name for p in (tmp_path / "stopped/checkpoints").iterdir()) == ["000003", "000004"]
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers

    resumed, whole = toy.ToyRoles(), toy.ToyRoles()
    toy.run(tmp_path / "stopped", roles=resumed, resume=True)
    toy.run(tmp_path / "whole", roles=whole)
    torch.testing.assert_close(_weights(resumed), _weights(whole), rtol=0, atol=0)


@pytest.mark.parametrize("during", ["evaluate", "save", "sample"])
def test_a_signal_during_a_hook_lets_it_end(tmp_path: Path, during: str) -> None:
    """What an evaluation finds, or a checkpoint holds, is whole; and the run stops there."""

    def told(iteration: int) -> None:
        if iteration == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    def evaluate(iteration: int) -> dict[str, float]:
        if during == "evaluate":
            told(iteration)
        return {"score": float(iteration)}

    def save(iteration: int, folder: Path) -> None:
        if during == "save":
            told(iteration)
        (folder / "more").write_text(str(iteration))

    def sample(iteration: int) -> None:
        if during == "sample":
            told(iteration)

    hooks = Hooks(evaluate=evaluate, save=save, sample=sample)
    often: dict[str, Any] = {"evaluate_every": 2, "sample_every": 2, "checkpoint_every": 4, "log_every": 1}
    with pytest.raises(Stopped):
        toy.run(tmp_path, hooks=hooks, **often)
    found = checkpoint.newest(tmp_path / "checkpoints")
    assert found is not None
    assert found.iteration == (5 if during == "save" else 4)  # the next safe point
    assert (found.folder / "more").read_text() == str(found.iteration)
    lines = {record["iteration"]: record for record in read_log(tmp_path / "log.jsonl")}
    assert lines[4]["evaluate/score"] == 4.0
    assert max(lines) == found.iteration


def test_a_second_signal_insists() -> None:
    stop = StopRequest()
    try:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.code == 130
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
    finally:
        stop.close()


@pytest.mark.parametrize("kind", ["tdm", "tdm-paper"])
def test_a_published_method_trains_at_the_cost_it_claims(tmp_path: Path, kind: str) -> None:
    teacher = toy.ToyRoles().teacher
    backbone = FunctionTeacher(teacher, Flow(), null={"mean": torch.zeros(1, toy.DIMENSIONS)})
    torch.manual_seed(0)
    roles = backbone.roles(toy.Net(8))
    method = preset(kind).build()
    options = toy.toy_options(iterations=8, batch=64, log_every=1)
    result = train(method, roles, toy.toy_data, options, tmp_path, noise_shape=(toy.DIMENSIONS,))
    records = read_log(result.log)
    forwards = [sum(value for name, value in r.items() if name.startswith("forwards/")) for r in records]
    assert sum(forwards) / 8 == pytest.approx(method.forwards(), rel=0.05)
    assert max(forwards) <= 15  # issue 2, at K = 4
    assert {"metric/student/real_fake_cosine", "metric/student/denoised_std"} <= records[0].keys()


def test_a_method_that_asks_no_critic_trains_and_saves_none(tmp_path: Path) -> None:
    """Although the roles have one: no optimiser, nothing in checkpoints, and the run resumes."""
    options = DecoupledOptions(regulariser="mean_variance", moment_mean=0.0, moment_variance=1.0, steps=2)
    method = options.build()

    def run(iterations: int, resume: bool = False) -> tuple[toy.ToyRoles, Path]:
        torch.manual_seed(0)
        roles = toy.ToyRoles()
        settings = toy.toy_options(iterations=iterations, warmup=1, schedule="constant")
        result = train(method, roles, toy.toy_data, settings, tmp_path, noise_shape=(toy.DIMENSIONS,), resume=resume)
        return roles, result.checkpoint

    before = {name: value.clone() for name, value in toy.ToyRoles().critic_state().items()}
    roles, checkpoint = run(2)
    assert all(torch.equal(before[name], value) for name, value in roles.critic_state().items())
    assert sorted(path.stem for path in checkpoint.glob("*.safetensors")) == ["ema", "student", "student_optimiser"]
    again, _ = run(3, resume=True)
    assert any(not torch.equal(roles.student_state()[name], value) for name, value in again.student_state().items())
