"""Report a soak: Markdown tables and a list of faults."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from tools.soak.cost import fsync_cost
from tools.soak.faults import faults, faulty
from tools.soak.forks import Outcome
from tools.soak.kills import kills
from tools.soak.live import live
from tools.soak.power import power

SECTIONS: dict[str, Callable[[Path, argparse.Namespace], list[Outcome]]] = {
    "kills": lambda folder, asked: kills(folder, asked.tries, asked.seed),
    "faults": lambda folder, asked: faults(folder, asked.tries, asked.seed),
    "power": lambda folder, asked: power(folder, asked.tries, asked.seed),
    "fsync": fsync_cost,
    "live": lambda folder, asked: live(folder, asked.seconds, asked.seed),
}


def wrong(name: str, outcome: Outcome) -> list[str]:
    """The faults of one try, in words."""
    if "error" in outcome:
        return [outcome["error"]]
    if name == "faults":
        return faulty(outcome)
    if name == "fsync":
        return []
    if name == "live":
        followed = outcome["changes"] > 2 and outcome["writer"] == -9
        return [] if followed else ["there was nothing to follow"]
    results = []
    lost = outcome["acknowledged"] - outcome["calls"]
    # Without fsync, nothing is promised after a power loss.
    if lost > 0 and outcome.get("fsync", True):
        results.append(f"{lost} acknowledged calls are lost: {outcome.get('refused', '')}")
    if outcome["wrong"]:
        results.append(f"{outcome['wrong']} values are torn")
    if not outcome.get("same", True):
        results.append("plain h5py finds another number of calls")
    if not outcome.get("killed", True):
        results.append("it ended before it was killed")
    return results


def report(name: str, outcomes: Sequence[Outcome]) -> list[str]:
    """Print a table; return the faults, in words."""
    print(f"\n{name}\n")
    groups: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault(_group(name, outcome), []).append(outcome)
    rows = {"live": _live_rows, "fsync": _cost_rows}.get(name)
    _print_table(rows(groups) if rows else _rows(name, groups))
    return [
        f"{name}: {_about(outcome)}: {text}"
        for outcome in outcomes
        for text in wrong(name, outcome)
    ]


def _group(name: str, outcome: Outcome) -> str:
    if name == "faults":
        return f"{outcome.get('fault')}, on_error={outcome.get('on_error')!r}"
    if name == "power":
        return f"{outcome.get('page')}, {'with' if outcome.get('fsync') else 'without'} fsync"
    return str(outcome.get("kind"))


def _about(outcome: Outcome) -> str:
    names = ("kind", "fault", "on_error", "page", "fsync", "seed", "cut")
    return ", ".join(f"{name} {outcome[name]}" for name in names if name in outcome)


def _rows(name: str, groups: dict[str, list[Outcome]]) -> Iterable[list[str]]:
    extra = {"faults": ["failed"], "power": ["opened as it is"]}.get(name, [])
    yield ["", "tries", "had something to lose", "lost acknowledged calls", "torn", *extra,
           "slowest to open, ms"]  # fmt: skip
    for group, outcomes in sorted(groups.items()):
        sound = [outcome for outcome in outcomes if "error" not in outcome]
        opened = [outcome["opened"] for outcome in sound if outcome.get("opened")]
        row = [
            len(outcomes),
            sum(outcome["acknowledged"] > 0 for outcome in sound),
            sum(outcome["calls"] < outcome["acknowledged"] for outcome in sound),
            sum(outcome["wrong"] > 0 for outcome in sound),
        ]
        if name == "faults":
            row.append(sum(outcome["failed"] > 0 for outcome in sound))
        if name == "power":
            row.append(sum(outcome["as_it_is"] for outcome in sound))
        yield [group, *map(str, row), f"{1000 * max(opened, default=0):.0f}"]


def _live_rows(groups: dict[str, list[Outcome]]) -> Iterable[list[str]]:
    yield ["", "refreshes", "with news", "calls", "rows checked", "MB", "slowest refresh, ms"]
    for group, outcomes in groups.items():
        for outcome in (one for one in outcomes if "error" not in one):
            numbers = (outcome[name] for name in ("refreshes", "changes", "calls", "checked"))
            yield [group, *map(str, numbers), f"{outcome['bytes'] / 1e6:.1f}",
                   f"{1000 * outcome['slowest']:.0f}"]  # fmt: skip


def _cost_rows(groups: dict[str, list[Outcome]]) -> Iterable[list[str]]:
    yield ["", "fsync", "a run of the model, ms", "a flush, ms", "the slowest 5 %, ms"]
    for group, outcomes in groups.items():
        for outcome in outcomes:
            times = (f"{1000 * outcome[name]:.1f}" for name in ("run", "flush", "slow"))
            yield [group, "yes" if outcome["fsync"] else "no", *times]


def _print_table(rows: Iterable[list[str]]) -> None:
    for number, row in enumerate(rows):
        print(f"| {' | '.join(row)} |")
        if not number:
            print("|" + "---|" * len(row))
