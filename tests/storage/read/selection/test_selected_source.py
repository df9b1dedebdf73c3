"""A selection equals a trace in which nothing else was recorded.

The expected records are filtered by loops, and checked by the oracle of whole traces.
"""

from __future__ import annotations

import dataclasses
import pickle
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import dask
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import grutrace
from grutrace.analysis import moments, selectivity
from grutrace.analysis.engine.map_reduce import with_dask
from grutrace.errors import NotRecordedError, OptionError, StateError
from grutrace.export.formats import export_trace
from grutrace.records import AnnotationRecord, CallRecord, SiteRows
from grutrace.storage.memory import MemorySink
from grutrace.storage.open import open_sink
from grutrace.storage.read.selection import selected_source
from grutrace.storage.read.selection.criteria import Criteria, Numbers
from grutrace.storage.read.trace import Trace
from tests.plain_reader import PlainTrace
from tests.storage.oracle import Expected, check_trace
from tests.storage.shard_streams import as_one, full_shards, write_shards
from tests.storage.streams import drawn_streams, full_stream

EVERYTHING = ("reset", "update", "candidate", "hidden", "input")


def in_memory(stream: Any) -> Trace:
    sink = MemorySink(stream.header)
    for record in stream.records:
        sink.append(record)
    return Trace(sink)


def kept_records(header: Any, records: list[Any], kept: list[set[int]]) -> list[Any]:
    """The records of the kept sequences (by module), with numbers from 0."""
    number = [{old: new for new, old in enumerate(sorted(module))} for module in kept]
    results = []
    for record in records:
        if isinstance(record, CallRecord):
            results.append(_kept_call(header, record, number[record.module]))
        elif isinstance(record, AnnotationRecord):
            if record.sequence in kept[record.module]:
                new = number[record.module][record.sequence]
                results.append(dataclasses.replace(record, sequence=new))
        else:
            results.append(record)
    return [record for record in results if record is not None]


def _kept_call(header: Any, call: CallRecord, number: dict[int, int]) -> CallRecord | None:
    rows, starts, first = [], [], 0
    begun = sorted(set(call.sequences.tolist()))[-len(next(iter(call.sites.values())).initial) :]
    places = [place for place, old in enumerate(call.sequences.tolist()) if old in number]
    if not places:
        return None
    for place, steps in enumerate(call.steps.tolist()):
        if place in places:
            rows += range(first, first + steps)
        first += steps
    for position, old in enumerate(begun):
        if old in number and len(next(iter(call.sites.values())).initial):
            starts.append(position)
    sites = {
        suffix: SiteRows(
            {name: values[rows] for name, values in site.rows.items()},
            site.initial[starts],
            site.residual,
            site.tolerance,
            site.precision,
        )
        for suffix, site in call.sites.items()
    }
    forks = [
        dataclasses.replace(fork, sequence=number[fork.sequence], parent=number[fork.parent])
        for fork in call.forks
        if fork.sequence in number and fork.parent in number
    ]
    return dataclasses.replace(
        call,
        steps=call.steps[places],
        sequences=np.array([number[call.sequences[place]] for place in places], np.uint64),
        sites=sites,
        forks=tuple(forks),
    )


def matching(header: Any, records: list[Any], **conditions: Any) -> list[set[int]]:
    """By module, the sequences that meet the conditions, by loops over everything."""
    expected, results = Expected(header, records), []
    for module in range(len(header.modules)):
        kept = set()
        for number, pieces in expected.sequences(module).items():
            first, length = pieces[0][0], sum(steps for *_, steps in pieces)
            call = [block is first for block in expected.blocks].index(True)
            labels = expected.annotated(module, number, length)
            ok = True
            if "tag" in conditions:
                ok &= first.tag is not None and fnmatchcase(first.tag, conditions["tag"])
            if "length" in conditions:
                ok &= length in range(10**6)[conditions["length"]]
            if "calls" in conditions:
                ok &= call in range(len(expected.blocks))[conditions["calls"]]
            if "sequences" in conditions:
                ok &= number in range(len(expected.sequences(module)))[conditions["sequences"]]
            for name, glob in conditions.get("label", {}).items():
                values = [value for value in labels.get(name, []) if value is not None]
                ok &= any(fnmatchcase(str(value), glob) for value in values)
            if ok:
                kept.add(number)
        results.append(kept)
    return results


