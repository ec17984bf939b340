"""A plan's bytes: weights and optimiser to the byte, activations near what the CPU's allocator hands out."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from measuring import measured  # type: ignore[import-not-found]
from tiny_pixart import PROMPTS

from fewstep.api import RoleOptions, load_teacher
from fewstep.commands.plan import main, size_in_bytes
from fewstep.core.streams import Streams
from fewstep.errors import FewstepError
from fewstep.methods import preset
from fewstep.methods.base import Batch
from fewstep.models import build_roles
from fewstep.models.pipelines import MASK
from fewstep.models.text_encoders import text_encoders
from fewstep.planning.advice import _changes, advise
from fewstep.planning.build import blueprint
from fewstep.planning.memory import Run, _validate, plan
from fewstep.training.optimisers import make_optimiser, tensors
from fewstep.training.options import TrainOptions

ROWS = 6
_SQUARE = {"height": 64, "width": 64}
SIZES = {
    "sd15": _SQUARE, "flux-dev": _SQUARE, "z_image": _SQUARE, "wan 2.1": {**_SQUARE, "num_frames": 13},
}  # fmt: skip


def run_of(**told) -> Run:
    names = {"roles", "rank", "checkpointing"}
    roles = RoleOptions(**{"rank": 4} | {name: told.pop(name) for name in names & told.keys()})
    return replace(Run(preset("tdm"), roles, TrainOptions(batch=ROWS)), **told)


@pytest.mark.parametrize("kind", ["adapters", "copies", "mixed"])
def test_weights_and_optimiser_to_the_byte(folders, kind: str) -> None:
    found = plan(blueprint(folders["middle"]), run_of(roles=kind))
    roles = build_roles(load_teacher(folders["middle"]).backbone, kind, rank=4)
    student, critic = roles.student_parameters(), roles.critic_parameters()
    assert found.parameters["student"] == sum(p.numel() for p in student)
    assert found.parameters["critic"] == sum(p.numel() for p in critic)
    networks = {id(seat.network): seat.network for seat in (roles._teacher, roles._student, roles._critic)}
    every = {id(t): t for n in networks.values() for t in [*n.parameters(), *n.buffers()]}
    trained = {id(p): p for p in [*student, *critic]}
    assert found.parts["trained weights"] == sum(p.nbytes for p in trained.values())
    assert found.parts["frozen weights"] == sum(t.nbytes for key, t in every.items() if key not in trained)
    state = 0
    for parameters in (student, critic):
        optimiser = make_optimiser("adamw", parameters, (0.0, 0.999), 0.0)
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        optimiser.step()
        state += sum(value.nbytes for value in tensors(optimiser, [str(n) for n in range(len(parameters))]).values())
    assert found.parts["optimiser"] == state
    assert found.parts["average"] == sum(p.nbytes for p in student)
    assert found.parts["gradients"] in (sum(p.nbytes for p in student), sum(p.nbytes for p in critic))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["adapters", "copies"])
def test_activations_are_the_allocators(folders, kind: str, checkpointing: bool) -> None:
    planned, most = planned_and_measured(folders["middle"], {}, kind, checkpointing)
    assert planned == pytest.approx(most, rel=0.1)


@pytest.mark.parametrize("family", SIZES)
def test_activations_of_other_kinds_of_networks(folders, family: str) -> None:
    """A U-Net, two streams of tokens, lists of them, videos: what is not seen is a larger part of tiny networks."""
    planned, most = planned_and_measured(folders[family], SIZES[family], "adapters", True)
    assert 0.85 * most < planned < 1.05 * most


def planned_and_measured(folder: Path, size: dict[str, int], kind: Any, checkpointing: bool) -> tuple[int, int]:
    """Bytes of one iteration of TDM: of the plan, and by the profiler of torch's CPU allocator."""
    backbone = load_teacher(folder, **size).backbone  # type: ignore[arg-type]
    roles = build_roles(backbone, kind, rank=4, checkpointing=checkpointing)
    condition = backbone.encode((PROMPTS * ROWS)[:ROWS])
    null, words = backbone.null_condition(), None
    if MASK in condition:
        words = max(int(told[MASK].sum(1).max()) for told in (condition, null))
    for parameter in [*roles.student_parameters(), *roles.critic_parameters()]:
        parameter.grad = torch.zeros_like(parameter)
    method, draw = preset("tdm").build(), Streams(0).at(1, torch.arange(ROWS))

    def iteration() -> None:
        path = method.rollout(Batch(condition, torch.arange(ROWS), backbone.latent_shape), roles, draw)
        method.critic_loss(path, roles, draw).values.sum().backward(inputs=roles.critic_parameters())
        method.student_loss(path, roles, draw).values.sum().backward(inputs=roles.student_parameters())

    most = measured(iteration)
    found = plan(blueprint(folder, size=size), run_of(roles=kind, checkpointing=checkpointing, words=words))
    latents = 4 * ROWS * math.prod(backbone.latent_shape)
    path = (3 * 4 + 1) * latents  # of four calls; counted among "prompts and paths"
    return found.parts["activations"] + path, most


