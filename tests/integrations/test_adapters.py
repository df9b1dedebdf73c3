"""TensorBoard, Weights & Biases and MLflow hold the same figures as a log in memory.

What was written is read back with each library's own reader.
"""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

import grutrace
from grutrace.integrations import GateLogger, MLflowLog, TensorBoardLog, WandbLog
from grutrace.integrations.figures import Figures
from tests.integrations.models import KeptLog, Tagger, batches, needs, own_leaks


@pytest.fixture(autouse=True)
def nothing_leaks() -> Iterator[None]:
    yield
    assert own_leaks() == []


def train(log: Any, *, broken: bool = False, log_every: int = 2) -> KeptLog:
    """Log two intervals of training and one of validation, one gate of NaN in the first."""
    torch.manual_seed(3)
    model, kept = Tagger(), KeptLog()
    weight = model.rnn.weight_ih_l0
    with GateLogger(model, [kept, log], log_every=log_every, check="off") as gates:
        for step, batch in enumerate(batches(4)):
            with torch.no_grad():
                weight[6] = torch.nan if broken and step == 0 else 0.1
            with gates.batch(100 + step):
                model(batch)
        with gates.evaluation(103):
            model(batches(1)[0])
    return kept


def single(value: float) -> float:
    """A value as it is stored in float32."""
    return float(np.float32(value))


class TestTensorBoard:
    @pytest.fixture(autouse=True)
    def library(self) -> None:
        needs("tensorboard")

    @pytest.mark.parametrize("own", [False, True])
    def test_events_hold_the_figures(self, own: bool, tmp_path: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        if own:
            kept = train(TensorBoardLog(tmp_path), broken=True)
        else:
            writer = SummaryWriter(str(tmp_path))
            kept = train(TensorBoardLog(writer), broken=True)
            writer.add_scalar("still open", 1.0)
            writer.close()
        assert_events(tmp_path, kept.figures)

    def test_control_lost_figures_are_detected(self, tmp_path: Path) -> None:
        kept = train(TensorBoardLog(tmp_path))
        with pytest.raises(AssertionError):
            assert_events(tmp_path, [*kept.figures, kept.figures[0]])

    def test_no_file_is_made_before_the_first_log(self, tmp_path: Path) -> None:
        TensorBoardLog(tmp_path / "runs").close()
        assert not list(tmp_path.iterdir())


def assert_events(folder: Path, figures: list[Figures]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "histograms": 0})
    events.Reload()
    for name in figures[-1].scalars:
        tag = name.split("/")[1]
        expected = [(part.step, single(part.scalars[name])) for part in figures if part.tag == tag]
        assert [(event.step, event.value) for event in events.Scalars(name)] == expected
    for part in figures:
        for name, histogram in part.histograms.items():
            stored = {event.step: event.histogram_value for event in events.Histograms(name)}
            value = stored[part.step]
            assert value.bucket == histogram.counts.tolist()
            assert value.bucket_limit == histogram.edges[1:].tolist()
            assert (value.min, value.max) == (histogram.minimum, histogram.maximum)
            assert value.num == histogram.counts.sum()
            assert (value.sum, value.sum_squares) == (histogram.total, histogram.squares)


@pytest.fixture(scope="module")
def wandb() -> ModuleType:
    return needs("wandb")


class TestWandb:
    @pytest.fixture(autouse=True)
    def run(self, wandb: Any, tmp_path: Path) -> Iterator[Any]:
        run = wandb.init(project="test", dir=str(tmp_path), mode="offline")
        yield run
        run.finish()

    @pytest.mark.parametrize("is_given", [False, True])
    def test_the_offline_file_holds_the_figures(
        self, is_given: bool, run: Any, tmp_path: Path
    ) -> None:
        run.log({"loss": 1.0})
        kept = train(WandbLog(run if is_given else None), broken=True)
        run.log({"loss": 0.5})
        run.finish()
        rows = history(tmp_path)
        logged = [row for row in rows if "gates/step" in row]
        assert [row["gates/step"] for row in logged] == [101, 103, 103]
        assert [row["loss"] for row in rows if "loss" in row] == [1.0, 0.5]
        for row, part in zip(logged, kept.figures, strict=True):
            for name, value in part.scalars.items():
                assert row[name] == value
            for name, histogram in part.histograms.items():
                assert row[name]["values"] == histogram.counts.tolist()
                assert row[name]["bins"] == histogram.edges.tolist()

    @pytest.mark.parametrize("pass_step", [False, True])
    def test_no_value_is_lost_where_the_training_passes_steps(
        self, pass_step: bool, run: Any, tmp_path: Path
    ) -> None:
        """The control, without `pass_step`, loses the training's own values."""
        run.log({"loss": 1.0}, step=100)
        train(WandbLog(run, pass_step=pass_step), log_every=1)
        run.log({"loss": 0.5}, step=103)
        run.log({"loss": 0.2}, step=104)
        run.finish()
        rows = history(tmp_path)
        assert len([row for row in rows if "loss" in row]) == (3 if pass_step else 1)
        if pass_step:
            assert [row["_step"] for row in rows] == [100, 101, 102, 103, 104]
            assert "gates/train/rnn.l0/update/mean" in rows[3]
            assert "gates/valid/rnn.l0/update/mean" in rows[3]

    def test_without_a_run(self, run: Any) -> None:
        run.finish()
        with pytest.raises(grutrace.StateError, match="no run of wandb is active"):
            train(WandbLog())

    def test_a_run_of_another_type(self) -> None:
        with pytest.raises(grutrace.OptionError, match=r"run: expected what wandb.init\(\)"):
            WandbLog("run-1")


