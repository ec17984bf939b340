"""The OpenAI images API, by the official client and by hand, against a live server."""

from __future__ import annotations

import base64
import time
from typing import Any
from urllib.request import Request, urlopen

import openai
import pytest
from live_server import KEY, Serve, ask, colour, connected, metric, opened  # type: ignore[import-not-found]


@pytest.fixture(scope="module")
def url(serve: Serve) -> str:
    return serve()


def client(url: str, key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=30)


def test_the_official_client_gets_pictures_inline_and_by_url(url: str) -> None:
    api = client(url)
    more: dict[str, Any] = {"seed": 7, "steps": 1}
    inline = api.images.generate(prompt="a frog", n=2, response_format="b64_json", user="me", extra_body=more)
    assert inline.data is not None
    for seed, picture in zip((7, 8), inline.data, strict=True):
        assert opened(base64.b64decode(picture.b64_json or "")).getpixel((23, 15)) == colour("a frog", seed, 1)
    assert abs(inline.created - time.time()) < 60
    linked = api.images.generate(prompt="a frog", model="tiny", quality="standard", size="auto")
    assert linked.data is not None
    assert linked.data[0].b64_json is None
    answer = urlopen(str(linked.data[0].url), timeout=30)
    assert answer.headers["Content-Type"] == "image/png"
    seed = linked.data[0].model_dump()["seed"]
    assert opened(answer.read()).getpixel((0, 0)) == colour("a frog", seed, 4)
    assert [model.id for model in api.models.list()] == ["tiny"]
    assert api.models.retrieve("tiny").model_dump()["steps"] == [1, 4]


def test_seeds_are_random_unless_told(url: str) -> None:
    first, second = (ask(url, {"prompt": "a frog"})[1]["data"][0]["seed"] for _ in range(2))
    assert first != second


@pytest.mark.parametrize("form", ["png", "jpeg", "webp"])
def test_pictures_in_several_formats(url: str, form: str) -> None:
    _, answer, _ = ask(url, {"prompt": "x", "response_format": "b64_json", "output_format": form})
    assert opened(base64.b64decode(answer["data"][0]["b64_json"])).format == form.upper()
    assert (answer["output_format"], answer["size"]) == (form, "24x16")


def test_whole_numbers_are_integers_however_written(url: str) -> None:
    _, answer, _ = ask(url, {"prompt": "x", "n": 2.0, "seed": 3.0, "steps": 4.0})
    assert [picture["seed"] for picture in answer["data"]] == [3, 4]


def test_null_means_the_default(url: str) -> None:
    fields = ("n", "size", "steps", "seed", "model", "quality", "response_format", "output_format", "user", "stream")
    status, answer, _ = ask(url, {"prompt": "x", **dict.fromkeys(fields)})
    assert status == 200
    assert answer["data"][0]["url"].startswith(url)


@pytest.mark.parametrize(
    ("change", "status", "param", "code"),
    [
        ({"prompt": None}, 400, "prompt", "invalid_value"),
        ({"prompt": " \n"}, 400, "prompt", "invalid_value"),
        ({"prompt": "x" * 4001}, 400, "prompt", "invalid_value"),
        ({"prompt": ["x"]}, 400, "prompt", "invalid_value"),
        ({"prompt": "\ud800"}, 400, "prompt", "invalid_value"),
        ({"n": 0}, 400, "n", "invalid_value"),
        ({"n": 11}, 400, "n", "invalid_value"),
        ({"n": "2"}, 400, "n", "invalid_value"),
        ({"size": "512x512"}, 400, "size", "invalid_value"),
        ({"steps": 3}, 400, "steps", "invalid_value"),
        ({"seed": -1}, 400, "seed", "invalid_value"),
        ({"seed": 2**32}, 400, "seed", "invalid_value"),
        ({"quality": "hd"}, 400, "quality", "invalid_value"),
        ({"response_format": "path"}, 400, "response_format", "invalid_value"),
        ({"stream": True}, 400, "stream", "invalid_value"),
        ({"model": "dall-e-3"}, 404, "model", "model_not_found"),
        ({"style": "vivid"}, 400, "style", "unknown_parameter"),
        ({"x" * 100: 1}, 400, "x" * 64, "unknown_parameter"),
    ],
)
def test_what_is_not_understood_is_refused_as_openai_does(
    url: str, change: dict[str, Any], status: int, param: str, code: str
) -> None:
    found, answer, _ = ask(url, {"prompt": "x", **change})
    error = answer["error"]
    assert (found, error["type"], error["param"], error["code"]) == (status, "invalid_request_error", param, code)
    assert len(error["message"]) < 200


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"[]", b"null", b'"x"', b"\xff\xfe", b"[" * 60000, b'{"prompt": 1e999}', b'{"prompt": NaN}',
        b'{"prompt": "x", "\\ud800": 1}', b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}",
    ],
)  # fmt: skip
def test_no_body_breaks_the_server(url: str, body: bytes) -> None:
    status, answer, _ = ask(url, body)
    assert status == 400
    assert set(answer["error"]) == {"message", "type", "param", "code"}


