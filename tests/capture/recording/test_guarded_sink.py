"""A sink that fails: the run ends, or goes on untraced and says what it has lost."""

# ruff: noqa: PT012, PT031 - what is warned of is said within a whole run.

from __future__ import annotations

import errno
import os

import pytest
import torch
from torch import nn

import grutrace
from grutrace.storage.write.appender import DatasetAppender
from tests.capture.models import EncoderDecoder


@pytest.fixture
def model():
    torch.manual_seed(0)
    return EncoderDecoder(layers=2).eval()


@pytest.fixture
def batch():
    return torch.randn(4, 6, 5)


@pytest.fixture
def disk(monkeypatch):
    """Fills up when it is told to, and has room again."""

    class Disk:
        full = False

    write = DatasetAppender._write_items

    def put(appender, items) -> None:
        if Disk.full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(appender, items)

    monkeypatch.setattr(DatasetAppender, "_write_items", put)
    return Disk


def hooks(model) -> int:
    return sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()
    )


@pytest.mark.parametrize("gates", ["inline", "background", "deferred"])
def test_the_model_goes_on_and_the_loss_is_counted(gates, model, batch, disk, tmp_path) -> None:
    path = tmp_path / "run.h5"
    expected = model(batch)
    with (
        pytest.warns(grutrace.GrutraceWarning) as caught,
        grutrace.trace(model, path, gates=gates, on_error="warn") as tracer,
    ):
        assert torch.equal(model(batch), expected)
        tracer.flush()
        assert tracer.is_recording
        disk.full = True
        for _ in range(5):
            assert torch.equal(model(batch), expected)
            tracer.flush()
        assert not tracer.is_recording
        # It reads like a trace still, of what was committed.
        assert len(tracer.calls) == 4
        disk.full = False
        assert torch.equal(model(batch), expected)
    assert hooks(model) == 0
    first, last = (str(warning.message) for warning in caught)
    assert first.startswith("recording has stopped, and the model continues untraced: ")
    assert first.endswith("No space left on device")
    # Seven runs of the model, four calls each.
    assert last == (
        f"{path} holds 4 calls of this recording, and 24 more are lost, "
        "because they could not be written"
    )
    with grutrace.open(path) as trace:
        assert (len(trace.calls), trace.closed) == (4, False)


def test_by_default_the_run_ends_and_the_model_is_as_it_was(model, batch, disk, tmp_path) -> None:
    expected = model(batch)
    tracer = grutrace.Tracer(model, tmp_path / "run.h5")
    tracer.start()
    model(batch)
    tracer.flush()
    disk.full = True
    with pytest.raises(grutrace.SinkError, match=r"run\.h5.*No space left on device"):
        for _ in range(1000):
            model(batch)
            tracer.flush()
    tracer.close()
    assert hooks(model) == 0
    assert torch.equal(model(batch), expected)
    with grutrace.open(tmp_path / "run.h5") as trace:
        assert len(trace.calls) == 4


def test_gradients_and_random_numbers_are_those_of_a_run_without(disk, tmp_path) -> None:
    def train(**options) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = EncoderDecoder(layers=2, dropout=0.5)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        tracer = grutrace.Tracer(model, tmp_path / "run.h5", **options) if options else None
        for step in range(6):
            disk.full = step > 2
            if tracer:
                tracer.start()
            optimizer.zero_grad()
            model(torch.randn(4, 6, 5)).square().mean().backward()
            optimizer.step()
            if tracer:
                tracer.flush()
        if tracer:
            tracer.close()
        return [*(parameter.detach() for parameter in model.parameters()), torch.get_rng_state()]

    expected = train()
    with pytest.warns(grutrace.GrutraceWarning):
        actual = train(on_error="warn")
    assert all(map(torch.equal, expected, actual))


def test_what_every_leaves_out_is_no_loss(model, batch, disk, tmp_path) -> None:
    with (
        pytest.warns(grutrace.GrutraceWarning) as caught,
        grutrace.trace(model, tmp_path / "run.h5", every=2, on_error="warn") as tracer,
    ):
        model(batch)  # one call of the encoder, two of the decoder's three
        tracer.flush()
        disk.full = True
        for _ in range(4):
            model(batch)
            tracer.flush()
    assert "holds 3 calls of this recording, and 8 more are lost" in str(caught[-1].message)


