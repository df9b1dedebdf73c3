"""The program of each process of tests/test_distributed.py, started by torchrun.

torchrun --nproc-per-node 3 -m tests.distributed_worker FOLDER train|killed|early
"""

from __future__ import annotations

import copy
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import grutrace
from tests.checks import EVERYTHING

STEPS = 3
KILLED = 1


class Tagger(nn.Module):
    """A bidirectional encoder, and a cell that is called step by step."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.GRU(3, 4, batch_first=True, bidirectional=True)
        self.decoder = nn.GRUCell(8, 5)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        encoded, _ = self.encoder(x)
        state = x.new_zeros(len(x), 5)
        states = []
        for step in range(3):
            state = self.decoder(encoded[:, step], state)
            states.append(state)
        return {"x": x, "encoded": encoded, "states": torch.stack(states, 1)}


def steps(model: nn.Module, rank: int) -> list[dict[str, np.ndarray]]:
    """Train, each rank on its own data; return inputs, outputs and weights."""
    torch.manual_seed(100 + rank)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    seen = []
    for _ in range(STEPS):
        before = {
            name.removeprefix("module."): parameter.detach().clone()
            for name, parameter in model.named_parameters()
        }
        made = model(torch.randn(2 + rank, 5 + rank, 3))
        optimizer.zero_grad()
        made["states"].square().sum().backward()
        optimizer.step()
        tensors = {**made, **before}
        seen.append({name: tensor.detach().numpy() for name, tensor in tensors.items()})
    return seen


def parallel(model: nn.Module) -> nn.Module:
    wrapped: nn.Module = DistributedDataParallel(model)
    return wrapped


def train(folder: Path, rank: int) -> None:
    """Run the same training untraced and traced. The untraced run is the oracle."""
    torch.manual_seed(0)
    model = Tagger()
    untraced = steps(parallel(copy.deepcopy(model)), rank)
    wrapped = parallel(model)
    statistics = grutrace.Statistics(folder / "stats.h5")
    with (
        grutrace.trace(model, record=EVERYTHING, gates="inline") as memory,
        grutrace.trace(model, sink=statistics),
        grutrace.trace(model, folder / "run.h5", record=EVERYTHING) as tracer,
        tracer.recording(tag=f"rank {rank}"),
    ):
        traced = steps(wrapped, rank)
    if rank == 0:
        with grutrace.Tracer(model, folder / "alone.h5", shard=False, recording=False):
            pass
    for one, other in zip(untraced, traced, strict=True):
        assert one.keys() == other.keys()
        assert all(np.array_equal(one[name], other[name]) for name in one), "tracing changed it"
    results: dict[str, Any] = {}
    for name in memory.sites:
        site = memory[name]
        results |= {f"{name}/{q}": site.rows(q) for q in EVERYTHING}
        results |= {f"{name}/initial": site.initial, f"{name}/lengths": site.lengths}
    np.savez(folder / f"memory{rank}.npz", **results)
    for step, arrays in enumerate(untraced):
        np.savez(folder / f"untraced{rank}.{step}.npz", **arrays)


def killed(folder: Path, rank: int) -> None:
    """Train until one rank kills itself, and note the calls flushed before."""
    model = Tagger()
    tracer = grutrace.Tracer(model, folder / "run.h5", record=EVERYTHING)
    tracer.start()
    for number in range(1000):
        steps(parallel(model) if number == 0 else model, rank)
        if number % 2 == 0:
            tracer.flush()
            # Other ranks end at any moment, so the note must be written atomically.
            note = folder / f"{rank}.calls"
            note.with_suffix(".new").write_text(str(len(tracer.calls)))
            note.with_suffix(".new").replace(note)
        if rank == KILLED and number == 4:
            # Rows in the queue are lost with it.
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.02)


def early(folder: Path, rank: int) -> None:
    """A tracer that is made before the process group."""
    model = Tagger()
    with grutrace.trace(model, folder / "early.h5"):
        model(torch.randn(1, 4, 3))


def main(folder: Path, what: str) -> None:
    rank = int(os.environ["RANK"])
    early(folder, rank)
    dist.init_process_group("gloo")
    {"train": train, "killed": killed}[what](folder, rank)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
