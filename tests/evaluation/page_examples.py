"""A small report, and its HTML parsed."""

from __future__ import annotations

import base64
import io
import json
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fewstep.evaluation.intervals import Estimate
from fewstep.evaluation.page import Candidate, write_page

VOID = {"meta", "link", "img", "br", "input"}


@dataclass
class Element:
    """A node of the parsed page; `text` is everything inside it, entities decoded."""

    tag: str
    attributes: dict[str, str | None]
    text: str = ""
    children: list[Element] = field(default_factory=list)

    def all(self, tag: str, css_class: str | None = None) -> list[Element]:
        found = [self] if self.tag == tag and css_class in (None, *(self.attributes.get("class") or "").split()) else []
        return found + [hit for child in self.children for hit in child.all(tag, css_class)]

    def one(self, tag: str, css_class: str | None = None) -> Element:
        (element,) = self.all(tag, css_class)
        return element

    def section(self, name: str) -> Element:
        (found,) = [s for s in self.all("section") if s.attributes.get("id") == name]
        return found


class Tree(HTMLParser):
    """Builds Elements and insists that every tag is closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.stack = [Element("root", {})]
        self.feed(html)
        self.close()
        assert len(self.stack) == 1, [e.tag for e in self.stack]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = Element(tag, dict(attrs))
        self.stack[-1].children.append(element)
        if tag not in VOID:
            self.stack.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.stack[-1].children.append(Element(tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop().tag == tag

    def handle_data(self, data: str) -> None:
        for element in self.stack:
            element.text += data


def parse(path: Path) -> Element:
    return Tree(path.read_text(encoding="utf-8")).stack[0]


def pictures(count: int, seed: int, side: int = 16) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (count, 3, side, side), dtype=np.uint8))


def numbers(**scores: float) -> dict[str, Estimate]:
    return {name: Estimate(value) for name, value in scores.items()}


def candidates(count: int, side: int = 16) -> list[Candidate]:
    return [
        Candidate("teacher, 50 steps", pictures(count, 0, side), 100, 2.0, numbers(frechet=1.25, recall=0.5)),
        Candidate("student, 4 steps", pictures(count, 1, side), 4, 0.05, numbers(frechet=2.5, recall=0.75)),
        Candidate("student, 1 step", pictures(count, 2, side), 1, None),
    ]


def page(path: Path, **changes: Any) -> Path:
    """A page of two prompts, with every argument replaceable."""
    prompts = changes.get("prompts", ["a frog", "a red apple"])
    arguments: dict[str, Any] = {
        "title": "Title",
        "subtitle": "Subtitle",
        "candidates": candidates(len(prompts)),
        "prompts": prompts,
        "seeds": list(range(100, 100 + len(prompts))),
        "runs": {},
        "histograms": {},
        "value_labels": {},
        "settings": {},
        "notes": [],
    }
    return write_page(path / "page.html", **(arguments | changes))


def scripts(root: Element, kind: str | None = None) -> list[Element]:
    return [each for each in root.all("script") if each.attributes.get("type") == kind]


def data(root: Element) -> dict[str, Any]:
    (block,) = scripts(root, "application/json")
    return json.loads(block.text)


def decoded(line: str) -> np.ndarray:
    return np.array(Image.open(io.BytesIO(base64.b64decode(line))).convert("RGB"))


def cells(row: Element) -> list[str]:
    return [cell.text for cell in row.children]
