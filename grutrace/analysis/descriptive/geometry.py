"""In how many directions the states move: principal components and participation ratio.

With C the covariance of the states over all steps, and l its eigenvalues,

    participation ratio = (sum of l)^2 / (sum of l^2):

H where all directions have the same variance, 1 where there is only one (Abbott, Rajan and
Sompolinsky 2011, "Interactions between intrinsic and stimulus-evoked activity in recurrent neural
networks"; Gao et al. 2017, "A theory of multineuronal dimensionality, dynamics and measurement").

N steps, H units, k components.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np

from grutrace.analysis.engine.map_reduce import reduce_rows
from grutrace.analysis.engine.result import Result
from grutrace.analysis.engine.site_data import SiteLike, as_site_data
from grutrace.errors import OptionError
from grutrace.records import Array
from grutrace.storage.read.sequence_index import Integers


@dataclass(frozen=True, eq=False)
class Geometry(Result):
    """Of a site. Not a number where there are fewer than two steps.

    Attributes:
        steps: How many steps there are, without those left out.
        not_finite: How many steps have a value that is not finite; they count for nothing else.
        participation_ratio: Between 1 and H; not a number where nothing moves.
        dimensions: How many components hold 90 % of the variance.
        components: (H,) their numbers, from that of the largest variance.
        variance: (H,) of the states along each component, with N - 1.
        share: (H,) of the whole variance.
        mean: (H,) of each unit.
        directions: (H, H) a row for each component, of length 1; the entry that is largest in size
            is positive.
    """

    index_field: ClassVar[str] = "components"
    excluded_columns: ClassVar[tuple[str, ...]] = ("mean",)

    steps: int
    not_finite: int
    participation_ratio: float
    dimensions: int
    components: Integers
    variance: Array
    share: Array
    mean: Array
    directions: Array

    def project(self, states: Array, count: int = 2) -> Array:
        """States in terms of the first components: (..., H) to (..., count)."""
        return np.asarray((states - self.mean) @ self.directions[:count].T)


def geometry(site: SiteLike, quantity: str = "hidden") -> Geometry:
    """Find the principal components of the states over all steps of all sequences.

    The covariance is summed in float64 in one pass; the memory is that of a few (H, H) matrices.

    Args:
        site: With the quantity.
        quantity: hidden, or another one.

    Raises:
        NotRecordedError: It was not recorded.
        OptionError: The site has no units.
    """
    data = as_site_data(site)
    data.require(quantity)
    width = data.rows(quantity).shape[1]
    if not width:
        raise OptionError(f"{data.name!r}: expected at least one unit, found none")
    found = reduce_rows(data, (quantity,), partial(Comoments, width))
    some = found.count > 1
    covariance = found.products / max(1, found.count - 1)
    variance, directions = np.linalg.eigh(covariance)
    variance = np.maximum(variance[::-1], 0.0)
    directions = directions.T[::-1]
    largest = np.abs(directions).argmax(1)[:, np.newaxis]
    directions = directions * np.sign(np.take_along_axis(directions, largest, 1))
    total = float(variance.sum())
    moves = some and total > 0
    share = variance / total if moves else np.full(width, np.nan)
    return Geometry(
        site=data.name,
        steps=found.count,
        not_finite=found.not_finite,
        participation_ratio=total**2 / float(variance @ variance) if moves else np.nan,
        dimensions=1 + int(np.searchsorted(np.cumsum(share), 0.9)) if moves else 0,
        components=np.arange(width),
        variance=variance if some else np.full(width, np.nan),
        share=share,
        mean=found.mean if found.count else np.full(width, np.nan),
        directions=directions,
    )


class Comoments:
    """Mean and sum of products of deviations from it, joined as Chan, Golub and LeVeque (1983) do.

    Args:
        width: H.

    Attributes:
        count: Rows, without those left out.
        not_finite: Rows with a value that is not finite.
        mean: (H,) float64.
        products: (H, H) float64, sum over rows of the outer product of the deviations.
    """

    def __init__(self, width: int) -> None:
        self.count = self.not_finite = 0
        self.mean, self.products = np.zeros(width), np.zeros((width, width))

    def add(self, rows: Mapping[str, Array]) -> None:
        """Take in a block, (n, H)."""
        (block,) = rows.values()
        exact = block.astype(np.float64)
        with np.errstate(invalid="ignore"):
            total = exact.sum(0)
        if not np.isfinite(total).all():
            finite = np.isfinite(exact).all(1)
            self.not_finite += int(np.count_nonzero(~finite))
            exact = exact[finite]
            total = exact.sum(0)
        if len(exact):
            mean = total / len(exact)
            exact -= mean
            self._join(len(exact), mean, exact.T @ exact)

    def merge(self, later: Comoments) -> None:
        """Take in what another has of later rows."""
        self.not_finite += later.not_finite
        if later.count:
            self._join(later.count, later.mean, later.products)

    def _join(self, count: int, mean: Array, products: Array) -> None:
        delta, total = mean - self.mean, self.count + count
        self.products += products + np.outer(delta, delta) * (self.count * count / total)
        self.mean += delta * (count / total)
        self.count = total
