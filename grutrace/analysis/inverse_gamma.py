"""The distribution of timescales over units, and how well an inverse gamma distribution fits it.

Mahto, Vo, Turek and Huth (2021), "Multi-timescale representation learning in LSTM language models"
(ICLR), show why it is this one: where T is inverse gamma with shape a and scale b, units that each
forget as exp(-t / T) forget together as a power of time,

    integral exp(-t / T) p(T) dT = (1 + t / b)^(-a),

which is how dependence fades in natural language. (They found a = 0.56 and b = 1.) 1/T then has a
gamma distribution of shape a and rate b, so the fit is that of a gamma distribution to 1/T.

n timescales.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from grutrace.record import Array

#: Samples of the fitted distribution that the distance of the data is judged by.
SAMPLES = 999

#: With fewer timescales there is no fit.
FEWEST = 8

#: Steps of Newton's method. It converges in about four (Minka 2002).
_ROUNDS = 12


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
    finite = np.asarray(timescales, np.float64)
    finite = finite[np.isfinite(finite) & (finite > 0)]
    if len(finite) < FEWEST or np.ptp(finite) <= 1e-9 * finite.max():
        return InverseGamma(len(finite), *[float("nan")] * 6)
    rates = 1 / finite
    shape, scale = (each.item() for each in _fit(rates))
    shape_error, scale_error = _errors(shape, scale, len(rates))
    distance = _distance(rates, shape, scale).item()
    samples = np.random.default_rng(seed).gamma(shape, 1 / scale, (SAMPLES, len(rates)))
    # A small shape makes rates that are 0 in float64.
    samples = np.maximum(samples, np.finfo(np.float64).tiny)
    others = _distance(samples, *_fit(samples))
    p_value = (1 + np.count_nonzero(others >= distance)) / (1 + SAMPLES)
    return InverseGamma(
        len(rates), shape, shape_error, scale, scale_error, distance, float(p_value)
    )


def _fit(rates: Array) -> tuple[Array, Array]:
    """The shape and rate of the gamma distribution of (..., n) values: (...,) each.

    Minka (2002), "Estimating a gamma distribution", equation 11: Newton's method on 1 / shape.
    """
    mean = rates.mean(axis=-1)
    apart = np.log(mean) - np.log(rates).mean(axis=-1)
    shape = np.asarray(0.5 / apart)
    for _ in range(_ROUNDS):
        digamma, trigamma = _digamma(shape), _trigamma(shape)
        step = (np.log(shape) - digamma - apart) / (shape**2 * (1 / shape - trigamma))
        shape = 1 / (1 / shape + step)
    return shape, shape / mean


def _errors(shape: float, scale: float, count: int) -> tuple[float, float]:
    """Standard errors: of the inverse of the Fisher information of n values."""
    trigamma = _trigamma(np.array(shape)).item()
    determinant = (shape * trigamma - 1) / scale**2
    variances = shape / scale**2 / determinant, trigamma / determinant
    return tuple(float(np.sqrt(each / count)) for each in variances)  # type: ignore[return-value]


def _distance(rates: Array, shape: Any, scale: Any) -> Array:
    """(...,) Kolmogorov and Smirnov's, of (..., n) values."""
    import torch

    ordered = np.sort(rates, axis=-1)
    count = ordered.shape[-1]
    at = ordered * np.asarray(scale)[..., np.newaxis]
    shapes = np.broadcast_to(np.asarray(shape, np.float64)[..., np.newaxis], at.shape)
    fitted = torch.special.gammainc(torch.tensor(shapes), torch.tensor(at)).numpy()
    upper = np.arange(1, count + 1) / count - fitted
    lower = fitted - np.arange(count) / count
    return np.asarray(np.maximum(upper, lower).max(axis=-1))


def _digamma(values: Array) -> Array:
    import torch

    return np.asarray(torch.digamma(torch.tensor(values)).numpy())


def _trigamma(values: Array) -> Array:
    import torch

    return np.asarray(torch.polygamma(1, torch.tensor(values)).numpy())
