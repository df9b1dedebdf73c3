"""Write all measurements as Markdown and JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.figures import Figure
from benchmarks.pairs import PAIRS
from benchmarks.peers import PEERS
from benchmarks.tracings import IN_MEMORY

#: Figures by workload.
Table = dict[str, list[Figure]]

LEGEND = """\
T steps, B sequences, I input size, H hidden size; float32; one layer, where not said otherwise.
Ratios to the untraced run: the median over the pairs (10th to 90th percentile; of how many, where
there are fewer than 11). A target that is missed is printed **bold**. In brackets: the limit,
which is the ratio if the kept bytes were copied once and nothing else were done."""

CHOICE = """\
Everything inline, in memory, with all gates harvested and with all gates replayed, and which of the
two the tracer takes. **Bold**: the dearer one, by more than a tenth."""

DISK = """\
About 0.1 seconds of runs in a row and the `flush` after them, to the same runs untraced: what
the writer's thread still does after the model's call has returned is counted, too. In brackets: the
limit if the kept bytes were written once to the end of a file, and nothing else were done."""

PEERS_LEGEND = """\
Ratios to the untraced nn.GRU, as above. **Bold**: gives all gates for less than our everything
inline, in memory, on this workload."""

#: The tracings of grutrace that are shown among the peers.
OURS = (
    IN_MEMORY,
    "the default, in memory",
    "the default, in memory, made and read",
    "everything inline, to a file",
    "deferred, to a file",
)


@dataclass
class Report:
    """The measurements so far.

    Attributes:
        about: Machine, versions and threads.
        tracing: Ratios of the tracings, by workload.
        choice: Those of everything inline, harvested and replayed.
        disk: Those until everything is on disk.
        peers: Those of the peers.
        others: Lists of other figures, by section.
    """

    about: Mapping[str, str]
    tracing: Table = field(default_factory=dict)
    choice: Table = field(default_factory=dict)
    disk: Table = field(default_factory=dict)
    peers: Table = field(default_factory=dict)
    others: dict[str, list[Figure]] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        tables = {
            "tracing": self.tracing,
            "choice": self.choice,
            "disk": self.disk,
            "peers": self.peers,
        }
        return {
            "about": dict(self.about),
            **{name: _by_workload(table) for name, table in tables.items()},
            **{
                name: [figure.as_json() for figure in figures]
                for name, figures in self.others.items()
            },
        }

    def markdown(self) -> str:
        about = ", ".join(f"{name} {value}" for name, value in self.about.items())
        parts = [f"{about}.", LEGEND]
        if self.tracing:
            parts += ["## Tracing", _wide("traced / untraced", self.tracing)]
        if self.choice:
            parts += ["## Harvest or replay", CHOICE, _wide("traced / untraced", self.choice)]
        if self.disk:
            parts += ["## With everything on disk", DISK, _wide("traced / untraced", self.disk)]
        if self.peers:
            parts += ["## Peers", PEERS_LEGEND, self._peers()]
        for section, figures in self.others.items():
            parts += [f"## {section.capitalize()}", _long(figures)]
        return "\n\n".join(parts) + "\n"

    def _peers(self) -> str:
        """One row per peer, one column per workload."""
        gives = {peer.name: peer.gives for peer in PEERS}
        gates = {peer.name for peer in PEERS if peer.gates}
        ours = {
            workload: {figure.name: figure for figure in self.tracing.get(workload, ())}
            for workload in self.peers
        }
        rows = [["", "gives", *self.peers]]
        for name in OURS:
            figures = [ours[workload].get(name) for workload in self.peers]
            if any(figures):
                cells = ["" if figure is None else _plain(figure) for figure in figures]
                rows.append([f"grutrace: {name}", "output, all gates", *cells])
        for name in dict.fromkeys(figure.name for row in self.peers.values() for figure in row):
            cells = []
            for workload, row in self.peers.items():
                figure = next((cell for cell in row if cell.name == name), None)
                bound = ours[workload].get(IN_MEMORY) if name in gates else None
                cells.append(_beside(figure, bound))
            rows.append([name, gives.get(name, ""), *cells])
        return table(rows)


def table(rows: Sequence[Sequence[str]]) -> str:
    """Write rows, the first of which is the heading, as a Markdown table."""
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


def number(value: float) -> str:
    """Write a figure with three digits, or as many as stand before the point."""
    if not math.isfinite(value):
        return str(value)
    if value == 0:
        return "0"
    digits = 2 - math.floor(math.log10(abs(value)))
    return f"{value:.{min(max(digits, 0), 4)}f}"


def _wide(corner: str, figures: Table) -> str:
    """One row per workload, one column per tracing, with the target in each cell."""
    columns = list(dict.fromkeys(figure.name for row in figures.values() for figure in row))
    rows = [[corner, *columns]]
    for workload, row in figures.items():
        by_name = {figure.name: figure for figure in row}
        rows.append([workload, *(_cell(by_name[c]) if c in by_name else "" for c in columns)])
    return table(rows)


def _long(figures: Sequence[Figure]) -> str:
    """One row per figure."""
    rows = [["", "figure", "10th to 90th percentile", "target"]]
    for figure in figures:
        if figure.value is None:
            rows.append([figure.name, figure.absent, "", ""])
            continue
        value = f"{number(figure.value)} {figure.unit}".strip()
        value = f"**{value}**" if figure.met is False else value
        rows.append([figure.name, value, _spread(figure), _target(figure)])
    return table(rows)


def _cell(figure: Figure) -> str:
    if figure.value is None:
        return figure.absent
    compared = f"{figure.value:.2f}"
    if figure.target is not None:
        sign = "≤" if figure.met else ">"
        compared = f"{compared} {sign} {figure.target.bound:.2f}"
    spread = f" ({_spread(figure)})" if figure.spread else ""
    least = figure.details.get("limit")
    beside = "" if least is None else f" [{least:.2f}]"
    return (f"**{compared}**" if figure.met is False else compared) + spread + beside


def _plain(figure: Figure) -> str:
    return f"{figure.value:.2f} ({_spread(figure)})"


def _beside(figure: Figure | None, ours: Figure | None) -> str:
    if figure is None:
        return ""
    if figure.value is None:
        return figure.absent
    value = f"{figure.value:.2f}"
    cheaper = ours is not None and ours.value is not None and figure.value < ours.value
    return f"{f'**{value}**' if cheaper else value} ({_spread(figure)})"


def _spread(figure: Figure) -> str:
    if figure.spread is None:
        return ""
    of = f" of {figure.spread.count}" if figure.spread.count < PAIRS else ""
    return f"{number(figure.spread.low)} to {number(figure.spread.high)}{of}"


def _target(figure: Figure) -> str:
    if figure.target is None:
        return ""
    sign = "≥" if figure.target.at_least else "≤"
    return f"{sign} {number(figure.target.bound)} {figure.unit}".strip()


def _by_workload(figures: Table) -> dict[str, dict[str, Any]]:
    return {
        workload: {figure.name: figure.as_json() for figure in row}
        for workload, row in figures.items()
    }
