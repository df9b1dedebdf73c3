"""A callback of Hugging Face's Trainer that records gates and writes figures of them to logs.

Importing this module imports transformers.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any

from grutrace.errors import OptionError, require_extra
from grutrace.integrations.gate_logger import LOG_EVERY, GateLogger, Log, as_logs
from grutrace.statistics.histogram import BINS

if TYPE_CHECKING:
    from typing_extensions import Self

with require_extra("GateCallback", "integrations", "transformers", "accelerate"):
    from transformers import Trainer, TrainerCallback


class GateCallback(TrainerCallback):  # type: ignore[misc]
    """Record the gates of a model while Hugging Face's Trainer trains and evaluates it.

    A batch is an optimizer step with all its micro-batches. It has the tag ``train``, batches of an
    evaluation ``valid``; in a file with the epoch and the step, as in ``train epoch=2 step=340``.
    An evaluation is logged once, when it ends. The step is the trainer's ``global_step``, which
    continues after a checkpoint. An evaluation outside of `Trainer.train` is not recorded.

    The trace and the logs are closed when training ends, also by an exception. The Trainer does not
    tell a callback of exceptions, so a callback that is passed to its constructor wraps its method
    `train`. A callback that is added later, by `Trainer.add_callback`, does not: train within its
    ``with`` block, which closes everything. ::

        gates = GateCallback(TensorBoardLog("runs"))
        Trainer(model, arguments, train_dataset=data, callbacks=[gates]).train()

    Args:
        log: A `Log`, or several.
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
        if not as_logs(log) and path is None:
            raise OptionError("log and path: expected at least one of the two, found none")
        self._log, self._path, self._bins, self._options = log, path, bins, options
        self._every, self._log_every, self._all_ranks = every, log_every, all_ranks
        self._gates: GateLogger | None = None
        self._evaluates = False

    def on_init_end(self, _args: Any, _state: Any, _control: Any, **_named: Any) -> None:
        """Close after an exception of the trainer's `train`, too."""
        trainer = _calling_trainer()
        if trainer is not None:
            trainer.train = partial(_train, trainer.train, self)

    def on_train_begin(self, _args: Any, _state: Any, _control: Any, **named: Any) -> None:
        """Open the trace."""
        self.close()
        self._gates = GateLogger(
            named["model"],
            self._log,
            self._path,
            every=self._every,
            log_every=self._log_every,
            bins=self._bins,
            all_ranks=self._all_ranks,
            **self._options,
        )

    def _begin(self, state: Any, tag: str) -> None:
        if self._gates is not None:
            self._gates.begin(state.global_step, tag=tag, epoch=int(state.epoch or 0))

    def on_step_begin(self, _args: Any, state: Any, _control: Any, **_named: Any) -> None:
        """Begin a batch."""
        self._end_evaluation()
        self._begin(state, "train")

    def on_step_end(self, _args: Any, state: Any, control: Any, **_named: Any) -> None:
        """End a batch, and log if it is due. Begin an evaluation if one follows."""
        if self._gates is not None:
            self._gates.end(state.global_step)
            self._gates.write_if_due()
        self._begin_evaluation(state, control)

    def on_epoch_end(self, _args: Any, state: Any, control: Any, **_named: Any) -> None:
        """Begin an evaluation if one follows."""
        self._begin_evaluation(state, control)

    def _begin_evaluation(self, state: Any, control: Any) -> None:
        # The Trainer tells of a batch of an evaluation only when it has ended.
        if control.should_evaluate and not self._evaluates:
            self._evaluates = True
            self._begin(state, "valid")

    def on_prediction_step(self, _args: Any, state: Any, _control: Any, **_named: Any) -> None:
        """End a batch of an evaluation, and begin the next."""
        if self._gates is not None and self._evaluates:
            self._gates.end()
            self._begin(state, "valid")

    def on_evaluate(self, _args: Any, _state: Any, _control: Any, **_named: Any) -> None:
        """Log the evaluation."""
        self._end_evaluation()
        if self._gates is not None:
            self._gates.write("valid")

    def _end_evaluation(self) -> None:
        if self._gates is not None and self._evaluates:
            self._gates.end()
        self._evaluates = False

    def on_train_end(self, _args: Any, _state: Any, _control: Any, **_named: Any) -> None:
        """Log what was counted since the last log, and close."""
        self.close()

    def close(self, error: BaseException | None = None) -> None:
        """Log what was counted since the last log, and close. Closing twice does nothing.

        Args:
            error: The exception that ended the training, if there was one.
        """
        self._evaluates = False
        gates, self._gates = self._gates, None
        if gates is not None:
            gates.close(error)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close(error)


def _train(train: Callable[..., Any], callback: GateCallback, *args: Any, **named: Any) -> Any:
    """Train, and close a callback after an exception."""
    try:
        return train(*args, **named)
    except BaseException as error:
        callback.close(error)
        raise


def _calling_trainer() -> Trainer | None:
    """Return the trainer that calls a callback; None if it is not found."""
    frame = sys._getframe(1)
    while frame.f_back is not None:
        frame = frame.f_back
        caller = frame.f_locals.get("self")
        if isinstance(caller, Trainer):
            return caller
    return None
