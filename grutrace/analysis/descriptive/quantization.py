"""Quantization: the rounding error of values that are stored in a smaller type than computed.

Rounding to nearest moves a value by at most half the spacing of the type: for float16, 2^-12 for
values from 0.5 to 1, half of that below 0.5, and so on down to 2^-25. Over many values the error is
uniform between two neighbours, so its root mean square is the spacing over the square root of 12
(Bennett, "Spectra of quantized signals", 1948).

N steps, H units.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from grutrace.analysis.engine.map_reduce import reduce_rows
from grutrace.analysis.engine.result import Result
from grutrace.analysis.engine.site_data import SiteLike, as_site_data
from grutrace.errors import NotRecordedError
from grutrace.records import DEFAULT_RECORD, GATES, Array
from grutrace.storage.read.sequence_index import Integers


@dataclass(frozen=True, eq=False)
class Quantization(Result):
    """Rounding errors of a site.

    All are 0 where the kernel computed in the storage type or a smaller one.

    Attributes:
        kept: Name of the storage type.
        steps: N, number of steps of all sequences.
        units: (H,) numbers of the units.
        largest: By quantity, (H,) upper bound of the error of a value. NaN where there are no
            values.
        typical: By quantity, (H,) expected root mean square error. NaN likewise.
        infinite: By quantity, (H,) number of values that overflow the storage type.
    """

    kept: str
    steps: int
    units: Integers
    largest: Mapping[str, Array]
    typical: Mapping[str, Array]
    infinite: Mapping[str, Array]


def quantization(site: SiteLike) -> Quantization:
    """Bound the rounding error of gates and states that are stored in a smaller type.

    The bound covers the storage of computed values. It does not cover gates that are derived from
    rounded states.

    Args:
        site: A site that stores at least one of reset, update, candidate and hidden.

    Returns:
        The errors of each quantity and unit.

    Raises:
        NotRecordedError: The site stores none of them.

    Example:
        Half the spacing of float16 between 0.5 and 1 is 2^-12.

        >>> import numpy as np
        >>> from grutrace.analysis import SiteArrays, quantization
        >>> result = quantization(SiteArrays(update=np.full((3, 1), 0.7, np.float16)))
        >>> result.largest["update"] * 2**12
        array([1.])
    """
    data = as_site_data(site)
    requested = [name for name in DEFAULT_RECORD if name in data.stored]
    if not requested:
        raise NotRecordedError(f"{data.name!r} stores no gates and no states")
    kept = data.rows(requested[0]).dtype
    counted = reduce_rows(data, requested, partial(_SpacingSums, tuple(requested), len(data.units)))
    # A type at least as precise as the computation stores values exactly.
    share = 0.0 if np.finfo(kept).eps <= data.precision else 1.0
    return Quantization(
        site=data.name,
        kept=kept.name,
        steps=data.steps,
        units=data.units,
        largest={name: share * counted.largest[name] / 2 for name in requested},
        typical={name: share * counted.root_mean_square(name) / 12**0.5 for name in requested},
        infinite=counted.infinite,
    )


class _SpacingSums:
    """Spacings of the values of each unit, by quantity."""

    def __init__(self, quantities: Sequence[str], width: int) -> None:
        self.largest = {name: np.full(width, np.nan) for name in quantities}
        self.infinite = {name: np.zeros(width, np.int64) for name in quantities}
        # Squares of powers of two are summed without rounding.
        self._squares = {name: np.zeros(width) for name in quantities}
        self._finite = {name: np.zeros(width, np.int64) for name in quantities}

    def add(self, rows: Mapping[str, Array]) -> None:
        for name, block in rows.items():
            finite = np.isfinite(block)
            sizes = np.abs(np.where(finite, block, 0))
            if name in GATES:
                # Sigmoid and tanh never exceed 1, so a stored 1 was rounded up.
                sizes = np.minimum(sizes, np.nextafter(sizes.dtype.type(1), sizes.dtype.type(0)))
            spacings = np.where(finite, np.spacing(sizes), 0).astype(np.float64)
            if len(block):
                largest = np.where(finite.any(axis=0), spacings.max(axis=0), np.nan)
                self.largest[name] = np.fmax(self.largest[name], largest)
            self.infinite[name] += np.isinf(block).sum(axis=0)
            self._squares[name] += np.square(spacings).sum(axis=0)
            self._finite[name] += finite.sum(axis=0)

    def merge(self, later: _SpacingSums) -> None:
        for name in self.largest:
            self.largest[name] = np.fmax(self.largest[name], later.largest[name])
            self.infinite[name] += later.infinite[name]
            self._squares[name] += later._squares[name]
            self._finite[name] += later._finite[name]

    def root_mean_square(self, name: str) -> Array:
        """Root mean square of the spacings: (H,), NaN where there are no values."""
        squares, count = self._squares[name], self._finite[name]
        means = np.full(len(squares), np.nan)
        return np.asarray(np.sqrt(np.divide(squares, count, out=means, where=count > 0)))
