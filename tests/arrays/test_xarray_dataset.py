"""Tests of `Trace.to_xarray`, against the records."""

from __future__ import annotations

import pickle
import sys

import numpy as np
import pytest
import xarray
from hypothesis import HealthCheck, given, settings

import grutrace
from grutrace.arrays import xarray_dataset
from grutrace.errors import MissingExtraError, NotRecordedError
from grutrace.storage.memory import MemorySink
from grutrace.storage.open import open_trace
from grutrace.storage.read.lazy_rows import FileRows
from grutrace.storage.read.trace import Trace
from grutrace.storage.write.file_sink import FileSink
from tests.storage.oracle import Expected
from tests.storage.streams import drawn_streams, full_stream


def write(path, stream):
    sink = FileSink(path, stream.header)
    for record in stream.records:
        sink.append(record)
    sink.close()


def in_memory(stream):
    sink = MemorySink(stream.header)
    for record in stream.records:
        sink.append(record)
    return Trace(sink)


def check(trace, stream):
    """Everything that a Dataset of each site shows; gates that are derived elsewhere."""
    expected = Expected(stream.header, stream.records)
    for number, module in enumerate(stream.header.modules):
        for site in module.sites:
            check_ragged(trace.to_xarray(site.name), expected, number, site)
            check_padded(trace.to_xarray(site.name, padded=True), expected, number, site)


def annotations(expected, module, number, length):
    named = expected.annotated(module, number, length)
    return {"token" if name == "tokens" else f"label_{name}": named[name] for name in named}


def same(actual, values):
    """A column of numbers, or one with texts, against one value a step, None for none."""
    if actual.dtype == object:
        assert actual.tolist() == values
    else:
        numbers = [np.nan if value is None else value for value in values]
        np.testing.assert_array_equal(actual, np.array(numbers, float))


def check_ragged(dataset, expected, module, site):
    blocks = expected.blocks
    sequences = expected.sequences(module)
    for quantity in site.quantities:
        last = "feature" if quantity == "input" else "unit"
        assert dataset[quantity].dims == ("step", last)
        rows = expected.all_rows(module, site, quantity)
        assert dataset[quantity].dtype == rows.dtype
        np.testing.assert_array_equal(dataset[quantity].values, rows)
    np.testing.assert_array_equal(dataset.initial, expected.initial(module, site.suffix))
    hidden = expected.header.modules[module].hidden_size
    assert dataset.unit.values.tolist() == list(range(hidden))
    lengths = {number: sum(piece[3] for piece in sequences[number]) for number in sequences}
    assert dataset.length.values.tolist() == [lengths[number] for number in sorted(lengths)]
    # Steps as they lie: by call, then by the place in its batch.
    seen = dict.fromkeys(sequences, 0)
    steps = []
    for call, block in enumerate(blocks):
        if block.module == module:
            for number, count in zip(block.sequences.tolist(), block.steps.tolist(), strict=True):
                steps += [(number, seen[number] + step, call) for step in range(count)]
                seen[number] += count
    for index, name in enumerate(("sequence", "time", "call")):
        assert dataset[name].dims == ("step",)
        assert dataset[name].values.tolist() == [step[index] for step in steps]
    tagged = any(block.tag is not None for block in expected.of(module))
    assert ("tag" in dataset.coords) == tagged
    if tagged:
        assert dataset.tag.values.tolist() == [blocks[call].tag for *_, call in steps]
    for number in sequences:
        own = [index for index, step in enumerate(steps) if step[0] == number]
        for name, values in annotations(expected, module, number, lengths[number]).items():
            same(dataset[name].values[own], values)


