"""GRUs of two units: which structures of fixed points there are, and limit cycles.

Jordan, Sokol and Park (2021), "Gated recurrent units viewed through the lens of continuous time
dynamical systems" (https://doi.org/10.3389/fncom.2021.678158). With a constant input the GRU is a
step of length 1 of

    dh/dt = (1 - z) (n(h) - h)

In two dimensions they find a rich repertoire: many structures of sinks, sources and saddles, stable
limit cycles, and homoclinic bifurcations. They could not train a GRU to have a continuous
attractor.

Here networks with random weights are searched, and each structure is checked with the index
theorem: the flow points into the square of the states everywhere on its border, so sinks and
sources minus saddles are 1. A search that missed a point would break this. Fixed points of the flow
and of the GRU's map are the same, but a point may be stable for the flow and unstable for the map,
whose steps are longer. Both are counted.

The paper applies the reset gate before the recurrent product, PyTorch after it. So a weight matrix
has other points here than there.

    python examples/literature/two_units.py          # 2 minutes
    python examples/literature/two_units.py --small  # seconds
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from report import Cell, run, show
from torch import nn

import grutrace
from grutrace.analysis import SiteArrays, fixed_points, lyapunov, modes


@dataclass(frozen=True)
class Size:
    """How much is searched.

    Attributes:
        networks: Number of random networks.
        side: A grid of so many starts a side is searched from.
        steps: Steps of a run on a limit cycle.
    """

    networks: int = 3000
    side: int = 20
    steps: int = 20_000


SMALL = Size(networks=60, side=12, steps=1000)


class Structure(NamedTuple):
    """Numbers of fixed points, by their stability in continuous time."""

    sinks: int
    saddles: int
    sources: int

    @property
    def index(self) -> int:
        """The sum of the points' indices, which is 1."""
        return self.sinks + self.sources - self.saddles


@dataclass(frozen=True)
class Portrait:
    """The fixed points of a network.

    Attributes:
        structure: In continuous time.
        stable: Number of points that are stable for the map.
        unstable_sinks: Number of sinks of the flow that are unstable for the map.
    """

    structure: Structure
    stable: int
    unstable_sinks: int


def layer_of(recurrent: np.ndarray, bias: np.ndarray) -> nn.GRU:
    """A layer of two units with these weights, (6, 2), and biases, (6,), and no input."""
    layer = nn.GRU(1, 2, dtype=torch.float64).requires_grad_(False)
    for parameter in layer.parameters():
        parameter.zero_()
    layer.weight_hh_l0.copy_(torch.from_numpy(recurrent))
    layer.bias_hh_l0.copy_(torch.from_numpy(bias))
    return layer


def record(layer: nn.GRU, start: np.ndarray, steps: int) -> grutrace.Trace:
    """Trace a run from one state."""
    record = ("reset", "update", "candidate", "hidden")
    with grutrace.trace(layer, record=record) as trace:
        layer(torch.zeros(steps, 1, 1, dtype=torch.float64), torch.from_numpy(start)[None, None])
    return trace


def portrait(layer: nn.GRU, side: int) -> Portrait:
    """The fixed points that a grid of states leads to.

    A fixed point is a state that is its own candidate, n(h) = h. So it stays one with other update
    gates, and is searched with gates of a half: a nearly closed gate makes every state slow.
    """
    grid = np.stack(np.meshgrid(*2 * [np.linspace(-1, 1, side)]), axis=-1).reshape(-1, 2)
    weights = {name.removesuffix("_l0"): value.numpy() for name, value in layer.named_parameters()}
    half_open = {name: value.copy() for name, value in weights.items()}
    for value in half_open.values():
        value[2:4] = 0
    found = fixed_points(SiteArrays(hidden=grid, weights=half_open), starts=grid, slow=1e-8)
    site = SiteArrays(hidden=grid, weights=weights)
    near = [modes(site, state).eigenvalues for state in found.states[found.fixed]]
    growing = [int((values.real > 1).sum()) for values in near]
    stable = [bool((np.abs(values) < 1).all()) for values in near]
    return Portrait(
        Structure(*(growing.count(number) for number in range(3))),
        sum(stable),
        sum(not each for number, each in zip(growing, stable, strict=True) if number == 0),
    )


def random_layer(draw: np.random.Generator) -> nn.GRU:
    """Weights and biases of random size."""
    weights = draw.normal(0, draw.choice([3.0, 6.0, 12.0]), (6, 2))
    return layer_of(weights, draw.normal(0, draw.choice([0.0, 1.0, 3.0]), 6))


