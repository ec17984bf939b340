"""What bounds a server: size and speed of bodies, the queue, time-outs, clients that leave; and a crowd."""

from __future__ import annotations

import base64
import http.client
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

from live_server import Serve, ask, colour, connected, draw, metric, opened, wait_for  # type: ignore[import-not-found]


def test_large_bodies_are_refused_announced_or_not(serve: Serve) -> None:
    url = serve(body=2000)
    head = b"POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    chunk = b"400\r\n" + b" " * 1024 + b"\r\n"
    for more in (b"Content-Length: 1000000\r\n\r\n", b"Transfer-Encoding: chunked\r\n\r\n" + 2 * chunk):
        with connected(url) as raw:
            raw.sendall(head + more)  # and no more: the answer must not wait for the rest
            assert b" 413 " in raw.recv(1000)
    assert ask(url, {"prompt": "x" * 1900})[0] == 200


def test_slow_bodies_are_refused(serve: Serve) -> None:
    url = serve(body_seconds=0.2)
    with connected(url) as raw:
        raw.sendall(b"POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{")
        assert b" 408 " in raw.recv(1000)


class Held:
    """Draws when it is let."""

    def __init__(self) -> None:
        self.gate, self.entered, self.drawn = threading.Event(), threading.Event(), []  # type: ignore[var-annotated]

    def __call__(self, prompts: Any, seeds: Any, steps: int) -> Any:
        self.entered.set()
        assert self.gate.wait(120)
        self.drawn += prompts
        return draw(prompts, seeds, steps)


def test_a_full_queue_and_a_client_that_leaves(serve: Serve) -> None:
    held = Held()
    url = serve(held, queue=10, batch=1)
    with ThreadPoolExecutor(1) as other:
        running = other.submit(ask, url, {"prompt": "running"})
        assert held.entered.wait(60)
        with connected(url) as raw:
            body = json.dumps({"prompt": "leaving", "n": 10}).encode()
            raw.sendall(
                b"POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
            )
            wait_for(lambda: metric(url, "fewstep_waiting_pictures") == 10)
            status, answer, headers = ask(url, {"prompt": "refused"})
            assert (status, answer["error"]["type"]) == (429, "rate_limit_error")
            assert int(headers["retry-after"]) >= 1
        wait_for(lambda: metric(url, "fewstep_waiting_pictures") == 0)
        held.gate.set()
        assert running.result(60)[0] == 200
    assert held.drawn == ["running"]
    left = 'fewstep_requests_total{route="/v1/images/generations",status="499"}'
    wait_for(lambda: metric(url, left) == 1)


def test_a_request_that_takes_too_long_leaves_the_queue(serve: Serve) -> None:
    held = Held()
    url = serve(held, batch=1, timeout=0.3, linger=0.0)
    with ThreadPoolExecutor(1) as other:
        running = other.submit(ask, url, {"prompt": "running"})
        assert held.entered.wait(60)
        status, answer, _ = ask(url, {"prompt": "late", "n": 3})
        assert (status, answer["error"]["code"]) == (504, "timeout")
        assert metric(url, "fewstep_waiting_pictures") == 0
        assert running.result(60)[0] == 504
    held.gate.set()
    wait_for(lambda: metric(url, "fewstep_batch_size_count") == 1)
    assert held.drawn == ["running"]


def test_many_clients_at_once_lose_nothing(serve: Serve) -> None:
    url = serve()
    local = threading.local()

    def one(number: int) -> None:
        if not hasattr(local, "connection"):
            local.connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=60)
        body = {"prompt": f"p{number}", "seed": number, "steps": (1, 4)[number % 2], "response_format": "b64_json"}
        local.connection.request(
            "POST", "/v1/images/generations", json.dumps(body), {"Content-Type": "application/json"}
        )
        answer = local.connection.getresponse()
        content = json.loads(answer.read())
        assert answer.status == 200, content
        picture = opened(base64.b64decode(content["data"][0]["b64_json"]))
        assert picture.getpixel((5, 5)) == colour(f"p{number}", number, (1, 4)[number % 2])

    with ThreadPoolExecutor(16) as clients:
        assert len(list(clients.map(one, range(160)))) == 160
    assert metric(url, "fewstep_batch_size_sum") == 160
    assert metric(url, "fewstep_batch_size_count") < 160  # some were drawn together
