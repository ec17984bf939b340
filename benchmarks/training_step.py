"""What a training step costs: forwards, time against the bare network calls, peak memory against the plan's.

Random weights of a network's published shape (speed and memory do not depend on them), encoded prompts of the right
shape, and the engine's own loop. Each arrangement of roles runs in a process of its own; on CUDA the peak is
torch's `max_memory_allocated`, on the CPU (Linux) the growth of the process's resident memory.

    python benchmarks/training_step.py tiny middle --out steps.json
    python benchmarks/training_step.py pixart-512 wan-1.3b --device cuda --precision bf16 --base-dtype bfloat16
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fewstep.api import RoleOptions
from fewstep.core.tensors import Condition
from fewstep.methods import preset
from fewstep.models import Backbone, build_roles
from fewstep.models.cogvideox import CogVideoX
from fewstep.models.pipelines import MASK
from fewstep.models.pixart import PixArt
from fewstep.models.stable_diffusion_3 import StableDiffusion3
from fewstep.models.stable_diffusion_xl import StableDiffusionXL
from fewstep.models.wan import Wan
from fewstep.planning.build import Blueprint
from fewstep.planning.conditions import shapes
from fewstep.planning.memory import Run, plan
from fewstep.training.log import read_log
from fewstep.training.loop import train
from fewstep.training.options import TrainOptions

PAPER_SAMPLES = 500 * 32
"""Of the TDM paper's PixArt student: iterations times batch."""
_GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
"""glibc returns what torch frees at once, so that resident memory is what tensors take."""
_UNTRAINED = {"text_encoder": None, "tokenizer": None, "vae": None}
SDXL = {
    "sample_size": 128, "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816, "attention_head_dim": (5, 10, 20), "cross_attention_dim": 2048,
    "block_out_channels": (320, 640, 1280), "transformer_layers_per_block": (1, 2, 10), "use_linear_projection": True,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
}  # fmt: skip
"""What the published U-Net has of its own."""


def _pixart(device: str, **config: Any) -> PixArt:
    from diffusers import DDIMScheduler, PixArtAlphaPipeline, PixArtTransformer2DModel

    usual = {"in_channels": 4, "out_channels": 8, "patch_size": 2, "caption_channels": 4096}
    network = _made(device, PixArtTransformer2DModel, **usual | config)
    return PixArt(PixArtAlphaPipeline(transformer=network, scheduler=DDIMScheduler(), **_UNTRAINED), "random")


def _sd3(device: str) -> StableDiffusion3:
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    network = _made(
        device, SD3Transformer2DModel, sample_size=128, num_layers=24, num_attention_heads=24, attention_head_dim=64,
        caption_projection_dim=1536, pos_embed_max_size=192, pooled_projection_dim=2048, joint_attention_dim=4096,
    )  # fmt: skip
    nothing = dict.fromkeys(("text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3"))
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipeline = StableDiffusion3Pipeline(transformer=network, scheduler=scheduler, **_UNTRAINED, **nothing)
    return StableDiffusion3(pipeline, "random")


def _sdxl(device: str) -> StableDiffusionXL:
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel

    nothing = dict.fromkeys(("text_encoder_2", "tokenizer_2"))
    scheduler = EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    network = _made(device, UNet2DConditionModel, **SDXL)
    pipeline = StableDiffusionXLPipeline(
        unet=network, scheduler=scheduler, add_watermarker=False, **_UNTRAINED, **nothing
    )
    return StableDiffusionXL(pipeline, "random")


def _cogvideox(device: str) -> CogVideoX:
    from diffusers import CogVideoXDDIMScheduler, CogVideoXPipeline, CogVideoXTransformer3DModel

    own = {"sample_width": 90, "sample_height": 60, "sample_frames": 49}  # diffusers' defaults are the 2B otherwise
    network = _made(device, CogVideoXTransformer3DModel, **own)
    scheduler = CogVideoXDDIMScheduler(
        prediction_type="v_prediction", rescale_betas_zero_snr=True,
        timestep_spacing="trailing", snr_shift_scale=3.0,
    )  # fmt: skip
    return CogVideoX(CogVideoXPipeline(transformer=network, scheduler=scheduler, **_UNTRAINED), "random")


def _wan(device: str) -> Wan:
    from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel

    config = {"num_attention_heads": 12, "attention_head_dim": 128, "num_layers": 30, "ffn_dim": 8960}
    network = _made(device, WanTransformer3DModel, **config)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    return Wan(WanPipeline(transformer=network, scheduler=scheduler, **_UNTRAINED), "random")


