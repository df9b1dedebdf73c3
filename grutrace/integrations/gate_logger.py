"""`GateLogger`: records a model batch by batch and writes figures of its gates to logs."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from torch import nn

from grutrace.capture.options import positive_integer
from grutrace.capture.selection import select
from grutrace.capture.tracer import Tracer
from grutrace.distributed import resolve_shard
from grutrace.errors import OptionError, StateError, short_repr
from grutrace.integrations.figures import Figures, figures_of
from grutrace.records import DEFAULT_RECORD
from grutrace.statistics.histogram import BINS
from grutrace.statistics.running import Statistics

if TYPE_CHECKING:
    from typing_extensions import Self

#: Default number of batches between two logs, as of Lightning's ``log_every_n_steps``.
LOG_EVERY = 50


@runtime_checkable
class Log(Protocol):
    """Where figures go: TensorBoard, Weights & Biases, MLflow, or an object of your own."""

    def write(self, figures: Figures) -> None:
        """Write the figures of an interval."""

    def close(self) -> None:
        """Write what is pending. An object that the user passed, such as a writer, stays open."""


class GateLogger:
    """Record a model batch by batch, and write histograms and scalars of its gates to logs.

    Each log covers the batches since the last one with the same tag. Counting needs no rows; with a
    path, the rows go to a file as well. Close the logger, or use it as a context manager: what was
    counted since the last log is then written, also after an exception.

    Of several processes, rank 0 writes to the logs; every rank writes a file of its own.

    Args:
        model: A model that contains nn.GRU or nn.GRUCell modules.
        log: A `Log`, or several. None only writes the file.
        path: The file for the rows. None keeps figures only.
        every: Record every n-th batch of each tag, from the first.
        log_every: Write to the log after so many batches of a tag, recorded or not.
        bins: Number of bins of each histogram, as for `grutrace.Statistics`.
        all_ranks: Whether each rank logs, with its number in the tag: ``train.rank3``.
        options: Other options of `grutrace.Tracer`, such as ``sites``, ``record`` and ``mode``.

    Raises:
        OptionError: An option has an invalid value, or there is neither a log nor a path.
        UnsupportedError: The model contains no GRU.
        TraceFileError: The file exists, or cannot be written.

    Examples:
        >>> import torch
        >>> from grutrace.integrations import GateLogger
        >>> class MeanLog:
        ...     def write(self, figures):
        ...         names = [name for name in figures.scalars if name.endswith("update/mean")]
        ...         print(figures.step, names)
        ...     def close(self):
        ...         pass
        >>> model = torch.nn.GRU(4, 3)
        >>> with GateLogger(model, MeanLog(), log_every=2) as gates:
        ...     for step in range(5):
        ...         with gates.batch(step):
        ...             output, final = model(torch.randn(6, 2, 4))
        1 ['gates/train/l0/update/mean']
        3 ['gates/train/l0/update/mean']
        4 ['gates/train/l0/update/mean']
    """

    def __init__(
        self,
        model: nn.Module,
        log: Log | Sequence[Log] | None = None,
        path: str | os.PathLike[str] | None = None,
        *,
        every: int = 1,
        log_every: int = LOG_EVERY,
        bins: int = BINS,
        all_ranks: bool = False,
        **options: Any,
    ) -> None:
        self._every = positive_integer("every", every)
        self._log_every = positive_integer("log_every", log_every)
        self._logs = as_logs(log)
        if not self._logs and path is None:
            raise OptionError("log and path: expected at least one of the two, found none")
        for name in ("sink", "recording"):
            if name in options:
                raise OptionError(f"{name}: not an option here; the logger sets it itself")
        shard = resolve_shard(options.get("shard", True))
        self._rank_tag = f".rank{shard.rank}" if shard and all_ranks else ""
        if shard and shard.rank and not all_ranks:
            self._logs = ()
        self._statistics = Statistics(bins=bins)
        self._tracer: Tracer | None = None
        if self._logs or path is not None:
            sink = self._statistics if self._logs else None
            self._tracer = Tracer(model, path, sink=sink, recording=False, **options)
        else:
            # The same error on every rank, if there is one.
            select(model, options.get("sites"), options.get("record", DEFAULT_RECORD))
        # The tag whose figures the statistics have, and the figures of the others.
        self._tag: str | None = None
        # The tag of the batch that has begun.
        self._batch_tag: str | None = None
        self._waiting: dict[str, Statistics] = {}
        self._steps: dict[str, int] = {}
        self._batches: Counter[str] = Counter()
        self._is_closed = False

    @property
    def trace(self) -> Tracer | None:
        """The trace; None on a rank that neither logs nor writes a file. Its rows need a path."""
        return self._tracer

    @contextmanager
    def batch(
        self, step: int | None = None, *, tag: str = "train", epoch: int | None = None
    ) -> Iterator[None]:
        """Record a batch, and write to the logs if this is due.

        Args:
            step: The step of the logs; None counts the batches of the tag.
            tag: The kind of batch. Batches of different tags are logged apart.
            epoch: The epoch, for the tag in the file.

        Raises:
            StateError: The logger is closed.
        """
        self.begin(step, tag=tag, epoch=epoch)
        try:
            yield
        finally:
            self.end()
        self.write_if_due(tag)

    @contextmanager
    def evaluation(
        self, step: int, *, tag: str = "valid", epoch: int | None = None
    ) -> Iterator[None]:
        """Record everything in the block, and write it to the logs as one interval at its end.

        The arguments are those of `batch`.

        Raises:
            StateError: The logger is closed.
        """
        self._start(step, tag, epoch)
        try:
            yield
        finally:
            self.end()
        self.write(tag)

    def begin(
        self, step: int | None = None, *, tag: str = "train", epoch: int | None = None
    ) -> None:
        """Begin a batch, where its end is in another function. The arguments are those of `batch`.

        Raises:
            StateError: The logger is closed.
        """
        number = self._batches[tag]
        self._start(
            number if step is None else step, tag, epoch, is_recorded=number % self._every == 0
        )
        self._batches[tag] += 1

    def _start(self, step: int, tag: str, epoch: int | None, *, is_recorded: bool = True) -> None:
        if self._is_closed:
            raise StateError("the gate logger is closed: create a new one to log again")
        self._batch_tag, self._steps[tag] = tag, step
        if self._tracer is None or not is_recorded:
            return
        if tag != self._tag:
            self._set_aside()
            self._tag = tag
        where = f" step={step}" if epoch is None else f" epoch={epoch} step={step}"
        self._tracer.resume(f"{tag}{where}")

    def end(self, step: int | None = None) -> None:
        """End a batch: what the model does from now on is not recorded.

        Args:
            step: The step of the logs, if it has changed since the batch began.
        """
        if self._tracer is not None and self._tracer.is_recording:
            self._tracer.pause()
        if step is not None and self._batch_tag is not None:
            self._steps[self._batch_tag] = step
        self._batch_tag = None

    def write_if_due(self, tag: str = "train") -> None:
        """Write the figures of a tag to the logs after every `log_every` batches."""
        if self._batches[tag] and self._batches[tag] % self._log_every == 0:
            self.write(tag)

    def write(self, tag: str = "train") -> None:
        """Write the figures of a tag since the last time to the logs; nothing if there are none.

        Raises:
            SinkError: Rows could not be counted.
        """
        if tag == self._tag:
            self._set_aside()
        statistics = self._waiting.pop(tag, None)
        if statistics is None:
            return
        logged = f"{tag}{self._rank_tag}"
        figures = figures_of(statistics, logged, self._steps[tag], f"gates/{logged}")
        for log in self._logs:
            log.write(figures)

    def _set_aside(self) -> None:
        """Take the figures of the current tag out of the statistics."""
        if self._tag is None or not self._logs:
            return
        recent = self._statistics.pop()
        if recent.calls:
            earlier = self._waiting.get(self._tag)
            self._waiting[self._tag] = earlier.merge(recent) if earlier else recent

    def close(self, error: BaseException | None = None) -> None:
        """Write what was counted since the last logs; close the trace and the logs.

        Closing twice does nothing.

        Args:
            error: The exception that ended the training, if there was one. Modules that were never
                called then cause no warning.

        Raises:
            SinkError: Rows could not be stored or counted.
        """
        if self._is_closed:
            return
        self._is_closed = True
        with ExitStack() as stack:
            for log in self._logs:
                stack.callback(log.close)
            if self._tracer is not None:
                stack.callback(self._tracer.__exit__, type(error) if error else None, error, None)
                self._tracer.stop()
            self._set_aside()
            for tag in list(self._waiting):
                self.write(tag)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close(error)


def as_logs(log: Any) -> tuple[Log, ...]:
    """Return one log, several, or none, as a tuple.

    Raises:
        OptionError: It is none of these.
    """
    logs = () if log is None else (log,) if isinstance(log, Log) else log
    if isinstance(logs, (tuple, list)) and all(
        isinstance(one, Log) and not isinstance(one, type) for one in logs
    ):
        return tuple(logs)
    raise OptionError(
        "log: expected an object with write(figures) and close(), such as "
        f"grutrace.integrations.TensorBoardLog(writer), or several; found {short_repr(log)}"
    )