def test_what_was_there_before_is_not_of_this_recording(model, batch, disk, tmp_path) -> None:
    path = tmp_path / "run.h5"
    with grutrace.trace(model, path):
        model(batch)
    with (
        pytest.warns(grutrace.GrutraceWarning) as caught,
        grutrace.trace(model, path, mode="a", on_error="warn") as tracer,
    ):
        model(batch)
        tracer.flush()
        disk.full = True
        model(batch)
    assert "holds 4 calls of this recording, and 4 more are lost" in str(caught[-1].message)
    with grutrace.open(path) as trace:
        assert len(trace.calls) == 8


def test_a_layer_that_is_called_only_later_is_no_riddle(disk, tmp_path) -> None:
    """It is not said that it was never called: what is said is that nothing was recorded."""
    model = nn.ModuleDict({"one": nn.GRU(2, 3), "other": nn.GRU(2, 3)})
    with (
        pytest.warns(grutrace.GrutraceWarning) as caught,
        grutrace.trace(model, tmp_path / "run.h5", on_error="warn") as tracer,
    ):
        disk.full = True
        model["one"](torch.randn(4, 2))
        tracer.flush()
        model["other"](torch.randn(4, 2))
    assert len(caught) == 2
    assert "holds 0 calls of this recording, and 2 more are lost" in str(caught[-1].message)


def test_tokens_that_come_too_late(model, batch, disk, tmp_path) -> None:
    with (
        pytest.warns(grutrace.GrutraceWarning),
        grutrace.trace(model, tmp_path / "run.h5", on_error="warn", recording=False) as tracer,
        tracer.recording(tokens=[["a"] * 6] * 4),
    ):
        model(batch)
        disk.full = True
        tracer.flush()


@pytest.mark.parametrize("on_error", ["raise", "warn"])
def test_a_file_that_cannot_be_made_is_refused_at_once(on_error, model, tmp_path) -> None:
    (tmp_path / "there.h5").write_text("precious")
    for path, message in (
        (tmp_path / "there.h5", "exists"),
        (tmp_path / "none" / "run.h5", "no folder"),
        ("/proc/run.h5", "cannot be created"),
        (tmp_path, "not a file"),
    ):
        with pytest.raises(grutrace.TraceFileError, match=message) as caught:
            grutrace.Tracer(model, path, on_error=on_error)
        assert "\n" not in str(caught.value)
    assert (tmp_path / "there.h5").read_text() == "precious"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"on_error": "ignore"}, "on_error: expected one of raise, warn; found 'ignore'"),
        ({"fsync": 1}, "fsync: expected True or False, found 1"),
        ({"path": None, "fsync": True}, "fsync: expected False without a path"),
    ],
)
def test_wrong_options(options, message, model, tmp_path) -> None:
    path = options.pop("path", tmp_path / "run.h5")
    with pytest.raises(grutrace.OptionError, match=message):
        grutrace.Tracer(model, path, **options)
    assert not list(tmp_path.iterdir())


def test_fsync_comes_before_the_counts_and_after_them(model, batch, tmp_path, monkeypatch) -> None:
    """What the counts say is on the disk first: each fsync sees what the file has by then."""
    import h5py

    path, seen = tmp_path / "run.h5", []

    def fsync(descriptor: int) -> None:
        is_file = os.path.isfile(f"/proc/self/fd/{descriptor}")
        if is_file and path.exists():
            with open(f"/proc/self/fd/{descriptor}", "rb") as file:
                copy = tmp_path / "copy.h5"
                copy.write_bytes(file.read())
            with h5py.File(copy, "r", swmr=True) as file:
                seen.append((int(file["committed"]["calls"]), len(file["calls"])))
        seen.append(is_file)

    monkeypatch.setattr("os.fsync", fsync)
    with grutrace.trace(model, path, fsync=True) as tracer:
        assert tracer.options["fsync"] is True
        begun = len(seen)
        assert seen[-1] is False, "the folder, which holds the file's name"
        model(batch)
        tracer.flush()
    during = [event for event in seen[begun:] if isinstance(event, tuple)]
    assert during[:2] == [(0, 4), (4, 4)]
    seen.clear()
    with grutrace.trace(model, tmp_path / "other.h5") as tracer:
        assert "fsync" not in tracer.options
        model(batch)
    assert seen == []


def test_labels_of_calls_that_are_lost_do_not_end_the_run(model, batch, disk, tmp_path) -> None:
    with (
        pytest.warns(grutrace.GrutraceWarning, match="continues untraced|are lost"),
        grutrace.trace(model, tmp_path / "run.h5", on_error="warn") as tracer,
    ):
        disk.full = True
        model(batch)
        tracer.flush()
        for _ in range(2):
            with tracer.recording(labels={"kind": list("abcd")}):
                model(batch)
        disk.full = False
    assert len(tracer.calls) == 0
