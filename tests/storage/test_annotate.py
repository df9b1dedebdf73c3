"""Tokens and labels added to finished traces: checked, all or none, and nothing else changes."""

from __future__ import annotations

import json
import pickle
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from torch import nn

import grutrace
from grutrace.__main__ import main
from grutrace.errors import OptionError, StateError, TraceFileError
from grutrace.storage.shards.merge import merge_shards
from tests.plain_reader import PlainTrace
from tests.storage.shard_streams import full_shards, write_shards

WORDS = [["the", "ant", "sleeps"], ["a", "bee"], ["x"]]
POS = [[1, 2, 3], [4, 5], [6]]


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict({"encoder": nn.GRU(2, 3, bidirectional=True), "decoder": nn.GRUCell(2, 3)})


def record(path: Path | None = None, **options: Any) -> grutrace.Tracer:
    """Three sequences of 3, 2 and 1 steps of the encoder, two of 2 steps of the decoder."""
    layers = model()
    padded = torch.randn(3, 3, 2)
    packed = nn.utils.rnn.pack_padded_sequence(padded, [3, 2, 1])
    with grutrace.trace(layers, path, **options) as tracer:
        layers["encoder"](packed)
        state = layers["decoder"](torch.randn(2, 2))
        layers["decoder"](torch.randn(2, 2), state)
    return tracer


def other_content(path: Path) -> dict[str, Any]:
    """Every dataset and attribute except tokens and labels, as h5py reads them."""
    results: dict[str, Any] = {}
    tables = ("annotation", "value", "string", "character")
    # The scales of their axes have their lengths.
    changing = (*tables, *(f"{name}s" for name in tables), "committed")
    with h5py.File(path) as file:

        def visit(name: str, item: Any) -> None:
            if not isinstance(item, h5py.Dataset) or name in changing:
                return
            if item.dtype.names is None or name in ("calls", "forks"):
                results[name] = item[()].tobytes()

        file.visititems(visit)
        results["attributes"] = {key: str(value) for key, value in file.attrs.items()}
    return results


@pytest.mark.parametrize("place", ["memory", "live", "file", "tracer", "copy"])
def test_labels_come_back_and_nothing_else_changes(place, tmp_path: Path) -> None:
    path = tmp_path / "run.h5" if place in ("file", "tracer") else None
    trace: grutrace.Trace = record(path)
    if place == "file":
        trace = grutrace.open(str(path))
    if place == "copy":
        trace = pickle.loads(pickle.dumps(trace))
    before = {name: np.asarray(trace["encoder.l0"][name]) for name in ("update", "hidden")}
    content = other_content(path) if path else None
    site, sequence = trace["encoder.l0"], trace["encoder.l0"].sequence(0)
    trace.annotate(tokens=WORDS, labels={"pos": POS, "kind": ["a", None, "b"]})
    trace.annotate(labels={"last": [[None, None, 0.5], [None, 1.5], None]})
    trace.annotate(labels={"y": {1: [7, 8]}}, module="dec*")
    assert sequence.tokens is None
    assert [sequence.tokens for sequence in site] == WORDS
    assert [sequence.labels["pos"].tolist() for sequence in site] == POS
    assert site[0].labels["kind"] == ["a"] * 3
    assert "kind" not in site[1].labels
    np.testing.assert_array_equal(site[0].labels["last"], [np.nan, np.nan, 0.5])
    np.testing.assert_array_equal(trace["decoder.cell"][1].labels["y"], [7, 8])
    assert trace["decoder.cell"][0].labels == {}
    assert trace["encoder.l0_reverse"][1].tokens == WORDS[1]
    for name, values in before.items():
        np.testing.assert_array_equal(site[name], values)
    if path is not None:
        assert other_content(path) == content
        # The reader that is written from the specification finds the same.
        plain = PlainTrace(path, swmr=False)
        assert plain.closed
        assert "sleeps" in plain.strings
    trace.close()


