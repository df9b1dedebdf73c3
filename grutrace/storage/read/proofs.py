"""Proof marks of calls, and the weight versions of calls whose weights were not compared.

Each site of a call has a *check*: its residual and its tolerance. They give one of three marks:

- *proven*: the gates reproduce the kernel's states within the tolerance; or the gates were not
  computed, and every byte of the weights was compared during the call.
- *unchecked*: the gates were not computed, and the weights were not compared. Recomputing the
  gates also computes their states, which shows which weight version was used.
- *unproven*: no weight version of the trace reproduces the states.

N rows, I input size, H hidden size.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from grutrace.errors import ResidualWarning
from grutrace.records import Array
from grutrace.storage.read.sequence_index import Integers, ranges

PROVEN, UNCHECKED, UNPROVEN = range(3)

#: Names of the marks, as in `Trace.calls`.
PROOFS = ("proven", "unchecked", "unproven")

#: Rows that are recomputed at once.
BLOCK = 4096

#: Other weight versions that are tried for a call, from the nearest one on.
MAX_TRIED = 8


def marks(checks: Array) -> Array:
    """Return the mark of each check, (calls,), for checks of type `schema.CHECK`."""
    residual, tolerance = checks["residual"], checks["tolerance"]
    codes = np.full(len(checks), PROVEN, np.uint8)
    codes[np.isnan(residual) & np.isnan(tolerance)] = UNCHECKED
    codes[residual > tolerance] = UNPROVEN
    return codes


class StepData(NamedTuple):
    """Inputs and states of some steps.

    Attributes:
        input: (n, I) input of each step.
        previous: (n, H) state before each step.
        hidden: (n, H) state after each step.
    """

    input: Array
    previous: Array
    hidden: Array


class CallVersions:
    """The weight versions that the calls of a site used.

    Args:
        name: Name of the site.
        checks: (calls,) checks, type `schema.CHECK`.
        versions: (calls,) recorded weight versions.
        numbers: (calls,) numbers of the calls in the trace.
        steps: (calls,) rows of each call. The rows of a call are contiguous.
        step_data: Reads inputs and states of rows.
        weights: Reads one version of the site's weights.
        count: Number of versions.

    Attributes:
        versions: (calls,) weight versions, corrected by `resolve`.
        marks: (calls,) mark of each call.
        resolved: Number of calls that `resolve` has checked.
    """

    def __init__(
        self,
        name: str,
        checks: Array,
        versions: Integers,
        numbers: Integers,
        steps: Integers,
        step_data: Callable[[Integers], StepData],
        weights: Callable[[int], dict[str, Array]],
        count: int,
    ) -> None:
        self.versions, self.marks, self.resolved = versions.copy(), marks(checks), 0
        self._name, self._checks, self._numbers = name, checks, numbers
        self._ends = np.cumsum(steps)
        self._steps, self._step_data, self._weights, self._count = steps, step_data, weights, count
        self._has_warned = False

    def resolve(self, calls: Integers) -> None:
        """Check these calls, if they are unchecked, and find the weight version that they used.

        Warns:
            ResidualWarning: No version reproduces the states of a call. Once per site.
        """
        calls = np.unique(calls)
        calls = calls[self.marks[calls] == UNCHECKED]
        for group in self._group_calls(calls):
            version = int(self.versions[group[0]])
            matches = self._matches(group, version)
            self.marks[group[matches]] = PROVEN
            for call in group[~matches]:
                self._try_other_versions(int(call), version)
            self.resolved += len(group)

    def _group_calls(self, calls: Integers) -> Iterator[Integers]:
        """Yield groups of calls with the same version and precision."""
        precisions = self._checks["precision"]
        group: list[int] = []
        rows = 0
        for call in calls.tolist():
            fits = group and (
                self.versions[call] == self.versions[group[0]]
                and precisions[call] == precisions[group[0]]
            )
            if group and (not fits or rows >= BLOCK):
                yield np.array(group)
                group, rows = [], 0
            group.append(call)
            rows += int(self._steps[call])
        if group:
            yield np.array(group)

    def _try_other_versions(self, call: int, version: int) -> None:
        """Find the version that a call used, from the nearest one on; warn if there is none."""
        nearest = sorted(range(self._count), key=lambda other: (abs(other - version), -other))
        for other in nearest[1 : MAX_TRIED + 1]:
            if self._matches(np.array([call]), other)[0]:
                self.versions[call], self.marks[call] = other, PROVEN
                return
        self.marks[call] = UNPROVEN
        if not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"{self._name}: the gates of call {self._numbers[call]} are unproven: no weight "
                "version of the trace reproduces the states of the model. The weights changed "
                "between two comparisons: record with weights='exact'",
                ResidualWarning,
                stacklevel=3,
            )

    def _matches(self, calls: Integers, version: int) -> Array:
        """Return whether a version reproduces the states of each of these calls, (calls,)."""
        # Imported here because it imports torch, which reading does not need otherwise.
        from grutrace.gru.recompute import states_match

        weights = self._weights(version)
        precision = float(self._checks["precision"][calls[0]])
        rows = ranges(self._ends[calls] - self._steps[calls], self._steps[calls])
        owners = np.repeat(np.arange(len(calls)), self._steps[calls])
        matches = np.ones(len(calls), bool)
        for start in range(0, len(rows), BLOCK):
            block = slice(start, start + BLOCK)
            steps = self._step_data(rows[block])
            row_matches = states_match(
                steps.input, steps.previous, steps.hidden, weights, precision
            )
            np.logical_and.at(matches, owners[block], row_matches)
        return matches
