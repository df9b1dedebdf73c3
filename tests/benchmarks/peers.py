"""What people do today for the same gates: loops beside or instead of the fused layer."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tests.benchmarks.workloads import Workload


def loop(
    input: Tensor,
    hidden: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor,
    bias_hh: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A GRU as a loop over time that returns states and gates, the input's product hoisted."""
    products = torch.nn.functional.linear(input, weight_ih, bias_ih)
    states: list[Tensor] = []
    resets: list[Tensor] = []
    updates: list[Tensor] = []
    candidates: list[Tensor] = []
    for product in products.unbind(0):
        input_r, input_z, input_n = product.chunk(3, 1)
        hidden_r, hidden_z, hidden_n = torch.nn.functional.linear(hidden, weight_hh, bias_hh).chunk(
            3, 1
        )
        reset = torch.sigmoid(input_r + hidden_r)
        update = torch.sigmoid(input_z + hidden_z)
        candidate = torch.tanh(input_n + reset * hidden_n)
        hidden = (hidden - candidate) * update + candidate
        states.append(hidden)
        resets.append(reset)
        updates.append(update)
        candidates.append(candidate)
    return torch.stack(states), torch.stack(resets), torch.stack(updates), torch.stack(candidates)


def peers(workload: Workload) -> dict[str, Callable[[], object]]:
    """Return by name what gives the gates of a single layer, the layer's own output included."""
    layer, input = workload.model, workload.input
    if input is None:
        return {}
    hidden = torch.zeros(input.shape[1], layer.hidden_size)
    scripted = torch.jit.script(loop)
    repeats = 20 if len(input) == 1 else 1

    def instead(function: Callable[..., object]) -> Callable[[], None]:
        def run() -> None:
            with torch.no_grad():
                for _ in range(repeats):
                    function(input, hidden, *layer._flat_weights)

        return run

    def beside() -> None:
        workload.run()
        instead(loop)()

    return {
        "Python loop beside the layer": beside,
        "Python loop instead of it": instead(loop),
        "scripted loop instead of it": instead(scripted),
    }
