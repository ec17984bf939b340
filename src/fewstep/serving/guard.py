"""What every request passes before the application: is the key right, is the body small and quick enough."""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import Callable
from hashlib import sha256

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fewstep.serving.wire import Refusal

CLIENT_LEFT = 499
"""Counted for a request whose client left before its answer, as nginx does."""


class Guard:
    """ASGI middleware; counts every request as well.

    Args:
        app: the application.
        key: that callers send as `Authorization: Bearer KEY`; None for no key.
        body_limit: bytes of a body at most, whether announced (Content-Length) or sent in chunks.
        body_seconds: in which a body has to arrive.
        is_open: paths that need no key.
        observe: told the route, status and seconds of every request.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        key: str | None,
        body_limit: int,
        body_seconds: float,
        is_open: Callable[[str], bool],
        observe: Callable[[str, int, float], None],
    ) -> None:
        self._app, self._limit, self._seconds = app, body_limit, body_seconds
        self._is_open, self._observe = is_open, observe
        self._key = None if key is None else sha256(key.encode()).digest()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = time.perf_counter(), CLIENT_LEFT

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._admit(scope, receive, watched)
        except Refusal as refusal:
            await refusal.response()(scope, receive, watched)
        except Exception:
            status = 500
            raise
        finally:
            route = getattr(scope.get("route"), "path", "other")
            self._observe(route, status, time.perf_counter() - started)

    async def _admit(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._key is not None and not self._is_open(scope["path"]) and not self._knows_key(scope):
            message = "found no API key or a wrong one, expected `Authorization: Bearer KEY`, fix: send the right key"
            headers = {"WWW-Authenticate": "Bearer", "Connection": "close"}
            raise Refusal(401, message, "invalid_api_key", headers=headers)
        try:
            body = await asyncio.wait_for(self._body(scope, receive), self._seconds)
        except asyncio.TimeoutError:
            message = f"found a body that took more than {self._seconds:g} s, expected it at once, fix: send it again"
            raise Refusal(408, message, "timeout", headers={"Connection": "close"}) from None
        if body is None:
            return  # the client left
        pending: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return pending.pop() if pending else await receive()

        await self._app(scope, replay, send)

    def _knows_key(self, scope: Scope) -> bool:
        """Compared by digest in constant time, so that neither key nor length leaks."""
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        scheme, _, token = given[0].partition(b" ") if len(given) == 1 else (b"", b"", b"")
        right = hmac.compare_digest(sha256(token.strip()).digest(), self._key or b"")
        return right and scheme.lower() == b"bearer"

    async def _body(self, scope: Scope, receive: Receive) -> bytes | None:
        """The whole body, given up as soon as it is known to be too large; None if the client left."""
        announced = [value for name, value in scope["headers"] if name == b"content-length"]
        if announced and int(announced[0]) > self._limit:
            raise self._too_large()
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            if len(body) > self._limit:
                raise self._too_large()
            if not message.get("more_body", False):
                return bytes(body)

    def _too_large(self) -> Refusal:
        message = f"found a body above {self._limit} bytes, expected no more, fix: shorten the prompt"
        return Refusal(413, message, "request_too_large", headers={"Connection": "close"})
