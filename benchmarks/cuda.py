"""Measure the cost of tracing single layers on a CUDA device, and print a table.

python -m benchmarks.cuda [--device DEVICE] [--pairs N] [--output FILE]

Each figure is the median ratio of the time with tracing to the time without it, measured in turn
(see `benchmarks.pairs`). Both runs end with a synchronization of the device. The time that the
writer needs after the model's call is not part of it.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.about import about
from benchmarks.pairs import PAIRS, ratio
from benchmarks.text_files import replace_text
from benchmarks.tracings import TRACINGS, traced
from benchmarks.workloads import Workload

#: Steps, batch, input size, hidden size.
SHAPES = ((64, 1, 128, 128), (128, 32, 256, 256), (100, 64, 1024, 1024))

DTYPES = (torch.float32, torch.float16)


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        layer: Shape, type and mode of the layer.
        tracing: How it is traced.
        median: Time with tracing divided by time without.
        low: 10th percentile of that ratio.
        high: 90th percentile.
        milliseconds: Median time without tracing.
    """

    layer: str
    tracing: str
    median: float
    low: float
    high: float
    milliseconds: float


def workloads(device: torch.device) -> Iterator[Workload]:
    """Yield each layer, for inference and for training."""
    for steps, batch, input_size, hidden_size in SHAPES:
        for dtype in DTYPES:
            layer = nn.GRU(input_size, hidden_size).to(device, dtype)
            x = torch.randn(steps, batch, input_size, device=device, dtype=dtype)
            name = f"T{steps} B{batch} I{input_size} H{hidden_size} {str(dtype).split('.')[1]}"
            yield Workload(f"{name}, inference", layer, _inference(layer, x), x)
            yield Workload(f"{name}, training", layer, _training(layer, x), x)


def _inference(layer: nn.GRU, x: torch.Tensor) -> Callable[[], object]:
    def run() -> None:
        with torch.no_grad():
            layer(x)
        _synchronize(x.device)

    return run


def _training(layer: nn.GRU, x: torch.Tensor) -> Callable[[], object]:
    def run() -> None:
        layer.zero_grad(set_to_none=True)
        layer(x)[0].float().square().mean().backward()
        _synchronize(x.device)

    return run


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(workload: Workload, pairs: int) -> Iterator[Row]:
    """Yield a row for each way to trace the workload."""
    for tracing in TRACINGS:
        if tracing.read:
            continue
        with (
            tempfile.TemporaryDirectory() as folder,
            traced(workload, tracing, Path(folder)) as run,
        ):
            result = ratio(workload.run, run.call, 0.0, pairs=pairs, settle=run.settle)
        yield Row(
            workload.name, tracing.name, result.median, result.low, result.high, 1e3 * result.base
        )


def table(rows: list[Row], versions: dict[str, Any]) -> str:
    """The rows as a Markdown table, after a line with the machine and the versions."""
    lines = [
        ", ".join(f"{name} {value}" for name, value in versions.items()) + ".",
        "",
        "| layer | tracing | time with / without | 10th to 90th percentile | without, ms |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {row.layer} | {row.tracing} | {row.median:.2f} | {row.low:.2f} to {row.high:.2f} "
        f"| {row.milliseconds:.3g} |"
        for row in rows
    ]
    return "\n".join(lines) + "\n"


def write(path: Path, rows: list[Row], versions: dict[str, Any]) -> None:
    """Write the table, and the rows as JSON beside it."""
    found = {"versions": versions, "rows": [asdict(row) for row in rows]}
    replace_text(path, table(rows, versions))
    replace_text(path.with_suffix(".json"), json.dumps(found, default=str, indent=2) + "\n")


def main(arguments: list[str] | None = None) -> int:
    """Run the command, and return its exit code: 0, or 2 without the device."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cuda", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--device", default="cuda", help="device to measure (default: cuda)")
    parser.add_argument("--pairs", type=int, default=PAIRS, help="pairs of runs per figure")
    parser.add_argument(
        "--output", type=Path, help="file to write the table to, with the rows as JSON beside it"
    )
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("error: expected a CUDA device; torch.cuda.is_available() is False", file=sys.stderr)
        return 2
    versions = about()
    if device.type == "cuda":
        versions["device"] = torch.cuda.get_device_name(device)
    rows = []
    for workload in workloads(device):
        for row in measure(workload, options.pairs):
            print(f"{row.layer}: {row.tracing}: {row.median:.2f}", flush=True)
            rows.append(row)
            if options.output is not None:
                # After each row, so that a run that is stopped leaves what it measured.
                write(options.output, rows, versions)
    if options.output is None:
        print(table(rows, versions))
    return 0


if __name__ == "__main__":
    sys.exit(main())
