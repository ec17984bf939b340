"""What `fewstep plan` says about published models: their numbers of parameters, and on which GPUs a run fits.

Each is a pipeline folder with configs and no weights, and the plan is the command's own. Needs no GPU and no network.

    python benchmarks/plan_real_sizes.py
    python benchmarks/plan_real_sizes.py wan-1.3b --microbatch 1 --json
"""

from __future__ import annotations

import argparse
import io
import json
import tempfile
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from fewstep.commands.plan import main as plan
from fewstep.models.backbone import Backbone
from training_step import BACKBONES

PUBLISHED = {
    "pixart-512": 611e6, "pixart-1024": 611e6, "sd3-m": 2.03e9, "sdxl": 2.57e9, "cogvideox-2b": 1.69e9,
    "wan-1.3b": 1.42e9,
}  # fmt: skip
"""Parameters of the networks as their cards and weight files have them, to the digits given there."""
HEADINGS = [
    "network", "roles", "parameters", "against published", "trained", "activations, GB", "fullest, GB", "while",
    "forwards per sample", "TFLOP a forward", "fits on GPUs of, GB",
]  # fmt: skip
GPUS = (24, 48, 80)
"""Gigabytes (10^9 bytes) of the GPUs asked about."""
RESERVE = 2
"""Of them left for CUDA and what the plan does not see, as `fewstep plan --reserve` has it."""


def save_configs(backbone: Backbone, folder: Path) -> None:
    """The pipeline of `backbone` as a folder of configs: network and scheduler, without weights or other parts."""
    pipeline: Any = backbone.pipeline
    index: dict[str, Any] = {"_class_name": type(pipeline).__name__}
    for name, part in pipeline.components.items():
        index[name] = [None, None] if part is None else ["diffusers", type(part).__name__]
        if part is not None:
            part.save_config(folder / name)
    (folder / "model_index.json").write_text(json.dumps(index))


def planned(folder: Path, kind: str, told: argparse.Namespace) -> dict[str, Any]:
    """What `fewstep plan --json` prints."""
    words = [
        "tdm", "--teacher", str(folder), "--roles", kind, "--batch", told.batch, "--microbatch", told.microbatch,
        "--gpus", told.gpus, "--base-dtype", "bfloat16", "--precision", "bf16", "--text-encoder", "cache",
        "--checkpointing", "--memory", "100000GB", "--json",
    ]  # fmt: skip
    words += ["--rank", told.rank] if kind != "copies" else []
    words += ["--shard"] if told.shard else []
    with redirect_stdout(io.StringIO()) as said:
        plan([str(word) for word in words])
    found: dict[str, Any] = json.loads(said.getvalue())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("backbones", nargs="*", default=list(PUBLISHED), metavar="BACKBONE")
    parser.add_argument("--roles", nargs="+", default=["adapters", "copies"])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--microbatch", type=int, default=1)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--shard", action="store_true")
    parser.add_argument("--json", action="store_true", help="everything the plans say")
    told = parser.parse_args()
    rows = []
    if not told.json:
        print("| " + " | ".join(HEADINGS) + " |\n" + "|---" * len(HEADINGS) + "|")
    for name in told.backbones:
        with tempfile.TemporaryDirectory() as folder:
            save_configs(BACKBONES[name]("meta"), Path(folder))
            for kind in told.roles:
                rows.append({"backbone": name, "roles": kind, **planned(Path(folder), kind, told)})
                if not told.json:
                    print(_line(rows[-1]), flush=True)
    if told.json:
        print(json.dumps(rows, indent=1))


def _line(row: dict[str, Any]) -> str:
    numbers, parts = row["parameters"], row["bytes_per_gpu"]
    total = max(row["bytes_total"], row["bytes_saving"])
    off = numbers["frozen"] / PUBLISHED[row["backbone"]] - 1
    cells = [
        row["backbone"], row["roles"], f"{numbers['frozen'] / 1e6:,.0f} M", f"{100 * off:+.1f} %",
        f"{(numbers['student'] + numbers['critic']) / 1e6:,.0f} M",
        f"{parts['activations'] / 1e9:.1f}", f"{total / 1e9:.1f}",
        "training" if total == row["bytes_total"] else "saving", f"{row['forwards_per_sample']:.2f}",
        f"{row['operations_per_forward'] / 1e12:.2f}",
        ", ".join(str(gpu) for gpu in GPUS if total <= (gpu - RESERVE) * 1e9) or "none",
    ]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
