"""Requests, answers and errors as the OpenAI images API writes them.

Source: the API reference of `POST /v1/images/generations`, and the types of the official `openai` client. `seed` and
`steps` are ours; the client sends them with `extra_body`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, create_model

from fewstep.evaluation.clips import MOST_FPS
from fewstep.serving.limits import MOST_PICTURES
from fewstep.serving.served import Served

LARGEST_SEED = 2**32 - 1


def _whole(value: Any) -> Any:
    """2.0 as 2, which are the same number in JSON."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


_WHOLE = BeforeValidator(_whole)


class ImageRequest(BaseModel):
    """What can be asked; `request_kind` adds what depends on the student. Other fields are refused."""

    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: Annotated[str, Field(min_length=1, max_length=4000, pattern=r"\S", description="What to draw.")]
    n: Annotated[int, Field(ge=1, le=MOST_PICTURES), _WHOLE] | None = Field(1, description="Pictures; seeds count up.")
    seed: Annotated[int, Field(ge=0, le=LARGEST_SEED), _WHOLE] | None = Field(
        None, description="Of the first picture: with prompt and steps it decides every pixel. Random unless told."
    )
    response_format: Literal["url", "b64_json"] | None = Field("url", description="URLs hold for a while.")
    quality: Literal["auto", "standard"] | None = Field("auto", description="A student has one; see `steps`.")
    background: Literal["auto", "opaque"] | None = Field("auto", description="Pictures are opaque.")
    user: Annotated[str, Field(max_length=512)] | None = Field(None, description="Accepted, not used.")
    stream: Literal[False] | None = Field(False, description="Pictures come whole.")


class Picture(BaseModel):
    """One picture, inline or by URL."""

    b64_json: str | None = None
    url: str | None = None
    seed: int


class Images(BaseModel):
    """The answer: `created` in Unix seconds, `size` as WxH in pixels; of videos also `frames` and `fps`."""

    created: int
    data: list[Picture]
    output_format: str
    size: str
    frames: int | None = None
    fps: int | None = None


class ModelCard(BaseModel):
    """The served student; `steps` are the numbers of network calls that can be asked, `size` is WxH in pixels.

    `frames` are those of a video; none for students of pictures.
    """

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "fewstep"
    size: str
    steps: list[int]
    output_formats: list[str]
    frames: int | None = None


class ModelList(BaseModel):
    """The one model that there is."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class State(BaseModel):
    """Health or readiness."""

    status: str


class ErrorDetail(BaseModel):
    """What went wrong; `param` names the field of the request, `code` is for programs."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of every error."""

    error: ErrorDetail


@dataclass(eq=False)
class Refusal(Exception):
    """An answer that is an error."""

    status: int
    message: str
    code: str | None = None
    param: str | None = None
    headers: Mapping[str, str] | None = None

    def response(self) -> JSONResponse:
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        body = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return JSONResponse({"error": body}, self.status, dict(self.headers or {}))


def request_kind(model: Served) -> type[ImageRequest]:
    """`ImageRequest` for a student: its name, size, steps (the largest by default), formats; of videos their speed."""
    name, size, steps, forms = model.name, model.size, model.steps, model.forms
    lossy = "mp4 and gif lose a little." if model.frames else "jpeg and webp lose a little."
    fields: dict[str, Any] = {
        "model": (Literal[name] | None, Field(name, description="The served student.")),
        "size": (Literal["auto", size] | None, Field("auto", description="A student has one size.")),
        "steps": (Annotated[Literal[tuple(sorted(steps))], _WHOLE] | None, Field(max(steps), description="Calls.")),
        "output_format": (Literal[forms] | None, Field(forms[0], description=lossy)),
    }
    if model.frames:
        speed = Annotated[int, Field(ge=1, le=MOST_FPS), _WHOLE]
        fields["fps"] = (speed | None, Field(model.fps, description="Frames a second, written into the file."))
    return create_model("ImageRequest", __base__=ImageRequest, **fields)


def refusal_of(error: RequestValidationError) -> Refusal:
    """The first fault of a malformed request; nothing of the request is repeated but the name of a field."""
    fault = error.errors()[0]
    where = [part for part in fault["loc"] if isinstance(part, str)]
    param = where[1][:64] if len(where) > 1 else None
    if fault["type"] == "json_invalid" or param is None:
        return Refusal(400, "found a body that is no JSON object, expected one with a prompt, fix: send JSON")
    if fault["type"] == "extra_forbidden":
        return Refusal(400, f"Unknown parameter: '{param}'.", "unknown_parameter", param)
    if fault["type"] == "missing":
        return Refusal(400, f"Missing required parameter: '{param}'.", "missing_required_parameter", param)
    if param == "model" and fault["type"] == "literal_error":
        message = f"The model does not exist: {fault['msg'].lower()}."
        return Refusal(404, message, "model_not_found", param)
    return Refusal(400, f"Invalid value for '{param}': {fault['msg'].lower()}.", "invalid_value", param)
