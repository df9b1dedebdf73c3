"""Forked children do not change the parent's trace; each distributed rank has its own trace."""

from __future__ import annotations

import multiprocessing
import subprocess
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

import grutrace
from tests import forks
from tests.integration.models import CALLS, Mixed, trace

needs_fork = pytest.mark.skipif(
    "fork" not in multiprocessing.get_all_start_methods(), reason="this system does not fork"
)


class Batches(Dataset):
    """Batches made in a worker; with a model, by running it there."""

    def __init__(self, model: Mixed | None = None) -> None:
        self.model = model

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> torch.Tensor:
        batch = torch.full((2, 5, 3), index / 6)
        if self.model is None:
            return batch
        with torch.no_grad(), warnings.catch_warnings(record=True) as messages:
            warnings.simplefilter("always")
            self.model(batch)
            self.model(batch)
        return torch.tensor([sum("forked child" in str(message.message) for message in messages)])


@needs_fork
@pytest.mark.parametrize("path", [None, "run.h5"])
def test_workers_of_a_data_loader_are_forked_while_a_file_is_written(path, model, tmp_path) -> None:
    loader = DataLoader(Batches(), batch_size=None, num_workers=2, multiprocessing_context="fork")
    with trace(model, path=path and tmp_path / path) as tracer, torch.no_grad():
        model(torch.zeros(2, 5, 3))
        for _ in range(2):
            for batch in loader:
                model(batch)
    assert tracer.calls["module"].tolist() == 13 * CALLS
    inputs = [sequence.input[0, 0] for sequence in tracer["stack.l0"]]
    assert len(set(inputs)) == 6


@needs_fork
@pytest.mark.parametrize("path", [None, "run.h5"])
def test_a_child_that_runs_the_model_warns_once_and_records_nothing(path, model, tmp_path) -> None:
    loader = DataLoader(
        Batches(model), batch_size=None, num_workers=1, multiprocessing_context="fork"
    )
    with trace(model, path=path and tmp_path / path) as tracer, torch.no_grad():
        model(torch.zeros(2, 5, 3))
        told = [int(item) for item in loader]
        model(torch.zeros(2, 5, 3))
    assert told == [1, 0, 0, 0, 0, 0]
    assert tracer.calls["module"].tolist() == 2 * CALLS
    if path:
        with grutrace.open(tmp_path / path) as again:
            assert again.closed
            assert len(again.calls) == 2 * len(CALLS)


DISTRIBUTED = """
import os, sys
import torch
from torch import nn, distributed
from torch.nn.parallel import DistributedDataParallel
import grutrace

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.GRU(3, 4, 2, batch_first=True, dropout=0.2)
        self.out = nn.Linear(4, 1)
    def forward(self, x):
        return self.out(self.rnn(x)[0])

def train(tracer=None):
    torch.manual_seed(0)
    model = DistributedDataParallel(Model())
    if traced := tracer is not None:
        tracer = tracer(model)
        tracer.start()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for step in range(3):
        torch.manual_seed(10 * step + rank)
        optimizer.zero_grad()
        model(torch.randn(2, 5, 3)).square().sum().backward()
        optimizer.step()
    if traced:
        tracer.close()
    return [*(each.grad for each in model.parameters()), *model.state_dict().values()]

rank, folder = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
distributed.init_process_group(
    "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2
)
expected = train()
found = train(lambda model: grutrace.Tracer(model, f"{folder}/run.h5", check="raise"))
distributed.destroy_process_group()
assert len(expected) == len(found) > 8
assert all(map(torch.equal, expected, found))
"""


@pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
    reason="this PyTorch has no gloo",
)
def test_two_ranks_each_with_its_own_file(tmp_path) -> None:
    def of_rank(rank: int) -> subprocess.CompletedProcess[str]:
        return forks.run("-W", "error::UserWarning", "-c", DISTRIBUTED, str(rank), tmp_path)

    with ThreadPoolExecutor(2) as pool:
        for done in pool.map(of_rank, range(2)):
            assert done.returncode == 0, done.stderr
    inputs = []
    for rank in range(2):
        with grutrace.open(tmp_path / f"run.rank{rank:04}.h5") as trace:
            assert trace.closed
            assert trace.sites == ("module.rnn.l0", "module.rnn.l1")
            assert trace.calls["weights"].tolist() == [0, 1, 2]
            inputs.append(trace["module.rnn.l1"].padded("hidden")[0])
    assert not np.array_equal(*inputs), "the control: each rank saw batches of its own"
