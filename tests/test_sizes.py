"""Several sizes: one for each iteration, told to every network call, the first one for the student that is saved."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_families import save as save_family

import fewstep
from fewstep.api import RoleOptions, TextOptions
from fewstep.errors import FewstepError
from fewstep.methods import preset
from fewstep.models.sizes import SizeList, parse_size
from fewstep.several import distill_phases
from fewstep.training.log import read_log
from fewstep.training.loop import Hooks
from fewstep.training.options import TrainOptions

PROMPTS = ["a frog", "a red apple on a blue background"]
SIZES = ["16x24", "24x16", "16x16"]
KEEP = TextOptions(text_encoder="keep")
QUICK = TrainOptions(iterations=4, batch=2, warmup=1, log_every=1, tensorboard=False)


def shapes_of(wide_first: list[str]) -> dict[str, tuple[int, int]]:
    """Latent height and width of tiny families, whose images are twice as wide."""
    return {text: (parse_size(text)["height"] // 2, parse_size(text)["width"] // 2) for text in wide_first}


def test_sizes_are_read_or_refused() -> None:
    assert parse_size("832x1216") == {"width": 832, "height": 1216}
    assert parse_size("832X480x81") == {"width": 832, "height": 480, "num_frames": 81}
    for text in ("832", "832x", "ax1", "1x2x3x4", "-8x8"):
        with pytest.raises(FewstepError, match="WIDTHxHEIGHT"):
            parse_size(text)


class Square:
    def __init__(self) -> None:
        self.told_size: dict[str, int] = {}

    def set_size(self, told: Any) -> None:
        if told["width"] % 8:
            raise FewstepError("found a width that cannot be made")
        self.told_size = {**self.told_size, **told}

    @property
    def latent_shape(self) -> tuple[int, ...]:
        return (4, self.told_size["height"], self.told_size["width"])


def test_the_size_of_an_iteration_follows_from_seed_and_iteration() -> None:
    backbone = Square()
    sizes = SizeList(backbone, ["16x8", "8x16", "8x8", "8x8"], seed=1)
    assert backbone.told_size == {"width": 16, "height": 8}
    forward = [sizes(iteration) for iteration in range(1, 401)]
    backward = [SizeList(Square(), ["16x8", "8x16", "8x8", "8x8"], seed=1)(i) for i in reversed(range(1, 401))]
    assert forward == backward[::-1]
    other = SizeList(Square(), ["16x8", "8x16", "8x8", "8x8"], seed=2)
    assert forward != [other(iteration) for iteration in range(1, 401)]
    found = Counter(forward)
    assert set(found) == {(4, 8, 16), (4, 16, 8), (4, 8, 8)}
    assert 160 < found[4, 8, 8] < 240  # of 400: named twice, drawn twice as often
    sizes.first()
    assert backbone.latent_shape == (4, 8, 16)


def test_lists_that_cannot_be_made_change_nothing() -> None:
    for bad in ([], ["8x8", "8x8x9"], ["8x8", "9x8"]):
        backbone = Square()
        with pytest.raises(FewstepError, match="found"):
            SizeList(backbone, bad, seed=0)
        assert backbone.told_size == {}


def test_sdxl_is_told_the_size_of_every_iteration(tmp_path: Path) -> None:
    """Latents, time ids and the losses' shapes; then the student at the first size."""
    teacher = fewstep.load_teacher(save_family("sdxl", tmp_path))
    seen: list[tuple[tuple[int, int], tuple[float, ...]]] = []
    of_iteration: list[set[tuple[int, int]]] = []
    call = teacher.backbone.call

    def watched(network, x, t, condition):
        ids = teacher.backbone._added_conditions(condition, torch.float32)["time_ids"][0]
        seen.append(((x.shape[-2], x.shape[-1]), tuple(ids.tolist())))
        return call(network, x, t, condition)

    def look(iteration: int, record: object) -> None:
        of_iteration.append({shape for shape, _ in seen})
        seen_all.extend(seen)
        seen.clear()

    seen_all: list[Any] = []
    teacher.backbone.call = watched
    student = fewstep.distill(
        teacher, preset("tdm"), out=tmp_path / "run", prompts=PROMPTS, sizes=SIZES, hooks=Hooks(log=look), text=KEEP,
        roles=RoleOptions(rank=2), train_options=replace(QUICK, iterations=8),
    )  # fmt: skip
    assert len(of_iteration) == 8
    assert all(len(shapes) == 1 for shapes in of_iteration)
    assert set().union(*of_iteration) == set(shapes_of(SIZES).values())
    for (height, width), ids in seen_all:
        assert ids == (2 * height, 2 * width, 0, 0, 2 * height, 2 * width)
    assert student.backbone.size == {"width": 16, "height": 24}
    assert student.sample(["a frog"], [1]).shape == (1, 3, 24, 16)
    readme = (tmp_path / "run" / "student" / "README.md").read_text()
    assert "| trained at the sizes (width x height; tell both) | 16x24, 24x16, 16x16 |" in readme
    assert "height=24" in readme
    assert student.card["details"]["sizes"] == SIZES


