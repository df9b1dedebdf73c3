"""Tests of the CSV tables, read with Python's csv module and with pandas."""

from __future__ import annotations

import csv
from typing import Any

import numpy as np
import pandas
import pytest

import grutrace
from grutrace.export.formats import export_trace
from tests.export.expected import QUANTITIES, Expected, as_texts

SEQUENCE_COLUMNS = ("length", "first_call", "place", "parent", "parent_steps")


@pytest.fixture
def folder(full, tmp_path) -> Any:
    with grutrace.open(full) as trace:
        export_trace(trace, tmp_path / "out", "csv")
    return tmp_path / "out"


def table(path: Any) -> dict[str, list[str]]:
    with path.open(newline="", encoding="utf-8") as file:
        names, *rows = csv.reader(file)
    assert all(len(row) == len(names) for row in rows)
    return {name: [row[column] for row in rows] for column, name in enumerate(names)}


def numbers(table: dict[str, list[str]], kind: str, dtype: Any) -> np.ndarray:
    columns = [values for name, values in table.items() if name.startswith(f"{kind}_")]
    return np.array(columns, float).T.astype(dtype)


def check_site(folder: Any, group: str, values: Any, derived: Any) -> None:
    """Every table of a site against what is expected of it."""
    names = [name for name in QUANTITIES if name in values]
    for name in (*names, "initial"):
        result = table(folder / f"{group}.{name}.csv")
        kind = "feature" if name == "input" else "unit"
        if kind == "unit":
            units = [column for column in result if column.startswith("unit_")]
            assert units == [f"unit_{number}" for number in values["unit"]]
        if len(values[name]):
            rows = numbers(result, kind, values[name].dtype)
            if (group, name) in derived:
                np.testing.assert_allclose(rows, values[name], atol=1e-6)
            else:
                np.testing.assert_array_equal(rows, values[name])
        if name == "initial":
            assert result["sequence"] == [str(number) for number in range(len(rows_of(values)))]
            continue
        for column, texts in result.items():
            if column in ("sequence", "time", "call"):
                assert [int(text) for text in texts] == values[column].tolist()
            elif not column.startswith(f"{kind}_"):
                assert texts == as_texts(values[column])


def rows_of(values: Any) -> Any:
    return values["length"]


def test_everything_is_exported(folder, full) -> None:
    expected = Expected(full)
    for group, values in expected.groups.items():
        if group != "calls":
            check_site(folder, group, values, expected.derived)
    calls = table(folder / "calls.csv")
    for name, values in expected.groups["calls"].items():
        if isinstance(values, list):
            assert calls[name] == values
        else:
            assert [float(text) for text in calls[name]] == values.tolist()
    sequences = table(folder / "sequences.csv")
    for module in expected.trace.modules:
        own = [row for row, path in enumerate(sequences["module"]) if path == module.path]
        values = expected.groups[next(iter(expected.groups.keys() & groups_of(module)))]
        assert [sequences["sequence"][row] for row in own] == list(map(str, range(module.count)))
        for name in SEQUENCE_COLUMNS:
            assert [sequences[name][row] for row in own] == list(map(str, values[name]))


def groups_of(module: Any) -> set[str]:
    return {site.name.replace("/", "%2F") for site in module.sites.values()}


def test_control_a_wrong_value_is_noticed(folder, full) -> None:
    expected, group = Expected(full), "encoder.rnn.l0"
    path = folder / f"{group}.update.csv"
    lines = path.read_text().splitlines()
    check_site(folder, group, expected.groups[group], expected.derived)
    third_digit = lines[1].rindex(".") + 3
    other = "7" if lines[1][third_digit] != "7" else "6"
    for changed in (
        lines[1][:third_digit] + other + lines[1][third_digit + 1 :],
        lines[1].replace("the", "thx"),
        "1" + lines[1][1:],
    ):
        assert changed != lines[1]
        path.write_text("\n".join([lines[0], changed, *lines[2:]]))
        with pytest.raises(AssertionError):
            check_site(folder, group, expected.groups[group], expected.derived)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_numbers_are_read_back_exactly(tmp_path, dtype) -> None:
    """Numbers of all sizes, NaN and infinity."""
    from grutrace.export.csv_files import DIGITS

    bits = np.random.default_rng(0).bytes(20_000 * np.dtype(dtype).itemsize)
    values = np.frombuffer(bits, dtype)
    texts = [f"%.{DIGITS[values.dtype.name]}g" % value for value in values.tolist()]
    np.testing.assert_array_equal(np.array(list(map(float, texts))).astype(dtype), values)
    fewer = [f"%.{DIGITS[values.dtype.name] - 1}g" % value for value in values.tolist()]
    assert (np.array(list(map(float, fewer))).astype(dtype) != values).sum() > 100


def test_odd_texts_are_read_back(tmp_path) -> None:
    import torch

    words = [["a,b", 'say "x"', "two\nlines\r", " ", "ключ"]]
    layer = torch.nn.GRU(2, 3)
    tracer = grutrace.Tracer(layer, recording=False)
    with tracer, tracer.recording(tokens=words, labels={"n": [[1.0, np.nan, 2.5, -0.0, 1e300]]}):
        layer(torch.randn(5, 1, 2))
    export_trace(tracer, tmp_path / "out", "csv", record="update")
    result = table(tmp_path / "out" / "l0.update.csv")
    assert result["token"] == words[0]
    assert result["label_n"] == ["1", "", "2.5", "-0", "1.0000000000000001e+300"]
    frame = pandas.read_csv(tmp_path / "out" / "l0.update.csv", keep_default_na=False)
    assert list(frame["token"]) == words[0]


def test_pandas(folder, full) -> None:
    frame = pandas.read_csv(folder / "encoder.rnn.l0.update.csv")
    means = frame.groupby("sequence")[[c for c in frame if c.startswith("unit_")]].mean()
    with grutrace.open(full) as trace:
        for number, sequence in enumerate(trace["encoder.rnn.l0"]):
            if len(sequence):
                np.testing.assert_allclose(means.loc[number], sequence.update.mean(0), rtol=1e-5)
