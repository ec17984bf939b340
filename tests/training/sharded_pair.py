"""What two processes check together about sharding, started once for all tests: torchrun sharded_pair.py FOLDER.

FOLDER holds the teachers and what one process has trained (`alone`, conftest.py); the two leave their runs beside it,
and `checks-RANK.json` with what each check said. They go on with those of chain_pair.py.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

sys.path[:0] = [str(Path(__file__).parents[1] / "models"), str(Path(__file__).parents[2])]

import chain_pair  # noqa: E402
from tests.two_processes import make  # noqa: E402
from tiny_pixart import PROMPTS, perturb  # noqa: E402

from fewstep.core.shards import fill_, is_sharded, whole  # noqa: E402
from fewstep.data.prompts import PromptData  # noqa: E402
from fewstep.errors import FewstepError  # noqa: E402
from fewstep.live import LiveStudent  # noqa: E402
from fewstep.methods import preset  # noqa: E402
from fewstep.models import Roles, build_roles, load_backbone, save_student, seeded_noise  # noqa: E402
from fewstep.models.sharding import collected, shard  # noqa: E402
from fewstep.training.loop import Hooks, TrainResult, train  # noqa: E402
from fewstep.training.options import TrainOptions  # noqa: E402
from fewstep.training.parallel import leads  # noqa: E402

RUNS = {"adapters": "tdm", "copies": "sid", "mixed": "dmd2"}
"""Method by kind of roles: each leads its losses another way through the networks, dmd2 through a discriminator."""
RATE = 1e-3


def made(
    folder: Path, kind: str, dtype: torch.dtype = torch.float64, defer: bool = False, blocks: int = 2, **more: Any
) -> Roles:
    """Roles that have left the teacher, checkpointed; in float64, so that rounding does not hide or grow."""
    needs = preset(RUNS[kind]).build().needs
    features = needs.features if needs.discriminator else "none"
    backbone = load_backbone(folder / "pixart", dtype=dtype, defer=defer)
    backbone.network.transformer_blocks = backbone.network.transformer_blocks[:blocks]  # type: ignore[index]
    told: dict[str, Any] = {"checkpointing": True, "discriminator": features, **more}
    roles = build_roles(backbone, kind, rank=4, **told)  # type: ignore[arg-type]
    if dtype == torch.float64:
        doubled(roles)
    elif not defer:
        perturb([*roles.student_parameters(), *roles.critic_parameters()])
    return roles


def doubled(roles: Roles) -> Roles:
    """What is trained, moved at random, in float64."""
    trained = [*roles.student_parameters(), *roles.critic_parameters()]
    for parameter in trained:
        parameter.data = parameter.data.double()
    perturb(trained)
    return roles


def run(
    folder: Path, out: Path, kind: str, iterations: int = 2, *, resume: bool = False, spread: bool = True,
    precision: Literal["fp32", "bf16"] = "fp32",
) -> Roles:  # fmt: skip
    """A run of `kind`, sharded where there is more than one process, with samples of its student at the end."""
    torch.set_num_threads(1)
    roles = made(folder, kind, torch.float64 if precision == "fp32" else torch.float32)
    options = preset(RUNS[kind])
    if spread:
        shard(roles, precision)
    backbone = roles.backbone

    def real(iteration: int, samples: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return seeded_noise(samples.tolist(), backbone.latent_shape), backbone.encode(["a frog"] * len(samples))

    def sample(iteration: int) -> None:
        latents = LiveStudent(roles, options).latents(PROMPTS, [1, 2, 3])
        if leads():
            save_file({"latents": latents}, out / f"samples-{iteration}.safetensors")

    settings = TrainOptions(
        iterations=iterations, batch=8, microbatch=2, log_every=1, tensorboard=False, student_rate=RATE,
        critic_rate=RATE, warmup=0, student_clip=1e-2, critic_clip=1e-2, checkpoint_every=0, precision=precision,
    )  # fmt: skip
    result: TrainResult = train(
        options.build(), roles, PromptData(backbone.encode, PROMPTS, 0), settings, out, Hooks(sample=sample),
        noise_shape=backbone.latent_shape, real=real, resume=resume,
    )  # fmt: skip
    with result.ema.applied():
        student = collected(roles)
        if student is not None:
            grids = [options.time_grid(count) for count in options.counts]
            save_student(out / "student", student, grids, method=options.build().name, eta=options.eta)
    return roles


def trains(folder: Path, kind: str) -> None:
    """Two iterations, for test_sharding.py to compare; every parameter is spread, the backbone's too."""
    roles = run(folder, folder / f"two-{kind}", kind)
    assert all(is_sharded(parameter) for network in roles.sharded for parameter in network.parameters())
    assert all(is_sharded(parameter) for parameter in roles.backbone.network.parameters())
    held = sum(p.to_local().numel() for p in roles.student_parameters())
    assert held <= 0.52 * sum(p.numel() for p in roles.student_parameters())


def resumes(folder: Path) -> None:
    """What one process began."""
    run(folder, folder / "one-then-two", "adapters", 3, resume=True)


def half_precision(folder: Path) -> None:
    """Weights are gathered as bfloat16; what each process holds and trains is float32."""
    roles = run(folder, folder / "two-bf16", "adapters", 1, precision="bf16")
    assert {p.dtype for p in roles.student_parameters()} == {torch.float32}


