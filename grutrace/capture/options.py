"""Check and normalize the options of a tracer.

Options that record less also compute less; docs/asking-for-less.md gives the details.
"""

from __future__ import annotations

import operator
import platform
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any, TypeAlias, get_args

import numpy as np
import torch
from torch.amp import GradScaler

from grutrace.capture.logged_values import parse_log
from grutrace.errors import OptionError, require_one_of, short_repr
from grutrace.native.library import instruction_set
from grutrace.options import (
    DEFAULT_BUFFER,
    DEFAULT_STATE_MEMORY,
    STACK_MODES,
    STORAGE_DTYPES,
    Check,
    CompiledCode,
    Compression,
    Gates,
    OnError,
    Stacks,
    WeightChecks,
    parse_bytes,
)
from grutrace.version import VERSION

#: One of `STORAGE_DTYPES`, as a name or as a type of torch or NumPy.
DTypeLike: TypeAlias = Any

#: Selection of units: a slice, or their indices.
Units: TypeAlias = slice | Iterable[int]


class Options:
    """The checked options of a tracer, except for its model, path, sites and quantities.

    Args:
        has_sink: Whether the user gave a sink, which counts rows.
        to_file: Whether the trace is written to a file.
        records_gradient: Whether the gradient is among the quantities.

        The other arguments are options of `Tracer`.

    Attributes:
        gates: When gates are computed; ``auto`` is resolved.
        dtype: Name of the data type of stored rows; None for the type of each module.
        steps: Steps of each sequence, as a slice with an explicit start; None for all.
        units: Units as the user gave them, as a slice or as numbers; None for all.
        state_memory: Maximum bytes of final states, for all modules together.
        buffer: Maximum bytes of calls that wait to be recorded.
        grad_scaler: Scales the loss; None if nothing is known to do so.

    Raises:
        OptionError: An option has an invalid value.
    """

    def __init__(
        self,
        *,
        gates: Gates = "auto",
        stacks: Stacks = "auto",
        check: Check = "warn",
        every: int = 1,
        max_calls: int | None = None,
        max_bytes: int | None = None,
        dtype: DTypeLike | None = None,
        units: Units | None = None,
        steps: slice | None = None,
        has_sink: bool = False,
        to_file: bool = False,
        on_error: OnError = "raise",
        fsync: bool = False,
        compression: Compression | None = None,
        checksums: bool = False,
        weights: WeightChecks = "auto",
        compiled: CompiledCode = "auto",
        state_memory: int | str = DEFAULT_STATE_MEMORY,
        buffer: int | str = DEFAULT_BUFFER,
        grad_scaler: GradScaler | None = None,
        records_gradient: bool = False,
        log: Any = None,
    ) -> None:
        require_one_of("compiled", compiled, get_args(CompiledCode))
        self.compiled: CompiledCode = compiled
        require_one_of("weights", weights, get_args(WeightChecks))
        self.weights: WeightChecks = weights
        require_one_of("gates", gates, get_args(Gates))
        require_one_of("stacks", stacks, STACK_MODES)
        require_one_of("check", check, get_args(Check))
        if gates == "auto" and records_gradient:
            # Gradients are read long after the call, with the weights: so are gates.
            gates = "deferred"
        self.log = parse_log(log)
        if gates == "auto" and self.log:
            # A call is stored later, with the logged values: nothing is gained in the background.
            gates = "inline"
        if gates == "auto":
            # Inline if nothing is stored, if a residual must stop the model, or if the copies do
            # not suffice (units). With a file, a thread that computes gates would slow the model
            # just as much.
            is_inline = has_sink or check == "raise" or units is not None or to_file
            gates = "inline" if is_inline else "background"
        self.gates, self.stacks, self.check = gates, stacks, check
        self.to_file, self.has_thread = to_file, to_file or has_sink
        require_one_of("on_error", on_error, get_args(OnError))
        self.on_error, self.fsync = on_error, _boolean("fsync", fsync)
        if fsync and not to_file:
            raise OptionError(
                "fsync: expected False without a path, because there is no file; found True. "
                "(A grutrace.Statistics takes fsync itself)"
            )
        self.compression = compression
        if compression is not None:
            require_one_of("compression", compression, get_args(Compression))
            if not to_file:
                raise OptionError(
                    f"compression: expected None without a path, because there is no file; found "
                    f"{compression!r}"
                )
        self.checksums = _boolean("checksums", checksums)
        if checksums and not to_file:
            raise OptionError(
                "checksums: expected False without a path, because there is no file; found True"
            )
        self.every = positive_integer("every", every)
        self.max_calls = None if max_calls is None else positive_integer("max_calls", max_calls)
        self.max_bytes = None if max_bytes is None else positive_integer("max_bytes", max_bytes)
        self.state_memory = byte_count("state_memory", state_memory)
        self.buffer = byte_count("buffer", buffer)
        self.dtype = None if dtype is None else _storage_dtype(dtype)
        self.units = None if units is None else _units(units)
        self.steps = None if steps is None else _steps(steps)
        if grad_scaler is not None:
            expected = ""
            if not records_gradient:
                expected = "None without record='gradient'"
            elif not callable(getattr(grad_scaler, "get_scale", None)):
                expected = "a torch.amp.GradScaler"
            if expected:
                raise OptionError(
                    f"grad_scaler: expected {expected}; found {short_repr(grad_scaler)}"
                )
        self.grad_scaler = grad_scaler
        if records_gradient:
            self._require_gradient_options(has_sink=has_sink)
        if units is not None and gates != "inline":
            raise OptionError(
                f"units: expected None with gates={gates!r}, because the gate of one unit depends "
                f"on the states of all units; found {_format_indices(self.units)}. Record them "
                "with gates='inline', or all units, and read those wanted: site.update[:, units]"
            )
        if self.log:
            self._require_log_options(has_sink=has_sink and not to_file)

    def _require_gradient_options(self, *, has_sink: bool) -> None:
        """Refuse options that do not go together with recorded gradients.

        Raises:
            OptionError: An option has such a value.
        """
        waits = "because its calls wait for their gradients"
        fewer = "Record fewer calls: trace.stop(), or every="
        refused = {
            "gates": (self.gates == "background", f"'deferred' or 'inline', {waits}", ""),
            "stacks": (
                self.stacks == "rerun",
                "'split' or 'auto', because no gradient arrives at layers that run again",
                "",
            ),
            "check": (self.check == "raise", f"'warn' or 'off', {waits}", ""),
            "max_calls": (self.max_calls is not None, f"None, {waits}", fewer),
            "max_bytes": (self.max_bytes is not None, f"None, {waits}", fewer),
            "units": (
                self.units is not None,
                "None, because a gradient flows through all units",
                "Read those wanted: site.gradient('update')[:, units]",
            ),
            "steps": (
                self.steps is not None,
                "None, because a gradient flows through all steps",
                "Read those wanted: sequence.gradient('update')[steps]",
            ),
            "sink": (
                has_sink,
                "no sink, because the gradients of gates follow from rows",
                "Count afterwards: grutrace.Statistics.of(trace)",
            ),
        }
        for name, (is_refused, expected, instead) in refused.items():
            if is_refused:
                value = getattr(self, name, "one")
                found = value if name == "sink" else short_repr(value)
                raise OptionError(
                    f"{name}: with record='gradient' expected {expected}; found {found}"
                    f"{instead and f'. {instead}'}"
                )

    def _require_log_options(self, *, has_sink: bool) -> None:
        """Refuse options that do not go together with logged values.

        Raises:
            OptionError: An option has such a value.
        """
        waits = "its calls wait for the logged values"
        reasons = {
            "gates": (self.gates == "background", waits),
            "check": (self.check == "raise", waits),
            "max_calls": (self.max_calls is not None, waits),
            "max_bytes": (self.max_bytes is not None, waits),
            "steps": (self.steps is not None, "values are logged for all steps of a call"),
            "sink": (has_sink, "logged values are rows"),
        }
        for name, (is_refused, reason) in reasons.items():
            if is_refused:
                raise OptionError(f"{name}: not possible with log: {reason}")

    def as_json(self) -> dict[str, object]:
        """Return the options as stored in the trace. Some are left out at their default value."""
        required: dict[str, object] = {
            "gates": self.gates,
            "stacks": self.stacks,
            "check": self.check,
        }
        optional = {
            "every": self.every if self.every > 1 else None,
            "max_calls": self.max_calls,
            "max_bytes": self.max_bytes,
            "dtype": self.dtype,
            "units": None if self.units is None else _format_indices(self.units),
            "steps": None if self.steps is None else _format_indices(self.steps),
            "log": dict(self.log) or None,
            "fsync": self.fsync or None,
            "compression": self.compression,
            "checksums": self.checksums or None,
            "weights": self.weights if self.weights != "auto" else None,
            "compiled": self.compiled if self.compiled != "auto" else None,
            "state_memory": self.state_memory
            if self.state_memory != byte_count("", DEFAULT_STATE_MEMORY)
            else None,
            "buffer": self.buffer if self.buffer != byte_count("", DEFAULT_BUFFER) else None,
        }
        return required | {name: value for name, value in optional.items() if value is not None}


