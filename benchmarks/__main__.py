"""Measure the cost of tracing and of other tools, and write Markdown and JSON.

python -m benchmarks [--output FOLDER] [--only TEXT ...] [--budget SECONDS]
    [--limit SECONDS] [--threads N] [--long]
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import torch

from benchmarks import (
    analysis,
    choice,
    dynamics,
    gradients,
    growth,
    interventions,
    live_view,
    long_training,
    measure,
    memory,
    scale,
    start,
    storage,
)
from benchmarks.about import about
from benchmarks.figures import Figure
from benchmarks.pairs import BUDGET, FEWEST, LIMIT, PAIRS
from benchmarks.report import Report, Table
from benchmarks.text_files import replace_text
from benchmarks.workloads import Workload, all_workloads

#: Sections that measure each workload. Peers come last: some change torch when they are imported.
OF_WORKLOADS = ("tracing", "choice", "disk", "peers")

#: Sections that measure something of their own.
OTHERS: dict[str, Callable[[], Iterable[Figure]]] = {
    "start": start.figures,
    "storage": storage.figures,
    "scale": scale.figures,
    "memory": memory.figures,
    "growth": growth.figures,
    "analysis": analysis.figures,
    "dynamics": dynamics.figures,
    "interventions": interventions.figures,
    "gradients": gradients.figures,
    "training": long_training.figures,
    "view": live_view.figures,
}

#: Sections that are measured only if they are named. Together they take a quarter of an hour.
ASIDE = ("scale", "analysis", "dynamics", "interventions", "gradients", "training", "view")


def run(
    report: Report, only: list[str], budget: float, limit: float, save: Callable[[], None]
) -> None:
    """Fill the report, and save it after each part."""
    sections = (*OF_WORKLOADS, *OTHERS)
    asked = [name for name in sections if name in only]
    texts = [text for text in only if text not in sections]
    if not asked:
        asked = list(OF_WORKLOADS) if texts else [name for name in sections if name not in ASIDE]
    for name in OTHERS:
        if name in asked:
            report.others[name] = list(_printed(name, OTHERS[name]()))
            save()
    by_section: dict[str, tuple[Table, Callable[[Workload], Iterator[Figure]]]] = {
        "tracing": (report.tracing, partial(measure.tracing, budget=budget, seconds=limit)),
        "choice": (report.choice, partial(choice.figures, budget=budget, limit=limit)),
        "disk": (report.disk, measure.disk),
        "peers": (report.peers, partial(measure.peers, budget=budget, seconds=limit)),
    }
    for name, (table, figures) in by_section.items():
        if name not in asked:
            continue
        for make in all_workloads():
            torch.manual_seed(0)
            workload = make()
            if texts and not any(text in workload.name for text in texts):
                continue
            result = list(_printed(f"{name}, {workload.name}", figures(workload)))
            if result:
                table[workload.name] = result
                save()


def _printed(where: str, figures: Iterable[Figure]) -> Iterator[Figure]:
    """Print each figure as soon as it is measured, with the time that it took."""
    began = time.perf_counter()
    for figure in figures:
        text = figure.absent if figure.value is None else f"{figure.value:.4g} {figure.unit}"
        missed = " (missed)" if figure.met is False else ""
        took = time.perf_counter() - began
        print(f"[{took:5.1f} s] {where}: {figure.name}: {text.strip()}{missed}", flush=True)
        began = time.perf_counter()
        yield figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("benchmark"), help="folder to write to")
    parser.add_argument(
        "--only",
        nargs="+",
        default=[],
        help=f"sections ({', '.join((*OF_WORKLOADS, *OTHERS))}) and texts in names of workloads",
    )
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds a ratio, at least")
    parser.add_argument(
        "--limit",
        type=float,
        default=LIMIT,
        help=f"seconds a ratio after which {FEWEST} pairs do instead of {PAIRS}",
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch")
    parser.add_argument("--long", action="store_true", help="growth to 10^8 steps: minutes more")
    arguments = parser.parse_args()
    if arguments.long:
        OTHERS["growth"] = partial(growth.figures, longest=True)
    torch.set_num_threads(arguments.threads)
    report = Report(about())
    print(", ".join(f"{name} {value}" for name, value in report.about.items()), flush=True)
    arguments.output.mkdir(parents=True, exist_ok=True)

    def save() -> None:
        text = json.dumps(report.as_json(), indent=2)
        replace_text(arguments.output / "benchmark.json", text + "\n")
        replace_text(arguments.output / "benchmark.md", report.markdown())

    began = time.perf_counter()
    run(report, arguments.only, arguments.budget, arguments.limit, save)
    print(f"\n{report.markdown()}\nin {time.perf_counter() - began:.0f} s: {arguments.output}")


if __name__ == "__main__":
    main()
