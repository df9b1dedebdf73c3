"""Lyapunov exponents: whether a network forgets small differences between states or amplifies them.

Two nearby states with the same input differ after t steps by the product of the steps' Jacobians
times their initial difference. Its directions grow or shrink as exp(lambda_i t). The lambda_i are
the exponents, in decreasing order, in nats a step. A positive exponent means chaos: a difference as
small as rounding grows as large as the states, so a run on another machine, or from states that
were stored with fewer digits, soon takes a different course.

Method: k orthonormal directions are multiplied by the Jacobian of every recorded step, and
orthonormalized by QR every few steps. The exponents are the sum of log |R_ii| over the number of
steps (Benettin et al. 1980; Geist, Parlitz and Lauterborn 1990). Between two QRs the directions
turn towards the one that grows most, which costs the others as many digits as the ratio of their
sizes has. So the number of steps is chosen by the growth that the last ones had (`SPREAD` in
growth.py), and what lost too many digits (`MAX_SPREAD`) is repeated in fewer steps. For GRUs: Can,
Krishnamurthy and Schwab (2020); Engelken, Wolf and Abbott (2023), "Lyapunov spectra of chaotic
recurrent neural networks". The Jacobians are taken at the recorded states, so the trajectory does
not drift.

H units, k exponents, B sequences that are processed together.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np

from grutrace.analysis.dynamics.growth import GrowthSums
from grutrace.analysis.dynamics.jacobian import REQUIRED, require_all_units
from grutrace.analysis.engine.map_reduce import reduce_sequences
from grutrace.analysis.engine.result import Result
from grutrace.analysis.engine.segments import PREVIOUS, RESTARTS, WEIGHTS
from grutrace.analysis.engine.site_data import SiteLike, as_site_data, row_bytes
from grutrace.errors import OptionError, short_repr
from grutrace.records import Array
from grutrace.storage.read.sequence_index import Integers

#: Default number of exponents.
EXPONENTS = 10

#: Share of each sequence that is skipped by default, in which the random directions align.
TRANSIENT = 0.1

#: Largest number of blocks for the standard errors, and smallest number of steps in a block.
BLOCKS, MIN_BLOCK_STEPS = 32, 10

#: Smallest number of counted steps for a statement about chaos. Jacobians of single steps are not
#: normal: even in a network that forgets everything, differences can grow for a few steps, and
#: shorter sequences show nothing else.
MIN_LENGTH = 50

#: Number of values of a quantity in the sequences that one thread processes.
PART_VALUES = 512 * 1024


@dataclass(frozen=True, eq=False)
class Lyapunov(Result):
    """Lyapunov exponents along the sequences of a site.

    Values are NaN where no step was counted or a value is not finite.

    Attributes:
        units: H.
        sequences: Number of sequences.
        steps: Number of counted steps, of all sequences.
        numbers: (k,) 1 for the largest exponent, and so on.
        exponents: (k,) in nats a step, in decreasing order. Minus infinity for a direction that is
            lost exactly. Exponents below about -30 consist of rounding.
        errors: (k,) standard errors, from the means of blocks of consecutive steps. Too small if
            the network changes more slowly than a block. NaN where there are fewer than two blocks.
        drift: (k,) exponents of the second half of the counted steps minus those of the first.
            Large compared with `errors` if they have not converged, or the sequences differ.
        largest: The largest exponent.
        largest_error: Its standard error.
        length: Mean number of counted steps in the sequence of a counted step.
        chaotic: Whether the largest exponent is above 0 by more than two standard errors; None
            where `length` is below `MIN_LENGTH`, too short to tell.
        horizon: Number of steps after which a difference of one rounding of the storage type is as
            large as the states: -log(eps) / largest. Infinite unless the largest exponent is
            positive; NaN where `chaotic` is None.
        dimension: Kaplan-Yorke dimension of the attractor: the number of the largest exponents that
            sum to 0, the last in part. NaN if k exponents are too few.
        entropy_rate: Sum of the positive exponents, in nats a step: an upper bound of the entropy
            rate. NaN likewise.
    """

    index_field: ClassVar[str] = "numbers"

    units: int
    sequences: int
    steps: int
    numbers: Integers
    exponents: Array
    errors: Array
    drift: Array
    largest: float
    largest_error: float
    length: float
    chaotic: bool | None
    horizon: float
    dimension: float
    entropy_rate: float


def lyapunov(
    site: SiteLike,
    count: int = EXPONENTS,
    skip: int | None = None,
    interval: int | None = None,
) -> Lyapunov:
    """Compute the largest Lyapunov exponents along the recorded sequences.

    A step takes about ``2 H^2 (k + 3)`` operations with the compiled library, ``6 H^2 k`` without;
    every few steps there is a QR of (H, k).

    Args:
        site: A site with reset, update, candidate, hidden and weights, of all units. The input is
            held fixed: for a decoder that reads its own output, the feedback is not included.
        count: k, at most H.
        skip: Number of steps at the start of each sequence that are not counted, because the
            initial directions are random. Default: a tenth of each sequence.
        interval: Number of steps between two QRs. Default: as many as the growth of the directions
            allows, so that the smallest keeps twelve digits.

    Returns:
        The exponents, and what follows from them.

    Raises:
        NotRecordedError: A required quantity was not recorded.
        OptionError: `count`, `skip` or `interval` is not such a number.

    Examples:
        A layer with PyTorch's initialization forgets its initial state.

        >>> import torch, grutrace
        >>> from grutrace.analysis import lyapunov
        >>> _ = torch.manual_seed(0)
        >>> layer = torch.nn.GRU(2, 8)
        >>> with torch.no_grad(), grutrace.trace(layer) as trace:
        ...     _ = layer(torch.randn(200, 1, 2))
        >>> result = lyapunov(trace["l0"], count=2)
        >>> result.chaotic, bool(result.largest < 0)
        (False, True)
    """
    if not isinstance(count, int) or count < 1:
        raise OptionError(
            f"count: expected a number of exponents, 1 or more; found {short_repr(count)}"
        )
    if skip is not None and (not isinstance(skip, int) or skip < 0):
        raise OptionError(f"skip: expected a number of steps, 0 or more; found {short_repr(skip)}")
    if interval is not None and (not isinstance(interval, int) or interval < 1):
        raise OptionError(
            f"interval: expected a number of steps, 1 or more; found {short_repr(interval)}"
        )
    data = as_site_data(site)
    require_all_units(data)
    size = len(data.units)
    skipped = np.ceil(data.lengths * TRANSIENT).astype(np.int64) if skip is None else skip
    skipped = np.minimum(data.lengths, skipped)
    counted = data.lengths - skipped
    total = int(counted.sum())
    blocks = max(1, min(BLOCKS, total // MIN_BLOCK_STEPS))
    # Position of each sequence's first step among the counted steps of all, as if none were
    # skipped.
    starts = np.cumsum(counted) - counted - skipped
    make_reducer = partial(
        GrowthSums, size, min(count, size), skipped, starts, blocks, total, interval
    )
    quantities = (*REQUIRED, PREVIOUS, WEIGHTS, RESTARTS)
    part_bytes = PART_VALUES * row_bytes(data, REQUIRED) // max(1, size)
    growth = reduce_sequences(data, quantities, make_reducer, part_bytes)
    with np.errstate(invalid="ignore", divide="ignore"):
        exponents = growth.logs.sum(axis=0) / total
        errors = _errors(growth.logs / growth.steps[:, np.newaxis])
        drift = _drift(growth.logs, growth.steps)
    # QR returns them in this order, except for those closer than their errors.
    order = np.argsort(-exponents, kind="stable")
    exponents, errors, drift = exponents[order], errors[order], drift[order]
    largest, error = float(exponents[0]), float(errors[0])
    length = float(np.square(counted, dtype=np.float64).sum() / total) if total else np.nan
    chaotic = largest > (0.0 if np.isnan(error) else 2 * error)
    horizon = _horizon(largest, float(np.finfo(data.rows("hidden").dtype).eps))
    known = length >= MIN_LENGTH
    return Lyapunov(
        site=data.name,
        units=size,
        sequences=len(data.lengths),
        steps=total,
        numbers=np.arange(1, len(exponents) + 1),
        exponents=exponents,
        errors=errors,
        drift=drift,
        largest=largest,
        largest_error=error,
        length=length,
        chaotic=chaotic if known else None,
        horizon=horizon if known else np.nan,
        dimension=kaplan_yorke(exponents, size),
        entropy_rate=_entropy_rate(exponents, size),
    )


def _horizon(largest: float, spacing: float) -> float:
    return float(-np.log(spacing) / largest) if largest > 0 else np.inf


def _errors(means: Array) -> Array:
    """(k,) of (blocks, k) means."""
    if len(means) < 2:
        return np.full(means.shape[1], np.nan)
    return np.asarray(means.std(axis=0, ddof=1) / np.sqrt(len(means)))


def _drift(logs: Array, steps: Integers) -> Array:
    """(k,) of (blocks, k) sums of logs, and their numbers of steps."""
    half = len(logs) // 2
    if half == 0:
        return np.full(logs.shape[1], np.nan)
    first, second = (
        logs[part].sum(0) / steps[part].sum() for part in np.split(np.arange(len(logs)), [half])
    )
    return np.asarray(second - first)


def kaplan_yorke(exponents: Array, size: int) -> float:
    """Kaplan-Yorke dimension (1979) from the largest of H exponents.

    Args:
        exponents: (k,) in decreasing order.
        size: H.
    """
    if np.isnan(exponents).any():
        return float("nan")
    sums = np.cumsum(exponents)
    count = int(np.count_nonzero(np.minimum.accumulate(sums) >= 0))
    if count == len(exponents):
        return float(size) if count == size else float("nan")
    remainder = sums[count - 1] if count else 0.0
    return float(count + remainder / -exponents[count])


def _entropy_rate(exponents: Array, size: int) -> float:
    unknown = exponents[-1] > 0 and len(exponents) < size
    if unknown or np.isnan(exponents).any():
        return float("nan")
    return float(exponents[exponents > 0].sum())
