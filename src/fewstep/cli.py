"""The command `fewstep`: a thin layer over the public names. Each command is a module of `fewstep.commands`.

Nothing heavy is imported until a command runs, so that `fewstep --help` answers at once.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from types import FrameType

COMMANDS = {
    "distill": "distil a teacher into a few-step student",
    "reproduce": "make a run again from its run.json and compare, to the bit",
    "cache": "encode prompts to disk ahead of distillations",
    "plan": "memory, time and cost of a run before it is launched, and what to change if it does not fit",
    "sample": "draw pictures with a student or the teacher",
    "stream": "a film without end by a causal student, written as it comes; also by several processes",
    "serve": "a student behind the OpenAI images API, over HTTP",
    "studio": "draw with students and watch runs, in a browser",
    "evaluate": "quality against network calls, relative to the teacher, with intervals",
    "export": "a student as a diffusers pipeline, a LoRA for diffusers or ComfyUI, or merged weights",
    "compare": "one page that puts teachers and students side by side",
    "msd": "train one of several students, each for a part of the prompts",
    "methods": "the methods: paper, what they need, network forwards per iteration",
    "backbones": "the families of teachers: adapters, pipelines, and what each is distilled with unless told",
    "teacher": "build, sample and measure the embedded teacher",
    "check": "run the known answers and print the table",
    "league": "all methods at an equal budget of network forwards, in tables",
    "demo": "the whole promise in minutes: distil the embedded teacher and compare",
}


def usage() -> str:
    """What `fewstep --help` prints."""
    rows = "\n".join(f"  {name:<10} {what}" for name, what in COMMANDS.items())
    return (
        "usage: fewstep COMMAND [OPTIONS]\n\n"
        "Distil diffusion and flow models into students that need 1-8 network calls.\n\n"
        f"commands:\n{rows}\n\n`fewstep COMMAND --help` lists the options of a command."
    )


def main(arguments: list[str] | None = None) -> None:
    """Run a command; exits with 2 and one paragraph on bad input."""
    words = sys.argv[1:] if arguments is None else arguments
    if not words or words[0] in ("-h", "--help", "help"):
        print(usage())
        return
    if words[0] == "--version":
        from fewstep import __version__

        print(__version__)
        return
    if words[0] not in COMMANDS:
        _fail(f"found command {words[0]!r}, expected one of {', '.join(COMMANDS)}, fix: see `fewstep --help`")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from fewstep.errors import FewstepError

    try:
        with _sigterm_raises():
            import_module(f"fewstep.commands.{words[0]}").main(words[1:])
    except FewstepError as error:
        _fail(str(error))
    except OSError as error:
        _fail(
            f"found {str(error)[:300]} ({type(error).__name__}), expected files and folders that can be read and "
            "written, fix: check the paths and their permissions"
        )
    except KeyboardInterrupt as stopped:
        print("fewstep: stopped; the same command goes on (--resume for a run)", file=sys.stderr)
        raise SystemExit(143 if isinstance(stopped, _Terminated) else 130) from None
    except (MemoryError, RuntimeError) as error:
        if not _out_of_memory(error):
            raise
        _fail(
            f"found no memory left ({str(error)[:200]}), expected the run to fit, fix: `fewstep plan` says what fits; "
            "lower --batch or --microbatch, or take --checkpointing; a run goes on with --resume"
        )


class _Terminated(KeyboardInterrupt):
    """SIGTERM came, outside of training and serving, which end in ways of their own."""


@contextmanager
def _sigterm_raises() -> Iterator[None]:
    """SIGTERM is `_Terminated`, so that what is half-written is deleted and it is said how to go on.

    Not in torchrun's processes: one that waits for a message would not end of it, as it does of the signal itself.
    """

    def terminated(number: int, frame: FrameType | None) -> None:
        raise _Terminated

    if "RANK" in os.environ or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, terminated)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _out_of_memory(error: BaseException) -> bool:
    """Torch's error for a GPU is a class of its own, that for the processor one of its general ones."""
    named = type(error).__name__ in ("MemoryError", "OutOfMemoryError")
    return named or "DefaultCPUAllocator: can't allocate" in str(error)


def _fail(message: str) -> None:
    print(f"fewstep: {message}", file=sys.stderr)
    raise SystemExit(2)
