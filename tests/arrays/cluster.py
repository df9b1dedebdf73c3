"""Compute on a trace in two worker processes, and print the results as JSON.

python -m tests.arrays.cluster PATH SITE QUANTITY [SITE QUANTITY ...]
"""

from __future__ import annotations

import json
import os
import sys

import cloudpickle
import dask
import dask.array
import numpy as np
from distributed import Client, LocalCluster

import grutrace


def worker_of(block: np.ndarray) -> np.ndarray:
    """Which process this block was given to, in its place."""
    return np.full((1, 1), os.getpid())


def open_files() -> list[str]:
    folder = "/proc/self/fd"
    results = []
    for number in os.listdir(folder):
        try:
            results.append(os.readlink(f"{folder}/{number}"))
        except OSError:
            continue
    return results


def main(path: str, *names: str) -> None:
    results: dict[str, object] = {}
    with (
        LocalCluster(
            n_workers=2, threads_per_worker=2, processes=True, dashboard_address=None
        ) as cluster,
        Client(cluster) as client,
        grutrace.open(path) as trace,
    ):
        processes: set[int] = set()
        for site, quantity in zip(names[::2], names[1::2], strict=True):
            array = trace.to_dask(site, quantity)
            # One pass over the rows for both.
            of_workers, total = dask.compute(
                array.map_blocks(worker_of, chunks=(1, 1), dtype=int),
                dask.array.sum(array, axis=0, dtype=float),
            )
            processes |= set(of_workers.ravel().tolist())
            results[f"{site} {quantity}"] = {
                "sum": total.tolist(),
                "chunks": len(array.chunks[0]),
                "bytes": len(cloudpickle.dumps(dict(array.dask))),
            }
            dataset = trace.to_xarray(site)
            means = dataset[quantity].groupby("sequence").mean().compute()
            results[f"{site} {quantity}"]["means"] = means.values.tolist()  # type: ignore[index]
        results["processes"] = sorted(processes)
        results["client"] = os.getpid()
        held = client.run(open_files)
        results["left open"] = [name for files in held.values() for name in files if path in name]
    print(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
