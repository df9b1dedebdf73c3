"""The reading contract: what a trace can be read from, in memory or in a file."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import numpy as np

from grutrace.record import Array, Header
from grutrace.storage.tables import Tables


class Rows(Protocol):
    """A two-dimensional array that may still lie in a file. `numpy.asarray` reads all of it."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(rows, width)."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the elements."""

    @property
    def ndim(self) -> int:
        """Always 2."""

    def __len__(self) -> int: ...

    def __getitem__(self, key: Any) -> Any:
        """What NumPy gives for an integer, slice, integer array or mask, or two of them."""


@runtime_checkable
class Source(Protocol):
    """Where a trace is read from. A reader asks for the tables, and for no more than they count.

    Modules are named by their place in the header, sites by their suffix.

    One that reads files can be pickled: that takes little, and gives one which opens the same files
    anew, in the same process or another. Pickling one in memory raises a `TypeError`.
    """

    name: str
    header: Header

    #: Whether this process is the one that records, and a trace shows at any time all there is.
    live: bool

    def refresh(self) -> Tables:
        """The tables of everything there is by now, always a consistent prefix of the trace.

        If nothing came since the last time, they are the same object.
        """

    def rows(self, module: int, suffix: str, quantity: str, count: int) -> Rows:
        """The first `count` rows, (count, H or I)."""

    def initial(self, module: int, suffix: str, count: int) -> Rows:
        """The states that the first `count` sequences began from, (count, H)."""

    def checks(self, module: int, suffix: str, count: int) -> Array:
        """Of the module's first `count` calls, (count,) of type `schema.CHECK`."""

    def weights(self, module: int, suffix: str, version: int) -> dict[str, Array]:
        """One version of a site's weights: (3H, I), (3H, H) and, if it has biases, twice (3H,)."""

    def close(self) -> None:
        """Let go of everything. Closing twice does nothing."""
