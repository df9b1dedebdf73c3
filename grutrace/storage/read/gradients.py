"""Gradients of recorded steps: total gradients of states, and those of gates and inputs.

The trace stores the gradient that arrives at each state from outside the recurrence. The rest
follows in closed form, call by call, from the recorded states, inputs and weights. This module
imports torch when they are computed, because the equations are in `gradients`.

In a decoder that calls its layer once per token, the gradient that arrives at a call is already the
total one: it comes through the later calls, as far as their states were attached.

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


class GradientRows(LazyRows):
    """Gradients of a quantity for the rows of a site, (N, H) or (N, I). Indexing computes them.

    All steps of a call are computed for any of them, because gradients flow through them.

    Args:
        arriving: (N, H) the recorded gradients.
        gate_inputs: Inputs, previous states and weights of the site.
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
        return first, values
