"""Tests of the statistics file: it follows docs/format.md, stays current, and is validated."""

from __future__ import annotations

import errno
import json
import os
import random
import time

import h5py
import numpy as np
import pytest
import torch
from torch import nn

import grutrace
from grutrace.__main__ import main
from grutrace.statistics import file as file_module
from tests import forks
from tests.checks import EVERYTHING
from tests.statistics.oracle import assert_figures, assert_same


def plain_read(path):
    """Everything in a file, written from docs/format.md with plain h5py: by site and quantity."""
    results = {}
    with h5py.File(path, "r") as file:
        assert file.attrs["format"] == "grutrace statistics"
        assert file.attrs["format_version"].tolist() == [1, 0]
        modules = file["modules"][()]
        for number in range(len(file["sites"])):
            site = file["sites"][str(number)]
            about = site["site"][()]
            figures = {
                name: (site[name]["units"][()], site[name]["histogram"][()])
                for name in ("reset", "update", "candidate", "hidden")
                if name in site
            }
            results[site.attrs["name"]] = (modules[about["module"]], about, figures)
        counted = file["counted"][()]
    return results, counted


@pytest.fixture
def layer():
    torch.manual_seed(0)
    return nn.GRU(5, 7, 2, bidirectional=True)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "stats.h5"


def count(layer, statistics, calls=2, **options):
    with grutrace.trace(layer, record=EVERYTHING, sink=statistics, **options) as tracer:
        for _ in range(calls):
            layer(torch.randn(11, 3, 5))
        yield tracer


def counted(layer, *arguments, calls=2, **options):
    statistics = grutrace.Statistics(*arguments, **options)
    for _ in count(layer, statistics, calls):
        pass
    return statistics


def test_a_file_holds_the_statistics(layer, path) -> None:
    statistics = counted(layer, path)
    assert_same(grutrace.Statistics.load(path), statistics, exactly=True)
    assert os.listdir(path.parent) == ["stats.h5"]


def test_the_format_follows_the_specification(layer, path) -> None:
    """Against NumPy on a full trace, read by code written from the specification."""
    statistics = grutrace.Statistics(path, bins=16)
    with grutrace.trace(layer, sink=statistics), grutrace.trace(layer, gates="inline") as full:
        layer(torch.randn(11, 3, 5))
        layer(torch.randn(4, 3, 5))
    result, about = plain_read(path)
    assert about["bins"] == 16
    assert about["created"] <= about["saved"] <= time.time()
    assert tuple(result) == full.sites
    for name, (module, site, figures) in result.items():
        assert module.item() == (2, 6, 45, 1)
        assert site["residual"] == np.float32(full[name].residual)
        assert site["unchecked"] == 0
        for quantity, (units, histogram) in figures.items():
            values = np.asarray(full[name].rows(quantity)).astype(np.float64)
            assert (units["count"] == len(values)).all()
            low = 0.0 if quantity in ("reset", "update") else -1.0
            expected = [np.histogram(column, 16, (low, 1.0))[0] for column in values.T]
            assert histogram.tolist() == np.array(expected).tolist()
            np.testing.assert_allclose(units["mean"], values.mean(axis=0), rtol=0, atol=1e-15)
            np.testing.assert_allclose(units["squares"] / len(values), values.var(axis=0))
            assert (units["minimum"] == values.min(axis=0)).all()
            assert (units["below"] == (np.abs(values) < np.float32(0.1)).sum(axis=0)).all()


def test_the_file_is_current_after_a_flush_and_periodically(layer, path) -> None:
    statistics = grutrace.Statistics(path, save_seconds=0.2)
    running = count(layer, statistics, calls=1)
    assert not path.exists()
    tracer = next(running)
    tracer.flush()
    assert grutrace.Statistics.load(path).calls == 1
    layer(torch.randn(11, 3, 5))
    end = time.monotonic() + 20
    while grutrace.Statistics.load(path).calls < 2 and time.monotonic() < end:
        time.sleep(0.05)
    assert grutrace.Statistics.load(path).calls == 2
    assert list(running) == []


KILLED = """
import sys, torch, grutrace
layer = torch.nn.GRU(5, 7)
statistics = grutrace.Statistics("stats.h5", save_seconds=0.05)
with grutrace.trace(layer, sink=statistics) as tracer:
    while True:
        layer(torch.randn(11, 3, 5))
        tracer.flush()
        print(statistics.calls, flush=True)
"""


def test_a_killed_run_leaves_the_last_saved_state(path) -> None:
    with forks.start("-c", KILLED, cwd=path.parent) as victim:
        messages = [int(victim.stdout.readline()) for _ in range(40)]
        victim.kill()
        rest = victim.stdout.read()
    flushed = [*messages, *(int(line) for line in rest.splitlines())][-1]
    result = grutrace.Statistics.load(path)
    assert result.calls >= flushed
    assert result["l0"].update.count.tolist() == [33 * result.calls] * 7


