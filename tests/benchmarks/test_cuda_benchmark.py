"""Tests of the CUDA benchmark, run on the CPU with a small layer."""

from __future__ import annotations

import pytest
import torch

from benchmarks import cuda
from benchmarks.tracings import TRACINGS


def test_each_way_to_trace_has_a_row(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(cuda, "SHAPES", ((2, 2, 3, 32),))
    monkeypatch.setattr(cuda, "DTYPES", (torch.float32,))
    report = tmp_path / "benchmark.md"
    assert cuda.main(["--device", "cpu", "--pairs", "1", "--output", str(report)]) == 0
    rows = [line for line in report.read_text().splitlines() if line.startswith("| T2 ")]
    ways = [tracing.name for tracing in TRACINGS if not tracing.read]
    assert [row.split("|")[2].strip() for row in rows] == 2 * ways
    assert all(float(row.split("|")[3]) > 0 for row in rows)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_missing_device_is_one_error(capsys) -> None:
    assert cuda.main([]) == 2
    assert capsys.readouterr().err.count("\n") == 1
