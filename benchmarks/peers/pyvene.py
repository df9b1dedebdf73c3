"""pyvene's GRU: a model of its own, whose gates are modules that interventions can reach.

It collects a gate at given steps, one tensor a step. Its cells read as many features as they have
units. Weights are copied into it from the layer.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.peers.peer import GATES, Absent, Peer, Running, Values, need

#: pyvene's names of the gates, in our order.
COMPONENTS = ("reset_gate_output", "update_gate_output", "new_gate_output")


def model_of(layer: nn.GRU) -> Any:
    """Return pyvene's model with the layer's weights."""
    need("pyvene")
    from pyvene.models.gru.modelings_gru import GRUConfig, GRUModel

    if layer.input_size != layer.hidden_size:
        raise Absent("left out: pyvene's GRU reads as many features as it has units")
    model = GRUModel(GRUConfig(h_dim=layer.hidden_size, n_layer=1)).eval()
    (cell,) = model.cells
    weights = zip(
        (cell.x2h.weight, cell.h2h.weight, cell.x2h.bias, cell.h2h.bias),
        layer._flat_weights,
        strict=True,
    )
    with torch.no_grad():
        for own, theirs in weights:
            own.copy_(theirs)
    return model


@contextmanager
def plain(layer: nn.GRU, input: Tensor) -> Iterator[Running]:
    """The plain model: only its states."""
    model, batch_first = model_of(layer), input.transpose(0, 1)
    yield Running(
        lambda: model(inputs_embeds=batch_first)[0],
        lambda output: {"output": output.transpose(0, 1)},
    )


@contextmanager
def collecting(layer: nn.GRU, input: Tensor) -> Iterator[Running]:
    """The model with an intervention a gate, which collects it at each step."""
    model, batch_first = model_of(layer), input.transpose(0, 1)
    steps, batch, _ = input.shape
    pyvene = need("pyvene")
    interventions = [
        {
            "layer": 0,
            "component": component,
            "unit": "t",
            "intervention_type": pyvene.CollectIntervention,
            "max_number_of_units": steps,
        }
        for component in COMPONENTS
    ]
    configuration = pyvene.IntervenableConfig(interventions, model_type=type(model))
    intervenable = pyvene.IntervenableModel(configuration, model)
    locations = {"base": [[list(range(steps))] * batch] * len(COMPONENTS)}

    def call() -> Any:
        base = {"inputs_embeds": batch_first}
        return intervenable(base=base, unit_locations=locations)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield Running(call, lambda returned: read(returned, steps))


def read(returned: Any, steps: int) -> Values:
    """All steps of one gate come before the next gate's, (B, H) each."""
    (_, collected), (output, _) = returned
    gates = torch.stack(list(collected)).unflatten(0, (len(GATES), steps))
    return dict(zip(GATES, gates, strict=True)) | {"output": output.transpose(0, 1)}


PYVENE = (
    Peer("pyvene's GRU instead", "output", plain, gates=False, package="pyvene"),
    Peer(
        "pyvene's GRU, gates collected",
        "output, all gates",
        collecting,
        package="pyvene",
    ),
)
