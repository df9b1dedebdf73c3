"""Geometry of the states: principal components and participation ratio.

With C the covariance of the states over all steps, and l its eigenvalues,

    participation ratio = (sum of l)^2 / (sum of l^2).

It is H where all directions have the same variance, and 1 where only one has any (Abbott, Rajan and
Sompolinsky 2011, "Interactions between intrinsic and stimulus-evoked activity in recurrent neural
networks"; Gao et al. 2017, "A theory of multineuronal dimensionality, dynamics and measurement").

N steps, H units, k components.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from grutrace.analysis.engine.blas import single_blas_thread
from grutrace.analysis.engine.map_reduce import summarize_rows
from grutrace.analysis.engine.result import Result
from grutrace.analysis.engine.site_data import SiteLike, as_site_data
from grutrace.errors import OptionError
from grutrace.records import Array
from grutrace.storage.read.sequence_index import Integers


@dataclass(frozen=True, eq=False)
class Geometry(Result):
    """Principal components of the states of a site. NaN where there are fewer than two steps.

    Attributes:
        steps: Number of steps used.
        not_finite: Number of steps with a value that is not finite. They are skipped.
        participation_ratio: Between 1 and H; NaN where no unit varies.
        dimensions: Number of components that hold 90 % of the variance.
        components: (H,) their numbers, by decreasing variance.
        variance: (H,) variance along each component, with N - 1 in the denominator.
        share: (H,) share of the total variance.
        mean: (H,) mean of each unit.
        directions: (H, H) one unit vector a row; its largest entry in magnitude is positive.
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
        """Project states on the first components: (..., H) to (..., count).

        Args:
            states: (..., H).
            count: Number of components.
        """
        return np.asarray((states - self.mean) @ self.directions[:count].T)


def geometry(site: SiteLike, quantity: str = "hidden") -> Geometry:
    """Compute the principal components of the states over all steps of all sequences.

    The covariance is accumulated in float64 in one pass, in the memory of a few (H, H) matrices.

    Args:
        site: A site with the quantity.
        quantity: hidden, another quantity of the units, or input.

    Returns:
        The components and the participation ratio.

    Raises:
        NotRecordedError: The quantity was not recorded.
        OptionError: The site has no units.

    Examples:
        Two units that always move together have one direction of variance.

        >>> import numpy as np
        >>> from grutrace.analysis import SiteArrays, geometry
        >>> states = np.random.default_rng(0).uniform(-1, 1, (100, 1)) * [0.6, 0.8]
        >>> result = geometry(SiteArrays(hidden=states))
        >>> round(result.participation_ratio, 6), result.directions[0].round(6)
        (1.0, array([0.6, 0.8]))
    """
    data = as_site_data(site)
    data.require(quantity)
    width = data.rows(quantity).shape[1]
    if not width:
        raise OptionError(f"{data.name!r}: expected at least one unit, found none")
    with single_blas_thread():
        sums = summarize_rows(data, (quantity,), comoments, Comoments.merge)
    has_variance = sums.count > 1
    covariance = sums.products / max(1, sums.count - 1)
    variance, directions = np.linalg.eigh(covariance)
    variance = np.maximum(variance[::-1], 0.0)
    directions = directions.T[::-1]
    largest = np.abs(directions).argmax(1)[:, np.newaxis]
    directions = directions * np.sign(np.take_along_axis(directions, largest, 1))
    total = float(variance.sum())
    varies = has_variance and total > 0
    share = variance / total if varies else np.full(width, np.nan)
    return Geometry(
        site=data.name,
        steps=sums.count,
        not_finite=sums.not_finite,
        participation_ratio=total**2 / float(variance @ variance) if varies else np.nan,
        dimensions=1 + int(np.searchsorted(np.cumsum(share), 0.9)) if varies else 0,
        components=np.arange(width),
        variance=variance if has_variance else np.full(width, np.nan),
        share=share,
        mean=sums.mean if sums.count else np.full(width, np.nan),
        directions=directions,
    )


@dataclass
class Comoments:
    """Mean and sum of products of deviations, merged as by Chan, Golub and LeVeque (1983).

    Attributes:
        count: Number of finite rows.
        not_finite: Number of rows with a value that is not finite.
        mean: (H,) float64.
        products: (H, H) float64, sum over rows of the outer product of the deviations.
    """

    count: int
    not_finite: int
    mean: Array
    products: Array

    def merge(self, later: Comoments) -> None:
        """Add later rows."""
        self.not_finite += later.not_finite
        total = self.count + later.count
        if later.count:
            delta = later.mean - self.mean
            self.products += later.products
            self.products += np.outer(delta, delta) * (self.count * later.count / total)
            self.mean += delta * (later.count / total)
            self.count = total


def comoments(rows: Mapping[str, Array]) -> Comoments:
    """Compute the comoments of a block, (n, H)."""
    (block,) = rows.values()
    exact = block.astype(np.float64)
    with np.errstate(invalid="ignore"):
        total = exact.sum(0)
    if not np.isfinite(total).all():
        exact = exact[np.isfinite(exact).all(1)]
        total = exact.sum(0)
    mean = total / max(1, len(exact))
    exact -= mean
    return Comoments(len(exact), len(block) - len(exact), mean, exact.T @ exact)