def test_the_teachers_shift_follows_the_size(tmp_path: Path) -> None:
    backbone = fewstep.load_teacher(save_family("flux-dev", tmp_path)).backbone
    sizes = SizeList(backbone, ["16x16", "1024x1024"], seed=0)
    small = backbone.teacher_grid(4)
    while sizes(int(torch.randint(1, 1000, (1,)))) == (4, 8, 8):
        pass
    assert (backbone.teacher_grid(4)[1:-1] > small[1:-1]).all()


def test_a_resumed_run_has_the_same_sizes_and_samples_at_the_first(tiny_teacher: Path, tmp_path: Path) -> None:
    sizes, drawn = ["32x32", "48x32", "32x48"], []

    def run(out: str, iterations: int, **more: Any) -> list[dict[str, float]]:
        teacher = fewstep.load_teacher(tiny_teacher)
        hooks = Hooks(sample=lambda iteration: drawn.append(dict(teacher.backbone.told_size)))
        fewstep.distill(
            teacher, "tdm", out=tmp_path / out, prompts=PROMPTS, sizes=sizes, hooks=hooks, text=KEEP,
            roles=RoleOptions(rank=2), train_options=replace(QUICK, iterations=iterations, sample_every=1), **more,
        )  # fmt: skip
        lines = read_log(tmp_path / out / "log.jsonl")
        return [{k: v for k, v in line.items() if k.startswith(("loss/", "metric/"))} for line in lines]

    whole = run("a", 4)
    run("b", 2)
    assert run("b", 4, resume=True) == whole
    assert all(size == {"width": 32, "height": 32} for size in drawn)
    sizes.append("48x48")
    with pytest.raises(FewstepError, match="sizes was"):
        run("b", 4, resume=True)


def test_phases_have_sizes_too(tiny_teacher: Path, tmp_path: Path) -> None:
    student = distill_phases(
        tiny_teacher, out=tmp_path, prompts=PROMPTS, sizes=["48x32", "32x32"], text=KEEP, roles=RoleOptions(rank=2),
        train_options=replace(QUICK, iterations=1),
    )  # fmt: skip
    assert student.sample(["a frog"], [1]).shape == (1, 3, 32, 48)


def test_real_data_and_pairs_of_several_sizes_are_refused(tiny_teacher: Path, tmp_path: Path) -> None:
    for method, what in (("dmd2", "real data"), ("dmd", "pairs")):
        with pytest.raises(FewstepError, match=f"for a method with {what}, expected one"):
            fewstep.distill(tiny_teacher, method, out=tmp_path / "run", prompts=PROMPTS, sizes=["32x32", "48x32"])
    with pytest.raises(FewstepError, match="found width = 33"):
        fewstep.distill(tiny_teacher, "tdm", out=tmp_path / "run", prompts=PROMPTS, sizes=["32x32", "33x32"])
    assert not (tmp_path / "run").exists()
