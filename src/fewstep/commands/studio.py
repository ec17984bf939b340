"""`fewstep studio`: a web page to draw with students and to watch runs."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from fewstep.commands.common import choose_device, parse
from fewstep.errors import FewstepError


@dataclass(kw_only=True)
class Studio:
    """Draw with students beside their teacher, watch runs, in a browser (docs/studio.md); needs the extra `studio`."""

    student: tuple[Path, ...] = ()
    """Folders of students to draw with, beside those of the runs."""
    teacher: str | None = None
    """Beside which students are put: `emoji`, a pipeline folder or a Hub id; unless told, the one a student names."""
    runs: Path = Path("runs")
    """Folder whose runs are shown; it need not exist."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 for all of this machine's."""
    port: int = 7860
    """Port to listen on; 0 for any that is free."""
    refresh: float = 5.0
    """Seconds between two looks at the runs, 1 or more."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda`, ..."""


def main(arguments: list[str]) -> None:
    """Parse and serve; returns after SIGTERM or Ctrl-C."""
    args = parse(Studio, "studio", arguments)
    if args.refresh < 1:
        raise FewstepError(f"found refresh = {args.refresh}, expected 1 or more seconds, fix: change --refresh")
    try:
        from fewstep.serving.server import bind, is_loopback, run
        from fewstep.studio.app import build_app
    except ImportError as error:
        raise FewstepError(f"found no {error.name}, expected gradio, fix: pip install 'fewstep[studio]'") from error
    from fewstep.studio.desk import Desk
    from fewstep.studio.runs import RunsFolder

    runs = RunsFolder(args.runs)
    given = {str(folder): folder for folder in args.student}
    desk = Desk(lambda: given | runs.students(), args.teacher, choose_device(args.device))
    for name in given:
        desk.steps(name)  # refuses what is no student
    app = build_app(desk, runs, args.refresh)
    bound = bind(args.host, args.port)
    if not is_loopback(args.host):
        print(
            f"fewstep: warning: {args.host} can be reached from other machines and the studio asks for no password: "
            f"anybody can draw and see the runs in {args.runs}; over SSH, `ssh -L` needs no --host",
            file=sys.stderr,
        )
    host = f"[{args.host}]" if ":" in args.host else args.host
    run(app, bound, 1, f"studio at http://{host}:{bound.getsockname()[1]}")
