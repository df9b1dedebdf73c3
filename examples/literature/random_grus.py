"""Random GRUs: what the gains of the gates do to the spectrum, to chaos and to fixed points.

Can, Krishnamurthy and Schwab (2020), "Gating creates slow modes and controls phase-space complexity
in GRUs and LSTMs" (https://arxiv.org/abs/2002.00025). The recurrent weights of each gate are normal
with a standard deviation of its gain over sqrt(H), and there is no input. The paper claims that

- the update gate makes an accumulation of slow modes, and can poise the network at a marginally
  stable point,
- the reset gate controls the spectral radius of the Jacobian, and the complexity of the landscape
  of fixed points: there is a phase diagram of their number.

The paper applies the reset gate before the recurrent product, PyTorch after it. So the theory is
repeated here for PyTorch's GRU, with the method of the paper:

- At the state 0 the Jacobian is z + (1 - z) r W, z and r being sigmoids of the biases. By the
  circular law its eigenvalues fill a disc, and 0 is stable if the gain a of W is below 1 / r.
- Elsewhere row i of J - diag(z) has independent entries of variance s_i^2 / H. The eigenvalues lie
  where the mean over the units of s_i^2 / |lambda - z_i|^2 is 1 or more.

    python examples/literature/random_grus.py          # 4 minutes on two cores
    python examples/literature/random_grus.py --small  # seconds
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from report import Cell, run, show
from torch import nn

import grutrace
from grutrace.analysis import fixed_points, jacobian, lyapunov, modes


@dataclass(frozen=True)
class Size:
    """How much is computed.

    Attributes:
        units: H of the networks whose spectra and exponents are measured.
        steps: Steps of a run, the first third of which is not counted.
        sequences: Number of runs.
        few_units: H of the networks whose fixed points are counted.
        starts: Number of states to search from.
    """

    units: int = 400
    steps: int = 1500
    sequences: int = 4
    few_units: int = 100
    starts: int = 512


SMALL = Size(units=100, steps=240, sequences=2, few_units=50, starts=64)


@dataclass(frozen=True)
class Gains:
    """The gains of the recurrent weights, and the biases of the gates."""

    candidate: float
    update: float = 0.0
    reset: float = 0.0
    update_bias: float = 0.0
    reset_bias: float = 0.0


@dataclass(frozen=True)
class Spectrum:
    """Eigenvalues of the Jacobian at a state that the network has reached.

    Attributes:
        slow: Share of eigenvalues with a timescale above 10 steps.
        near_one: Share within 0.05 of 1.
        radius: Spectral radius.
        edge: What the theory gives for the largest real part.
        outside: Share of eigenvalues outside the theory's boundary.
    """

    slow: float
    near_one: float
    radius: float
    edge: float
    outside: float


def network(units: int, gains: Gains, seed: int = 0) -> nn.GRU:
    """A layer with random recurrent weights, and no input."""
    generator = torch.Generator().manual_seed(seed)
    layer = nn.GRU(1, units, dtype=torch.float64).requires_grad_(False)
    for parameter in layer.parameters():
        parameter.zero_()
    for rows, gain in zip(
        layer.weight_hh_l0.split(units), (gains.reset, gains.update, gains.candidate), strict=True
    ):
        rows.copy_(torch.randn(rows.shape, generator=generator, dtype=rows.dtype))
        rows.mul_(gain / units**0.5)
    layer.bias_hh_l0[:units] = gains.reset_bias
    layer.bias_hh_l0[units : 2 * units] = gains.update_bias
    return layer


def record(layer: nn.GRU, steps: int, sequences: int) -> Any:
    """Trace runs from random states; return the site."""
    generator = torch.Generator().manual_seed(1)
    start = torch.randn(1, sequences, layer.hidden_size, generator=generator, dtype=torch.float64)
    record = ("reset", "update", "candidate", "hidden")
    with grutrace.trace(layer, record=record) as trace:
        layer(torch.zeros(steps, sequences, 1, dtype=torch.float64), start.clamp(-1, 1))
    return trace["l0"]


def spectrum(gains: Gains, size: Size) -> Spectrum:
    """The eigenvalues at the last state of a run, and where the theory has them."""
    site = record(network(size.units, gains), size.steps, 1)
    eigenvalues = np.linalg.eigvals(jacobian(site, sequence=0, step=-1))
    r, z, n = site.reset[-1], site.update[-1], site.candidate[-1]
    before, recurrent = site.hidden[-2], site.weights(-1)["weight_hh"]
    product = recurrent[2 * size.units :] @ before + site.weights(-1)["bias_hh"][2 * size.units :]
    slope = (1 - z) * (1 - n**2)
    square = (
        (gains.candidate * slope * r) ** 2
        + (gains.update * (before - n) * z * (1 - z)) ** 2
        + (gains.reset * slope * product * r * (1 - r)) ** 2
    )

    def density(points: np.ndarray) -> np.ndarray:
        distance = np.abs(points[:, np.newaxis] - z) ** 2
        return np.mean(square / np.maximum(distance, 1e-300), axis=1)

    right = z.max() + np.linspace(1e-6, 3.0, 30_001)
    within = right[density(right) >= 1]
    return Spectrum(
        slow=float(np.mean(np.abs(eigenvalues) > np.exp(-1 / 10))),
        near_one=float(np.mean(np.abs(eigenvalues - 1) < 0.05)),
        radius=float(np.abs(eigenvalues).max()),
        edge=float(within.max(initial=z.max())),
        outside=float(np.mean(density(eigenvalues) < 1)),
    )


def critical_gain(reset_bias: float, size: Size, seeds: int = 3) -> float:
    """The gain at which the state 0 loses its stability, by bisection."""
    found = []
    for seed in range(seeds):
        low, high = 0.1, 20.0
        while high - low > 1e-3:
            gain = (low + high) / 2
            layer = network(size.units, Gains(gain, reset_bias=reset_bias), seed)
            site = record(layer, 1, 1)
            radius = np.abs(modes(site, np.zeros(size.units)).eigenvalues[0])
            low, high = (low, gain) if radius > 1 else (gain, high)
        found.append((low + high) / 2)
    return float(np.mean(found))


def largest_exponent(gains: Gains, size: Size) -> float:
    """The largest Lyapunov exponent, in nats a step."""
    site = record(network(size.units, gains), size.steps, size.sequences)
    return lyapunov(site, count=1, skip=size.steps // 3).largest


def other_points(gains: Gains, size: Size) -> int:
    """How many fixed points, besides the state 0, random states of all sizes lead to."""
    site = record(network(size.few_units, gains), 1, 1)
    draw = np.random.default_rng(0)
    starts = draw.uniform(-1, 1, (size.starts, size.few_units))
    starts *= draw.uniform(0.2, 1.0, (size.starts, 1))
    points = fixed_points(site, starts=starts)
    return int(np.count_nonzero(points.fixed & (np.abs(points.states).max(axis=1) > 1e-3)))


def report(small: bool) -> None:
    size = SMALL if small else Size()
    rows: list[list[Cell]] = []
    for gain in (0.0, 1.0, 3.0, 10.0, 30.0):
        found = spectrum(Gains(3.0, update=gain), size)
        columns = (found.slow, found.near_one, found.radius, found.edge, found.outside)
        rows.append([gain, *columns])
    header = ["share over 10 steps", "share near 1", "radius", "edge, theory", "share outside"]
    show("Update gate: slow modes (a_h = 3)", ["a_z", *header], rows)

    rows = []
    for bias in (-4.0, -2.0, 0.0, 2.0, 4.0):
        found = spectrum(Gains(3.0, update=0.5, reset_bias=bias), size)
        columns = (found.slow, found.near_one, found.radius, found.edge, found.outside)
        rows.append([bias, *columns])
    show("Reset gate: spectral radius (a_h = 3, a_z = 0.5)", ["b_r", *header], rows)

    rows = [
        [bias, critical_gain(bias, size, 1 if small else 3), 1 + float(np.exp(-bias))]
        for bias in (-1.0, 0.0, 1.0, 3.0)
    ]
    show("Stability of 0: the critical gain a_h", ["b_r", "measured", "theory, 1 / r"], rows)

    gates = [(0.0, 0.0), (3.0, 0.0), (30.0, 0.0), (0.0, 10.0)]
    rows = [
        [gain, *(largest_exponent(Gains(gain, update, reset), size) for update, reset in gates)]
        for gain in (1.5, 1.9, 2.2, 3.0, 5.0)
    ]
    names = [f"a_z {update:g}, a_r {reset:g}" for update, reset in gates]
    show("Largest Lyapunov exponent, nats a step", ["a_h", *names], rows)

    rows = [
        [gain, *(other_points(Gains(gain, reset=reset), size) for reset in (0.0, 3.0, 10.0))]
        for gain in (1.2, 1.6, 1.9, 2.2, 3.0)
    ]
    show("Fixed points other than 0", ["a_h", "a_r 0", "a_r 3", "a_r 10"], rows)


if __name__ == "__main__":
    run(__doc__, report)