def _made(device: str, kind: Any, **config: Any) -> Any:
    """A network with random weights, made where it is wanted."""
    with torch.device(device):
        return kind(**config)


BACKBONES: dict[str, Callable[[str], Backbone]] = {
    "tiny": lambda device: _pixart(
        device, sample_size=16, num_layers=4, num_attention_heads=4, attention_head_dim=32, cross_attention_dim=128,
        caption_channels=64,
    ),
    "middle": lambda device: _pixart(
        device, sample_size=32, num_layers=6, num_attention_heads=4, attention_head_dim=64, cross_attention_dim=256,
        caption_channels=256,
    ),
    "pixart-512": lambda device: _pixart(device, sample_size=64, num_layers=28, cross_attention_dim=1152),
    "pixart-1024": lambda device: _pixart(
        device, sample_size=128, num_layers=28, cross_attention_dim=1152, use_additional_conditions=True
    ),
    "sd3-m": _sd3, "sdxl": _sdxl, "cogvideox-2b": _cogvideox, "wan-1.3b": _wan,
}  # fmt: skip
"""Shapes of the published networks, and two for machines without a GPU."""


def measure(name: str, kind: str, told: argparse.Namespace) -> dict[str, Any]:
    """One arrangement of roles, in this process."""
    device = torch.device(told.device)
    build_roles(BACKBONES["tiny"]("cpu"))  # loads all libraries, which are not to be counted
    before = _resident()
    torch.manual_seed(0)
    backbone = BACKBONES[name](told.device)
    if told.base_dtype != "float32":
        backbone.network.to(getattr(torch, told.base_dtype))
    torch.manual_seed(1)

    def told_of(rows: int) -> Condition:
        made = {key: torch.randn(rows, *shape, device=device) for key, shape in shapes(backbone).items()}
        return made | ({MASK: torch.ones_like(made[MASK]).long()} if MASK in made else {})

    prompts = told_of(told.batch)
    backbone._null = told_of(1)
    options = TrainOptions(
        iterations=told.iterations + 1, batch=told.batch, microbatch=told.microbatch, warmup=0, log_every=1,
        checkpoint_every=0, precision=told.precision, optimiser=told.optimiser, tensorboard=False,
    )  # fmt: skip
    roles = build_roles(
        backbone, kind, rank=told.rank, checkpointing=told.checkpointing,
        compile_backend="inductor" if told.compile else None,
    )  # fmt: skip
    _forget_peak(device)

    def data(iteration: int, samples: Tensor) -> Condition:
        return {key: value[samples.to(device) % told.batch] for key, value in prompts.items()}

    with tempfile.TemporaryDirectory() as folder:
        result = train(
            preset("tdm").build(), roles, data, options, folder, noise_shape=backbone.latent_shape
        )  # fmt: skip
        peak = _peak(device, before)
        records = read_log(result.log)[1:]  # the first warms up
    seconds = mean(float(record["time/iteration_s"] or 0) for record in records)
    calls = {
        key.removeprefix("forwards/"): mean(float(r[key] or 0) for r in records)
        for key in records[0]
        if "forwards/" in key
    }
    bare = _bare(backbone, roles, calls, prompts, told)
    planned = _planned(name, kind, options, told)
    return {
        "backbone": name, "roles": kind, "device": told.device, "torch": torch.__version__, "batch": told.batch,
        "microbatch": told.microbatch, "base_dtype": told.base_dtype, "precision": told.precision,
        "checkpointing": told.checkpointing, "optimiser": told.optimiser, "rank": told.rank, "compile": told.compile,
        "forwards_per_sample": sum(calls.values()), "iteration_seconds": seconds,
        "bare_seconds": bare["sum"], "ratio": seconds / bare["sum"], "seconds_per_forward": bare["forward"],
        "peak_bytes": peak, "planned_bytes": planned, "plan_error": planned / peak - 1,
        "paper_hours": seconds / told.batch * PAPER_SAMPLES / 3600,
    }  # fmt: skip


