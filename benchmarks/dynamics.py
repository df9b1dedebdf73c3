"""Fixed points and Lyapunov exponents, compared with what people write in PyTorch.

The other search minimizes the speed with Adam, as FixedPointFinder does (Golub and Sussillo 2018).
This is a version of our own in float64, with the settings of its PyTorch class and with a learning
rate that falls on a plateau: the package itself is not on PyPI. It has no eigenvalues; ours has.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import grutrace
from benchmarks.figures import Figure, Target, measured
from benchmarks.pairs import ratio
from grutrace.analysis import SiteArrays, fixed_points, lyapunov
from grutrace.analysis.dynamics.fixed_points import sorted_eigenvalues
from grutrace.analysis.dynamics.gru_map import GRUMap
from grutrace.records import DEFAULT_RECORD, Array
from grutrace.storage.read.site import SiteTrace

#: Units and starts of the search, and the gains of the random networks.
UNITS, STARTS, GAINS = 256, 64, (1.5, 3.0)

#: Steps from uniform states to the starts.
EARLY = 10

#: Largest time of the search as a share of that of the other, and largest median q likewise.
SEARCH, MEDIAN = 0.1, 1.0

#: The flip-flop: bits, units, steps of a sequence, sequences, probability of an input to a bit at a
#: step, and steps of training. Those of the example of FixedPointFinder, except the training.
BITS, FLIP_UNITS, FLIP_STEPS, FLIP_BATCH, FLIP_CHANCE, TRAINING = 3, 16, 64, 64, 0.2, 600

#: Starts of the search in the flip-flop.
FLIP_STARTS = 512

#: Points are equal if no unit differs by more than this.
SAME = 0.01

#: Shapes of Lyapunov spectra: units, exponents, sequences, steps.
SHAPES = ((128, 16, 8, 1000), (128, 16, 64, 200), (32, 8, 8, 1000))

#: Steps between two QRs of the PyTorch loop.
INTERVAL = 10

#: Number of pairs of Lyapunov spectra.
PAIRS = 5

#: Makes the schedule of the learning rate.
Schedule = Callable[[torch.optim.Optimizer], Any]


def figures() -> Iterator[Figure]:
    """Yield the time and the median q of the search, and the times of Lyapunov spectra."""
    for gain in GAINS:
        yield from search(gain)
    cell, states = flip_flop()
    yield from compare("fixed points of a flip-flop", cell, states)
    for shape in SHAPES:
        yield spectrum(*shape)


def random_cell(gain: float, units: int = UNITS) -> nn.GRUCell:
    """Recurrent weights that are normal with this spread over sqrt(H), and no biases."""
    torch.manual_seed(0)
    cell = nn.GRUCell(1, units, bias=False).double()
    with torch.no_grad():
        cell.weight_hh.normal_(0, gain / units**0.5)
    return cell.requires_grad_(False)


def search(
    gain: float, units: int = UNITS, starts: int = STARTS, steps: int | None = None
) -> Iterator[Figure]:
    """Yield figures of one network. `steps` limits those of Adam."""
    cell = random_cell(gain, units)
    states = 2 * torch.rand(starts, units).double() - 1
    for _ in range(EARLY):
        states = cell(torch.zeros(starts, 1).double(), states)
    yield from compare(f"fixed points at gain {gain:g}", cell, states, steps)


def compare(
    name: str, cell: nn.GRUCell, states: Tensor, steps: int | None = None
) -> Iterator[Figure]:
    """Yield figures of our search and of Adam's from the same states."""
    site = SiteArrays(
        hidden=states.numpy(),
        weights={name: value.numpy() for name, value in cell.named_parameters()},
    )
    find = partial(fixed_points, site, starts=states.numpy(), slow=np.inf)
    find()
    times = []
    for _ in range(PAIRS):
        began = time.perf_counter()
        points = find()
        times.append(time.perf_counter() - began)
    ours, median = float(np.median(times)), float(np.median(np.repeat(points.q, points.reached)))
    motion = GRUMap(dict(site.weights), np.zeros(cell.input_size)).motion(points.states, 1)
    began = time.perf_counter()
    sorted_eigenvalues(motion)
    # Those of Adam's points are not computed.
    search_alone = ours - (time.perf_counter() - began)
    yield Figure(name, ours, "s", details={"without_eigenvalues": search_alone})
    yield Figure(f"{name}: median q", median)
    for kind, (rate, schedule, most) in SCHEDULES.items():
        began = time.perf_counter()
        theirs = minimize_with_adam(cell, states, rate, schedule, steps or most)
        took = time.perf_counter() - began
        q = float(np.median(speeds(cell, theirs).numpy()))
        alone = search_alone / took
        details = {"seconds": took, "median_q": q, "without_eigenvalues": alone}
        yield Figure(f"{name}, over Adam, {kind}", ours / took, "", Target(SEARCH), details=details)
        # Both are rounding where every start ends at a fixed point.
        share = median / q if q > 1e-12 else float(median > 1e-12)
        yield Figure(f"{name}: median q, over Adam's, {kind}", share, "", Target(MEDIAN))
        # Adam ends near a point, so its ends are refined. Points between these do not count.
        refined = fixed_points(site, starts=theirs.numpy())
        found = points.states[points.fixed]
        others = refined.states[refined.fixed & (refined.reached > 0)]
        details = {"ours": len(found), "theirs": len(others)}
        missed = float(np.count_nonzero(~among(others, found)))
        yield Figure(
            f"{name}: points of Adam only, {kind}", missed, "", Target(0.0), details=details
        )


