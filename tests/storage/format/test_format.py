"""Trace files follow docs/format.md, as a reader written from that page shows."""

from __future__ import annotations

import h5py
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from grutrace.storage.format import schema
from grutrace.storage.open import open_trace
from grutrace.storage.write.writer import Writer
from tests.plain_reader import PlainTrace
from tests.storage.oracle import Expected
from tests.storage.streams import (
    ODD_PATHS,
    Stream,
    batches,
    drawn_streams,
    full_stream,
    make_header,
    make_module,
)


def write(path, stream, parts=1):
    writer = Writer(path, stream.header)
    for part in batches(stream.records, parts):
        for record in part:
            writer.write(record)
        writer.commit()
    writer.close()


def check_plain(plain, header, records):
    expected = Expected(header, records)
    assert (plain.model, plain.created) == (header.model, header.created)
    assert (plain.versions, plain.options) == (dict(header.versions), dict(header.options))
    assert [plain.tag(call) for call in plain.calls] == [block.tag for block in expected.blocks]
    assert plain.calls["time"].tolist() == [block.time for block in expected.blocks]
    assert plain.calls["training"].tolist() == [block.training for block in expected.blocks]
    assert plain.calls["weights"].tolist() == [block.weights for block in expected.blocks]
    forks = [(b.module, f.sequence, f.parent, f.steps) for b in expected.blocks for f in b.forks]
    assert plain.forks.tolist() == forks
    for number, (module, described) in enumerate(zip(plain.modules, header.modules, strict=True)):
        for name in ("path", "kind", "type", "hidden_size", "bias", "batch_first", "dropout"):
            assert module.attributes[name] == getattr(described, name)
        assert set(module.sites) == {site.suffix for site in described.sites}
        for site in described.sites:
            check_plain_site(module.sites[site.suffix], expected, number, site)


def check_plain_site(plain, expected, module, site):
    assert (plain.name, plain.layer, plain.reverse) == (site.name, site.layer, site.reverse)
    assert plain.input_size == site.input_size
    assert tuple(plain.rows) == site.quantities
    assert plain.derived == site.derived
    blocks = expected.of(module)
    np.testing.assert_array_equal(plain.initial, expected.initial(module, site.suffix))
    for name in ("residual", "tolerance", "precision"):
        exact = [np.float32(getattr(block.sites[site.suffix], name)) for block in blocks]
        assert plain.checks[name].tolist() == exact
    for record in expected.weights:
        if record.module == module and record.version < plain.module.weight_versions:
            for name, array in record.sites[site.suffix].items():
                np.testing.assert_array_equal(plain.weights[name][record.version], array)
    for number, pieces in expected.sequences(module).items():
        for quantity in site.quantities:
            exact = expected.rows(module, site.suffix, quantity, number)
            np.testing.assert_array_equal(plain.sequence(number, quantity), exact)
        pieces_of_plain = [
            (expected.blocks[call], batch_index)
            for call, batch_index, _, _ in plain.module.pieces[number]
        ]
        assert pieces_of_plain == [(block, batch_index) for block, batch_index, _, _ in pieces]
        length = sum(steps for *_, steps in pieces)
        for name, values in plain.module.annotated(number).items():
            exact = expected.annotated(module, number, length)[name]
            assert [values.get(step) for step in range(length)] == exact


def test_the_plain_reader_sees_the_same(tmp_path):
    stream = full_stream()
    write(tmp_path / "run.h5", stream, parts=5)
    plain = PlainTrace(tmp_path / "run.h5")
    assert plain.closed
    check_plain(plain, stream.header, stream.records)
    with open_trace(tmp_path / "run.h5") as trace:
        for module in plain.modules:
            for site in module.sites.values():
                if "hidden" in site.rows:
                    for sequence in trace[site.name]:
                        previous = site.previous(sequence.number)
                        np.testing.assert_array_equal(sequence.previous, previous)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(stream=drawn_streams(), parts=st.integers(1, 4))
def test_the_plain_reader_sees_drawn_streams(stream, parts, tmp_path_factory):
    path = tmp_path_factory.mktemp("drawn") / "run.h5"
    write(path, stream, parts)
    check_plain(PlainTrace(path), stream.header, stream.records)


