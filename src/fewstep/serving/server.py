"""Running the application: its socket, its key, and an end that loses nothing."""

from __future__ import annotations

import ipaddress
import os
import signal
import socket
from pathlib import Path

import uvicorn
from starlette.types import ASGIApp

from fewstep.errors import FewstepError

KEY_VARIABLE = "FEWSTEP_API_KEY"
_SHORTEST_KEY = 16
_CONNECTIONS = 1024


def read_key(path: Path | None) -> str | None:
    """The API key from a file, else from the environment; None if there is neither.

    Raises:
        FewstepError: no readable file, or a key that is short or has characters no header takes. It is never repeated.
    """
    source = KEY_VARIABLE if path is None else str(path)
    try:
        text = os.environ.get(KEY_VARIABLE) if path is None else path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise FewstepError(f"found no readable key file {path}, expected one line of text, fix: write it") from error
    if text is None:
        return None
    key = text.strip()
    if len(key) < _SHORTEST_KEY or not all("!" <= letter <= "~" for letter in key):
        raise FewstepError(
            f"found a key in {source} that is short or has spaces or letters beyond ASCII, expected {_SHORTEST_KEY} "
            "characters or more, fix: make one with `openssl rand -hex 32`"
        )
    return key


def is_loopback(host: str) -> bool:
    """Whether only this machine can connect to `host`."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def bind(host: str, port: int) -> socket.socket:
    """A socket bound to an address, which nobody can connect to before `run`.

    Args:
        host: a name or an IPv4 or IPv6 address.
        port: 0 for any that is free.

    Raises:
        FewstepError: the address cannot be used.
    """
    bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except (
        OSError,
        OverflowError,
        UnicodeError,
        TypeError,
    ) as error:  # a name that cannot be encoded is one of the last
        bound.close()
        raise FewstepError(
            f"found {host!r}, port {port}, which cannot be listened to ({error}), expected a free address of this "
            "machine, fix: choose another --port or --host"
        ) from error
    return bound


def make_server(app: ASGIApp, grace: float) -> uvicorn.Server:
    """uvicorn as we run it: `grace` is the seconds that requests have to finish when it ends, then they are dropped."""
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, server_header=False, proxy_headers=False, ws="none",
        limit_concurrency=_CONNECTIONS, timeout_graceful_shutdown=int(grace) + 1,
    )  # fmt: skip
    return uvicorn.Server(config)


def run(app: ASGIApp, bound: socket.socket, grace: float, greeting: str) -> None:
    """Serve until SIGTERM or SIGINT; then take no more connections, finish what was taken, and return.

    Args:
        app: the application.
        bound: what `bind` returned; closed at the end.
        grace: see `make_server`.
        greeting: printed when the first connection can be made.
    """
    server = make_server(app, grace)
    for number in (signal.SIGINT, signal.SIGTERM):
        # uvicorn raises a signal once more when it has finished; left to Python, that would end us with an error.
        signal.signal(number, server.handle_exit)
    bound.listen(_CONNECTIONS)
    print(greeting, flush=True)
    server.run(sockets=[bound])
