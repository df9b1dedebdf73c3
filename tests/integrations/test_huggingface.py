"""The callback of Hugging Face's Trainer, in trainers of transformers itself."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import grutrace
from tests.integrations.models import KeptLog, Tagger, needs, own_leaks

needs("transformers")
needs("accelerate")

from transformers import Trainer, TrainingArguments  # noqa: E402

from grutrace.integrations.huggingface import GateCallback  # noqa: E402

# Warnings of transformers' and accelerate's own code.
pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.filterwarnings("error::grutrace.GrutraceWarning"),
]


@pytest.fixture(autouse=True)
def nothing_leaks() -> Iterator[None]:
    yield
    assert own_leaks() == []


class Failing(Tagger):
    """Fails at a call, if told to."""

    def __init__(self, fails_at: int | None = None) -> None:
        torch.manual_seed(5)
        super().__init__()
        self.fails_at, self.calls = fails_at, 0

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        self.calls += 1
        result = super().forward(x, labels)
        if self.calls == self.fails_at:
            raise RuntimeError("training failed")
        return result


def data(number: int, seed: int = 0) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        {"x": torch.randn(6, 3, generator=generator), "labels": torch.zeros(6, 1)}
        for _ in range(number)
    ]


def trainer(folder: Path, model: nn.Module, callback: Any, **options: Any) -> Trainer:
    defaults = {"num_train_epochs": 2, "save_strategy": "no", "per_device_train_batch_size": 4}
    arguments = TrainingArguments(
        str(folder),
        report_to=[],
        use_cpu=True,
        per_device_eval_batch_size=4,
        disable_tqdm=True,
        **(defaults | options),
    )
    callbacks = [] if callback is None else [callback]
    return Trainer(
        model, arguments, train_dataset=data(24), eval_dataset=data(8, 1), callbacks=callbacks
    )


def count(log: KeptLog, tag: str) -> list[int]:
    name = f"gates/{tag}/rnn.l0/update"
    return [part.histograms[name].counts.sum() for part in log.figures if part.tag == tag]


def test_training_and_evaluation_are_logged_apart(tmp_path: Path) -> None:
    log, model = KeptLog(), Failing()
    callback = GateCallback(log, tmp_path / "run.h5", log_every=4)
    trainer(tmp_path, model, callback, eval_strategy="epoch").train()
    assert log.steps("train") == [4, 8, 12]
    assert log.steps("valid") == [6, 12]
    assert count(log, "train") == [480, 480, 480]
    assert count(log, "valid") == [240, 240]
    assert log.closed == 1
    with grutrace.open(tmp_path / "run.h5") as trace:
        tags = trace.calls["tag"].tolist()
        assert tags[:6] == [f"train epoch=0 step={step}" for step in range(6)]
        assert tags[6:9] == ["valid epoch=1 step=6"] * 2 + ["train epoch=1 step=6"]
        assert len(tags) == 16
        last = torch.stack([item["x"] for item in data(8, 1)[4:]])
        output, _ = model.rnn(last)
        np.testing.assert_array_equal(
            np.asarray(trace["rnn.l0"].hidden)[-24:], output.detach().reshape(24, 5)
        )


def test_evaluation_during_an_epoch(tmp_path: Path) -> None:
    log = KeptLog()
    fitted = trainer(tmp_path, Failing(), GateCallback(log), eval_strategy="steps", eval_steps=4)
    fitted.train()
    assert log.steps("valid") == [4, 8, 12]
    assert count(log, "valid") == [240, 240, 240]
    assert sum(count(log, "train")) == 12 * 120


def test_the_result_of_the_training_is_the_same(tmp_path: Path) -> None:
    def train(callback: GateCallback | None) -> list[Tensor]:
        model = Failing()
        trainer(tmp_path, model, callback, eval_strategy="epoch").train()
        return [parameter.detach() for parameter in model.parameters()]

    plain, traced = train(None), train(GateCallback(KeptLog()))
    assert all(torch.equal(one, other) for one, other in zip(plain, traced, strict=True))


@pytest.mark.parametrize("how", ["constructor", "two callbacks", "with"])
def test_an_exception_closes_and_keeps(tmp_path: Path, how: str) -> None:
    log, model = KeptLog(), Failing(fails_at=5)
    callback, other = GateCallback(log, tmp_path / "run.h5", log_every=3), GateCallback(KeptLog())
    fitted = trainer(tmp_path, model, callback if how == "constructor" else None)
    if how == "two callbacks":
        arguments = {"train_dataset": data(24), "callbacks": [callback, other]}
        fitted = Trainer(model, fitted.args, **arguments)
    elif how == "with":
        fitted.add_callback(callback)
    block = callback if how == "with" else nullcontext()
    with pytest.raises(RuntimeError, match="training failed"), block:
        fitted.train()
    assert own_leaks() == []
    assert log.steps("train") == [3, 4]
    assert count(log, "train") == [360, 240]
    assert log.closed == 1
    model(torch.randn(4, 6, 3))
    with grutrace.open(tmp_path / "run.h5") as trace:
        assert len(trace.calls) == 5


@pytest.mark.parametrize("where", ["data", "evaluation", "interrupt", "optimizer"])
def test_an_exception_anywhere_in_the_training_closes(tmp_path: Path, where: str) -> None:
    log, model = KeptLog(), Failing()
    fitted = trainer(tmp_path, model, GateCallback(log, log_every=100), eval_strategy="epoch")

    def fail(*_arguments: Any, **_named: Any) -> Any:
        raise KeyboardInterrupt if where == "interrupt" else RuntimeError("training failed")

    if where == "data":
        fitted.train_dataset[20] = None  # type: ignore[index]
    elif where == "evaluation":
        fitted.evaluate = fail
    else:
        fitted.create_optimizer()
        fitted.optimizer.register_step_post_hook(fail)
    with pytest.raises(BaseException):  # noqa: B017, PT011
        fitted.train()
    assert log.closed == 1
    assert own_leaks() == []


def test_a_trainer_is_freed_and_trains_again(tmp_path: Path) -> None:
    log = KeptLog()
    fitted = trainer(tmp_path, Failing(), GateCallback(log))
    fitted.train()
    assert log.closed == 1
    log.closed = 0
    fitted.train()
    assert (log.closed, sum(count(log, "train"))) == (1, 2 * 12 * 120)
    is_alive = weakref.ref(fitted)
    del fitted
    gc.collect()
    assert is_alive() is None


def test_a_callback_that_was_added_later_needs_with(tmp_path: Path) -> None:
    log, model = KeptLog(), Failing(fails_at=5)
    callback = GateCallback(log)
    fitted = trainer(tmp_path, model, None)
    fitted.add_callback(callback)
    with pytest.raises(RuntimeError, match="training failed"):
        fitted.train()
    assert not log.closed
    callback.close()
    assert count(log, "train") == [600]


def test_accumulated_gradients(tmp_path: Path) -> None:
    log = KeptLog()
    callback = GateCallback(log, tmp_path / "run.h5", log_every=2)
    options = {"gradient_accumulation_steps": 2, "num_train_epochs": 1}
    trainer(tmp_path, Failing(), callback, **options).train()
    assert log.steps("train") == [2, 3]
    assert count(log, "train") == [480, 240]
    with grutrace.open(tmp_path / "run.h5") as trace:
        steps = [text.rpartition("=")[2] for text in trace.calls["tag"].tolist()]
        assert steps == ["0", "0", "1", "1", "2", "2"]


def test_every_nth_batch(tmp_path: Path) -> None:
    log = KeptLog()
    trainer(tmp_path, Failing(), GateCallback(log, every=4, log_every=6)).train()
    assert log.steps("train") == [6, 12]
    assert count(log, "train") == [240, 120]


def test_steps_continue_after_a_checkpoint(tmp_path: Path) -> None:
    options = {"save_strategy": "epoch"}
    trainer(tmp_path, Failing(), None, **options).train()
    log = KeptLog()
    second = trainer(tmp_path, Failing(), GateCallback(log, log_every=3), **options)
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert log.steps("train") == [9, 12]


def test_bfloat16_mixed_precision(tmp_path: Path) -> None:
    log = KeptLog()
    trainer(tmp_path, Failing(), GateCallback(log), bf16=True, num_train_epochs=1).train()
    assert count(log, "train") == [720]
    assert log.figures[0].scalars["gates/train/rnn.l0/update/nan"] == 0


def test_an_evaluation_outside_of_training_is_left_out(tmp_path: Path) -> None:
    log = KeptLog()
    fitted = trainer(tmp_path, Failing(), GateCallback(log))
    fitted.evaluate()
    fitted.train()
    fitted.evaluate()
    assert not log.steps("valid")
    assert count(log, "train") == [12 * 120]


def test_a_model_without_a_gru_fails_before_training(tmp_path: Path) -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.out, self.calls = nn.Linear(3, 1), 0

        def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
            self.calls += 1
            return {"loss": (self.out(x) - labels).square().mean()}

    model = Plain()
    with pytest.raises(grutrace.UnsupportedError, match=r"expected a model with an nn\.GRU"):
        trainer(tmp_path, model, GateCallback(KeptLog())).train()
    assert model.calls == 0


def test_neither_a_log_nor_a_path() -> None:
    with pytest.raises(grutrace.OptionError, match="log and path: expected at least one"):
        GateCallback()