CONDITIONS: list[dict[str, Any]] = [
    {},
    {"tag": "valid"},
    {"tag": "*"},
    {"length": slice(3, None)},
    {"length": slice(1, 4)},
    {"calls": slice(2, None)},
    {"calls": slice(-3, -1)},
    {"sequences": slice(None, None, 2)},
    {"label": {"kind": "x"}},
    {"label": {"tokens": "th*"}},
    {"label": {"pos": "*"}},
    {"tag": "valid", "length": slice(2, None), "sequences": slice(-2, None)},
    {"tag": "nothing"},
]


@pytest.mark.parametrize("conditions", CONDITIONS, ids=str)
@pytest.mark.parametrize("place", ["memory", "file", "saved", "pickled"])
def test_a_selection_is_a_trace_of_the_kept_records(conditions, place, tmp_path: Path) -> None:
    stream = full_stream()
    kept = matching(stream.header, stream.records, **conditions)
    records = kept_records(stream.header, stream.records, kept)
    if place == "memory":
        check_trace(in_memory(stream).select(**conditions), stream.header, records)
        return
    if place == "pickled":
        copy = pickle.loads(pickle.dumps(in_memory(stream).select(**conditions)))
        check_trace(copy, stream.header, records)
        return
    sink = open_sink(tmp_path / "run.h5", stream.header)
    for record in stream.records:
        sink.append(record)
    sink.close()
    with grutrace.open(tmp_path / "run.h5") as trace:
        selected = trace.select(**conditions)
        if place == "file":
            check_trace(selected, stream.header, records)
            check_trace(pickle.loads(pickle.dumps(selected)), stream.header, records)
            return
        selected.save(tmp_path / "selected.h5")
        with pytest.raises(StateError, match="copy that file"):
            trace.save(tmp_path / "whole.h5")
    with grutrace.open(tmp_path / "selected.h5") as saved:
        check_trace(saved, stream.header, records)


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow])
@given(drawn_streams(), st.data())
def test_drawn_selections_of_drawn_streams(stream, data) -> None:
    trace = in_memory(stream)
    kept = []
    for begun in stream.begun:
        kept.append(set(data.draw(st.lists(st.integers(0, max(begun - 1, 0)), unique=True))))
        kept[-1] &= set(range(begun))
    numbers = sorted(set.union(*kept))
    kept = [set(numbers) & set(range(begun)) for begun in stream.begun]
    selected = trace.select(sequences=numbers)
    check_trace(selected, stream.header, kept_records(stream.header, stream.records, kept))
    # A selection of a selection.
    again = [{number for number in module if number % 2} for module in kept]
    odd = selected.select(sequences=[n for n, old in enumerate(sorted(kept[0])) if old % 2])
    number = kept_records(stream.header, stream.records, [again[0], *again[1:]])
    assert odd.sequences["original"][: len(odd[odd.sites[0]])].tolist() == sorted(again[0])
    assert len(number) <= len(stream.records)


def test_control_rows_of_other_sequences_are_noticed(monkeypatch) -> None:
    stream = full_stream()
    kept = matching(stream.header, stream.records, tag="valid")
    records = kept_records(stream.header, stream.records, kept)

    class Wrong(selected_source.SelectedReader):
        def rows(self, *arguments: Any) -> Any:
            rows = super().rows(*arguments)
            return np.roll(np.asarray(rows), 1, axis=0)

    monkeypatch.setattr(selected_source, "SelectedMemoryReader", Wrong)
    with pytest.raises(AssertionError):
        check_trace(in_memory(stream).select(tag="valid"), stream.header, records)


