"""A live server of a student that needs no network: the picture of (prompt, seed, steps) has one colour."""

from __future__ import annotations

import hashlib
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.serving.app import Served, build_app
from fewstep.serving.limits import Limits
from fewstep.serving.server import bind, make_server

sys.path.insert(0, str(Path(__file__).parent))
SIZE = (24, 16)


def colour(prompt: str, seed: int, steps: int) -> tuple[int, ...]:
    return tuple(hashlib.sha256(f"{prompt} {seed} {steps}".encode()).digest()[:3])


def draw(prompts: Sequence[str], seeds: Sequence[int], steps: int) -> list[Tensor]:
    """Fails for a prompt that says so, and waits where told to."""
    if any("fail" in prompt for prompt in prompts):
        raise RuntimeError("the secret reason")
    time.sleep(0.5 * any("slow" in prompt for prompt in prompts))
    colours = [torch.tensor(colour(p, s, steps), dtype=torch.uint8) for p, s in zip(prompts, seeds, strict=True)]
    return [channels[:, None, None].expand(3, SIZE[1], SIZE[0]) for channels in colours]


Serve = Callable[..., str]


@pytest.fixture(scope="module")
def serve() -> Iterator[Serve]:
    """serve(draw, key=..., public_url=..., **limits) -> the address of a server that lives as long as the module."""
    running: list[tuple[Any, threading.Thread]] = []

    def start(
        make: Callable[..., Any] = draw, *, key: str | None = None, public_url: str | None = None, **limits: Any
    ) -> str:
        model = Served("tiny", (1, 4), *SIZE, batch=16, draw=make)
        server = make_server(build_app(model, Limits(**limits), key=key, public_url=public_url), grace=5)
        bound = bind("127.0.0.1", 0)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
        thread.start()
        running.append((server, thread))
        while not server.started:
            time.sleep(0.01)
        return f"http://127.0.0.1:{bound.getsockname()[1]}"

    yield start
    for server, _ in running:
        server.should_exit = True
    for _, thread in running:
        thread.join(20)
        assert not thread.is_alive()
