"""A trained student as an ordinary diffusers folder or LoRA, written so that a kill never leaves half of one."""

from __future__ import annotations

import glob
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from fewstep.core import grids as time_grids
from fewstep.errors import FewstepError
from fewstep.models.adapters import cpu_copy
from fewstep.models.backbone import Backbone
from fewstep.models.card import TEACHER, metadata, model_card, teacher_license
from fewstep.models.lora import save_loras, student_loras, weights_files
from fewstep.models.pipelines import rebuilt
from fewstep.models.quiet import quiet_libraries
from fewstep.models.roles import Roles
from fewstep.models.schedulers import Sampling, choose_scheduler, shift_of

Form = Literal["pipeline", "lora"]
CARD = "fewstep.json"
CARD_FORMAT = 1


def save_student(
    folder: str | Path,
    roles: Roles,
    grids: Sequence[Tensor],
    *,
    method: str,
    eta: float = 1.0,
    chain_noise: str = "fresh",
    form: Form = "pipeline",
    dtype: torch.dtype = torch.float32,
    causal: Mapping[str, Any] | None = None,
    details: Mapping[str, Any] | None = None,
) -> Path:
    """Write the student to `folder`, replacing a student that is there.

    "pipeline" is a whole diffusers pipeline, adapters merged, with a scheduler that reproduces our sampler on every
    grid: `DiffusionPipeline.from_pretrained(folder)(prompt, num_inference_steps=K, guidance_scale=1)` needs no fewstep
    unless the student is steps-aware. "lora" is the adapter alone (`fewstep.models.lora`) and the scheduler; the
    teacher is named in it. Both have a README.md, the model card, that says how to sample them with diffusers.

    Args:
        folder: written under a temporary name beside it, then renamed.
        roles: over a pipeline backbone.
        grids: one time grid (K+1,) for each step count K the student is for.
        method: the method's name, for the card.
        eta: share of its own noise that a step keeps, 1 or 0 (`choose_scheduler`).
        chain_noise: what the rest of it is (`choose_scheduler`).
        form: "lora" only for adapter roles that are not steps-aware.
        dtype: of the weights on disk; the folder loads as float32 whatever it is.
        causal: of a student that makes videos chunk by chunk: the fields of its `fewstep.attention.Layout`. The folder
            is then a stock pipeline for its parts only; `load_student` makes videos of it.
        details: more for `fewstep.json` and the card, JSON-able (options, iterations, paper, metrics).

    Returns:
        `folder` as a path.

    Raises:
        FewstepError: no scheduler follows the grids, the folder holds something else, or the form does not fit the
            roles.
    """
    backbone = roles.backbone
    if not isinstance(backbone, Backbone):
        raise FewstepError(
            "found a student of a function teacher, expected one of a pipeline backbone, fix: save its module with "
            "safetensors yourself"
        )
    if form not in get_args(Form):
        raise FewstepError(f"found form {form!r}, expected one of {get_args(Form)}, fix: name one of these")
    if form == "lora" and not roles.one_adapter:
        raise FewstepError(
            "found a student that is not the teacher with one adapter (a full network, several experts, or told its "
            "step count) to be saved as a LoRA, expected roles 'adapters' of one step count, fix: save the pipeline "
            "(form 'pipeline')"
        )
    grids = [time_grids.validated(grid) for grid in grids]
    sampling = choose_scheduler(backbone, grids, eta, chain_noise)
    card: dict[str, Any] = {
        "format": CARD_FORMAT,
        "form": form,
        "method": method,
        "teacher": _absolute(backbone.source),
        "license": teacher_license(backbone.source),
        "steps_aware": roles.steps_aware,
        "eta": eta,
        "shift": _shift(grids),
        "grids": {str(len(grid) - 1): grid.tolist() for grid in grids},
        "call": {str(count): call for count, call in sampling.calls.items()},
        "pipeline_call": backbone.student_call,
        "output": backbone.output_name,
        "size": backbone.told_size,
        "embedded_guidance": backbone.embedded_guidance,
        "parts": list(backbone.network_parts),
        "versions": _versions(),
        "details": dict(details or {}),
    }
    if causal is not None:
        card["causal"] = dict(causal)
    if roles.sparse is not None:
        card["sparse"] = roles.sparse.of_student
    with written_atomically(Path(folder)) as temporary:
        if form == "pipeline":
            write_pipeline(temporary, backbone, roles.student_network(), sampling, card, dtype)
        else:
            peft = not hasattr(backbone.pipeline, "load_lora_weights")
            told = metadata(card)
            save_loras(temporary, student_loras(roles), base=card["teacher"], peft=peft, dtype=dtype, metadata=told)
            sampling.scheduler.save_pretrained(temporary / "scheduler")
            card["usage"] = _own_usage(card) or _lora_usage(backbone, sampling, peft)
            write_card(temporary, card)
    return Path(folder)


