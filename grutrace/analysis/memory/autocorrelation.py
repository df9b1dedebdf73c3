"""Autocorrelation of every unit's state, and two correlation times.

With m the mean of a unit over all steps, and the sums over all pairs of steps of one sequence that
are k apart, of which there are N(k):

    C(k) = 1/N(k) sum (h(t) - m) (h(t + k) - m)          rho(k) = C(k) / C(0)

The e-folding time is the lag at which rho falls to 1/e: for rho(k) = exp(-k / tau) it is tau. The
integrated time is 1 + 2 sum rho(k), summed up to the first lag that is at least five times the sum
so far (Sokal 1997, "Monte Carlo methods in statistical mechanics", section 3; emcee uses the same
window). That many correlated steps estimate the mean as well as one independent value.

N steps, H units, L lags.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np

from grutrace.analysis.engine.map_reduce import reduce_sequences
from grutrace.analysis.engine.result import Result
from grutrace.analysis.engine.segments import SequenceSegment
from grutrace.analysis.engine.site_data import SiteLike, as_site_data
from grutrace.errors import OptionError, short_repr
from grutrace.records import Array
from grutrace.storage.read.lazy_rows import block_slices
from grutrace.storage.read.sequence_index import Integers

#: Default largest lag, in steps.
DEFAULT_LAGS = 1000

#: Sokal's window: the sum ends at the first lag that is at least this multiple of the sum.
SOKAL_WINDOW = 5.0

#: Size of the short sequences that are transformed together, in bytes.
BATCH_BYTES = 4 * 1024 * 1024

#: Smallest length of a transform, in steps.
MIN_TRANSFORM = 1024


@dataclass(frozen=True, eq=False)
class Autocorrelation(Result):
    """Autocorrelation of the hidden states of a site.

    Values are NaN for a unit that is constant or not finite.

    Attributes:
        steps: Number of steps used, of all sequences.
        units: (H,) numbers of the units.
        lags: L, the largest lag.
        efolding: (H,) lag at which the correlation falls to 1/e, in steps, interpolated
            exponentially. NaN where it stays above 1/e up to L.
        integrated: (H,) integrated time, in steps. NaN where Sokal's window exceeds L.
        independent: (H,) steps over integrated time: the number of independent values. Below about
            50 the times of the unit are not reliable.
        correlation: (L + 1, H) rho; 1 at lag 0.
        pairs: (L + 1,) number of pairs of steps at each lag. The last lags have few.
    """

    array_only_fields: ClassVar[tuple[str, ...]] = ("correlation", "pairs")

    steps: int
    units: Integers
    lags: int
    efolding: Array
    integrated: Array
    independent: Array
    correlation: Array
    pairs: Integers


def autocorrelation(site: SiteLike, lags: int | None = None, skip: int = 0) -> Autocorrelation:
    """Correlate the states of each unit with later states of the same sequence.

    The mean is taken over all sequences, so differences between sequences that persist within them
    count as correlation that does not decay. Computed by fast Fourier transforms: 50 nanoseconds a
    value, and 32 bytes of memory for each lag and unit.

    Args:
        site: A site with hidden states.
        lags: L. By default `DEFAULT_LAGS`, or one less than the longest sequence if that is
            shorter.
        skip: Number of steps to skip at the start of each sequence, so that the transient after the
            initial state is not sampled.

    Returns:
        The correlations and correlation times of each unit. The equations are those of the module.

    Raises:
        NotRecordedError: The hidden states were not recorded.
        OptionError: `lags` or `skip` is not an integer of 0 or more.

    Examples:
        A state that alternates between 1 and -1 is anticorrelated at odd lags.

        >>> import numpy as np
        >>> from grutrace.analysis import SiteArrays, autocorrelation
        >>> states = np.tile([[1.0], [-1.0]], (50, 1))
        >>> autocorrelation(SiteArrays(hidden=states), lags=2).correlation[:, 0].round(6)
        array([ 1., -1.,  1.])
    """
    data = as_site_data(site)
    data.require("hidden")
    for name, value in {"lags": lags, "skip": skip}.items():
        if value is not None and (not isinstance(value, int) or value < 0):
            raise OptionError(
                f"{name}: expected a number of steps, 0 or more; found {short_repr(value)}"
            )
    lengths = np.maximum(data.lengths - skip, 0)
    longest = max(0, int(lengths.max(initial=0)) - 1)
    lags = min(longest, DEFAULT_LAGS if lags is None else lags)
    pairs = count_pairs(lengths, lags)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        level = reduce_sequences(data, ("hidden",), partial(_MeanAndRange, len(data.units), skip))
        mean = level.sum / pairs[0]
        make_reducer = partial(_LaggedProducts, mean, lags, skip)
        covariance = (
            reduce_sequences(data, ("hidden",), make_reducer).lagged() / pairs[:, np.newaxis]
        )
        correlation = np.where(level.moves, covariance / covariance[0], np.nan)
    efolding, integrated = efolding_time(correlation), integrated_time(correlation)
    return Autocorrelation(
        site=data.name,
        steps=int(pairs[0]),
        units=data.units,
        lags=lags,
        efolding=efolding,
        integrated=integrated,
        independent=pairs[0] / integrated,
        correlation=correlation,
        pairs=pairs,
    )


def count_pairs(lengths: Integers, lags: int) -> Integers:
    """Count the pairs of steps of one sequence with lag 0, 1, ..., `lags`: (lags + 1,)."""
    ordered = np.sort(lengths)
    beyond = np.concatenate([np.cumsum(ordered[::-1])[::-1], [0]])
    lag = np.arange(lags + 1)
    first = np.searchsorted(ordered, lag, "right")
    return np.asarray(beyond[first] - lag * (len(ordered) - first))


def efolding_time(correlation: Array) -> Array:
    """Find the lag where (L + 1, H) correlations fall to 1/e: (H,), NaN where they do not."""
    units = np.arange(correlation.shape[1])
    below = correlation < np.exp(-1)
    lag = np.argmax(below, axis=0)
    after, before = correlation[lag, units], correlation[np.maximum(lag - 1, 0), units]
    with np.errstate(invalid="ignore", divide="ignore"):
        curved = (np.log(before) + 1) / (np.log(before) - np.log(after))
        # Interpolate linearly where the correlation is not positive.
        straight = (before - np.exp(-1)) / (before - after)
        part = np.where(after > 0, curved, straight)
    return np.where(below.any(axis=0), lag - 1 + part, np.nan)


def integrated_time(correlation: Array) -> Array:
    """Integrate (L + 1, H) correlations over Sokal's window: (H,), NaN if it exceeds L."""
    time = 2 * np.cumsum(correlation, axis=0) - 1
    enough = np.arange(len(time))[:, np.newaxis] >= SOKAL_WINDOW * time
    lag = np.argmax(enough, axis=0)
    time_at_window = time[lag, np.arange(time.shape[1])]
    return np.where(enough.any(axis=0) & (time_at_window > 0), time_at_window, np.nan)


