"""The model card of a student, and the metadata of its LoRA files: what `fewstep.json` says, for people and tools."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fewstep.errors import FewstepError

TEACHER = "TEACHER"
"""Stands for the teacher in the lines of code that a card keeps."""
_HUB_ID = r"[\w.-]+/[\w.-]+"
_CITED = {
    "2503.06674": "Learning Few-Step Diffusion Models by Trajectory Distribution Matching",
    "2405.14867": "Improved Distribution Matching Distillation for Fast Image Synthesis",
    "2502.15681": "One-step Diffusion Models with f-Divergence Distribution Matching",
    "2505.12674": "Few-Step Diffusion via Score identity Distillation",
    "2511.22677": "Decoupled DMD: CFG Augmentation as the Spear, Distribution Matching as the Shield",
    "2510.27684": "Phased DMD: Few-step Distribution Matching Distillation via Score Matching within Subintervals",
    "2511.01266": "MotionStream: Real-Time Video Generation with Interactive Motion Controls",
    "2410.23274": "Multi-student Diffusion Distillation for Better One-step Generators",
}
_TRAINING = (
    "roles", "rank", "critic_rank", "alpha", "layers", "student_rate", "critic_rate", "batch", "guidance_scale",
    "critic_updates",
)  # fmt: skip
_FORMS = {
    "pipeline": "A whole diffusers pipeline.",
    "lora": "A LoRA; its scale is 1.",
    "comfyui": "A LoRA for ComfyUI; its strength is 1.",
    "merged": "The network's weights, LoRA merged where there was one, without the teacher's other parts.",
}


def metadata(card: Mapping[str, Any]) -> dict[str, str]:
    """What a LoRA's safetensors file says of itself: strings by name."""
    return {
        "base_model": teacher_name(card["teacher"]),
        "scale": "1.0",
        "method": card["method"],
        "steps": ", ".join(card["grids"]),
        "grids": json.dumps(card["grids"]),
        "shift": "none" if card["shift"] is None else f"{card['shift']:g}",
        "guidance": guidance(card),
        "fewstep_version": card["versions"]["fewstep"],
    }


def guidance(card: Mapping[str, Any]) -> str:
    """How a student is to be called, in words."""
    scales = {
        name: value for name, value in card["pipeline_call"].items() if name in ("guidance_scale", "true_cfg_scale")
    }
    told = ", ".join(f"{name}={value:g}" for name, value in scales.items())
    if card["embedded_guidance"] is not None:
        return f"distilled in; the network is told {card['embedded_guidance']:g} ({told}), no unconditional call"
    return f"distilled in; call without classifier-free guidance ({told})"


def teacher_name(source: str) -> str:
    """A Hub id as it is; of a folder only its name, since a path means nothing elsewhere."""
    return source if _is_hub_id(source) else Path(source).name


def teacher_license(source: str) -> dict[str, str]:
    """`license`, and `license_name`, `license_link` if it has them, as the teacher's own card states them.

    From README.md of the teacher's folder, or of the Hub repository (a request, or what was downloaded before), else
    from `model_index.json`; empty if it is nowhere to be found.
    """
    from huggingface_hub import ModelCard, hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    readme, index = Path(source) / "README.md", Path(source) / "model_index.json"
    if _is_hub_id(source):
        try:
            readme = Path(hf_hub_download(source, "README.md"))
        except (OSError, EntryNotFoundError):  # no network, or no card: the card then says that it does not know
            return {}
    stated: dict[str, Any] = {}
    if readme.is_file():
        stated = ModelCard(readme.read_text(encoding="utf-8"), ignore_metadata_errors=True).data.to_dict()
    if "license" not in stated and index.is_file():
        stated = json.loads(index.read_text(encoding="utf-8"))
    return {name: str(stated[name]) for name in ("license", "license_name", "license_link") if name in stated}


def renamed_teacher(card: Mapping[str, Any], teacher: str | None) -> dict[str, Any]:
    """`card` of a student whose teacher is also known as the Hub id `teacher`; as it is for None.

    Raises:
        FewstepError: that is no Hub id.
    """
    if teacher is None:
        return dict(card)
    if not re.fullmatch(_HUB_ID, teacher):
        raise FewstepError(f"found base model {teacher!r}, expected a Hub id like 'owner/name', fix: pass one")
    return {**card, "teacher": teacher, "details": {**card["details"], "teacher": teacher}}


