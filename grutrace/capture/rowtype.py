"""Keeping rows in the type of their module's rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import numpy as np
import torch
from torch import Tensor

from grutrace.capture.side_stream import SideStream
from grutrace.gru.steps import Steps, copy_rounded, numpy_type
from grutrace.record import Array, Module


class RowType:
    """Copies tensors of one module into rows, and notes once what that loses.

    Args:
        module: The module.
        chosen: Whether the user chose the type. Then only what does not fit at all is noted.
        copied: Whether rows are made now in the type of the weights, and get their own later.
        beside: Whether copies from a device may be made beside the model's stream. They lie in
            pinned memory, so only if they are soon let go.

    Attributes:
        dtype: NumPy's type of the rows that are made.
        stored: Torch's type that they are stored as.
    """

    def __init__(
        self, module: Module, *, chosen: bool, copied: bool = False, beside: bool = False
    ) -> None:
        self._module = module
        self.dtype = np.dtype(module.weights_dtype if copied else module.dtype)
        self.stored: torch.dtype = getattr(torch, module.dtype)
        self._side = SideStream() if copied and beside else None
        self._chosen = chosen
        self._noted: set[str] = set()
        self._losses: list[str] = []

    def of_steps(self, steps: Steps, values: Tensor, *, is_ours: bool = False) -> Array:
        """Return values, one a step in the kernel's order, as (N, width), sequence by sequence.

        Args:
            steps: Of the call.
            values: To be copied.
            is_ours: Whether nobody else will change them, so that they need not be copied.
        """
        if self._side is not None and self._side.takes(values):
            return self._beside(values, steps.ordered(values))
        rows = (steps.as_rows if is_ours else steps.in_sequences)(values, self.dtype)
        if values.dtype != self.stored:
            self._mind(values, rows)
        return rows

    def of(self, values: Tensor) -> Array:
        """Copy values of any shape."""
        if self._side is not None and self._side.takes(values):
            return self._beside(values, values.clone())
        rows = np.empty(values.shape, self.dtype)
        copy_rounded(torch.from_numpy(rows), values)
        if values.dtype != self.stored:
            self._mind(values, rows)
        return rows

    def take_ready(self) -> Callable[[], None] | None:
        """Return what waits until this thread's copies are whole; None if they are."""
        return None if self._side is None else self._side.take_ready()

    def _beside(self, values: Tensor, own: Tensor) -> Array:
        side = cast("SideStream", self._side)
        rows = side.copy(own, self.dtype)
        if values.dtype != self.stored and (ready := side.take_ready()) is not None:
            ready()
            self._mind(values, rows)
        return rows

    def _mind(self, values: Tensor, rows: Array) -> None:
        computed, kept = numpy_type(values.dtype), np.dtype(self._module.dtype)
        if np.can_cast(computed, kept):
            return
        if not self._chosen:
            self._note_once(
                "rounded",
                f"computes in {computed} by now, and was in {kept} when it was attached: its "
                f"rows are rounded to {kept}",
            )
        with np.errstate(over="ignore"):
            infinite = np.isinf(rows.astype(kept, copy=False)).any()
        if infinite:
            finite = values[values.isfinite()]
            largest = finite.abs().max().item() if finite.numel() else 0.0
            if largest > float(np.finfo(kept).max):
                self._note_once(
                    "overflow",
                    f"has values up to {largest:.3g}, and {kept} holds none above "
                    f"{np.finfo(kept).max:.3g}: they are kept as infinity, and cannot be verified",
                )

    def take_losses(self) -> list[str]:
        """Return what copying has lost that was not taken from here yet, a sentence each.

        Values are rounded without anybody having asked for it, or are too large.
        """
        found, self._losses = self._losses, []
        return found

    def _note_once(self, about: str, message: str) -> None:
        if about not in self._noted:
            self._noted.add(about)
            self._losses.append(f"{self._module.path or 'the model'} {message}")


def to_numpy(values: Tensor) -> Array:
    """Return the values as an array: in their own type, or the one that holds all its values."""
    values = values.detach().cpu()
    if str(values.dtype).removeprefix("torch.") != numpy_type(values.dtype):
        values = values.float()
    array: Array = values.numpy()
    return array
