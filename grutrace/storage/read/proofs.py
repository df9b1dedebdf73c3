"""Which calls of a trace are proven, and which weights a call used whose weights were not compared.

Each site of a call has a *check*: the residual, and the residual that rounding explains. Together
they are one of three marks:

- *proven*: the gates lead to the kernel's states within rounding; or nothing was computed, and
  every byte of the weights was compared when the call ran.
- *unchecked*: nothing was computed, and the weights were not compared. Whoever derives the gates
  computes the states that they lead to, and so finds out which version of the weights was used.
- *unproven*: no version of the weights in the trace leads to the states.

N rows, I input size, H hidden size.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from grutrace.errors import ResidualWarning
from grutrace.records import Array
from grutrace.storage.read.sequence_index import Integers

PROVEN, UNCHECKED, UNPROVEN = range(3)

#: What the marks are called.
PROOFS = ("proven", "unchecked", "unproven")

#: Rows that are computed at once.
BLOCK = 4096

#: Versions that are tried beside the one that a call has: those nearest to it.
MAX_TRIED = 8


def marks(checks: Array) -> Array:
    """Return the mark of each check, (calls,), of checks of type `schema.CHECK`."""
    residual, tolerance = checks["residual"], checks["tolerance"]
    found = np.full(len(checks), PROVEN, np.uint8)
    found[np.isnan(residual) & np.isnan(tolerance)] = UNCHECKED
    found[residual > tolerance] = UNPROVEN
    return found


class StepData(NamedTuple):
    """What the states of some rows follow from.

    Attributes:
        input: (n, I)
        previous: (n, H) the state that each row started from.
        hidden: (n, H) the state that it led to.
    """

    input: Array
    previous: Array
    hidden: Array


class CallVersions:
    """The versions of the weights that the calls of a site used.

    Args:
        name: Of the site.
        checks: (calls,) of type `schema.CHECK`.
        versions: (calls,) as they were recorded.
        numbers: (calls,) of the calls in the trace.
        steps: (calls,) rows of each; those of a call lie together.
        factors: Reads what the states of rows follow from.
        weights: Reads a version of the site's weights.
        count: How many versions there are.

    Attributes:
        versions: (calls,) likewise, or found out since.
        marks: (calls,)
        settled: How many calls were unchecked and are not any more.
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
        """Find out which weights these calls used, as far as it is not known.

        Warns:
            ResidualWarning: No version leads to the states of a call; once a site.
        """
        calls = np.unique(calls)
        calls = calls[self.marks[calls] == UNCHECKED]
        for some in self._group_calls(calls):
            version = int(self.versions[some[0]])
            fits = self._matches(some, version)
            self.marks[some[fits]] = PROVEN
            for call in some[~fits]:
                self._try_others(int(call), version)
            self.resolved += len(some)

    def _group_calls(self, calls: Integers) -> Iterator[Integers]:
        """Yield some calls at a time that have the same version and precision."""
        precisions = self._checks["precision"]
        group: list[int] = []
        rows = 0
        for call in calls.tolist():
            alike = group and (
                self.versions[call] == self.versions[group[0]]
                and precisions[call] == precisions[group[0]]
            )
            if group and (not alike or rows >= BLOCK):
                yield np.array(group)
                group, rows = [], 0
            group.append(call)
            rows += int(self._steps[call])
        if group:
            yield np.array(group)

    def _try_others(self, call: int, version: int) -> None:
        others = sorted(range(self._count), key=lambda other: (abs(other - version), -other))
        for other in others[1 : MAX_TRIED + 1]:
            if self._matches(np.array([call]), other)[0]:
                self.versions[call], self.marks[call] = other, PROVEN
                return
        self.marks[call] = UNPROVEN
        if not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"{self._name}: the gates of call {self._numbers[call]} are unproven: no version "
                "of the weights in the trace leads to the states that the model had. The weights "
                "changed unseen: record with weights='exact'",
                ResidualWarning,
                stacklevel=3,
            )

    def _matches(self, calls: Integers, version: int) -> Array:
        """(calls,) whether a version leads to the states of calls, which are computed in blocks."""
        # Here since it needs torch.
        from grutrace.gru.recompute import fit

        weights = self._weights(version)
        found = []
        precision = float(self._checks["precision"][calls[0]])
        for call in calls.tolist():
            found.append(np.arange(self._ends[call] - self._steps[call], self._ends[call]))
        rows = np.concatenate(found)
        owners = np.repeat(np.arange(len(calls)), self._steps[calls])
        matching = np.ones(len(calls), bool)
        for first in range(0, len(rows), BLOCK):
            part = slice(first, first + BLOCK)
            each: Any = self._step_data(rows[part])
            off = ~fit(each.input, each.previous, each.hidden, weights, precision)
            np.logical_and.at(matching, owners[part][off], False)
        return matching
