"""torch.compile: a traced call stays out of the graphs, and is recorded as ever."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest
import torch
from torch import nn

import grutrace
from tests.surroundings.models import CALLS, assert_same, eagerly, trace

# What PyTorch warns of itself, of any graph that is split.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")

BACKENDS = ["eager", "aot_eager"]


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compile_first(model, backend):
    compiled = torch.compile(model, backend=backend)
    return compiled, lambda: trace(model)


def trace_the_compiled(model, backend):
    compiled = torch.compile(model, backend=backend)
    return compiled, lambda: trace(compiled)


def compile_in_place(model, backend):
    model.compile(backend=backend)
    return model, lambda: trace(model)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("way", [compile_first, trace_the_compiled, compile_in_place])
def test_compiled_before_attaching(way, warm, backend, model, batch, caplog) -> None:
    expected, eager = eagerly(model, lambda: model(batch))
    compiled, attach = way(model, backend)
    if warm:
        compiled(batch)
    with attach() as found:
        result = compiled(batch)
    assert [each.removeprefix("_orig_mod.") for each in found.calls["module"]] == CALLS
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-6)
    if way is not trace_the_compiled:
        assert_same(eager, found)
    assert torch.equal(compiled(batch), result)
    assert not [each for each in caplog.records if each.levelno >= logging.WARNING]


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_while_attached(backend, model, batch) -> None:
    _, eager = eagerly(model, lambda: model(batch))
    with trace(model) as found:
        compiled = torch.compile(model, backend=backend)
        compiled(batch)
    assert_same(eager, found)
    with trace(model) as again:
        compiled(batch)
    assert_same(eager, again)


def test_a_compiled_training_step(model, batch) -> None:
    model.train()

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        torch.manual_seed(3)
        compiled(batch).square().sum().backward()
        return [each.grad.clone() for each in model.parameters()]

    compiled = torch.compile(model, backend="aot_eager")
    untraced = gradients()
    with trace(model) as found:
        traced = gradients()
    assert found.calls["module"].tolist() == CALLS
    for a, b in zip(untraced, traced, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_a_graph_that_was_compiled_before_is_named_at_the_end() -> None:
    """The one case that cannot be heard: nothing of the cell's call is left but the graph."""
    cell = nn.Sequential(nn.GRUCell(3, 3))
    x = torch.randn(2, 3)
    compiled = torch.compile(cell, backend="eager", fullgraph=True)
    compiled(x)
    expected = r"nothing was recorded of 0: .*torch\.compile.*torch\.compiler\.reset\(\)"
    with pytest.warns(grutrace.GrutraceWarning, match=expected), trace(cell):
        compiled(x)
    torch.compiler.reset()
    with trace(cell) as found:
        torch.compile(cell, backend="eager")(x)
    assert len(found.calls) == 1


def test_one_whole_graph_is_refused_while_recording() -> None:
    cell = nn.GRUCell(3, 3)
    compiled = torch.compile(cell, backend="eager", fullgraph=True)
    with trace(cell) as found:
        with pytest.raises(Exception, match=r"grutrace records this call.*stop recording"):
            compiled(torch.randn(2, 3))
        cell(torch.randn(2, 3))
    assert len(found.calls) == 1
    compiled(torch.randn(2, 3))


@pytest.mark.parametrize("layers", [1, 2])
def test_a_gru_that_the_compiler_is_told_to_compile(layers) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.GRU(3, 3, layers))
    x = torch.randn(4, 3)
    _, eager = eagerly(model, lambda: model(x))
    with torch._dynamo.config.patch(allow_rnn=True), trace(model) as found:
        torch.compile(model, backend="eager")(x)
    assert_same(eager, found)


SCRIPT = """
import sys, warnings
import torch, grutrace
warnings.simplefilter("error", grutrace.GrutraceWarning)
from torch import nn
model = nn.Sequential(nn.Linear(3, 3), nn.GRU(3, 3, {layers}))
x = torch.randn(4, 3)
with grutrace.trace(model, check="raise") as trace:
    model(x)
    assert "torch._dynamo" not in sys.modules, "attaching has loaded the compiler"
    compiled = torch.compile(model, backend="{backend}")
    compiled(x)
    compiled(x)
assert len(trace.calls) == 3, trace.calls
assert compiled(x)[0].equal(model(x)[0]) or "{backend}" == "inductor"
"""


@pytest.mark.parametrize(("layers", "backend"), [(1, "eager"), (2, "inductor")])
def test_the_compiler_comes_after_the_hooks(layers, backend) -> None:
    script = SCRIPT.format(layers=layers, backend=backend)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "grutrace" not in done.stderr
