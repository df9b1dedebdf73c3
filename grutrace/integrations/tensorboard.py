"""Write figures to TensorBoard."""

from __future__ import annotations

import os
from typing import Any

from grutrace.errors import OptionError, as_path, require_extra, short_repr
from grutrace.integrations.figures import Figures


class TensorBoardLog:
    """Write histograms and scalars to event files of TensorBoard.

    Args:
        writer: A ``SummaryWriter`` of `torch.utils.tensorboard` or tensorboardX, which stays open;
            or the folder of a new one.

    Raises:
        OptionError: The writer is neither.
        MissingExtraError: A folder needs tensorboard, which is not installed.
    """

    def __init__(self, writer: Any) -> None:
        self._folder = None
        if isinstance(writer, (str, os.PathLike)):
            self._folder, writer = as_path(writer), None
            with require_extra("TensorBoardLog", "integrations", "tensorboard"):
                import tensorboard  # noqa: F401
        elif isinstance(writer, type) or not hasattr(writer, "add_histogram_raw"):
            raise OptionError(
                f"writer: expected a SummaryWriter, or a folder; found {short_repr(writer)}"
            )
        self._writer = writer

    def write(self, figures: Figures) -> None:
        """Write the figures of an interval. An own writer is created now, on the rank that logs."""
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(self._folder)
        writer, step = self._writer, figures.step
        for name, value in figures.scalars.items():
            writer.add_scalar(name, value, step)
        for name, histogram in figures.histograms.items():
            writer.add_histogram_raw(
                name,
                min=histogram.minimum,
                max=histogram.maximum,
                num=int(histogram.counts.sum()),
                sum=histogram.total,
                sum_squares=histogram.squares,
                bucket_limits=histogram.edges[1:].tolist(),
                bucket_counts=histogram.counts.tolist(),
                global_step=step,
            )
        writer.flush()

    def close(self) -> None:
        """Close the writer that was created here."""
        if self._folder is not None and self._writer is not None:
            self._writer.close()
