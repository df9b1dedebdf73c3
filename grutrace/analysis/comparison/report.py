"""The kinds of difference between two traces, a and b, as frozen results."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from grutrace.analysis.verification.distance import abs_difference, scaled_difference


@dataclass(frozen=True)
class ValuePair:
    """One value in both traces.

    Attributes:
        sequence: Number of the sequence.
        step: Step of the sequence; None for its initial state.
        unit: Number of the unit, among all H; for the input, of the feature.
        a: The value in the first trace.
        b: The value in the second trace.
    """

    sequence: int
    step: int | None
    unit: int
    a: float
    b: float

    @property
    def difference(self) -> float:
        """``|a - b| / max(1, |a|, |b|)``; infinite where only one of them is NaN."""
        return float(scaled_difference(np.array(self.a), np.array(self.b)))

    def __str__(self) -> str:
        step = "the initial state" if self.step is None else f"step {self.step}"
        where = f"sequence {self.sequence}, {step}, unit {self.unit}"
        return f"{where}: {self.a:.9g} and {self.b:.9g}"


@dataclass(frozen=True)
class ValueDifference:
    """Differences of one quantity at one site.

    Attributes:
        site: Name of the site.
        quantity: reset, update, candidate, hidden or input; or ``initial``.
        tolerance: Largest difference that counts as equal.
        values: Number of compared values.
        unequal: Number of unequal values.
        beyond: Number of values that differ by more than the tolerance.
        largest: The value that differs most; None where all are equal.
        first: The first value beyond the tolerance: in the first such sequence, the first step in
            reading order; None if there is none.
    """

    site: str
    quantity: str
    tolerance: float
    values: int
    unequal: int
    beyond: int
    largest: ValuePair | None
    first: ValuePair | None


@dataclass(frozen=True)
class Mismatch:
    """Another difference than that of a value.

    Attributes:
        where: A site, or the path of a module (empty for the model itself).
        what: What differs, such as ``sequences`` or ``tokens``.
        a: The first trace's, as text; None if it is missing there.
        b: The second trace's.
        count: Number of sequences, or of steps for tokens and labels.
        sequence: The first sequence concerned, if any.
        step: The first step of it concerned, if any.
    """

    where: str
    what: str
    a: str | None
    b: str | None
    count: int = 1
    sequence: int | None = None
    step: int | None = None

    def __str__(self) -> str:
        position = "" if self.sequence is None else f" of sequence {self.sequence}"
        position += "" if self.step is None else f", step {self.step}"
        if self.a is None or self.b is None:
            only, value = ("b", self.b) if self.a is None else ("a", self.a)
            text = f"{self.what}{position}: only in {only}" + (f" ({value})" if value else "")
        else:
            text = f"{self.what}{position}: {self.a} and {self.b}"
        where = f"{self.where}: " if self.where else ""
        return where + text + (f" (the first of {self.count})" if self.count > 1 else "")


def presence(a: bool, b: bool) -> tuple[str | None, str | None]:
    """Return the `a` and `b` of a `Mismatch` for something that only one trace has."""
    return "" if a else None, "" if b else None


@dataclass(frozen=True)
class WeightsDifference:
    """Weights of one site that differ between the traces.

    Attributes:
        site: Name of the site.
        version: The first version that differs, from 0.
        versions: Number of common versions that differ.
        name: The weight of this version that differs most.
        a: Its value in the first trace, where it differs most.
        b: Its value in the second trace.
    """

    site: str
    version: int
    versions: int
    name: str
    a: float
    b: float

    @property
    def largest(self) -> float:
        """``|a - b|``; infinite where only one of them is NaN."""
        return float(abs_difference(np.array(self.a), np.array(self.b)))

    def __str__(self) -> str:
        more = f", and {self.versions - 1} more versions differ" if self.versions > 1 else ""
        return f"{self.site}: {self.name} of version {self.version} by {self.largest:.2g}{more}"


@dataclass(frozen=True)
class ContextDifference:
    """A difference in how the traces were made, which need not affect their values.

    Attributes:
        what: Such as ``torch``, for its version, or ``encoder: calls in training mode``.
        a: The first trace's.
        b: The second trace's.
    """

    what: str
    a: str
    b: str

    def __str__(self) -> str:
        return f"{self.what}: {self.a} and {self.b}"
