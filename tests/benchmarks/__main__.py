"""Measure what tracing costs, and write a table.

python -m tests.benchmarks [--output FOLDER] [--only TEXT] [--budget SECONDS]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from tests.benchmarks.pairs import BUDGET, Ratio, ratio
from tests.benchmarks.peers import peers
from tests.benchmarks.tracings import TRACINGS, traced
from tests.benchmarks.workloads import all_workloads


def measure(only: str, budget: float) -> dict[str, dict[str, Ratio]]:
    """Return by workload and by name the ratio to the untraced run."""
    found: dict[str, dict[str, Ratio]] = {}
    for make in all_workloads():
        torch.manual_seed(0)
        workload = make()
        if only not in workload.name:
            continue
        row = found.setdefault(workload.name, {})
        for tracing in TRACINGS:
            with (
                tempfile.TemporaryDirectory() as folder,
                traced(workload, tracing, Path(folder)) as run,
            ):
                row[tracing.name] = ratio(workload.run, run, budget)
        for name, peer in peers(workload).items():
            row[name] = ratio(workload.run, peer, budget)
        print(workload.name, {name: f"{each.median:.2f}" for name, each in row.items()}, flush=True)
    return found


def about() -> dict[str, Any]:
    """Return machine, versions and threads."""
    names = ("grutrace", "torch", "numpy", "h5py")
    return {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
    } | {name: version(name) for name in names}


def markdown(found: dict[str, dict[str, Ratio]]) -> str:
    """Return a table: a row a workload, a column a way to trace or a peer."""
    targets = {tracing.name: tracing.target for tracing in TRACINGS}
    columns = list(dict.fromkeys(name for row in found.values() for name in row))
    lines = [
        ", ".join(f"{name} {value}" for name, value in about().items()),
        "",
        "| traced / untraced, median (10th to 90th percentile) | " + " | ".join(columns) + " |",
        "|---" * (1 + len(columns)) + "|",
        "| target | " + " | ".join(str(targets.get(name, "")) for name in columns) + " |",
    ]
    for workload, row in found.items():
        cells = [
            f"{row[name].median:.2f} ({row[name].low:.2f} to {row[name].high:.2f})"
            if name in row
            else ""
            for name in columns
        ]
        lines.append(f"| {workload} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("benchmark"), help="folder to write to")
    parser.add_argument("--only", default="", help="workloads whose name holds this")
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds a figure, at least")
    arguments = parser.parse_args()
    found = measure(arguments.only, arguments.budget)
    arguments.output.mkdir(exist_ok=True)
    figures = {w: {name: each.as_json() for name, each in row.items()} for w, row in found.items()}
    text = json.dumps({"about": about(), "ratios": figures}, indent=2)
    (arguments.output / "benchmark.json").write_text(text)
    (arguments.output / "benchmark.md").write_text(markdown(found))
    print(markdown(found))


if __name__ == "__main__":
    main()
