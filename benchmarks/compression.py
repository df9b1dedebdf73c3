"""The size and CPU time of compressed gates of a trained network.

    python -m benchmarks.compression

needs the extras `demo` and `compress`. The encoder of g2p-en reads words of this repository, in an
order drawn once. The table says how many times smaller its rows become, and how many bytes of them
are written and read in a second of processor time, which depends less than a clock on what else
the machine does. Without compression it is HDF5 and the copies alone.
"""

from __future__ import annotations

import random
import re
import sys
import tempfile
import time
from pathlib import Path

import h5py
import numpy as np
import torch

import grutrace
from grutrace.records import DEFAULT_RECORD, Array, CallRecord, SiteRows
from grutrace.storage.hdf5.filters import COMPRESSIONS
from grutrace.storage.write.writer import Writer
from tests.storage.streams import Stream, make_header, make_module

ROOT = Path(__file__).parents[1]

#: Number of words, and words in a batch.
WORDS, BATCH = 3000, 64

#: Rows of a record, and how often all rows are written, for a measurable time.
ROWS, TIMES = 512, 3


def words() -> list[str]:
    """Words of the documentation and the code, shuffled."""
    files = [*(ROOT / "docs").glob("*.md"), *ROOT.glob("**/*.py")]
    text = " ".join(file.read_text(encoding="utf-8", errors="ignore") for file in files)
    result = sorted(set(re.findall(r"\b[a-z]{3,14}\b", text)))
    random.Random(0).shuffle(result)
    return result[:WORDS]


def gates() -> dict[str, Array]:
    """The rows of g2p-en's encoder."""
    sys.path.insert(0, str(ROOT / "examples"))
    import g2p_seq2seq

    model = g2p_seq2seq.load_model()
    read = words()
    with grutrace.trace(model, sites="encoder*") as trace, torch.inference_mode():
        for start in range(0, len(read), BATCH):
            model.pronounce(read[start : start + BATCH])
    return {name: np.array(trace["encoder.l0"].rows(name)) for name in DEFAULT_RECORD}


def measure(rows: dict[str, Array], options: dict[str, object], path: Path) -> tuple[float, ...]:
    """The compression ratio, and the bytes written and read per second of CPU time."""
    count, width = rows["update"].shape
    dtype = rows["update"].dtype.name
    stream = Stream(make_header(make_module(hidden=width, width=1, dtype=dtype), options=options))
    writer = Writer(path, stream.header, "overwrite")
    writer.write(stream.weights())
    records = [
        CallRecord(
            module=0,
            time=0.0,
            tag=None,
            training=False,
            weights=0,
            steps=np.array([ROWS], np.uint32),
            sequences=np.array([number], np.uint64),
            sites={
                "l0": SiteRows(
                    {name: array[start : start + ROWS] for name, array in rows.items()},
                    np.zeros((1, width), dtype),
                    0.0,
                    1.0,
                    2.0**-23,
                )
            },
        )
        for number, start in enumerate([*range(0, count - ROWS, ROWS)] * TIMES)
    ]
    size = sum(record.nbytes for record in records)
    began = time.process_time()
    for record in records:
        writer.write(record)
    writer.close()
    written = time.process_time() - began
    began = time.process_time()
    with grutrace.open(path) as trace:
        for name in DEFAULT_RECORD:
            for start in range(0, len(trace["rnn.l0"].rows(name)), 1 << 14):
                trace["rnn.l0"].rows(name)[start : start + (1 << 14)]
    read = time.process_time() - began
    with h5py.File(path) as file:
        stored = sum(
            file[f"modules/rnn/l0/{name}"].id.get_storage_size() for name in DEFAULT_RECORD
        )
    return size / stored, size / written, size / read


def main() -> None:
    exact = gates()
    print("| rows | compression | smaller | written, MB/s | read, MB/s |")
    print("|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for dtype in ("float32", "float16"):
            rows = {name: array.astype(dtype) for name, array in exact.items()}
            filters: dict[str, dict[str, object]] = {
                "none": {},
                "none, checksums": {"checksums": True},
                **{name: {"compression": name} for name in COMPRESSIONS},
            }
            for name, options in filters.items():
                smaller, *rates = measure(rows, options, Path(folder) / "run.h5")
                speeds = " | ".join(f"{rate / 1e6:.0f}" for rate in rates)
                print(f"| {dtype} | {name} | {smaller:.2f} | {speeds} |", flush=True)


if __name__ == "__main__":
    main()
