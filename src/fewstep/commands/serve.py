"""`fewstep serve`: a student behind the OpenAI images API."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

from fewstep.commands.common import choose_device, parse
from fewstep.errors import FewstepError
from fewstep.models.student import load_student
from fewstep.serving.limits import Limits


@dataclass(kw_only=True)
class Serve:
    """Serve a student over HTTP as the OpenAI images API (docs/serving.md); needs the extra `serve`."""

    student: Path
    """A student's folder."""
    name: str = "fewstep"
    """The model's name in requests."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 for all of this machine's."""
    port: int = 8000
    """Port to listen on; 0 for any that is free."""
    key_file: Path | None = None
    """File with the API key that callers must send; unless told, the environment's FEWSTEP_API_KEY; else none."""
    public_url: str | None = None
    """What answers by URL begin with, behind a proxy; unless told, the address that a request came to."""
    limits: Limits = field(default_factory=Limits)
    device: str = "auto"
    """`auto`, `cpu`, `cuda`, ..."""


def main(arguments: list[str]) -> None:
    """Parse, load, serve; returns after SIGTERM or Ctrl-C, when all that was taken is answered."""
    args = parse(Serve, "serve", arguments)
    try:
        from fewstep.serving.app import build_app
        from fewstep.serving.served import served
        from fewstep.serving.server import KEY_VARIABLE, bind, is_loopback, read_key, run
    except ImportError as error:
        raise FewstepError(
            f"found no {error.name}, expected FastAPI, uvicorn and prometheus-client, fix: pip install 'fewstep[serve]'"
        ) from error
    args.limits.validate()
    key = read_key(args.key_file)
    bound = bind(args.host, args.port)
    model = served(load_student(args.student, device=choose_device(args.device)), args.name)
    app = build_app(model, args.limits, key=key, public_url=args.public_url)
    if key is None and not is_loopback(args.host):
        print(
            f"fewstep: warning: {args.host} can be reached from other machines and there is no API key: anybody can "
            f"draw; set {KEY_VARIABLE} or pass --key-file",
            file=sys.stderr,
        )
    host = f"[{args.host}]" if ":" in args.host else args.host
    steps = ", ".join(map(str, model.steps))
    greeting = f"serving {model.name} ({model.size}, steps {steps}) at http://{host}:{bound.getsockname()[1]}"
    run(app, bound, args.limits.timeout, greeting)
    print("stopped: all that was taken is answered", flush=True)
