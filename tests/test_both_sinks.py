"""One run goes to memory and to a file, and everything readable is compared.

Gates that are replayed with each call are the same bits in both. In the background those of several
calls are computed at once: see `tests/capture/recording/test_background.py`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import grutrace
from grutrace.records import GATES
from tests.capture.models import EncoderDecoder
from tests.checks import EVERYTHING, rounding


def assert_same(a: Any, b: Any, *, apart: bool = False) -> None:
    """Compare two traces of the same run, value by value.

    Args:
        a: One of them.
        b: The other.
        apart: Whether their gates were computed apart, and so are the same to rounding only.
    """
    assert a.sites == b.sites
    assert a.modules == b.modules
    computed = ("residual",) if apart else ()
    for name in (field for field in a.calls.dtype.names if field not in ("time", *computed)):
        assert a.calls[name].tolist() == b.calls[name].tolist()
    assert a.sequences.tolist() == b.sequences.tolist()
    for name in a.sites:
        assert_same_site(a[name], b[name], apart=apart)


def assert_same_site(a: Any, b: Any, *, apart: bool = False) -> None:
    assert len(a) == len(b)
    assert a.site == b.site
    assert_same_checks(a, b, apart=apart)
    np.testing.assert_array_equal(a.lengths, b.lengths)
    np.testing.assert_array_equal(a.initial, b.initial)
    for quantity in a.site.available_quantities:
        if apart and quantity in GATES:
            left, right = (np.asarray(site.rows(quantity)) for site in (a, b))
            assert left.dtype == right.dtype
            assert (np.abs(left.astype(float) - right) <= rounding(a, b)).all(), quantity
            continue
        np.testing.assert_array_equal(a.rows(quantity), b.rows(quantity))
        for left, right in zip(a.padded(quantity), b.padded(quantity), strict=True):
            np.testing.assert_array_equal(left, right)
    for version in range(a.extent.versions):
        left, right = a.weights(version), b.weights(version)
        assert left.keys() == right.keys()
        for name in left:
            np.testing.assert_array_equal(left[name], right[name])
    for left, right in zip(a, b, strict=True):
        np.testing.assert_array_equal(left.previous, right.previous)
        np.testing.assert_array_equal(left.input, right.input)
        assert left.tokens == right.tokens
        assert str(left.labels) == str(right.labels)
        assert (left.tag, left.place, left.parent) == (right.tag, right.place, right.parent)


def assert_same_checks(a: Any, b: Any, *, apart: bool) -> None:
    if not apart:
        np.testing.assert_equal(a.residual, b.residual)
        np.testing.assert_array_equal(a.checks, b.checks)
        return
    np.testing.assert_array_equal(a.checks["precision"], b.checks["precision"])
    for site in (a, b):
        assert (site.checks["residual"] <= site.checks["tolerance"]).all()


def run(model: EncoderDecoder, *tracers: grutrace.Tracer) -> None:
    """Two epochs of training, a validation with tokens, and stepwise decoding."""
    torch.manual_seed(0)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(2):
        model(torch.randn(3, 7, 5), steps=4).square().mean().backward()
        optimizer.step()
    model.eval()
    words = [list("the"), list("a")]
    labels = {"position": [[0, 1, 2], [0]], "kind": ["article", "article"]}
    blocks = [tracer.recording("valid", tokens=words, labels=labels) for tracer in tracers]
    for block in blocks:
        block.__enter__()
    model(torch.randn(2, 3, 5), steps=2)
    for block in reversed(blocks):
        block.__exit__(None, None, None)
    model.encoder(torch.randn(0, 2, 5))


@pytest.fixture
def model() -> EncoderDecoder:
    torch.manual_seed(1)
    return EncoderDecoder(layers=2, dropout=0.3)


def test_memory_and_file_hold_the_same(model, tmp_path) -> None:
    path = tmp_path / "run.h5"
    with (
        grutrace.trace(model, record=EVERYTHING, gates="inline") as memory,
        grutrace.trace(model, path, record=EVERYTHING, gates="inline") as file,
    ):
        run(model, memory, file)
        assert_same(memory, file)
    assert_same(memory, file)
    with grutrace.open(path) as opened:
        assert_same(memory, opened)
        assert opened.closed
        assert opened["encoder.l1"].sequence(6).tokens == ["t", "h", "e"]
        assert opened["encoder.l0"].sequence(7).tokens == ["a", None, None]
        assert opened["decoder.cell"].sequence(6).tokens is None
        np.testing.assert_array_equal(
            opened["encoder.l0"].sequence(7).labels["position"], [0, np.nan, np.nan]
        )
        assert opened["decoder.cell"].sequence(7).labels["kind"] == ["article", "article"]


def test_control_another_run_differs(model, tmp_path) -> None:
    with grutrace.trace(model, record=EVERYTHING) as first:
        run(model, first)
    with grutrace.trace(model, record=EVERYTHING) as second:
        run(model, second)
    with pytest.raises(AssertionError):
        assert_same(first, second)


def test_appending_continues_where_the_file_ended(model, tmp_path) -> None:
    path = tmp_path / "run.h5"
    with grutrace.trace(model, record=EVERYTHING, gates="inline") as memory:
        for mode in ("w", "a"):
            with grutrace.trace(model, path, record=EVERYTHING, mode=mode) as file:
                run(model, file)
    assert len(file.calls) == len(memory.calls)
    for name in memory.sites:
        for quantity in EVERYTHING:
            np.testing.assert_array_equal(memory[name].rows(quantity), file[name].rows(quantity))
        np.testing.assert_array_equal(memory[name].initial, file[name].initial)
    assert file["encoder.l0"].sequence(-2).tokens == ["t", "h", "e"]


def test_an_existing_path_is_refused_and_unchanged(model, tmp_path) -> None:
    path = tmp_path / "run.h5"
    path.write_bytes(b"somebody's only copy")
    with pytest.raises(grutrace.TraceFileError, match=r"run\.h5.*exists"):
        grutrace.trace(model, path)
    assert path.read_bytes() == b"somebody's only copy"
    with pytest.raises(grutrace.TraceFileError, match=r"run\.h5"):
        grutrace.trace(model, path, mode="a")
    with pytest.raises(grutrace.TraceFileError, match=r"run\.h5 cannot be overwritten"):
        grutrace.trace(model, path, mode="overwrite")
    assert path.read_bytes() == b"somebody's only copy"
    path.unlink()
    for mode in ("w", "overwrite"):
        with grutrace.trace(model, path, mode=mode):
            model(torch.randn(2, 3, 5))
    assert len(grutrace.open(path)["encoder.l0"]) == 2


def test_another_model_cannot_be_appended(model, tmp_path) -> None:
    path = tmp_path / "run.h5"
    with grutrace.trace(model, path):
        model(torch.randn(2, 3, 5))
    with pytest.raises(grutrace.TraceFileError, match=r"run\.h5"):
        grutrace.trace(nn.GRU(2, 3), path, mode="a")
    assert len(grutrace.open(path)["encoder.l0"]) == 2
