"""Judge a corpus of hostile files. docs/untrusted-files.md describes the results.

    python -m tools.hostile [--cases 20000] [--seed 1] [--first 0] [--jobs 2]

It prints each failure, and exits with 1 if that is grutrace's fault.
"""

from __future__ import annotations

import argparse
import os
import sys
import time

import h5py

from tools.hostile.corpus import all_outcomes, counts, said_from_outside


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    began, result = time.perf_counter(), []
    stop = arguments.first + arguments.cases
    for outcome in all_outcomes(arguments.seed, arguments.first, stop, arguments.jobs):
        result.append(outcome)
        if outcome.outcome not in ("read", "refused"):
            print(
                f"{outcome.number}: {outcome.outcome}: {outcome.name}\n    {outcome.detail}",
                flush=True,
            )
        if outcome.outcome in ("crash", "hang"):
            print(
                f"    from outside: {said_from_outside(arguments.seed, outcome.number)}",
                flush=True,
            )
        if len(result) % 500 == 0:
            print(f"{len(result)} cases: {dict(counts(result))}", file=sys.stderr, flush=True)
    print(f"HDF5 {h5py.version.hdf5_version}: {len(result)} cases: {dict(counts(result))}")
    print(f"in {time.perf_counter() - began:.0f} s")
    return 1 if any(outcome.outcome == "fault" for outcome in result) else 0


if __name__ == "__main__":
    sys.exit(main())
