"""Values that the user logs lie beside the gates of the same steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from torch import nn

import grutrace
from grutrace.analysis.verification.verify import verify
from grutrace.capture import logged_values
from grutrace.capture.logged_values import parse_log
from grutrace.errors import NotRecordedError, OptionError, StateError, TraceFileError
from grutrace.storage.recovery.recover import recover_file
from grutrace.storage.shards.merge import merge_shards
from tests.plain_reader import PlainTrace

LENGTHS = [4, 2, 1]


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict(
        {"encoder": nn.GRU(2, 3, 2, bidirectional=True), "decoder": nn.GRUCell(2, 3)}
    )


def run(layers: nn.Module, tracer: grutrace.Tracer, batches: int = 2) -> dict[str, list[Any]]:
    """Log a loss for the encoder's packed batch, and two values for each step of the decoder."""
    logged: dict[str, list[Any]] = {"loss": [], "attention": []}
    for _ in range(batches):
        packed = nn.utils.rnn.pack_padded_sequence(torch.randn(4, 3, 2), LENGTHS)
        layers["encoder"](packed)
        loss = torch.randn(4, 3, requires_grad=True)
        tracer.log("loss", loss)
        logged["loss"].append(loss.detach().numpy())
        state = None
        for _step in range(3):
            state = layers["decoder"](torch.randn(2, 2), state)
            attention = np.random.default_rng(_step).standard_normal((2, 2)).astype(np.float32)
            tracer.log("attention", attention, module="decoder")
            logged["attention"].append(attention)
    return logged


def check(trace: grutrace.Trace, logged: dict[str, list[Any]]) -> None:
    """Compare every sequence with what was logged, by plain loops."""
    encoder, decoder = trace["encoder.l1_reverse"], trace["decoder.cell"]
    assert encoder.logged == decoder.logged == ("attention", "loss")
    for batch, loss in enumerate(logged["loss"]):
        for place, length in enumerate(LENGTHS):
            sequence = encoder.sequence(len(LENGTHS) * batch + place)
            np.testing.assert_array_equal(sequence.rows("loss"), loss[:length, place : place + 1])
            assert np.isnan(sequence.rows("attention")).all()
        for place in range(2):
            steps = np.stack(logged["attention"][3 * batch : 3 * batch + 3])[:, place]
            np.testing.assert_array_equal(
                decoder.sequence(2 * batch + place).rows("attention"), steps
            )
    assert np.isnan(np.asarray(decoder["loss"])).all()
    assert trace["encoder.l0"]["loss"].dtype == np.float32
    padded, lengths = encoder.padded("loss")
    np.testing.assert_array_equal(padded[0, :4, 0], logged["loss"][0][:, 0])
    assert lengths.tolist() == LENGTHS * len(logged["loss"])


LOG = {"loss": 1, "attention": 2}


@pytest.mark.parametrize("gates", ["auto", "inline", "deferred"])
@pytest.mark.parametrize("place", ["memory", "saved", "file", "selected", "recovered"])
def test_values_come_back_with_the_steps_that_they_were_logged_for(
    gates, place, tmp_path: Path
) -> None:
    layers = model()
    path = None if place in ("memory", "saved") else tmp_path / "run.h5"
    with grutrace.trace(layers, path, log=LOG, gates=gates) as tracer:
        logged = run(layers, tracer)
    check(tracer, logged)
    if place == "memory":
        return
    if place == "saved":
        path = tmp_path / "run.h5"
        tracer.save(path)
    if place == "recovered":
        recover_file(path, tmp_path / "recovered.h5")
        path = tmp_path / "recovered.h5"
    with grutrace.open(path) as trace:
        check(trace, logged)
        assert all(site.holds for site in verify(trace))
        if place == "selected":
            trace.select(label=None).save(tmp_path / "all.h5")
            with grutrace.open(tmp_path / "all.h5") as copy:
                check(copy, logged)
            last = trace.select(sequences=-1)["encoder.l0"]
            np.testing.assert_array_equal(last["loss"], logged["loss"][-1][:1, 2:])


def test_control_values_of_other_steps_are_noticed() -> None:
    layers = model()
    with grutrace.trace(layers, log=LOG) as tracer:
        logged = run(layers, tracer)
    logged["loss"][1] = logged["loss"][1][::-1]
    with pytest.raises(AssertionError):
        check(tracer, logged)


def test_the_file_is_as_the_format_says(tmp_path: Path) -> None:
    layers = model()
    with grutrace.trace(layers, tmp_path / "run.h5", log=LOG) as tracer:
        logged = run(layers, tracer, batches=1)
    with h5py.File(tmp_path / "run.h5") as file:
        assert file.attrs["format_version"].tolist()[0] == 1
        assert file.attrs["format_version"].tolist()[1] >= 4
        site = file["modules/encoder/l0"]
        assert json.loads(site.attrs["logs"]) == {"attention": 2, "loss": 1}
        rows = site["log.loss"]
        expected = [logged["loss"][0][:n, place] for place, n in enumerate(LENGTHS)]
        np.testing.assert_array_equal(rows[:, 0], np.concatenate(expected))
        assert [axis.label for axis in rows.dims] == ["step", "log.loss"]
        assert rows.dims[0][0].name == "/modules/encoder/step"
        assert site["log.attention"].shape == (7, 2)
        assert "logs" not in file["modules/encoder/l0_reverse"].attrs
        assert "log.loss" not in file["modules/encoder/l1"]
    # A reader that does not know logged values reads the rest.
    assert len(PlainTrace(tmp_path / "run.h5").calls) == 4


