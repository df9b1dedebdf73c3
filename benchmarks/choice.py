"""The cost of copied and of recomputed gates, and the tracer's choice between them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks.figures import Figure, measured, not_measured
from benchmarks.pairs import ratio
from benchmarks.tracings import IN_MEMORY, TRACINGS, traced
from benchmarks.workloads import Workload
from grutrace.gru import kernel_gates

#: Ratios that differ by less count as equal: repeated runs differ as much.
ALIKE = 0.1


def figures(workload: Workload, budget: float, limit: float) -> Iterator[Figure]:
    """Yield the ratios of everything inline in memory, harvested and replayed, and the choice.

    Of single layers under `no_grad`, and the training step, which has a graph. Calls of one step
    are left out: their gates are kept in the kernel's memory, whatever they cost.
    """
    inline = next(tracing for tracing in TRACINGS if tracing.name == IN_MEMORY)
    layer = workload.model
    if not isinstance(layer, torch.nn.GRU) or workload.kind == "one step":
        return
    results = {}
    for name, pays in (("harvested", True), ("replayed", False)):
        with (
            mock.patch.object(kernel_gates, "is_cheaper", lambda *_, pays=pays, **__: pays),
            traced(workload, inline, Path()) as run,
        ):
            results[name] = ratio(workload.run, run.call, budget, limit=limit)
        yield measured(name, results[name])
    asked: list[bool] = []
    rule = kernel_gates.is_cheaper

    def heard(*arguments: Any) -> bool:
        asked.append(rule(*arguments))
        return asked[-1]

    with (
        mock.patch.object(kernel_gates, "is_cheaper", heard),
        traced(workload, inline, Path()) as run,
    ):
        run.call()
    choice = "harvested" if asked[-1] else "replayed"
    other = "replayed" if asked[-1] else "harvested"
    yield not_measured(
        "the rule takes", verdict(choice, results[choice].median, results[other].median)
    )


def verdict(choice: str, cost: float, other: float) -> str:
    """Return the tracer's choice, and whether it is the cheaper one."""
    if cost <= other:
        return choice
    return f"{choice} (about the same)" if cost <= other * (1 + ALIKE) else f"**{choice}**"
