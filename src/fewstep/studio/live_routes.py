"""The page on which a film follows the mouse, and what it asks: one film at a time, as server-sent events."""

from __future__ import annotations

import json
import threading
from base64 import b64encode
from collections.abc import Iterator
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Query
from pydantic import BaseModel, Field
from starlette.responses import HTMLResponse, Response, StreamingResponse

from fewstep.errors import FewstepError
from fewstep.studio.desk import LONGEST_PROMPT, Desk
from fewstep.studio.live import Live, Made, Told

_PATIENCE = 2.0
"""Seconds without a chunk after which a line is sent, so that a page that has gone away is noticed."""


class Pointer(BaseModel):
    """What the page says, see `fewstep.studio.live.Told`."""

    film: str
    x: float | None = Field(None, ge=0, le=1)
    y: float | None = Field(None, ge=0, le=1)
    loud: float | None = Field(None, ge=0, le=1)
    at: float = 0.0
    shown: int = Field(0, ge=0)
    paused: bool = False


class Stage:
    """The film that is being made, if there is one; the next one takes its place."""

    def __init__(self, desk: Desk) -> None:
        self._desk, self._lock = desk, threading.Lock()
        self._now: tuple[str, Live] | None = None

    def events(self, film: str, student: str, prompt: str, seed: int) -> Iterator[str]:
        """Chunks as events, or what is wrong as one."""
        live: Live | None = None
        try:
            live = Live(self._desk.streamer(student), prompt, seed, self._desk.lock)
            self._begin(film, live)
            for made in live.chunks(_PATIENCE):
                yield ": waiting\n\n" if made is None else _event("chunk", _record(made))
        except FewstepError as error:
            yield _event("problem", {"message": str(error)})
        finally:
            if live is not None:
                live.stop()

    def tell(self, pointer: Pointer) -> bool:
        """Whether that film is still being made."""
        with self._lock:
            now = self._now
        if now is None or now[0] != pointer.film:
            return False
        now[1].tell(Told(**pointer.model_dump(exclude={"film"})))
        return True

    def _begin(self, film: str, live: Live) -> None:
        with self._lock:
            before, self._now = self._now, (film, live)
        if before is not None:
            before[1].stop()


def live_routes(app: FastAPI, desk: Desk) -> None:
    """Add the page at /live and what it asks to `app`."""
    stage = Stage(desk)
    page = files("fewstep").joinpath("assets/studio/live.html").read_text(encoding="utf-8")

    @app.get("/live")
    def shown() -> Response:
        return HTMLResponse(page)

    @app.get("/live/students")
    def students() -> list[str]:
        return desk.streamers()

    @app.get("/live/film")
    def film(
        film: str = Query(max_length=64),
        student: str = Query(),
        prompt: str = Query(max_length=LONGEST_PROMPT),
        seed: int = Query(0, ge=0, lt=2**32),
    ) -> Response:
        told = {"cache-control": "no-store"}
        return StreamingResponse(
            stage.events(film, student, prompt, seed), media_type="text/event-stream", headers=told
        )

    @app.post("/live/pointer")
    def pointer(pointer: Pointer) -> Response:
        return Response(status_code=204 if stage.tell(pointer) else 410)


def _record(made: Made) -> dict[str, Any]:
    frames = made.frames.permute(0, 2, 3, 1).contiguous()
    return {
        "number": made.number,
        "at": made.at,
        "seconds": round(made.seconds, 4),
        "height": frames.shape[1],
        "width": frames.shape[2],
        "frames": [b64encode(frame.numpy().tobytes()).decode() for frame in frames],
    }


def _event(name: str, data: dict[str, Any]) -> str:
    return f"event: {name}\ndata: {json.dumps(data)}\n\n"