def _bare(backbone: Backbone, roles: Any, calls: dict[str, float], prompts: Condition, told: Any) -> dict[str, float]:
    """Seconds of an iteration's network calls by themselves, of the same rows and roles, and of one forward."""
    device, rows = torch.device(told.device), told.microbatch or told.batch
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(told.precision)
    x, t = torch.randn(rows, *backbone.latent_shape, device=device), torch.full((rows,), 0.5, device=device)
    condition = {key: value[:rows] for key, value in prompts.items()}

    def run(role: str, parameters: list[Any]) -> float:
        times = []
        for _ in range(told.iterations + 1):
            _wait(device)
            start = perf_counter()
            with (
                torch.set_grad_enabled(bool(parameters)),
                torch.autocast(device.type, dtype, enabled=dtype is not None),
            ):
                answer = getattr(roles, role)(x, t, condition)
            if parameters:
                answer.float().square().mean().backward(inputs=parameters)
            _wait(device)
            times.append(perf_counter() - start)
        return mean(times[1:]) / rows

    teacher, forward = run("teacher", []), run("student", [])
    both = run("student", roles.student_parameters()) + run("critic", roles.critic_parameters())
    others = calls["student"] - 1 + calls["critic"] - 1  # of each, one call has a backward
    return {"sum": told.batch * (calls["teacher"] * teacher + others * forward + both), "forward": forward}


def _planned(name: str, kind: Any, options: TrainOptions, told: argparse.Namespace) -> int:
    """Bytes that `fewstep plan` says."""
    backbone = BACKBONES[name]("meta")
    roles = RoleOptions(roles=kind, rank=told.rank, checkpointing=told.checkpointing)
    run = Run(preset("tdm"), roles, options, told.base_dtype)
    return sum(plan(Blueprint(backbone, FakeTensorMode(allow_non_fake_inputs=True), {}), run).parts.values())


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _resident(what: str = "VmRSS") -> int:
    """Bytes of this process's memory: now, or ("VmHWM") at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(what))


def _forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def _peak(device: torch.device, before: int) -> int:
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else _resident("VmHWM") - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("backbones", nargs="+", choices=list(BACKBONES))
    parser.add_argument("--roles", nargs="+", default=["adapters", "copies"])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--microbatch", type=int, default=0)
    parser.add_argument("--iterations", type=int, default=2, help="that count; one more warms up")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--base-dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16", "fp16"])
    parser.add_argument("--optimiser", default="adamw", choices=["adamw", "adamw8bit"])
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--minutes", type=float, default=60.0, help="for all together; what does not fit is left out")
    parser.add_argument("--out", type=Path, help="JSON list; rows that are there are kept and not measured again")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    told = parser.parse_args()
    if told.child:
        print(json.dumps(measure(told.backbones[0], told.roles[0], told)))
        return
    end = perf_counter() + 60 * told.minutes
    rows = json.loads(told.out.read_text()) if told.out and told.out.exists() else []
    words = [word for word in sys.argv[1:] if word not in (*told.backbones, *told.roles, "--roles")]
    for name, kind in [(name, kind) for name in told.backbones for kind in told.roles]:
        if any((row["backbone"], row["roles"], row["batch"]) == (name, kind, told.batch) for row in rows):
            continue
        command = [sys.executable, __file__, name, "--roles", kind, "--child", *words]
        try:
            own, limit = os.environ | _GIVE_BACK, max(1.0, end - perf_counter())
            done = subprocess.run(command, stdout=subprocess.PIPE, timeout=limit, text=True, env=own)
        except subprocess.TimeoutExpired:
            print(f"{name}, {kind}: no time left")
            return
        if done.returncode:
            print(f"{name}, {kind}: failed (its error stands above)")
            continue
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        if told.out:
            told.out.with_suffix(".new").write_text(json.dumps(rows, indent=1) + "\n")
            os.replace(told.out.with_suffix(".new"), told.out)
    _print(rows)


def _print(rows: list[dict[str, Any]]) -> None:
    headings = [
        "backbone", "roles", "batch", "checkpointing", "forwards per sample", "s per iteration", "over bare calls",
        "peak, GiB", "planned, GiB", "paper's 16,000 samples",
    ]  # fmt: skip
    print("| " + " | ".join(headings) + " |\n" + "|---" * len(headings) + "|")
    for row in rows:
        cells = [
            row["backbone"], row["roles"], row["batch"], "yes" if row["checkpointing"] else "no",
            f"{row['forwards_per_sample']:.2f}", f"{row['iteration_seconds']:.3g}", f"{row['ratio']:.2f}",
            f"{row['peak_bytes'] / 2**30:.2f}", f"{row['planned_bytes'] / 2**30:.2f} ({row['plan_error']:+.0%})",
            f"{row['paper_hours']:.1f} h",
        ]  # fmt: skip
        print("| " + " | ".join(map(str, cells)) + " |")


if __name__ == "__main__":
    main()
