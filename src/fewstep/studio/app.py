"""The page, and the application around it that a server runs.

Nothing is uploaded and no file is sent as a file: pictures lie in the answers, and gradio's routes for files are shut.
"""

from __future__ import annotations

import os
from importlib.resources import files

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported and when it starts

import gradio as gr  # noqa: E402
from fastapi import FastAPI  # noqa: E402
from starlette.responses import PlainTextResponse  # noqa: E402
from starlette.types import ASGIApp, Receive, Scope, Send  # noqa: E402

from fewstep.studio.desk import Desk  # noqa: E402
from fewstep.studio.draw_tab import draw_tab  # noqa: E402
from fewstep.studio.live_routes import live_routes  # noqa: E402
from fewstep.studio.runs import RunsFolder  # noqa: E402
from fewstep.studio.runs_tab import runs_tab  # noqa: E402

_SHUT = ("/gradio_api/file", "/gradio_api/upload", "/gradio_api/proxy", "/gradio_api/stream", "/gradio_api/run-history")


class ShutFiles:
    """An application without gradio's ways to fetch files, hand them over, or have the server fetch something."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"].startswith(_SHUT):
            await PlainTextResponse("the studio serves no files\n", 404)(scope, receive, send)
        else:
            await self.app(scope, receive, send)


def build_app(desk: Desk, runs: RunsFolder, refresh: float) -> FastAPI:
    """The application; `refresh` is the seconds between two looks at the runs."""
    with gr.Blocks(title="fewstep studio", analytics_enabled=False) as page:
        gr.Markdown("# fewstep studio")
        with gr.Tab("Draw"):
            draw_tab(page, desk)
        with gr.Tab("Stream"):
            gr.HTML('<iframe src="/live" title="A film that follows the mouse" class="live"></iframe>')
        with gr.Tab("Runs") as tab:
            runs_tab(page, tab, runs, refresh)
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(ShutFiles)
    live_routes(app, desk)
    style = files("fewstep").joinpath("assets/studio/studio.css").read_text(encoding="utf-8")
    fonts = {"font": ("ui-sans-serif", "system-ui", "sans-serif"), "font_mono": ("ui-monospace", "monospace")}
    theme = gr.themes.Default(primary_hue="teal", **fonts)
    return gr.mount_gradio_app(
        app, page, path="/", theme=theme, css=style, footer_links=[], run_history=False, show_error=False,
        max_file_size=1, ssr_mode=False, pwa=False, mcp_server=False, enable_monitoring=False,
    )  # fmt: skip