def test_a_selection_from_shards(tmp_path: Path) -> None:
    streams = full_shards()
    paths = write_shards(tmp_path / "run.h5", streams)
    records = as_one(streams)
    kept = matching(streams[0].header, records, tag="valid")
    with grutrace.open(paths) as trace:
        selected = trace.select(tag="valid")
        filtered = kept_records(streams[0].header, records, kept)
        check_trace(selected, trace.header, filtered)
        assert sorted(set(selected.calls["rank"].tolist())) == [0, 1]
        selected.save(tmp_path / "valid.h5")
    with grutrace.open(tmp_path / "valid.h5") as saved:
        check_trace(saved, streams[0].header, filtered)


def model_and_batch() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    return nn.GRU(2, 3, 2), torch.randn(6, 4, 2)


@pytest.mark.parametrize("gates", ["inline", "deferred"])
def test_everything_that_reads_a_trace_reads_a_selection(gates, tmp_path: Path) -> None:
    model, batch = model_and_batch()
    words = [["a", "b"] * 3, ["b"] * 6, ["a"] * 6, ["b", "a"] * 3]
    with grutrace.trace(model, tmp_path / "run.h5", record=EVERYTHING, gates=gates) as tracer:
        for tag in ("train", "valid"):
            with tracer.recording(tag=tag, tokens=words):
                model(batch)
    with grutrace.open(tmp_path / "run.h5") as trace:
        selected = trace.select(tag="valid", tokens="b b")
        site, whole = selected["l1"], trace["l1"]
        assert selected.sequences["original"].tolist() == [5]
        for quantity in EVERYTHING:
            np.testing.assert_array_equal(site.rows(quantity), whole.sequence(5).rows(quantity))
        np.testing.assert_array_equal(
            site.preactivation("update"), whole.sequence(5).preactivation("update")
        )
        assert site.sequence(0).original == 5
        assert site.sequence(0).tokens == words[1]
        with dask.config.set(scheduler="synchronous"):
            update = selected.to_dask("l1", "update").compute()
            np.testing.assert_array_equal(update, site.update)
            np.testing.assert_array_equal(selected.to_xarray("l1")["update"], site.update)
            mean, dask_mean = moments(site).mean, moments(with_dask(site)).mean
        np.testing.assert_allclose(mean["update"], dask_mean["update"], rtol=1e-12)
        np.testing.assert_allclose(mean["update"], np.mean(site.update, axis=0, dtype=float))
        both = selectivity(trace.select(tag="valid")["l1"], "tokens", permutations=10)
        assert both.classes == ("a", "b")
        export_trace(selected, tmp_path / "valid.npz", "npz")
        selected.save(tmp_path / "valid.h5")
    with np.load(tmp_path / "valid.npz") as arrays:
        assert arrays["l1/update"].shape == (6, 3)
    # A reader that is written from the specification alone.
    plain = PlainTrace(tmp_path / "valid.h5")
    assert len(plain.calls) == 1


def test_segments_and_forks_of_a_selection() -> None:
    cell = nn.GRUCell(2, 3)
    tracer = grutrace.Tracer(cell, recording=False, record=EVERYTHING)
    with tracer.recording(sequences=["a", "b"]):
        state = cell(torch.randn(2, 2))
        cell(torch.randn(2, 2), 2 * state)
        cell(torch.randn(2, 2), state[[0, 0]])
    with tracer.recording():
        state = cell(torch.randn(2, 2))
        one = cell(torch.randn(2, 2), state[[0, 1]])
        cell(torch.randn(2, 2), state[[0, 1]])
    del one
    whole = tracer["cell"]
    for number in range(len(whole)):
        selected = tracer.select(sequences=number)
        sequence, expected = selected["cell"].sequence(0), whole.sequence(number)
        for name in ("hidden", "previous", "initial", "update", "input"):
            np.testing.assert_array_equal(getattr(sequence, name), getattr(expected, name))
        assert sequence.origin == expected.origin
        assert selected.sequences["origin"][0] == expected.origin
    assert "fork" in tracer.sequences["origin"]
    assert len(whole.sequence(0)) == 3
    copy = pickle.loads(pickle.dumps(tracer))
    np.testing.assert_array_equal(copy["cell"].sequence(0).previous, whole.sequence(0).previous)


