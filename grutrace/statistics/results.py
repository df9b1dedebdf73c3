"""What running statistics give to read: frozen, and apart from what goes on counting."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from grutrace.errors import NotRecordedError
from grutrace.records import Array
from grutrace.reprs import fields_repr


@dataclass(frozen=True, eq=False)
class UnitStatistics:
    """Figures of one quantity at one site, unit by unit: H units (or features of the input).

    All but `nan` and `infinite` are of finite values only. A figure of a unit that has none is not
    a number.

    Attributes:
        quantity: Its name.
        count: (H,) finite values.
        nan: (H,) values that were not a number.
        infinite: (H,) infinite values.
        mean: (H,)
        variance: (H,) mean squared deviation from the mean.
        minimum: (H,)
        maximum: (H,)
        below: (H,) share of the values whose size is below `moments.LOW`, 0.1; None for
            the input.
        above: (H,) share of the values whose size is above `moments.HIGH`, 0.9; None for
            the input.
        histogram: (H, bins) counts; None for the input, whose range nobody knows beforehand.
        edges: (bins + 1,) edges of the bins, from 0 to 1 for reset and update and from -1 to 1 for
            candidate and hidden. A bin holds its lower edge, and the last its upper edge, too.
        underflow: (H,) values below the first edge.
        overflow: (H,) values above the last edge: hidden states that began from larger ones.
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
        """(H,) standard deviation: the square root of the variance."""
        return np.asarray(np.sqrt(self.variance))


@dataclass(frozen=True, eq=False)
class SiteStatistics:
    """What was counted at one site.

    Attributes:
        site: Its name.
        calls: Calls of its module.
        sequences: Sequences that they began.
        steps: Of all sequences together: rows.
        versions: Versions of the module's weights.
        residual: Largest ``|replayed h - kernel's h|``; 0 before the first call, and not a number
            where gates were derived when read.
        residual_call: In which call that was: a row of `Trace.calls` of the same run. -1 for none.
        quantities: By name, what was counted.
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
        """The figures of the quantity of this name.

        Raises:
            NotRecordedError: It was not counted.
        """
        if quantity not in self.quantities:
            found = ", ".join(self.quantities) or "nothing"
            raise NotRecordedError(f"{quantity!r} was not counted at {self.site!r}: only {found}")
        return self.quantities[quantity]

    @property
    def reset(self) -> UnitStatistics:
        """The reset gate r."""
        return self["reset"]

    @property
    def update(self) -> UnitStatistics:
        """The update gate z. PyTorch's: where z is 1 the previous state is kept."""
        return self["update"]

    @property
    def candidate(self) -> UnitStatistics:
        """The candidate state n. PyTorch calls it the new gate."""
        return self["candidate"]

    @property
    def hidden(self) -> UnitStatistics:
        """The hidden state h."""
        return self["hidden"]

    @property
    def input(self) -> UnitStatistics:
        """What the layer read, feature by feature."""
        return self["input"]
