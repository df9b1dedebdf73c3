"""The order of the units in a picture, so that its structure is seen.

T steps, H units.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from grutrace.analysis.labels.selectivity import selectivity
from grutrace.errors import OptionError, require_one_of, short_repr
from grutrace.records import Array
from grutrace.storage.read.sequence_index import Integers
from grutrace.storage.read.site import SiteTrace

#: The orders by name.
ORDERS = ("similarity", "timescale", "label", "last write", "number")


@dataclass(frozen=True, eq=False)
class UnitOrder:
    """The units of a picture.

    Attributes:
        positions: Their positions among the units that are drawn, from top to bottom.
        text: How they are sorted, for the title.
    """

    positions: Integers
    text: str


def order_units(
    site: SiteTrace,
    quantity: str,
    columns: Integers,
    values: Array,
    update: Array | None,
    order: str,
    label: str | None,
) -> UnitOrder:
    """Sort the units of a picture.

    Args:
        site: The site.
        quantity: The quantity that is drawn.
        columns: (H,) the columns of the units at the site.
        values: (T, H) their values.
        update: (T, H) the update gate of the same steps; None where it was not recorded.
        order: One of `ORDERS`.
        label: The label that ``label`` sorts by.

    Raises:
        OptionError: The order is unknown, or needs a label or an update gate that is missing.
    """
    require_one_of("order", order, ORDERS)
    if order in ("timescale", "last write") and update is None:
        raise OptionError(
            f"order: {order!r} needs the update gate, which was not recorded at {site.name!r}"
        )
    if order == "label" and label is None:
        raise OptionError(f"order='label' needs a label: one of {', '.join(site.label_names)}")
    if label is not None and order != "label":
        raise OptionError(f"label: expected none with order={order!r}; found {short_repr(label)}")
    by_order: dict[str, Callable[[], UnitOrder]] = {
        "similarity": partial(by_similarity, values),
        "timescale": partial(by_timescale, update),
        "label": partial(_by_label, site, quantity, columns, label),
        "last write": partial(by_last_write, update),
        "number": lambda: UnitOrder(np.arange(values.shape[1]), "units by number"),
    }
    return by_order[order]()


def by_similarity(values: Array) -> UnitOrder:
    """Put units with similar courses next to each other.

    Units are clustered by average linkage of the distances between their courses (Sokal and
    Michener 1958), and the branches of each cluster are turned so that the larger mean is above.

    Args:
        values: (T, H).
    """
    courses = np.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0).T.astype(np.float64)
    return UnitOrder(np.array(_leaves(courses), np.int64), "units clustered by similarity")


def _leaves(courses: Array) -> list[int]:
    """Return the leaves of the clustering of (H, T) courses, by chains of nearest neighbours."""
    count = len(courses)
    if count < 3:
        return list(range(count))
    squares = (courses**2).sum(1)
    distance = np.sqrt(np.maximum(squares[:, np.newaxis] + squares - 2 * courses @ courses.T, 0.0))
    np.fill_diagonal(distance, np.inf)
    members = [[unit] for unit in range(count)]
    means = courses.mean(1)
    sizes = np.ones(count)
    alive = np.ones(count, bool)
    chain: list[int] = []
    for _ in range(count - 1):
        if not chain:
            chain = [int(np.flatnonzero(alive)[0])]
        while True:
            nearest = int(distance[chain[-1]].argmin())
            if len(chain) > 1 and distance[chain[-1], nearest] >= distance[chain[-1], chain[-2]]:
                break
            chain.append(nearest)
        a, b = chain.pop(), chain.pop()
        merged = (sizes[a] * distance[a] + sizes[b] * distance[b]) / (sizes[a] + sizes[b])
        distance[a], distance[:, a] = merged, merged
        distance[a, a] = np.inf
        distance[b], distance[:, b] = np.inf, np.inf
        upper, lower = (a, b) if means[a] >= means[b] else (b, a)
        members[a] = members[upper] + members[lower]
        means[a] = (sizes[a] * means[a] + sizes[b] * means[b]) / (sizes[a] + sizes[b])
        sizes[a] += sizes[b]
        alive[b] = False
    return members[int(np.flatnonzero(alive)[0])]


def by_timescale(update: Array | None) -> UnitOrder:
    """Put units that keep their state for longer below, as the update gate (T, H) says."""
    assert update is not None
    with np.errstate(divide="ignore", invalid="ignore"):
        rate = np.log(update.astype(np.float64)).mean(axis=0)
    order = np.argsort(np.nan_to_num(rate, nan=-np.inf, neginf=-np.inf), kind="stable")
    return UnitOrder(order, "units by timescale in these steps, the longest below")


def by_last_write(update: Array | None) -> UnitOrder:
    """Sort units by the step at which they last wrote more than they kept, (T, H).

    Units that never did come first. Units of one step are sorted by the gate at that step.
    """
    assert update is not None
    last = last_writes(update)
    at_last = update[last, np.arange(len(last))] if len(update) else np.zeros(len(last))
    return UnitOrder(np.lexsort((at_last, last)), "units by the step of their last write (z < 0.5)")


def last_writes(update: Array) -> Integers:
    """Return the last step of (T, H) at which each unit wrote more than it kept; -1 for none."""
    wrote = update < 0.5
    if not len(wrote):
        return np.full(wrote.shape[1], -1)
    return np.where(wrote.any(axis=0), len(wrote) - 1 - wrote[::-1].argmax(axis=0), -1)


def _by_label(site: SiteTrace, quantity: str, columns: Integers, label: str | None) -> UnitOrder:
    """Group units by the class of the label that they separate best, the clearest first."""
    assert label is not None
    found = selectivity(site, label, quantity, permutations=0)
    classes = {name: number for number, name in enumerate(found.classes)}
    best = np.array([classes[name] for name in found.best.tolist()], np.int64)[columns]
    clearness = np.abs(np.nan_to_num(found.auc, nan=0.5) - 0.5)[columns]
    order = np.lexsort((-clearness, best))
    return UnitOrder(order, f"units by the value of {label!r} that they separate best")
