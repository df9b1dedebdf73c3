"""Tests of `site.plot.heatmap`: its values, order, colours and texts."""

from __future__ import annotations

import re

import numpy as np
import pytest

import grutrace
from grutrace.errors import NotRecordedError, OptionError
from grutrace.view.plots import heatmap
from grutrace.view.plots.colors import color_scale
from grutrace.view.plots.unit_order import by_last_write, by_similarity, by_timescale, last_writes
from tests.view.conftest import record
from tests.view.pictures import image_of, new_axes, ticks_of


@pytest.mark.parametrize("quantity", ["reset", "update", "candidate", "hidden", "input"])
def test_it_shows_the_values_of_the_sequence(trace, quantity) -> None:
    ax = trace["l0"].plot.heatmap(quantity, sequence=3, order="number")
    expected = trace["l0"].sequence(3).rows(quantity).T
    np.testing.assert_array_equal(image_of(ax), expected)
    assert "l0" in ax.get_title()
    assert "sequence 3" in ax.get_title()


def test_control_another_sequence_has_other_values(trace) -> None:
    ax = trace["l0"].plot.heatmap("update", sequence=2, order="number")
    assert (image_of(ax) != trace["l0"].sequence(3).update.T).any()


def test_it_draws_in_the_given_axes(trace) -> None:
    ax = new_axes()
    assert trace["l0"].plot.heatmap(ax=ax) is ax


def test_tokens_and_labels_are_beneath_the_steps(trace) -> None:
    ax = trace["l0"].plot.heatmap(sequence=1)
    assert ticks_of(ax) == ["t1\nno", "t2\nno", "t0\nno", "t1\nyes", "t2\nyes", "t0\nyes"]
    assert list(ax.get_xticks()) == list(range(6))
    ax = trace["l0"].plot.heatmap(sequence=1, steps=slice(2, 4), labels=[])
    assert ticks_of(ax) == ["t0", "t1"]
    assert image_of(ax).shape == (7, 2)


@pytest.mark.parametrize("order", ["similarity", "timescale", "last write", "label"])
def test_units_are_sorted_and_numbered_and_the_title_says_how(trace, order) -> None:
    label = {"label": "late"} if order == "label" else {}
    site = trace["l0"]
    ax = site.plot.heatmap("hidden", sequence=0, order=order, **label)
    units = [int(text.get_text()) for text in ax.get_yticklabels()]
    assert sorted(units) == list(range(7))
    np.testing.assert_array_equal(image_of(ax), site.sequence(0).hidden.T[units])
    assert {"label": "late", "similarity": "clustered"}.get(order, order) in ax.get_title()


def test_only_the_units_asked_for(trace) -> None:
    ax = trace["l0"].plot.heatmap(units=[5, 2], order="number")
    np.testing.assert_array_equal(image_of(ax), trace["l0"].sequence(0).update.T[[5, 2]])
    ax = trace["l0"].plot.heatmap(units=slice(4, 6), order="number")
    np.testing.assert_array_equal(image_of(ax), trace["l0"].sequence(0).update.T[4:6])


def test_units_of_a_trace_of_some_units_have_their_own_numbers() -> None:
    site = record(units=[6, 1, 4])["l0"]
    ax = site.plot.heatmap(units=[4, 6], order="number")
    assert [text.get_text() for text in ax.get_yticklabels()] == ["4", "6"]
    np.testing.assert_array_equal(image_of(ax), site.sequence(0).update.T[[2, 0]])


def test_similar_units_are_adjacent() -> None:
    random = np.random.default_rng(0)
    courses = random.uniform(size=(40, 3))
    kinds = random.permutation(np.repeat([0, 1, 2], 10))
    values = courses[:, kinds] + 0.01 * random.normal(size=(40, 30))
    sorted_kinds = kinds[by_similarity(values).positions]
    assert np.count_nonzero(np.diff(sorted_kinds)) == 2
    assert np.count_nonzero(np.diff(kinds)) > 2  # control


def test_clusters_are_those_of_scipy() -> None:
    from scipy.cluster.hierarchy import fcluster, linkage

    values = np.random.default_rng(1).uniform(size=(12, 25))
    groups = fcluster(linkage(values.T, "average"), 6, "maxclust")
    sorted_groups = groups[by_similarity(values).positions]
    # Each cluster is a run of adjacent units.
    assert np.count_nonzero(np.diff(sorted_groups)) == len(set(groups)) - 1


def test_units_by_timescale_and_by_last_write() -> None:
    update = np.array([[0.1, 0.9, 0.2], [0.9, 0.9, 0.4], [0.6, 0.9, 0.5]])
    assert by_timescale(update).positions.tolist() == [2, 0, 1]
    assert last_writes(update).tolist() == [0, -1, 1]
    assert by_last_write(update).positions.tolist() == [1, 0, 2]


