"""How much of an iteration is spent outside the networks.

Distils a network of the embedded teacher's size (random weights: speed does not depend on them) by TDM, once with each
arrangement of the roles, in one run of this script, and prints from the trainer's own log: seconds per iteration, and
their shares in the rollout, in all calls and backward passes of teacher, student and critic, in the text encoder, and
the rest. The rest is what the engine costs: random numbers, losses, optimisers, average, log. The goal is below 5 %.

    python benchmarks/overhead.py --batch 32 --iterations 4
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from statistics import mean

import torch

from fewstep.data.prompts import PromptData, training_captions
from fewstep.embedded.autoencoder import build_autoencoder
from fewstep.embedded.teacher import build_pipeline, build_text_encoder, build_tokenizer, build_transformer
from fewstep.methods import preset
from fewstep.models.pixart import PixArt
from fewstep.models.roles import Kind, build_roles
from fewstep.training.log import read_log
from fewstep.training.loop import train
from fewstep.training.options import TrainOptions


def measure(teacher: PixArt, kind: Kind, method: str, options: TrainOptions, out: Path) -> dict[str, float]:
    """Means of the log's timings over all iterations but the first, which warms up."""
    result = train(
        preset(method).build(),
        build_roles(teacher, kind),
        PromptData(teacher.encode, training_captions(1024)),
        options,
        out,
        noise_shape=teacher.latent_shape,
    )
    records = read_log(result.log)[1:]
    return {
        name: mean(float(r[name] or 0) for r in records)
        for name in records[0]
        if name.startswith(("time/", "forwards/"))
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--batch", type=int, default=32, help="samples per iteration")
    parser.add_argument("--iterations", type=int, default=4, help="iterations that count, for each arrangement")
    parser.add_argument("--method", default="tdm", help="a name of `fewstep methods`")
    parser.add_argument("--roles", nargs="+", default=["adapters", "copies", "mixed"], help="arrangements to compare")
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16", "fp16"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    told = parser.parse_args()
    torch.set_num_threads(told.threads)
    torch.manual_seed(0)

    tokenizer = build_tokenizer()
    parts = (build_autoencoder(), tokenizer, build_text_encoder(len(tokenizer)), build_transformer())
    teacher = PixArt(build_pipeline(*parts), "random weights").to(told.device)
    options = TrainOptions(
        iterations=told.iterations + 1,
        batch=told.batch,
        warmup=0,
        log_every=1,
        checkpoint_every=0,
        precision=told.precision,
    )
    print(f"torch {torch.__version__}, {told.device}, {told.threads} thread(s), {told.method}, batch {told.batch}")
    print("| roles | s per iteration | forwards per sample | rollout | networks | text encoder | rest |")
    print("|---|---|---|---|---|---|---|")
    for kind in told.roles:
        with tempfile.TemporaryDirectory() as out:
            numbers = measure(teacher, kind, told.method, options, Path(out))
        forwards = sum(value for name, value in numbers.items() if name.startswith("forwards/"))
        rollout, network, data = (numbers[f"time/{name}_share"] for name in ("rollout", "network", "data"))
        print(f"| {kind} | {numbers['time/iteration_s']:.3f} | {forwards:.2f} ", end="")
        print(f"| {rollout:.1%} | {network:.1%} | {data:.2%} | {1 - network - data:.2%} |", flush=True)


if __name__ == "__main__":
    main()
