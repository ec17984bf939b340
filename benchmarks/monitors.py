"""Do monitors name what is wrong, in time, and keep quiet otherwise; and what do they cost?

    python benchmarks/monitors.py           # faults and sound runs with an exact teacher: the table of docs/monitors.md
    python benchmarks/monitors.py --cost    # share of an iteration, on a network of the embedded teacher's size

Faults are built into short runs of the real trainer (`fewstep.evaluation.faulty_runs`); a run ends where its alarm
stops it. `--everywhere` builds the reversed sign and the rates x100 into every method.
"""

from __future__ import annotations

import argparse
import io
import tempfile
import time
from collections.abc import Iterable
from contextlib import redirect_stderr
from dataclasses import replace
from pathlib import Path

import torch

from fewstep.evaluation.faulty_runs import FAULTS, SOUND, Fault, run, sound
from fewstep.methods.base import agreement_metrics
from fewstep.training.monitors.conditions import CONDITIONS
from fewstep.training.options import TrainOptions


def told(fault: Fault) -> list[dict[str, object]]:
    """The alarms of a run."""
    with tempfile.TemporaryDirectory() as out, redirect_stderr(io.StringIO()):
        return run(fault, Path(out))


def faults(everywhere: bool) -> dict[str, list[str]]:
    """Prints a row for each fault; what was found, by condition."""
    wanted: Iterable[Fault] = FAULTS
    if everywhere:
        wanted = [*FAULTS, *(replace(fault, method=method) for fault in FAULTS[:2] for method in list(SOUND)[1:])]
    found: dict[str, list[str]] = {}
    print("| fault | method | should be told | was told | found | healthy | iterations | at most |")
    print("|---|---|---|---|---|---|---|---|")
    for fault in wanted:
        alarms = [alarm for alarm in told(fault) if alarm["iteration"] >= fault.begins]
        first = next((alarm for alarm in alarms if alarm["name"] == fault.condition), None)
        names = ", ".join(dict.fromkeys(str(alarm["name"]) for alarm in alarms)) or "nothing"
        row = f"| {fault.title} | {fault.method} | {fault.condition} | {names} |"
        if first is None:
            print(f"{row} | | not | {fault.within} |", flush=True)
            continue
        after = int(str(first["iteration"])) - fault.begins + 1
        print(
            f"{row} {first['number']} = {first['value']:.3g} | {first['healthy']} | {after} | {fault.within} |",
            flush=True,
        )
        found.setdefault(fault.condition, []).append(f"{fault.title}: {after}")
    return found


def quiet(iterations: int) -> None:
    """Prints a row for each sound run."""
    print("\n| sound run | iterations | alarms |")
    print("|---|---|---|")
    for method in SOUND:
        alarms = told(sound(method, iterations))
        names = ", ".join(f"{alarm['name']} at {alarm['iteration']}" for alarm in alarms) or "none"
        print(f"| {method} | {iterations} | {names} |", flush=True)


def conditions(found: dict[str, list[str]]) -> None:
    """Prints the table of docs/monitors.md."""
    print("\n| condition | looked at | healthy | times in a row | what to do | with `act` | iterations to be told |")
    print("|---|---|---|---|---|---|---|")
    for each in CONDITIONS:
        numbers = ", ".join(f"`{name.removeprefix('metric/')}`" for name in each.numbers)
        seen = "; ".join(found.get(each.name, [])) or "—"
        advice = each.advice[0].upper() + each.advice[1:]
        print(f"| {each.name} | {numbers} | {each.healthy()} | {each.after} | {advice} | {each.action} | {seen} |")


def cost(batch: int, iterations: int) -> None:
    """Prints the monitors' share of an iteration: what the loop does after it, and the metrics in the loss."""
    from fewstep.embedded.autoencoder import build_autoencoder
    from fewstep.embedded.teacher import build_pipeline, build_text_encoder, build_tokenizer, build_transformer
    from fewstep.models.pixart import PixArt
    from overhead import measure  # beside this file

    tokenizer = build_tokenizer()
    parts = (build_autoencoder(), tokenizer, build_text_encoder(len(tokenizer)), build_transformer())
    teacher = PixArt(build_pipeline(*parts), "random weights")
    options = TrainOptions(iterations=iterations + 1, batch=batch, warmup=0, log_every=1, checkpoint_every=0)
    samples = [torch.randn(batch, *teacher.latent_shape) for _ in range(3)]
    agreement_metrics(*samples)
    begin = time.process_time()
    for _ in range(100):
        agreement_metrics(*samples)
    metrics = (time.process_time() - begin) / 100
    print(f"\n| roles (batch {batch}, tdm) | seconds an iteration | looking | metrics in the loss |")
    print("|---|---|---|---|")
    for kind in ("adapters", "copies"):
        with tempfile.TemporaryDirectory() as out, redirect_stderr(io.StringIO()):
            numbers = measure(teacher, kind, "tdm", options, Path(out))  # type: ignore[arg-type]
        seconds = numbers["time/iteration_s"]
        print(
            f"| {kind} | {seconds:.2f} | {numbers['time/monitors_share']:.3%} | {metrics / seconds:.3%} |", flush=True
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--everywhere", action="store_true", help="two of the faults in every method")
    parser.add_argument("--iterations", type=int, default=100, help="of the sound runs")
    parser.add_argument("--cost", action="store_true", help="measure the cost instead")
    parser.add_argument("--batch", type=int, default=16, help="of the measurement")
    parser.add_argument("--count", type=int, default=3, help="iterations of the measurement")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    if asked.cost:
        cost(asked.batch, asked.count)
        return
    found = faults(asked.everywhere)
    quiet(asked.iterations)
    conditions(found)


if __name__ == "__main__":
    main()