def test_a_selection_gives_labels_to_its_sequences_in_the_whole_trace(tmp_path: Path) -> None:
    record(tmp_path / "run.h5")
    with grutrace.open(tmp_path / "run.h5") as trace:
        selected = trace.select(length=slice(2, None), sequences=slice(1, None))
        again = selected.select(length=2)
        again.annotate(labels={"kind": ["x"]}, module="encoder")
        selected.annotate(tokens=["ab"], module="encoder")
        assert selected["encoder.l0"][0].labels == {"kind": ["x", "x"]}
        trace.refresh()
        labelled = [sequence.labels for sequence in trace["encoder.l0"]]
        assert labelled == [{}, {"kind": ["x", "x"]}, {}]
        assert trace["encoder.l0"][1].tokens == ["a", "b"]


def test_segments_of_named_sequences(tmp_path: Path) -> None:
    cell = nn.GRUCell(2, 3)
    with grutrace.trace(cell, tmp_path / "run.h5", recording=False) as tracer:
        with tracer.recording(sequences=["a", "b"]):
            state = cell(torch.randn(2, 2))
            cell(torch.randn(2, 2), 2 * state)
        with tracer.recording(sequences=["c"]):
            cell(torch.randn(1, 2))
    with grutrace.open(tmp_path / "run.h5") as trace:
        trace.annotate(labels={"step": [[0, 1], [2, 3], [4]]})
        labels = [sequence.labels["step"].tolist() for sequence in trace["cell"]]
    assert labels == [[0, 1], [2, 3], [4]]


def test_steps_that_have_a_label_keep_it(tmp_path: Path) -> None:
    record(tmp_path / "run.h5")
    with grutrace.open(tmp_path / "run.h5") as trace:
        trace.annotate(labels={"pos": [[None, 2, None], None, None]}, module="encoder")
        with pytest.raises(OptionError, match=r"pos: step 1 of sequence 0 has 2\.0 already; repl"):
            trace.annotate(labels={"pos": POS})
        trace.annotate(labels={"pos": [[1, None, 3], [4, 5], [6]]})
        assert [sequence.labels["pos"].tolist() for sequence in trace["encoder.l0"]] == POS
        trace.annotate(labels={"pos": {2: ["text"]}}, replace=True)
        assert trace["encoder.l0"][2].labels == {"pos": ["text"]}
        assert trace["encoder.l0"][1].labels["pos"].tolist() == [4, 5]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"labels": {"pos": [[1]]}},
            "'encoder': expected values for 3 sequences, found those of 1",
        ),
        (
            {"labels": {"pos": [[1, 2, 3], [4, 5, 6], [7]]}},
            "'encoder': expected 2 values for sequence 1, found 3; module 'decoder': expected va",
        ),
        ({"tokens": {5: ["a"]}, "module": "encoder"}, "expected sequences below 3, found 5"),
        ({"tokens": {0: ["a"], "encoder": []}}, "tokens: expected values by number of the seq"),
        ({"tokens": WORDS, "module": "encodr"}, "module: 'encodr' matches none of the modules: 'e"),
        ({"tokens": {"encodr": WORDS}}, "module: 'encodr' matches none"),
        ({"labels": [1]}, r"labels: expected values by name, found \[1\]"),
        ({"labels": {"pos": [[1, "a", 2], [1, 2], [3]]}}, "pos: expected one list of numbers"),
        ({"labels": {"grutrace:x": POS}}, "expected names that do not begin with 'grutrace:'"),
        ({"labels": {"pos": 3}}, "pos: expected one list of numbers.*found 3"),
        ({"lables": {"pos": POS}}, r"lables: unknown option \(did you mean 'labels'\?\)"),
    ],
)
def test_values_that_do_not_fit_change_nothing(arguments, message, tmp_path: Path) -> None:
    record(tmp_path / "run.h5")
    before = (tmp_path / "run.h5").read_bytes()
    with grutrace.open(tmp_path / "run.h5") as trace:
        with pytest.raises(OptionError, match=message):
            trace.annotate(**arguments)
        assert trace["encoder.l0"].label_names == ()
    assert (tmp_path / "run.h5").read_bytes() == before


