"""The values of a run, computed without grutrace: PyTorch's states, gates by the equations.

A spy notes what the kernels of a model that nobody traces were given and made. The states of the
layers below the top are those of PyTorch's layers of one layer each over the same weights; gates
are float64 NumPy (tests/oracles.py), each with a bound on what the kernel's own may be off.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence, pad_packed_sequence

from tests import oracles
from tests.golden.runs import Call
from tests.runs import KernelCall, Spy

#: By "site/quantity", over all sequences of the site end to end; by "site/lengths", their lengths;
#: by "site/initial"; by "site/weights/version/name".
Arrays = dict[str, np.ndarray]


def happened(run: Callable[[], None], calls: Sequence[Call]) -> list[tuple[Call, KernelCall]]:
    """Run, and pair what the kernels did with what the run's own account calls it."""
    with Spy() as spy:
        run()
    return list(zip(calls, spy.calls, strict=True))


def expected(model: nn.Module, pairs: Sequence[tuple[Call, KernelCall]]) -> Arrays:
    """All that a trace of the model must hold."""
    arrays: Arrays = {}
    for path, module in model.named_modules():
        own = [(call, kernel) for call, kernel in pairs if call.module == path]
        if own and isinstance(module, nn.GRU | nn.GRUCell):
            for name, site in _sites(path, module, own):
                arrays |= {f"{name}/{key}": value for key, value in site.items()}
    return arrays


def _sites(
    path: str, module: nn.GRU | nn.GRUCell, own: Sequence[tuple[Call, KernelCall]]
) -> Iterator[tuple[str, Arrays]]:
    layers = [layer_by_layer(module, kernel) for _, kernel in own]
    directions = 2 if getattr(module, "bidirectional", False) else 1
    per_cell = 4 if module.bias else 2
    for index in range(len(layers[0])):
        suffix = f"l{index // directions}" + "_reverse" * (index % directions)
        if isinstance(module, nn.GRUCell):
            suffix = "cell"
        pieces: dict[int, list[tuple[int, np.ndarray, np.ndarray]]] = {}
        initial: dict[int, np.ndarray] = {}
        weights: Arrays = {}
        for (call, kernel), states in zip(own, layers, strict=True):
            names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")[:per_cell]
            used = kernel.weights[per_cell * index : per_cell * (index + 1)]
            for name, array in zip(names, used, strict=True):
                weights[f"weights/{call.weights}/{name}"] = array
            for row, sequence in enumerate(call.sequences):
                read, hidden = states[index][row]
                initial.setdefault(sequence, kernel.initial[index, row])
                pieces.setdefault(sequence, []).append((call.weights, read, hidden))
        reverse = suffix.endswith("reverse")
        yield f"{path}.{suffix}", weights | _rows(pieces, initial, weights, reverse, module)


def _rows(
    pieces: dict[int, list[tuple[int, np.ndarray, np.ndarray]]],
    initial: dict[int, np.ndarray],
    weights: Arrays,
    reverse: bool,
    module: nn.GRU | nn.GRUCell,
) -> Arrays:
    """The rows of all sequences of a site, in their order."""
    eps = float(torch.finfo(next(module.parameters()).dtype).eps)
    columns: dict[str, list[np.ndarray]] = {}
    for sequence in range(len(pieces)):
        hidden = np.concatenate([states for _, _, states in pieces[sequence]])
        previous = oracles.previous_states(hidden, initial[sequence], reverse)
        first = 0
        for version, read, states in pieces[sequence]:
            used = {
                name.rpartition("/")[2]: array
                for name, array in weights.items()
                if name.startswith(f"weights/{version}/")
            }
            steps = previous[first : first + len(states)]
            result = oracles.gates(used, read, steps, eps)
            off = np.abs(states - result.values["hidden"])
            assert (off <= result.bounds["hidden"]).all(), "the oracle and PyTorch disagree"
            rows = {"input": read, "hidden": states}
            for name in oracles.GATES:
                rows |= {name: result.values[name], f"{name}_bound": result.bounds[name]}
            for name, array in rows.items():
                columns.setdefault(name, []).append(array)
            first += len(states)
    lengths = [sum(len(states) for _, _, states in pieces[number]) for number in range(len(pieces))]
    return {
        **{name: np.concatenate(parts) for name, parts in columns.items()},
        "initial": np.stack([initial[number] for number in range(len(pieces))]),
        "lengths": np.array(lengths),
    }


def layer_by_layer(
    module: nn.GRU | nn.GRUCell, kernel: KernelCall
) -> list[list[tuple[np.ndarray, np.ndarray]]]:
    """By layer and direction, by batch row: what it read (T, I) and its states (T, H)."""
    if isinstance(module, nn.GRUCell):
        return [list(zip(kernel.inputs, kernel.outputs, strict=True))]
    directions = 2 if module.bidirectional else 1
    per_cell = 4 if module.bias else 2
    read, sites = kernel.inputs, []
    for layer in range(module.num_layers):
        if layer + 1 == module.num_layers:
            made = kernel.outputs
        else:
            first = layer * directions
            weights = kernel.weights[per_cell * first : per_cell * (first + directions)]
            made = _one_layer(module, read, kernel.initial[first : first + directions], weights)
        for direction in range(directions):
            part = slice(direction * module.hidden_size, (direction + 1) * module.hidden_size)
            sites.append([(x, y[:, part]) for x, y in zip(read, made, strict=True)])
        read = made
    return sites


def _one_layer(
    module: nn.GRU, read: list[np.ndarray], initial: np.ndarray, weights: list[np.ndarray]
) -> list[np.ndarray]:
    layer = nn.GRU(
        read[0].shape[1], module.hidden_size, bias=module.bias, bidirectional=module.bidirectional
    )
    for parameter, value in zip(layer.parameters(), weights, strict=True):
        parameter.data = torch.from_numpy(value.copy())
    batch = pack_sequence([torch.from_numpy(x.copy()) for x in read], enforce_sorted=False)
    with torch.no_grad():
        output, _ = layer(batch, torch.from_numpy(initial.copy()))
    padded, lengths = pad_packed_sequence(output, batch_first=True)
    return [padded[b, :length].numpy() for b, length in enumerate(lengths)]


def account(calls: Sequence[Call], pairs: Sequence[tuple[Call, KernelCall]]) -> list[Any]:
    """The table of calls, as JSON values."""
    return [
        {
            "module": call.module,
            "tag": call.tag,
            "weights": call.weights,
            "training": call.training,
            "batch": len(call.sequences),
            "steps": sum(map(len, kernel.inputs)),
        }
        for call, (_, kernel) in zip(calls, pairs, strict=True)
    ]
