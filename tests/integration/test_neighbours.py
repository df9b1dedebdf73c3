"""Other code of the process runs as without a recording."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch._C import DispatchKey
from torch.utils._pytree import tree_leaves

import grutrace
from tests.integration.models import Mixed, trace

# What PyTorch says of itself.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated"),
    pytest.mark.filterwarnings("ignore:The tensor attributes self._flat_weights"),
]


def scripted(model: nn.Module, x: torch.Tensor) -> Any:
    script = torch.jit.script(nn.Sequential(model.stack))
    return script(x)[0], [node.kind() for node in script.inlined_graph.nodes()]


def compiled_whole(model: nn.Module, x: torch.Tensor) -> Any:
    torch.compiler.reset()
    cell = nn.Sequential(nn.Linear(3, 8), model.cell)
    nn.init.constant_(cell[0].weight, 0.1)
    nn.init.zeros_(cell[0].bias)
    result = torch.compile(cell, backend="aot_eager", fullgraph=True)(x[:, 0])
    torch.compiler.reset()
    return result


def exported(model: nn.Module, x: torch.Tensor) -> Any:
    graph = torch.export.export(model.stack, (x,), strict=False)
    return graph.module()(x)[0], str(graph.graph)


def gradients(model: nn.Module, x: torch.Tensor) -> Any:
    def loss(x: torch.Tensor) -> torch.Tensor:
        return model(x).square().sum()

    return torch.func.grad(loss)(x), torch.func.jacrev(loss)(x), torch.func.hessian(loss)(x[:1])


def swapped_weights(model: nn.Module, x: torch.Tensor) -> Any:
    weights = {name: value.detach() / 2 for name, value in model.named_parameters()}
    return torch.func.functional_call(model, weights, (x,))


def attention(model: nn.Module, x: torch.Tensor) -> Any:
    torch.manual_seed(1)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    with torch.no_grad(), torch.profiler.profile() as profile:
        result = layer(x.repeat(1, 1, 3)[..., :8])
    assert "aten::_transformer_encoder_layer_fwd" in {event.key for event in profile.key_averages()}
    return result


def trained(model: nn.Module, x: torch.Tensor) -> Any:
    model.zero_grad()
    model(x).square().sum().backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


NEIGHBOURS = [scripted, compiled_whole, exported, gradients, swapped_weights, attention, trained]
# PyTorch 2.9 and older do not export an nn.GRU.
if torch.__version__ < (2, 10):
    NEIGHBOURS.remove(exported)


def in_a_thread(run: Callable[[], Any]) -> Any:
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(run()))
    thread.start()
    thread.join()
    return results[0]


def same(a: Any, b: Any) -> bool:
    pairs = list(zip(tree_leaves(a), tree_leaves(b), strict=True))
    return all(torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in pairs)


def test_what_torch_resolves_while_recording_is_not_used_afterwards(batch) -> None:
    """Compilers dispatch in Python, and keep which key's kernel an operation has."""
    recorded, other = Mixed(dropout=0.0), Mixed(dropout=0.0)
    expected = compiled_whole(other, batch)
    operation = torch.ops.aten.gru_cell.default
    with trace(recorded):
        recorded(batch)
        key = DispatchKey.AutogradCPU
        # PyTorch 2.4 does not resolve a key twice, and returns another object for the same key.
        assert (operation._dispatch_cache.get(key) or operation._get_dispatch(key)) == key
    assert same(compiled_whole(other, batch), expected)


@pytest.mark.parametrize("thread", ["same thread", "another thread"])
@pytest.mark.parametrize("neighbour", NEIGHBOURS)
def test_other_code_is_unaffected(neighbour, thread, batch) -> None:
    torch.manual_seed(0)
    recorded, other = Mixed(dropout=0.0), Mixed(dropout=0.0)
    expected = neighbour(other, batch)
    with trace(recorded) as tracer:
        recorded(batch)
        run = in_a_thread if thread == "another thread" else lambda run: run()
        again = run(lambda: neighbour(other, batch))
        recorded(batch)
    assert same(again, expected)
    # Nothing of it is in the trace, and what is recorded went on being recorded.
    assert len(tracer.calls) == 8
    # The control: a neighbour with other weights gives something else.
    if neighbour is not attention:
        assert not same(neighbour(Mixed(dropout=0.0), batch), expected)


def test_other_code_in_a_busy_thread_is_unaffected(batch) -> None:
    """Recording starts and stops all the time."""
    torch.manual_seed(0)
    recorded, other = Mixed(dropout=0.0), Mixed(dropout=0.0)
    expected, end, wrong = other(batch), threading.Event(), []

    def work() -> None:
        while not end.is_set():
            if not torch.equal(other(batch), expected):
                wrong.append(1)

    thread = threading.Thread(target=work)
    thread.start()
    tracer = grutrace.Tracer(recorded, recording=False)
    try:
        for _ in range(30):
            with tracer.recording():
                recorded(batch)
    finally:
        end.set()
        thread.join()
    assert not wrong
    assert len(tracer.calls) == 30 * 4
    tracer.close()