def test_padding_is_left_out() -> None:
    trace = record()
    padded = np.array([[1, 2, 3], [4, 5, 99], [6, 99, 99]])
    trace.annotate(labels={"pos": padded})
    assert [sequence.labels["pos"].tolist() for sequence in trace["encoder.l0"]] == POS


def test_traces_that_cannot_be_annotated_say_why(tmp_path: Path) -> None:
    layers = model()
    with grutrace.trace(layers, tmp_path / "live.h5") as tracer:
        layers["encoder"](torch.randn(3, 3, 2))
        layers["decoder"](torch.randn(2, 2))
        with pytest.raises(StateError, match="is being recorded: annotate within a recording bl"):
            tracer.annotate(labels={"x": [1, 2]}, module="decoder")
        tracer.flush()
        with (
            grutrace.open(tmp_path / "live.h5") as reader,
            pytest.raises(TraceFileError, match=r"live\.h5"),
        ):
            reader.annotate(labels={"x": [1, 2]}, module="decoder")
    paths = write_shards(tmp_path / "run.h5", full_shards())
    with grutrace.open(paths) as shards:
        for trace in (shards, shards.select(length=1)):
            with pytest.raises(StateError, match="is a trace of 3 files: annotate each of them"):
                trace.annotate(labels={"x": {0: 1.0}})
    merge_shards(paths, tmp_path / "merged.h5")
    with (
        grutrace.open(tmp_path / "merged.h5") as merged,
        pytest.raises(StateError, match="was merged from 3 files: annotate each of them"),
    ):
        merged.annotate(labels={"x": {0: 1.0}})


KILLED = """
import os, signal, sys
import grutrace
from grutrace.storage.write import dataset_writer, writer
calls = 0
def killing(function):
    def run(*arguments, **options):
        global calls
        calls += 1
        if calls == int(sys.argv[2]):
            if sys.argv[3] == "after":
                function(*arguments, **options)
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **options)
    return run
for name in ("commit", "write_buffers", "close"):
    kind = dataset_writer.DatasetWriter
    setattr(kind, name, killing(getattr(kind, name)))
writer.publish_compact_copy = killing(writer.publish_compact_copy)
with grutrace.open(sys.argv[1]) as trace:
    trace.annotate(tokens=[["the", "ant", "sleeps"], ["a", "bee"], ["x"]])
print("finished")
"""


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_killed_process_leaves_all_or_nothing(when, tmp_path: Path) -> None:
    record(tmp_path / "clean.h5")
    content = (tmp_path / "clean.h5").read_bytes()
    with grutrace.open(tmp_path / "clean.h5") as trace:
        update = np.asarray(trace["encoder.l0"].update)
    seen, path = set(), tmp_path / "run.h5"
    for kill in range(1, 20):
        path.write_bytes(content)
        command = [sys.executable, "-c", KILLED, str(path), str(kill), when]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        with grutrace.open(path) as trace:
            np.testing.assert_array_equal(trace["encoder.l0"].update, update)
            tokens = [sequence.tokens for sequence in trace["encoder.l0"]]
            assert tokens in ([None] * 3, WORDS)
            seen.add(tokens == WORDS)
        if done.returncode == 0:
            break
        assert done.returncode == -signal.SIGKILL, done.stderr
    # The control: the kills came before the commit and after it, and the last run finished.
    assert seen == {False, True}
    assert done.stdout == "finished\n"
    assert kill > 3


CSV = "sequence,step,pos,note,tokens\n0,0,1,x,7\n0,2,3,,8\n2,0,2.5,y,9\n"


