"""The runs of the golden files that have gradients or set gates (since version 1.3 of the format).

The expected content is computed without grutrace: gradients by PyTorch's autograd, of the tensors
that an untraced layer returns; set gates by a float64 NumPy loop from the equations.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import grutrace
from tests.golden.runs import EVERYTHING, built, numbers
from tests.intervention.loops import run_loop

Arrays = dict[str, np.ndarray]

#: The factor of the loss, as a gradient scaler's.
SCALE = 8.0

#: The units and steps at which the update gate is set, and its value.
UNITS, STEPS, VALUE = (3, 1), range(1, 3), 0.25


def layer() -> nn.GRU:
    """A layer of four units that reads two sequences."""
    return built(lambda: nn.GRU(3, 4), 11)


def inputs() -> list[Tensor]:
    """The input of each call of the training run."""
    return [numbers(seed, steps, 2, 3) for seed, steps in ((21, 3), (22, 1), (23, 2))]


def train(model: nn.GRU, keep: Callable[[Tensor, Tensor], object] = lambda *_: None) -> None:
    """Three calls, of which the last starts from a detached state; then one without gradients.

    Args:
        model: The layer.
        keep: Called with the output and the final states of each call.
    """
    state = None
    losses = []
    for number, x in enumerate(inputs()):
        output, state = model(x, state.detach() if state is not None and number == 2 else state)
        keep(output, state)
        losses.append(output.pow(3).sum() + state.square().sum())
    (SCALE * torch.stack(losses).sum()).backward()
    with torch.no_grad():
        model(numbers(24, 2, 2, 3))


def trace_gradients(path: Path) -> None:
    """Trace the training run to a file, and close it."""
    scaler: Any = torch.amp.GradScaler("cpu", init_scale=SCALE)
    with grutrace.trace(
        (model := layer()), path, record=("update", "gradient"), grad_scaler=scaler
    ):
        train(model)


def expected_gradients() -> Arrays:
    """Return what arrived at each state, (calls' rows, H), call by call, by sequence."""
    returned: list[tuple[Tensor, Tensor]] = []

    def keep(output: Tensor, final: Tensor) -> None:
        output.retain_grad()
        final.retain_grad()
        returned.append((output, final))

    train(layer(), keep)
    rows = []
    for output, final in returned:
        assert output.grad is not None
        assert final.grad is not None
        arriving = output.grad.clone()
        arriving[-1] += final.grad[0]
        rows.append(arriving.transpose(0, 1).reshape(-1, 4).numpy())
    nothing = np.full((4, 4), np.nan, np.float32)
    return {
        "gradient": np.concatenate([*rows, nothing]),
        "attached": np.array([False, True, False, False]),
        "scale": np.array([SCALE, SCALE, SCALE, 0.0]),
    }


def trace_set_gates(path: Path, gates: str = "inline") -> None:
    """Trace two calls to a file, the second with an intervention, and close it."""
    model, x = layer(), numbers(31, 4, 2, 3)
    with torch.no_grad(), grutrace.trace(model, path, record=EVERYTHING, gates=gates):
        model(x)
        steps = slice(STEPS.start, STEPS.stop)
        with grutrace.intervene(model, "l0", update=VALUE, units=UNITS, steps=steps):
            model(x)


def expected_set_gates() -> Arrays:
    """Return the rows of the second call by quantity, (8, H), by sequence."""
    found: dict[str, dict[tuple[int, int], np.ndarray]] = {}

    def edit(_: str, name: str, step: int, sequence: int, values: np.ndarray) -> np.ndarray:
        if name == "update" and step in STEPS:
            values = values.copy()
            values[list(UNITS)] = VALUE
        found.setdefault(name, {})[sequence, step] = values
        return values

    run_loop(layer(), list(numbers(31, 4, 2, 3).transpose(0, 1).numpy()), None, edit)
    names = ("reset", "update", "candidate", "hidden")
    return {name: np.stack([found[name][key] for key in sorted(found[name])]) for name in names}


#: By name of the file: what traces the run, and what must be in the file.
ACTED: dict[str, tuple[Callable[[Path], None], Callable[[], Arrays]]] = {
    "gradients": (trace_gradients, expected_gradients),
    "set": (trace_set_gates, expected_set_gates),
    # Since version 1.5.
    "set_deferred": (partial(trace_set_gates, gates="deferred"), expected_set_gates),
}
