"""Tests of `site.plot.lines`."""

from __future__ import annotations

import numpy as np
from matplotlib.lines import Line2D

from tests.view.pictures import new_axes, ticks_of


def unit_lines(ax) -> dict[str, np.ndarray]:
    """The values of each line of a unit."""
    lines = [line for line in ax.lines if isinstance(line, Line2D)]
    return {
        line.get_label(): np.asarray(line.get_ydata())
        for line in lines
        if line.get_label().startswith(("unit", "feature"))
    }


def test_a_line_has_the_values_of_its_unit(trace) -> None:
    ax = trace["l0"].plot.lines("update", sequence=2, units=[6, 0], ax=new_axes())
    lines = unit_lines(ax)
    update = trace["l0"].sequence(2).update
    assert list(lines) == ["unit 6", "unit 0"]
    np.testing.assert_array_equal(lines["unit 6"], update[:, 6])
    np.testing.assert_array_equal(lines["unit 0"], update[:, 0])
    assert ticks_of(ax)[0] == "t2\nno"


def test_by_default_the_units_that_vary_most(trace) -> None:
    ax = trace["l0"].plot.lines()
    spread = trace["l0"].sequence(0).hidden.std(axis=0)
    left_out = f"unit {spread.argmin()}"
    lines = unit_lines(ax)
    assert len(lines) == 6
    assert left_out not in lines
    assert next(iter(lines)) == f"unit {spread.argmax()}"
    assert "the 6 of 7 that vary most" in ax.get_title()


def test_lines_differ_in_colour_and_in_style(trace) -> None:
    ax = trace["l0"].plot.lines(units=range(6))
    lines = [line for line in ax.lines if line.get_label().startswith("unit")]
    assert len({line.get_color() for line in lines}) == 6
    assert len({line.get_linestyle() for line in lines}) == 4


def test_the_input_has_features(trace) -> None:
    lines = unit_lines(trace["l0"].plot.lines("input", sequence=1))
    assert set(lines) == {"feature 0", "feature 1", "feature 2"}
    np.testing.assert_array_equal(lines["feature 2"], trace["l0"].sequence(1).input[:, 2])
