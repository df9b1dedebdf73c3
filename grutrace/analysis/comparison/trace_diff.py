"""Are two traces the same? Their sites, sequences, gates, states, tokens and labels, compared.

Every value that both have is compared with the one of the same site, sequence, step and unit, some
at a time, whatever batches the calls were made of, and whether gates are stored or derived.
Weights, options and versions are compared as well: they are not what a trace is about, but where
values differ, they say why.

Default tolerance. Two correct computations of a step differ by rounding, in proportion to the
spacing at 1 of the type in which they are made, and a state hands its difference on to the next
step. In networks that are not chaotic, trained ones among them, up to 60 spacings were seen between
other batches or types (docs/diff.md). So the default is `checks.TOLERANCE_EPS` spacings, but no
more than half of the digits, plus the rounding of the types in which the rows are stored.
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
    """What differs between two traces, a and b.

    Attributes:
        values: Of every quantity that both have, in the model's order; at each site first what goes
            in (``input``, ``initial``), then gates and states.
        mismatches: Whatever else should be alike and is not.
        weights: By site, weights that are not equal. They count only in an exact comparison, where
            they are among the mismatches as well.
        context: How one was made otherwise than the other. They do not count.
    """

    values: tuple[ValueDifference, ...]
    mismatches: tuple[Mismatch, ...]
    weights: tuple[WeightsDifference, ...]
    context: tuple[ContextDifference, ...]

    __repr__ = fields_repr

    @property
    def same(self) -> bool:
        """Whether nothing differs beyond the tolerance, and nothing is in only one of them."""
        return not self.mismatches and not any(each.beyond for each in self.values)

    @property
    def first(self) -> ValueDifference | None:
        """The first quantity, in the model's order, with a value beyond the tolerance."""
        return next((each for each in self.values if each.beyond), None)

    @property
    def largest(self) -> ValueDifference | None:
        """The quantity that differs most; None where all values are the same."""
        found: tuple[float, ValueDifference | None] = 0.0, None
        for each in self.values:
            if each.largest and each.largest.difference > found[0]:
                found = each.largest.difference, each
        return found[1]

    @property
    def cause(self) -> str:
        """What most likely made values differ; empty where none is beyond the tolerance."""
        first = self.first
        if first is None:
            return ""
        if self.weights:
            return f"the weights differ: {self.weights[0]}"
        training = [each for each in self.context if each.what.endswith("in training mode")]
        if training:
            return f"the weights are equal, the mode is not: {training[0]}"
        if first.quantity == "input":
            return f"the weights are equal; what {first.site} read differs"
        if first.quantity == "initial":
            return f"the weights are equal; the states that {first.site} began from differ"
        if any((each.site, each.quantity) == (first.site, "input") for each in self.values):
            computing = [each for each in self.context if _of_computing(each)]
            but = f"; what is not: {'; '.join(map(str, computing))}" if computing else ""
            return f"weights, input and initial states of {first.site} are equal{but}"
        return f"the weights are equal; what {first.site} read was not recorded in both"

    def __str__(self) -> str:
        lines = [str(each) for each in self.mismatches]
        lines += [
            f"{each.site}: {each.quantity} differs beyond {each.tolerance:.1e} in {each.beyond} of "
            f"{each.values} values, most at {each.largest}, first at {each.first}"
            for each in self.values
            if each.beyond
        ]
        if not lines:
            return "the traces are the same within the tolerance"
        return "\n".join([*lines, self.cause] if self.cause else lines)


