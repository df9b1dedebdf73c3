"""The script that wrote the golden files. Do not run it over them again.

    python -m tests.golden.make FOLDER

The files in `tests/golden/v1.0` were made with grutrace 0.1.0 when it wrote version 1.0 of the
format, torch 2.13.0, NumPy 2.4.6 and h5py 3.16.0 with HDF5 2.0.0; those in `v1.3` and
`v1.5` when it wrote these versions, with the same packages. For another version of the format make
another folder, from the same runs.
"""

from __future__ import annotations

import json
import lzma
import os
import platform
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import grutrace
from grutrace.storage.write.dataset_writer import DatasetWriter
from tests.golden import happened, runs
from tests.golden.acted import ACTED
from tests.golden.runs import GOLDENS, Golden

#: A file must not describe the machine that made it.
PLATFORM = "Linux"

#: The script of the run that has parts.
PARTS = f"""
import platform
platform.platform = lambda: {PLATFORM!r}
from tests.golden import runs
runs.run_parts(runs.built(runs.Encoder, 4), runs.built(runs.Speaker, 5))
"""


def traced(golden: Golden, path: Path) -> None:
    """Trace a run to a file, and close it."""
    model = golden.build()
    with grutrace.Tracer(model, path, recording=False, **golden.options) as tracer:
        golden.run(model, tracer.recording)


def killed(golden: Golden, path: Path) -> None:
    """Trace a run in a process of its own, which dies between more rows and their counts."""
    child = os.fork()
    if not child:
        model = golden.build()
        tracer = grutrace.Tracer(model, path, recording=False, **golden.options)
        golden.run(model, tracer.recording)
        tracer.flush()

        def die(datasets: DatasetWriter, *, closed: bool) -> None:
            datasets.write_buffers()
            datasets.file.flush()
            os.kill(os.getpid(), signal.SIGKILL)

        DatasetWriter.commit = die  # type: ignore[method-assign]
        golden.run(model, tracer.recording)
        tracer.flush()
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL


def counted(golden: Golden, path: Path) -> None:
    """Count a run, and save the figures."""
    model = golden.build()
    statistics = grutrace.Statistics(path, bins=8)
    options = {**golden.options, "gates": "inline"}
    with grutrace.Tracer(model, sink=statistics, recording=False, **options) as tracer:
        golden.run(model, tracer.recording)


def run_in_parts(path: Path) -> None:
    """Trace a script with `grutrace run`, which comes upon one model after another."""
    with tempfile.NamedTemporaryFile("w", suffix=".py") as script:
        script.write(PARTS)
        script.flush()
        command = [sys.executable, "-m", "grutrace", "run", "-o", str(path), "--gates", "inline"]
        subprocess.run([*command, script.name], check=True, env={**os.environ, "PYTHONPATH": "."})


def about(golden: Golden) -> tuple[happened.Arrays, dict[str, Any]]:
    """The expected content of a run's file, from an untraced model."""
    model = golden.build()
    result = happened.happened(lambda: golden.run(model, runs.unrecorded), golden.calls)
    message = {
        "calls": happened.account(golden.calls, result),
        "forks": golden.forks,
        "annotations": [[*key, named] for key, named in golden.annotations.items()],
        "units": golden.options.get("units"),
    }
    return happened.expected(model, result), message


def about_parts() -> dict[int, tuple[happened.Arrays, dict[str, Any]]]:
    """The same of each part."""
    encoder, speaker = runs.built(runs.Encoder, 4), runs.built(runs.Speaker, 5)
    calls = [call for pair in zip(*runs.PART_CALLS.values(), strict=True) for call in pair]
    result = happened.happened(lambda: runs.run_parts(encoder, speaker), calls)
    parts = {}
    for part, model in ((1, encoder), (2, speaker)):
        own = result[part - 1 :: 2]
        message = {"calls": happened.account([call for call, _ in own], own)}
        parts[part] = happened.expected(model, own), message
    return parts


def keep(folder: Path, path: Path) -> None:
    """Put a file into the folder, compressed: most of it is empty."""
    with lzma.open(folder / f"{path.name}.xz", "xb", preset=9 | lzma.PRESET_EXTREME) as file:
        file.write(path.read_bytes())


def keep_expected(folder: Path, name: str, arrays: happened.Arrays, said: dict[str, Any]) -> None:
    """Put the expected content of a file into the folder."""
    text = np.array(json.dumps(said, ensure_ascii=False))
    np.savez_compressed(folder / f"{name}.npz", said=text, **arrays)


def main(folder: Path) -> None:
    """Make every file that is missing."""
    platform.platform = lambda *_: PLATFORM
    torch.set_num_threads(1)
    folder.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as temporary:
        traces = Path(temporary)
        makers: dict[str, Callable[[Golden, Path], None]] = {"killed": killed}
        for name, golden in GOLDENS.items():
            makers.get(name, traced)(golden, traces / f"{name}.h5")
            if name != "killed":
                keep_expected(folder, name, *about(golden))
        for name, (trace, expected) in ACTED.items():
            trace(traces / f"{name}.h5")
            np.savez_compressed(folder / f"{name}.npz", **expected())
        run_in_parts(traces / "run.h5")
        for part, (arrays, message) in about_parts().items():
            keep_expected(folder, f"run.part{part:04}", arrays, message)
        counted(GOLDENS["decoder"], traces / "statistics.h5")
        for path in sorted(traces.iterdir()):
            keep(folder, path)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
