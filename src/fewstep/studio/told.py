"""Errors as messages of the page."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import gradio as gr

from fewstep.errors import FewstepError


@contextmanager
def told() -> Iterator[None]:
    """What goes wrong within is a message on the page; what nobody foresaw is also told in full on the terminal."""
    try:
        yield
    except FewstepError as error:
        raise gr.Error(str(error), duration=None, print_exception=False) from error
    except Exception as error:
        traceback.print_exc()
        message = f"{type(error).__name__}: {error}"
        raise gr.Error(message, duration=None, print_exception=False) from error