def _of_computing(each: ContextDifference) -> bool:
    ways = ("torch", "platform", ": computed in", "batches")
    return each.what.endswith(ways)


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
        b: Another.
        sites: A glob, or several, for names of sites; None for all.
        record: Quantities to compare; None for all. The states that sequences began from go with
            ``hidden``.
        tolerance: How large ``|a - b| / max(1, |a|, |b|)`` may be; None for what the types explain.
        exact: Compare with no tolerance, and have weights and types of rows count as well.
        progress: Called with how many rows are done, and how many there are.

    Raises:
        OptionError: An option has a value that cannot be used.
        NotRecordedError: Neither trace has a site or quantity that was asked for.
    """
    quantities = select_quantities(record)
    if tolerance is not None and not tolerance >= 0:
        raise OptionError(f"tolerance: expected a number from 0 up, found {short_repr(tolerance)}")
    if exact and tolerance:
        raise OptionError(
            f"exact and tolerance: expected one of the two, found {short_repr(tolerance)}"
        )
    moments = a.snapshot, b.snapshot
    sides = tuple(_sides(snapshot, sites) for snapshot in moments)
    _require(sides, sites, None if record is None else quantities)
    pairs = [Pair(side, sides[1][name]) for name, side in sides[0].items() if name in sides[1]]
    modules = {(pair.a.number, pair.b.number): pair for pair in reversed(pairs)}

    mismatches = [*_only_in_one(*sides)]
    about = [*checks.trace_context(*moments)]
    for pair in reversed(modules.values()):
        mismatches += module_mismatches(pair.a, pair.b)
        about += checks.module_context(pair.a, pair.b)
    for pair in pairs:
        # A deferred trace has inputs for the sake of its gates: not missed unless asked for.
        mismatches += site_mismatches(pair, DEFAULT_RECORD if record is None else quantities)
        about += checks.site_context(pair)
    comparisons = [each for pair in pairs for each in _comparisons(pair, quantities)]
    values = _compare_values(comparisons, 0.0 if exact else tolerance, progress)
    weights = [each for pair in pairs if (each := _weights(pair))]
    if exact:
        mismatches += _exactly(pairs, weights)
    return TraceDifference(tuple(values), tuple(mismatches), tuple(weights), tuple(about))


def _sides(snapshot: TraceSnapshot, sites: str | Sequence[str] | None) -> dict[str, Side]:
    """By name, the sites of a trace that are asked for."""
    return {
        name: Side(snapshot, number, site)
        for name, (number, site) in select_sites(snapshot, sites).items()
    }


def _require(
    sides: Sequence[dict[str, Side]],
    sites: str | Sequence[str] | None,
    quantities: Sequence[str] | None,
) -> None:
    """Refuse what neither trace has: nothing would be compared, and nothing would differ."""
    if sites is not None and not any(sides):
        raise NotRecordedError(f"neither trace has a site that matches {short_repr(sites)}")
    found = {
        name for each in sides for side in each.values() for name in side.site.available_quantities
    }
    for name in quantities or ():
        if name not in found:
            held = ", ".join(each for each in QUANTITIES if each in found) or "nothing"
            raise NotRecordedError(f"neither trace has {name!r} at these sites; recorded: {held}")


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
        asked = "hidden" if name == INITIAL else name
        if name == "input" and pair.a.site.input_size != pair.b.site.input_size:
            continue
        if asked in quantities and all(name in each for each in available_quantities):
            yield Comparison(pair, name)


def _compare_values(
    comparisons: Sequence[Comparison], tolerance: float | None, progress: Progress | None
) -> Iterator[ValueDifference]:
    total, done = sum(each.count for each in comparisons), 0
    for each in comparisons:
        comparison = ValueComparison(each, each.tolerance() if tolerance is None else tolerance)
        for block in each.blocks():
            comparison.add(block)
            done += len(block.steps)
            if progress is not None:
                progress(done, total)
        yield comparison.result()


def _weights(pair: Pair) -> WeightsDifference | None:
    """What differs between weights of the same sizes."""
    a, b = pair.a, pair.b
    if (a.module.hidden_size, a.site.input_size) != (b.module.hidden_size, b.site.input_size):
        return None
    return checks.weights_difference(pair)


def _exactly(pairs: Sequence[Pair], weights: Sequence[WeightsDifference]) -> Iterator[Mismatch]:
    """Yield what does not matter within a tolerance, and does without."""
    for pair in pairs:
        types = pair.a.module.dtype, pair.b.module.dtype
        if types[0] != types[1]:
            yield Mismatch(pair.a.site.name, "type", *types)
    for each in weights:
        what = f"{each.name} of version {each.version}"
        yield Mismatch(each.site, what, repr(each.a), repr(each.b), count=each.versions)