@pytest.mark.parametrize(
    "logs", ['{"loss": 2}', '{"los": 1}', '{"loss": true}', '{"update": 3}', "["]
)
def test_a_damaged_header_is_refused(logs, tmp_path: Path) -> None:
    gru = nn.GRU(2, 3)
    with grutrace.trace(gru, tmp_path / "run.h5", log=("loss",)):
        gru(torch.randn(3, 2, 2))
    with h5py.File(tmp_path / "run.h5", "r+") as file:
        file["modules/%/l0"].attrs["logs"] = logs
    with pytest.raises(TraceFileError, match=r"run\.h5"):
        grutrace.open(tmp_path / "run.h5")


def test_appended_runs_and_shards(tmp_path: Path) -> None:
    layers = model()
    with grutrace.trace(layers, tmp_path / "run.h5", log=LOG) as tracer:
        first = run(layers, tracer)
    with grutrace.trace(layers, tmp_path / "run.h5", log=LOG, mode="a") as tracer:
        second = run(layers, tracer)
    with grutrace.open(tmp_path / "run.h5") as trace:
        check(trace, {name: first[name] + second[name] for name in first})
    with pytest.raises(TraceFileError, match=r"(logs|quantities) of site 'encoder\.l0'"):
        grutrace.Tracer(layers, tmp_path / "run.h5", mode="a")
    logged = []
    for rank in range(2):
        with grutrace.trace(layers, tmp_path / "s.h5", log=LOG, shard=(rank, 2)) as tracer:
            logged.append(run(layers, tracer))
    both = {name: logged[0][name] + logged[1][name] for name in LOG}
    paths = sorted(tmp_path.glob("s.rank*.h5"))
    with grutrace.open(paths) as trace:
        check(trace, both)
    merge_shards(paths, tmp_path / "merged.h5")
    with grutrace.open(tmp_path / "merged.h5") as trace:
        check(trace, both)


@pytest.mark.parametrize("batch_first", [False, True])
def test_the_layout_is_that_of_the_layer(batch_first) -> None:
    gru = nn.GRU(2, 3, batch_first=batch_first)
    values = torch.arange(15.0).reshape(5, 3)
    logged = values.T if batch_first else values
    with grutrace.trace(gru, log=("loss", "two")) as trace:
        gru(torch.randn(3, 5, 2) if batch_first else torch.randn(5, 3, 2))
        trace.log("loss", logged)
        trace.log("two", logged[..., None].bfloat16())
    for place, sequence in enumerate(trace["l0"]):
        np.testing.assert_array_equal(sequence.rows("loss")[:, 0], values[:, place])
        np.testing.assert_array_equal(sequence.rows("two")[:, 0], values[:, place])


def test_padding_beyond_a_packed_batch_and_single_sequences() -> None:
    gru = nn.GRU(2, 3)
    with grutrace.trace(gru, log=("loss",)) as trace:
        gru(nn.utils.rnn.pack_padded_sequence(torch.randn(3, 2, 2), [3, 1]))
        trace.log("loss", np.arange(10.0).reshape(5, 2))
        gru(torch.randn(4, 2))
        trace.log("loss", [1, 2, 3, 4])
    rows = [sequence.rows("loss")[:, 0].tolist() for sequence in trace["l0"]]
    assert rows == [[0, 2, 4], [1], [1, 2, 3, 4]]


def test_values_belong_to_the_latest_call_and_others_have_none() -> None:
    gru = nn.GRU(2, 3)
    with grutrace.trace(gru, log=("loss",)) as trace:
        gru(torch.randn(2, 1, 2))
        gru(torch.randn(2, 1, 2))
        trace.log("loss", torch.ones(2, 1))
    assert np.isnan(trace["l0"][0].rows("loss")).all()
    assert (trace["l0"][1].rows("loss") == 1).all()


def test_calls_that_options_leave_out_have_no_values() -> None:
    gru = nn.GRU(2, 3)
    with grutrace.trace(gru, log=("loss",), every=2) as trace:
        for number in range(4):
            gru(torch.randn(2, 1, 2))
            trace.log("loss", torch.full((2, 1), float(number)))
    assert trace["l0"]["loss"][:, 0].tolist() == [0, 0, 2, 2]


def test_a_large_call_waits_too() -> None:
    gru = nn.GRU(64, 256)
    with grutrace.trace(gru, log=("loss",)) as trace:
        gru(torch.randn(64, 64, 64))
        trace.log("loss", torch.ones(64, 64))
    assert (trace["l0"]["loss"][:] == 1).all()


