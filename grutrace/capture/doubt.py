"""Sites of a call whose gates do not lead to the kernel's states."""

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
        call: The number of the call in the trace; None where it is not known yet.
    """

    site: Site
    residual: float
    tolerance: float
    call: int | None = None

    @property
    def message(self) -> str:
        """One line for a warning or an error."""
        which = "a call" if self.call is None else f"call {self.call}"
        return (
            f"{self.site.name}: the gates of {which} are unproven: the replayed states differ from "
            f"the kernel's by up to {self.residual:.2g}, where rounding explains "
            f"{self.tolerance:.2g}. The model used other weights than the trace knows (did they "
            "change while it ran?). weights='exact' compares them at each call"
        )


def find_doubts(module: Module, block: Block, call: int | None = None) -> Iterator[Doubt]:
    """Yield the sites of a call of which rounding does not explain the residual."""
    for site in module.sites:
        rows = block.sites[site.suffix]
        if rows.residual > rows.tolerance:
            yield Doubt(site, rows.residual, rows.tolerance, call)