def census(size: Size) -> list[Portrait]:
    """The portraits of random networks."""
    draw = np.random.default_rng(0)
    return [portrait(random_layer(draw), size.side) for _ in range(size.networks)]


def switches(gain: float) -> nn.GRU:
    """Two units that do not see each other. Each has three points if the gain is above 2."""
    weights = np.zeros((6, 2))
    weights[4:] = gain * np.eye(2)
    return layer_of(weights, np.zeros(6))


def rotation(gain: float, angle: float) -> nn.GRU:
    """A network whose candidate turns the state, with gates of a half."""
    weights = np.zeros((6, 2))
    cosine, sine = np.cos(angle), np.sin(angle)
    weights[4:] = gain * np.array([[cosine, -sine], [sine, cosine]])
    return layer_of(weights, np.zeros(6))


@dataclass(frozen=True)
class Cycle:
    """A run of `rotation`.

    Attributes:
        eigenvalue: Size of the eigenvalues at the state 0.
        radius: Mean distance from 0 in the second half of the run.
        period: Mean number of steps of a turn; infinite if the state came to rest.
        exponent: Largest Lyapunov exponent.
    """

    eigenvalue: float
    radius: float
    period: float
    exponent: float


def cycle(gain: float, angle: float, steps: int) -> Cycle:
    """Run a rotating network, and see where it goes."""
    site = record(rotation(gain, angle), np.array([0.1, 0.0]), steps)["l0"]
    points = fixed_points(site, starts=np.zeros((1, 2)))
    late = site.hidden[len(site.hidden) // 2 :]
    radius = float(np.linalg.norm(late, axis=1).mean())
    turned = np.unwrap(np.arctan2(late[:, 1], late[:, 0]))
    speed = (turned[-1] - turned[0]) / (len(turned) - 1)
    return Cycle(
        eigenvalue=float(np.abs(points.eigenvalues[0, 0])),
        radius=radius,
        period=2 * np.pi / abs(speed) if radius > 1e-3 else np.inf,
        exponent=lyapunov(site, count=1, skip=steps // 2).largest,
    )


def first_oscillating_gain(angle: float) -> float:
    """Where `rotation` starts to oscillate: |1/2 + a/4 exp(i angle)| = 1, the map's bifurcation."""
    return float(2 * (np.sqrt(np.cos(angle) ** 2 + 3) - np.cos(angle)))


def report(small: bool) -> None:
    size = SMALL if small else Size()
    portraits = census(size)
    counts = Counter(portrait.structure for portrait in portraits)
    rows: list[list[Cell]] = [
        [sum(structure), *structure, structure.index, count]
        for structure, count in sorted(counts.items(), key=lambda item: (sum(item[0]), item[0]))
    ]
    header = ["points", "sinks", "saddles", "sources", "index, theory 1", "networks"]
    show(f"Structures of fixed points of {size.networks} random networks", header, rows)
    complete = sum(portrait.structure.index == 1 for portrait in portraits)
    cycles = sum(portrait.structure == (0, 0, 1) for portrait in portraits)
    differ = sum(portrait.unstable_sinks > 0 for portrait in portraits)
    print(f"\nIndex 1, so that no point is missing: {complete} of {size.networks}.")
    print(f"One source alone, so that the flow has a stable limit cycle: {cycles}.")
    print(f"A sink of the flow is unstable for the map: {differ}.")

    rows = []
    for gain in (1.9, 2.1, 4.0):
        found = portrait(switches(gain), size.side)
        expected = Structure(4, 4, 1) if gain > 2 else Structure(1, 0, 0)
        rows.append([gain, str(tuple(found.structure)), str(tuple(expected)), found.stable])
    header = ["gain", "sinks, saddles, sources", "theory", "stable for the map"]
    show("Two units that do not see each other", header, rows)

    angle = np.pi / 3
    rows = []
    for gain in (2.0, 2.5, 2.7, 3.0, 4.0, 6.0):
        turning = cycle(gain, angle, size.steps)
        rows.append([gain, turning.eigenvalue, turning.radius, turning.period, turning.exponent])
    header = ["gain", "|eigenvalue| at 0", "radius", "steps a turn", "largest exponent"]
    show("A rotating network", header, rows)
    print(f"\nTheory: the map oscillates above a gain of {first_oscillating_gain(angle):.3f},")
    print(f"the flow above {2 / np.cos(angle):.3f}.")


if __name__ == "__main__":
    run(__doc__, report)
