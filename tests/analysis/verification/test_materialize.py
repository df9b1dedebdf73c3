"""Tests of derived files: they equal an inline trace of the same run."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import nn

import grutrace
from grutrace.analysis.verification import materialize
from grutrace.analysis.verification.materialize import materialize_file
from grutrace.analysis.verification.verify import verify
from grutrace.capture.trace_output import TraceOutput
from grutrace.records import GATES
from tests.capture.models import EncoderDecoder
from tests.checks import EVERYTHING
from tests.plain_reader import PlainTrace
from tests.strategies import Case, cases
from tests.test_both_sinks import run


def assert_as_inline(derived: Any, inline: Any) -> None:
    """Everything but the gates, residuals and tolerances is the same; those are to rounding."""
    assert derived.sites == inline.sites
    assert derived.modules == inline.modules
    for name in (field for field in inline.calls.dtype.names if field not in ("time", "residual")):
        assert derived.calls[name].tolist() == inline.calls[name].tolist()
    assert derived.sequences.tolist() == inline.sequences.tolist()
    for name in inline.sites:
        one, other = inline[name], derived[name]
        np.testing.assert_allclose(other.checks["tolerance"], one.checks["tolerance"], rtol=1e-3)
        np.testing.assert_array_equal(other.checks["precision"], one.checks["precision"])
        assert (other.checks["residual"] <= other.checks["tolerance"]).all()
        allowed = one.row_checks()["tolerance"][:, np.newaxis]
        for quantity in one.site.quantities:
            stored, result = np.asarray(one.rows(quantity)), np.asarray(other.rows(quantity))
            assert (np.abs(stored.astype(float) - result) <= allowed * (quantity in GATES)).all()
        np.testing.assert_array_equal(other.initial, one.initial)
        for version in range(one.extent.versions):
            for which, array in one.weights(version).items():
                np.testing.assert_array_equal(other.weights(version)[which], array)
        for left, right in zip(one, other, strict=True):
            assert left.tokens == right.tokens
            assert str(left.labels) == str(right.labels)
            assert (left.tag, left.place, left.parent) == (right.tag, right.place, right.parent)


@pytest.fixture
def traces(tmp_path) -> Any:
    """A whole run in a deferred file, and beside it inline in memory."""
    torch.manual_seed(1)
    model, path = EncoderDecoder(layers=2, dropout=0.3), tmp_path / "deferred.h5"
    with (
        grutrace.trace(model, record=EVERYTHING) as inline,
        grutrace.trace(model, path, record=EVERYTHING, gates="deferred") as deferred,
    ):
        run(model, inline, deferred)
    return path, inline


@pytest.mark.parametrize("block", [1, 2000, 10**9])
def test_a_whole_run(traces, tmp_path, block, monkeypatch) -> None:
    monkeypatch.setattr(materialize, "BLOCK_BYTES", block)
    path, inline = traces
    steps = []
    with grutrace.open(path) as trace:
        materialize_file(
            trace, tmp_path / "full.h5", lambda done, total: steps.append((done, total))
        )
        times = trace.calls["time"].tolist()
        done, totals = zip(*steps, strict=True)
        assert list(done) == sorted(done)
        assert set(totals) == {done[-1]}
    with grutrace.open(tmp_path / "full.h5") as full:
        assert full.closed
        assert full.calls["time"].tolist() == times
        assert full.options["gates"] == "derived"
        assert_as_inline(full, inline)
        assert all(result.holds and result.check == "gates" for result in verify(full))


def test_forks_and_shrinking_batches(tmp_path) -> None:
    torch.manual_seed(0)
    cell, state = nn.GRUCell(2, 3), torch.randn(4, 3)
    with (
        torch.no_grad(),
        grutrace.trace(cell, record=EVERYTHING) as inline,
        grutrace.trace(cell, record=EVERYTHING, gates="deferred") as deferred,
    ):
        for rows in ([0, 1, 2, 3], [2, 0, 3], [1, 1, 0], [0, 1, 2], [0]):
            state = cell(torch.randn(len(rows), 2), state[rows])
    assert (inline.sequences["parent"] >= 0).any()
    materialize_file(deferred, tmp_path / "full.h5")
    assert_as_inline(grutrace.open(tmp_path / "full.h5"), inline)


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(cases())
def test_the_lattice(tmp_path, case: Case) -> None:
    path = tmp_path / "full.h5"
    path.unlink(missing_ok=True)
    with (
        grutrace.trace(case.layer, record=EVERYTHING) as inline,
        grutrace.trace(case.layer, record=EVERYTHING, gates="deferred") as deferred,
    ):
        case.run()
    materialize_file(deferred, path)
    with grutrace.open(path) as full:
        assert_as_inline(full, inline)


def test_the_file_is_one_by_the_specification(traces, tmp_path) -> None:
    path, inline = traces
    with grutrace.open(path) as trace:
        materialize_file(trace, tmp_path / "full.h5")
    for module in PlainTrace(tmp_path / "full.h5").modules:
        for site in module.sites.values():
            assert tuple(site.rows) == EVERYTHING
            assert site.derived == ()
            assert (site.checks["residual"] <= site.checks["tolerance"]).all()
            for number in range(module.count):
                expected = inline[site.name].sequence(number)
                for quantity in EVERYTHING:
                    np.testing.assert_allclose(
                        site.sequence(number, quantity), expected.rows(quantity), atol=1e-6
                    )


def test_the_files_of_a_run_become_one_file(tmp_path, monkeypatch) -> None:
    torch.manual_seed(0)
    models, traces = [nn.GRU(2, 3), nn.GRU(2, 4)], []
    for part, model in enumerate(models, 1):
        stamp = {"run": {"id": "a" * 32, "part": part}}
        output = partial(TraceOutput, extra_options=stamp)
        monkeypatch.setattr("grutrace.capture.tracer.TraceOutput", output)
        path = tmp_path / ("run.h5" if part == 1 else "run.part0002.h5")
        with (
            grutrace.trace(model, record=EVERYTHING) as inline,
            grutrace.trace(model, path, gates="deferred", record=EVERYTHING),
        ):
            for _ in range(part):
                model(torch.randn(5, 2, 2))
        traces.append(inline)
    with grutrace.open(tmp_path / "run.h5") as trace:
        assert len(trace.sites) == 2
        assert all(result.holds and result.check == "derived" for result in verify(trace))
        materialize_file(trace, tmp_path / "full.h5")
        sites, times = trace.sites, trace.calls["time"].tolist()
    for path in tmp_path.glob("run*"):
        path.unlink()
    with grutrace.open(tmp_path / "full.h5") as full:
        assert "run" not in full.options
        assert full.calls["time"].tolist() == times
        for name, inline in zip(sites, traces, strict=True):
            np.testing.assert_allclose(full[name].update, inline["l0"].update, atol=1e-6)


def test_gates_that_cannot_be_derived_are_an_error(traces, tmp_path) -> None:
    path, inline = traces
    before = path.read_bytes()
    with grutrace.open(path) as trace:
        with pytest.raises(grutrace.TraceFileError, match=r"deferred\.h5 exists"):
            materialize_file(trace, path)
        with pytest.raises(grutrace.TraceFileError, match="no folder"):
            materialize_file(trace, tmp_path / "nowhere" / "full.h5")
    assert path.read_bytes() == before
    with pytest.raises(grutrace.TraceFileError, match="nothing to derive"):
        materialize_file(inline, tmp_path / "full.h5")
    assert not (tmp_path / "full.h5").exists()


def test_a_failure_leaves_no_partial_file(traces, tmp_path) -> None:
    path, _ = traces

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with grutrace.open(path) as trace, pytest.raises(KeyboardInterrupt):
        materialize_file(trace, tmp_path / "full.h5", interrupt)
    assert [path.name for path in tmp_path.iterdir()] == ["deferred.h5"]
