"""Check grutrace on a device: its tests, a small model and the cost of tracing.

python -m tools.device_check FOLDER [--device DEVICE] [--seconds N]

tools/device_check.sh prepares an environment and runs this. Each step is a process of its own with
a time limit. device.json and device.md are written anew every few seconds, with the rows that the
benchmark has so far. So a check that is killed leaves what it found.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch

from benchmarks.text_files import replace_text

#: Seconds for all steps together.
SECONDS = 340

#: Share of the remaining time that each step may take.
SHARES = {"tests": 0.5, "model": 0.4, "benchmark": 0.97}


@dataclass
class Step:
    """One step of the check.

    Attributes:
        name: Name of the step, and of its log.
        result: passed, failed, "out of time", "running" or "not run".
        seconds: How long it took.
        last_line: The last line that it printed.
    """

    name: str
    result: str = "not run"
    seconds: float = 0.0
    last_line: str = ""


def describe(device: torch.device) -> dict[str, str]:
    """Name the device and the versions of the software."""
    versions = {
        "device": str(device),
        "torch": torch.__version__,
        "python": sys.version.split()[0],
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        versions |= {
            "device": f"{properties.name}, {properties.total_memory >> 30} GiB",
            "CUDA": str(torch.version.cuda),
            "cuDNN": str(torch.backends.cudnn.version()),
        }
    return versions


def commands(folder: Path, device: str) -> dict[str, list[str]]:
    """The command of each step."""
    rows = str(folder / "benchmark.md")
    return {
        "tests": ["-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_cuda.py"],
        "model": ["-m", "tools.device_model", "--device", device],
        "benchmark": ["-m", "benchmarks.cuda", "--device", device, "--pairs", "5"]
        + ["--output", rows],
    }


def run(
    step: Step,
    command: list[str],
    folder: Path,
    device: str,
    seconds: float,
    report: Callable[[], None],
) -> None:
    """Run one step, and note how it ended. Calls `report` every few seconds."""
    log = folder / f"{step.name}.log"
    start = time.monotonic()
    step.result = "running"
    with (
        log.open("w", encoding="utf-8") as output,
        subprocess.Popen(
            [sys.executable, *command],
            env={**os.environ, "GRUTRACE_TEST_DEVICE": device},
            stdout=output,
            stderr=subprocess.STDOUT,
        ) as process,
    ):
        while process.poll() is None and time.monotonic() - start < seconds:
            report()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(min(5.0, max(0.1, seconds - (time.monotonic() - start))))
        if process.returncode is None:
            process.kill()
            step.result = "out of time"
        else:
            step.result = "passed" if process.returncode == 0 else "failed"
    step.seconds = round(time.monotonic() - start, 1)
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    step.last_line = lines[-1] if lines else ""


def write(folder: Path, versions: dict[str, str], steps: list[Step]) -> None:
    """Write what is known so far."""
    found = {"versions": versions, "steps": [asdict(step) for step in steps]}
    rows = folder / "benchmark.json"
    if rows.exists():
        found["benchmark"] = json.loads(rows.read_text(encoding="utf-8"))
    replace_text(folder / "device.json", json.dumps(found, indent=2) + "\n")
    lines = ["# Check on a device", ""]
    lines += [f"- {name}: {value}" for name, value in versions.items()]
    lines += ["", "| step | result | seconds | last line |", "|---|---|---|---|"]
    lines += [f"| {s.name} | {s.result} | {s.seconds} | {s.last_line} |" for s in steps]
    table = folder / "benchmark.md"
    if table.exists():
        lines += ["", table.read_text(encoding="utf-8")]
    replace_text(folder / "device.md", "\n".join(lines) + "\n")


def main(arguments: list[str] | None = None) -> int:
    """Run the check, and return its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.device_check", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("folder", type=Path, help="folder for the reports")
    parser.add_argument("--device", default="cuda", help="device to check (default: cuda)")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="limit of all steps")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print(
            f"error: expected a CUDA device; torch {torch.__version__} finds none",
            file=sys.stderr,
        )
        return 2
    folder: Path = options.folder
    folder.mkdir(parents=True, exist_ok=True)
    for old in ("benchmark.json", "benchmark.md"):
        # Rows of an earlier check are not those of this one.
        (folder / old).unlink(missing_ok=True)
    end = time.monotonic() + options.seconds
    versions, steps = describe(device), [Step(name) for name in SHARES]
    report = partial(write, folder, versions, steps)
    for step in steps:
        remaining = max(1.0, end - time.monotonic())
        command = commands(folder, options.device)[step.name]
        report()
        run(step, command, folder, options.device, SHARES[step.name] * remaining, report)
        report()
        print(f"{step.name}: {step.result} in {step.seconds} s: {step.last_line}", flush=True)
    print(f"report: {folder / 'device.md'}")
    return 0 if all(step.result == "passed" for step in steps) else 1


if __name__ == "__main__":
    sys.exit(main())
