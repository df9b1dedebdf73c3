"""Values that the user logs for the steps of a call: a loss, a logit, an attention.

A call waits in the journal until its values are there, or until the next call of its module.

T steps, B sequences in a batch, N rows of a call, n values a step.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from grutrace.errors import OptionError, StateError, join_names, short_repr
from grutrace.records import LOG_PREFIX, Array, ModuleInfo, is_log_name

#: Longest time in seconds that a call waits for values. Later calls wait behind it.
MAX_SECONDS = 60.0

#: Names, or numbers of values per step by name.
LogNames: TypeAlias = Sequence[str] | Mapping[str, int]


def as_numbers(name: str, values: Any) -> Array:
    """Return logged values as an array of floats or integers.

    Args:
        name: The name that they are logged under.
        values: A tensor, an array, or nested lists.

    Raises:
        OptionError: They are no numbers.
    """
    if hasattr(values, "detach"):
        # NumPy has no bfloat16.
        values = values.detach().float().cpu() if _is_half(values) else values.detach().cpu()
    try:
        array = np.asarray(values)
    except (TypeError, ValueError, RuntimeError):
        array = np.empty(0, object)
    if array.dtype.kind not in "biuf":
        raise OptionError(
            f"log: expected numbers of shape (T, B) or (T, B, n) for {name!r}; "
            f"found {short_repr(values)}"
        )
    return array


def _is_half(values: Any) -> bool:
    return str(values.dtype) in ("torch.bfloat16", "torch.float16")


class LoggedValues:
    """The logged values of one call.

    Args:
        module: The module.
        lengths: (B,) number of steps of each sequence.
        is_packed: Whether the sequences were packed, so that values may be padded further.

    Attributes:
        is_stored: Whether the call is stored.
    """

    def __init__(
        self, module: ModuleInfo, lengths: npt.NDArray[np.int64], *, is_packed: bool
    ) -> None:
        self._module, self._lengths, self._is_packed = module, lengths, is_packed
        self._widths: Mapping[str, int] = dict(module.sites[0].logs)
        self._rows: dict[str, Array] = {}
        self._is_open, self._since = True, time.monotonic()
        self.is_stored = False

    @property
    def is_waiting(self) -> bool:
        """Whether the call waits for values that are still to come."""
        return self._is_open and time.monotonic() - self._since < MAX_SECONDS

    def stop_waiting(self) -> None:
        """Let the call be stored with the values that are there."""
        self._is_open = False

    @property
    def shape(self) -> tuple[int, int]:
        """(T, B), or (B, T) of a module with ``batch_first``."""
        steps, batch = int(self._lengths.max(initial=0)), len(self._lengths)
        return (batch, steps) if self._module.batch_first else (steps, batch)

    def width(self, name: str) -> int:
        """Return n, the number of values per step of a name."""
        return self._widths[name]

    def has(self, name: str) -> bool:
        """Return whether there are values of this name."""
        return name in self._rows

    def fit(self, name: str, values: Array) -> Array | None:
        """Return values as rows of the call, (N, n); None if their shape is another."""
        width, (steps, batch) = self._widths[name], self._time_major_shape
        shaped = self._with_all_axes(values, width)
        if shaped is None or shaped.shape[1:] != (batch, width):
            return None
        if shaped.shape[0] != steps and not (self._is_packed and shaped.shape[0] > steps):
            return None
        rows = [shaped[:length, place] for place, length in enumerate(self._lengths.tolist())]
        return np.concatenate([np.empty((0, width)), *rows]).astype(self._module.dtype)

    @property
    def _time_major_shape(self) -> tuple[int, int]:
        return int(self._lengths.max(initial=0)), len(self._lengths)

    def _with_all_axes(self, values: Array, width: int) -> Array | None:
        """Return values as (T, B, n); None if they have too many or too few axes."""
        steps, batch = self._time_major_shape
        axes = 2 if width == 1 and values.ndim < 3 else 3
        if values.ndim == axes - 1:
            # One step, or one sequence, without its axis.
            if steps == 1 and len(values) == batch:
                values = values[np.newaxis]
            elif batch == 1:
                values = values[:, np.newaxis]
            else:
                return None
        elif values.ndim != axes:
            return None
        elif self._module.batch_first and self._module.kind != "GRUCell":
            values = np.swapaxes(values, 0, 1)
        return values[..., np.newaxis] if axes == 2 else values

    def set(self, name: str, rows: Array) -> None:
        """Take the values of a name. The call stops waiting when all names have some."""
        self._rows[name] = rows
        if len(self._rows) == len(self._widths):
            self.stop_waiting()

    def store(self) -> None:
        """Take no more values."""
        self.is_stored = True
        self.stop_waiting()

    def rows(self) -> dict[str, Array]:
        """Return the rows of all names by quantity, (N, n) each; NaN where nothing was logged."""
        count = int(self._lengths.sum())
        return {
            LOG_PREFIX + name: self._rows[name]
            if name in self._rows
            else np.full((count, width), np.nan, self._module.dtype)
            for name, width in self._widths.items()
        }


def set_logged(name: str, values: Array, calls: Mapping[str, LoggedValues]) -> None:
    """Set the values of a name for those calls that they fit.

    Args:
        name: The name.
        values: As `as_numbers` returns them.
        calls: The latest call of each module, by the path of the module.

    Raises:
        OptionError: The values fit none of the calls.
        StateError: There is no call, or none takes values of this name any more.
    """
    waiting = {path: call for path, call in calls.items() if not (call.is_stored or call.has(name))}
    fitting = {
        path: rows for path, call in waiting.items() if (rows := call.fit(name, values)) is not None
    }
    for path, rows in fitting.items():
        waiting[path].set(name, rows)
    if fitting:
        return
    if not calls:
        raise StateError(f"log: no call was recorded yet that {name!r} can be logged for")
    if not waiting:
        reason = "has values of this name already"
        if any(call.is_stored for call in calls.values()):
            reason = (
                "was stored already: log before the trace is read, flushed or annotated, and "
                "before the recording block ends"
            )
        raise StateError(f"log: the latest call that {name!r} can be logged for {reason}")
    width = next(iter(waiting.values())).width(name)
    shapes = [
        f"{(*call.shape, width) if width > 1 else call.shape} for the latest call of "
        f"{path or 'the model'}"
        for path, call in waiting.items()
    ]
    hint = f". For n values per step, declare log={{{name!r}: n}}" if width == 1 else ""
    raise OptionError(
        f"log: expected values of shape {join_names(shapes)}; found {tuple(values.shape)} for "
        f"{name!r}{hint}"
    )


def parse_log(value: Any) -> tuple[tuple[str, int], ...]:
    """Parse the option ``log``: names, or numbers of values a step by name.

    Raises:
        OptionError: A name or a number is invalid.
    """
    expected = "names, such as ('loss',), or numbers of values per step by name: {'attention': 8}"
    if value is None:
        return ()
    is_names = isinstance(value, Sequence) and not isinstance(value, (str, bytes))
    widths = value if isinstance(value, Mapping) else dict.fromkeys(value, 1) if is_names else None
    if widths is None:
        raise OptionError(f"log: expected {expected}; found {short_repr(value)}")
    for name, width in widths.items():
        if not is_log_name(name):
            raise OptionError(
                "log: expected names of letters, digits and _ that are no quantity; "
                f"found {short_repr(name)}"
            )
        if isinstance(width, bool) or not isinstance(width, (int, np.integer)) or width < 1:
            raise OptionError(
                f"log: expected the number of values per step of {name!r}, "
                f"found {short_repr(width)}"
            )
    return tuple(sorted((name, int(width)) for name, width in widths.items()))
