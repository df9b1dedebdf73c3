"""Gradients of a loss with respect to the gates that a call used, from the graph of that call.

Autograd gives the gradients that arrive at the output and at the final states of each call. The
rest follows in closed form (`grutrace.gradients.backward`), without a second run of the model.

H hidden size, I input size, N rows of all calls.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from grutrace.capture.differentiable.graph_call import GraphCall
from grutrace.errors import OptionError, StateError, require_one_of, short_repr
from grutrace.gradients.backward import call_gradients, gate_gradients, input_gradient
from grutrace.records import FORWARD_QUANTITIES, GATES, Site


def loss_gradient(
    site: Site, calls: Sequence[GraphCall], loss: object, quantity: str, *, preactivation: bool
) -> Tensor:
    """Return the gradient of a loss with respect to a quantity, (N, H), or (N, I) for the input.

    Args:
        site: The site.
        calls: The calls of its module.
        loss: A tensor of one element.
        quantity: Name of the quantity.
        preactivation: Whether to return the gradient of the gate's pre-activation.

    Raises:
        OptionError: The loss is no tensor of one element, needs no gradient or does not depend on
            these calls, or the quantity is unknown.
        StateError: The weights have changed since a call, or the graph was freed.
    """
    if preactivation:
        require_one_of("gradient: quantity of a pre-activation", quantity, GATES)
    require_one_of("gradient: quantity", quantity, FORWARD_QUANTITIES)
    arrived = _arriving_gradients(site, calls, _checked_loss(loss))
    parts = []
    for call, gradients in zip(calls, arrived, strict=True):
        call.require_same_weights(site.name)
        with call.context(grad=False):
            values = _call_gradient(site, call, *gradients, quantity, preactivation)
            parts.append(call.to_rows(values))
    return torch.cat(parts)


def _call_gradient(
    site: Site,
    call: GraphCall,
    output_gradient: Tensor | None,
    final_gradient: Tensor | None,
    quantity: str,
    preactivation: bool,
) -> Tensor:
    """Return the gradient of one call, (N, H) or (N, I), in the kernel's order."""
    layer, reverse = site.layer, site.reverse
    hidden = call.hidden(layer, reverse)
    previous = call.steps.previous(hidden, call.call.cell_initial(layer, reverse), reverse=reverse)
    input, weights = call.layers[layer].input, call.weights(layer, reverse)
    total, _, derivatives = call_gradients(
        input.reshape(-1, input.shape[-1]),
        previous.reshape(-1, previous.shape[-1]),
        weights,
        *call.edges.at_states(layer, reverse, output_gradient, final_gradient),
        call.batch_sizes,
        reverse=reverse,
    )
    if quantity == "hidden":
        return total
    if quantity == "input":
        return input_gradient(total, derivatives, weights.weight_ih)
    gates = gate_gradients(total, derivatives, preactivations=preactivation)
    values: Tensor = getattr(gates, quantity)
    return values


def _arriving_gradients(
    site: Site, calls: Sequence[GraphCall], loss: Tensor
) -> list[tuple[Tensor | None, Tensor | None]]:
    """Return for each call the gradients at the layer's output and at the final states."""
    edges = [edge for call in calls for edge in (call.edges.outputs[site.layer], call.edges.final)]
    known: list[Any] = [edge for edge in edges if edge is not None]
    found: Sequence[Tensor | None] = ()
    if known:
        try:
            found = torch.autograd.grad(loss, known, retain_graph=True, allow_unused=True)
        except RuntimeError as error:
            if "second time" not in str(error):
                raise
            raise StateError(
                "the graph of the loss was freed by backward(): call site.gradient(...) before it, "
                "or pass retain_graph=True to backward"
            ) from error
    if all(gradient is None for gradient in found):
        reason = (
            "the loss does not depend on the calls of this site that the trace holds"
            if known
            else "its calls ran without gradients (torch.no_grad, or nothing required a gradient)"
        )
        raise OptionError(f"of: expected a loss computed from the output of {site.name}; {reason}")
    gradients = iter(found)
    at_edges = [None if edge is None else next(gradients) for edge in edges]
    return list(zip(at_edges[::2], at_edges[1::2], strict=True))


def _checked_loss(loss: object) -> Tensor:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise OptionError(f"of: expected a loss, a tensor of one element; found {short_repr(loss)}")
    if not loss.requires_grad:
        raise OptionError("of: expected a loss that requires gradients; found one without a graph")
    return loss
