"""What batching is worth: one server that batches against one that draws one picture at a time, in one run.

Starts `fewstep serve` twice on loopback, first with `--batch 1`, then batching, and lets the same clients ask both for
the same pictures (one a request, each of its own seed, by connections that stay open). Every request has to be
answered 200 with the picture of its seed; a server that loses one fails this script. Prints pictures per second,
latencies, the mean size of a batch, and how many pictures differ between the servers (floating-point sums round
differently in batches, by at most one level of 255).

`--student tiny` is a random network of two blocks, whose cost is overhead, as a larger one's is on a GPU; `emoji` is a
student of the embedded teacher, trained for two iterations since speed does not depend on how good it is. One thread of
a CPU is busy with the latter's arithmetic even for one picture, so that there batching can win little.

    python benchmarks/serve_load.py --requests 1000 --clients 32
"""

from __future__ import annotations

import argparse
import base64
import http.client
import io
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import quantiles

import numpy as np
import torch
from PIL import Image

import fewstep
from fewstep.data.prompts import training_captions
from fewstep.embedded.autoencoder import build_autoencoder
from fewstep.embedded.teacher import build_pipeline, build_text_encoder, build_tokenizer
from fewstep.training.options import TrainOptions


@dataclass
class Load:
    """What one server did."""

    seconds: float
    latencies: list[float]
    pictures: dict[int, np.ndarray]
    batch: float
    """Mean pictures per batch."""


def ask_all(port: int, requests: int, clients: int, steps: int, prompts: list[str]) -> Load:
    """`requests` requests from `clients` threads; raises if one is not answered with its picture."""
    local = threading.local()
    pictures: dict[int, np.ndarray] = {}

    def one(number: int) -> float:
        if not hasattr(local, "connection"):
            local.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        started = time.perf_counter()
        asked = {"prompt": prompts[number % len(prompts)], "seed": number, "steps": steps}
        body = json.dumps({**asked, "response_format": "b64_json"})
        local.connection.request("POST", "/v1/images/generations", body, {"Content-Type": "application/json"})
        answer = local.connection.getresponse()
        content = json.loads(answer.read())
        if answer.status != 200 or content["data"][0]["seed"] != number:
            raise RuntimeError(f"found {answer.status} for request {number}: {content}")
        file = base64.b64decode(content["data"][0]["b64_json"])
        pictures[number] = np.asarray(Image.open(io.BytesIO(file))).astype(int)
        return time.perf_counter() - started

    with ThreadPoolExecutor(clients) as crowd:
        started = time.perf_counter()
        latencies = list(crowd.map(one, range(requests)))
        seconds = time.perf_counter() - started
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    connection.request("GET", "/metrics")
    rows = dict(row.rsplit(" ", 1) for row in connection.getresponse().read().decode().splitlines() if row[0] != "#")
    batch = float(rows["fewstep_batch_size_sum"]) / float(rows["fewstep_batch_size_count"])
    return Load(seconds, latencies, pictures, batch)


def load(student: Path, batch: int, told: argparse.Namespace, steps: int) -> Load:
    """The same on a fresh server, which has to end well afterwards."""
    words = ["serve", "--student", str(student), "--port", "0", "--batch", str(batch), "--device", told.device]
    child = subprocess.Popen([sys.executable, "-m", "fewstep", *words], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    try:
        port = int(child.stdout.readline().rsplit(":", 1)[1])
        ask_all(port, told.clients, told.clients, steps, ["warm up"])
        done = ask_all(port, told.requests, told.clients, steps, training_captions(256))
        child.terminate()
        if child.wait(60) != 0:
            raise RuntimeError(f"found exit code {child.returncode} of a server that was told to end")
    finally:
        child.kill()
        child.wait()
    return done


def student_of(name: str, out: Path) -> Path:
    """The folder of the student `name`: made in `out` if it is "tiny" or "emoji"."""
    if name not in ("tiny", "emoji"):
        return Path(name)
    teacher = name
    if name == "tiny":
        from diffusers import PixArtTransformer2DModel

        torch.manual_seed(0)
        tokenizer = build_tokenizer()
        transformer = PixArtTransformer2DModel(
            num_attention_heads=2, attention_head_dim=16, num_layers=2, cross_attention_dim=32, in_channels=4,
            out_channels=8, sample_size=8, patch_size=2, caption_channels=128, use_additional_conditions=False,
        )  # fmt: skip
        parts = (build_autoencoder(8), tokenizer, build_text_encoder(len(tokenizer)), transformer)
        teacher = str(out / "teacher")
        build_pipeline(*parts).save_pretrained(teacher)
    options = TrainOptions(iterations=2, batch=4, warmup=0, tensorboard=False)
    fewstep.distill(teacher, "tdm", out=out / "run", prompts=training_captions(256), train_options=options)
    return out / "run" / "student"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--student", default="tiny", help="tiny, emoji, or a student's folder")
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--steps", type=int, help="network calls per picture; the student's most unless told")
    parser.add_argument("--batch", type=int, default=32, help="pictures in a batch of the server that batches")
    parser.add_argument("--device", default="cpu")
    told = parser.parse_args()
    with tempfile.TemporaryDirectory() as out:
        student = student_of(told.student, Path(out))
        steps = told.steps or max(fewstep.load_student(student).grids)
        loads = {batch: load(student, batch, told, steps) for batch in (1, told.batch)}
    where = f"{told.device}, {os.cpu_count()} cores, {os.environ.get('OMP_NUM_THREADS', 'all')} thread(s)"
    print(f"{told.requests} requests, {told.clients} clients, student {told.student}, {steps} steps, {where}")
    print("| server | pictures per second | p50, ms | p95, ms | pictures per batch | lost |")
    print("|---|---|---|---|---|---|")
    for batch, done in loads.items():
        cuts = quantiles(done.latencies, n=20)
        name = "one at a time" if batch == 1 else f"up to {batch} at a time"
        print(
            f"| {name} | {told.requests / done.seconds:.1f} | {cuts[9] * 1e3:.0f} | {cuts[18] * 1e3:.0f} | "
            f"{done.batch:.1f} | {told.requests - len(done.pictures)} |"
        )
    single, batched = loads.values()
    gaps = [int(abs(single.pictures[n] - batched.pictures[n]).max()) for n in range(told.requests)]
    print(f"batched / one at a time: {single.seconds / batched.seconds:.2f}")
    print(f"pictures that differ: {sum(gap > 0 for gap in gaps)}, by at most {max(gaps)} of 255")


if __name__ == "__main__":
    main()