def test_a_live_reader_sees_values_with_their_calls(tmp_path: Path) -> None:
    gru = nn.GRU(2, 3)
    with (
        grutrace.trace(gru, tmp_path / "run.h5", log=("loss",)) as tracer,
        grutrace.open(tmp_path / "run.h5") as reader,
    ):
        for number in range(3):
            gru(torch.randn(2, 1, 2))
            tracer.log("loss", torch.full((2, 1), float(number)))
            tracer.flush()
            reader.refresh()
            assert len(reader.calls) == number + 1
            np.testing.assert_array_equal(reader["l0"]["loss"][-2:], number)


def test_the_model_and_its_gradients_are_unchanged() -> None:
    torch.manual_seed(0)
    gru, batch = nn.GRU(2, 3), torch.randn(5, 4, 2)
    expected = gru(batch)[0]
    expected.sum().backward()
    gradient = gru.weight_hh_l0.grad.clone()
    gru.zero_grad()
    with grutrace.trace(gru, log=("loss",), record=("hidden", "gradient")) as trace:
        output = gru(batch)[0]
        trace.log("loss", output.sum(-1))
        output.sum().backward()
    assert torch.equal(output, expected)
    assert torch.equal(gru.weight_hh_l0.grad, gradient)
    assert not np.isnan(trace["l0"]["gradient"][:]).any()
    np.testing.assert_array_equal(
        trace["l0"].sequence(1).rows("loss")[:, 0], output.sum(-1)[:, 1].detach()
    )


def test_errors_say_what_was_expected() -> None:
    gru = nn.GRU(2, 3)
    with grutrace.trace(gru, log=("loss",)) as trace:
        with pytest.raises(StateError, match="no call was recorded yet"):
            trace.log("loss", torch.zeros(5, 4))
        gru(torch.randn(5, 4, 2))
        with pytest.raises(
            OptionError, match=r"'los' was not declared .* log=\('los',\); declared: l"
        ):
            trace.log("los", torch.zeros(5, 4))
        for wrong in (torch.zeros(4, 5), torch.zeros(5), torch.zeros(5, 4, 2), 3.0):
            with pytest.raises(OptionError, match=r"expected values of shape \(5, 4\) for the lat"):
                trace.log("loss", wrong)
        with pytest.raises(OptionError, match=r"log: expected numbers of shape .*; found 'x'"):
            trace.log("loss", "x")
        with pytest.raises(OptionError, match="module: 'z' matches none of the modules: ''"):
            trace.log("loss", torch.zeros(5, 4), module="z")
        trace.log("loss", torch.zeros(5, 4))
        with pytest.raises(StateError, match="has values of this name already"):
            trace.log("loss", torch.zeros(5, 4))
        gru(torch.randn(5, 4, 2))
        len(trace.calls)
        with pytest.raises(StateError, match="was stored already: log before the trace is read"):
            trace.log("loss", torch.zeros(5, 4))
    with pytest.raises(StateError, match="only while calls are recorded"):
        trace.log("loss", torch.zeros(5, 4))
    with pytest.raises(NotRecordedError, match=r"'attention' was not recorded .* hidden, loss"):
        trace["l0"]["attention"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"log": "loss"}, r"log: expected names, such as \('loss',\), or .*; found 'loss'"),
        ({"log": ("update",)}, "log: expected names of letters, .* no quantity; found 'update'"),
        ({"log": ("a b",)}, "found 'a b'"),
        ({"log": {"a": 0}}, "expected the number of values per step of 'a', found 0"),
        ({"log": ("a",), "steps": slice(3)}, "steps: not possible with log"),
        ({"log": ("a",), "check": "raise"}, "check: not possible with log"),
        ({"log": ("a",), "max_calls": 3}, "max_calls: not possible with log"),
        ({"log": ("a",), "gates": "background"}, "gates: not possible with log"),
        ({"log": ("a",), "sink": grutrace.Statistics()}, "sink: not possible with log"),
    ],
)
def test_wrong_options(options, message) -> None:
    with pytest.raises(OptionError, match=message):
        grutrace.Tracer(nn.GRU(2, 3), **options)


def test_names_are_sorted() -> None:
    assert parse_log(("b", "a")) == (("a", 1), ("b", 1))
    assert parse_log(None) == ()


def test_without_the_option_no_name_is_declared() -> None:
    gru = nn.GRUCell(2, 3)
    with grutrace.trace(gru) as trace:
        gru(torch.randn(2, 2))
        with pytest.raises(OptionError, match=r"was not declared .* declared: none"):
            trace.log("loss", torch.zeros(2))


@pytest.mark.parametrize("seconds", [0.0, 60.0])
def test_a_call_does_not_wait_for_values_for_long(seconds, monkeypatch) -> None:
    monkeypatch.setattr(logged_values, "MAX_SECONDS", seconds)
    layers = model()
    with grutrace.trace(layers, log=("loss",)) as tracer:
        layers["encoder"](torch.randn(4, 3, 2))
        for _ in range(3):
            layers["decoder"](torch.randn(2, 2))
        tracer._recorder.drain(keep_waiting=True)
        # The control: at the limit that users have, all of them wait for the first.
        assert len(tracer._journal) == (4 if seconds else 0)