def test_sharding_divides_and_changes_are_tried_in_order(folders) -> None:
    print_ = blueprint(folders["middle"])
    whole = plan(print_, run_of(roles="copies", gpus=2))
    half = plan(print_, run_of(roles="copies", gpus=2, shard=True))
    assert half.parts["optimiser"] == -(-whole.parts["optimiser"] // 2)
    assert half.parts["gathered blocks"] > 0
    steps = list(_changes(run_of(roles="copies", gpus=2)))
    assert [option for option, _, _ in steps] == [
        "--checkpointing", "--microbatch 1", "--text-encoder cache", "--shard", "--base-dtype bfloat16",
        "--precision bf16", "--roles adapters", "--shard --gpus 6",
    ]  # fmt: skip
    smallest = plan(print_, steps[-1][2]).total
    assert smallest < half.total < whole.total
    assert [option for option, _, _ in _changes(run_of(roles="copies", gpus=1))] == [
        "--checkpointing", "--microbatch 1", "--text-encoder cache", "--base-dtype bfloat16", "--precision bf16",
        "--optimiser adamw8bit", "--roles adapters", "--base-dtype int8", "--base-dtype nf4",
        "--shard --base-dtype bfloat16 --optimiser adamw --gpus 6",
    ]  # fmt: skip
    start = run_of(base_dtype="int8", checkpointing=True, text_encoder="cache")
    room = plan(print_, next(_changes(start))[2]).total
    assert [(one.option, one.total, one.fits) for one in advise(print_, start, room)] == [
        ("--microbatch 1", room, True)
    ]


_EVERYTHING = [
    "--checkpointing", "--microbatch", "1", "--text-encoder", "cache", "--base-dtype", "nf4", "--precision", "bf16",
    "--optimiser", "adamw8bit",
]  # fmt: skip


def test_the_command(folders, capsys) -> None:
    words = ["--teacher", str(folders["middle"]), "--memory", "1GiB", "--reserve", "0GB", "--roles", "adapters"]
    main(["tdm", *words, "--batch", "4", "--seconds-per-forward", "0.5", "--price-per-hour", "3", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["fits"]
    assert found["changes"] == []
    assert found["forwards_per_sample"] == pytest.approx(7.75)
    assert found["passes_per_sample"] == pytest.approx(7.75 + 2 * 2)  # two calls have a backward
    assert found["iteration_seconds"] == pytest.approx(11.75 * 4 * 0.5)
    assert found["price"] == pytest.approx(found["iteration_seconds"] * 400 / 3600 * 3)
    main(["tdm", *words, *_EVERYTHING, "--batch", "4", "--memory", "0.001GB"])
    told = capsys.readouterr().out
    assert "does not fit" in told
    assert "--gpus 4" in told


def test_sizes_and_refusals(folders) -> None:
    assert size_in_bytes("80GB") == 80 * 10**9
    assert size_in_bytes("1.5 GiB") == 3 * 2**29
    with pytest.raises(FewstepError, match="found the size '80'"):
        size_in_bytes("80")
    with pytest.raises(FewstepError, match="found roles 'copies' on a base in nf4"):
        plan(blueprint(folders["middle"]), run_of(roles="copies", base_dtype="nf4"))
    with pytest.raises(FewstepError, match="found 9 GPUs for batch = 6"):
        plan(blueprint(folders["middle"]), run_of(gpus=9))


def test_text_encoders_are_counted_where_they_are(folders) -> None:
    """While it trains only if they stay, and while prompts are encoded beside the weights that are loaded by then."""
    backbone = load_teacher(folders["sd3"]).backbone
    sizes = {name: sum(p.nbytes for p in part.parameters()) for name, part in text_encoders(backbone).items()}
    others = sum(p.nbytes for p in backbone.pipeline.vae.parameters())
    found = {mode: plan(blueprint(folders["sd3"]), run_of(text_encoder=mode)) for mode in ("keep", "cache", "offload")}
    names = {name: name.replace("_", " ") for name in sizes}
    assert {name: found["keep"].parts[names[name]] for name in sizes} == sizes
    assert not [mode for mode in ("cache", "offload") if names.keys() & found[mode].parts.keys()]
    parts = found["cache"].parts
    weights = parts["frozen weights"] + parts["trained weights"] + others
    assert (found["keep"].encoding, found["cache"].encoding) == (0, weights + sum(sizes.values()))
    resting = weights + parts["optimiser"] + parts["average"] + max(sizes.values())
    assert found["offload"].encoding == max(resting, found["cache"].encoding)
    assert found["cache"].total >= found["cache"].encoding


def test_the_command_decides_about_text_encoders_as_distill_does(folders, capsys, monkeypatch) -> None:
    asked, words = [], ["--teacher", str(folders["middle"]), "--roles", "adapters", "--batch", "2", "--json"]
    monkeypatch.setattr("fewstep.commands.plan.plan", lambda print_, run: asked.append(run) or plan(print_, run))
    for more in ([], ["--text-encoder", "keep"]):
        main(["tdm", *words, *more])
    assert [run.text_encoder for run in asked] == ["cache", "keep"]


@pytest.mark.parametrize(
    ("told", "words"),
    [
        ({"base_dtype": "nf4"}, "base in nf4 for a sharded run"),
        ({"optimiser": "adamw8bit"}, "optimiser = adamw8bit for a sharded run"),
        ({"gpus": 4}, "batch = 6 for 4 processes"),
        ({"precision": "fp16"}, "fp16 for sharded roles"),
    ],
)
def test_a_sharded_run_that_distill_refuses_is_not_planned(folders, told: dict, words: str) -> None:
    """Nor advised: every change from here on can be planned, and so launched."""
    train = {name: told.pop(name) for name in ("optimiser", "precision") if name in told}
    run = run_of(**{"gpus": 2, "shard": True} | told)
    run = replace(run, train=replace(run.train, **train))
    with pytest.raises(FewstepError, match=words):
        plan(blueprint(folders["middle"]), run)
    for start in (replace(run, shard=False), replace(run, shard=False, gpus=1)):
        for option, _, changed in _changes(start):
            _validate(changed)
            assert changed.shard or "--shard" not in option


def test_an_option_that_distill_would_not_read_is_not_planned() -> None:
    with pytest.raises(FewstepError, match="found rank = 8, which nothing reads here"):
        main(["tdm", "--roles", "copies", "--rank", "8"])
