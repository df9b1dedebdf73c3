"""The repr of traces, statistics and results fits 80 columns and few lines."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import grutrace
from grutrace.analysis.comparison.trace_diff import compare
from grutrace.analysis.descriptive.saturation import summarize_site
from grutrace.analysis.engine.site_data import SiteArrays
from grutrace.analysis.registry import ANALYSES
from grutrace.analysis.verification.verify import verify
from grutrace.reprs import named_repr
from tests.checks import EVERYTHING

LINES = 16


def assert_fits(value: Any, *expected: str) -> None:
    lines = repr(value).splitlines()
    assert len(lines) <= LINES, repr(value)
    assert max(map(len, lines)) <= 80, repr(value)
    assert all(text in repr(value).replace("\n    ", " ") for text in expected), repr(value)


class Nested(nn.Module):
    """A model whose GRU has a long path."""

    def __init__(self, depth: int = 12) -> None:
        super().__init__()
        self.a_part_of_it = nn.GRU(6, 70, 2, bidirectional=True) if not depth else Nested(depth - 1)

    def forward(self, batch: torch.Tensor) -> Any:
        return self.a_part_of_it(batch)


@pytest.fixture
def trace() -> grutrace.Tracer:
    torch.manual_seed(0)
    model = Nested()
    statistics = grutrace.Statistics()
    with (
        grutrace.trace(model, record=EVERYTHING) as trace,
        grutrace.trace(model, record=EVERYTHING, sink=statistics),
    ):
        for _ in range(2):
            with trace.recording(labels={"kind": [0, 1, 0]}):
                model(torch.randn(40, 3, 6))
    trace.statistics = statistics  # type: ignore[attr-defined]
    return trace


def test_traces_sites_and_sequences(trace) -> None:
    site = trace[trace.sites[0]]
    assert len(site.name) > 100
    assert_fits(trace, "4 sites, 2 calls, 6 sequences")
    assert_fits(site, "6 sequences, 240 steps")
    assert_fits(site[2], "sequence 2", "40 steps")
    for quantity in EVERYTHING:
        assert_fits(site.rows(quantity), "(240, ", "float32")
    assert_fits(site.initial, "(6, 70)")


def test_statistics(trace) -> None:
    statistics = trace.statistics
    site = statistics[statistics.sites[0]]
    assert_fits(statistics, "4 sites", "2 calls")
    assert_fits(site, "SiteStatistics(", "steps=240", "sequences=6")
    assert_fits(site.update, "UnitStatistics(", "quantity='update'", "count=int64 (70,) all 240")
    assert_fits(site.input, "histogram=None")
    spread = site.update.mean
    assert f"mean=float64 (70,) {spread.min():.4g} to {spread.max():.4g}" in repr(site.update)


@pytest.mark.parametrize("name", [name for name in ANALYSES if name not in ("change", "probe")])
def test_results_of_analyses(name: str, trace) -> None:
    analysis = ANALYSES[name]
    if name == "gradients":
        model = Nested()
        with grutrace.trace(model, record=("hidden", "gradient")) as trace:
            model(torch.randn(40, 3, 6))[0].sum().backward()
    site = trace[trace.sites[0]]
    options = {"label": "kind"} if "label" in analysis.required else {}
    result = analysis.load()(site, **options)
    assert_fits(result, f"{type(result).__name__}(", "site='a_part_of_it")


def test_other_results(trace) -> None:
    site = trace[trace.sites[0]]
    assert_fits(summarize_site(site), "SiteSummary(", "gates={reset, update, candidate}")
    assert_fits(verify(trace)[0], "SiteVerification(", "check='gates'")
    assert_fits(compare(trace, trace), "TraceDifference(")
    arrays = SiteArrays(update=np.zeros((10**5, 70)), hidden=site.hidden)
    assert_fits(arrays, "update=float64 (100000, 70) all 0", "hidden=float32 (240, 70)")


def test_odd_values() -> None:
    values = {
        "empty": np.empty((0, 3)),
        "nothing": np.full(4, np.nan),
        "texts": np.array(["a", "b"]),
        "objects": np.array([None, 1], object),
        "table": np.zeros(3, [("a", int), ("b", float)]),
        "number": np.float32(0.1),
        "flag": True,
        "long": "x" * 500,
        "many": tuple(range(1000)),
        "two": (1, 2),
        "by_name": {f"key {number}": 1 for number in range(100)},
        "result": object(),
    }
    text = named_repr("Result", values.items())
    assert max(map(len, text.splitlines())) <= 80
    for expected in ("(0, 3)", "none finite", "<table (3,)>", "0.1", "flag=True", "<tuple of 1000>",
                     "two=(1, 2)", "object (2,)"):  # fmt: skip
        assert expected in text


def test_control_a_plain_dataclass_does_not_fit(trace) -> None:
    values = trace.statistics[trace.sites[0]].update
    plain = f"UnitStatistics(mean={values.mean!r}, histogram={values.histogram!r})"
    with pytest.raises(AssertionError):
        assert_fits(type("Plain", (), {"__repr__": lambda _: plain})())