@pytest.mark.parametrize("to_file", [False, True])
def test_a_selection_follows_what_is_recorded(to_file, tmp_path: Path) -> None:
    model, batch = model_and_batch()
    path = tmp_path / "run.h5" if to_file else None
    with grutrace.trace(model, path) as tracer:
        model(batch)
        selected = tracer.select(length=6)
        assert len(selected["l0"]) == 4
        model(batch)
        assert len(selected["l0"]) == 8
        if path is not None:
            tracer.flush()
            with grutrace.open(path) as reader:
                live = reader.select(calls=slice(1, None))
                model(batch)
                tracer.flush()
                assert len(live["l0"]) == 4
                live.refresh()
                assert len(live["l0"]) == 8
                # Its own trace shows what it showed.
                assert len(reader["l0"]) == 8
                np.testing.assert_array_equal(live["l0"].update, tracer["l0"].update[24:])


def test_a_selection_leaves_its_trace_alone() -> None:
    model, batch = model_and_batch()
    with grutrace.trace(model) as tracer:
        model(batch)
    selected = tracer.select(sequences=0)
    with pytest.raises(StateError, match="cannot be cleared"):
        selected.clear()
    selected.close()
    assert len(tracer["l0"]) == 4


@pytest.mark.parametrize(
    ("conditions", "message"),
    [
        ({"tga": "x"}, r"tga: unknown option \(did you mean 'tag'\?\)"),
        ({"tag": 3}, "tag: expected a glob or a list of globs; found 3"),
        ({"length": "12"}, "length: expected a number, a slice .*; found '12'"),
        ({"length": -1}, "length: expected numbers from 0 on; found -1"),
        ({"length": slice(-3, None)}, "length: expected numbers from 0 on"),
        ({"length": 1.5}, r"length: expected a number, a slice .*; found 1\.5"),
        ({"calls": True}, "calls: expected a number"),
        ({"calls": slice("a")}, "calls: expected a number"),
        ({"calls": slice(0, 1, 0)}, "calls: expected a number"),
        ({"sequences": [1.5]}, "sequences: expected a number"),
        ({"label": 3}, "label: expected the name of a label, or globs by name"),
        ({"label": {}}, "label: expected the name of a label"),
        ({"label": {"pos": None}}, r"label\['pos'\]: expected a glob or a number"),
        ({"tokens": ""}, "tokens: expected globs for consecutive tokens"),
    ],
)
def test_wrong_conditions_are_named(conditions, message) -> None:
    trace = in_memory(full_stream())
    with pytest.raises(OptionError, match=message):
        trace.select(**conditions)


def test_a_label_that_no_step_has_is_named() -> None:
    trace = in_memory(full_stream())
    with pytest.raises(NotRecordedError, match=r"no label 'knd' \(did you mean 'kind'\?\); there"):
        trace.select(label="knd")
    assert len(trace.select(label="kind").sequences) == 1
    model, batch = model_and_batch()
    with grutrace.trace(model) as tracer:
        model(batch)
    with pytest.raises(NotRecordedError, match="there are no tokens; there are: none"):
        tracer.select(tokens="a")


def test_criteria_in_words() -> None:
    criteria = Criteria.parse(
        tag=["a", "b"], label={"pos": [1, "x"]}, length=slice(10, None), tokens="^ a", calls=[1, 2]
    )
    assert str(criteria) == "tag=a|b, label pos=1|x, length=10:, calls=1,2, tokens=^ a"
    assert str(Criteria()) == "everything"
    assert str(Numbers(slice(1, 9, 2))) == "1:9:2"
