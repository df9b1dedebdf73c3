"""Tests of the benchmark of analyses, with the smallest sizes. No time is asserted."""

from __future__ import annotations

from pathlib import Path

import h5py
import pytest

import grutrace
from benchmarks import analysis, long_traces
from grutrace.analysis.registry import ANALYSES
from grutrace.errors import NotRecordedError


def test_every_analysis_of_the_command_line_has_a_row() -> None:
    assert set(analysis.READS) == set(ANALYSES)
    assert set(analysis.TIMES) <= set(ANALYSES)


@pytest.mark.parametrize("of", ANALYSES)
def test_an_analysis_needs_the_quantities_that_are_read_beside_it(of: str, tmp_path: Path) -> None:
    path = tmp_path / "run.h5"
    long_traces.write_wide(path, 1, analysis.LABEL, analysis.READS[of])
    with grutrace.open(path) as trace:
        assert analysis.run_analysis(of, trace["rnn.l0"])


def test_control_an_analysis_without_its_quantity_says_so(tmp_path: Path) -> None:
    path = tmp_path / "run.h5"
    long_traces.write_wide(path, 1, None, ("update",))
    with grutrace.open(path) as trace, pytest.raises(NotRecordedError):
        analysis.run_analysis("geometry", trace["rnn.l0"])


def test_figures_of_an_analysis(tmp_path: Path) -> None:
    path = analysis.trace_of("geometry", tmp_path, 1)
    times, peak = analysis.times_reading("geometry", path), analysis.peak("geometry", path)
    assert (times.name, times.target) == ("geometry, over reading with h5py", analysis.Target(5.0))
    assert times.value is not None
    assert times.value > 0
    assert peak.value is not None
    assert 10 < peak.value < 2000


def test_each_quantity_is_read_with_h5py(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    get = h5py.Dataset.__getitem__

    def noting(dataset: h5py.Dataset, index: object) -> object:
        read.append(dataset.name.rsplit("/", 1)[-1])
        return get(dataset, index)

    path = analysis.trace_of("timescales", tmp_path, 1)
    # Only the benchmark reads: nothing is analysed.
    monkeypatch.setattr(analysis, "run_analysis", lambda *_: None)
    monkeypatch.setattr(h5py.Dataset, "__getitem__", noting)
    analysis.times_reading("timescales", path)
    assert {"update", "hidden"} <= set(read)
    # The control: it does not read what the analysis does not need.
    assert "reset" not in read