def write_pipeline(
    folder: Path, backbone: Backbone, network: nn.Module, sampling: Sampling, card: dict[str, Any], dtype: torch.dtype
) -> None:
    """The pipeline around a student's `network` into an existing folder, with `card`, whose grids are the teacher's."""
    pipeline = backbone.pipeline_with(network, sampling.scheduler)
    save_pipeline(pipeline, folder, dtype)
    start = sampling.start  # the folder holds a process that may end there
    card["grids"] = {count: [time / start for time in grid] for count, grid in card["grids"].items()}
    card["usage"] = _own_usage(card) or _pipeline_usage(backbone, pipeline, sampling)
    write_card(folder, card)


def write_card(folder: Path, card: Mapping[str, Any]) -> None:
    """`fewstep.json` and README.md."""
    (folder / CARD).write_text(json.dumps(card, indent=1), encoding="utf-8")
    (folder / "README.md").write_text(model_card(card, card["usage"]), encoding="utf-8")


def _shift(grids: Sequence[Tensor]) -> float | None:
    """The shift of `grids`, 1 for evenly spaced times; None if they are spaced in another way."""
    for shift in (shift_of(grids), 1.0):
        made = (time_grids.shifted(len(grid) - 1, shift, float(grid[0])) for grid in grids)
        if all(torch.allclose(one, grid.to(one), atol=1e-4) for one, grid in zip(made, grids, strict=True)):
            return shift
    return None