def test_modes(layer, path) -> None:
    first = counted(layer, path)
    with pytest.raises(grutrace.TraceFileError, match=r"stats\.h5 exists.*overwrite.*'a'"):
        grutrace.Statistics(path)
    with pytest.raises(grutrace.OptionError, match="mode: expected one of w, overwrite, a; found"):
        grutrace.Statistics(path, mode="x")
    with pytest.raises(grutrace.TraceFileError, match="no folder"):
        grutrace.Statistics(path.parent / "missing" / "stats.h5")
    second = counted(layer, path, mode="a")
    assert second.calls == 4
    again = grutrace.Statistics.load(path)
    assert again.calls == 4
    assert again["l0"].update.count.tolist() == [4 * 33] * 7
    assert first.calls == 2
    with pytest.raises(grutrace.OptionError, match=r"bins: expected 32, as in .*found 8"):
        grutrace.Statistics(path, mode="a", bins=8)
    other = grutrace.Statistics(path, mode="a")
    with pytest.raises(grutrace.OptionError, match="sites: expected"):
        grutrace.Tracer(nn.GRU(5, 7), sink=other)
    third = counted(layer, path, mode="overwrite")
    assert (third.calls, grutrace.Statistics.load(path).calls) == (2, 2)
    new = counted(layer, path.with_name("new.h5"), mode="a")
    assert_same(grutrace.Statistics.load(path.with_name("new.h5")), new, exactly=True)


def test_an_existing_file_is_unchanged(layer, path) -> None:
    path.write_text("precious")
    with pytest.raises(grutrace.TraceFileError, match="exists"):
        grutrace.Statistics(path)
    with pytest.raises(grutrace.TraceFileError, match=r"stats\.h5"):
        grutrace.Statistics(path, mode="a")
    assert path.read_text() == "precious"
    path.unlink()
    statistics = grutrace.Statistics(path)
    path.write_text("came meanwhile")
    with pytest.raises(grutrace.TraceFileError, match="exists"):
        grutrace.Tracer(layer, sink=statistics)
    assert path.read_text() == "came meanwhile"
    assert os.listdir(path.parent) == ["stats.h5"]


def test_a_full_disk_leaves_the_last_saved_state(layer, path, monkeypatch) -> None:
    statistics = grutrace.Statistics(path)
    with grutrace.trace(layer, sink=statistics) as tracer:
        layer(torch.randn(11, 3, 5))
        tracer.flush()

        def full(*_):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(file_module, "_write", full)
        layer(torch.randn(11, 3, 5))
        with pytest.raises(grutrace.SinkError, match=r"stats\.h5.*No space left"):
            tracer.flush()
    assert grutrace.Statistics.load(path).calls == 1
    assert statistics.calls == 2
    assert os.listdir(path.parent) == ["stats.h5"]


def test_saving(layer, path) -> None:
    merged = counted(layer).merge(counted(layer))
    merged.save(path)
    assert_same(grutrace.Statistics.load(path), merged, exactly=True)
    with pytest.raises(grutrace.TraceFileError, match="exists"):
        merged.save(path)
    counted(layer).save(path, mode="overwrite")
    assert grutrace.Statistics.load(path).calls == 2
    with pytest.raises(grutrace.OptionError, match="mode: expected one of w, overwrite; found 'a'"):
        merged.save(path, mode="a")
    with pytest.raises(grutrace.StateError, match="nothing to save"):
        grutrace.Statistics().save(path.with_name("none.h5"))