def test_the_color_bar_says_what_the_gates_mean(trace) -> None:
    ax = trace["l0"].plot.heatmap("update")
    bar = ax.images[0].colorbar
    assert (bar.vmin, bar.vmax) == (0, 1)
    assert [text.get_text() for text in bar.ax.get_yticklabels()] == [
        "0\noverwrites", "0.5", "1\nkeeps"
    ]  # fmt: skip


@pytest.mark.parametrize("quantity", ["candidate", "hidden", "input", "gradient"])
def test_signed_quantities_are_centred_at_zero(quantity) -> None:
    scale = color_scale(quantity, np.array([-0.2, 3.0]))
    assert scale.low == -scale.high
    red, green, blue, _ = scale.map(0.5)
    assert min(red, green, blue) > 0.95


def test_the_lightness_of_the_map_of_gates_grows_with_the_value() -> None:
    colors = color_scale("update", np.zeros(1)).map(np.linspace(0, 1, 64))[:, :3]
    lightness = colors @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(lightness) > 0).all()


def test_long_sequences_are_averaged(monkeypatch, trace) -> None:
    monkeypatch.setattr(heatmap, "MAX_COLUMNS", 4)
    ax = trace["l0"].plot.heatmap("hidden", order="number")
    hidden = trace["l0"].sequence(0).hidden
    np.testing.assert_allclose(image_of(ax), hidden.reshape(3, 2, 7).mean(1).T, atol=1e-7)
    assert "each column the mean of 2 steps" in ax.get_title()


def test_many_tokens_are_thinned() -> None:
    import torch

    layer = torch.nn.GRU(2, 3)
    with grutrace.trace(layer) as trace, trace.recording(tokens=[[str(n) for n in range(500)]]):
        layer(torch.randn(500, 1, 2))
    ax = trace["l0"].plot.heatmap()
    ticks = ticks_of(ax)
    assert 20 < len(ticks) < 60
    assert ticks == [str(int(position)) for position in ax.get_xticks()]


def test_hostile_texts_are_drawn_as_text(tmp_path) -> None:
    import torch

    token = "$\\frac{1}{$ <b>\n\x00"
    layer = torch.nn.ModuleDict({"$x_": torch.nn.GRU(2, 3)})
    with grutrace.trace(layer) as trace, trace.recording(tokens=[[token] * 4]):
        layer["$x_"](torch.randn(4, 1, 2))
    ax = trace["$x_.l0"].plot.heatmap()
    ax.figure.savefig(tmp_path / "picture.svg")
    assert ticks_of(ax)[0].startswith("$\\frac")
    assert not ticks_of(ax)[0].count("\n")


def test_nan_everywhere_is_drawn_and_said() -> None:
    import torch

    layer = torch.nn.GRU(2, 3)
    with grutrace.trace(layer, check="off") as trace, torch.no_grad():
        layer(torch.full((4, 1, 2), torch.nan))
    for order in ("similarity", "timescale", "last write"):
        ax = trace["l0"].plot.heatmap("update", order=order)
        assert np.isnan(image_of(ax)).all()
        assert "12 values are not finite" in ax.get_title()
        ax.figure.draw_without_rendering()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"quantity": "updat"}, NotRecordedError, "updat"),
        ({"sequence": 99}, NotRecordedError, "99"),
        ({"order": "beauty"}, OptionError, "expected one of similarity"),
        ({"order": "label"}, OptionError, "late"),
        ({"order": "label", "label": "pos"}, NotRecordedError, "pos"),
        ({"label": "late"}, OptionError, "order='similarity'"),
        ({"units": [7]}, OptionError, "expected different units of the 7"),
        ({"units": [1, 1]}, OptionError, "expected different units"),
        ({"steps": slice(0, 6, 2)}, OptionError, "consecutive"),
        ({"steps": slice(6, 9)}, NotRecordedError, "nothing to draw"),
        ({"labels": ["pos"]}, NotRecordedError, "no label 'pos'; it has late"),
    ],
)
def test_wrong_arguments_have_one_clear_error(arguments, error, message) -> None:
    with pytest.raises(error, match=re.escape(message)):
        record()["l0"].plot.heatmap(**arguments)


def test_an_order_by_the_update_gate_needs_it() -> None:
    site = record(record="hidden")["l0"]
    with pytest.raises(OptionError, match="needs the update gate"):
        site.plot.heatmap("hidden", order="timescale")
    site.plot.heatmap("hidden")
