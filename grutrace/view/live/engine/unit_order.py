"""Orders of the units of a site, so that a picture shows structure."""

from __future__ import annotations

import numpy as np

from grutrace.errors import require_one_of
from grutrace.records import Array
from grutrace.storage.interfaces import Rows
from grutrace.storage.read.lazy_rows import item_bytes, items_per_block
from grutrace.storage.read.sequence_index import Integers
from grutrace.view.live.engine.link import ORDERS
from grutrace.view.live.engine.step_axis import StepAxis

#: Number of places of the file, and bytes of rows at each, from which an order is computed.
SAMPLES, SAMPLE_BYTES = 32, 128 * 1024


def unit_order(rows: Rows, axis: StepAxis, order: str) -> Integers | None:
    """Return the units in this order, (U,), from a sample of the steps; None by number.

    Orders: ``number``; ``mean``, by the mean value; ``similarity``, by the angle in the plane of
    the first two principal components of the standardized units, so that units that go up and down
    together are neighbours (Friendly 2002, "Corrgrams: Exploratory displays for correlation
    matrices").

    Args:
        rows: (N, U) rows of the quantity.
        axis: The axis of steps.
        order: Name of the order.

    Raises:
        OptionError: There is no such order.
    """
    require_one_of("order", order, ORDERS)
    if order == "number" or not len(axis):
        return None
    values = np.nan_to_num(_sample(rows, axis).astype(np.float64), posinf=0, neginf=0)
    if order == "mean":
        return np.argsort(values.mean(axis=0), kind="stable")
    centred = values - values.mean(axis=0)
    spread = centred.std(axis=0)
    standardized = centred / np.where(spread > 0, spread, 1)
    _, vectors = np.linalg.eigh(standardized.T @ standardized)
    first, second = vectors[:, -1], vectors[:, -min(2, vectors.shape[1])]
    angles = np.arctan2(second, first)
    by_angle = np.argsort(angles, kind="stable")
    # The circle is cut at its widest gap.
    gaps = np.diff(angles[by_angle], append=angles[by_angle[0]] + 2 * np.pi)
    return np.roll(by_angle, -(int(np.argmax(gaps)) + 1))


def _sample(rows: Rows, axis: StepAxis) -> Array:
    steps = items_per_block(SAMPLE_BYTES, item_bytes(rows))
    if steps * SAMPLES >= len(axis):
        return np.asarray(rows[axis.rows(0, len(axis))])
    starts = np.linspace(0, len(axis) - steps, SAMPLES).astype(int)
    return np.concatenate([np.asarray(rows[axis.rows(start, start + steps)]) for start in starts])