def save_pipeline(pipeline: Any, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write a pipeline as safetensors in `dtype`, so that it loads as float32 unless told otherwise.

    diffusers loads its models as float32 by default, transformers 5 in the dtype that its config names; with float16
    files the two would not fit together. So the config names float32.
    """
    with quiet_libraries():
        parts = {
            name: cpu_copy(part, dtype) if isinstance(part, nn.Module) and part.dtype != dtype else part
            for name, part in pipeline.components.items()
        }
        rebuilt(pipeline, **parts).save_pretrained(folder, safe_serialization=True)
    for path in folder.glob("*/config.json"):
        config = json.loads(path.read_text(encoding="utf-8"))
        for key in config.keys() & {"dtype", "torch_dtype"}:
            config[key] = "float32"
        path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


@contextmanager
def written_atomically(folder: Path) -> Iterator[Path]:
    """A new folder to fill, which then takes the place of `folder`; nothing changes there if the block fails.

    Raises:
        FewstepError: `folder` exists, is not empty and holds no student.
    """
    if folder.exists() and not (folder.is_dir() and ((folder / CARD).is_file() or not any(folder.iterdir()))):
        raise FewstepError(
            f"found something that is not a student at {folder}, expected a new folder, an empty one or a student to "
            "replace, fix: choose another folder"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary, old = (folder.with_name(f".{folder.name}.{os.getpid()}.{end}") for end in ("new", "old"))
    _clear(folder)
    temporary.mkdir()
    try:
        yield temporary
        if folder.exists():
            folder.rename(old)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _clear(folder: Path) -> None:
    """Deletes what processes that were killed while they wrote `folder` have left beside it."""
    for left in folder.parent.glob(f".{glob.escape(folder.name)}.*"):
        owner, _, end = left.name.removeprefix(f".{folder.name}.").partition(".")
        if end in ("new", "old") and owner.isdecimal() and (int(owner) == os.getpid() or not _runs(int(owner))):
            shutil.rmtree(left)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True


def _absolute(source: str) -> str:
    """A Hub id as it is, a folder in full."""
    return str(Path(source).resolve()) if Path(source).is_dir() else source


def _versions() -> dict[str, str]:
    versions = {}
    for package in ("fewstep", "torch", "diffusers", "transformers", "peft"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed as a package"
    return versions


def _loader(pipeline: Any) -> tuple[str, str]:
    """Class and module that load folders of a pipeline: its own where it is one of ours."""
    own = type(pipeline).__module__.startswith("fewstep")
    return (type(pipeline).__name__, type(pipeline).__module__) if own else ("DiffusionPipeline", "diffusers")


def _pipeline_usage(backbone: Backbone, pipeline: Any, sampling: Sampling) -> list[str]:
    """Lines that sample the pipeline folder FOLDER."""
    loader, home = _loader(pipeline)
    homes = {type(part).__module__ for part in (getattr(pipeline, backbone.network_name), sampling.scheduler)}
    return [
        *(f"import {other}" for other in sorted(homes - {home}) if other.startswith("fewstep")),
        f"from {home} import {loader}",
        "",
        f'pipeline = {loader}.from_pretrained("FOLDER")',
        *_calls(sampling, backbone),
    ]


def _own_usage(card: Mapping[str, Any]) -> list[str]:
    """Lines that sample with fewstep what no stock pipeline samples as it was trained; none for other students."""
    return _causal_usage(card) if "causal" in card else _SPARSE_USAGE if "sparse" in card else []


_SPARSE_USAGE = [
    "# Trained with sparse attention; a plain diffusers pipeline of this folder would compute dense attention.",
    "import fewstep",
    "",
    'student = fewstep.load_student("FOLDER")',
    'sample = student.sample(["a prompt"], [0])[0]',
]


def _causal_usage(card: Mapping[str, Any]) -> list[str]:
    """Lines that sample the causal student in the folder FOLDER, which no stock pipeline does."""
    window = "" if card["causal"]["window"] is not None else ", sink=1, window=5"
    return [
        "import fewstep",
        "",
        'student = fewstep.load_student("FOLDER")',
        'video = student.sample(["a prompt"], [0])[0]',
        f'for latents in student.stream("a prompt", 0{window}):',
        "    ...",
    ]


def _lora_usage(backbone: Backbone, sampling: Sampling, peft: bool) -> list[str]:
    """Lines that sample the LoRA folder FOLDER on the teacher."""
    scheduler, home = type(sampling.scheduler).__name__, type(sampling.scheduler).__module__
    network = f"pipeline.{backbone.network_name}"
    if peft:
        loading = [f'{network} = PeftModel.from_pretrained({network}, "FOLDER")']
    else:
        loading = ['pipeline.load_lora_weights("FOLDER", adapter_name="fewstep")']
        for part, file in list(weights_files(backbone.network_parts).items())[1:]:
            told = f'weight_name="{file}", adapter_name="fewstep", load_into_{part}=True'
            loading.append(f'pipeline.load_lora_weights("FOLDER", {told})')
    loader, loader_home = _loader(backbone.pipeline)
    return [
        f"from {loader_home} import {loader}",
        f"from {home.split('.')[0] if home.startswith('diffusers') else home} import {scheduler}",
        *(["from peft import PeftModel"] if peft else []),
        "",
        f'pipeline = {loader}.from_pretrained("{TEACHER}")',
        *loading,
        f'pipeline.scheduler = {scheduler}.from_pretrained("FOLDER", subfolder="scheduler")',
        *_calls(sampling, backbone),
    ]


def _calls(sampling: Sampling, backbone: Backbone) -> list[str]:
    """One call for each step count."""
    more, output = backbone.student_call, backbone.output_name
    name = "image" if output == "images" else "video"
    told = [
        ", ".join(f"{argument}={value!r}" for argument, value in {**call, **more}.items())
        for call in sampling.calls.values()
    ]
    return [f'{name} = pipeline("a prompt", {arguments}).{output}[0]' for arguments in told]
