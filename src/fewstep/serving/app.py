"""The application: the OpenAI images API over one student, with health, metrics and its own OpenAPI document."""

# Annotations stay objects here (no `from __future__`): a route's are made for the student.
import asyncio
import base64
import contextlib
import io
import math
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Sequence
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response, Security
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.security import HTTPBearer
from starlette.exceptions import HTTPException
from torch import Tensor

from fewstep.evaluation.clips import moving_bytes
from fewstep.evaluation.pictures import to_pil
from fewstep.serving.batcher import Batcher, BatchFailed, Closing, QueueFull
from fewstep.serving.guard import CLIENT_LEFT, Guard
from fewstep.serving.limits import Limits
from fewstep.serving.metrics import CONTENT_TYPE, Metrics
from fewstep.serving.served import Served
from fewstep.serving.store import PictureStore
from fewstep.serving.wire import (
    ErrorBody,
    ImageRequest,
    Images,
    ModelCard,
    ModelList,
    Picture,
    Refusal,
    State,
    refusal_of,
    request_kind,
)

T = TypeVar("T")
FILES = "/files/"
"""Where pictures answered by URL lie."""
_OPEN = ("/health", "/ready", "/openapi.json")
_ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorBody, "description": "The request, or that there are too many: see the message"},
    "5XX": {"model": ErrorBody, "description": "The server: see the message"},
}


def build_app(model: Served, limits: Limits, *, key: str | None = None, public_url: str | None = None) -> FastAPI:
    """The ASGI application; its lifespan runs the batcher, and its end waits for what was taken.

    Args:
        model: what to serve.
        limits: see there.
        key: that callers must send, for all but /health, /ready, /openapi.json and pictures' URLs; None for no key.
        public_url: what answers by URL begin with; unless told, the address that the request came to.
    """
    limits.validate()
    limits.check_room(model.width, model.height, max(1, model.frames))
    metrics = Metrics()
    store = PictureStore(limits.keep, limits.keep_megabytes * 2**20, limits.keep_seconds)
    batcher: Batcher[int, Tensor] = Batcher(
        model.draw, largest=limits.batch or model.batch, queue=limits.queue, linger=limits.linger, observe=metrics.batch
    )
    metrics.watch(batcher, store)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        drawing = asyncio.create_task(batcher.run())
        yield
        batcher.close()
        await drawing

    app = FastAPI(title="fewstep", version="1", lifespan=lifespan, docs_url=None, redoc_url=None, responses=_ERRORS)
    app.add_middleware(
        Guard, key=key, body_limit=limits.body, body_seconds=limits.body_seconds, observe=metrics.request,
        is_open=lambda path: path in _OPEN or path.startswith(FILES),
    )  # fmt: skip
    locked = [Security(HTTPBearer(auto_error=False))] if key is not None else []  # said here, checked by the guard
    _add_images(app, model, limits.timeout, batcher, store, public_url, locked)
    _add_models(app, model, locked)
    _add_state(app, batcher, metrics, locked)
    _add_errors(app)
    return app


def _add_images(
    app: FastAPI,
    model: Served,
    timeout: float,
    batcher: Batcher[int, Tensor],
    store: PictureStore,
    public_url: str | None,
    locked: list[Any],
) -> None:
    """Drawing pictures, and fetching those that were answered by URL."""
    kind = request_kind(model)

    async def make(told: ImageRequest, steps: int, seeds: list[int], form: str, fps: int) -> list[bytes]:
        samples = await batcher.submit(told.prompt, seeds, steps)
        return await asyncio.to_thread(_encoded, samples, form, fps)

    @app.post("/v1/images/generations", response_model_exclude_none=True, dependencies=locked)
    async def generate(told: kind, request: Request) -> Images:  # type: ignore[valid-type]
        """Draw `n` pictures, or videos, of `prompt`."""
        asked: Any = told
        fps = (asked.fps or model.fps) if model.frames else 0
        first = secrets.randbelow(2**32) if asked.seed is None else asked.seed
        seeds, form = [first + number for number in range(asked.n or 1)], asked.output_format or model.forms[0]
        files = await _within(timeout, make(asked, asked.steps or max(model.steps), seeds, form, fps), request)
        data = [Picture(seed=seed) for seed in seeds]
        for picture, file in zip(data, files, strict=True):
            if asked.response_format == "b64_json":
                picture.b64_json = base64.b64encode(file).decode()
            else:
                base = public_url.rstrip("/") if public_url else _address(request)
                picture.url = base + FILES + store.put(file, _media_type(form))
        more = {"frames": model.frames, "fps": fps} if model.frames else {}
        return Images(created=int(time.time()), data=data, output_format=form, size=model.size, **more)

    @app.get(
        FILES + "{name}", response_class=Response,
        responses={200: {"content": {_media_type(form): {} for form in model.forms}}},
    )  # fmt: skip
    async def fetch(name: str) -> Response:
        """A picture that was answered by URL."""
        kept = store.get(name)
        if kept is None:
            raise Refusal(404, "found no such picture, expected a URL not older than it holds, fix: draw it again")
        headers = {"Cache-Control": "private, no-store", "X-Content-Type-Options": "nosniff"}
        return Response(kept.content, media_type=kept.media_type, headers=headers)


