"""Tests of `grutrace plot`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from matplotlib import pyplot

import grutrace
from grutrace.__main__ import main
from grutrace.view.plot_specs import PLOTS
from tests.view.conftest import record


@pytest.fixture
def path(tmp_path):
    record(tmp_path / "run.h5")
    return tmp_path / "run.h5"


@pytest.mark.parametrize(
    ("ending", "start"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")]
)
def test_it_writes_a_picture(path, tmp_path, ending, start, capsys) -> None:
    picture = tmp_path / f"update.{ending}"
    picture.write_bytes(b"earlier")
    command = ["plot", str(path), "heatmap", "--site", "l0", "--quantity", "update"]
    assert main([*command, "--sequence", "3", "-o", str(picture)]) == 0
    assert picture.read_bytes().startswith(start)
    assert capsys.readouterr() == ("", "")
    assert not pyplot.get_fignums()


def test_two_pictures_of_one_trace_are_the_same(path, tmp_path) -> None:
    for name in ("a.png", "b.png", "c.png"):
        sequence = "2" if name == "c.png" else "1"
        command = ["plot", str(path), "lines", "--sequence", sequence, "--steps", "1:5"]
        assert main([*command, "--units", "0,3", "-o", str(tmp_path / name)]) == 0
    first, second, other = ((tmp_path / f"{name}.png").read_bytes() for name in "abc")
    assert first == second
    assert first != other  # control


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["heatmap", "-o", "run.h5"], ".png, .svg, .pdf"),
        (["heatmaps", "-o", "a.png"], "did you mean 'heatmap'"),
        (["heatmap", "--sequence", "7", "-o", "a.png"], "no sequence 7"),
        (["heatmap", "--site", "l1", "-o", "a.png"], "recorded sites: 'l0'"),
        (["lines", "--order", "number", "-o", "a.png"], "takes no --order"),
        (["heatmap", "--steps", "five", "-o", "a.png"], "steps: expected"),
        (["heatmap", "-o", "missing/a.png"], "no folder"),
    ],
)
def test_errors_are_one_line_and_leave_no_file(
    path, tmp_path, arguments, message, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    content = path.read_bytes()
    assert main(["plot", "run.h5", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert [each.name for each in tmp_path.iterdir()] == ["run.h5"]
    assert path.read_bytes() == content


@pytest.mark.parametrize("kind", sorted(PLOTS))
def test_every_kind_is_drawn(kind, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    quantities = ("reset", "update", "candidate", "hidden", "input", "gradient")
    for name in ("a.h5", "b.h5"):
        layer = torch.nn.GRU(3, 9, batch_first=True)
        labels = {"late": [[0, 0, 0, 1, 1, 1]] * 5}
        with (
            grutrace.trace(layer, name, record=quantities) as trace,
            trace.recording(labels=labels),
        ):
            output, _ = layer(torch.randn(5, 6, 3))
            output[:, -1].sum().backward()
    spec = PLOTS[kind]
    values = {"label": ["--label", "late"], "against": ["--against", "b.h5"]}
    options = [part for name in spec.required for part in values[name]]
    assert main(["plot", "a.h5", kind, *options, "--sequences", "1:", "-o", "a.png"]) == 0
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_a_selection_is_drawn(path, tmp_path, monkeypatch) -> None:
    drawn = []
    monkeypatch.setattr(
        "grutrace.cli.pictures.plot.save_plot", lambda site, *args: drawn.append((len(site), *args))
    )
    command = ["plot", str(path), "lines", "--tokens", "^ t1", "-o", "a.png"]
    assert main([*command, "--sequence", "1"]) == 0
    assert drawn == [(2, "lines", Path("a.png"), [], {"sequence": 1})]
