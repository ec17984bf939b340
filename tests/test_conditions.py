"""Prompts as conditions: the cache gives what the encoder gave, is never another's, and frees the encoder."""

from __future__ import annotations

import gc
import json
import shutil
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_families import FAMILIES
from tiny_families import save as save_family
from tiny_flows import qwen_image, z_image

import fewstep
from fewstep import caching
from fewstep.api import RoleOptions, TextOptions, cache_prompts
from fewstep.caching import make_cache
from fewstep.data import cache
from fewstep.data.real import RealImages
from fewstep.errors import FewstepError
from fewstep.methods import preset
from fewstep.models import Backbone
from fewstep.models.pipelines import MASK
from fewstep.models.teacher import Teacher
from fewstep.models.text_encoders import offload, text_encoders
from fewstep.several import distill_part
from fewstep.training.log import read_log
from fewstep.training.loop import Hooks
from fewstep.training.options import TrainOptions
from fewstep.training.parallel import Group

PROMPTS = ["a frog", "a red apple on a blue background", "a 3d pizza"]
QUICK = TrainOptions(iterations=2, batch=4, warmup=1, log_every=1, tensorboard=False)
ALONE = Group(0, 1)


def build(backbone: Backbone, folder: Path, texts: Any = PROMPTS, dtype: torch.dtype = torch.float32, group=ALONE):
    return make_cache(backbone, [texts], folder, dtype, group)


def losses(run: Path) -> list[dict[str, float]]:
    kept = ("loss/", "gradient_norm/", "metric/")
    return [{k: v for k, v in line.items() if k.startswith(kept)} for line in read_log(run / "log.jsonl")]


def tiny(family: str, folder: Path) -> Backbone:
    flows = {"qwen-image": qwen_image, "z-image": z_image}
    if family in FAMILIES:
        return fewstep.load_teacher(save_family(family, folder), **FAMILIES[family].size).backbone
    flows[family]().save_pretrained(folder / family)
    return fewstep.load_teacher(folder / family, height=16, width=16).backbone


@pytest.mark.parametrize("family", ["pixart-alpha", "sdxl", "sd3", "flux-dev", "sana", "qwen-image", "z-image"])
def test_the_cache_gives_what_the_encoder_gave(family: str, tmp_path: Path) -> None:
    """The same names, shapes, dtypes and masks; the same prediction of the network; less room than the padding took."""
    backbone = tiny(family, tmp_path)
    backbone.pipeline.text_encoder.requires_grad_(False)
    made = build(backbone, tmp_path / "cache")
    order = [2, 0, 1, 0]
    ours, theirs = made.encode([PROMPTS[n] for n in order]), backbone.encode([PROMPTS[n] for n in order])
    assert {k: (v.shape, v.dtype) for k, v in ours.items()} == {k: (v.shape, v.dtype) for k, v in theirs.items()}
    for name in theirs:
        words = theirs[MASK].bool() if MASK in theirs and theirs[name].ndim == 3 else ...
        torch.testing.assert_close(ours[name][words], theirs[name][words], rtol=1e-5, atol=1e-6)
    null = backbone.null_condition()
    torch.testing.assert_close(made.null(), null, rtol=0, atol=0)
    x, t = torch.randn(4, *backbone.latent_shape), torch.tensor([0.2, 0.5, 0.7, 1.0])
    with torch.no_grad():
        one, other = (backbone.call(backbone.network, x, t, condition) for condition in (ours, theirs))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * float(other.abs().max()))
    if MASK in theirs:
        (shard,) = made.folder.glob("000000-*.safetensors")
        assert shard.stat().st_size < sum(value[:3].nbytes for value in theirs.values())


