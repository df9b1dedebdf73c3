"""Batches, intervals and tags of the gate logger, against the rows of a full trace."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import grutrace
from grutrace.errors import MissingExtraError
from grutrace.integrations import GateLogger, MLflowLog, TensorBoardLog, WandbLog
from grutrace.statistics.running import Statistics
from tests.integrations.models import (
    QUANTITIES,
    KeptLog,
    Tagger,
    assert_figures_of_rows,
    batches,
)


@pytest.fixture
def model() -> Tagger:
    torch.manual_seed(3)
    return Tagger()


def rows_of(trace: grutrace.Trace, site: str, part: slice) -> dict[str, np.ndarray]:
    return {name: np.asarray(trace[site].rows(name))[part] for name in QUANTITIES}


@pytest.mark.parametrize("beside_a_file", [False, True])
def test_each_log_covers_the_batches_since_the_last(
    model: Tagger, tmp_path: Path, beside_a_file: bool
) -> None:
    log, path = KeptLog(), tmp_path / "run.h5"
    with (
        grutrace.trace(model, gates="inline") as full,
        GateLogger(model, log, path if beside_a_file else None, log_every=3) as gates,
    ):
        for batch in batches(8):
            with gates.batch():
                model(batch)
    assert log.steps("train") == [2, 5, 7]
    for figures, part in zip(
        log.figures, (slice(72), slice(72, 144), slice(144, 192)), strict=True
    ):
        assert_figures_of_rows(figures, "gates/train/rnn.l0", rows_of(full, "rnn.l0", part))
    assert log.closed == 1
    if beside_a_file:
        with grutrace.open(path) as trace:
            for name in QUANTITIES:
                np.testing.assert_array_equal(
                    trace["rnn.l0"].rows(name), np.asarray(full["rnn.l0"].rows(name))
                )
            assert trace.calls["tag"][3] == "train step=3"
    assert path.exists() == beside_a_file


def test_control_figures_of_all_batches_so_far_are_detected(model: Tagger, monkeypatch) -> None:
    log = KeptLog()
    monkeypatch.setattr(Statistics, "pop", lambda self: self.merge(Statistics()))
    with (
        grutrace.trace(model, gates="inline") as full,
        GateLogger(model, log, log_every=2) as gates,
    ):
        for batch in batches(4):
            with gates.batch():
                model(batch)
    rows = rows_of(full, "rnn.l0", slice(48, None))
    with pytest.raises(AssertionError):
        assert_figures_of_rows(log.figures[1], "gates/train/rnn.l0", rows)


def test_evaluations_are_not_mixed_with_training(model: Tagger, tmp_path: Path) -> None:
    log = KeptLog()
    train, valid = batches(4), batches(2, seed=1)
    with (
        grutrace.trace(model, gates="inline") as full,
        GateLogger(model, log, tmp_path / "run.h5", log_every=4) as gates,
    ):
        for step, batch in enumerate(train):
            with gates.batch(10 + step, epoch=1):
                model(batch)
            if step == 1:
                with gates.evaluation(11, epoch=1):
                    for other in valid:
                        model(other)
        model(valid[0])  # in no batch
    assert [(figures.tag, figures.step) for figures in log.figures] == [
        ("valid", 11),
        ("train", 13),
    ]
    rows = rows_of(full, "rnn.l0", slice(48, 96))
    assert_figures_of_rows(log.figures[0], "gates/valid/rnn.l0", rows)
    around = {
        name: np.concatenate([values[:48], values[96:144]])
        for name, values in rows_of(full, "rnn.l0", slice(None)).items()
    }
    assert_figures_of_rows(log.figures[1], "gates/train/rnn.l0", around)
    with grutrace.open(tmp_path / "run.h5") as trace:
        assert trace.calls["tag"].tolist() == [
            *("train epoch=1 step=10", "train epoch=1 step=11"),
            *("valid epoch=1 step=11", "valid epoch=1 step=11"),
            *("train epoch=1 step=12", "train epoch=1 step=13"),
        ]
        assert len(trace.select(tag="valid*").calls) == 2


def test_every_nth_batch_is_recorded(model: Tagger, tmp_path: Path) -> None:
    log = KeptLog()
    with GateLogger(model, log, tmp_path / "run.h5", every=3, log_every=4) as gates:
        for batch in batches(10):
            with gates.batch():
                model(batch)
    assert log.steps("train") == [3, 7, 9]
    counts = [
        figures.histograms["gates/train/rnn.l0/reset"].counts.sum() for figures in log.figures
    ]
    assert counts == [2 * 120, 120, 120]
    with grutrace.open(tmp_path / "run.h5") as trace:
        assert trace.calls["tag"].tolist() == [f"train step={step}" for step in (0, 3, 6, 9)]


def test_an_exception_keeps_what_was_logged_and_closes(model: Tagger, tmp_path: Path) -> None:
    log = KeptLog()
    gates = GateLogger(model, log, tmp_path / "run.h5", log_every=2)

    def train() -> None:
        with gates:
            for step, batch in enumerate(batches(5)):
                with gates.batch():
                    model(batch)
                    if step == 2:
                        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train()
    assert log.steps("train") == [1, 2]
    assert log.closed == 1
    assert gates.trace is not None
    assert not gates.trace.is_recording
    model(batches(1)[0])
    with grutrace.open(tmp_path / "run.h5") as trace:
        assert len(trace.calls) == 3
    with pytest.raises(grutrace.StateError, match="gate logger is closed"), gates.batch():
        pass


def test_an_exception_before_the_first_call_gives_no_warning(model: Tagger) -> None:
    log = KeptLog()
    with pytest.raises(ZeroDivisionError), GateLogger(model, log) as gates, gates.batch():
        _ = 1 / 0
    assert not log.figures
    assert log.closed == 1


def test_nan_is_counted_and_left_out(model: Tagger) -> None:
    log = KeptLog()
    with torch.no_grad():
        model.rnn.weight_ih_l0[6] = torch.nan  # the update gate of unit 1
    with (
        grutrace.trace(model, gates="inline", check="off") as full,
        GateLogger(model, log, check="off") as gates,
        gates.batch(),
    ):
        model(batches(1)[0])
    rows = rows_of(full, "rnn.l0", slice(None))
    assert log.figures[0].scalars["gates/train/rnn.l0/update/nan"] == np.isnan(rows["update"]).sum()
    assert np.isnan(rows["update"]).sum() >= 24
    finite = {name: values for name, values in rows.items() if np.isfinite(values).any()}
    assert_figures_of_rows(log.figures[0], "gates/train/rnn.l0", finite)


def test_a_quantity_of_nan_only_has_no_histogram(model: Tagger) -> None:
    log = KeptLog()
    with torch.no_grad():
        model.rnn.weight_ih_l0[:] = torch.nan
    with GateLogger(model, log, check="off") as gates, gates.batch():
        model(batches(1)[0])
    assert not log.figures[0].histograms
    assert "gates/train/rnn.l0/update/mean" not in log.figures[0].scalars
    assert log.figures[0].scalars["gates/train/rnn.l0/update/nan"] == 120


def test_states_outside_of_the_bins_are_in_the_histogram() -> None:
    layer, log = nn.GRU(2, 3), KeptLog()
    with GateLogger(layer, log) as gates, gates.batch():
        output, _ = layer(torch.randn(5, 4, 2), torch.full((1, 4, 3), 9.0))
    histogram = log.figures[0].histograms["gates/train/l0/hidden"]
    values = output.detach().double().numpy()
    assert histogram.counts.sum() == values.size == 60
    assert histogram.counts[-1] == (values > 1).sum() > 0
    assert histogram.edges[-1] == values.max()


def test_mixed_precision(model: Tagger) -> None:
    log = KeptLog()
    with (
        grutrace.trace(model, gates="inline") as full,
        GateLogger(model, log) as gates,
        torch.autocast("cpu", torch.bfloat16),
        gates.batch(),
    ):
        model(batches(1)[0])
    rows = rows_of(full, "rnn.l0", slice(None))
    assert_figures_of_rows(log.figures[0], "gates/train/rnn.l0", rows)


def test_ranks(model: Tagger, tmp_path: Path) -> None:
    """Rank 0 logs; every rank writes a file; all ranks log if told to."""

    def logged(path: Path | None, rank: int, **options: bool) -> tuple[KeptLog, GateLogger]:
        log = KeptLog()
        with GateLogger(model, log, path, shard=(rank, 3), **options) as gates, gates.batch():
            model(batches(1)[0])
        return log, gates

    assert logged(None, 0)[0].steps("train") == [0]
    other, gates = logged(None, 2)
    assert not other.figures
    assert gates.trace is None
    other, gates = logged(tmp_path / "run.h5", 2)
    assert not other.figures
    assert [path.name for path in tmp_path.iterdir()] == ["run.rank0002.h5"]
    (figures,) = logged(None, 2, all_ranks=True)[0].figures
    assert figures.tag == "train.rank2"
    assert "gates/train.rank2/rnn.l0/update/mean" in figures.scalars


@pytest.mark.parametrize("rank", [0, 1])
def test_a_model_without_a_gru(rank: int) -> None:
    with pytest.raises(grutrace.UnsupportedError, match=r"expected a model with an nn\.GRU"):
        GateLogger(nn.Linear(2, 3), KeptLog(), shard=(rank, 2))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "log and path: expected at least one of the two, found none"),
        ({"log": 3}, r"log: expected an object with write\(figures\) and close\(\).*; found 3"),
        ({"log": KeptLog}, "log: expected an object with write"),
        ({"log": [KeptLog(), "tb"]}, "log: expected an object with write"),
        ({"log": KeptLog(), "every": 0}, "every: expected a whole number from 1, found 0"),
        ({"log": KeptLog(), "log_every": 1.5}, "log_every: expected a whole number from 1"),
        ({"log": KeptLog(), "sink": 3}, "sink: not an option here"),
        ({"log": KeptLog(), "evry": 3}, "evry: unknown option"),
        ({"log": KeptLog(), "gates": "deferred"}, "gates and sink: expected gates='inline'"),
        ({"log": KeptLog(), "bins": 3}, "bins: expected one of"),
    ],
)
def test_wrong_options(model: Tagger, options: dict[str, object], said: str) -> None:
    with pytest.raises(grutrace.OptionError, match=said):
        GateLogger(model, **options)  # type: ignore[arg-type]


def test_a_log_that_fails_ends_the_batch_but_closes_everything(model: Tagger) -> None:
    class Full(KeptLog):
        def write(self, _figures: object) -> None:
            raise OSError("disk full")

    log = Full()
    with (
        pytest.raises(OSError, match="disk full"),
        GateLogger(model, log, log_every=1) as gates,
        gates.batch(),
    ):
        model(batches(1)[0])
    assert log.closed == 1
    assert gates.trace is not None
    assert not gates.trace.is_recording


@pytest.mark.parametrize(
    ("library", "make", "said"),
    [
        ("tensorboard", lambda: TensorBoardLog("runs"), "TensorBoardLog needs tensorboard"),
        ("wandb", WandbLog, "WandbLog needs wandb"),
        ("mlflow", MLflowLog, "MLflowLog needs mlflow"),
    ],
)
def test_a_library_that_is_not_installed(library: str, make, said: str, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(MissingExtraError, match=rf"{said}, which is not installed: pip") as caught:
        make()
    assert packages_of(caught.value) == [library]


@pytest.mark.parametrize(
    ("module", "packages"),
    [("lightning", ["lightning"]), ("huggingface", ["accelerate", "transformers"])],
)
def test_a_trainer_that_is_not_installed(module: str, packages: list[str], monkeypatch) -> None:
    library = packages[-1]
    for name in [name for name in sys.modules if name.partition(".")[0] == library]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, library, None)
    monkeypatch.delitem(sys.modules, f"grutrace.integrations.{module}", raising=False)
    with pytest.raises(MissingExtraError, match=f"GateCallback needs {library}, which") as caught:
        __import__(f"grutrace.integrations.{module}")
    assert packages_of(caught.value) == packages


def packages_of(error: MissingExtraError) -> list[str]:
    """The packages that a message asks for: what is needed, and no other logger or trainer."""
    return sorted(re.split(r"[<>=]", name)[0] for name in re.findall(r'"([^"]+)"', str(error)))


def test_a_writer_of_another_type() -> None:
    with pytest.raises(
        grutrace.OptionError, match=r"writer: expected a SummaryWriter, or a folder"
    ):
        TensorBoardLog(3)
