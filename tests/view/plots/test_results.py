"""Tests of the pictures of results: what their artists show is what the analysis computed."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

import grutrace
from grutrace.analysis import (
    autocorrelation,
    change,
    decompose,
    fixed_points,
    geometry,
    gradients,
    memory_map,
    moments,
    saturation,
    selectivity,
    stages,
    timescales,
)
from grutrace.analysis.engine.site_data import SiteArrays
from grutrace.errors import NotRecordedError, OptionError
from grutrace.view.plots.changes import plot_change, plot_stages
from grutrace.view.plots.gradients import plot_gradients
from grutrace.view.plots.saturation import plot_saturation
from grutrace.view.plots.selectivity import plot_selectivity
from grutrace.view.plots.timescales import plot_autocorrelation, plot_timescales
from tests.view.conftest import record
from tests.view.pictures import image_of, new_axes, points_of, ticks_of


def test_saturation_has_a_point_a_unit_and_marks_the_stuck_ones() -> None:
    random = np.random.default_rng(0)
    update = random.uniform(0.3, 1.0, (200, 6))
    update[:, 4] = 0.99
    found = saturation(SiteArrays(update=update))
    ax = plot_saturation(found, ax=new_axes())
    others, stuck = points_of(ax, 0), points_of(ax, 1)
    np.testing.assert_allclose(stuck, [[0.0, 1.0]])
    expected = np.stack([found.left["update"], found.right["update"]], 1)[[0, 1, 2, 3, 5]]
    np.testing.assert_allclose(others, expected)
    assert "1 of 6 stuck" in ax.get_title()
    assert "overwrites" in ax.get_xlabel()
    assert "keeps" in ax.get_ylabel()
    assert [text.get_text() for text in ax.texts] == ["4"]


def test_timescales_are_drawn_as_the_share_of_units_that_have_at_least_them() -> None:
    tau = 1 / np.random.default_rng(0).gamma(2.0, 0.2, 400)
    update = np.exp(-1 / np.tile(tau, (3, 1)))
    found = timescales(SiteArrays(update=update))
    ax = plot_timescales(found, ax=new_axes())
    units, fit = ax.lines
    times, shares = units.get_xdata(), units.get_ydata()
    for time, share in zip(times[::50], shares[::50], strict=True):
        assert share == pytest.approx(np.mean(found.tau >= time))
    # The fit's share agrees with the units, and falls with the time.
    fitted = np.interp(np.log(times), np.log(fit.get_xdata()), fit.get_ydata())
    assert np.abs(fitted - shares).max() < 0.06
    assert "not rejected" in ax.get_title()
    assert ax.get_xscale() == "log"


def test_the_fitted_share_is_that_of_scipys_distribution() -> None:
    from scipy.stats import invgamma

    tau = 1 / np.random.default_rng(1).gamma(1.5, 1.0, 300)
    found = timescales(SiteArrays(update=np.exp(-1 / np.tile(tau, (2, 1)))))
    times = np.array([0.2, 1.0, 7.0])
    expected = invgamma.sf(times, found.shape, scale=found.scale)
    np.testing.assert_allclose(found.fitted_share(times), expected, rtol=1e-9)


def test_units_that_never_forget_and_that_forget_at_once_are_counted() -> None:
    update = np.full((5, 10), 0.5)
    update[:, 0], update[2, 1] = 1.0, 0.0
    ax = plot_timescales(timescales(SiteArrays(update=update)), ax=new_axes())
    assert "1 unit with tau 0 not drawn" in ax.get_title()
    assert "1 unit never forgot" in ax.get_title()


def test_autocorrelation_shows_the_median_and_the_slowest_unit() -> None:
    random = np.random.default_rng(0)
    states = np.zeros((3000, 3))
    for step in range(1, 3000):
        states[step] = np.array([0.0, 0.5, 0.9]) * states[step - 1] + random.normal(size=3)
    found = autocorrelation(SiteArrays(hidden=states), lags=20)
    ax = plot_autocorrelation(found, ax=new_axes())
    lines = {line.get_label(): line.get_ydata() for line in ax.lines}
    median = np.median(found.correlation, axis=1)
    np.testing.assert_allclose(lines["median of the units"], median)
    np.testing.assert_allclose(lines["unit 2"], found.correlation[:, 2])


def test_a_decomposition_has_a_bar_a_step_and_one_for_what_was_before(trace) -> None:
    site = trace["l0"]
    ax = site.plot.decompose(2, 4, ax=new_axes())
    found = decompose(site, 2, 4)
    heights = [bar.get_height() for bar in ax.patches]
    np.testing.assert_allclose(heights, [*found.share, found.before_share])
    assert sum(heights) == pytest.approx(1.0, abs=1e-5)
    assert ticks_of(ax)[0] == "t2\nno"


@pytest.mark.parametrize("reverse", [False, True])
def test_a_memory_map_has_the_shares_at_the_steps_that_wrote(reverse) -> None:
    torch.manual_seed(0)
    layer = torch.nn.GRU(3, 7, bidirectional=True)
    with grutrace.trace(layer) as trace:
        layer(torch.randn(6, 2, 3))
    site = trace["l0_reverse" if reverse else "l0"]
    values = image_of(site.plot.memory_map(1, ax=new_axes()))
    found = memory_map(site, 1)
    assert values.shape == (6, 6)
    for state in range(6):
        parts = decompose(site, 1, state)
        np.testing.assert_allclose(values[state, parts.steps], parts.share, atol=1e-6)
        later = set(range(6)) - set(parts.steps.tolist())
        assert np.isnan(values[state, sorted(later)]).all()
    assert np.nansum(values[3]) + found.before_share[3] == pytest.approx(1, abs=1e-5)


def test_trajectories_are_the_projected_states(trace) -> None:
    site = trace["l0"]
    ax = site.plot.trajectories([1, 4], ax=new_axes())
    found = geometry(site)
    paths = {line.get_label(): line for line in ax.lines if line.get_label()[0] != "_"}
    states = np.concatenate([site.sequence(4).initial[np.newaxis], site.sequence(4).hidden])
    np.testing.assert_allclose(
        np.stack(paths["sequence 4"].get_data(), 1), found.project(states), atol=1e-6
    )
    assert set(paths) == {"sequence 1", "sequence 4"}
    assert f"{found.share[0]:.0%}" in ax.get_xlabel()


def test_trajectories_have_the_fixed_points_and_their_stability(trace) -> None:
    site = trace["l0"]
    points = fixed_points(site, "mean", starts=8)
    assert points.fixed_points == points.stable_points == 1
    ax = site.plot.trajectories([0], points=points, ax=new_axes())
    (drawn,) = [each for each in ax.collections if each.get_label() == "stable fixed point"]
    np.testing.assert_allclose(drawn.get_offsets()[0], geometry(site).project(points.states)[0])
    assert "1 fixed points, 1 of them stable, 0 slow points" in ax.get_title()


def test_trajectories_are_coloured_by_a_label(trace) -> None:
    site = trace["l0"]
    ax = site.plot.trajectories([0, 1], label="late", ax=new_axes())
    drawn = {each.get_label(): np.asarray(each.get_offsets()) for each in ax.collections}
    found = geometry(site)
    early = np.concatenate([site.sequence(number).hidden[:3] for number in (0, 1)])
    np.testing.assert_allclose(drawn["no"], found.project(early), atol=1e-6)
    assert set(drawn) == {"no", "yes"}
    with pytest.raises(NotRecordedError, match="late"):
        site.plot.trajectories(label="pos")


def test_states_of_one_unit_have_no_plane() -> None:
    layer = torch.nn.GRU(2, 1)
    with grutrace.trace(layer) as trace:
        layer(torch.randn(5, 2, 2))
    with pytest.raises(OptionError, match="at least two units"):
        trace["l0"].plot.trajectories()


def test_selectivity_ranks_units_and_fills_those_that_follow() -> None:
    random = np.random.default_rng(0)
    states = random.uniform(-1, 1, (400, 9))
    labels = np.where(states[:, 5] > 0, "plus", "minus")
    site = SiteArrays(hidden=states, lengths=[10] * 40, labels={"sign": labels})
    found = selectivity(site, "sign")
    ax = plot_selectivity(found, ax=new_axes())
    others, *filled = ax.collections
    assert sum(len(each.get_offsets()) for each in filled) == found.selective == 1
    rank, information = filled[0].get_offsets()[0]
    assert (rank, information) == (0, pytest.approx(found.information[5]))
    assert len(others.get_offsets()) == 8
    (chance,) = ax.lines
    order = [found.units.tolist().index(unit) for unit in found.ranking]
    np.testing.assert_allclose(chance.get_ydata(), found.null_mean[order])
    assert "1 of 9 units follow it" in ax.get_title()


def test_gradients_have_the_norms_and_the_fitted_factor() -> None:
    steps = np.arange(12)[:, np.newaxis]
    found = gradients(SiteArrays(gradient=0.5 ** ((11 - steps) / 3) * np.ones((1, 4))))
    ax = plot_gradients(found, ax=new_axes())
    norms, fit = ax.lines
    np.testing.assert_allclose(norms.get_ydata(), 2 * 0.5 ** (np.arange(12) / 3))
    np.testing.assert_allclose(fit.get_ydata(), norms.get_ydata())
    assert ax.get_yscale() == "log"
    assert "halves every 3 steps" in ax.get_title()


def course() -> SiteArrays:
    """Unit 2 opens its update gate over the recording; the others do not change."""
    random = np.random.default_rng(0)
    update = random.uniform(0.3, 0.6, (600, 5))
    update[:, 2] += np.repeat(np.linspace(0, 0.3, 60), 10)
    return SiteArrays(update=update, lengths=[10] * 60)


def test_stages_are_drawn_as_changes_from_the_first() -> None:
    found = stages(course(), 4)
    ax = plot_stages(found, calls=[0, 15, 30, 45], ax=new_axes())
    units = [int(text.get_text()) for text in ax.get_yticklabels()]
    means = found.mean["update"]
    np.testing.assert_allclose(image_of(ax), (means - means[0]).T[units])
    assert units[-1] == 2
    assert ticks_of(ax) == ["0", "15", "30", "45"]
    assert "1 of 5 moved" in ax.get_title()


def test_the_axis_of_stages_has_the_first_calls(trace) -> None:
    ax = trace["l0"].plot.stages("hidden", 3, ax=new_axes())
    assert ticks_of(ax) == ["0", "0", "0"]


def test_change_marks_the_units_that_moved() -> None:
    random = np.random.default_rng(0)
    before, after = (
        SiteArrays(update=random.uniform(0.4, 0.5, (400, 6)), lengths=[10] * 40) for _ in range(2)
    )
    after.update[:, 3] += 0.2
    found = change(before, after)
    ax = plot_change(found, ax=new_axes())
    filled = points_of(ax, -1)
    assert [0.18 < moved < 0.22 for _, moved in filled].count(True) == 1
    drawn = np.concatenate([points_of(ax, -2), filled])
    np.testing.assert_allclose(np.sort(drawn[:, 1]), np.sort(found.moved["update"]))
    assert "3" in [text.get_text() for text in ax.texts]


def test_checkpoints_have_a_column_a_trace(tmp_path) -> None:
    sites = []
    for number in range(3):
        torch.manual_seed(number)
        layer = torch.nn.GRU(3, 4)
        with grutrace.trace(layer, tmp_path / f"epoch{number}.h5"):
            layer(torch.randn(5, 2, 3))
        sites.append(grutrace.open(tmp_path / f"epoch{number}.h5")["l0"])
    ax = sites[0].plot.checkpoints(*sites[1:], ax=new_axes())
    means = np.array([moments(site).mean["update"] for site in sites])
    units = [int(text.get_text()) for text in ax.get_yticklabels()]
    np.testing.assert_allclose(image_of(ax), (means - means[0]).T[units])
    assert ticks_of(ax) == ["epoch0.h5", "epoch1.h5", "epoch2.h5"]
    with pytest.raises(OptionError, match="4 units"):
        sites[0].plot.checkpoints(record()["l0"])


@pytest.mark.parametrize(
    ("method", "arguments", "message"),
    [
        ("saturation", ["hidden"], "has no 'hidden'"),
        ("stages", ["input"], "but not 'input'"),
        ("checkpoints", [], ""),
        ("gradients", [], "record=('hidden', 'gradient')"),
        ("selectivity", ["pos"], "there is no label 'pos'"),
    ],
)
def test_what_was_not_recorded_is_said(method, arguments, message) -> None:
    plots = record()["l0"].plot
    if not message:
        getattr(plots, method)()  # Control: one trace is a picture, too.
        return
    with pytest.raises(NotRecordedError, match=re.escape(message)):
        getattr(plots, method)(*arguments)


def test_every_picture_survives_nan_everywhere() -> None:
    layer = torch.nn.GRU(2, 3)
    labels = {"half": [[0, 0, 1, 1]] * 3}
    with grutrace.trace(layer, check="off") as trace, trace.recording(labels=labels):
        layer(torch.full((4, 3, 2), torch.nan))
    plots = trace["l0"].plot
    for draw in (
        plots.saturation, plots.timescales, plots.autocorrelation, plots.decompose, plots.stages,
        plots.memory_map, plots.lines, lambda: plots.selectivity("half"), plots.checkpoints,
        lambda: plots.change(trace["l0"]),
    ):  # fmt: skip
        draw().figure.draw_without_rendering()
    with pytest.raises(OptionError, match="at least two units"):
        plots.trajectories()
