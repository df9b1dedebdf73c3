"""Tests of the recording options of `grutrace run`, and of `grutrace info` on its files."""

from __future__ import annotations

import json
import sys

import h5py
import pytest
import torch
from torch import nn

import grutrace
from grutrace.__main__ import main
from grutrace.run import parsing
from tests.run.test_run import run_in_fork as run
from tests.run.test_run import write

#: Two models, so that the run has two parts.
TWO_MODELS = """
import torch
from torch import nn
torch.manual_seed(0)
first, second = nn.GRU(3, 8), nn.GRU(3, 6, 2)
for _ in range(5):
    first(torch.randn(7, 2, 3))
for _ in range(5):
    second(torch.randn(7, 2, 3))
print("done")
"""


def test_every_and_dtype(tmp_path) -> None:
    program = write(tmp_path, TWO_MODELS)
    result = run("--every", "2", "--dtype", "float16", program, folder=tmp_path)
    assert (result.returncode, result.stdout) == (0, "done\n"), result.stderr
    with grutrace.open(tmp_path / "run.h5") as trace:
        assert trace.calls["module"].tolist() == [""] * 3 + ["GRU#2"] * 3
        assert trace["l0"].update.dtype == "float16"
    assert main(["verify", str(tmp_path / "run.h5")]) == 0


def test_compression(tmp_path, monkeypatch, capsys) -> None:
    program = write(tmp_path, TWO_MODELS)
    result = run("--compression", "blosc2", program, folder=tmp_path)
    assert (result.returncode, result.stdout) == (0, "done\n"), result.stderr
    assert main(["info", str(tmp_path / "run.h5")]) == 0
    assert "compressed with blosc2" in capsys.readouterr().out
    with h5py.File(tmp_path / "run.part0002.h5") as file:
        assert file["modules/%/l1/update"].id.get_create_plist().get_nfilters() == 1
        assert file["modules/%/l1/weight_hh"].id.get_create_plist().get_nfilters() == 0
    assert main(["run", "--compression", "lzma", program]) == 2
    monkeypatch.setitem(sys.modules, "hdf5plugin", None)
    assert main(["run", "--compression", "zstd", program]) == 2
    assert 'pip install "hdf5plugin' in capsys.readouterr().err


@pytest.mark.parametrize("calls", [3, 5, 7])
def test_max_calls_counts_the_whole_run(calls, tmp_path) -> None:
    program = write(tmp_path, TWO_MODELS)
    result = run("--max-calls", str(calls), program, folder=tmp_path)
    assert (result.returncode, result.stdout) == (0, "done\n"), result.stderr
    assert f"recorded {calls} calls" in result.stderr
    with grutrace.open(tmp_path / "run.h5") as trace:
        assert len(trace.calls) == calls
        assert len(trace.sites) == (1 if calls <= 5 else 3)


def test_max_bytes(tmp_path) -> None:
    program = write(tmp_path, TWO_MODELS)
    result = run("--max-bytes", "10kB", program, folder=tmp_path)
    assert (result.returncode, result.stdout) == (0, "done\n"), result.stderr
    with grutrace.open(tmp_path / "run.h5") as trace:
        # A call: 14 steps of 4 quantities and 2 states, of 8 units. And the weights, once.
        assert len(trace.calls) == (10_000 - 4 * 24 * (3 + 8 + 2)) // (4 * 8 * (14 * 4 + 2)) == 4
        assert trace.header.options["max_bytes"] == 10_000


def test_units(tmp_path) -> None:
    program = write(tmp_path, TWO_MODELS)
    for asked, expected in (("1,-2", [(1, 6), (1, 4)]), (":4:2", [(0, 2), (0, 2)])):
        result = run("--units", asked, "--mode", "overwrite", program, folder=tmp_path)
        assert (result.returncode, result.stdout) == (0, "done\n"), result.stderr
        with grutrace.open(tmp_path / "run.h5") as trace:
            assert [trace[name].units for name in ("l0", "GRU#2.l1")] == expected
            assert trace["l0"].update.shape == (70, 2)


def test_steps(tmp_path) -> None:
    program = write(tmp_path, TWO_MODELS)
    result = run("--steps", "2:5", program, folder=tmp_path)
    assert (result.returncode, result.stdout) == (0, "done\n"), result.stderr
    with grutrace.open(tmp_path / "run.h5") as trace:
        assert set(trace["l0"].lengths) == set(trace["GRU#2.l1"].lengths) == {3}
    assert main(["verify", str(tmp_path / "run.h5")]) == 0


def test_a_layer_without_a_requested_unit_is_reported(tmp_path) -> None:
    program = write(tmp_path, TWO_MODELS)
    result = run("--units", "7", program, folder=tmp_path)
    assert (result.returncode, result.stdout) == (0, "done\n")
    assert "units of l0, which has 6: found 7" in result.stderr
    with grutrace.open(tmp_path / "run.h5") as trace:
        assert trace.sites == ("l0",)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--every", "0"], "every: expected a whole number from 1, found 0"),
        (["--max-calls", "-3"], "max_calls: expected a whole number from 1, found -3"),
        (["--max-bytes", "0"], "max_bytes: expected a whole number from 1, found 0"),
        (["--max-bytes", "lots"], "max_bytes: expected a size such as 10GB or 512MiB, found 'lots"),
        (["--units", "a,b"], "units: expected numbers separated by commas, or a range such as 0:3"),
        (["--units", "0:1:2:3"], "or a range such as 0:32, found '0:1:2:3'"),
        (["--units", "0:8", "--gates", "deferred"], "units: expected none with gates deferred"),
        (["--steps", "5"], "steps: expected a range such as 5:20, from 0 on, found '5'"),
        (["--steps", "9:5"], "steps: expected a range such as 5:20, from 0 on, found '9:5'"),
        (["--steps=-1:5"], "steps: expected a range such as 5:20, from 0 on, found '-1:5'"),
        (["--dtype", "half"], "dtype: expected one of float16, float32, float64; found 'half'"),
    ],
)
def test_a_wrong_option_is_one_line_before_the_script_starts(options, message, tmp_path) -> None:
    program = write(tmp_path, TWO_MODELS)
    result = run(*options, program, folder=tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("500000", 500_000),
        ("10GB", 10**10),
        ("1.5k", 1500),
        ("512MiB", 512 * 2**20),
        ("2 tb", 2 * 10**12),
        ("7B", 7),
    ],
)
def test_sizes(text, expected) -> None:
    assert parsing.parse_size(text) == expected


def test_info_shows_what_was_not_recorded(tmp_path, capsys) -> None:
    path = tmp_path / "run.h5"
    layer = nn.GRU(2, 3)
    with grutrace.trace(layer, path, every=3, dtype="float16", max_calls=9):
        layer(torch.randn(4, 2))
    assert main(["info", str(path)]) == 0
    assert "recorded only in part: every 3, max_calls 9, dtype float16\n" in capsys.readouterr().out
    assert main(["info", str(path), "--json"]) == 0
    options = json.loads(capsys.readouterr().out)["options"]
    assert (options["every"], options["max_calls"], options["dtype"]) == (3, 9, "float16")
