"""Kills a run at random moments, starts it again each time, and compares its end with that of an undisturbed run.

    python benchmarks/faults.py --out runs/faults --kills 110 --roles adapters copies --processes 1 2

A case is a kind of roles and a number of processes (2 talk by gloo). Its run is `fewstep.distill` of a pipeline of
random weights with everything on: evaluation, checkpoints that hold an exported student, the export at the end. The
places of the kills are spread over the length of the run, the last tenth of them over the export at its end. Of seven
kills one each is aimed at the inside of writing a checkpoint, of exporting, of evaluating and of starting, the others
come at any moment. SIGKILL comes from outside: to all processes in any order, or to one of two, after which the other
one has to end by itself.

Compared byte for byte: every file of the last checkpoint (student, critic, average, both optimisers, the exported
student, state and manifest), the student saved at the end, and the log but for its times and memory. Temporary files
must be gone. Stopped and called again, it goes on with the case it was in; results are in OUT/CASE/result.json, and
where each kill came in OUT/CASE/kills.jsonl.

Processes are forked off this one, which has imported everything and read the teacher: a start costs a fraction of a
second.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "models"))

PROMPTS = ["a frog", "a red apple on a blue background", "a 3d pizza"]
AIMS = ("any", "checkpoint", "any", "export", "any", "evaluate", "start")
IMPORTED = ("torch._dynamo", "peft.tuners.lora", "fewstep.evaluation.run")
"""What a start would spend time on, beside what loading the teacher imports."""
_PROCESSES = multiprocessing.get_context("fork")
_PATIENCE = 300.0
"""Seconds without a word after which a run hangs."""


def loaded(folder: Path) -> Any:
    """A pipeline of random weights, made in `folder` if it is not there, as a teacher."""
    from tiny_pixart import build_pipeline

    from fewstep.api import load_teacher
    from fewstep.commands.common import quiet

    quiet()
    for name in IMPORTED:
        import_module(name)
    if not folder.exists():
        unfinished = folder.with_name(f"{folder.name}-unfinished")
        build_pipeline().save_pretrained(unfinished)
        unfinished.rename(folder)
    return load_teacher(folder)


def child(
    teacher: Any, out: Path, roles: str, iterations: int, errors: Path, meet: str, size: int, rank: int, say: Any
) -> None:
    """One process of the run. The first one says (phase, 0) and ("", 0, phase) around phases, ("iteration", n)."""
    with errors.open("a") as file:
        os.dup2(file.fileno(), 2)
    import torch
    import torch.distributed as dist

    from fewstep import api
    from fewstep.live import LiveStudent
    from fewstep.methods import preset
    from fewstep.training import checkpoint
    from fewstep.training.loop import Hooks
    from fewstep.training.options import TrainOptions

    torch.set_num_threads(1)
    if size > 1:
        dist.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=size)
    options = preset("tdm")
    seats: list[Any] = []
    build = api.build_roles

    def noted(*arguments: Any, **settings: Any) -> Any:
        seats.append(build(*arguments, **settings))
        return seats[-1]

    api.build_roles = noted

    def told(phase: str, act: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **settings: Any) -> Any:
            if say is None:
                return act(*arguments, **settings)
            say.send((phase, 0))
            result = act(*arguments, **settings)
            say.send(("", 0, phase))
            return result

        return wrapped

    checkpoint.save = told("checkpoint", checkpoint.save)
    api.export = told("export", api.export)

    def evaluate(iteration: int) -> dict[str, float]:
        latents = LiveStudent(seats[0], options).latents(PROMPTS, [1, 2, 3])
        return {"spread": float(latents.std())}

    def save(iteration: int, folder: Path) -> None:
        api.export(seats[0], options, folder / "student", {"iterations": iteration})

    def log(iteration: int, record: Any) -> None:
        say.send(("iteration", iteration))

    settings = TrainOptions(
        iterations=iterations, batch=4, log_every=1, checkpoint_every=3, evaluate_every=2, keep=2, warmup=2,
        tensorboard=False, ema_decay=0.9,
    )  # fmt: skip
    hooks = Hooks(evaluate=told("evaluate", evaluate), save=save, log=log)
    try:
        api.distill(
            teacher, options, out=out, prompts=PROMPTS, train_options=settings, hooks=hooks, resume=True,
            roles=api.RoleOptions(roles="copies") if roles == "copies" else api.RoleOptions(roles=roles, rank=4),
            text=api.TextOptions(text_encoder="keep"),
        )  # fmt: skip
    finally:
        if size > 1:
            dist.destroy_process_group()


class Attempt:
    """The processes of one start of a run, and what the first of them says."""

    def __init__(self, teacher: Any, home: Path, name: str, roles: str, iterations: int, size: int) -> None:
        meet = home.absolute() / "meet"  # of this start's processes
        meet.unlink(missing_ok=True)
        told = (teacher, home / name, roles, iterations, home / f"{name}.txt", str(meet), size)
        others = [_PROCESSES.Process(target=child, args=(*told, rank, None)) for rank in range(1, size)]
        for process in others:
            process.start()
        self._said, say = _PROCESSES.Pipe(duplex=False)  # after the others, who would keep it open
        first = _PROCESSES.Process(target=child, args=(*told, 0, say))
        first.start()
        say.close()
        self.processes = [first, *others]
        self.phases: list[str] = []
        """Where it was when it was last heard of, the innermost last."""
        self.reached = 0
        self.saved = False

    def listen(self) -> tuple[Any, ...] | None:
        """The next word, None if the run is over."""
        if not self._said.poll(_PATIENCE):
            raise SystemExit(f"a run said nothing for {_PATIENCE:g} s: it hangs")
        try:
            word: tuple[Any, ...] = self._said.recv()
        except EOFError:
            return None
        if word[0] == "iteration":
            self.reached = word[1]
        elif word[0]:
            self.phases.append(word[0])
        else:
            self.phases.pop()
            self.saved = word[2] == "export" and not self.phases
        return word

    def kill(self, draw: random.Random) -> dict[str, Any] | None:
        """SIGKILL to all, in any order, or to one of several; where it came, None if the run was over before."""
        victims = draw.sample(self.processes, draw.randint(1, len(self.processes)))
        for process in victims:
            process.kill()
        while self.processes[0] in victims and self.listen() is not None:
            pass  # what it had said before it died
        between = "end" if self.saved else "iteration" if self.reached else "start"
        moment = "/".join(self.phases) or between
        while self.listen() is not None:
            pass  # what it still says if it has survived the other one
        ended = self.codes()
        if any(ended) and -signal.SIGKILL not in ended:
            raise SystemExit(f"a start ended by itself with {ended}, see what it wrote")
        if not any(ended):
            return None
        return {"moment": moment, "reached": self.reached, "killed": len(victims)}

    def end(self) -> bool:
        """Waits for the end; whether it was a good one."""
        while self.listen() is not None:
            pass
        return not any(self.codes())

    def codes(self) -> list[int | None]:
        for process in self.processes:
            process.join(_PATIENCE)
        codes = [process.exitcode for process in self.processes]
        if None in codes:
            raise SystemExit(f"a process whose partner was killed did not end in {_PATIENCE:g} s: it hangs")
        return codes


def measured(attempt: Attempt) -> dict[str, float]:
    """Mean seconds of each phase of an undisturbed run, of an iteration with all that is in it, and of the start."""
    spent: dict[str, list[float]] = {}
    begins: list[float] = []
    last = time.perf_counter()
    while (word := attempt.listen()) is not None:
        now = time.perf_counter()
        if word[0] == "iteration":
            spent.setdefault("any" if attempt.reached > 1 else "start", []).append(now - last)
            last = now
        elif word[0]:
            begins.append(now)
        else:
            spent.setdefault(word[2], []).append(now - begins.pop())
    if any(attempt.codes()):
        raise SystemExit("the undisturbed run failed")
    means = {phase: sum(values) / len(values) for phase, values in spent.items()}
    return {**means, "checkpoint": (means["checkpoint"] - means["export"]) / 2}  # before and after its export


def kill_at(
    attempt: Attempt, place: int | None, aim: str, seconds: dict[str, float], draw: random.Random
) -> dict[str, Any] | None:
    """Waits for the run to pass iteration `place` and begin the phase `aim`, and kills it a random while later.

    Without a place, the phase is the one after all iterations. Returns where it came, None if the run had ended.
    """
    while aim != "start" and (word := attempt.listen()) is not None:
        if place is None:
            there = word[0] == aim and len(attempt.phases) == 1
        elif aim == "checkpoint":  # its own files: what comes before the export, and what comes after
            there = attempt.phases == ["checkpoint"] and attempt.reached >= place
        else:
            there = word[0] == ("iteration" if aim == "any" else aim) and attempt.reached >= place
        if there and (aim != "checkpoint" or draw.random() < 0.5):
            break
    time.sleep(draw.uniform(0, seconds[aim]))
    return attempt.kill(draw)


def outcome(out: Path, iterations: int) -> dict[str, bytes]:
    """All that has to be the same, by name."""
    roots = {"checkpoint": out / "checkpoints" / f"{iterations:06d}", "student": out / "student", "lora": out / "lora"}
    found = {
        f"{name}/{path.relative_to(root)}": path.read_bytes()
        for name, root in roots.items()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    kept = [{k: v for k, v in line.items() if not k.startswith(("time/", "memory/"))} for line in lines]
    return {**found, "log": "\n".join(json.dumps(line) for line in kept).encode()}


def left_over(out: Path) -> list[str]:
    """Temporary files of any kind."""
    return sorted(
        str(path.relative_to(out)) for path in out.rglob(".*") if path.name != ".lock" and path.name != ".gitattributes"
    )


def case(args: argparse.Namespace, teacher: Any, roles: str, size: int) -> dict[str, Any]:
    """Undisturbed run, killed run, comparison."""
    home = args.out / f"{roles}-{size}"
    home.mkdir(parents=True, exist_ok=True)
    record = home / "result.json"
    if record.exists():
        return json.loads(record.read_text())
    run, more = (teacher, home), (roles, args.iterations, size)
    timed, past = home / "seconds.json", home / "kills.jsonl"
    if not timed.exists():
        shutil.rmtree(home / "undisturbed", ignore_errors=True)
        timed.write_text(json.dumps(measured(Attempt(*run, "undisturbed", *more))))
    seconds = json.loads(timed.read_text())
    landed = [json.loads(line) for line in past.read_text().splitlines()] if past.exists() else []
    draw = random.Random(f"{args.seed} {home.name} {len(landed)}")
    at_end = args.kills // 10
    somewhere = random.Random(f"{args.seed} {home.name}").choices(range(args.iterations - 4), k=args.kills - at_end)
    places = [*sorted(somewhere), *[None] * at_end]
    for number, place in enumerate(places[len(landed) :], start=len(landed)):
        aim = "export" if place is None else AIMS[number % len(AIMS)]
        came = kill_at(Attempt(*run, "killed", *more), place, aim, seconds, draw)
        landed.append({"place": place, "aim": aim, **(came or {"moment": "over"})})
        with past.open("a") as file:
            file.write(json.dumps(landed[-1]) + "\n")
        print(f"{home.name} {number + 1}/{args.kills}: {landed[-1]}", file=sys.stderr, flush=True)
    if not Attempt(*run, "killed", *more).end():
        raise SystemExit(f"{home.name}: the last start failed, see {home / 'killed.txt'}")
    one, other = (outcome(home / name, args.iterations) for name in ("undisturbed", "killed"))
    moments = Counter(kill["moment"] for kill in landed)
    result = {
        "case": home.name,
        "iterations": args.iterations,
        "kills": moments.total() - moments["over"],
        "of one process alone": sum(kill.get("killed", size) < size for kill in landed),
        "by moment": dict(sorted(moments.items())),
        "files": len(one),
        "bytes": sum(map(len, one.values())),
        "different": sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name)),
        "left over": left_over(home / "killed"),
    }
    record.write_text(json.dumps(result, indent=1) + "\n")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/faults"))
    parser.add_argument("--kills", type=int, default=110)
    parser.add_argument("--iterations", type=int, default=60)
    parser.add_argument("--roles", nargs="+", default=["adapters", "copies"], choices=["adapters", "copies"])
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 2], choices=[1, 2])
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    teacher = loaded(args.out / "teacher")
    results = [case(args, teacher, roles, size) for size in args.processes for roles in args.roles]
    for result in results:
        print(json.dumps(result))
    if any(result["different"] or result["left over"] for result in results):
        raise SystemExit("a killed run ended otherwise than the undisturbed one")


if __name__ == "__main__":
    main()