class _MeanAndRange:
    """Sum over steps, minimum and maximum of each unit."""

    def __init__(self, width: int, skip: int) -> None:
        self._skip = skip
        self.sum = np.zeros(width)
        self.least, self.largest = np.full(width, np.inf), np.full(width, -np.inf)

    @property
    def moves(self) -> Array:
        """(H,) whether a unit has more than one value, independent of rounding in its mean."""
        return np.asarray(self.least < self.largest)

    def add(self, segment: SequenceSegment) -> None:
        rows = segment.values["hidden"][max(0, self._skip - segment.start) :]
        self.sum += np.add.reduce(rows, axis=0, dtype=np.float64)
        self.least = np.minimum(self.least, rows.min(axis=0, initial=np.inf))
        self.largest = np.maximum(self.largest, rows.max(axis=0, initial=-np.inf))

    def merge(self, later: _MeanAndRange) -> None:
        self.sum += later.sum
        self.least = np.minimum(self.least, later.least)
        self.largest = np.maximum(self.largest, later.largest)


class _LaggedProducts:
    """Sums of lagged products of deviations, kept as power spectra, which can be added.

    A sequence is zero-padded by the number of lags, so that its end does not wrap round to its
    start. Sequences of similar length are transformed together. A long sequence is transformed in
    chunks, each against itself and the lags before it.
    """

    def __init__(self, mean: Array, lags: int, skip: int) -> None:
        self._mean, self._lags, self._skip = mean, lags, skip
        self._largest = _power_of_two(max(MIN_TRANSFORM, 4 * lags))
        self._spectra: dict[int, Array] = {}
        # By length of the transform: steps, and how many of them precede the chunk.
        self._waiting: dict[int, list[tuple[Array, int]]] = {}
        self._parts: list[Array] = []
        self._before = np.zeros((0, len(mean)))

    def add(self, segment: SequenceSegment) -> None:
        if segment.is_first:
            self._parts, self._before = [], self._before[:0]
        rows = segment.values["hidden"][max(0, self._skip - segment.start) :]
        # A non-finite value makes the unit's result NaN.
        with np.errstate(invalid="ignore", over="ignore"):
            if len(rows):
                # A copy, so that the block it was read with is freed.
                self._parts.append(np.subtract(rows, self._mean, dtype=np.float64))
            if not self._parts:
                return
            if segment.length - self._skip > self._largest - self._lags:
                self._add_chunks(segment.ends)
            elif segment.ends:
                rows = np.concatenate(self._parts)
                length = _power_of_two(len(rows) + min(self._lags, len(rows) - 1))
                self._add_steps(length, rows, 0)

    def merge(self, later: _LaggedProducts) -> None:
        later.transform()
        for length, spectrum in later._spectra.items():
            self._add_spectrum(length, slice(None), spectrum)

    def transform(self) -> None:
        """Transform what still waits."""
        for length in list(self._waiting):
            self._transform(length)

    def lagged(self) -> Array:
        """(L + 1, H) the sums."""
        self.transform()
        sums = np.zeros((self._lags + 1, len(self._mean)))
        for length, spectrum in self._spectra.items():
            products = np.fft.irfft(spectrum, length, axis=1)
            # What is beyond the half is, of sequences of at most half the length, the negative
            # lags.
            count = min(self._lags, length // 2) + 1
            sums[:count] += products[:, :count].T
        return sums

    def _add_chunks(self, ends: bool) -> None:
        """Add the whole chunks of a long sequence; all its steps if it ends."""
        lags = self._lags
        chunk, rows = self._largest - lags, np.concatenate(self._parts)
        while len(rows) >= chunk or (ends and len(rows)):
            together = np.concatenate([self._before, rows[:chunk]])
            self._add_steps(self._largest, together, len(self._before))
            rows, self._before = rows[chunk:], together[max(0, len(together) - lags) :]
        self._parts = [rows]

    def _add_steps(self, length: int, rows: Array, before: int) -> None:
        """Add the products of steps with the steps from number `before` on."""
        waiting = self._waiting.setdefault(length, [])
        waiting.append((rows, before))
        if len(waiting) * length * rows.shape[1] * rows.itemsize >= BATCH_BYTES:
            self._transform(length)

    def _transform(self, length: int) -> None:
        waiting = self._waiting.pop(length)
        for units in self._units(len(waiting) * length):
            padded = np.zeros((len(waiting), units.stop - units.start, length))
            for target, (rows, _) in zip(padded, waiting, strict=True):
                target[:, : len(rows)] = rows[:, units].T
            spectrum = later = np.fft.rfft(padded)
            if any(before for _, before in waiting):
                for target, (_, before) in zip(padded, waiting, strict=True):
                    target[:, :before] = 0.0
                later = np.fft.rfft(padded)
            self._add_spectrum(length, units, (spectrum.conj() * later).sum(axis=0))

    def _add_spectrum(self, length: int, units: slice, spectrum: Array) -> None:
        if length not in self._spectra:
            shape = len(self._mean), length // 2 + 1
            self._spectra[length] = np.zeros(shape, np.complex128)
        self._spectra[length][units] += spectrum

    def _units(self, steps: int) -> Iterator[slice]:
        """Yield slices of units whose transforms of this many steps fit one batch."""
        return block_slices(len(self._mean), BATCH_BYTES, 8 * steps)


def _power_of_two(least: int) -> int:
    return 1 << max(0, least - 1).bit_length()
