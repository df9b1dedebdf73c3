"""Layers of every kind with calls of them, and the same computed by a Python loop over the steps.

The loop runs every sequence on its own, so its rows are in the order of a trace's rows.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from tests.gradients.oracle import Loop, run_cell, run_layer

INPUTS, UNITS = 3, 4


@dataclass(frozen=True)
class Kind:
    """What a layer and its input are.

    Attributes:
        form: padded, unbatched, packed (unsorted), or cell.
    """

    form: str
    layers: int = 1
    bidirectional: bool = False
    batch_first: bool = False
    bias: bool = True
    initial: bool = True

    def __str__(self) -> str:
        flags = [name for name in ("bidirectional", "batch_first") if getattr(self, name)]
        flags += ["" if self.bias else "no bias", "" if self.initial else "from zeros"]
        return " ".join([self.form, str(self.layers), *filter(None, flags)])


LATTICE = [
    *(
        Kind(form, layers, bidirectional, batch_first)
        for form, layers, bidirectional, batch_first in product(
            ("padded", "unbatched", "packed"), (1, 3), (False, True), (False, True)
        )
    ),
    Kind("padded", 2, bias=False),
    Kind("packed", 2, bidirectional=True, bias=False, initial=False),
    Kind("padded", initial=False),
    Kind("cell"),
    Kind("cell", bias=False, initial=False),
]

LENGTHS = {"padded": [4, 4, 4], "packed": [2, 5, 3], "unbatched": [4], "cell": [1, 1, 1]}


class Problem:
    """A layer in float64 with leaf tensors as input, and a fixed loss of what it returns."""

    def __init__(self, kind: Kind, seed: int = 0, dtype: torch.dtype = torch.float64) -> None:
        torch.manual_seed(seed)
        self.kind, self.lengths = kind, LENGTHS[kind.form]
        self.layer: Any = (
            nn.GRUCell(INPUTS, UNITS, bias=kind.bias)
            if kind.form == "cell"
            else nn.GRU(
                INPUTS,
                UNITS,
                kind.layers,
                bias=kind.bias,
                batch_first=kind.batch_first,
                bidirectional=kind.bidirectional,
            )
        ).to(dtype)
        with torch.no_grad():
            for parameter in self.layer.parameters():
                parameter.mul_(1.5)
        self.inputs = [torch.randn(length, INPUTS, dtype=dtype) for length in self.lengths]
        self.directions = 2 if kind.bidirectional else 1
        shape = kind.layers * self.directions, len(self.lengths), UNITS
        self.initial = torch.randn(shape, dtype=dtype) * (1.0 if kind.initial else 0.0)
        width = self.directions * UNITS
        self._output_weights = [torch.randn(length, width, dtype=dtype) for length in self.lengths]
        self._final_weights = torch.randn(shape, dtype=dtype)

    @property
    def suffixes(self) -> list[str]:
        if self.kind.form == "cell":
            return ["cell"]
        names = ("l{}", "l{}_reverse")[: self.directions]
        return [name.format(layer) for layer in range(self.kind.layers) for name in names]

    def loss(self, outputs: list[Tensor], final: Tensor) -> Tensor:
        """A loss of the outputs (T, D * H) of each sequence, and of h_n."""
        terms = [
            (output.tanh() * weight).sum()
            for output, weight in zip(outputs, self._output_weights, strict=True)
        ]
        return sum(terms, (final.square() * self._final_weights).sum())

    def run(self, layer: Any = None, *, uses: str = "both") -> tuple[Tensor, list[Tensor], Tensor]:
        """Run the layer. Return the loss, and the leaves: inputs of each sequence, and h0.

        Args:
            layer: The layer, or a copy of it.
            uses: What the loss uses: both, output or final.
        """
        layer = self.layer if layer is None else layer
        inputs = [input.clone().requires_grad_() for input in self.inputs]
        initial = self.initial.clone().requires_grad_()
        outputs, final = self._call(layer, inputs, initial)
        return self._loss_of(outputs, final, uses), inputs, initial

    def _loss_of(self, outputs: list[Tensor], final: Tensor, uses: str) -> Tensor:
        if uses == "output":
            final = final.detach()
        elif uses == "final":
            outputs = [output.detach() for output in outputs]
        return self.loss(outputs, final)

    def _call(
        self, layer: Any, inputs: list[Tensor], initial: Tensor
    ) -> tuple[list[Tensor], Tensor]:
        form = self.kind.form
        given = initial if self.kind.initial else None
        if form == "cell":
            output = layer(torch.cat(inputs), None if given is None else given[0])
            return list(output.split(1)), output[None]
        if form == "unbatched":
            output, final = layer(inputs[0], None if given is None else given[:, 0])
            return [output], final[:, None]
        padded = nn.utils.rnn.pad_sequence(inputs, batch_first=self.kind.batch_first)
        if form == "padded":
            output, final = layer(padded, given)
            return list(output.unbind(0 if self.kind.batch_first else 1)), final
        packed = pack_padded_sequence(
            padded, torch.tensor(self.lengths), self.kind.batch_first, enforce_sorted=False
        )
        output, final = layer(packed, given)
        assert isinstance(output, PackedSequence)
        unpacked, lengths = pad_packed_sequence(output, batch_first=True)
        return [row[:length] for row, length in zip(unpacked, lengths, strict=True)], final

    def loop(
        self, *, uses: str = "both"
    ) -> tuple[Tensor, list[Tensor], Tensor, dict[str, list[Loop]], Any]:
        """Run a Python loop over the steps instead. Return also the loops, and the layer's copy."""
        layer = copy.deepcopy(self.layer)
        inputs = [input.clone().requires_grad_() for input in self.inputs]
        initial = self.initial.clone().requires_grad_()
        loops: dict[str, list[Loop]] = {suffix: [] for suffix in self.suffixes}
        outputs, finals = [], []
        for number, input in enumerate(inputs):
            start = initial[:, number : number + 1]
            start = start if self.kind.initial else start.detach()
            sizes = [1] * len(input)
            if self.kind.form == "cell":
                loop = run_cell(layer, input, start[0].clone(), sizes)
                loops["cell"].append(loop)
                output, final = loop.rows("hidden"), loop.final[None]
            else:
                output, final, of_layer = run_layer(layer, input, start, sizes)
                for suffix, loop in of_layer.items():
                    loops[suffix].append(loop)
            outputs.append(output)
            finals.append(final)
        loss = self._loss_of(outputs, torch.cat(finals, 1), uses)
        return loss, inputs, initial, loops, layer


def joined(loops: list[Loop], name: str) -> Tensor:
    """(N, H) the tensors of a name, in the order of a trace's rows."""
    return torch.cat([loop.rows(name) for loop in loops])


def joined_gradients(loops: list[Loop], name: str) -> Tensor:
    """(N, H) the gradients that autograd has kept, in the order of a trace's rows."""
    return torch.cat([loop.gradients()[name] for loop in loops])


def leaf_gradients(layer: Any, inputs: list[Tensor], initial: Tensor) -> list[Tensor]:
    """The gradients of all parameters, inputs and initial states; 0 where there is none."""
    leaves = [*layer.parameters(), *inputs, initial]
    return [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]


def largest_difference(found: list[Tensor], expected: list[Tensor]) -> float:
    pairs = list(zip(found, expected, strict=True))
    assert all(a.shape == b.shape for a, b in pairs)
    return max(float((a - b).detach().abs().max()) for a, b in pairs)
