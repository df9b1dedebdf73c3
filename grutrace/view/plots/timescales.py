"""How long units remember: the distribution of their timescales, and autocorrelation."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes

from grutrace.analysis.memory.autocorrelation import Autocorrelation
from grutrace.analysis.memory.timescales import Timescales
from grutrace.reprs import plural
from grutrace.view.plots.axes import COLORS, GREY, make_axes, set_title, strip_spines

#: Lags are drawn that have at least this share of the pairs of lag 0.
MIN_PAIRS = 0.1

#: Fits with a p-value below this do not describe the units.
REJECTED = 0.05


def plot_timescales(found: Timescales, ax: Axes | None = None) -> Axes:
    """Draw the share of units with at least each timescale, and the fitted distribution.

    Args:
        found: The timescales of a site.
        ax: The axes to draw in.
    """
    ax = make_axes(ax)
    tau = found.tau
    known = tau[~np.isnan(tau)]
    drawn = np.sort(known[np.isfinite(known) & (known > 0)])
    shares = 1 - (np.searchsorted(np.sort(known), drawn, "left")) / max(1, len(known))
    ax.plot(drawn, shares, "o", color=COLORS[0], markersize=4, label="units")
    fit = ""
    if np.isfinite(found.shape) and len(drawn):
        times = np.geomspace(drawn[0] / 1.5, drawn[-1] * 1.5, 200)
        rejected = found.fit_p < REJECTED
        ax.plot(
            times, found.fitted_share(times) * len(drawn) / len(known), "--", color=COLORS[1],
            label=f"inverse gamma, shape {found.shape:.2g} ± {found.shape_error:.1g}",
        )  # fmt: skip
        fit = f"fit {'rejected' if rejected else 'not rejected'}, p = {found.fit_p:.2g}"
    if len(drawn):
        ax.set_xscale("log")
        ax.legend(frameon=False, fontsize=8)
    ax.set_ylim(0, 1.05)
    ax.set_xlabel("timescale tau in steps")
    ax.set_ylabel("share of units with at least tau")
    strip_spines(ax)
    zero, endless = int((known == 0).sum()), int(np.isinf(known).sum())
    set_title(
        ax,
        found.site,
        "timescales of the units",
        (
            fit,
            f"{plural(zero, 'unit')} with tau 0 not drawn" if zero else "",
            f"{plural(endless, 'unit')} never forgot" if endless else "",
        ),
    )
    return ax


def plot_autocorrelation(found: Autocorrelation, ax: Axes | None = None) -> Axes:
    """Draw the autocorrelation of the hidden states: the median over units, quantiles, extremes.

    Args:
        found: The autocorrelation of a site.
        ax: The axes to draw in.
    """
    ax = make_axes(ax)
    # At the last lags there are few pairs of steps.
    lags = np.flatnonzero(found.pairs >= MIN_PAIRS * found.pairs[0])
    correlation = found.correlation[lags]
    is_known = np.isfinite(correlation).all(axis=0)
    known, numbers = correlation[:, is_known], found.units[is_known]
    if known.shape[1]:
        low, median, high = np.quantile(known, [0.1, 0.5, 0.9], axis=1)
        ax.fill_between(
            lags, low, high, color=COLORS[0], alpha=0.25, linewidth=0, label="10 % to 90 % of units"
        )
        ax.plot(lags, median, color=COLORS[0], label="median of the units")
        slowest = int(known.sum(axis=0).argmax())
        ax.plot(lags, known[:, slowest], "--", color=COLORS[1], label=f"unit {numbers[slowest]}")
    for level in (0.0, np.exp(-1)):
        ax.axhline(level, color=GREY, linewidth=0.7, zorder=0)
    ax.text(1.0, np.exp(-1), " 1/e", transform=ax.get_yaxis_transform(), va="center", fontsize=8)
    ax.set_xlabel("lag in steps")
    ax.set_ylabel("autocorrelation of h")
    ax.set_ylim(min(-0.2, ax.get_ylim()[0]), 1.05)
    strip_spines(ax)
    if len(numbers):
        ax.legend(frameon=False, fontsize=8)
    left_out = len(found.units) - len(numbers)
    set_title(
        ax,
        found.site,
        "autocorrelation of the hidden state",
        (
            "dashed: the unit with the largest sum" if len(numbers) else "",
            f"{plural(left_out, 'constant unit')} not drawn" if left_out else "",
        ),
    )
    return ax
