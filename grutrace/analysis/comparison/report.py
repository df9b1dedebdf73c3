"""What can differ between two traces, a and b: frozen results, one for each kind of thing."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from grutrace.analysis.verification.distance import abs_difference, scaled_difference


@dataclass(frozen=True)
class ValuePair:
    """One value in both traces.

    Attributes:
        sequence: Number of the sequence.
        step: Step of the sequence; None of the state that it began from.
        unit: Which of the H units, also where only some were recorded; of the input, which feature.
        a: The value in the one trace.
        b: The value in the other.
    """

    sequence: int
    step: int | None
    unit: int
    a: float
    b: float

    @property
    def difference(self) -> float:
        """``|a - b| / max(1, |a|, |b|)``; infinite where just one of them is no number."""
        return float(scaled_difference(np.array(self.a), np.array(self.b)))

    def __str__(self) -> str:
        step = "the initial state" if self.step is None else f"step {self.step}"
        where = f"sequence {self.sequence}, {step}, unit {self.unit}"
        return f"{where}: {self.a:.9g} and {self.b:.9g}"


@dataclass(frozen=True)
class ValueDifference:
    """One quantity at one site: the values that both traces have.

    Attributes:
        site: Its name.
        quantity: reset, update, candidate, hidden or input; or ``initial``.
        tolerance: Differences up to here count as none.
        values: How many were compared.
        unequal: How many of them are not the same number.
        beyond: How many of them differ by more than the tolerance.
        largest: Where they differ most; None where all are the same.
        first: The first that differs by more than the tolerance: in the first such sequence, the
            first step that this direction read; None if there is none.
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
    """Something else that both should have alike and do not.

    Attributes:
        where: A site, or the path of a module (empty for the model itself).
        what: What it is, such as ``sequences`` or ``tokens``.
        a: What the one trace has, as text; None if it has nothing there.
        b: What the other has.
        count: In how many places: of sequences, or of steps for tokens and labels.
        sequence: The first sequence that it is about, if it is about sequences.
        step: The first step of it, if it is about steps.
    """

    where: str
    what: str
    a: str | None
    b: str | None
    count: int = 1
    sequence: int | None = None
    step: int | None = None

    def __str__(self) -> str:
        place = "" if self.sequence is None else f" of sequence {self.sequence}"
        place += "" if self.step is None else f", step {self.step}"
        if self.a is None or self.b is None:
            only, found = ("b", self.b) if self.a is None else ("a", self.a)
            text = f"{self.what}{place}: only in {only}" + (f" ({found})" if found else "")
        else:
            text = f"{self.what}{place}: {self.a} and {self.b}"
        where = f"{self.where}: " if self.where else ""
        return where + text + (f" (the first of {self.count})" if self.count > 1 else "")


def presence(a: bool, b: bool) -> tuple[str | None, str | None]:
    """What a `Mismatch` says where just one of the traces has something."""
    return "" if a else None, "" if b else None


@dataclass(frozen=True)
class WeightsDifference:
    """Weights of one site that are not the same in both traces.

    Attributes:
        site: Its name.
        version: The first version that differs, from 0.
        versions: How many versions differ, of those that both have.
        name: Which weight of this version differs most.
        a: Its value in the one trace, where it differs most.
        b: In the other.
    """

    site: str
    version: int
    versions: int
    name: str
    a: float
    b: float

    @property
    def largest(self) -> float:
        """``|a - b|``; infinite where just one of them is no number."""
        return float(abs_difference(np.array(self.a), np.array(self.b)))

    def __str__(self) -> str:
        more = f", and {self.versions - 1} more versions differ" if self.versions > 1 else ""
        return f"{self.site}: {self.name} of version {self.version} by {self.largest:.2g}{more}"


@dataclass(frozen=True)
class ContextDifference:
    """How one trace was made otherwise than the other, which need not show in what it holds.

    Attributes:
        what: Such as ``torch``, for its version, or ``encoder: calls in training mode``.
        a: Of the one trace.
        b: Of the other.
    """

    what: str
    a: str
    b: str

    def __str__(self) -> str:
        return f"{self.what}: {self.a} and {self.b}"
