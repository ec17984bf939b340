"""The tab of runs: a card for each, and the chosen one's samples, curves and settings, looked at again and again."""

from __future__ import annotations

from typing import Any

import gradio as gr

from fewstep.studio.pages import gallery, overview, settings
from fewstep.studio.runs import RunsFolder
from fewstep.studio.told import told

_CLICKED = """
element.addEventListener("click", event => {
  const card = event.target.closest("[data-run]");
  if (card) trigger("click", {run: card.dataset.run});
});
"""


class RunsAnswers:
    """What the tab answers."""

    def __init__(self, folder: RunsFolder) -> None:
        self.folder = folder

    def cards(self, name: str) -> str:
        """A card for each run; that of the run `name` is marked."""
        with told():
            return gallery(self.folder, name)

    def picked(self, event: gr.EventData) -> str:
        """The name on the card that was clicked."""
        return str(event.run)

    def watch(self, name: str, every_curve: bool) -> str:
        """State, samples and curves of a run, or that it is gone; nothing while none is chosen."""
        with told():
            return overview(self.folder, name, every_curve) if name else ""

    def settings(self, name: str) -> str:
        """Its `run.json`; nothing while none is chosen."""
        with told():
            return settings(self.folder.run(name)) if name else ""


def runs_tab(page: gr.Blocks, tab: gr.Tab, folder: RunsFolder, refresh: float) -> None:
    """Lay out the tab and say what it does."""
    answers = RunsAnswers(folder)
    chosen = gr.Textbox(visible=False)
    cards = gr.HTML(js_on_load=_CLICKED)
    every_curve = gr.Checkbox(False, label="Every curve")
    watched = gr.HTML()
    with gr.Accordion("Settings", open=False):
        told_settings = gr.HTML()
    clock = gr.Timer(refresh)
    quiet: dict[str, Any] = {"show_progress": "hidden"}
    gr.on([page.load, tab.select, clock.tick, chosen.change], answers.cards, chosen, cards, api_name="runs", **quiet)
    gr.on(
        [clock.tick, chosen.change, every_curve.input], answers.watch, [chosen, every_curve], watched, api_name="run",
        **quiet,
    )  # fmt: skip
    chosen.change(answers.settings, chosen, told_settings, api_name="settings", **quiet)
    cards.click(answers.picked, None, chosen, api_visibility="private", **quiet)