def _add_models(app: FastAPI, model: Served, locked: list[Any]) -> None:
    """What there is to ask for."""
    card = ModelCard(
        id=model.name, created=int(time.time()), size=model.size, steps=list(model.steps),
        output_formats=list(model.forms), frames=model.frames or None,
    )  # fmt: skip

    @app.get("/v1/models", dependencies=locked, response_model_exclude_none=True)
    async def models() -> ModelList:
        """The one model that there is."""
        return ModelList(data=[card])

    @app.get("/v1/models/{name}", dependencies=locked, response_model_exclude_none=True)
    async def one_model(name: str) -> ModelCard:
        """The model of that name."""
        if name != model.name:
            raise Refusal(404, "The model does not exist.", "model_not_found", "model")
        return card


def _add_state(app: FastAPI, batcher: Batcher[int, Tensor], metrics: Metrics, locked: list[Any]) -> None:
    """Health, readiness and metrics."""

    @app.get("/health")
    async def health() -> State:
        """Whether the process answers."""
        return State(status="ok")

    @app.get("/ready")
    async def ready() -> State:
        """Whether the server takes work."""
        if not batcher.accepting:
            raise Refusal(503, "found the server shutting down", "shutting_down")
        return State(status="ok")

    @app.get("/metrics", response_class=Response, dependencies=locked, responses={200: {"content": {"text/plain": {}}}})
    async def prometheus() -> Response:
        """Prometheus' text format."""
        return Response(metrics.text(), media_type=CONTENT_TYPE)


def _add_errors(app: FastAPI) -> None:
    """Every error in OpenAI's form."""

    @app.exception_handler(Refusal)
    async def refused(_: Request, refusal: Refusal) -> JSONResponse:
        return refusal.response()

    @app.exception_handler(RequestValidationError)
    async def malformed(_: Request, error: RequestValidationError) -> JSONResponse:
        return refusal_of(error).response()

    @app.exception_handler(HTTPException)
    async def unknown(_: Request, error: HTTPException) -> JSONResponse:
        return Refusal(error.status_code, str(error.detail), headers=error.headers).response()

    @app.exception_handler(Exception)
    async def broken(_: Request, error: Exception) -> JSONResponse:
        return Refusal(500, "found an error of the server, which its log has", "internal_error").response()


async def _within(seconds: float, work: Awaitable[T], request: Request) -> T:
    """What `work` returns, unless it takes longer or the client leaves: then it is cancelled.

    Raises:
        Refusal: as a client is told it.
    """
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait({working, leaving}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        if leaving.done():
            raise Refusal(CLIENT_LEFT, "the client left")
        raise Refusal(504, f"found no picture after {seconds:g} s, expected one, fix: try again later", "timeout")
    except QueueFull as full:
        wait = str(max(1, math.ceil(full.seconds)))
        message = "found the queue full, expected room, fix: try again later"
        raise Refusal(429, message, "rate_limit_exceeded", headers={"Retry-After": wait}) from full
    except Closing as closing:
        raise Refusal(503, "found the server shutting down", "shutting_down") from closing
    except BatchFailed as failed:
        raise Refusal(500, f"found an error ({failed}), which the log has", "internal_error") from failed
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _left(request: Request) -> None:
    """Returns when the client has left; the body has been read before."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _media_type(form: str) -> str:
    return f"video/{form}" if form == "mp4" else f"image/{form}"


def _encoded(samples: Sequence[Tensor], form: str, fps: int) -> list[bytes]:
    """uint8 pictures (3, H, W), or videos (F, 3, H, W), as files, in memory."""
    files = []
    for picture in samples:
        if picture.ndim == 4:
            files.append(moving_bytes(picture, form, fps))
            continue
        target = io.BytesIO()
        to_pil(picture).save(target, form.upper())
        files.append(target.getvalue())
    return files


def _address(request: Request) -> str:
    """Where the request came to, from the socket and not from its Host header."""
    host, port = request.scope["server"]
    return f"{request.scope['scheme']}://{f'[{host}]' if ':' in host else host}:{port}"
