"""Residuals of recomputed gates, by call: their states compared with the recorded states.

n rows, H hidden size.
"""

from __future__ import annotations

import numpy as np

from grutrace.analysis.verification.distance import abs_difference
from grutrace.gru.recompute import StepRecomputation, tolerances
from grutrace.records import Array
from grutrace.storage.interfaces import Rows
from grutrace.storage.read.recomputed import GateInputs
from grutrace.storage.read.site import SiteTrace


class CallResiduals:
    """Accumulates the residual of every call at a site, and the bounds for its tolerance.

    Rows may be added in any order and in parts; memory grows only with the number of calls.

    Args:
        site: The site.

    Attributes:
        checks: (calls,) the recorded checks.
        residuals: (calls,) largest difference so far.
        worst_positions: (calls, 2) its row and unit.
    """

    def __init__(self, site: SiteTrace) -> None:
        self.checks = site.checks
        calls = len(self.checks)
        self._terms = site.site.input_size + site.module.hidden_size
        self._states, self._products, self._recurrents, self._sums = np.zeros((4, calls))
        self._dtype = np.dtype(site.module.dtype)
        self.residuals = np.zeros(calls)
        self.worst_positions = np.full((calls, 2), -1, np.int64)

    def add(
        self,
        inputs: GateInputs,
        derived: StepRecomputation,
        hidden: Rows,
        unknown: Array | None = None,
    ) -> None:
        """Take in some rows that follow one another.

        Args:
            inputs: The rows.
            derived: The steps recomputed from them.
            hidden: The recorded states of all rows.
            unknown: (n, H) states that do not follow from the steps, because a gate or the state
                was set.
        """
        rows = slice(int(inputs.rows[0]), int(inputs.rows[-1]) + 1)
        difference = abs_difference(np.asarray(hidden[rows]).astype(np.float64), derived.hidden)
        if unknown is not None:
            difference[unknown] = 0.0
        units = difference.argmax(axis=1)
        largest = difference[np.arange(len(difference)), units]
        product, recurrent = derived.product_maxima
        np.maximum.at(self._products, inputs.calls, product)
        np.maximum.at(self._recurrents, inputs.calls, recurrent)
        np.maximum.at(self._sums, inputs.calls, derived.abs_sum_bounds)
        np.maximum.at(self._states, inputs.calls, _largest(inputs.previous))
        np.maximum.at(self.residuals, inputs.calls, largest)
        worst = largest == self.residuals[inputs.calls]
        self.worst_positions[inputs.calls[worst], 0] = inputs.rows[worst]
        self.worst_positions[inputs.calls[worst], 1] = units[worst]

    def tolerances(self, calls: range) -> Array:
        """Return the residual that rounding explains in each of these calls: (n,)."""
        part = slice(calls.start, calls.stop)
        return tolerances(
            self.checks["precision"][part],
            self._terms,
            self._states[part],
            self._products[part],
            self._recurrents[part],
            self._dtype,
            self._sums[part],
        )


def _largest(states: Array) -> Array:
    """Return the largest finite ``|state|`` of each row: (n,)."""
    sizes = np.nan_to_num(np.abs(states.astype(np.float64)), nan=0.0, posinf=0.0)
    return np.asarray(sizes.max(axis=1))
