"""Comparison of two traces: sites, sequences, gates, states, tokens and labels.

Every common value is compared with that of the same site, sequence, step and unit, in blocks,
regardless of the batches of the calls, and of whether gates are stored or deferred. Weights,
options and versions are compared too: they are not part of the answer, but they explain differences
of values.

Default tolerance. Two correct computations of a step differ by rounding, in proportion to the
machine epsilon of the type they are made in, and a state passes its difference on to the next step.
In networks that are not chaotic, including trained ones, differences of up to 60 epsilons were
observed between batches or types (docs/diff.md). So the default is `checks.TOLERANCE_EPS` epsilons,
but no more than half of the digits, plus the rounding of the types in which the rows are stored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from grutrace.analysis.comparison import checks
from grutrace.analysis.comparison.alignment import Pair, Side
from grutrace.analysis.comparison.checks import (
    INITIAL,
    ORDER,
    Comparison,
    ValueComparison,
    module_mismatches,
    site_mismatches,
)
from grutrace.analysis.comparison.report import (
    ContextDifference,
    Mismatch,
    ValueDifference,
    WeightsDifference,
    presence,
)
from grutrace.errors import NotRecordedError, OptionError, short_repr
from grutrace.records import DEFAULT_RECORD, QUANTITIES
from grutrace.reprs import fields_repr
from grutrace.storage.read.snapshot import TraceSnapshot, select_quantities, select_sites
from grutrace.storage.read.trace import Trace

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class TraceDifference:
    """Differences between two traces, a and b.

    Attributes:
        values: Of every common quantity, in the model's order; at each site first its inputs
            (``input``, ``initial``), then gates and states.
        mismatches: All other differences that count.
        weights: By site, unequal weights. They count only in an exact comparison, where they are
            among the mismatches too.
        context: Differences in how the traces were made. They do not count.
    """

    values: tuple[ValueDifference, ...]
    mismatches: tuple[Mismatch, ...]
    weights: tuple[WeightsDifference, ...]
    context: tuple[ContextDifference, ...]

    __repr__ = fields_repr

    @property
    def same(self) -> bool:
        """Whether no value differs beyond the tolerance and nothing is missing in one trace."""
        return not self.mismatches and not any(value.beyond for value in self.values)

    @property
    def first(self) -> ValueDifference | None:
        """The first quantity, in the model's order, with a value beyond the tolerance."""
        return next((value for value in self.values if value.beyond), None)

    @property
    def largest(self) -> ValueDifference | None:
        """The quantity that differs most; None where all values are equal."""
        largest: tuple[float, ValueDifference | None] = 0.0, None
        for value in self.values:
            if value.largest and value.largest.difference > largest[0]:
                largest = value.largest.difference, value
        return largest[1]

    @property
    def cause(self) -> str:
        """The likely cause of different values; empty where none is beyond the tolerance."""
        first = self.first
        if first is None:
            return ""
        if self.weights:
            return f"the weights differ: {self.weights[0]}"
        training = [
            context for context in self.context if context.what.endswith("in training mode")
        ]
        if training:
            return f"the weights are equal, the mode is not: {training[0]}"
        if first.quantity == "input":
            return f"the weights are equal; what {first.site} read differs"
        if first.quantity == "initial":
            return f"the weights are equal; the states that {first.site} began from differ"
        if any((value.site, value.quantity) == (first.site, "input") for value in self.values):
            computing = [context for context in self.context if _of_computing(context)]
            but = f"; what is not: {'; '.join(map(str, computing))}" if computing else ""
            return f"weights, input and initial states of {first.site} are equal{but}"
        return f"the weights are equal; what {first.site} read was not recorded in both"

    def __str__(self) -> str:
        lines = [str(mismatch) for mismatch in self.mismatches]
        lines += [
            f"{value.site}: {value.quantity} differs beyond {value.tolerance:.1e} in "
            f"{value.beyond} of {value.values} values, most at {value.largest}, first at "
            f"{value.first}"
            for value in self.values
            if value.beyond
        ]
        if not lines:
            return "the traces are the same within the tolerance"
        return "\n".join([*lines, self.cause] if self.cause else lines)


def _of_computing(context: ContextDifference) -> bool:
    ways = ("torch", "platform", ": computed in", "batches")
    return context.what.endswith(ways)


