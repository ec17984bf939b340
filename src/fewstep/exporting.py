"""What leaves the library: a saved student in the form that another tool wants.

    export_student("runs/mine", "comfyui", dtype=torch.bfloat16, out="my-lora")

A run of roles "adapters" has its student twice: merged, as a whole pipeline (`student`), and as a LoRA (`lora`). From
either comes what can be made of it; what cannot, is refused.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import nn

from fewstep.api import LORA_FOLDER, STUDENT_FOLDER
from fewstep.core.process import process_from_scheduler
from fewstep.errors import FewstepError
from fewstep.models.backbone import Backbone
from fewstep.models.card import TEACHER, guidance, metadata, renamed_teacher
from fewstep.models.comfyui import comfyui_tensors, save_comfyui, sigmas
from fewstep.models.export import CARD, save_pipeline, write_card, write_pipeline, written_atomically
from fewstep.models.loading import adapter_of, load_backbone
from fewstep.models.lora import is_peft, merge_loras, read_loras, save_loras
from fewstep.models.quiet import quiet_libraries
from fewstep.models.schedulers import choose_scheduler
from fewstep.models.student import ROUTER, read_card
from fewstep.training.folder import AGAIN, room
from fewstep.training.log import read_log

Target = Literal["diffusers", "lora", "comfyui", "merged"]


def export_student(
    source: str | Path,
    to: Target = "diffusers",
    *,
    out: str | Path | None = None,
    dtype: torch.dtype = torch.float32,
    base_model: str | None = None,
) -> Path:
    """Write a student in another form, with its settings (`fewstep.json`) and a model card (README.md).

    | to        | what                                                                  | from a        |
    |-----------|-----------------------------------------------------------------------|---------------|
    | diffusers | the whole pipeline with its scheduler                                 | student, LoRA |
    | lora      | LoRA for diffusers' `load_lora_weights`, or PEFT, and the scheduler    | LoRA          |
    | comfyui   | LoRA by ComfyUI's names, with alpha                                   | LoRA          |
    | merged    | the network alone, merged, as diffusers' models are saved; scheduler  | student, LoRA |

    Args:
        source: a run, or the folder of a student or LoRA in it.
        to: see the table.
        out: folder to write, under a temporary name first; `source` with `-<to>` unless told. A student there is
            replaced, anything else refused.
        dtype: of the weights: float32, bfloat16 or float16.
        base_model: Hub id by which others know the teacher, where it was a folder here.

    Raises:
        FewstepError: no student there, or a form that cannot be made of it.
    """
    if to not in get_args(Target):
        raise FewstepError(f"found form {to!r}, expected one of {get_args(Target)}, fix: name one of these")
    folder = student_folder(Path(source), to)
    own, grids = read_card(folder)
    if own["form"] not in ("pipeline", "lora"):
        raise FewstepError(
            f"found a student exported to {own['form']} at {folder}, expected the student or LoRA it came from, fix: "
            "pass that one, or its run"
        )
    if "usage" not in own:
        raise FewstepError(
            f"found a student of an earlier version at {folder}, expected one whose card says how it is called, fix: "
            "continue its finished run with `fewstep distill --resume`, which saves it again"
        )
    if to in ("lora", "comfyui") and own["form"] != "lora":
        raise FewstepError(
            f"found a student with all its weights at {folder}, expected a LoRA (an approximation by a low rank would "
            "be another student than the one that was trained), fix: export to 'diffusers' or 'merged', or distil with "
            "--roles adapters"
        )
    metrics = _metrics(folder.parent)
    own["details"] = {**own["details"], **({"metrics": metrics} if metrics else {})}
    card = renamed_teacher(own, base_model)
    home = Path(out or f"{source}-{to}")
    with room(home, AGAIN), written_atomically(home) as place:
        if to == "lora":
            _to_lora(folder, place, card, dtype)
        elif to == "comfyui":
            _to_comfyui(folder, place, card, own["teacher"], dtype)
        else:
            backbone = _loaded(folder, own)
            backbone.embedded_guidance = own["embedded_guidance"]
            if to == "diffusers" and own["form"] == "lora":
                sampling = choose_scheduler(backbone, list(grids.values()), own["eta"])
                write_pipeline(place, backbone, backbone.network, sampling, {**card, "form": "pipeline"}, dtype)
            elif to == "diffusers":
                save_pipeline(backbone.pipeline, place, dtype)
                write_card(place, card)
            else:
                _to_merged(folder, place, card, backbone, dtype)
    return home


def require_public_teacher(source: Path, to: str, base_model: str | None) -> None:
    """Raises a FewstepError where others would be told the teacher by a folder of this machine."""
    teacher = read_card(student_folder(source, to))[0]["teacher"]
    if base_model is None and Path(teacher).is_dir():
        raise FewstepError(
            f"found a student of the teacher {teacher}, a folder on this machine, expected a Hub id by which others "
            "find it, fix: name it with --base-model owner/name"
        )


def student_folder(source: Path, to: str) -> Path:
    """The folder of the student, or of its LoRA where `to` needs one, that `source` names.

    Raises:
        FewstepError: there is none, or several.
    """
    if (source / ROUTER).is_file():
        raise FewstepError(
            f"found several students at {source}, expected one, fix: export each part (such as {source}/part-1)"
        )
    if (source / CARD).is_file():
        return source
    for name in (LORA_FOLDER, STUDENT_FOLDER) if to in ("lora", "comfyui") else (STUDENT_FOLDER, LORA_FOLDER):
        if (source / name / CARD).is_file():
            return source / name
    raise FewstepError(
        f"found no student at {source}, expected a finished run, or a student's folder with {CARD}, fix: check the path"
    )


def _metrics(run: Path) -> dict[str, float]:
    """The last evaluation in the log of a run; empty if there was none."""
    records = [
        {name.removeprefix("evaluate/"): value for name, value in record.items() if name.startswith("evaluate/")}
        for record in read_log(run / "log.jsonl")
    ]
    last = next((record for record in reversed(records) if record), {})
    return {name: value for name, value in last.items() if value is not None}


def _to_lora(folder: Path, place: Path, card: dict[str, Any], dtype: torch.dtype) -> None:
    loras, told = read_loras(folder, card["parts"]), metadata(card)
    save_loras(place, loras, base=card["teacher"], peft=is_peft(folder), dtype=dtype, metadata=told)
    _copy_scheduler(folder, place)
    write_card(place, card)


def _to_comfyui(folder: Path, place: Path, card: dict[str, Any], teacher: str, dtype: torch.dtype) -> None:
    """Of the teacher only the class and configs are read, no weights."""
    loras = read_loras(folder, card["parts"])
    files = comfyui_tensors(adapter_of(teacher), loras, _config(teacher, card["parts"][0]))
    process = process_from_scheduler(_config(teacher, "scheduler"))[0]
    levels = {count: sigmas(process, grid) for count, grid in card["grids"].items()}
    texts = {count: ", ".join(f"{one:.6g}" for one in level) for count, level in levels.items() if level}
    named = save_comfyui(place, files, "student", dtype, metadata(card) | {"sigmas": json.dumps(levels)})
    sampler = "euler" if card["eta"] == 1 else "lcm"
    usage = [
        f"Put {' and '.join(named.values())} into `models/loras` and load it with strength 1"
        + (", each onto the model of its noise levels." if len(named) == 2 else "."),
        "",
        f"Guidance: {guidance(card)}; cfg is 1. Sampler: {sampler}.",
        *(f"Sigmas of {count} step{'s' * (count != '1')}: `{text}`" for count, text in texts.items()),
    ]
    write_card(place, {**card, "form": "comfyui", "usage": usage})


def _to_merged(folder: Path, place: Path, card: dict[str, Any], backbone: Backbone, dtype: torch.dtype) -> None:
    pipeline = backbone.pipeline_with(backbone.network, backbone.pipeline.scheduler)
    if type(getattr(pipeline, backbone.network_name)).__module__.startswith("fewstep."):
        raise FewstepError(
            f"found a network of fewstep's own kind at {folder} (told its step count, or of several experts), expected "
            "one of diffusers', fix: export to 'diffusers'"
        )
    lines = [
        "from diffusers import DiffusionPipeline",
        "",
        f'pipeline = DiffusionPipeline.from_pretrained("{TEACHER}")',
    ]
    for part in backbone.network_parts:
        network: nn.Module = getattr(pipeline, part)
        with quiet_libraries():
            network.to(dtype).save_pretrained(place / part, max_shard_size="1TB")  # type: ignore[operator]
        lines.append(f'pipeline.{part} = type(pipeline.{part}).from_pretrained("FOLDER", subfolder="{part}")')
    _copy_scheduler(folder, place)
    kind = json.loads((place / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))["_class_name"]
    home = "fewstep.models.flow_scheduler" if kind == "FlowMatchStepsScheduler" else "diffusers"
    lines[:1] = [f"from {home} import {kind}", *lines[:1]]
    lines.append(f'pipeline.scheduler = {kind}.from_pretrained("FOLDER", subfolder="scheduler")')
    lines += [line for line in card["usage"] if "pipeline(" in line]
    write_card(place, {**card, "form": "merged", "usage": lines})


def _loaded(folder: Path, card: dict[str, Any]) -> Backbone:
    """The student's pipeline, or the teacher's with the LoRA merged into its network, in float32."""
    backbone = load_backbone(folder if card["form"] == "pipeline" else card["teacher"], size=card["size"])
    if card["form"] == "lora":
        merge_loras(backbone, backbone.network, read_loras(folder, card["parts"]))
    return backbone


def _copy_scheduler(folder: Path, place: Path) -> None:
    (place / "scheduler").mkdir()
    for path in (folder / "scheduler").iterdir():
        (place / "scheduler" / path.name).write_bytes(path.read_bytes())


def _config(teacher: str, part: str) -> dict[str, Any]:
    """The config of a part of a pipeline folder or Hub repository."""
    from diffusers import DDIMScheduler, UNet2DConditionModel

    kind: Any = DDIMScheduler if part == "scheduler" else UNet2DConditionModel  # any of its kind reads it
    return dict(kind.load_config(teacher, subfolder=part))
