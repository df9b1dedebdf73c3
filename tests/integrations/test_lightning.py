"""The callback of Lightning, in trainers of Lightning itself."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import grutrace
from tests.integrations.models import KeptLog, Tagger, batches, needs, own_leaks

needs("lightning")

import lightning.pytorch as pl  # noqa: E402

from grutrace.integrations.lightning import GateCallback  # noqa: E402

# Lightning says so of each small loader, and Lightning's own code causes the others.
pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.filterwarnings("error::grutrace.GrutraceWarning"),
]


@pytest.fixture(autouse=True)
def nothing_leaks() -> Iterator[None]:
    yield
    assert own_leaks() == []


class Module(pl.LightningModule):
    """Fails at a batch, if told to; notes the input of each batch by kind."""

    def __init__(self, fails_at: int | None = None, model: nn.Module | None = None) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.model, self.fails_at = model or Tagger(), fails_at
        self.seen: dict[str, list[Tensor]] = {"train": [], "valid": [], "test": []}

    def training_step(self, batch: Tensor, number: int) -> Tensor:
        self.seen["train"].append(batch)
        loss = self.model(batch)["loss"]
        if number == self.fails_at:
            raise RuntimeError("training failed")
        return loss

    def validation_step(self, batch: Tensor, _number: int) -> None:
        self.seen["valid"].append(batch)
        self.model(batch)

    def test_step(self, batch: Tensor) -> None:
        self.seen["test"].append(batch)
        self.model(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.01)


def loader(number: int, seed: int = 0) -> DataLoader:
    return DataLoader(batches(number, seed), batch_size=None)


def trainer(folder: Path, callback: Any, **options: Any) -> pl.Trainer:
    defaults = {"max_epochs": 2, "logger": False, "enable_checkpointing": False}
    return pl.Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        callbacks=[callback],
        enable_progress_bar=False,
        enable_model_summary=False,
        **(defaults | options),
    )


def count(log: KeptLog, tag: str) -> list[int]:
    """The number of values of one gate in each interval."""
    name = f"gates/{tag}/model.rnn.l0/update"
    return [part.histograms[name].counts.sum() for part in log.figures if part.tag == tag]


def test_training_and_validation_are_logged_apart(tmp_path: Path) -> None:
    log, module = KeptLog(), Module()
    callback = GateCallback(log, tmp_path / "run.h5", log_every=4)
    trainer(tmp_path, callback).fit(module, loader(6), loader(2, 1))
    assert log.steps("train") == [4, 8, 12]
    assert log.steps("valid") == [6, 12]
    assert count(log, "train") == [480, 480, 480]
    assert count(log, "valid") == [240, 240], "without the sanity check"
    assert log.closed == 1
    with grutrace.open(tmp_path / "run.h5") as trace:
        tags = trace.calls["tag"].tolist()
        assert tags[:6] == [f"train epoch=0 step={step}" for step in range(6)]
        assert tags[6:9] == ["valid epoch=0 step=6"] * 2 + ["train epoch=1 step=6"]
        assert len(tags) == 16
        for kind, inputs in (("train", module.seen["train"]), ("valid", module.seen["valid"][2:])):
            part = trace.select(tag=f"{kind}*")
            assert len(part.calls) == len(inputs)
        # The gates are those of the model: the states of the last call are its output.
        output, _ = module.model.rnn(module.seen["valid"][-1])
        np.testing.assert_array_equal(
            np.asarray(trace["model.rnn.l0"].hidden)[-24:], output.detach().reshape(24, 5)
        )


def test_every_nth_batch(tmp_path: Path) -> None:
    log = KeptLog()
    trainer(tmp_path, GateCallback(log, every=4, log_every=6)).fit(Module(), loader(6))
    assert log.steps("train") == [6, 12]
    assert count(log, "train") == [2 * 120, 120]


def test_the_result_of_the_training_is_the_same(tmp_path: Path) -> None:
    def train(*callbacks: Any) -> list[Tensor]:
        module = Module()
        fitted = trainer(tmp_path, callbacks[0] if callbacks else pl.Callback())
        fitted.fit(module, loader(6), loader(2, 1))
        return [parameter.detach() for parameter in module.parameters()]

    plain, traced = train(), train(GateCallback(KeptLog()))
    assert all(torch.equal(one, other) for one, other in zip(plain, traced, strict=True))


def test_an_exception_closes_and_keeps(tmp_path: Path) -> None:
    log, module = KeptLog(), Module(fails_at=4)
    callback = GateCallback(log, tmp_path / "run.h5", log_every=3)
    with pytest.raises(RuntimeError, match="training failed"):
        trainer(tmp_path, callback).fit(module, loader(6), loader(2, 1))
    assert log.steps("train") == [3, 4]
    assert count(log, "train") == [360, 240]
    assert log.closed == 1
    module.model(batches(1)[0])
    with grutrace.open(tmp_path / "run.h5") as trace:
        assert len(trace.calls) == 5


def test_accumulated_gradients_count_batches_and_log_steps(tmp_path: Path) -> None:
    log = KeptLog()
    callback = GateCallback(log, tmp_path / "run.h5", log_every=4)
    fitted = trainer(tmp_path, callback, accumulate_grad_batches=2, max_epochs=1)
    fitted.fit(Module(), loader(8))
    assert log.steps("train") == [2, 4]
    with grutrace.open(tmp_path / "run.h5") as trace:
        steps = [text.rpartition("=")[2] for text in trace.calls["tag"].tolist()]
        assert steps == ["0", "0", "1", "1", "2", "2", "3", "3"]


def test_steps_continue_after_a_checkpoint(tmp_path: Path) -> None:
    first = trainer(tmp_path, pl.Callback(), max_epochs=1)
    first.fit(Module(), loader(6))
    first.save_checkpoint(tmp_path / "one.ckpt")
    log = KeptLog()
    second = trainer(tmp_path, GateCallback(log, log_every=3), max_epochs=2)
    second.fit(Module(), loader(6), ckpt_path=tmp_path / "one.ckpt")
    assert log.steps("train") == [9, 12]


def test_bfloat16_mixed_precision(tmp_path: Path) -> None:
    log = KeptLog()
    trainer(tmp_path, GateCallback(log), precision="bf16-mixed", max_epochs=1).fit(
        Module(), loader(3)
    )
    assert count(log, "train") == [360]
    assert log.figures[0].scalars["gates/train/model.rnn.l0/update/nan"] == 0


def test_test_and_validation_on_their_own(tmp_path: Path) -> None:
    log = KeptLog()
    alone = trainer(tmp_path, GateCallback(log))
    alone.test(Module(), loader(3), verbose=False)
    assert (log.steps("test"), count(log, "test"), log.closed) == ([0], [360], 1)


def test_the_loggers_of_the_trainer(tmp_path: Path) -> None:
    needs("tensorboard")
    from lightning.pytorch.loggers import TensorBoardLogger
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path, name="runs")
    trainer(tmp_path, GateCallback(log_every=4), logger=logger).fit(Module(), loader(6))
    events = EventAccumulator(logger.log_dir, size_guidance={"histograms": 0})
    events.Reload()
    assert [event.step for event in events.Histograms("gates/train/model.rnn.l0/update")] == [
        *(4, 8, 12)
    ]


def test_a_model_without_a_gru_fails_before_training(tmp_path: Path) -> None:
    class Plain(Module):
        def __init__(self) -> None:
            super().__init__(model=nn.Linear(3, 1))

    module = Plain()
    with pytest.raises(grutrace.UnsupportedError, match=r"expected a model with an nn\.GRU"):
        trainer(tmp_path, GateCallback(KeptLog())).fit(module, loader(2), loader(2))
    assert not module.seen["train"]
    assert not module.seen["valid"]


def test_a_trainer_without_a_logger(tmp_path: Path) -> None:
    with pytest.raises(grutrace.OptionError, match=r"log and path: expected one of them.*none"):
        trainer(tmp_path, GateCallback()).fit(Module(), loader(2))
