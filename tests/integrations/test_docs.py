"""The blocks of docs/logging.md that need a library run."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import grutrace
from tests.integrations.models import Tagger, batches, needs, own_leaks

PAGE = Path(__file__).parents[2] / "docs" / "logging.md"
BLOCKS = re.findall(r"^```py\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.M | re.S)

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def nothing_leaks() -> Iterator[None]:
    yield
    assert own_leaks() == []


class Scores(Tagger):
    """The scores alone."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x)["logits"]


def run(index: int, **names: object) -> None:
    exec(compile(BLOCKS[index], f"{PAGE.name}, block {index}", "exec"), dict(names))


def test_there_are_three_blocks() -> None:
    assert len(BLOCKS) == 3


def test_the_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs("tensorboard")
    monkeypatch.chdir(tmp_path)
    model = Scores()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    run(0, model=model, optimizer=optimizer, train_data=batches(3), valid_data=batches(2))
    assert list(tmp_path.glob("runs/one/events*"))


def test_lightning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pl = needs("lightning.pytorch")
    needs("tensorboard")
    monkeypatch.chdir(tmp_path)

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = Scores()

        def training_step(self, batch: Tensor, _number: int) -> Tensor:
            return self.model(batch).square().mean()

        def validation_step(self, batch: Tensor, _number: int) -> None:
            self.model(batch)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.1)

    data = DataLoader(batches(3), batch_size=None)
    run(1, module=Module(), train_data=data, valid_data=data)
    with grutrace.open("run.h5") as trace:
        assert len(trace.calls) == 12
        assert len(trace.select(tag="train epoch=1 *").calls) == 3


def test_hugging_face(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("transformers", "accelerate", "tensorboard"):
        needs(name)
    monkeypatch.chdir(tmp_path)
    tagger: nn.Module = Tagger()
    dataset = [{"x": torch.randn(6, 3), "labels": torch.zeros(6, 1)} for _ in range(16)]
    run(2, tagger=tagger, dataset=dataset)
    assert list(tmp_path.glob("runs/two/events*"))