def compiled(folder: Path) -> None:
    """Blocks compiled before they are sharded, checkpointed and with adapters, give the gradients of plain ones."""
    spread, one = made(folder, "adapters", blocks=1, compile_backend="eager"), made(folder, "adapters", blocks=1)
    shard(spread)
    x, t = seeded_noise([1, 2], one.backbone.latent_shape).double(), torch.tensor([0.9, 0.4])
    condition = one.backbone.encode(PROMPTS[:2])
    programs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for roles in (spread, one):
        roles.student(x, t, condition).square().mean().backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > programs
    for a, b in zip(spread.student_parameters(), one.student_parameters(), strict=True):
        assert bool(b.grad.any())
        torch.testing.assert_close(whole(a.grad), b.grad, rtol=0, atol=1e-9 * float(b.grad.abs().max()))


def small_base_from_disk(folder: Path) -> None:
    """A bfloat16 base, of which each process reads its rows, under float32 adapters: the numbers of a whole one."""
    spread = made(folder, "adapters", torch.bfloat16, defer=True)
    shard(spread)
    one = made(folder, "adapters", torch.bfloat16)
    assert {p.dtype for p in spread.student_parameters()} == {torch.float32}
    assert {p.dtype for p in spread.backbone.network.parameters()} == {torch.bfloat16}
    for a, b in zip(spread.student_parameters(), one.student_parameters(), strict=True):
        fill_(a, b.detach())
    x, t = seeded_noise([1, 2], one.backbone.latent_shape), torch.tensor([0.9, 0.4])
    condition = one.backbone.encode(PROMPTS[:2])
    for roles in (spread, one):
        roles.student(x, t, condition).square().mean().backward()
    for a, b in zip(spread.student_parameters(), one.student_parameters(), strict=True):
        torch.testing.assert_close(whole(a.grad), b.grad, rtol=1e-5, atol=1e-6 * float(b.grad.abs().max()))


def experts(folder: Path) -> None:
    """Two networks that switch by time, each asked by one process only, are called by both; gradients are exact."""
    t, found = torch.tensor([0.95, 0.3]), []
    for spread in (False, True):
        size = {"height": 16, "width": 32, "num_frames": 5}
        roles = doubled(build_roles(load_backbone(folder / "wan", dtype=torch.float64, size=size), "adapters", rank=2))
        backbone, mine = roles.backbone, [0, 1]
        if spread:
            shard(roles)
            mine = [dist.get_rank()]
        x, condition = seeded_noise([1, 2], backbone.latent_shape).double(), backbone.encode(["a frog"] * 2)
        values = roles.student(x[mine], t[mine], {name: value[mine] for name, value in condition.items()})
        values.square().mean().backward()
        found.append([whole(parameter.grad) for parameter in roles.student_parameters()])
    for one, two in zip(*found, strict=True):
        assert bool(one.any())
        torch.testing.assert_close(two, one, rtol=0, atol=1e-6 * float(one.abs().max()))


def kept_roots(folder: Path) -> None:
    """The trap that `shard` avoids: a root that stays gathered after a call does not see later weights."""
    answers = []
    for keeps in (False, True):
        roles = made(folder, "copies")
        shard(roles)
        parameters = roles.student_parameters()  # before any call: the parts
        if keeps:
            roles.student_seat.network.set_reshard_after_forward(False, recurse=False)  # type: ignore[operator]
        noise, condition = seeded_noise([1], roles.backbone.latent_shape).double(), roles.backbone.encode(["a frog"])
        with torch.no_grad():
            roles.student(noise, torch.tensor([0.5]), condition)
            for parameter in parameters:
                parameter.mul_(1.1)
            answers.append(roles.student(noise, torch.tensor([0.5]), condition))
    one = made(folder, "copies")
    with torch.no_grad():
        for parameter in one.student_parameters():
            parameter.mul_(1.1)
        expected = one.student(noise, torch.tensor([0.5]), condition)
    torch.testing.assert_close(answers[0], expected)
    assert not torch.allclose(answers[1], expected)


def refusals(folder: Path) -> None:
    """What processes could not do in step is refused before any work."""
    roles = made(folder, "adapters")
    shard(roles)
    data = PromptData(roles.backbone.encode, PROMPTS, 0)
    for wrong, message in (({"batch": 3}, "batch = 3 for 2"), ({"precision": "fp16"}, "fp16 for sharded")):
        options = TrainOptions(**{"batch": 4, **wrong})  # type: ignore[arg-type]
        with pytest.raises(FewstepError, match=message):
            train(preset("tdm").build(), roles, data, options, folder / "no", noise_shape=roles.backbone.latent_shape)
    assert not (folder / "no").exists()


CHECKS: dict[str, Callable[[Path], None]] = {
    **{f"trains {kind}": (lambda folder, kind=kind: trains(folder, kind)) for kind in RUNS},
    "resumes": resumes,
    "half precision": half_precision,
    "compiled": compiled,
    "small base from disk": small_base_from_disk,
    "experts": experts,
    "kept roots": kept_roots,
    "refusals": refusals,
}


def alone(folder: Path) -> None:
    """What one process trains for comparison, and what it begins for two."""
    for kind in RUNS:
        run(folder, folder / f"one-{kind}", kind, spread=False)
    run(folder, folder / "one-bf16", "adapters", 1, spread=False, precision="bf16")
    shutil.copytree(folder / "one-adapters", folder / "one-then-two")


if __name__ == "__main__":
    make(CHECKS | chain_pair.CHECKS, Path(sys.argv[1]))
