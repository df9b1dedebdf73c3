"""Keeping rows in the type of their module's rows."""

from __future__ import annotations

import warnings

import numpy as np
from torch import Tensor

from grutrace.capture.sites import numpy_type
from grutrace.errors import GrutraceWarning
from grutrace.record import Array, Module


class RowType:
    """Turns tensors of one module into rows, and says once what that loses.

    Args:
        module: The module.
        chosen: Whether the user chose the type. Then only what does not fit at all is said.
    """

    def __init__(self, module: Module, *, chosen: bool) -> None:
        self._module, self._dtype = module, np.dtype(module.dtype)
        self._chosen = chosen
        self._warned: set[str] = set()

    def of(self, values: Tensor) -> Array:
        """Return the values in the type of the rows.

        Warns:
            GrutraceWarning: They are rounded without anybody having asked for it, or are too large.
        """
        array, kept = to_numpy(values), self._dtype
        if array.dtype == kept or np.can_cast(array.dtype, kept):
            return array.astype(kept, copy=False)
        if not self._chosen:
            self._warn_once(
                "rounded",
                f"computes in {array.dtype} by now, and was in {kept} when it was attached: its "
                f"rows are rounded to {kept}",
            )
        with np.errstate(over="ignore"):
            rows = array.astype(kept)
        overflows = np.isinf(rows)
        if overflows.any() and np.isfinite(array[overflows]).any():
            largest = np.nanmax(np.abs(array[np.isfinite(array)]))
            self._warn_once(
                "overflow",
                f"has values up to {largest:.3g}, and {kept} holds none above "
                f"{np.finfo(kept).max:.3g}: they are kept as infinity, and cannot be verified",
            )
        return rows

    def _warn_once(self, about: str, message: str) -> None:
        if about not in self._warned:
            self._warned.add(about)
            name = self._module.path or "the model"
            warnings.warn(f"{name} {message}", GrutraceWarning, stacklevel=3)


def to_numpy(values: Tensor) -> Array:
    """Return the values as an array: in their own type, or the one that holds all its values."""
    values = values.detach().cpu()
    if str(values.dtype).removeprefix("torch.") != numpy_type(values.dtype):
        values = values.float()
    array: Array = values.numpy()
    return array