def test_the_official_client_understands_errors(url: str) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client(url).images.generate(prompt="x", model="dall-e-3")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as wrong:
        client(url).images.generate(prompt="x", size="1024x1024")
    assert (wrong.value.param, wrong.value.type) == ("size", "invalid_request_error")
    status, answer, _ = ask(url, {}, "/v1/images/edits")
    assert (status, answer["error"]["type"]) == (404, "invalid_request_error")


def test_a_failing_batch_is_told_and_the_server_lives(url: str) -> None:
    before = metric(url, "fewstep_batches_failed_total")
    with pytest.raises(openai.InternalServerError) as failed:
        client(url).images.generate(prompt="please fail", extra_body={"steps": 1})
    assert failed.value.code == "internal_error"
    assert "secret" not in str(failed.value)
    assert metric(url, "fewstep_batches_failed_total") == before + 1
    assert ask(url, {"prompt": "x"})[0] == 200


def test_the_key_is_asked_for_before_the_body_is_read(serve: Serve, capfd: pytest.CaptureFixture[str]) -> None:
    url = serve(key=KEY)
    assert client(url, KEY).images.generate(prompt="x").data
    wrong = ["Bearer", f"Bearer {KEY}x", f"Bearer {KEY[:-1]}", f"Basic {KEY}", KEY, "Bearer \u00e9"]
    for given in wrong:
        status, answer, _ = ask(url, {"prompt": "x"}, Authorization=given)
        assert (status, answer["error"]["code"]) == (401, "invalid_api_key")
    with pytest.raises(openai.AuthenticationError):
        client(url, "another").models.list()
    assert ask(url, {"prompt": "x"}, Authorization=f"bearer {KEY}")[0] == 200
    with connected(url) as raw:
        raw.sendall(b"POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nContent-Length: 60000\r\n\r\n")
        assert b" 401 " in raw.recv(1000)
    for path in ("/health", "/ready", "/openapi.json"):
        assert urlopen(url + path, timeout=30).status == 200
    picture = ask(url, {"prompt": "x"}, Authorization=f"Bearer {KEY}")[1]["data"][0]["url"]
    assert urlopen(picture, timeout=30).status == 200
    with pytest.raises(OSError, match="401"):
        urlopen(f"{url}/metrics", timeout=30)
    assert urlopen(Request(f"{url}/metrics", headers={"Authorization": f"Bearer {KEY}"}), timeout=30).status == 200
    printed = capfd.readouterr()
    assert KEY not in printed.out + printed.err


def test_answers_by_url_can_begin_with_a_proxys_address(serve: Serve) -> None:
    url = serve(public_url="https://pictures.example/")
    _, answer, _ = ask(url, {"prompt": "x"}, Host="evil.example")
    assert answer["data"][0]["url"].startswith("https://pictures.example/files/")


def test_names_of_files_lead_nowhere_and_hosts_are_not_believed(url: str) -> None:
    _, answer, _ = ask(url, {"prompt": "x"}, Host="evil.example")
    assert answer["data"][0]["url"].startswith(f"{url}/files/")
    for name in ("none", "..%2f..%2fetc%2fpasswd", "%00", "a/b"):
        with pytest.raises(OSError, match="404"):
            urlopen(f"{url}/files/{name}", timeout=30)


def test_metrics_count_routes_that_exist_and_batches(url: str) -> None:
    before = metric(url, "fewstep_batch_size_sum")
    ask(url, {"prompt": "x", "n": 3})
    assert metric(url, "fewstep_batch_size_sum") == before + 3
    with pytest.raises(OSError, match="404"):
        urlopen(f"{url}/some-invented-path", timeout=30)
    text = urlopen(f"{url}/metrics", timeout=30).read().decode()
    assert "invented" not in text
    assert 'fewstep_requests_total{route="other",status="404"}' in text
    assert 'fewstep_request_seconds_bucket{le="0.01",route="/v1/images/generations"}' in text