def _boolean(option: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise OptionError(f"{option}: expected True or False, found {short_repr(value)}")
    return value


def integer(option: str, value: object, expected: str) -> int:
    """Return an integer of any type as a Python int.

    Raises:
        OptionError: The value is not an integer.
    """
    try:
        if isinstance(value, (bool, np.bool_)):
            raise TypeError
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise OptionError(f"{option}: expected {expected}, found {short_repr(value)}") from None


def positive_integer(option: str, value: object) -> int:
    """Return an integer from 1, of any type, as a Python int.

    Raises:
        OptionError: The value is not such a number.
    """
    expected = "a whole number from 1"
    number = integer(option, value, expected)
    if number < 1:
        raise OptionError(f"{option}: expected {expected}, found {number}")
    return number


def byte_count(option: str, value: object) -> int:
    """Return a number of bytes, from a number or a text such as ``64 MiB``.

    Raises:
        OptionError: The value is neither.
    """
    expected = 'a number of bytes, or a text such as "64 MiB" or "1 GB"'
    if isinstance(value, str):
        size = parse_bytes(value)
        if size is None:
            raise OptionError(f"{option}: expected {expected}, found {value!r}")
        return size
    number = integer(option, value, expected)
    if number < 0:
        raise OptionError(f"{option}: expected {expected}, found {number}")
    return number


def _storage_dtype(dtype: DTypeLike) -> str:
    name = None
    if isinstance(dtype, (str, torch.dtype)):
        name = str(dtype).removeprefix("torch.")
    elif isinstance(dtype, (np.dtype, type)):
        try:
            name = np.dtype(dtype).name
        except TypeError:
            name = None
    if name not in STORAGE_DTYPES:
        raise OptionError(
            f"dtype: expected one of {', '.join(STORAGE_DTYPES)}; found {short_repr(dtype)}"
        )
    return name


def _units(units: Units) -> slice | tuple[int, ...]:
    expected = "a slice, or the numbers of units"
    if isinstance(units, slice):
        bounds = (units.start, units.stop, units.step)
        for bound in bounds:
            if bound is not None:
                integer("units", bound, "a slice of whole numbers")
        if units.step == 0:
            raise OptionError("units: expected a slice with a step, found a step of 0")
        return units
    if isinstance(units, (str, bytes)) or not isinstance(units, Iterable):
        raise OptionError(f"units: expected {expected}, found {short_repr(units)}")
    numbers = tuple(integer("units", unit, expected) for unit in units)
    if not numbers:
        raise OptionError(f"units: expected {expected}, found none")
    return numbers


def _steps(steps: slice) -> slice | None:
    expected = "a slice such as slice(5, 20), from 0 on and in steps of 1"
    if not isinstance(steps, slice):
        raise OptionError(f"steps: expected {expected}, found {short_repr(steps)}")
    start, stop, step = (
        None if bound is None else integer("steps", bound, expected)
        for bound in (steps.start, steps.stop, steps.step)
    )
    start = start or 0
    if start < 0 or step not in (None, 1) or (stop is not None and stop <= start):
        raise OptionError(
            f"steps: expected {expected}, with some step in it, found {short_repr(steps)}"
        )
    return None if start == 0 and stop is None else slice(start, stop)


def _format_indices(numbers: slice | tuple[int, ...] | None) -> str:
    """Return units or steps in the form of the command line: 0,3,7 or 0:32."""
    if isinstance(numbers, slice):
        parts = [numbers.start, numbers.stop, *([numbers.step] if numbers.step else [])]
        return ":".join("" if part is None else str(part) for part in parts)
    return ",".join(map(str, numbers or ()))


@cache
def collect_versions() -> Mapping[str, str]:
    """Return the versions of the software that makes the trace, by name.

    ``compiled`` is the instruction set of the compiled library; ``none`` without it.
    """
    return {
        "grutrace": VERSION,
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "python": platform.python_version(),
        "compiled": instruction_set(),
        "platform": platform.platform(),
    }
