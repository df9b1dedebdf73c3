"""Chrono initialization: the timescales of units before and after training on two tasks.

Tallec and Ollivier (2018), "Can recurrent neural networks warp time?"
(https://arxiv.org/abs/1804.11188), set the bias of the gate that keeps a unit's state to
log u. They draw u uniformly from 1 to T_max - 1; T_max is the range of dependencies of the task.
In PyTorch that is the update gate of a GRU: with z = u / (u + 1) the unit forgets in -1 / log z,
about u + 1/2, steps. The paper claims that learning of long-term dependencies improves greatly. Its
tasks, here with shorter gaps and a GRU in place of an LSTM:

- copy: after 10 symbols out of 8 come T blanks and a signal, and the symbols have to be recalled. A
  network without memory has a loss of 10 log 8 / (T + 20). T_max = 3 T / 2, as in the paper.
- adding: two of T numbers from 0 to 1 are marked, and the last output is their sum. Without memory
  the squared error is 1/6, the variance of the sum. T_max = T.

docs/chrono-initialization.ipynb shows the gradients.

    python examples/literature/chrono.py          # 8 minutes
    python examples/literature/chrono.py --small  # seconds
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from report import Cell, run, show
from torch import Tensor, nn

import grutrace
from grutrace.analysis import timescales

#: Symbols of the copy task, and how many are recalled. Two more symbols: a blank and a signal.
SYMBOLS, RECALLED = 8, 10


@dataclass(frozen=True)
class Size:
    """How much is trained.

    Attributes:
        units: H.
        copy_gap: T of the copy task.
        adding_length: T of the adding task.
        steps: Steps of training.
        batch: Sequences of a step.
    """

    units: int = 64
    copy_gap: int = 150
    adding_length: int = 150
    steps: int = 2500
    batch: int = 20


SMALL = Size(units=16, copy_gap=20, adding_length=30, steps=20)


@dataclass(frozen=True)
class Task:
    """A task.

    Attributes:
        inputs: Size of an input.
        outputs: Size of an output.
        longest: T_max.
        memoryless: Loss of a network without memory.
        draw: Draws a batch: (B, T, inputs), and what `loss` compares the outputs with.
        loss: Of the outputs, (B, T, outputs).
    """

    inputs: int
    outputs: int
    longest: float
    memoryless: float
    draw: Callable[[torch.Generator], tuple[Tensor, Tensor]]
    loss: Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Learned:
    """What training did.

    Attributes:
        before: (H,) timescale of each unit before it, in steps.
        after: (H,) and after it.
        loss: Mean of the last tenth of the steps, over that of a network without memory.
    """

    before: np.ndarray
    after: np.ndarray
    loss: float


def copy_task(size: Size) -> Task:
    """Recall symbols after a gap."""
    gap, length = size.copy_gap, size.copy_gap + 2 * RECALLED
    blank, signal = SYMBOLS, SYMBOLS + 1

    def draw(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        symbols = torch.randint(SYMBOLS, (size.batch, RECALLED), generator=generator)
        read = torch.full((size.batch, length), blank)
        read[:, :RECALLED], read[:, -RECALLED - 1] = symbols, signal
        expected = torch.full((size.batch, length), blank)
        expected[:, -RECALLED:] = symbols
        return nn.functional.one_hot(read, SYMBOLS + 2).float(), expected

    return Task(
        inputs=SYMBOLS + 2,
        outputs=SYMBOLS + 1,
        longest=1.5 * gap,
        memoryless=RECALLED * float(np.log(SYMBOLS)) / length,
        draw=draw,
        loss=lambda outputs, expected: nn.functional.cross_entropy(outputs.mT, expected),
    )


def adding_task(size: Size) -> Task:
    """Add the two marked numbers."""
    length = size.adding_length

    def draw(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        numbers = torch.rand(size.batch, length, generator=generator)
        marks = torch.zeros(size.batch, length)
        for half in range(2):
            places = torch.randint(length // 2, (size.batch, 1), generator=generator)
            marks.scatter_(1, places + half * (length // 2), 1.0)
        return torch.stack([numbers, marks], dim=2), (numbers * marks).sum(dim=1)

    return Task(
        inputs=2,
        outputs=1,
        longest=length,
        memoryless=1 / 6,
        draw=draw,
        loss=lambda outputs, expected: nn.functional.mse_loss(outputs[:, -1, 0], expected),
    )


TASKS = {"copy": copy_task, "adding": adding_task}


class Network(nn.Module):
    """A GRU with a linear readout."""

    def __init__(self, task: Task, units: int, chrono: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.rnn = nn.GRU(task.inputs, units, batch_first=True)
        self.readout = nn.Linear(units, task.outputs)
        if chrono:
            update = slice(units, 2 * units)
            with torch.no_grad():
                self.rnn.bias_ih_l0[update] = torch.empty(units).uniform_(1, task.longest - 1).log()
                self.rnn.bias_hh_l0[update] = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.readout(self.rnn(x)[0])


def unit_timescales(network: Network, task: Task) -> np.ndarray:
    """How long each unit keeps its state, in steps: (H,)."""
    x, _ = task.draw(torch.Generator().manual_seed(2))
    with torch.no_grad(), grutrace.trace(network, record=("update", "hidden")) as trace:
        network(x)
    return np.asarray(timescales(trace["rnn.l0"]).tau)


def learn(task: Task, size: Size, chrono: bool) -> Learned:
    """Train a network."""
    network, generator = Network(task, size.units, chrono), torch.Generator().manual_seed(1)
    before = unit_timescales(network, task)
    optimizer = torch.optim.RMSprop(network.parameters(), 1e-3, alpha=0.9)
    losses = []
    for _ in range(size.steps):
        x, expected = task.draw(generator)
        optimizer.zero_grad()
        loss = task.loss(network(x), expected)
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    last = float(np.mean(losses[-max(1, size.steps // 10) :]))
    return Learned(before, unit_timescales(network, task), last / task.memoryless)


def expected_timescales(longest: float, shares: np.ndarray) -> np.ndarray:
    """Quantiles of -1 / log z of chrono initialization, without what inputs and states add."""
    u = 1 + shares * (longest - 2)
    return 1 / np.log1p(1 / u)


def report(small: bool) -> None:
    size = SMALL if small else Size()
    shares = np.array([0.1, 0.5, 0.9])
    for name, make in TASKS.items():
        task = make(size)
        rows: list[list[Cell]] = []
        for chrono in (False, True):
            found = learn(task, size, chrono)
            kind = "chrono" if chrono else "default"
            for when, values in (("before", found.before), ("after", found.after)):
                loss = found.loss if when == "after" else None
                rows.append([kind, when, *np.quantile(values, shares).tolist(), loss])
        theory = expected_timescales(task.longest, shares)
        rows.insert(2, ["chrono", "theory", *theory.tolist(), None])
        header = ["initialization", "training", "10 %", "50 %", "90 %", "loss over memoryless"]
        show(f"{name}: timescales of the units, steps (T_max {task.longest:g})", header, rows)


if __name__ == "__main__":
    run(__doc__, report)