def test_control_the_plain_reader_sees_a_shift(tmp_path):
    stream = full_stream()
    write(tmp_path / "run.h5", stream)
    with h5py.File(tmp_path / "run.h5", "r+") as file:
        rows = file["modules/encoder.rnn/l0/hidden"]
        rows[:] = np.roll(rows[:], 1, axis=0)
    with pytest.raises(AssertionError):
        check_plain(PlainTrace(tmp_path / "run.h5"), stream.header, stream.records)


def test_a_closed_file_opens_without_swmr_and_has_the_specified_layout(tmp_path):
    stream = full_stream()
    write(tmp_path / "run.h5", stream)
    with h5py.File(tmp_path / "run.h5", "r") as file:
        assert set(file) == {
            "committed", "calls", "forks", "annotations", "values", "strings", "characters",
            "modules", "call", "fork", "annotation", "value", "string", "character",
        }  # fmt: skip
        assert file["committed"].dtype.names == (
            "calls", "forks", "annotations", "values", "strings", "characters", "closed",
        )  # fmt: skip
        layer = file["modules/encoder.rnn"]
        assert set(layer) == {
            "pieces", "l0", "l0_reverse", "l1", "l1_reverse",
            "piece", "step", "sequence", "module_call", "version", "gate_unit",
        }  # fmt: skip
        assert layer["l0/input"] == layer["l0_reverse/input"]
        assert layer["l0/input"] != layer["l1/input"]
        assert [axis.label for axis in layer["l0/update"].dims] == ["step", "unit"]
        assert [axis.label for axis in layer["l0/input"].dims] == ["step", "feature"]
        assert "bias_ih" not in file["modules/decoder%2Fstep/cell"]
        assert set(file["modules/%/l0"]) & {"reset", "update", "candidate", "hidden"} == {
            "update",
            "hidden",
        }
        assert file["modules/%/l0/update"].dtype == np.float16


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("", "%"),
        (".", "%2E"),
        ("..", "%2E."),
        ("encoder.rnn", "encoder.rnn"),
        ("a/b", "a%2Fb"),
        ("%", "%25"),
        ("é", "%C3%A9"),
        ("a b\n", "a%20b%0A"),
    ],
)
def test_group_names_follow_the_specification(path, name):
    assert schema.group_name(path) == name


def test_odd_paths_have_a_group_each_and_are_read_back(tmp_path):
    stream = Stream(make_header(*(make_module(path) for path in ODD_PATHS)))
    for module in range(len(ODD_PATHS)):
        stream.call([module + 1], module=module)
    write(tmp_path / "run.h5", stream)
    check_plain(PlainTrace(tmp_path / "run.h5"), stream.header, stream.records)
    with open_trace(tmp_path / "run.h5") as trace:
        assert tuple(module.path for module in trace.modules) == ODD_PATHS


def test_text_is_stored_once(tmp_path):
    stream = Stream(make_header(make_module()))
    for _ in range(50):
        stream.call([1], tag="a tag")
    stream.annotate(0, "tokens", ["word"] * 100)
    write(tmp_path / "run.h5", stream, parts=7)
    assert sorted(PlainTrace(tmp_path / "run.h5").strings) == ["a tag", "tokens", "word"]


def test_the_index_is_small_beside_the_rows(tmp_path):
    """At H = 64 and T = 1, everything except rows takes at most 5 % of their size."""
    stream = Stream(make_header(make_module(hidden=64)))
    for _ in range(1000):
        stream.call([1] * 16, go_on=range(16) if stream.begun[0] else None)
    write(tmp_path / "run.h5", stream)
    with h5py.File(tmp_path / "run.h5") as file:
        site = file["modules/rnn/l0"]
        rows = sum(site[name].nbytes for name in ("reset", "update", "candidate", "hidden"))
        index = [file["calls"], file["modules/rnn/pieces"], site["checks"]]
        assert sum(table.nbytes for table in index) <= 0.05 * rows


@pytest.mark.parametrize("hidden", [1, 7, 64, 600, 100_000])
def test_no_chunk_is_too_large_and_rows_fill_chunks(hidden):
    module = make_module(hidden=hidden, width=hidden)
    for dataset_path, column in schema.dataset_specs([module]).items():
        size = np.prod(column.chunks, dtype=float) * column.dtype.itemsize
        assert len(column.chunks) == 1 + len(column.item_shape)
        assert size <= 1024 * 1024, dataset_path
        if dataset_path.endswith(("reset", "update", "candidate", "hidden")):
            assert size > 200_000
