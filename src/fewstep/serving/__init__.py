"""A student behind the OpenAI images API (docs/serving.md); needs the extra `serve`.

`served` is a student as a server needs it; `batcher` knows nothing of HTTP; `wire` says what requests and answers look
like; `guard` stands before the application (key, size and speed of bodies); `store` keeps what is answered by URL;
`app` puts these together within `limits`; `server` runs it.
"""
