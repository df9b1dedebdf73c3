"""Gradients of recorded steps: total gradients of states, and those of gates and inputs.

The trace stores the gradient that arrives at each state from outside the recurrence. The rest
follows in closed form, call by call, from the recorded states, inputs and weights. This module
imports torch when they are computed, because the equations are in `gradients`.

If a decoder calls its layer once per token, the gradient that arrives at a call is the total
gradient, because it flows through the later calls unless their states were detached.

N rows, I input size, H hidden size, n rows of a call.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from grutrace.records import Array
from grutrace.storage.interfaces import Rows
from grutrace.storage.read.lazy_rows import LazyRows
from grutrace.storage.read.recomputed import SiteGateInputs
from grutrace.storage.read.sequence_index import Integers, SequenceIndex


def unscaled(gradients: Array, scale: float) -> Array:
    """Return gradients divided by the factor of their loss, if it is known."""
    return gradients / gradients.dtype.type(scale) if scale > 0 else gradients


class GradientRows(LazyRows):
    """Gradients of a quantity for the rows of a site, (N, H) or (N, I). Indexing computes them.

    All steps of a call are computed for any of them, because gradients flow through them.

    Args:
        arriving: (N, H) the recorded gradients.
        gate_inputs: Inputs, previous states and weights of the site.
        scales: (calls,) factor of the loss of each call of the module; 0 if it is not known.
        index: Index of the module's sequences.
        quantity: Name of the quantity.
        width: Number of columns.
        reverse: Whether the layer reads from the last step to the first.
        preactivation: Whether to return gradients of the gate's pre-activation.
    """

    _location = "computed when they are read"

    def __init__(
        self,
        arriving: Rows,
        gate_inputs: SiteGateInputs,
        scales: Array,
        index: SequenceIndex,
        quantity: str,
        width: int,
        *,
        reverse: bool,
        preactivation: bool,
    ) -> None:
        dtype = np.promote_types(arriving.dtype, np.float32)
        super().__init__((arriving.shape[0], width), dtype)
        self._arriving, self._gate_inputs, self._index = arriving, gate_inputs, index
        self._scales = scales
        self._quantity, self._reverse = quantity, reverse
        self._preactivation = preactivation

    def _read(self, rows: slice, columns: slice) -> Array:
        return self._take(np.arange(*rows.indices(len(self))), columns)

    def _take(self, rows: Array, columns: slice) -> Array:
        width = len(range(self.shape[1])[columns])
        result = np.empty((len(rows), width), self.dtype)
        calls = self._index.calls[self._index.pieces_of(rows)]
        order = np.argsort(calls, kind="stable")
        for places in np.split(order, np.flatnonzero(np.diff(calls[order])) + 1):
            if len(places):
                first, values = self._of_call(int(calls[places[0]]))
                result[places] = values[rows[places] - first][:, columns]
        return result

    def _of_call(self, call: int) -> tuple[int, Array]:
        """Return the first row of a call, and the gradients of its rows, (n, width)."""
        from grutrace.gradients.recorded import recorded_gradients

        pieces = slice(*np.searchsorted(self._index.calls, [call, call + 1]).tolist())
        steps, first = self._index.steps[pieces], int(self._index.starts[pieces.start])
        rows: Integers = np.arange(first, first + int(steps.sum()))
        arriving: Any = np.asarray(self._arriving[first : first + len(rows)])
        number = int(np.searchsorted(self._index.call_numbers, call))
        values = recorded_gradients(
            self._gate_inputs.input(rows),
            self._gate_inputs.previous(rows),
            self._gate_inputs.weights_of_call(number),
            arriving,
            steps,
            self._quantity,
            reverse=self._reverse,
            preactivation=self._preactivation,
        )
        return first, unscaled(values, self._scales[number])


def gradient_sources(
    arriving: Rows,
    gate_inputs: SiteGateInputs,
    backward: Array,
    index: SequenceIndex,
    sequence: int,
    step: int,
    *,
    reverse: bool,
) -> Array:
    """Return the parts of the total gradient of a state, by the step at which each arrived, (T, H).

    Args:
        arriving: (N, H) the recorded gradients.
        gate_inputs: Inputs, previous states and weights of the site.
        backward: (calls,) facts about the backward pass of each call of the module.
        index: Index of the module's sequences.
        sequence: Number of the sequence.
        step: The step whose state it is, from 0.
        reverse: Whether the layer reads from the last step to the first.
    """
    from grutrace.gradients.recorded import SequencePart, source_gradients

    pieces = index.pieces(sequence)
    pieces = pieces[index.steps[pieces] > 0]
    ends = np.cumsum(index.steps[pieces])
    first = int(np.searchsorted(ends, step, side="right"))
    before = int(ends[first] - index.steps[pieces[first]])
    parts: list[SequencePart] = []
    scale = 0.0
    for piece in pieces[first:].tolist():
        call = int(np.searchsorted(index.call_numbers, index.calls[piece]))
        rows = np.arange(index.starts[piece], index.starts[piece] + index.steps[piece])
        values = np.asarray(arriving[int(rows[0]) : int(rows[-1]) + 1])
        goes_on = index.segments[piece] == index.segments[pieces[first]]
        if parts and not (goes_on and backward["attached"][call] and np.isfinite(values).all()):
            break
        scale = scale if parts else backward["scale"][call]
        part = (
            *(gate_inputs.input(rows), gate_inputs.previous(rows)),
            gate_inputs.weights_of_call(call),
        )
        parts.append(SequencePart(*part, values))
    found = unscaled(source_gradients(parts, step - before, reverse=reverse), scale)
    result = np.zeros((int(ends[-1]), found.shape[1]), found.dtype)
    result[before : before + len(found)] = found
    return result
