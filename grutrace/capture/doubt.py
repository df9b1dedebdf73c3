"""What a residual beyond rounding says, wherever it was found."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from grutrace.record import Block, Module, Site


class Doubt(NamedTuple):
    """A site of a call whose gates do not lead to the kernel's states.

    Attributes:
        site: Which site.
        residual: Largest ``|h from the gates - kernel's h|``.
        tolerance: The residual that rounding explains.
    """

    site: Site
    residual: float
    tolerance: float

    @property
    def message(self) -> str:
        """What to say of it."""
        return (
            f"{self.site.name}: the replayed states differ from the kernel's by up to "
            f"{self.residual:.2g}, where rounding explains {self.tolerance:.2g}. The gates of "
            "this call are not the ones that the model used"
        )


def doubts(module: Module, block: Block) -> Iterator[Doubt]:
    """Yield the sites of a call of which rounding does not explain the residual."""
    for site in module.sites:
        rows = block.sites[site.suffix]
        if rows.residual > rows.tolerance:
            yield Doubt(site, rows.residual, rows.tolerance)
