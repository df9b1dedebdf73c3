"""Strategies for every constructor option and every kind of input of nn.GRU and nn.GRUCell."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import hypothesis.strategies as st
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence


@dataclass
class Case:
    """A layer and a call of it."""

    layer: nn.GRU | nn.GRUCell
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    seed: int = 0

    def run(self, layer: nn.Module | None = None) -> Any:
        """Call the layer (or a copy of it) from a fixed state of the generator."""
        torch.manual_seed(self.seed)
        return (layer or self.layer)(*self.args, **self.kwargs)

    def untouched(self) -> nn.GRU | nn.GRUCell:
        return copy.deepcopy(self.layer)

    @property
    def initial(self) -> Tensor | None:
        return self.args[1] if len(self.args) > 1 else self.kwargs.get("hx")


_sizes = st.integers(1, 6)


@st.composite
def cases(
    draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float64)
) -> Case:
    """Draw a layer with weights of any size, and a call with any kind of input."""
    seed = draw(st.integers(0, 2**31))
    torch.manual_seed(seed)
    dtype = draw(st.sampled_from(dtypes))
    scale = draw(st.sampled_from((0.3, 1.0, 4.0, 30.0)))
    layer = draw(_layers()).to(dtype)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(0.0, scale * 0.5)
    layer.train(draw(st.booleans()))
    input, batch, unbatched = draw(_inputs(layer, dtype))
    passing = draw(st.sampled_from(("none", "positional", "keyword")))
    if passing == "none":
        return Case(layer, (input,), seed=seed)
    initial = draw(_initial(layer, batch, unbatched, dtype))
    if passing == "positional":
        return Case(layer, (input, initial), seed=seed)
    return Case(layer, (), {"input": input, "hx": initial}, seed)


@st.composite
def _layers(draw: st.DrawFn) -> nn.GRU | nn.GRUCell:
    input_size, hidden_size, bias = draw(_sizes), draw(_sizes), draw(st.booleans())
    if draw(st.integers(0, 4)) == 0:
        return nn.GRUCell(input_size, hidden_size, bias)
    num_layers = draw(st.integers(1, 3))
    return nn.GRU(
        input_size,
        hidden_size,
        num_layers,
        bias=bias,
        batch_first=draw(st.booleans()),
        dropout=draw(st.sampled_from((0.0, 0.4))) if num_layers > 1 else 0.0,
        bidirectional=draw(st.booleans()),
    )


@st.composite
def _inputs(
    draw: st.DrawFn, layer: nn.GRU | nn.GRUCell, dtype: torch.dtype
) -> tuple[Any, int, bool]:
    """An input, its batch size, and whether it is unbatched."""
    size = layer.input_size
    if isinstance(layer, nn.GRUCell):
        if draw(st.booleans()):
            return torch.randn(size, dtype=dtype), 1, True
        batch = draw(st.integers(0, 4))
        return torch.randn(batch, size, dtype=dtype), batch, False
    kind = draw(st.sampled_from(("padded", "unbatched", "sorted", "unsorted")))
    if kind == "unbatched":
        return torch.randn(draw(_sizes), size, dtype=dtype), 1, True
    if kind == "padded":
        # The kernel itself refuses an empty batch of several layers or directions' packed kind.
        steps, batch = draw(_sizes), draw(st.integers(0, 4))
        shape = (batch, steps, size) if layer.batch_first else (steps, batch, size)
        return torch.randn(shape, dtype=dtype), batch, False
    lengths = draw(st.lists(_sizes, min_size=1, max_size=4))
    if kind == "sorted":
        lengths = sorted(lengths, reverse=True)
    padded = torch.randn(len(lengths), max(lengths), size, dtype=dtype)
    packed = pack_padded_sequence(
        padded, torch.tensor(lengths), batch_first=True, enforce_sorted=kind == "sorted"
    )
    return packed, len(lengths), False


@st.composite
def _initial(
    draw: st.DrawFn,
    layer: nn.GRU | nn.GRUCell,
    batch: int,
    unbatched: bool,
    dtype: torch.dtype,
) -> Tensor:
    scale = draw(st.sampled_from((0.5, 5.0)))
    if isinstance(layer, nn.GRUCell):
        shape: tuple[int, ...] = (batch, layer.hidden_size)
        state = torch.randn(shape, dtype=dtype)
        return scale * (state[0] if unbatched else state)
    states = layer.num_layers * (2 if layer.bidirectional else 1)
    state = torch.randn(states, batch, layer.hidden_size, dtype=dtype)
    return scale * (state[:, 0] if unbatched else state)
