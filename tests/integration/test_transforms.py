"""Calls under torch.func and forward-mode differentiation are recorded where values exist."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.utils._pytree import tree_leaves

from tests.integration.models import CALLS, assert_same, eagerly, trace, words

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning"),
]


def doubled(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach() * 2 for name, value in model.named_parameters()}


def loss(model, weights, batch):
    return functional_call(model, weights, (batch,)).square().sum()


def dual(model, batch):
    with forward_ad.dual_level():
        output = model(forward_ad.make_dual(batch, torch.ones_like(batch)))
        return tuple(forward_ad.unpack_dual(output))


TRANSFORMS = {
    "grad of the input": lambda m, x: torch.func.grad(lambda x: m(x).sum())(x),
    "grad of grad": lambda m, x: torch.func.grad(
        lambda x: torch.func.grad(lambda x: m(x).sum())(x).sum()
    )(x),
    "vjp": lambda m, x: torch.func.vjp(m, x)[0],
    "jvp": lambda m, x: torch.func.jvp(m, (x,), (torch.ones_like(x),)),
    "jacrev": lambda m, x: torch.func.jacrev(m)(x),
    "jacfwd": lambda m, x: torch.func.jacfwd(m)(x),
    "dual": dual,
}


@pytest.mark.parametrize("stacks", ["split", "rerun"])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_of_gradients_are_recorded(name, stacks, model, batch) -> None:
    transform = TRANSFORMS[name]
    expected = tree_leaves(transform(model, batch))
    _, eager = eagerly(model, lambda: model(batch))
    with trace(model, stacks=stacks) as tracer:
        result = tree_leaves(transform(model, batch))
    assert all(map(torch.equal, expected, result))
    assert_same(eager, tracer)


@pytest.mark.parametrize("stacks", ["split", "rerun"])
def test_gradients_of_swapped_weights_are_recorded_with_the_weights(stacks, model, batch) -> None:
    weights = doubled(model)
    expected = torch.func.grad(lambda w: loss(model, w, batch))(weights)
    with trace(model, stacks=stacks) as tracer:
        result = torch.func.grad(lambda w: loss(model, w, batch))(weights)
    assert all(torch.equal(expected[name], result[name]) for name in expected)
    stored = tracer["stack.l1"].weights(0)["weight_hh"]
    np.testing.assert_array_equal(stored, weights["stack.weight_hh_l1"])


def test_functional_call_is_recorded_with_its_weights(model, batch) -> None:
    weights = doubled(model)
    expected = functional_call(model, weights, (batch,))
    with trace(model) as tracer:
        model(batch)
        assert torch.equal(functional_call(model, weights, (batch,)), expected)
        model(batch)
    assert tracer.calls["module"].tolist() == 3 * CALLS
    versions = tracer.calls["weights"][tracer.calls["module"] == "layer"]
    assert versions[0] != versions[1]
    for version, named in ((0, dict(model.named_parameters())), (1, weights)):
        for site, name in (("layer.l0", "layer.weight_ih_l0"), ("cell.cell", "cell.weight_ih")):
            stored = tracer[site].weights(version)["weight_ih"]
            np.testing.assert_array_equal(stored, named[name].detach())


def test_vmap_records_a_cell_sample_by_sample(model) -> None:
    """PyTorch has no batching rule for a cell under vmap, and nn.GRU raises."""
    rows = torch.randn(3, 2, 8)
    expected = torch.vmap(model.cell)(rows)
    with words() as messages, trace(model, sites="cell.*") as tracer:
        assert torch.equal(torch.vmap(model.cell)(rows), expected)
    assert not messages
    assert len(tracer.calls) == 3
    hidden = np.concatenate([sequence.hidden for sequence in tracer["cell.cell"]])
    np.testing.assert_array_equal(hidden, expected.reshape(6, -1).detach().numpy())


def test_functionalize_is_recorded(model, batch) -> None:
    expected, eager = eagerly(model, lambda: model(batch))
    with words() as messages, trace(model) as tracer:
        assert torch.equal(torch.func.functionalize(model)(batch), expected)
    if not len(tracer.calls):
        # Up to PyTorch 2.9, or a little later, it does not run the kernels of the operations.
        assert torch.__version__ < (2, 13)
        assert len(messages) == 1
        assert messages[0].startswith("nothing was recorded of stack, layer, cell")
        return
    assert not messages
    assert_same(eager, tracer)