def check_padded(dataset, expected, module, site):
    sequences = expected.sequences(module)
    lengths = [sum(piece[3] for piece in sequences[number]) for number in sorted(sequences)]
    longest = max(lengths, default=0)
    assert dataset.length.values.tolist() == lengths
    assert dataset.sequence.values.tolist() == sorted(sequences)
    assert dataset.time.values.tolist() == list(range(longest))
    np.testing.assert_array_equal(dataset.initial, expected.initial(module, site.suffix))
    for number, pieces in sequences.items():
        assert expected.blocks[int(dataset.call[number])] is pieces[0][0]
        for quantity in site.quantities:
            exact = expected.rows(module, site.suffix, quantity, number)
            result = dataset[quantity].values[number]
            assert result.dtype == exact.dtype
            np.testing.assert_array_equal(result[: len(exact)], exact)
            assert np.isnan(result[len(exact) :]).all()
        if "tag" in dataset.coords:
            assert dataset.tag.values[number] == pieces[0][0].tag
        length = lengths[number]
        for name, values in annotations(expected, module, number, length).items():
            same(dataset[name].values[number], values + [None] * (longest - length))


def test_full_streams_are_read_back(tmp_path):
    stream = full_stream()
    write(tmp_path / "run.h5", stream)
    with open_trace(tmp_path / "run.h5") as trace:
        check(trace, stream)
    check(in_memory(stream), stream)


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(stream=drawn_streams())
def test_drawn_streams(stream, tmp_path_factory):
    path = tmp_path_factory.mktemp("drawn") / "run.h5"
    write(path, stream)
    with open_trace(path) as trace:
        check(trace, stream)
    check(in_memory(stream), stream)


def test_control_a_step_of_another_sequence_is_noticed(tmp_path, monkeypatch):
    stream = full_stream()
    write(tmp_path / "run.h5", stream)
    of = xarray_dataset.SequenceNumbers.values_at
    monkeypatch.setattr(
        xarray_dataset.SequenceNumbers, "values_at", lambda self, rows: of(self, rows)[::-1]
    )
    with open_trace(tmp_path / "run.h5") as trace, pytest.raises(AssertionError):
        check(trace, stream)


def test_without_dask_rows_are_read_on_access(tmp_path, monkeypatch):
    monkeypatch.setattr(xarray_dataset, "find_spec", lambda _: None)
    stream = full_stream()
    write(tmp_path / "run.h5", stream)
    read = []
    known = FileRows._read
    monkeypatch.setattr(FileRows, "_read", lambda self, *key: read.append(key) or known(self, *key))
    with open_trace(tmp_path / "run.h5") as trace:
        dataset = trace.to_xarray("encoder.rnn.l0")
        assert dataset["update"].chunks is None
        part = dataset["update"].isel(step=slice(2, 5), unit=slice(0, 2))
        assert not read
        exact = Expected(stream.header, stream.records).all_rows(
            0, stream.header.modules[0].sites[0], "update"
        )
        np.testing.assert_array_equal(part.values, exact[2:5, :2])
        assert [key[0] for key in read] == [slice(2, 5, 1)]
        np.testing.assert_array_equal(
            dataset.hidden.isel(step=[4, 0, 3]), trace["encoder.rnn.l0"].hidden[[4, 0, 3]]
        )
        check(trace, stream)


def test_nothing_is_read_until_it_is_computed(tmp_path, monkeypatch):
    write(tmp_path / "run.h5", full_stream())
    with open_trace(tmp_path / "run.h5") as trace:

        def refuse(*_):
            raise AssertionError("read")

        monkeypatch.setattr(FileRows, "_read", refuse)
        monkeypatch.setattr(FileRows, "_take", refuse)
        means = [
            trace.to_xarray("encoder.rnn.l0", padded=padded)["update"].mean("unit")
            for padded in (False, True)
        ]
        for mean in means:
            with pytest.raises(AssertionError, match="read"):
                mean.compute()


def test_common_operations(tmp_path):
    stream = full_stream()
    write(tmp_path / "run.h5", stream)
    expected = Expected(stream.header, stream.records)
    with open_trace(tmp_path / "run.h5") as trace:
        dataset = trace.to_xarray("encoder.rnn.l0")
        means = dataset["update"].groupby("sequence").mean().compute()
        for number in means.sequence.values.tolist():
            exact = expected.rows(0, "l0", "update", number).astype("f8").mean(axis=0)
            np.testing.assert_allclose(means.sel(sequence=number), exact, rtol=1e-5)
        assert set(means.sequence.values.tolist()) == {
            number for number in range(5) if len(expected.rows(0, "l0", "update", number))
        }
        firsts = dataset.hidden.where(dataset.time.compute() == 0, drop=True)
        assert firsts.sequence.values.tolist() == [0, 1, 2, 4]
        padded = trace.to_xarray("encoder.rnn.l0", padded=True)
        np.testing.assert_allclose(
            padded["update"].mean("time").sel(sequence=means.sequence), means, rtol=1e-5
        )
        assert padded["update"].sel(sequence=2, unit=1).shape == (4,)
        assert "keeps" in dataset.attrs["equations"] or "z * h'" in dataset.attrs["equations"]


