"""A location in an intact file that is about to be changed."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

#: Numbers at the edges of what the types hold.
EDGES = (0, 1, 2, 3, 255, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**53, 2**63 - 1, 2**63, 2**64 - 1)

FLOATS = (*map(float, EDGES), -1.0, 0.5, 1e300, -1e300, np.nan, np.inf, -np.inf)


@dataclass(frozen=True)
class Spot:
    """A place.

    Attributes:
        file: Open for writing.
        place: Of a group or a dataset in it.
        chance: What to choose by.
        pipe: A pipe that nobody writes to. Whoever opens it waits for ever, and is found out.
    """

    file: h5py.File
    place: str
    chance: random.Random
    pipe: Path

    @property
    def here(self) -> Any:
        """What is there now."""
        return self.file[self.place]

    def remove(self) -> None:
        """Take it away, which cannot be done to the root."""
        if self.place == "/":
            raise ValueError("the root cannot be removed")
        del self.file[self.place]

    def link(self, target: Any) -> None:
        """Put a link, another object or a type into its place."""
        self.remove()
        self.file[self.place] = target


#: Something that can be done.
Change = Callable[[Spot], object]