def test_a_statistics_file_is_not_a_trace(layer, path, capsys) -> None:
    counted(layer, path)
    message = r"stats\.h5.*a statistics file: use grutrace\.Statistics\.load or `grutrace stats`"
    with pytest.raises(grutrace.TraceFileError, match=message):
        grutrace.open(path)
    with pytest.raises(grutrace.TraceFileError, match=message):
        grutrace.Tracer(layer, path, mode="a")
    for command in ("info", "verify"):
        assert main([command, str(path)]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert "grutrace stats" in error


def test_the_table_equals_that_of_the_trace(layer, tmp_path, capsys) -> None:
    statistics = grutrace.Statistics(tmp_path / "stats.h5")
    with grutrace.trace(layer, sink=statistics), grutrace.trace(layer, tmp_path / "run.h5"):
        layer(torch.randn(40, 3, 5))
    printed = []
    for name in ("stats.h5", "run.h5"):
        assert main(["stats", str(tmp_path / name)]) == 0
        printed.append(capsys.readouterr().out)
        assert main(["stats", str(tmp_path / name), "--json"]) == 0
        printed.append(json.loads(capsys.readouterr().out))
    assert printed[0] == printed[2]
    assert "candidate" in printed[0]
    for ours, theirs in zip(printed[1], printed[3], strict=True):
        for gate, figures in theirs["gates"].items():
            assert ours["gates"][gate] == pytest.approx(figures, rel=1e-12)
    assert main(["stats", str(tmp_path / "missing.h5")]) == 2
    assert "does not exist" in capsys.readouterr().err


def test_a_trace_is_not_a_statistics_file(layer, path) -> None:
    with grutrace.trace(layer, path):
        layer(torch.randn(11, 3, 5))
    with pytest.raises(grutrace.TraceFileError, match=r"is a trace: open it with grutrace\.open"):
        grutrace.Statistics.load(path)
    with pytest.raises(grutrace.TraceFileError, match="does not exist"):
        grutrace.Statistics.load(path.with_name("missing.h5"))
    with pytest.raises(grutrace.TraceFileError, match="is not a file"):
        grutrace.Statistics.load(path.parent)


def replaced(file, path_in_file, data, **options):
    del file[path_in_file]
    file.create_dataset(path_in_file, data=data, **options)


UNITS = "sites/0/update/units"
HISTOGRAM = "sites/0/update/histogram"


def changed(file, path_in_file, field, value):
    table = file[path_in_file][()]
    table[field] = value
    file[path_in_file][...] = table


def huge(file):
    """A dataset of an exabyte, of which not a byte is there."""
    del file[UNITS]
    file.create_dataset(UNITS, (2**53,), file_module.UNIT_DTYPE)


def linked_over_and_over(file):
    """The same small data by many names, together more than the file holds."""
    big = file.create_dataset("big", data=np.zeros(20_000, file_module.UNIT_DTYPE))
    for number in range(4, 2000):
        group = file["sites"].create_group(str(number))
        group.attrs["name"] = f"l{number}"
        group["site"] = file["sites/0/site"]
        group.create_group("input")["units"] = big


DAMAGES = {
    "another format": lambda file: file.attrs.__setitem__("format", "other"),
    "no format": lambda file: file.attrs.__delitem__("format"),
    "a format that is no text": lambda file: file.attrs.__setitem__("format", 3),
    "a version that is none": lambda file: file.attrs.__setitem__("format_version", "1"),
    "no sites": lambda file: file.__delitem__("sites"),
    "no first site": lambda file: file.move("sites/0", "sites/9"),
    "no name": lambda file: file["sites/0"].attrs.__delitem__("name"),
    "no units": lambda file: file.__delitem__(UNITS),
    "no histogram": lambda file: file.__delitem__(HISTOGRAM),
    "a group for data": lambda file: (file.__delitem__(UNITS), file.create_group(UNITS)),
    "units of another type": lambda file: replaced(file, UNITS, np.zeros(7)),
    "a table of units": lambda file: replaced(
        file, UNITS, np.zeros((7, 2), file_module.UNIT_DTYPE)
    ),
    "other bins": lambda file: replaced(file, HISTOGRAM, np.zeros((7, 8), "<i8")),
    "packed data": lambda file: replaced(
        file, HISTOGRAM, np.zeros((7, 32), "<i8"), compression="gzip"
    ),
    "a link to elsewhere": lambda file: (
        file.__delitem__(UNITS),
        file.__setitem__(UNITS, h5py.ExternalLink("other.h5", "units")),
    ),
    "a negative count": lambda file: changed(file, UNITS, "nan", -1),
    "a count that is not in the bins": lambda file: changed(file, UNITS, "count", 5),
    "shares of more": lambda file: changed(file, UNITS, "below", 10**6),
    "bins that there are not": lambda file: changed(file, "counted", "bins", 20),
    "a negative number of annotations": lambda file: changed(file, "counted", "annotations", -3),
    "a module that there is not": lambda file: changed(file, "sites/0/site", "module", 5),
    "a negative number of calls": lambda file: changed(file, "modules", "calls", -5),
    "more modules than sites": lambda file: replaced(
        file, "modules", np.zeros(3, file_module.MODULE_DTYPE)
    ),
    "more than there is": huge,
    "more than there is, by links": linked_over_and_over,
}


#: How the message begins, for a file with another format or a damaged file.
DAMAGED = r"stats\.h5 (is damaged|cannot be read|is not a grutrace statistics file)"


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_one_clear_error(damage, layer, path) -> None:
    counted(layer, path)
    with h5py.File(path, "r+") as file:
        DAMAGES[damage](file)
    with pytest.raises(grutrace.TraceFileError, match=DAMAGED):
        grutrace.Statistics.load(path)


def test_a_truncated_or_scrambled_file(layer, path) -> None:
    """It is refused, or the arrays have the right shapes. There is no other error."""
    counted(layer, path)
    whole = path.read_bytes()
    numbers = random.Random(0)
    refused = 0
    for trial in range(150):
        data = bytearray(whole)
        if trial % 3 == 0:
            data = data[: numbers.randrange(len(data))]
        else:
            for _ in range(numbers.randrange(1, 20)):
                data[numbers.randrange(len(data))] = numbers.randrange(256)
        path.write_bytes(data)
        try:
            result = grutrace.Statistics.load(path)
            for name in result.sites:
                assert result[name].steps >= 0
        except grutrace.TraceFileError:
            refused += 1
    assert 50 <= refused < 150


def test_loaded_statistics(layer, path) -> None:
    with grutrace.trace(layer, gates="inline") as full:
        counted(layer, path)
    result = grutrace.Statistics.load(path)
    for name in full.sites:
        assert_figures(result[name].update, np.asarray(full[name].update))