def test_bfloat16_takes_half_the_room_and_gives_the_encoders_dtype(tiny_teacher: Path, tmp_path: Path) -> None:
    backbone = fewstep.load_teacher(tiny_teacher).backbone
    full, half = (build(backbone, tmp_path, dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    assert full.folder != half.folder
    exact, rough = full.encode(PROMPTS), half.encode(PROMPTS)
    assert rough["text_states"].dtype == torch.float32
    assert not torch.equal(rough["text_states"], exact["text_states"])
    torch.testing.assert_close(rough["text_states"], exact["text_states"], rtol=2**-8, atol=1e-6)


def test_the_embedded_teacher_trains_to_the_bit_with_and_without(tmp_path: Path) -> None:
    """With a resumed run in which the shards are found."""
    quick = replace(QUICK, iterations=3, batch=2, checkpoint_every=2)
    more: dict[str, Any] = {"roles": RoleOptions(rank=2), "prompts": PROMPTS}
    kept = TextOptions(text_encoder="keep")
    cached = TextOptions(text_encoder="cache", cache=tmp_path / "cache")
    fewstep.distill(method="tdm", out=tmp_path / "a", text=kept, train_options=quick, **more)
    two = replace(quick, iterations=2)
    fewstep.distill(method="tdm", out=tmp_path / "b", text=cached, train_options=two, **more)
    shards = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("0*.safetensors")}
    fewstep.distill(method="tdm", out=tmp_path / "b", text=cached, train_options=quick, resume=True, **more)
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    assert len(losses(tmp_path / "a")) == 3
    assert shards == {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("0*.safetensors")}
    students = [
        (tmp_path / run / "student" / "transformer" / "diffusion_pytorch_model.safetensors").read_bytes()
        for run in "ab"
    ]
    assert students[0] == students[1]


def test_no_encoder_is_in_memory_during_training(tiny_teacher: Path, tmp_path: Path) -> None:
    teacher = fewstep.load_teacher(tiny_teacher)
    weights = [weakref.ref(value) for part in text_encoders(teacher.backbone).values() for value in part.parameters()]
    before = teacher.latents(PROMPTS, [1, 2, 3], 2)
    seen: list[int] = []

    def look(iteration: int, record: object) -> None:
        gc.collect()
        seen.append(sum(weight() is not None for weight in weights))

    fewstep.distill(
        teacher, "tdm", out=tmp_path / "runs" / "x", prompts=PROMPTS, train_options=QUICK, hooks=Hooks(log=look),
        text=TextOptions(text_encoder="cache"),
    )  # fmt: skip
    assert weights
    assert seen == [0, 0]
    assert (tmp_path / "runs" / "cache").is_dir()
    torch.testing.assert_close(teacher.latents(PROMPTS, [1, 2, 3], 2), before, rtol=0, atol=0)
    index = json.loads((tmp_path / "runs" / "x" / "student" / "model_index.json").read_text())
    assert index["text_encoder"] == ["transformers", "T5EncoderModel"]
    run = json.loads((tmp_path / "runs" / "x" / "run.json").read_text())
    assert run["configuration"]["cache_dtype"] == "bfloat16"


def test_encoders_come_back_after_an_error(tiny_teacher: Path, tmp_path: Path) -> None:
    teacher = fewstep.load_teacher(tiny_teacher)

    def broken(iteration: int, record: object) -> None:
        raise RuntimeError("a hook broke")

    with pytest.raises(RuntimeError, match="a hook broke"):
        fewstep.distill(
            teacher, "tdm", out=tmp_path / "run", prompts=PROMPTS, train_options=QUICK, hooks=Hooks(log=broken),
            text=TextOptions(text_encoder="cache"),
        )  # fmt: skip
    assert teacher.latents(["a frog"], [1], 1).shape[0] == 1


def test_the_default_is_a_cache_offload_where_others_encode_and_keep_for_the_embedded(
    tiny_teacher: Path, tmp_path: Path
) -> None:
    from fewstep.conditions import Encoding

    backbone, embedded = (
        load().backbone for load in (lambda: fewstep.load_teacher(tiny_teacher), fewstep.load_teacher)
    )
    images = RealImages(backbone, torch.zeros(1, 3, 32, 32), ["a frog seen from above"])

    def of(teacher: Backbone, real: object = None, own: bool = False, **options: Any) -> Encoding:
        return Encoding.of(teacher, TextOptions(**options), tmp_path / "runs" / "x", PROMPTS, real, own=own)

    assert (of(backbone).mode, of(embedded).mode, of(backbone, own=True).mode) == ("cache", "keep", "offload")
    assert (of(backbone, images).mode, of(backbone, real=print).mode) == ("cache", "offload")
    assert ["a frog seen from above"] in of(backbone, images).texts
    assert of(backbone).folder == tmp_path / "runs" / "cache"
    assert of(backbone).lossy == {"cache_dtype": "bfloat16"}
    assert of(backbone, cache_dtype="float32").lossy == of(backbone, own=True).lossy == of(embedded).lossy == {}
    with pytest.raises(FewstepError, match="text_encoder='offload'"):
        of(backbone, real=print, text_encoder="cache")


def test_another_prompt_is_refused_and_real_images_are_known(tiny_teacher: Path, tmp_path: Path) -> None:
    teacher = fewstep.load_teacher(tiny_teacher)
    with pytest.raises(FewstepError, match=r"found the prompt 'a cat', which is not in the cache.*offload"):
        build(teacher.backbone, tmp_path).encode(["a frog", "a cat"])
    real = RealImages(teacher.backbone, torch.zeros(2, 3, 32, 32), ["a frog from above", "a pizza"])
    options = replace(preset("dmd2"), critic_updates=1, steps=1)  # type: ignore[type-var]
    student = fewstep.distill(
        teacher, options, out=tmp_path / "run", prompts=PROMPTS, real=real, train_options=QUICK,
        text=TextOptions(cache_dtype="float32"),
    )  # fmt: skip
    assert "cache_dtype" not in student.card["details"]


def test_the_key_follows_everything_that_decides_the_embedding(tiny_teacher: Path, tmp_path: Path) -> None:
    def key(change: Any = None, texts: Any = PROMPTS, source: Path = tiny_teacher) -> str:
        backbone = fewstep.load_teacher(source).backbone
        if change:
            change(backbone.pipeline)
        return build(backbone, tmp_path / "cache", texts).folder.name

    def weight(pipeline: Any) -> None:
        next(pipeline.text_encoder.parameters()).data[0, 0] += 1e-3

    def setting(pipeline: Any) -> None:
        pipeline.text_encoder.config.layer_norm_epsilon = 1e-3

    def words(pipeline: Any) -> None:
        pipeline.tokenizer.model_max_length = 7

    moved = shutil.copytree(tiny_teacher, tmp_path / "elsewhere")
    usual = key()
    assert usual == key(source=moved) == key(texts=[*reversed(PROMPTS), "a frog"])
    others = [key(weight), key(setting), key(words), key(texts=[*PROMPTS, "a cat"]), key(texts=PROMPTS[:2])]
    assert len({usual, *others}) == 6


def test_a_changed_encoder_cannot_be_freed(tiny_teacher: Path, tmp_path: Path) -> None:
    """It would come back as it is on disk."""
    teacher = fewstep.load_teacher(tiny_teacher)
    next(text_encoders(teacher.backbone)["text_encoder"].parameters()).data += 1
    more: dict[str, Any] = {"prompts": PROMPTS, "train_options": QUICK}
    with pytest.raises(FewstepError, match="text_encoder whose weights are others .*offload"):
        fewstep.distill(teacher, "tdm", out=tmp_path / "run", **more)
    assert not (tmp_path / "run").exists()
    teacher.backbone.folder = None
    with pytest.raises(FewstepError, match="not loaded from a folder"):
        fewstep.distill(teacher, "tdm", out=tmp_path / "run", **more)
    fewstep.distill(teacher, "tdm", out=tmp_path / "run", text=TextOptions(text_encoder="offload"), **more)


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Shards of four rows, and how many prompts were encoded for each (the last ones: nothing is left to do)."""
    monkeypatch.setattr(caching, "_MOST_ROWS", 4)
    return []


MANY = [f"a frog number {n}" for n in range(10)]


def test_damaged_shards_are_named_and_made_again(tiny_teacher: Path, tmp_path: Path, small_shards: list[int]) -> None:
    backbone = fewstep.load_teacher(tiny_teacher).backbone
    made = build(backbone, tmp_path, MANY)
    expected = made.encode(MANY)
    files = sorted(made.folder.glob("0*.safetensors"))
    assert len(files) == 3
    whole = [path.read_bytes() for path in files]
    files[0].write_bytes(whole[0][:-5])
    files[1].write_bytes(whole[1][:-1] + bytes([whole[1][-1] ^ 1]))
    (made.folder / ".000002.1.unfinished").write_bytes(b"what a kill has left")
    with pytest.warns(UserWarning, match="is damaged") as warned:
        again = build(backbone, tmp_path, MANY)
    named = [str(warning.message) for warning in warned if "is damaged" in str(warning.message)]
    assert [path.name in text for path, text in zip(files, named, strict=False)] == [True, True]
    assert [path.read_bytes() for path in files] == whole
    assert not list(made.folder.glob(".*.unfinished"))
    torch.testing.assert_close(again.encode(MANY), expected, rtol=0, atol=0)


def test_what_a_kill_has_finished_is_kept(
    tiny_teacher: Path, tmp_path: Path, small_shards: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = fewstep.load_teacher(tiny_teacher).backbone
    write, written = cache.write_tensors, []

    def killed(folder: Path, name: str, tensors: Any) -> Path:
        if name == "000001":
            raise KeyboardInterrupt
        return write(folder, name, tensors)

    def counted(folder: Path, name: str, tensors: Any) -> Path:
        written.append(name)
        return write(folder, name, tensors)

    monkeypatch.setattr(cache, "write_tensors", killed)
    with pytest.raises(KeyboardInterrupt):
        build(backbone, tmp_path, MANY)
    monkeypatch.setattr(cache, "write_tensors", counted)
    build(backbone, tmp_path, MANY)
    assert written == [cache.NULL, "000001", "000002"]


def test_too_little_disk_is_said_before(
    tiny_teacher: Path, tmp_path: Path, small_shards: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = fewstep.load_teacher(tiny_teacher).backbone
    monkeypatch.setattr(caching.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6, 100))
    with pytest.raises(FewstepError, match=r"GB free on the disk of .*--cache.*offload"):
        build(backbone, tmp_path, MANY)
    assert not list(tmp_path.rglob("0*.safetensors"))


def test_a_phase_and_a_part_train_from_the_cache(tiny_teacher: Path, tmp_path: Path) -> None:
    one = replace(QUICK, iterations=1)
    fewstep.distill(tiny_teacher, "phased", out=tmp_path / "phased", prompts=PROMPTS, train_options=one)
    student = distill_part(tiny_teacher, 1, out=tmp_path / "msd", parts=2, prompts=PROMPTS, train_options=one)
    assert len(list((tmp_path / "cache").glob("*/index.json"))) == 2
    assert student.sample(["a frog"], [1]).shape[0] == 1


def test_prompts_of_a_file_are_cached_ahead(tiny_teacher: Path, tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text("\n".join(json.dumps({"caption": text}) for text in PROMPTS))
    folder = cache_prompts(tiny_teacher, f"{file}:caption", tmp_path / "cache")
    times = {path: path.stat().st_mtime_ns for path in folder.glob("0*")}
    fewstep.distill(tiny_teacher, "tdm", out=tmp_path / "run", prompts=PROMPTS, train_options=QUICK)
    assert times == {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").glob("*/0*")}


class Together(Group):
    """Two threads in the place of two processes."""

    barrier = threading.Barrier(2, timeout=60)
    said: list[int]

    def wait(self) -> None:
        self.barrier.wait()

    def largest(self, value: int, device: Any) -> int:
        if value:
            type(self).said = [value]
        self.wait()
        return self.said[0]


def test_two_processes_share_the_shards(
    tiny_teacher: Path, tmp_path: Path, small_shards: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each makes its own, none is made twice, and the second knows the key from the first."""
    backbones = [fewstep.load_teacher(tiny_teacher).backbone for _ in range(2)]
    write, written = cache.write_tensors, []

    def counted(folder: Path, name: str, tensors: Any) -> Path:
        written.append((threading.get_ident(), name))
        return write(folder, name, tensors)

    monkeypatch.setattr(cache, "write_tensors", counted)
    with ThreadPoolExecutor(2) as pool:
        work = [pool.submit(build, backbones[n], tmp_path, MANY, group=Together(n, 2)) for n in range(2)]
        first, second = (one.result() for one in work)
    by_thread = {}
    for thread, name in written:
        by_thread.setdefault(thread, []).append(name)
    assert sorted(map(tuple, by_thread.values())) == [("000001",), (cache.NULL, "000000", "000002")]
    assert first.folder == second.folder
    torch.testing.assert_close(first.encode(MANY), second.encode(MANY), rtol=0, atol=0)


def test_offloaded_encoders_visit_the_device_for_each_batch() -> None:
    moves: list[str] = []

    class Recorder(torch.nn.Linear):
        def to(self, device: Any) -> Any:  # type: ignore[override]
            moves.append(str(device))
            return self

    encoder = Recorder(2, 2)
    pipeline = SimpleNamespace(components={"text_encoder": encoder, "vae": Recorder(2, 2), "tokenizer": None})
    backbone: Any = SimpleNamespace(pipeline=pipeline, device=torch.device("cuda:0"))
    offload(backbone)
    offload(backbone)
    encoder(torch.zeros(1, 2))
    assert moves == ["cpu", "cpu", "cuda:0", "cpu"]
    assert encoder._hf_hook.execution_device == torch.device("cuda:0")  # where diffusers' pipelines look


def test_the_command_reads_no_weights_of_the_network(
    tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And leaves the very cache that a teacher with all its weights finds."""
    from fewstep.commands import cache as command

    seen: list[bool] = []

    def watched(teacher: Teacher, *told: Any) -> Path:
        seen.append(all(parameter.is_meta for parameter in teacher.backbone.network.parameters()))
        return cache_prompts(teacher, *told)

    monkeypatch.setattr(command, "cache_prompts", watched)
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    words = ["--teacher", str(tiny_teacher), "--prompts", str(tmp_path / "prompts.txt"), "--device", "cpu"]
    command.main([*words, "--cache", str(tmp_path / "made")])
    whole = cache_prompts(fewstep.load_teacher(tiny_teacher), tmp_path / "prompts.txt", tmp_path / "made")
    assert seen == [True]
    assert [whole] == [folder for folder in (tmp_path / "made").iterdir() if folder.is_dir()]