def test_datasets_are_ragged_arrays_of_the_cf_conventions(tmp_path):
    """Contiguous if the steps of a sequence are adjacent, indexed otherwise."""
    write(tmp_path / "run.h5", full_stream())
    with open_trace(tmp_path / "run.h5") as trace:
        contiguous = trace.to_xarray("encoder.rnn.l0")
        ends = np.cumsum(contiguous.length.values)
        assert contiguous.length.attrs["sample_dimension"] == "step"
        assert (
            contiguous.sequence.values.tolist()
            == np.repeat(np.arange(len(ends)), contiguous.length.values).tolist()
        )
        indexed = trace.to_xarray("decoder/step.cell")
        assert "sample_dimension" not in indexed.length.attrs
        assert indexed.sequence.attrs["instance_dimension"] == "instance"
        assert np.bincount(indexed.sequence).tolist() == indexed.length.values.tolist()


@pytest.mark.parametrize("padded", [False, True])
def test_datasets_can_be_written_to_netcdf(padded, tmp_path):
    stream = full_stream()
    write(tmp_path / "run.h5", stream)
    with open_trace(tmp_path / "run.h5") as trace:
        dataset = trace.to_xarray("encoder.rnn.l0", padded=padded)
        dataset.to_netcdf(tmp_path / "out.nc", engine="h5netcdf")
        with xarray.open_dataset(tmp_path / "out.nc", engine="h5netcdf") as reopened:
            for name in ("update", "hidden", "initial", "length", "sequence", "time", "call"):
                np.testing.assert_array_equal(reopened[name], dataset[name])
            assert reopened.attrs == dataset.attrs
            tokens = ["" if token is None else token for token in dataset.token.values.flat]
            assert reopened.token.values.ravel().tolist() == tokens


@pytest.mark.parametrize("padded", [False, True])
def test_datasets_can_be_pickled(padded, tmp_path):
    stream = full_stream()
    write(tmp_path / "run.h5", stream)
    with open_trace(tmp_path / "run.h5") as trace:
        dataset = trace.to_xarray("encoder.rnn.l0", padded=padded)
        again = pickle.loads(pickle.dumps(dataset))
        xarray.testing.assert_identical(again.compute(), dataset.compute())


def test_selected_units_keep_their_numbers(tmp_path):
    import torch

    model = torch.nn.GRU(3, 8)
    with grutrace.trace(model, units=[5, 2]) as trace:
        model(torch.randn(4, 2, 3))
    dataset = trace.to_xarray("l0")
    assert dataset.unit.values.tolist() == [5, 2]
    np.testing.assert_array_equal(dataset.hidden.sel(unit=2), trace["l0"].hidden[:, 1])


def test_missing_sites_and_extras_are_named(tmp_path, monkeypatch):
    trace = in_memory(full_stream())
    with pytest.raises(NotRecordedError, match=r"recorded sites: 'encoder\.rnn\.l0'"):
        trace.to_xarray("encoder.rnn.l9")
    monkeypatch.setitem(sys.modules, "xarray", None)
    with pytest.raises(MissingExtraError, match=r'needs xarray, .* pip install "xarray'):
        trace.to_xarray("encoder.rnn.l0")


def test_a_missing_extra_is_named_at_the_first_import(monkeypatch):
    monkeypatch.delitem(sys.modules, "grutrace.arrays.xarray_dataset")
    for name in [name for name in sys.modules if name.partition(".")[0] == "xarray"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingExtraError, match=r'needs xarray, .* pip install "xarray'):
        in_memory(full_stream()).to_xarray("encoder.rnn.l0")
