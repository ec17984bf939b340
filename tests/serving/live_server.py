"""A student that needs no network, whose picture of (prompt, seed, steps) has one colour; and ways to ask for it."""

from __future__ import annotations

import hashlib
import http.client
import io
import json
import socket
import time
from collections.abc import Callable, Sequence
from typing import Any
from urllib.parse import urlsplit
from urllib.request import urlopen

import torch
from PIL import Image
from torch import Tensor

SIZE = (24, 16)
KEY = "a-key-of-enough-letters"
Serve = Callable[..., str]


def colour(prompt: str, seed: int, steps: int) -> tuple[int, ...]:
    """Red, green and blue."""
    return tuple(hashlib.sha256(f"{prompt} {seed} {steps}".encode()).digest()[:3])


def draw(prompts: Sequence[str], seeds: Sequence[int], steps: int) -> list[Tensor]:
    """(3, H, W) each; fails for a prompt that says so."""
    if any("fail" in prompt for prompt in prompts):
        raise RuntimeError("the secret reason")
    colours = [torch.tensor(colour(p, s, steps), dtype=torch.uint8) for p, s in zip(prompts, seeds, strict=True)]
    return [channels[:, None, None].expand(3, SIZE[1], SIZE[0]) for channels in colours]


def ask(url: str, body: Any, path: str = "/v1/images/generations", **headers: str) -> tuple[int, Any, dict[str, str]]:
    """Status, parsed answer and headers of a POST."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=120)
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    connection.request("POST", path, data, {"Content-Type": "application/json", **headers})
    answer = connection.getresponse()
    return answer.status, json.loads(answer.read()), {k.lower(): v for k, v in answer.getheaders()}


def connected(url: str) -> socket.socket:
    return socket.create_connection((urlsplit(url).hostname, urlsplit(url).port), 30)


def metric(url: str, *lines: str) -> float:
    """The sum of the metrics that begin so."""
    text = urlopen(f"{url}/metrics", timeout=30).read().decode()
    return sum(float(row.rpartition(" ")[2]) for row in text.splitlines() if row.startswith(lines))


def wait_for(met: Any) -> None:
    """Until `met()`; fails after two minutes."""
    end = time.monotonic() + 120
    while not met():
        assert time.monotonic() < end
        time.sleep(0.01)


def opened(content: bytes, size: tuple[int, int] = SIZE) -> Image.Image:
    """The picture of a file."""
    picture = Image.open(io.BytesIO(content))
    assert picture.size == size
    return picture