def history(folder: Path) -> list[dict[str, Any]]:
    """The rows of an offline run: wandb's own records, in a log of LevelDB's format.

    https://github.com/google/leveldb/blob/main/doc/log_format.md; wandb adds a header of 7 bytes.
    """
    # The process of wandb may write the file after `finish` has returned.
    for _ in range(100):
        kinds = [record.WhichOneof("record_type") for record in records(folder)]
        if "exit" in kinds:
            break
        time.sleep(0.1)
    return [row_of(record.history) for record in records(folder) if record.HasField("history")]


def records(folder: Path) -> Iterator[Any]:
    from wandb.proto import wandb_internal_pb2

    (path,) = folder.rglob("run-*.wandb")
    data, position, message = path.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while position + 7 <= len(data):
        _, size, kind = struct.unpack_from("<IHB", data, position)
        room = 32768 - position % 32768
        if room < 7 or kind == 0:
            position += room
            continue
        message += data[position + 7 : position + 7 + size]
        position += 7 + size
        if kind in (1, 4):  # a whole record, or its last part
            yield wandb_internal_pb2.Record.FromString(message)
            message = b""


def row_of(history: Any) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for item in history.item:
        *parents, last = item.nested_key or [item.key]
        target = row
        for key in parents:
            target = target.setdefault(key, {})
        target[last] = json.loads(item.value_json)
    return row


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Any:
    mlflow, folder = needs("mlflow"), tmp_path_factory.mktemp("mlflow")
    mlflow.set_tracking_uri(f"sqlite:///{folder / 'mlflow.db'}")
    experiment = mlflow.create_experiment("gates", (folder / "artifacts").as_uri())
    mlflow.set_experiment(experiment_id=experiment)
    return mlflow.MlflowClient()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of SQLAlchemy
class TestMLflow:
    @pytest.mark.parametrize("make", [lambda _: MLflowLog(), lambda run: MLflowLog(run)])
    def test_the_store_holds_the_figures(
        self, make: Callable[[str], MLflowLog], client: Any, tmp_path: Path
    ) -> None:
        import mlflow

        with mlflow.start_run() as run:
            kept = train(make(run.info.run_id), broken=True)
        for name in kept.figures[-1].scalars:
            tag = name.split("/")[1]
            stored = client.get_metric_history(run.info.run_id, name)
            assert [(metric.step, metric.value) for metric in stored] == [
                (part.step, part.scalars[name]) for part in kept.figures if part.tag == tag
            ]
        for part in kept.figures:
            path = f"gates/{part.tag}/step_{part.step:08}.json"
            text = Path(client.download_artifacts(run.info.run_id, path, str(tmp_path))).read_text()
            stored = json.loads(text)
            assert list(stored) == list(part.histograms)
            for name, histogram in part.histograms.items():
                assert stored[name]["counts"] == histogram.counts.tolist()
                assert stored[name]["edges"] == histogram.edges.tolist()

    def test_two_intervals_of_one_step_are_both_kept(self, client: Any) -> None:
        import mlflow

        with mlflow.start_run() as run:
            log = MLflowLog()
            figures = train(KeptLog()).figures[0]
            log.write(figures)
            log.write(figures)
        listed = client.list_artifacts(run.info.run_id, "gates/train")
        assert sorted(Path(item.path).name for item in listed) == [
            "step_00000101-2.json",
            "step_00000101.json",
        ]

    def test_names_that_mlflow_refuses_are_changed(self, client: Any) -> None:
        import mlflow

        odd = Figures("tr+ain", 3, {"gates/tr+ain/häus.l0/update/mean": 0.5}, {})
        with mlflow.start_run() as run:
            MLflowLog().write(odd)
        metrics = client.get_run(run.info.run_id).data.metrics
        assert metrics == {"gates/tr_ain/h_us.l0/update/mean": 0.5}

    @pytest.mark.usefixtures("client")
    def test_without_a_run(self) -> None:
        with pytest.raises(grutrace.StateError, match="no run of mlflow is active"):
            train(MLflowLog())
