"""A callback of Lightning that records gates and writes figures of them to the trainer's loggers.

Importing this module imports Lightning.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

from grutrace.errors import OptionError, join_names, require_extra
from grutrace.integrations.gate_logger import LOG_EVERY, GateLogger, Log, as_logs
from grutrace.integrations.mlflow import MLflowLog
from grutrace.integrations.tensorboard import TensorBoardLog
from grutrace.integrations.wandb import WandbLog
from grutrace.statistics.histogram import BINS

with require_extra("GateCallback", "integrations", "lightning"):
    from lightning.pytorch import Callback


class GateCallback(Callback):  # type: ignore[misc]
    """Record the gates of a LightningModule while a Trainer trains, validates or tests it.

    Training batches have the tag ``train``, those of validation ``valid`` and of a test ``test``;
    in a file with the epoch and the step, as in ``train epoch=2 step=340``. Validation and test
    are logged once, when they end. The step is the trainer's ``global_step``, the number of
    optimizer steps, which continues after a checkpoint. Batches of the sanity check are left out.

    The trace is opened before the first batch, and closed when the trainer ends, also after an
    exception.

    Args:
        log: A `Log`, or several. None uses the trainer's loggers of TensorBoard, Weights & Biases
            and MLflow; with a path and none of these, only the file is written.
        path: The file for the rows. None keeps figures only.
        every: As for `GateLogger`: record every n-th batch.
        log_every: As for `GateLogger`: batches of training between two logs.
        bins: As for `GateLogger`.
        all_ranks: As for `GateLogger`.
        options: As for `GateLogger`: options of `grutrace.Tracer`.

    Raises:
        OptionError: An option has an invalid value, or there is neither a log nor a path.
        UnsupportedError: The model contains no GRU. Raised before the first batch.
        TraceFileError: The file exists, or cannot be written.
    """

    def __init__(
        self,
        log: Log | Sequence[Log] | None = None,
        path: str | os.PathLike[str] | None = None,
        *,
        every: int = 1,
        log_every: int = LOG_EVERY,
        bins: int = BINS,
        all_ranks: bool = False,
        **options: Any,
    ) -> None:
        as_logs(log)
        self._log, self._path, self._bins, self._options = log, path, bins, options
        self._every, self._log_every, self._all_ranks = every, log_every, all_ranks
        self._gates: GateLogger | None = None

    def _open(self, trainer: Any, module: Any) -> GateLogger:
        if self._gates is None:
            log = tuple(_logs_of(trainer)) if self._log is None else self._log
            if not log and self._path is None:
                names = join_names(type(logger).__name__ for logger in trainer.loggers)
                raise OptionError(
                    "log and path: expected one of them, or a trainer with a logger of "
                    f"TensorBoard, W&B or MLflow; found {names}"
                )
            self._gates = GateLogger(
                module,
                log,
                self._path,
                every=self._every,
                log_every=self._log_every,
                bins=self._bins,
                all_ranks=self._all_ranks,
                **self._options,
            )
        return self._gates

    def _begin(self, trainer: Any, module: Any, tag: str) -> None:
        if not trainer.sanity_checking:
            gates = self._open(trainer, module)
            gates.begin(trainer.global_step, tag=tag, epoch=trainer.current_epoch)

    def _end(self, trainer: Any) -> None:
        if self._gates is not None:
            self._gates.end(trainer.global_step)

    def _write(self, tag: str) -> None:
        if self._gates is not None:
            self._gates.write(tag)

    def on_sanity_check_start(self, trainer: Any, pl_module: Any) -> None:
        """Open the trace."""
        self._open(trainer, pl_module)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Open the trace."""
        self._open(trainer, pl_module)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *_arguments: Any) -> None:
        """Begin a batch."""
        self._begin(trainer, pl_module, "train")

    def on_train_batch_end(self, trainer: Any, *_arguments: Any) -> None:
        """End a batch, and log if it is due."""
        self._end(trainer)
        if self._gates is not None:
            self._gates.write_if_due()

    def on_validation_batch_start(self, trainer: Any, pl_module: Any, *_arguments: Any) -> None:
        """Begin a batch."""
        self._begin(trainer, pl_module, "valid")

    def on_validation_batch_end(self, trainer: Any, *_arguments: Any) -> None:
        """End a batch."""
        self._end(trainer)

    def on_validation_end(self, *_arguments: Any) -> None:
        """Log the validation."""
        self._write("valid")

    def on_test_batch_start(self, trainer: Any, pl_module: Any, *_arguments: Any) -> None:
        """Begin a batch."""
        self._begin(trainer, pl_module, "test")

    def on_test_batch_end(self, trainer: Any, *_arguments: Any) -> None:
        """End a batch."""
        self._end(trainer)

    def on_test_end(self, *_arguments: Any) -> None:
        """Log the test."""
        self._write("test")

    def on_exception(self, _trainer: Any, _module: Any, exception: BaseException) -> None:
        """Log what was counted, and close."""
        self._close(exception)

    def teardown(self, *_arguments: Any, **_named: Any) -> None:
        """Log what was counted since the last log, and close."""
        self._close()

    def _close(self, error: BaseException | None = None) -> None:
        gates, self._gates = self._gates, None
        if gates is not None:
            gates.close(error)


def _logs_of(trainer: Any) -> Iterator[Log]:
    """Yield a log for each of the trainer's loggers that takes figures."""
    if not trainer.is_global_zero:
        return
    for logger in trainer.loggers:
        kind = type(logger).__name__
        if kind == "TensorBoardLogger":
            yield TensorBoardLog(logger.experiment)
        elif kind == "WandbLogger":
            yield WandbLog(logger.experiment)
        elif kind == "MLFlowLogger":
            yield MLflowLog(logger.run_id, logger.experiment)
