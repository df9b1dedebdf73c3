"""Tests of the measurement of a long training run."""

from __future__ import annotations

from benchmarks.long_training import BLOCK, figures, step_bytes


def test_a_long_run_is_compared_with_its_start() -> None:
    by_name = {figure.name: figure.value for figure in figures(steps=2 * BLOCK, counted=2)}
    first, last = (by_name[f"deferred, to a file, the {end} 50 of 100 steps"] for end in
                   ("first", "last"))  # fmt: skip
    assert first is not None
    assert last is not None
    assert first > 0
    assert by_name["the last less the first"] == last - first


def test_the_bytes_of_a_step_hold_its_rows() -> None:
    """Rows of 20 steps of 32 sequences of 128 units in 2 layers and a cell, and of their inputs."""
    values = 20 * 32 * 128
    inline = step_bytes({"gates": "inline"}, 20)
    assert 3 * 4 * values * 4 < inline < 1.3 * 3 * 4 * values * 4 + 4 * 300_000
    assert step_bytes({"gates": "inline", "record": "update"}, 20) < 0.7 * inline
