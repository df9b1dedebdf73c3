"""The frozen results of running statistics."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from grutrace.errors import NotRecordedError
from grutrace.records import Array
from grutrace.reprs import fields_repr


@dataclass(frozen=True, eq=False)
class UnitStatistics:
    """Statistics of one quantity at one site, for H units (or features of the input).

    All but `nan` and `infinite` are of finite values. They are NaN for a unit without finite
    values.

    Attributes:
        quantity: Name of the quantity.
        count: (H,) number of finite values.
        nan: (H,) number of NaN values.
        infinite: (H,) number of infinite values.
        mean: (H,) mean.
        variance: (H,) mean squared deviation from the mean.
        minimum: (H,) minimum.
        maximum: (H,) maximum.
        below: (H,) share of the values with a magnitude below `moments.LOW`, 0.1; None for the
            input.
        above: (H,) share of the values with a magnitude above `moments.HIGH`, 0.9; None for the
            input.
        histogram: (H, bins) counts; None for the input, whose range is unknown.
        edges: (bins + 1,) edges of the bins, from 0 to 1 for reset and update and from -1 to 1 for
            candidate and hidden. A bin includes its lower edge, the last also its upper edge.
        underflow: (H,) number of values below the first edge.
        overflow: (H,) number of values above the last edge: hidden states that began outside.
    """

    quantity: str
    count: Array
    nan: Array
    infinite: Array
    mean: Array
    variance: Array
    minimum: Array
    maximum: Array
    below: Array | None
    above: Array | None
    histogram: Array | None
    edges: Array | None
    underflow: Array | None
    overflow: Array | None

    __repr__ = fields_repr

    @property
    def std(self) -> Array:
        """(H,) standard deviation."""
        return np.asarray(np.sqrt(self.variance))


@dataclass(frozen=True, eq=False)
class SiteStatistics:
    """Statistics of one site.

    Attributes:
        site: Name of the site.
        calls: Number of calls of its module.
        sequences: Number of sequences that began.
        steps: Number of steps of all sequences.
        versions: Number of versions of the module's weights.
        residual: Largest ``|replayed h - kernel's h|``; 0 before the first call, and NaN where
            gates are deferred.
        residual_call: Index of the call with this residual, in `Trace.calls` of the same run; -1
            for none.
        quantities: Statistics by quantity.
    """

    site: str
    calls: int
    sequences: int
    steps: int
    versions: int
    residual: float
    residual_call: int
    quantities: dict[str, UnitStatistics]

    __repr__ = fields_repr

    def __getitem__(self, quantity: str) -> UnitStatistics:
        """Return the statistics of a quantity.

        Raises:
            NotRecordedError: The quantity was not counted.
        """
        if quantity not in self.quantities:
            names = ", ".join(self.quantities) or "nothing"
            raise NotRecordedError(f"{quantity!r} was not counted at {self.site!r}: only {names}")
        return self.quantities[quantity]

    @property
    def reset(self) -> UnitStatistics:
        """Statistics of the reset gate r."""
        return self["reset"]

    @property
    def update(self) -> UnitStatistics:
        """Statistics of the update gate z of PyTorch: z = 1 keeps the previous state."""
        return self["update"]

    @property
    def candidate(self) -> UnitStatistics:
        """Statistics of the candidate state n. PyTorch calls it the new gate."""
        return self["candidate"]

    @property
    def hidden(self) -> UnitStatistics:
        """Statistics of the hidden state h."""
        return self["hidden"]

    @property
    def input(self) -> UnitStatistics:
        """Statistics of the layer's input, by feature."""
        return self["input"]
