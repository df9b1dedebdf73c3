"""Reads a report as a browser does."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import torch

import grutrace

#: Elements without an end tag.
VOID = {"meta", "br", "img", "link"}


class Page(HTMLParser):
    """The elements and texts of a page. An element that is not closed is an error."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.source = text
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, Any]]] = []
        self.findings: dict[str, str] = {}
        self._finding: dict[str, str] | None = None
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def named(self, tag: str) -> list[dict[str, Any]]:
        """The attributes of all elements of a kind."""
        return [attributes for name, attributes in self.elements if name == tag]

    def finding(self, start: str) -> tuple[str, str]:
        """The state of the finding whose topic starts so, and its sentences."""
        for state, topic, sentences in re.findall(
            r'<article class="(\w+)"[^>]*><h3>(.*?)<span.*?<ul>(.*?)</ul>', self.source, re.DOTALL
        ):
            if topic.startswith(start):
                return state, " ".join(re.sub(r"</?li>", " ", sentences).split())
        raise AssertionError(start)


def page_of(trace: Any, folder: Path) -> Page:
    """The report of a trace."""
    path = folder / "report.html"
    grutrace.report(trace, path)
    assert path.stat().st_size < 5 * 2**20
    return Page(path.read_text(encoding="utf-8"))


def record(model: Any, batches: Any, path: Any = None, **options: Any) -> Any:
    """Trace a model on some batches, each with its labels."""
    with grutrace.trace(model, path, **options) as trace, torch.no_grad():
        for batch, labels in batches:
            with trace.recording(labels=labels):
                model(batch)
    return trace


def planted(seed: int = 0, follows: bool = True, stuck: bool = True, sequences: int = 80) -> Any:
    """A layer of 12 units: 3 has its update gate held open, 7 follows the label ``side``."""
    torch.manual_seed(seed)
    layer = torch.nn.GRU(4, 12, batch_first=True)
    side = np.random.default_rng(seed).integers(0, 2, (sequences, 8))
    batch = torch.randn(sequences, 8, 4)
    with torch.no_grad():
        if stuck:
            layer.bias_ih_l0[12 + 3] = 8.0
        if follows:
            # The candidate of the unit is the side, and its update gate overwrites.
            batch[:, :, 0] = torch.tensor(side * 2.0 - 1)
            layer.weight_ih_l0[24 + 7] = torch.tensor([4.0, 0, 0, 0])
            layer.weight_hh_l0[24 + 7] = 0
            layer.weight_ih_l0[0:24, 0] = 0
            layer.weight_ih_l0[24:31, 0] = 0
            layer.weight_ih_l0[32:36, 0] = 0
            layer.weight_hh_l0[:, 7] = 0
            layer.bias_ih_l0[12 + 7] = -8.0
    labels = {"side": [[("left", "right")[value] for value in row] for row in side]}
    return record(layer, [(batch, labels)])
