"""The values to which gates and states are set: constants, arrays, functions, recorded values.

T steps, B sequences in a batch, H hidden size, U units of a setting, n sequences at one step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from inspect import signature
from numbers import Real
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor

from grutrace.errors import OptionError, short_repr
from grutrace.storage.read.sequence import Sequence as RecordedSequence
from grutrace.storage.read.site import SiteTrace

#: How steps of a recorded sequence correspond to those of a sequence of the model.
Align: TypeAlias = Literal["step", "token"]

#: A token of each step, for each sequence of the batch.
Tokens: TypeAlias = Sequence[Sequence[str]]


@dataclass(frozen=True)
class Context:
    """Where and when a gate is set. The second argument of a function that sets it.

    Attributes:
        site: Name of the site, such as ``encoder.rnn.l0``.
        step: Number of the step within the sequences, from 0.
        sequences: (n,) of each row of the gate, the position of its sequence in the batch in which
            the sequence starts.
        tokens: (n,) the token of each sequence at this step, None beyond its tokens; None if the
            user gave no tokens.
        units: (U,) the unit of each column of the gate.
    """

    site: str
    step: int
    sequences: tuple[int, ...]
    tokens: tuple[str | None, ...] | None
    units: range | tuple[int, ...]


#: Sets a gate: takes its values (n, U) at one step, and their context.
GateFunction: TypeAlias = Callable[[Tensor, Context], Any]


class Value(Protocol):
    """A value of a quantity at one site."""

    @property
    def depends_on_step(self) -> bool:
        """Whether it differs between steps or sequences."""

    def at(self, gate: Tensor, context: Context, index: int, positions: Sequence[int], /) -> Any:
        """Return the values of one step, which broadcast to (n, U).

        Args:
            gate: (n, U) the values that the layer computed.
            context: Where and when.
            index: Position of the step among the steps of the setting.
            positions: (n,) positions of the sequences among those of the setting.
        """


class Constant:
    """A number."""

    depends_on_step = False

    def __init__(self, number: float) -> None:
        self.number = number

    def at(self, gate: Tensor, _context: Context, _index: int, _positions: Sequence[int], /) -> Any:
        """Return the number."""
        return torch.full_like(gate, self.number)


class Values:
    """An array that broadcasts to (steps, sequences, units).

    Args:
        values: The array, with at most three axes.
        what: Names the setting in errors.

    Attributes:
        shape: Its shape with three axes.
        used_steps: Number of steps of it that were used.
    """

    def __init__(self, values: Tensor, what: str) -> None:
        self._what, self._given = what, tuple(values.shape)
        self._values = values.reshape((1,) * (3 - values.dim()) + tuple(values.shape))
        self.shape = tuple(self._values.shape)
        self.used_steps = 0
        self._converted: dict[tuple[torch.dtype, torch.device], Tensor] = {}

    @property
    def depends_on_step(self) -> bool:
        """Whether it has more than one step or sequence."""
        return self.shape[:2] != (1, 1)

    @property
    def is_used_up(self) -> bool:
        """Whether all of its steps were used."""
        return self.shape[0] == 1 or self.used_steps >= self.shape[0]

    def require(self, steps: int | None, sequences: int | None, units: int) -> None:
        """Require the array to broadcast to these numbers, as far as they are known.

        Raises:
            OptionError: It does not.
        """
        names = ("steps", "sequences", "units")
        for name, size, expected in zip(names, self.shape, (steps, sequences, units), strict=True):
            if expected is not None and size not in (1, expected):
                known = f"{'T' if steps is None else steps}, "
                known += f"{'B' if sequences is None else sequences}, {units}"
                raise OptionError(
                    f"{self._what}: expected an array that broadcasts to ({known}), (steps, "
                    f"sequences, units); found {self._given}, with {size} {name}. One value for "
                    "each step and unit has the shape (steps, 1, units)"
                )

    def at(self, gate: Tensor, context: Context, index: int, positions: Sequence[int], /) -> Any:
        """Return the values of a step.

        Raises:
            OptionError: There are not enough steps or sequences.
        """
        key = gate.dtype, gate.device
        values = self._converted.get(key)
        if values is None or values.requires_grad:
            # Kept for calls that need gradients, too.
            with torch.inference_mode(False):
                values = self._values.to(device=gate.device, dtype=gate.dtype)
            self._converted = {key: values}
        steps, sequences, _ = self.shape
        if steps > 1:
            self.used_steps = max(self.used_steps, index + 1)
            if index >= steps:
                raise OptionError(
                    f"{self._what}: expected a value for each step, found {steps} steps in the "
                    f"array at step {context.step}. Pass steps=slice(0, {steps}), or a longer array"
                )
        at_step = values[index if steps > 1 else 0]
        if sequences == 1:
            return at_step
        if max(positions, default=0) >= sequences:
            raise OptionError(
                f"{self._what}: expected a value for each sequence, found {sequences} sequences in "
                f"the array, and a sequence at position {max(positions)}"
            )
        if list(positions) == list(range(sequences)):
            return at_step
        return at_step[torch.tensor(list(positions), device=at_step.device)]


class Function:
    """A function of the gate and its context."""

    depends_on_step = True

    def __init__(self, function: GateFunction, what: str) -> None:
        self._function, self._what = function, what

    def at(self, gate: Tensor, context: Context, _index: int, _positions: Sequence[int], /) -> Any:
        """Return the result of the function; the gate itself if the function returned it unchanged.

        Raises:
            OptionError: The function returned something else than values of this shape.
        """
        # A copy: the function may change it in place, and the gate's memory is used again.
        given = gate.clone()
        version = None if given.is_inference() else given._version
        returned = self._function(given, context)
        if returned is given:
            is_same = torch.equal(given, gate) if version is None else given._version == version
            return gate if is_same else given
        if isinstance(returned, Tensor) and _is_like(returned, gate):
            return returned
        try:
            values = torch.as_tensor(returned, dtype=gate.dtype, device=gate.device)
            return values.expand(gate.shape)
        except (TypeError, ValueError, RuntimeError):
            raise OptionError(
                f"{self._what}: expected a function that returns values of shape "
                f"{tuple(gate.shape)}, found {short_repr(returned)} at step {context.step}"
            ) from None


@dataclass
class Recorded:
    """Values of a recorded site or sequence, aligned with the sequences of the batch.

    Args:
        rows: (T, U) values of each recorded sequence; one, or one per sequence of the batch.
        tokens: Tokens of each recorded sequence, to align by tokens; None to align by steps.
        what: Names the setting in errors.
    """

    rows: list[Tensor]
    tokens: list[list[Any]] | None
    what: str
    depends_on_step: bool = field(default=True, init=False)

    def at(self, gate: Tensor, context: Context, _index: int, positions: Sequence[int], /) -> Any:
        """Return the recorded values of a step, where there are some.

        Raises:
            OptionError: A recorded sequence has no such step, or there is no sequence.
        """
        found, result = [], []
        for row, position in enumerate(positions):
            if len(self.rows) > 1 and position >= len(self.rows):
                raise OptionError(
                    f"{self.what}: expected a recorded sequence for each sequence, found "
                    f"{len(self.rows)}, and a sequence at position {position}"
                )
            source = position if len(self.rows) > 1 else 0
            step = self._source_step(source, row, context)
            if step is not None:
                found.append(row)
                result.append(self.rows[source][step])
        if not found:
            return gate
        values = torch.stack(result).to(device=gate.device, dtype=gate.dtype)
        if len(found) == len(gate):
            return values
        return gate.index_put((torch.tensor(found, device=gate.device),), values)

    def _source_step(self, source: int, row: int, context: Context) -> int | None:
        if self.tokens is None:
            if context.step >= len(self.rows[source]):
                raise OptionError(
                    f"{self.what}: expected a recorded value for each step, found "
                    f"{len(self.rows[source])} steps in recorded sequence {source} at step "
                    f"{context.step}. Pass steps=, or align='token'"
                )
            return context.step
        return self._matching_step(source, context.sequences[row], context.step)

    def _matching_step(self, source: int, sequence: int, step: int) -> int | None:
        """Return the step with the same occurrence of the same token; None without one."""
        assert self.tokens is not None
        tokens = self.own_tokens
        if sequence >= len(tokens) or step >= len(tokens[sequence]):
            return None
        token = tokens[sequence][step]
        occurrence = list(tokens[sequence][: step + 1]).count(token)
        steps = [at for at, other in enumerate(self.tokens[source]) if other == token]
        matching = steps[occurrence - 1] if len(steps) >= occurrence else None
        return None if matching is None or matching >= len(self.rows[source]) else matching

    #: Tokens of the sequences of the batch.
    own_tokens: Tokens = ()


def make_value(
    value: Any,
    quantity: str,
    what: str,
    units: Sequence[int],
    size: int,
    align: Align,
    tokens: Tokens | None,
) -> Value:
    """Return a value from what the user passed.

    Args:
        value: A number, an array, a function, or a recorded site or sequence.
        quantity: The quantity that is set.
        what: Names the setting in errors.
        units: (U,) the units that are set.
        size: H
        align: How steps of a recorded sequence correspond to those of the batch.
        tokens: Tokens of the sequences of the batch, if the user gave them.

    Raises:
        OptionError: It is something else, or not finite, or does not fit.
    """
    if isinstance(value, (SiteTrace, RecordedSequence)):
        return _recorded(value, quantity, what, units, size, align, tokens)
    if isinstance(value, (Tensor, np.ndarray, list, tuple)):
        return _array(value, quantity, what)
    if isinstance(value, (bool, str, bytes)) or not (isinstance(value, Real) or callable(value)):
        raise OptionError(
            f"{what}: expected a number, an array, a function of the gate and its context, or a "
            "recorded site or sequence, such as trace[site] or trace[site].sequence(0); found "
            f"{short_repr(value)}"
        )
    if callable(value):
        _require_two_arguments(value, what)
        return Function(value, what)
    try:
        number = float(value)
    except OverflowError:
        raise OptionError(f"{what}: expected a number that fits a float, found {value}") from None
    _require_finite(torch.tensor(number), quantity, what, str(number))
    return Constant(number)


def _require_two_arguments(function: Any, what: str) -> None:
    try:
        signature(function).bind(None, None)
    except TypeError:
        raise OptionError(
            f"{what}: expected a function of two arguments, the gate and its context; found "
            f"{short_repr(function)}"
        ) from None
    except ValueError:
        # Functions in C have no signature.
        return


def _array(value: Any, quantity: str, what: str) -> Values:
    try:
        values = value if isinstance(value, Tensor) else torch.as_tensor(np.array(value))
    except (TypeError, ValueError):
        raise OptionError(f"{what}: expected numbers, found {short_repr(value)}") from None
    if values.is_complex() or values.dim() > 3 or not values.numel():
        raise OptionError(
            f"{what}: expected real numbers that broadcast to (steps, sequences, units), found "
            f"{short_repr(value)}"
        )
    _require_finite(values.detach(), quantity, what, short_repr(value))
    return Values(values, what)


def _require_finite(values: Tensor, quantity: str, what: str, found: str) -> None:
    if quantity.endswith("preactivation"):
        # An infinite pre-activation closes or opens a gate.
        if values.isnan().any():
            raise OptionError(f"{what}: expected numbers, found NaN in {found}")
    elif not values.isfinite().all():
        kind = "NaN" if values.isnan().any() else "an infinite value"
        raise OptionError(f"{what}: expected finite numbers, found {kind} in {found}")


def _recorded(
    value: SiteTrace | RecordedSequence,
    quantity: str,
    what: str,
    units: Sequence[int],
    size: int,
    align: Align,
    tokens: Tokens | None,
) -> Recorded:
    sequences = [value] if isinstance(value, RecordedSequence) else list(value)
    if not sequences:
        raise OptionError(f"{what}: expected a site with recorded sequences, found {value!r}")
    recorded_units = value.site.units
    columns = range(size) if recorded_units is None else recorded_units
    missing = [unit for unit in units if unit not in columns]
    if missing:
        raise OptionError(
            f"{what}: expected recorded values of unit {missing[0]}, found a trace of units "
            f"{list(columns)}"
        )
    positions = [columns.index(unit) for unit in units]
    rows = []
    for sequence in sequences:
        if quantity.endswith("_preactivation"):
            array = sequence.preactivation(quantity.removesuffix("_preactivation"))
        else:
            array = sequence.rows(quantity)
        if array.shape[1] != len(columns):
            raise OptionError(
                f"{what}: expected {len(columns)} recorded units, found {array.shape[1]}"
            )
        rows.append(torch.from_numpy(np.ascontiguousarray(array[:, positions])))
        _require_finite(rows[-1], quantity, what, repr(sequence))
    if align == "step":
        return Recorded(rows, None, what)
    recorded_tokens = [sequence.tokens for sequence in sequences]
    if tokens is None or any(given is None for given in recorded_tokens):
        whose = "the batch (tokens=)" if tokens is None else "the recorded sequences"
        raise OptionError(f"{what}: align='token' needs the tokens of {whose}, found none")
    result = Recorded(rows, [list(given or ()) for given in recorded_tokens], what)
    result.own_tokens = tokens
    return result


def _is_like(values: Tensor, gate: Tensor) -> bool:
    """Whether values have the type and the shape of a gate, and are on its device."""
    return (
        values.dtype is gate.dtype and values.shape == gate.shape and values.device == gate.device
    )