def among(states: Array, others: Array) -> Array:
    """Which of (P, H) states are among (Q, H) others: (P,)."""
    distance = np.abs(states[:, np.newaxis] - others).max(axis=2)
    return np.asarray((distance <= SAME).any(axis=1))


def flip_flop() -> tuple[nn.GRUCell, Tensor]:
    """Train a GRU to remember the last input of each bit; return it, and states that it visits."""
    torch.manual_seed(0)
    layer, readout = nn.GRU(BITS, FLIP_UNITS, batch_first=True), nn.Linear(FLIP_UNITS, BITS)
    optimizer = torch.optim.Adam([*layer.parameters(), *readout.parameters()], 0.01)
    for _ in range(TRAINING):
        inputs, targets = draw_flips()
        loss = nn.functional.mse_loss(readout(layer(inputs)[0]), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    cell = nn.GRUCell(BITS, FLIP_UNITS).double().requires_grad_(False)
    with torch.no_grad():
        for name, value in cell.named_parameters():
            value.copy_(getattr(layer, f"{name}_l0"))
        states = layer(draw_flips()[0])[0].reshape(-1, FLIP_UNITS)
    return cell, states[torch.randperm(len(states))[:FLIP_STARTS]].double()


def draw_flips() -> tuple[Tensor, Tensor]:
    """Inputs of -1, 0 or 1, and the last that was not 0, (B, T, BITS) each."""
    shape = (FLIP_BATCH, FLIP_STEPS, BITS)
    inputs = (torch.rand(shape) < FLIP_CHANCE) * (torch.randint(2, shape) * 2.0 - 1)
    inputs[:, 0] = torch.randint(2, shape[::2]) * 2.0 - 1
    targets = inputs.clone()
    for step in range(1, FLIP_STEPS):
        kept = targets[:, step] == 0
        targets[:, step][kept] = targets[:, step - 1][kept]
    return inputs, targets


#: Adam's first learning rate, its schedule and its number of steps: those of
#: FixedPointFinderTorch, and a rate that is halved on a plateau.
SCHEDULES: dict[str, tuple[float, Schedule, int]] = {
    "published": (
        0.05,
        lambda adam: torch.optim.lr_scheduler.StepLR(adam, step_size=500, gamma=0.7),
        2000,
    ),
    "halved on a plateau": (
        0.01,
        lambda adam: torch.optim.lr_scheduler.ReduceLROnPlateau(adam, factor=0.5),
        3000,
    ),
}


def speeds(cell: nn.GRUCell, states: Tensor) -> Tensor:
    """q of each state, at an input of zero."""
    inputs = torch.zeros(len(states), cell.input_size).double()
    return 0.5 * (cell(inputs, states) - states).square().sum(1)


def minimize_with_adam(
    cell: nn.GRUCell, states: Tensor, rate: float, schedule: Schedule, steps: int
) -> Tensor:
    """Minimize the mean of q jointly from all states, until each is at most 1e-12."""
    h = states.clone().requires_grad_()
    adam = torch.optim.Adam([h], lr=rate)
    scheduler = schedule(adam)
    plateau = isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)
    for _ in range(steps):
        adam.zero_grad()
        q = speeds(cell, h)
        if bool((q < 1e-12).all()):
            break
        loss = q.mean()
        loss.backward()
        adam.step()
        scheduler.step(loss.item()) if plateau else scheduler.step()
    return h.detach()


def spectrum(units: int, count: int, batch: int, steps: int) -> Figure:
    """The time of exponents over that of a batched loop in PyTorch."""
    torch.manual_seed(0)
    layer = nn.GRU(8, units)
    with torch.no_grad():
        layer.weight_hh_l0.normal_(0, 3 / units**0.5)
        with grutrace.trace(layer, record=DEFAULT_RECORD, gates="inline") as trace:
            layer(torch.randn(steps, batch, 8))
    site = trace["l0"]
    result = ratio(lambda: loop(site, count), lambda: lyapunov(site, count=count), 0.0, pairs=PAIRS)
    name = f"Lyapunov spectrum, H{units} k{count} B{batch} T{steps}, over a loop"
    return measured(name, result, Target(1.0))


def loop(site: SiteTrace, count: int) -> Array:
    """Lyapunov exponents of sequences of one length, with a QR every ten steps."""
    gates = [torch.from_numpy(site.padded(name)[0]).double() for name in DEFAULT_RECORD]
    weights = {name: torch.from_numpy(value).double() for name, value in site.weights(-1).items()}
    batch, steps, units = gates[0].shape
    initial = torch.from_numpy(np.asarray(site.initial[:])).double()
    previous = torch.cat([initial[:, None], gates[3][:, :-1]], 1)
    by_gate = weights["weight_hh"].split(units)
    bias = weights["bias_hh"][2 * units :]
    directions = torch.linalg.qr(torch.randn(batch, units, count).double())[0]
    logs = torch.zeros(batch, count).double()
    for step in range(steps):
        r, z, n = (gate[:, step] for gate in gates[:3])
        h = previous[:, step]
        slope = (1 - z) * (1 - n * n)
        factors = (
            slope * (h @ by_gate[2].T + bias) * r * (1 - r),
            (h - n) * z * (1 - z),
            slope * r,
        )
        after = z[..., None] * directions
        for factor, weight in zip(factors, by_gate, strict=True):
            after = after + factor[..., None] * (weight @ directions)
        directions = after
        if (step + 1) % INTERVAL == 0:
            directions, upper = torch.linalg.qr(after)
            logs += upper.diagonal(dim1=1, dim2=2).abs().log()
    return (logs.sum(0) / batch / steps).numpy()
