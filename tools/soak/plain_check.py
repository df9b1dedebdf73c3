"""Check a trace with NumPy in float64 and plain h5py, written from docs/format.md."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np

from tests.plain_reader import PlainSite, PlainTrace

#: How far a float32 gate of the small models here may be from float64: a row that was torn, or
#: never written, is off by more than a thousand times that.
TOLERANCE = 2e-5


def torn_rows(path: Path) -> tuple[int, int]:
    """Return the number of calls of a trace, and of values that the equations contradict."""
    # A tracer of this process may have it open: HDF5 wants it to be opened alike.
    with path.open("rb") as file:
        marked = bool(file.read(12)[11] & 0b101)
    plain = PlainTrace(path, swmr=marked)
    wrong = 0
    for module in plain.modules:
        for site in module.sites.values():
            for number in range(module.count):
                wrong += _wrong(site, number)
    return len(plain.calls), wrong


def _wrong(site: PlainSite, number: int) -> int:
    module = site.module
    versions = np.repeat(
        [module.trace.calls["weights"][call] for call, _, _, _ in module.pieces[number]],
        [steps for _, _, _, steps in module.pieces[number]],
    )
    stored = {name: site.sequence(number, name).astype("f8") for name in site.rows}
    x, previous = site.read(number).astype("f8"), site.previous(number).astype("f8")
    results = {name: np.full(previous.shape, np.nan) for name in (*site.QUANTITIES[:3], "hidden")}
    for version in np.unique(versions):
        rows = versions == version
        for name, values in _step(site, int(version), x[rows], previous[rows]).items():
            results[name][rows] = values
    return sum(
        int((~(np.abs(values - stored[name]) <= TOLERANCE)).sum())
        for name, values in results.items()
        if name in stored
    )


def _step(site: PlainSite, version: int, x: Any, h: Any) -> dict[str, Any]:
    weights = {name: array[version].astype("f8") for name, array in site.weights.items()}
    i = np.split(x @ weights["weight_ih"].T + weights["bias_ih"], 3, axis=1)
    g = np.split(h @ weights["weight_hh"].T + weights["bias_hh"], 3, axis=1)
    r, z = 1 / (1 + np.exp(-i[0] - g[0])), 1 / (1 + np.exp(-i[1] - g[1]))
    n = np.tanh(i[2] + r * g[2])
    return {"reset": r, "update": z, "candidate": n, "hidden": (1 - z) * n + z * h}


def wrong_figures(path: Path) -> tuple[int, int]:
    """Return the number of calls of a statistics file, and of units with wrong counts."""
    wrong = 0
    with h5py.File(path, "r") as file:
        modules = file["modules"][()]
        for site in file["sites"].values():
            steps = modules["steps"][site["site"][()]["module"]]
            for quantity in (member for member in site.values() if isinstance(member, h5py.Group)):
                units = quantity["units"][()]
                total = units["count"] + units["nan"] + units["infinite"]
                wrong += int((total != steps).sum())
                if "histogram" in quantity:
                    counted = quantity["histogram"][()].sum(axis=1)
                    counted += units["underflow"] + units["overflow"]
                    wrong += int((counted != units["count"]).sum())
    return int(modules["calls"].sum()), wrong
