"""Quantization: the rounding error of values that are stored in a smaller type than computed.

Rounding to nearest moves a value by at most half the spacing of the type: for float16, 2^-12 for
values from 0.5 to 1, half of that below 0.5, and so on down to 2^-25. Over many values the error is
uniform between two neighbours, so its root mean square is the spacing over the square root of 12
(Bennett, "Spectra of quantized signals", 1948).

N steps, H units.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np

from grutrace.analysis.engine.map_reduce import summarize_each
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

    The bound covers the storage of computed values. It does not cover gates that are recomputed
    from rounded states.

    Args:
        site: A site that stores at least one of reset, update, candidate and hidden.

    Returns:
        The errors of each quantity and unit.

    Raises:
        NotRecordedError: The site stores none of them.

    Examples:
        Half the spacing of float16 between 0.5 and 1 is 2^-12.

        >>> import numpy as np
        >>> from grutrace.analysis import SiteArrays, quantization
        >>> result = quantization(SiteArrays(update=np.full((3, 1), 0.7, np.float16)))
        >>> result.largest["update"] * 2**12
        array([1.])
    """
    data = as_site_data(site)
    quantities = [name for name in DEFAULT_RECORD if name in data.stored]
    if not quantities:
        raise NotRecordedError(f"{data.name!r} stores no gates and no states")
    storage_dtype = data.rows(quantities[0]).dtype
    sums = summarize_each(
        data, {name: partial(_spacing_sums, bounded=name in GATES) for name in quantities}
    )
    # A type at least as precise as the computation stores values exactly.
    share = 0.0 if np.finfo(storage_dtype).eps <= data.precision else 1.0

    def where_finite(name: str, values: Array) -> Array:
        return np.where(sums[name]["finite"] > 0, share * values, np.nan)

    return Quantization(
        site=data.name,
        kept=storage_dtype.name,
        steps=data.steps,
        units=data.units,
        largest={name: where_finite(name, each["maximum"] / 2) for name, each in sums.items()},
        typical={name: where_finite(name, _typical(each)) for name, each in sums.items()},
        infinite={name: each["infinite"] for name, each in sums.items()},
    )


def _spacing_sums(rows: Mapping[str, Array], bounded: bool) -> dict[str, Array]:
    """Compute the spacings of the values of each unit: their maximum, and the sum of their squares.

    Args:
        rows: The values of one quantity, (n, H).
        bounded: Whether the values are gates. Sigmoid and tanh never exceed 1, so a stored 1 was
            rounded up.
    """
    (block,) = rows.values()
    finite = np.isfinite(block)
    sizes = np.abs(np.where(finite, block, 0))
    if bounded:
        sizes = np.minimum(sizes, np.nextafter(sizes.dtype.type(1), sizes.dtype.type(0)))
    spacings = np.where(finite, np.spacing(sizes), 0).astype(np.float64)
    return {
        "maximum": spacings.max(axis=0, initial=0.0),
        # Squares of powers of two are summed without rounding.
        "squares": np.square(spacings).sum(axis=0),
        "finite": finite.sum(axis=0),
        "infinite": np.isinf(block).sum(axis=0),
    }


def _typical(sums: Mapping[str, Array]) -> Array:
    """Expected root mean square error, from the root mean square of the spacings: (H,)."""
    mean = sums["squares"] / np.maximum(sums["finite"], 1)
    return np.asarray(np.sqrt(mean) / 12**0.5)
