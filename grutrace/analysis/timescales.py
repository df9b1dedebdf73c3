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
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np

from grutrace.analysis.autocorrelation import autocorrelation
from grutrace.analysis.fold import fold_rows
from grutrace.analysis.inverse_gamma import fit_inverse_gamma
from grutrace.analysis.material import Analysed, material
from grutrace.analysis.result import Result
from grutrace.record import Array
from grutrace.storage.index import Integers


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
        no_gate: (H,) in how many steps z is not from 0 to 1, or not a number; these are left out.
        fitted: How many units the fit is of: those whose tau is finite and not 0.
        shape: Shape of the inverse gamma distribution of tau over units; see `inverse_gamma`. Not a
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
    no_gate: Integers
    fitted: int
    shape: float
    shape_error: float
    scale: float
    scale_error: float
    fit_distance: float
    fit_p: float


def timescales(site: Analysed, lags: int | None = None) -> Timescales:
    """Work out how long each unit remembers.

    Args:
        site: With update; with hidden, too, for `tau_of_states`.
        lags: How far states are compared with themselves; as for `autocorrelation`.

    Raises:
        NotRecordedError: The update gate was not recorded.
        OptionError: The lags are no number of steps.
    """
    of = material(site)
    rates = fold_rows(of, ("update",), partial(_Rates, len(of.units)))
    count = np.where(rates.count > 0, rates.count, np.nan)
    with np.errstate(divide="ignore", invalid="ignore"):
        # By what is missing from 1, which may be little.
        tau_of_mean = -1 / np.log1p(-rates.written / count)
        tau = -1 / (rates.logs / count)
    fit = fit_inverse_gamma(tau)
    states = np.full(len(of.units), np.nan)
    if "hidden" in of.quantities:
        states = autocorrelation(of, lags).efolding
    return Timescales(
        site=of.name,
        steps=of.steps,
        units=of.units,
        tau=np.abs(tau),
        tau_of_mean=np.abs(tau_of_mean),
        tau_of_states=states,
        no_gate=of.steps - rates.count,
        fitted=fit.count,
        shape=fit.shape,
        shape_error=fit.shape_error,
        scale=fit.scale,
        scale_error=fit.scale_error,
        fit_distance=fit.distance,
        fit_p=fit.p_value,
    )


class _Rates:
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

    def merge(self, later: _Rates) -> None:
        self.count += later.count
        self.logs += later.logs
        self.written += later.written
