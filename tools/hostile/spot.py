"""A location in an intact file that is about to be changed."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

#: Numbers at the limits of the types.
EDGES = (0, 1, 2, 3, 255, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**53, 2**63 - 1, 2**63, 2**64 - 1)

FLOATS = (*map(float, EDGES), -1.0, 0.5, 1e300, -1e300, np.nan, np.inf, -np.inf)


@dataclass(frozen=True)
class Spot:
    """A group or dataset that is about to be changed.

    Attributes:
        file: The file, open for writing.
        path: The path of the group or dataset.
        rng: The source of random choices.
        pipe: A pipe without a writer. A reader that opens it blocks, and so is detected.
    """

    file: h5py.File
    path: str
    rng: random.Random
    pipe: Path

    @property
    def object(self) -> Any:
        """The object at this location."""
        return self.file[self.path]

    def remove(self) -> None:
        """Remove the object. The root cannot be removed."""
        if self.path == "/":
            raise ValueError("the root cannot be removed")
        del self.file[self.path]

    def link(self, target: Any) -> None:
        """Replace the object by a link, another object or a type."""
        self.remove()
        self.file[self.path] = target


#: A change that can be made.
Change = Callable[[Spot], object]
