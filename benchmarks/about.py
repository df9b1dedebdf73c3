"""The machine, versions and settings of a measurement."""

from __future__ import annotations

import os
import platform
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from benchmarks.peers import PEERS
from grutrace.native.library import instruction_set

#: Linux describes the processor in this file.
PROCESSOR = Path("/proc/cpuinfo")


def about() -> dict[str, str]:
    """Return date, machine, threads and versions, also of the peers."""
    packages = dict.fromkeys(["grutrace", "torch", "numpy", "h5py", *(p.package for p in PEERS)])
    return {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "processor": processor(),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        "compiled": instruction_set(),
    } | {package: installed(package) for package in packages}


def processor() -> str:
    """The processor's name, if the system gives it."""
    if PROCESSOR.exists():
        for line in PROCESSOR.read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def installed(package: str) -> str:
    """The version of a package, or "absent"."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"