def compare(
    a: Trace,
    b: Trace,
    *,
    sites: str | Sequence[str] | None = None,
    record: str | Sequence[str] | None = None,
    tolerance: float | None = None,
    exact: bool = False,
    progress: Progress | None = None,
) -> TraceDifference:
    """Compare two traces, a block of rows at a time.

    Args:
        a: A trace, in memory or in a file.
        b: Another trace.
        sites: A glob, or several, for names of sites; None for all.
        record: Quantities to compare; None for all. Initial states are compared with ``hidden``.
        tolerance: Largest ``|a - b| / max(1, |a|, |b|)``; None for the tolerance of the types.
        exact: Compare without tolerance, and count weights and types of rows too.
        progress: Called with the number of finished rows and of all rows.

    Returns:
        All differences; `same` is the answer.

    Raises:
        OptionError: An option has an invalid value.
        NotRecordedError: Neither trace has a requested site or quantity.

    Examples:
        >>> import torch, grutrace
        >>> from grutrace.analysis import compare
        >>> layer, inputs = torch.nn.GRU(2, 3), torch.randn(4, 1, 2)
        >>> with grutrace.trace(layer) as a, grutrace.trace(layer) as b:
        ...     _ = layer(inputs)
        >>> compare(a, b).same
        True
    """
    quantities = select_quantities(record)
    if tolerance is not None and not tolerance >= 0:
        raise OptionError(f"tolerance: expected a number from 0 up, found {short_repr(tolerance)}")
    if exact and tolerance:
        raise OptionError(
            f"exact and tolerance: expected one of the two, found {short_repr(tolerance)}"
        )
    snapshots = a.snapshot, b.snapshot
    sides = tuple(_sides(snapshot, sites) for snapshot in snapshots)
    _require(sides, sites, None if record is None else quantities)
    pairs = [Pair(side, sides[1][name]) for name, side in sides[0].items() if name in sides[1]]
    modules = {(pair.a.number, pair.b.number): pair for pair in reversed(pairs)}

    mismatches = [*_only_in_one(*sides)]
    context = [*checks.trace_context(*snapshots)]
    for pair in reversed(modules.values()):
        mismatches += module_mismatches(pair.a, pair.b)
        context += checks.module_context(pair.a, pair.b)
    for pair in pairs:
        # A deferred trace records inputs to derive its gates, so they are not missed in the other
        # trace unless requested.
        mismatches += site_mismatches(pair, DEFAULT_RECORD if record is None else quantities)
        context += checks.site_context(pair)
    comparisons = [comparison for pair in pairs for comparison in _comparisons(pair, quantities)]
    values = _compare_values(comparisons, 0.0 if exact else tolerance, progress)
    weights = [*filter(None, map(_weights, pairs))]
    if exact:
        mismatches += _exactly(pairs, weights)
    return TraceDifference(tuple(values), tuple(mismatches), tuple(weights), tuple(context))


def _sides(snapshot: TraceSnapshot, sites: str | Sequence[str] | None) -> dict[str, Side]:
    """Return the requested sites of a trace by name."""
    return {
        name: Side(snapshot, number, site)
        for name, (number, site) in select_sites(snapshot, sites).items()
    }


def _require(
    sides: Sequence[dict[str, Side]],
    sites: str | Sequence[str] | None,
    quantities: Sequence[str] | None,
) -> None:
    """Check that at least one trace has what was requested."""
    if sites is not None and not any(sides):
        raise NotRecordedError(f"neither trace has a site that matches {short_repr(sites)}")
    recorded = {
        name
        for sites in sides
        for side in sites.values()
        for name in side.site.available_quantities
    }
    for name in quantities or ():
        if name not in recorded:
            names = ", ".join(sorted(recorded, key=QUANTITIES.index)) or "nothing"
            raise NotRecordedError(f"neither trace has {name!r} at these sites; recorded: {names}")


def _only_in_one(a: dict[str, Side], b: dict[str, Side]) -> Iterator[Mismatch]:
    for name in dict.fromkeys([*a, *b]):
        if name not in a or name not in b:
            yield Mismatch(name, "site", *presence(name in a, name in b))


def _comparisons(pair: Pair, quantities: Sequence[str]) -> Iterator[Comparison]:
    if pair.a.module.hidden_size != pair.b.module.hidden_size:
        return
    available_quantities = (
        (*pair.a.site.available_quantities, INITIAL),
        (*pair.b.site.available_quantities, INITIAL),
    )
    for name in ORDER:
        requested = "hidden" if name == INITIAL else name
        if name == "input" and pair.a.site.input_size != pair.b.site.input_size:
            continue
        if requested in quantities and all(name in available for available in available_quantities):
            yield Comparison(pair, name)


def _compare_values(
    comparisons: Sequence[Comparison], tolerance: float | None, progress: Progress | None
) -> Iterator[ValueDifference]:
    total, done = sum(comparison.count for comparison in comparisons), 0
    for comparison in comparisons:
        allowed = comparison.tolerance() if tolerance is None else tolerance
        values = ValueComparison(comparison, allowed)
        for block in comparison.blocks():
            values.add(block)
            done += len(block.steps)
            if progress is not None:
                progress(done, total)
        yield values.result()


def _weights(pair: Pair) -> WeightsDifference | None:
    """Compare the weights of a site whose sizes agree."""
    a, b = pair.a, pair.b
    if (a.module.hidden_size, a.site.input_size) != (b.module.hidden_size, b.site.input_size):
        return None
    return checks.weights_difference(pair)


def _exactly(pairs: Sequence[Pair], weights: Sequence[WeightsDifference]) -> Iterator[Mismatch]:
    """Yield the differences that count only in an exact comparison."""
    for pair in pairs:
        types = pair.a.module.dtype, pair.b.module.dtype
        if types[0] != types[1]:
            yield Mismatch(pair.a.site.name, "type", *types)
    for difference in weights:
        what = f"{difference.name} of version {difference.version}"
        yield Mismatch(
            difference.site, what, repr(difference.a), repr(difference.b), count=difference.versions
        )
