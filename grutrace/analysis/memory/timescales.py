"""How long each unit remembers: from its update gate, and from its states.

A unit that keeps the share z of its state at every step has, n steps later, z^n of it left: it
forgets as exp(-n / tau), with

    tau = -1 / log z     steps

(Tallec and Ollivier 2018, "Can recurrent neural networks warp time?"; their time 1 / (1 - z) is
half a step longer, or nearly so.) Where z changes, what is left after n steps is a product, and the
rate is the mean of log z: that of the *geometric* mean of z. The rate of the *arithmetic* mean of z
is never the faster one; how far the two are apart says how unevenly a unit forgets.

z is PyTorch's update gate: where it is 1 the previous state is kept.

N steps, H units.

The distribution of timescales over units, and how well an inverse gamma distribution fits it.

Mahto, Vo, Turek and Huth (2021), "Multi-timescale representation learning in LSTM language models"
(ICLR), show why it is this one: where T is inverse gamma with shape a and scale b, units that each
forget as exp(-t / T) forget together as a power of time,

    integral exp(-t / T) p(T) dT = (1 + t / b)^(-a),

which is how dependence fades in natural language. (They found a = 0.56 and b = 1.) 1/T then has a
gamma distribution of shape a and rate b, so the fit is that of a gamma distribution to 1/T.

n timescales.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from grutrace.analysis.engine.map_reduce import reduce_rows
from grutrace.analysis.engine.result import Result
from grutrace.analysis.engine.site_data import SiteLike, as_site_data
from grutrace.analysis.memory.autocorrelation import autocorrelation
from grutrace.errors import require_extra
from grutrace.records import Array
from grutrace.storage.read.sequence_index import Integers

#: Samples of the fitted distribution that the distance of the data is judged by.
SAMPLES = 999

#: With fewer timescales there is no fit.
FEWEST = 8

#: Timescales that differ by less than this, relative to the largest, count as equal: there is no
#: distribution to fit.
SAME = 1e-5


@dataclass(frozen=True)
class InverseGamma:
    """A fit of greatest likelihood. Not a number where there is none.

    Attributes:
        count: n, finite timescales above 0 that were fitted.
        shape: a; the smaller, the more long timescales.
        shape_error: Its standard error, from the Fisher information: for large n.
        scale: b, in steps.
        scale_error: Its standard error, in steps.
        distance: The largest difference between the distribution of the timescales and the
            fitted one (Kolmogorov and Smirnov).
        p_value: The share of samples drawn from the fitted distribution, and fitted in turn, that
            are at least as far from their fit. Below 0.05 or so the distribution is another one.
    """

    count: int
    shape: float
    shape_error: float
    scale: float
    scale_error: float
    distance: float
    p_value: float


def fit_inverse_gamma(timescales: Array, seed: int = 0) -> InverseGamma:
    """Fit timescales, (n,) in steps; those that are 0, infinite or not a number are left out.

    There is no fit to fewer than `FEWEST`, or to timescales that are all the same.

    Args:
        timescales: One a unit.
        seed: Of the samples behind the p-value.
    """
    stats, special = _import_scipy()
    finite = np.asarray(timescales, np.float64)
    finite = finite[np.isfinite(finite) & (finite > 0)]
    if len(finite) < FEWEST or np.ptp(finite) <= SAME * finite.max():
        return InverseGamma(len(finite), *[float("nan")] * 6)

    def fit(rates: Array) -> tuple[float, float]:
        # Exact for a gamma distribution with a fixed location; for invgamma SciPy searches.
        shape, _, inverse_rate = stats.gamma.fit(rates, floc=0)
        return float(shape), 1 / float(inverse_rate)

    def distance(rates: Array, shape: Array, scale: Array) -> Array:
        """(m,) Kolmogorov-Smirnov distances of (m, n) values from m gamma distributions."""
        count = rates.shape[1]
        expected = special.gammainc(shape[:, None], np.sort(rates, axis=1) * scale[:, None])
        above = np.arange(1, count + 1) / count - expected
        below = expected - np.arange(count) / count
        return np.asarray(np.maximum(above, below).max(axis=1))

    rates = 1 / finite
    shape, scale = fit(rates)
    (observed,) = distance(rates[None], np.array([shape]), np.array([scale]))
    samples = np.random.default_rng(seed).gamma(shape, 1 / scale, (SAMPLES, len(rates)))
    # A small shape gives rates that underflow to 0.
    samples = np.maximum(samples, np.finfo(np.float64).tiny)
    simulated = distance(samples, *np.transpose([fit(sample) for sample in samples]))
    p_value = (1 + np.count_nonzero(simulated >= observed)) / (1 + SAMPLES)
    # The inverse of the Fisher information of n values.
    trigamma = float(special.polygamma(1, shape))
    information = len(rates) * (shape * trigamma - 1)
    return InverseGamma(
        count=len(rates),
        shape=shape,
        shape_error=float(np.sqrt(shape / information)),
        scale=scale,
        scale_error=float(scale * np.sqrt(trigamma / information)),
        distance=float(observed),
        p_value=float(p_value),
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
    """Of a site, in steps.

    Attributes:
        steps: N, of all sequences together.
        units: (H,) numbers of the units.
        tau: (H,) -1 over the mean of log z: 0 if the gate was ever 0 exactly, which empties the
            unit, and infinite if it was always 1. Not a number where there are no steps.
        tau_of_mean: (H,) -1 / log of the mean of z.
        tau_of_states: (H,) the lag at which the autocorrelation of the states falls to 1/e: how
            long a state lasts, whether it is kept or written anew. See `autocorrelation`. Not a
            number where the hidden states were not recorded.
        invalid_steps: (H,) number of steps where z is NaN or outside [0, 1]. They are skipped.
        fitted: How many units the fit is of: those whose tau is finite and not 0.
        shape: Shape of the inverse gamma distribution of tau over units; see `InverseGamma`. Not a
            number, like all that follows, where there are fewer than 8 units or all are alike.
        shape_error: Its standard error.
        scale: Its scale, in steps.
        scale_error: Its standard error, in steps.
        fit_distance: The largest difference between the two distributions.
        fit_p: The share of samples of the fitted distribution that are as far from their fit. Below
            0.05 or so the fit does not describe these units.
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


