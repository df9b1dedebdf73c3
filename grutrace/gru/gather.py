"""Memory for the gates that are taken of a call, and where in it those of each step go.

B sequences in a batch, H hidden size, T steps, N rows, U units that are taken.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from grutrace.gru.steps import numpy_type
from grutrace.record import GATES

#: How many units prove a call of which not all gates are computed.
PROOF_UNITS = 8

#: By the name of a gate, which units of it.
UnitsByGate: TypeAlias = Mapping[str, range]


class Asked(NamedTuple):
    """What somebody wants of the kernel's own gates.

    Attributes:
        columns: Which.
        share: What part of a replay's cost a harvest may cost at most.
    """

    columns: UnitsByGate
    share: float = 1.0


NOTHING = Asked(MappingProxyType({}))


class Wish(NamedTuple):
    """What is taken of a layer to have some gates, and to prove them.

    Attributes:
        columns: Of each gate.
        proof: Units of which the states are compared with what the gates lead to.
    """

    columns: UnitsByGate
    proof: range

    @classmethod
    def of(cls, gates: Sequence[str], units: Sequence[int]) -> Wish | None:
        """Return what is taken for some gates of some units; None if these cannot be taken.

        Args:
            gates: Their names.
            units: Their numbers: evenly spaced, or they cannot.
        """
        asked = range(units[0], units[-1] + 1, units[1] - units[0] if len(units) > 1 else 1)
        if list(asked) != list(units):
            return None
        few = asked[:: max(1, len(asked) // PROOF_UNITS)][:PROOF_UNITS]
        proof = asked if {"update", "candidate"} <= set(gates) else few
        columns = {name: asked for name in GATES if name in gates}
        return cls({"update": proof, "candidate": proof} | columns, proof)


def together(wishes: Sequence[Asked], hidden_size: int) -> Asked:
    """Return all that is wished for: of each gate the same columns, or else all units.

    Args:
        wishes: What several want of one layer.
        hidden_size: H
    """
    found: dict[str, range] = {}
    for wish in wishes:
        for name, columns in wish.columns.items():
            found[name] = columns if found.get(name, columns) == columns else range(hidden_size)
    return Asked(found, min((wish.share for wish in wishes if wish.columns), default=1.0))


class Layout(NamedTuple):
    """How a call lies in memory.

    Attributes:
        rows: (T,) how many sequences have each time.
        padded: Whether these are all of them, each time.
        hidden_size: H
        dtype: Of the input.
    """

    rows: list[int]
    padded: bool
    hidden_size: int
    dtype: torch.dtype


class Part(NamedTuple):
    """Gates of which the same columns are taken, and which the kernel has beside each other.

    Attributes:
        names: Of the gates.
        room: (gates, T, B, U) or (gates, N, U), where they go.
        strides: By which they lie in the kernel's memory, (gates, b, U) at a time.
        offset: From where on.
    """

    names: tuple[str, ...]
    room: Tensor
    strides: tuple[int, int, int]
    offset: int


class Room:
    """Memory for some gates of one direction of a layer in one call.

    Args:
        layout: Of the call.
        columns: What is to be taken.

    Attributes:
        product: What is taken of the hidden product (b, 3 H), which holds reset and update.
        candidate: What is taken of the candidate (b, H).
    """

    def __init__(self, layout: Layout, columns: UnitsByGate) -> None:
        self._layout, size = layout, layout.hidden_size
        opened = tuple(name for name in ("reset", "update") if name in columns)
        alike = len({columns[name] for name in opened}) == 1
        groups = [opened] if alike else [(name,) for name in opened]
        self.product = [self._part(names, columns[names[0]], 3 * size) for names in groups]
        closed = [name for name in ("candidate",) if name in columns]
        self.candidate = [self._part((name,), columns[name], size) for name in closed]

    def _part(self, names: tuple[str, ...], columns: range, width: int) -> Part:
        size = self._layout.hidden_size
        offset = columns.start + size * (names[0] == "update")
        room = self._empty(len(names), len(columns))
        return Part(names, room, (size, width, columns.step), offset)

    def _empty(self, gates: int, units: int) -> Tensor:
        # Of NumPy's type, since rows are: then they need not be copied again.
        rows, dtype = self._layout.rows, numpy_type(self._layout.dtype)
        if not self._layout.padded:
            return torch.from_numpy(np.empty((gates, sum(rows), units), dtype))
        # The rows of a sequence lie one after another, as they are recorded.
        room = np.empty((gates, rows[0] if rows else 0, len(rows), units), dtype)
        return torch.from_numpy(room).transpose(1, 2)

    @property
    def gates(self) -> dict[str, Tensor]:
        """What is in it, by name, in the kernel's order: (T, B, U) or (N, U)."""
        parts = (*self.product, *self.candidate)
        return {
            name: gate for part in parts for name, gate in zip(part.names, part.room, strict=True)
        }

    def by_time(self, part: Part) -> Sequence[Tensor]:
        """Return where a part goes of each time, (gates, b, U)."""
        if self._layout.padded:
            return part.room.unbind(1)
        views: tuple[Tensor, ...] = torch.split(part.room, self._layout.rows, 1)
        return views
