"""A GRU as a Python loop of nn.GRUCell's equations, with every gate a tensor of its own.

It uses nothing of grutrace. Autograd keeps the gradient of each gate, pre-activation and state, so
these are the expected gradients. `run_cell` runs one direction of one layer; `run_layer` runs an
nn.GRU.

T steps, B sequences in a batch, I input size, H hidden size, N rows in the kernel's order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

NAMES = ("reset", "update", "candidate")


@dataclass
class Loop:
    """The tensors of one direction of one layer, step by step in the order of time.

    Attributes:
        steps: For each time, the tensors by name.
        input: (N, I)
        initial: (B, H)
        final: (B, H) the last state of each sequence.
    """

    input: Tensor
    initial: Tensor
    final: Tensor
    steps: list[dict[str, Tensor]] = field(default_factory=list)

    def rows(self, name: str) -> Tensor:
        """(N, H) in the kernel's order."""
        return torch.cat([step[name] for step in self.steps])

    def gradients(self) -> dict[str, Tensor]:
        """What autograd has kept, by name, each (N, H), and those of the input and the start."""
        result = {
            name: torch.cat([_gradient(step[name]) for step in self.steps])
            for name in self.steps[0]
        }
        return {**result, "input": _gradient(self.input), "initial": _gradient(self.initial)}


def _gradient(tensor: Tensor) -> Tensor:
    return torch.zeros_like(tensor) if tensor.grad is None else tensor.grad


def step(cell: Any, x: Tensor, h: Tensor, suffix: str = "") -> dict[str, Tensor]:
    """One step by the equations in torch.nn.GRU's documentation."""
    weight_ih, weight_hh = (getattr(cell, f"weight_{k}{suffix}") for k in ("ih", "hh"))
    bias_ih, bias_hh = (getattr(cell, f"bias_{k}{suffix}", None) for k in ("ih", "hh"))
    input_r, input_z, input_n = nn.functional.linear(x, weight_ih, bias_ih).chunk(3, -1)
    hidden_r, hidden_z, hidden_n = nn.functional.linear(h, weight_hh, bias_hh).chunk(3, -1)
    tensors = {}
    tensors["reset_preactivation"] = input_r + hidden_r
    tensors["update_preactivation"] = input_z + hidden_z
    tensors["reset"] = torch.sigmoid(tensors["reset_preactivation"])
    tensors["update"] = torch.sigmoid(tensors["update_preactivation"])
    tensors["candidate_preactivation"] = input_n + tensors["reset"] * hidden_n
    tensors["candidate"] = torch.tanh(tensors["candidate_preactivation"])
    update = tensors["update"]
    tensors["hidden"] = (1 - update) * tensors["candidate"] + update * h
    for tensor in tensors.values():
        if tensor.requires_grad:
            tensor.retain_grad()
    return tensors


def run_cell(
    cell: Any,
    input: Tensor,
    initial: Tensor,
    batch_sizes: Sequence[int],
    *,
    reverse: bool = False,
    suffix: str = "",
) -> Loop:
    """Run one direction of one layer over packed rows (N, I)."""
    for tensor in (input, initial):
        if not tensor.requires_grad:
            tensor.requires_grad_()
        tensor.retain_grad()
    times = list(range(len(batch_sizes)))
    parts = input.split(list(batch_sizes))
    states = list(initial.unbind())
    steps: dict[int, dict[str, Tensor]] = {}
    for time in reversed(times) if reverse else times:
        size = batch_sizes[time]
        steps[time] = step(cell, parts[time], torch.stack(states[:size]), suffix)
        states[:size] = steps[time]["hidden"].unbind()
    loop = Loop(input, initial, torch.stack(states))
    loop.steps = [steps[time] for time in times]
    return loop


def run_layer(
    layer: nn.GRU, input: Tensor, initial: Tensor, batch_sizes: Sequence[int]
) -> tuple[Tensor, Tensor, dict[str, Loop]]:
    """Run all layers and directions of an nn.GRU over packed rows, without dropout.

    Returns:
        The output (N, D * H) and the final states (L * D, B, H), and the loops by suffix.
    """
    directions = 2 if layer.bidirectional else 1
    loops, finals = {}, []
    for number in range(layer.num_layers):
        outputs = []
        for reverse in range(directions):
            suffix = f"l{number}" + ("_reverse" if reverse else "")
            # A tensor of its own for each direction, so that each keeps its own gradient.
            loop = run_cell(
                layer,
                input.clone() if input.requires_grad else input.clone().requires_grad_(),
                initial[number * directions + reverse].clone(),
                batch_sizes,
                reverse=bool(reverse),
                suffix=f"_{suffix}",
            )
            loops[suffix] = loop
            outputs.append(loop.rows("hidden"))
            finals.append(loop.final)
        input = torch.cat(outputs, -1)
    return input, torch.stack(finals), loops