def timescales(site: SiteLike, lags: int | None = None) -> Timescales:
    """Work out how long each unit remembers.

    Args:
        site: With update; with hidden, too, for `tau_of_states`.
        lags: How far states are compared with themselves; as for `autocorrelation`.

    Raises:
        NotRecordedError: The update gate was not recorded.
        OptionError: The lags are no number of steps.
    """
    _import_scipy()  # Before the rows are read.
    data = as_site_data(site)
    rates = reduce_rows(data, ("update",), partial(_RateSums, len(data.units)))
    count = np.where(rates.count > 0, rates.count, np.nan)
    with np.errstate(divide="ignore", invalid="ignore"):
        # By what is missing from 1, which may be little.
        tau_of_mean = -1 / np.log1p(-rates.written / count)
        tau = -1 / (rates.logs / count)
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
        invalid_steps=data.steps - rates.count,
        fitted=fit.count,
        shape=fit.shape,
        shape_error=fit.shape_error,
        scale=fit.scale,
        scale_error=fit.scale_error,
        fit_distance=fit.distance,
        fit_p=fit.p_value,
    )


class _RateSums:
    """Sums over steps, of each unit: of log z, and of 1 - z."""

    def __init__(self, width: int) -> None:
        self.count = np.zeros(width, np.int64)
        self.logs, self.written = np.zeros(width), np.zeros(width)

    def add(self, rows: Mapping[str, Array]) -> None:
        (block,) = rows.values()
        update = block.astype(np.float64)
        valid = (update >= 0) & (update <= 1)
        if not valid.all():
            update[~valid] = 1.0  # Which adds nothing to either.
        self.count += np.count_nonzero(valid, axis=0)
        with np.errstate(divide="ignore"):
            self.logs += np.log(update).sum(axis=0)
        self.written += (1 - update).sum(axis=0)

    def merge(self, later: _RateSums) -> None:
        self.count += later.count
        self.logs += later.logs
        self.written += later.written