def run(capsys, *arguments: str) -> str:
    assert main(["annotate", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def test_a_table_with_a_row_per_step(tmp_path: Path, capsys) -> None:
    record(tmp_path / "run.h5")
    (tmp_path / "labels.csv").write_text(CSV, encoding="utf-8")
    path, table = tmp_path / "run.h5", tmp_path / "labels.csv"
    out = run(capsys, path, table, "--module", "encoder", "--text", "tokens")
    assert out == f"{path}: added tokens, pos, note\n"
    with grutrace.open(path) as trace:
        site = trace["encoder.l0"]
        np.testing.assert_array_equal(site[0].labels["pos"], [1, np.nan, 3])
        assert site[0].labels["note"] == ["x", None, None]
        assert site[0].tokens == ["7", None, "8"]
        assert site[1].labels == {}
        assert site[2].labels["pos"].tolist() == [2.5]


def test_a_table_with_a_row_per_sequence_and_modules(tmp_path: Path, capsys) -> None:
    record(tmp_path / "run.h5")
    table = tmp_path / "labels.tsv"
    table.write_text("module\tsequence\tkind\nencoder\t1\tb\ndecoder\t0\tc\n", encoding="utf-8-sig")
    run(capsys, tmp_path / "run.h5", table)
    with grutrace.open(tmp_path / "run.h5") as trace:
        assert trace["encoder.l0"][1].labels == {"kind": ["b", "b"]}
        assert trace["decoder.cell"][0].labels == {"kind": ["c", "c"]}
        assert trace["encoder.l0"][0].labels == {}


def test_a_json_file_has_the_arguments_of_annotate(tmp_path: Path, capsys) -> None:
    record(tmp_path / "run.h5")
    path = tmp_path / "labels.json"
    path.write_text(json.dumps({"tokens": WORDS, "labels": {"pos": POS}}), encoding="utf-8")
    run(capsys, tmp_path / "run.h5", path)
    with grutrace.open(tmp_path / "run.h5") as trace:
        assert [sequence.tokens for sequence in trace["encoder.l0"]] == WORDS


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "sequence,step\n0,0\n", "expected the columns sequence, step (optional) and one"),
        ("a.csv", "step,pos\n0,0\n", "expected the columns sequence, step (optional) and one"),
        ("a.csv", "sequence,pos\n", "expected a row per step or per sequence, found none"),
        ("a.csv", "sequence,pos\n0,1,2\n", "line 2: expected 2 columns, found another number"),
        ("a.csv", "sequence,pos\n9,1\n", "line 2: sequence: expected a number below 3, found '9'"),
        ("a.csv", "sequence,step,pos\n0,x,1\n", "line 2: step: expected a number below 3, found "),
        ("a.csv", "sequence,pos\n0,1\n0,2\n", "line 3: pos of sequence 0, step 0 was given before"),
        ("a.csv", 'sequence,pos\n0,"1\n', "cannot be read"),
        ("a.csv", "module,sequence,pos\nx,0,1\n", "one of 'encoder', 'decoder'; found 'x'"),
        ("a.json", "[1]", 'expected {"tokens": ..., "labels": {NAME: ...}'),
        ("a.json", "{", "cannot be read"),
        ("a.json", '{"labels": {"pos": [[1]]}}', "expected values for 3 sequences, found those of"),
        ("missing.csv", None, "cannot be read: No such file or directory"),
    ],
)
def test_a_wrong_file_is_one_line(name, text, message, tmp_path: Path, capsys) -> None:
    record(tmp_path / "run.h5")
    before = (tmp_path / "run.h5").read_bytes()
    if text is not None:
        (tmp_path / name).write_text(text, encoding="utf-8")
    module = [] if "module" in (text or "") else ["--module", "encoder"]
    assert main(["annotate", str(tmp_path / "run.h5"), str(tmp_path / name), *module]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
    assert (tmp_path / "run.h5").read_bytes() == before


def test_a_message_names_a_model_that_is_a_layer_itself() -> None:
    layer = nn.GRU(4, 3)
    with grutrace.trace(layer) as trace:
        layer(torch.randn(5, 2, 4))
    with pytest.raises(grutrace.OptionError, match="pos: the model: expected values for 2 seq"):
        trace.annotate(labels={"pos": [["a"]]})
