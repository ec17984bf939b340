"""Live servers for the tests of this folder, which can import `live_server`."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from live_server import SIZE, Serve, draw  # type: ignore[import-not-found]  # noqa: E402

from fewstep.serving.app import build_app  # noqa: E402
from fewstep.serving.limits import Limits  # noqa: E402
from fewstep.serving.served import Served  # noqa: E402
from fewstep.serving.server import bind, make_server  # noqa: E402


@pytest.fixture(scope="module")
def serve() -> Iterator[Serve]:
    """serve(draw, key=..., public_url=..., frames=..., **limits) -> the address of a server, alive with the module."""
    running: list[tuple[Any, threading.Thread]] = []

    def start(
        make: Callable[..., Any] = draw,
        *,
        key: str | None = None,
        public_url: str | None = None,
        frames: int = 0,
        **limits: Any,
    ) -> str:
        model = Served("tiny", (1, 4), *SIZE, batch=16, draw=make, frames=frames, fps=8)
        server = make_server(build_app(model, Limits(**limits), key=key, public_url=public_url), grace=5)
        bound = bind("127.0.0.1", 0)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
        thread.start()
        running.append((server, thread))
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        return f"http://127.0.0.1:{bound.getsockname()[1]}"

    yield start
    for server, _ in running:
        server.should_exit = True
    for _, thread in running:
        thread.join(20)
        assert not thread.is_alive()
