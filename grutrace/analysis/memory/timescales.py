"""Timescales of units, from update gates and from states, and an inverse gamma fit over units.

A unit whose update gate is z keeps z^n of its state after n steps. It forgets as exp(-n / tau),
with

    tau = -1 / log z     steps

(Tallec and Ollivier 2018, "Can recurrent neural networks warp time?"; their 1 / (1 - z) is about
half a step longer). Where z changes, the remaining share is a product, so the rate is the mean of
log z: the *geometric* mean of z. The rate of the *arithmetic* mean of z is never larger. The
difference between the two shows how unevenly a unit forgets.

z is PyTorch's update gate: where it is 1 the previous state is kept.

The timescales of all units are fitted by an inverse gamma distribution. Mahto, Vo, Turek and Huth
(2021), "Multi-timescale representation learning in LSTM language models" (ICLR), explain the
choice: if T is inverse gamma with shape a and scale b, then units that each forget as exp(-t / T)
forget together as a power law,

    integral exp(-t / T) p(T) dT = (1 + t / b)^(-a),

which is how dependence decays in natural language. (They found a = 0.56 and b = 1.) 1/T has a gamma
distribution with shape a and rate b, so a gamma distribution is fitted to 1/T.

N steps, H units, n timescales.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from grutrace.analysis.engine.map_reduce import summarize_rows
from grutrace.analysis.engine.result import Result
from grutrace.analysis.engine.site_data import SiteLike, as_site_data
from grutrace.analysis.memory.autocorrelation import autocorrelation
from grutrace.errors import require_extra
from grutrace.records import Array
from grutrace.storage.read.sequence_index import Integers

#: Number of samples of the parametric bootstrap.
SAMPLES = 999

#: Smallest number of timescales for a fit.
FEWEST = 8

#: Timescales that differ by less than this, relative to the largest, count as equal: there is no
#: distribution to fit.
SAME = 1e-5


@dataclass(frozen=True)
class InverseGamma:
    """A maximum likelihood fit of an inverse gamma distribution. NaN where there is no fit.

    Attributes:
        count: n, number of finite positive timescales that were fitted.
        shape: a. A smaller shape means more long timescales.
        shape_error: Standard error of the shape, from the Fisher information (valid for large n).
        scale: b, in steps.
        scale_error: Standard error of the scale, in steps.
        distance: Kolmogorov-Smirnov distance between the timescales and the fit.
        p_value: Parametric bootstrap: share of samples drawn from the fit, and fitted again, with
            at least this distance. Below about 0.05 the distribution is a different one.
    """

    count: int
    shape: float
    shape_error: float
    scale: float
    scale_error: float
    distance: float
    p_value: float


def fit_inverse_gamma(timescales: Array, seed: int = 0) -> InverseGamma:
    """Fit an inverse gamma distribution to timescales by maximum likelihood.

    Values that are 0, infinite or NaN are skipped. There is no fit for fewer than `FEWEST` values
    or for values that are equal up to `SAME`.

    Args:
        timescales: (n,) in steps.
        seed: Seed of the samples behind the p-value.

    Returns:
        The fit, with all numbers but `count` NaN where there is none.

    Raises:
        MissingExtraError: SciPy is not installed.

    Examples:
        >>> import numpy as np
        >>> from grutrace.analysis import fit_inverse_gamma
        >>> random = np.random.default_rng(0)
        >>> fit = fit_inverse_gamma(1 / random.gamma(shape=0.56, scale=1.0, size=2000))
        >>> abs(fit.shape - 0.56) < 3 * fit.shape_error
        True
    """
    stats, special = _import_scipy()
    finite = np.asarray(timescales, np.float64)
    finite = finite[np.isfinite(finite) & (finite > 0)]
    if len(finite) < FEWEST or np.ptp(finite) <= SAME * finite.max():
        return InverseGamma(len(finite), *[float("nan")] * 6)

    class PositiveGamma(type(stats.gamma)):  # type: ignore[misc]
        def rvs(self, *args: Any, **options: Any) -> Array:
            # A small shape gives rates that underflow to 0, which no gamma distribution fits.
            rates: Array = super().rvs(*args, **options)
            return np.maximum(rates, np.finfo(np.float64).tiny)

    # With a fixed location the fit of gamma is exact; for invgamma SciPy searches.
    test = stats.goodness_of_fit(
        PositiveGamma(a=0.0, name="gamma"),
        1 / finite,
        known_params={"loc": 0},
        statistic="ks",
        n_mc_samples=SAMPLES,
        rng=np.random.default_rng(seed),
    )
    shape, scale = float(test.fit_result.params.a), 1 / float(test.fit_result.params.scale)
    # The inverse of the Fisher information of n values.
    trigamma = float(special.polygamma(1, shape))
    information = len(finite) * (shape * trigamma - 1)
    return InverseGamma(
        count=len(finite),
        shape=shape,
        shape_error=float(np.sqrt(shape / information)),
        scale=scale,
        scale_error=float(scale * np.sqrt(trigamma / information)),
        distance=float(test.statistic),
        p_value=float(test.pvalue),
    )


def _import_scipy() -> tuple[Any, Any]:
    """Import `scipy.stats` and `scipy.special`.

    Raises:
        MissingExtraError: SciPy is not installed.
    """
    with require_extra("the fit of timescales", "analysis"):
        from scipy import special, stats
    return stats, special


@dataclass(frozen=True, eq=False)
class Timescales(Result):
    """Timescales of the units of a site, in steps.

    Attributes:
        steps: N, number of steps of all sequences.
        units: (H,) numbers of the units.
        tau: (H,) -1 over the mean of log z. 0 if the gate was ever exactly 0, which resets the
            unit; infinite if it was always 1; NaN where there are no steps.
        tau_of_mean: (H,) -1 / log of the mean of z.
        tau_of_states: (H,) lag at which the autocorrelation of the states falls to 1/e, see
            `autocorrelation`. NaN where the hidden states were not recorded.
        invalid_steps: (H,) number of steps where z is NaN or outside [0, 1]. They are skipped.
        fitted: Number of units with a finite positive tau, which are fitted.
        shape: Shape of the inverse gamma fit of tau, see `InverseGamma`. This and the following are
            NaN for fewer than 8 units or if all are equal.
        shape_error: Standard error of the shape.
        scale: Scale of the fit, in steps.
        scale_error: Standard error of the scale, in steps.
        fit_distance: Kolmogorov-Smirnov distance between the timescales and the fit.
        fit_p: p-value of the fit. Below about 0.05 the fit does not describe these units.
    """

    steps: int
    units: Integers
    tau: Array
    tau_of_mean: Array
    tau_of_states: Array
    invalid_steps: Integers
    fitted: int
    shape: float
    shape_error: float
    scale: float
    scale_error: float
    fit_distance: float
    fit_p: float

    def fitted_share(self, times: Array) -> Array:
        """Share of units that the fitted distribution gives a timescale of at least each time.

        Args:
            times: (n,) in steps, above 0.

        Returns:
            (n,) shares; NaN where there is no fit.

        Raises:
            MissingExtraError: SciPy is not installed.
        """
        _, special = _import_scipy()
        rates = self.scale / np.asarray(times, np.float64)
        return np.asarray(special.gammainc(self.shape, rates))


def timescales(site: SiteLike, lags: int | None = None) -> Timescales:
    """Compute the number of steps over which each unit keeps its state.

    Args:
        site: A site with the update gate; with hidden states also for `tau_of_states`.
        lags: Largest lag of the autocorrelation, as for `autocorrelation`.

    Returns:
        The timescales of each unit. The equations are those of the module.

    Raises:
        MissingExtraError: SciPy is not installed.
        NotRecordedError: The update gate was not recorded.
        OptionError: `lags` is not an integer of 0 or more.

    Examples:
        A constant gate z has the timescale -1 / log z.

        >>> import numpy as np
        >>> from grutrace.analysis import SiteArrays, timescales
        >>> timescales(SiteArrays(update=np.full((10, 2), np.exp([-1.0, -0.1])))).tau.round(6)
        array([ 1., 10.])
    """
    _import_scipy()  # Before the rows are read.
    data = as_site_data(site)
    sums = summarize_rows(data, ("update",), _rate_sums)
    count = np.where(sums["count"] > 0, sums["count"], np.nan)
    with np.errstate(divide="ignore", invalid="ignore"):
        # log1p is accurate where the mean is close to 1.
        tau_of_mean = -1 / np.log1p(-sums["written"] / count)
        tau = -1 / (sums["logs"] / count)
    fit = fit_inverse_gamma(tau)
    states = np.full(len(data.units), np.nan)
    if "hidden" in data.quantities:
        states = autocorrelation(data, lags).efolding
    return Timescales(
        site=data.name,
        steps=data.steps,
        units=data.units,
        tau=np.abs(tau),
        tau_of_mean=np.abs(tau_of_mean),
        tau_of_states=states,
        invalid_steps=data.steps - sums["count"],
        fitted=fit.count,
        shape=fit.shape,
        shape_error=fit.shape_error,
        scale=fit.scale,
        scale_error=fit.scale_error,
        fit_distance=fit.distance,
        fit_p=fit.p_value,
    )


def _rate_sums(rows: Mapping[str, Array]) -> dict[str, Array]:
    """Sum log z and 1 - z over steps, for each unit."""
    (block,) = rows.values()
    update = block.astype(np.float64)
    valid = (update >= 0) & (update <= 1)
    update[~valid] = 1.0  # Which adds nothing to either sum.
    with np.errstate(divide="ignore"):
        logs = np.log(update).sum(axis=0)
    written = (1 - update).sum(axis=0)
    return {"count": np.count_nonzero(valid, axis=0), "logs": logs, "written": written}