def model_card(card: Mapping[str, Any], usage: Sequence[str]) -> str:
    """README.md: a header that the Hub reads, how to use it, settings, scores, licence, papers.

    Args:
        card: what `fewstep.json` says.
        usage: lines of Python, or of text if none begins with "from" or "import"; `TEACHER` stands for the teacher.
    """
    counts, name = ", ".join(card["grids"]), teacher_name(card["teacher"])
    lines = [line.replace(TEACHER, card["teacher"]) for line in usage]
    python = any(line.startswith(("from ", "import ")) for line in lines)
    body = [
        f"# {name} in {counts} step{'s' * (counts != '1')} ({card['method']})",
        "",
        f"A student of {name}, made by fewstep for {counts} network calls without guidance. {_FORMS[card['form']]}",
        "",
        *(["```python", *lines, "```"] if python else lines),
        "",
        "## Settings",
        "",
        "| what | value |",
        "|---|---|",
        *(f"| {what} | {value} |" for what, value in _settings(card).items()),
        "",
        *_scores(card["details"].get("metrics")),
        "## Licence",
        "",
        _license_line(card, name),
        "",
        *_citations(card["details"].get("paper", "")),
    ]
    return "\n".join([*_header(card), *body])


def _header(card: Mapping[str, Any]) -> list[str]:
    """YAML; a JSON string is one in YAML too."""
    task = "text-to-video" if card["output"] == "frames" else "text-to-image"
    tags = ["diffusers", "fewstep", "distillation", "few-step", card["method"], task]
    tags += ["lora"] if card["form"] in ("lora", "comfyui") else []
    tags += ["comfyui"] if card["form"] == "comfyui" else []
    lines = [f"{name}: {json.dumps(value)}" for name, value in card["license"].items()]
    if _is_hub_id(card["teacher"]):
        lines.append(f"base_model: {card['teacher']}")
        lines.append(f"base_model_relation: {'adapter' if 'lora' in tags else 'finetune'}")
    return [
        "---",
        *lines,
        "library_name: diffusers",
        f"pipeline_tag: {task}",
        "tags:",
        *(f"- {t}" for t in tags),
        "---",
        "",
    ]


def _settings(card: Mapping[str, Any]) -> dict[str, str]:
    details = card["details"]
    rows = {"method": f"{card['method']} ({details['paper']})" if "paper" in details else card["method"]}
    rows |= {"teacher": teacher_name(card["teacher"])}
    for count, grid in card["grids"].items():
        rows[f"times of {count} call{'s' * (count != '1')}"] = ", ".join(f"{time:.4g}" for time in grid)
    rows |= {"shift": "none" if card["shift"] is None else f"{card['shift']:g}", "guidance": guidance(card)}
    rows["noise"] = "kept along the path" if card["eta"] == 1 else "fresh at every step"
    if card["size"]:
        rows["size"] = ", ".join(f"{name} {value}" for name, value in card["size"].items())
    if sizes := details.get("sizes"):
        rows["trained at the sizes (width x height; tell both)"] = ", ".join(sizes)
    flat = {**details.get("roles", {}), **details.get("train", {}), **details.get("method", {})}
    rows |= {name.replace("_", " "): str(flat[name]) for name in _TRAINING if flat.get(name) is not None}
    if "guidance scale" in rows:
        rows["guidance scale of the teacher"] = rows.pop("guidance scale")
    if "iterations" in details:
        rows["iterations"] = str(details["iterations"])
    rows["made with"] = ", ".join(f"{name} {number}" for name, number in card["versions"].items())
    return rows


def _scores(metrics: Mapping[str, float] | None) -> list[str]:
    if not metrics:
        return []
    return ["## Scores", "", "| what | value |", "|---|---|", *(f"| {n} | {v:.4g} |" for n, v in metrics.items()), ""]


def _license_line(card: Mapping[str, Any], name: str) -> str:
    if not card["license"]:
        return (
            f"The card of {name} states none that could be found. A student is a derivative of its teacher: ask there."
        )
    stated = card["license"].get("license_name", card["license"].get("license", "other"))
    return f"That of the teacher, of which this is a derivative: {stated}, as the card of {name} states."


def papers(text: str) -> list[dict[str, str]]:
    """The papers to cite that `text` names by their arXiv numbers: title, number, address, BibTeX entry."""
    found = []
    for number in re.findall(r"\d{4}\.\d{5}", text):
        title, url = _CITED.get(number, f"arXiv {number}"), f"https://arxiv.org/abs/{number}"
        entry = (
            f"@misc{{arxiv{number.replace('.', '')},\n  title = {{{title}}},\n"
            f"  eprint = {{{number}}},\n  archivePrefix = {{arXiv}},\n  url = {{{url}}}\n}}"
        )
        found.append({"title": title, "arxiv": number, "url": url, "bibtex": entry})
    return found


def _citations(paper: str) -> list[str]:
    entries = [each["bibtex"] for each in papers(paper)]
    return ["## Citation", "", "```bibtex", *entries, "```", ""] if entries else []


def _is_hub_id(source: str) -> bool:
    return not Path(source).is_dir() and re.fullmatch(_HUB_ID, source) is not None
