"""A training run that traces to a file until it is killed. Run as a script by test_crash.py.

    python -m tests.crash_victim FOLDER TRIES

One process loads torch; each try is a fork of it, killed with SIGKILL at a random moment. Before a
try's trace is flushed nothing is promised; after, the number of calls is written to its own file.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

import grutrace
from tests.capture.models import EncoderDecoder
from tests.checks import EVERYTHING


def train(path: Path, acknowledged: int) -> None:
    """Train and trace for ever, acknowledging what was flushed."""
    torch.set_num_threads(1)
    model = EncoderDecoder(layers=2, dropout=0.3)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    calls = 0
    with grutrace.trace(model, path, record=EVERYTHING) as tracer:
        while True:
            model(torch.randn(8, 12, 5), steps=6).square().mean().backward()
            calls += 7
            if random.random() < 0.2:
                optimizer.step()
            if random.random() < 0.3:
                tracer.flush()
                os.pwrite(acknowledged, calls.to_bytes(8, "little"), 0)


def main(folder: Path, tries: int) -> None:
    # What loads slowly is loaded before the forks.
    torch.optim.SGD([torch.zeros(1)], 0.01)
    assert grutrace.Tracer
    for number in range(tries):
        acknowledged = os.open(folder / f"{number}.calls", os.O_CREAT | os.O_RDWR)
        os.pwrite(acknowledged, bytes(8), 0)
        child = os.fork()
        if not child:
            random.seed(number)
            train(folder / f"{number}.h5", acknowledged)
        time.sleep(random.uniform(0.05, 0.5))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(acknowledged)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
