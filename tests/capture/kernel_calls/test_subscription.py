"""Tests of observed kernel calls: inputs and outputs are recorded, the model is unchanged."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.overrides import BaseTorchFunctionMode

import grutrace
from grutrace.capture.kernel_calls import compiled_graphs
from tests import forks, oracles

GATES = ["inline", "background", "deferred"]


def offload(layer: nn.GRU) -> None:
    """Weights are there only while the forward runs, as accelerate's cpu_offload has it."""
    weights = {name: weight.detach().clone() for name, weight in layer.named_parameters()}
    inner = layer.forward

    def put(device: str) -> None:
        for name, weight in weights.items():
            setattr(layer, name, nn.Parameter(weight.to(device), requires_grad=False))

    def forward(*args, **kwargs):
        put("cpu")
        try:
            return inner(*args, **kwargs)
        finally:
            put("meta")

    put("meta")
    layer.forward = forward


def scale(layer: nn.GRU) -> None:
    inner = layer.forward
    layer.forward = lambda x, hx=None: tuple(tensor * 0.5 for tensor in inner(x * 2, hx))


def parametrize_late(layer: nn.GRU) -> None:
    class Halved(nn.Module):
        def forward(self, weight):
            return weight / 2

    parametrize.register_parametrization(layer, "weight_hh_l0", Halved())


def hook_the_output(layer: nn.GRU) -> None:
    layer.register_forward_hook(lambda *arguments: tuple(tensor * 0.5 for tensor in arguments[-1]))


def hook_the_output_first(layer: nn.GRU) -> None:
    layer.register_forward_hook(
        lambda *arguments: tuple(e * 0.5 for e in arguments[-1]), prepend=True
    )


def hook_the_input(layer: nn.GRU) -> None:
    layer.register_forward_pre_hook(lambda _, args: (args[0] * 2, *args[1:]))


CHANGES = [
    offload,
    scale,
    parametrize_late,
    hook_the_output,
    hook_the_output_first,
    hook_the_input,
]


class KernelSpy:
    """Keeps the arguments and the result of each call of the kernel."""

    def __init__(self) -> None:
        self.calls = []

    def __enter__(self):
        self._own, torch._VF.gru = torch._VF.gru, self._gru
        return self

    def _gru(self, *args):
        result = self._own(*args)
        arguments = [
            argument.clone() if isinstance(argument, torch.Tensor) else argument
            for argument in args
        ]
        arguments[2] = [weight.detach().clone() for weight in args[2]]
        self.calls.append((arguments, result))
        return result

    def __exit__(self, *_):
        torch._VF.gru = self._own


@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize("change", CHANGES)
def test_wrappers_added_during_a_recording(change, gates) -> None:
    torch.manual_seed(0)
    layer, x = nn.GRU(3, 4).requires_grad_(False), torch.randn(5, 2, 3)
    untouched = copy.deepcopy(layer)
    change(untouched)
    with KernelSpy() as kernel:
        expected = untouched(x)
    (arguments, (output, _)), *others = kernel.calls
    assert not others
    with grutrace.trace(layer, gates=gates, record=("update", "hidden", "input")) as trace:
        change(layer)
        result = layer(x)
    assert all(map(torch.equal, result, expected))
    weights = dict(zip(("weight_ih", "weight_hh", "bias_ih", "bias_hh"), arguments[2], strict=True))
    weights = {name: weight.numpy() for name, weight in weights.items()}
    for b in range(2):
        sequence = trace["l0"].sequence(b)
        np.testing.assert_array_equal(sequence.hidden, output[:, b].numpy())
        np.testing.assert_array_equal(sequence.input, arguments[0][:, b].numpy())
        previous = np.concatenate([np.zeros((1, 4)), sequence.hidden[:-1]])
        own = oracles.gates(weights, sequence.input, previous, 2**-20).values["update"]
        np.testing.assert_allclose(sequence.update, own, rtol=0, atol=1e-6)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(3, 4)

    def forward(self, x):
        return self.rnn(x)[0]


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_a_copy_of_a_recorded_model_is_clean() -> None:
    net, x, buffer = Net().eval(), torch.randn(5, 2, 3), io.BytesIO()
    expected = torch.jit.script(copy.deepcopy(net))(x)
    with grutrace.trace(net) as trace:
        net(x)
        twins = [copy.deepcopy(net), pickle.loads(pickle.dumps(net))]
        torch.save(net, buffer)
        averaged = torch.optim.swa_utils.AveragedModel(net)
    buffer.seek(0)
    twins += [torch.load(buffer, weights_only=False), averaged.module, net]
    for twin in twins:
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in twin.modules())
        assert b"grutrace" not in pickle.dumps(twin)
        assert torch.equal(torch.jit.script(twin)(x), expected)
    assert len(trace.calls) == 1


def test_a_model_that_holds_its_tracer_copies_and_saves() -> None:
    net, x = Net(), torch.randn(5, 2, 3)
    net.tracer = grutrace.Tracer(net)
    net.tracer.start()
    net(x)
    twin = pickle.loads(pickle.dumps(net))
    assert torch.equal(twin(x), net(x))
    assert len(net.tracer.calls) == 2
    net.tracer.close()


FAST_PATHS = {"aten::_native_multi_head_attention", "aten::_transformer_encoder_layer_fwd"}


class WithAttention(nn.GRU):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.att = nn.MultiheadAttention(self.hidden_size, 4, batch_first=True)

    def forward(self, x, hx=None):
        y, h = super().forward(x, hx)
        return self.att(y, y, y, need_weights=False)[0], h


class WithEncoder(nn.GRU):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        layer = nn.TransformerEncoderLayer(self.hidden_size, 4, 64, batch_first=True)
        self.enc = nn.TransformerEncoder(layer, 2)

    def forward(self, x, hx=None):
        y, h = super().forward(x, hx)
        return self.enc(y), h


class EncoderWithGRU(nn.TransformerEncoderLayer):
    """Has a GRU among its own modules."""

    def __init__(self) -> None:
        super().__init__(32, 4, 64, batch_first=True)
        self.gru = nn.GRU(16, 32, batch_first=True)

    def forward(self, x):
        return super().forward(self.gru(x)[0]), None


@pytest.mark.parametrize(
    "make",
    [
        lambda: WithAttention(16, 32, batch_first=True),
        lambda: WithEncoder(16, 32, batch_first=True),
        EncoderWithGRU,
    ],
)
def test_fast_paths_in_the_same_forward_are_taken(make) -> None:
    torch.manual_seed(0)
    model, x = make().eval(), torch.randn(4, 25, 16)

    def is_fast() -> bool:
        with torch.profiler.profile() as profile:
            model(x)
        return any(event.key in FAST_PATHS for event in profile.key_averages())

    with torch.no_grad():
        plain = model(x)[0]
        assert is_fast()
        with grutrace.trace(model) as trace:
            assert torch.equal(model(x)[0], plain)
            assert is_fast()
        assert len(trace.calls) == 2
        # The control: a mode that does nothing switches it off.
        with BaseTorchFunctionMode():
            assert not is_fast()


@pytest.mark.parametrize("gates", GATES)
def test_a_helper_compiled_with_fullgraph(gates) -> None:
    class Post(nn.GRU):
        @torch.compile(fullgraph=True, backend="eager")
        def post(self, y):
            return y.tanh()

        def forward(self, x, hx=None):
            y, h = super().forward(x, hx)
            return self.post(y), h

    torch.compiler.reset()
    model, x = Post(8, 16).eval(), torch.randn(9, 3, 8)
    with torch.no_grad(), warnings.catch_warnings():
        plain = model(x)[0]
        if not compiled_graphs.can_run_eagerly():
            # What is in a graph is unknown there.
            warnings.filterwarnings("ignore", "torch.compile has made graphs")
        with grutrace.trace(model, gates=gates) as trace:
            assert torch.equal(model(x)[0], plain)
    assert len(trace.calls) == 1
    # No graph is left for other tests to warn of.
    torch.compiler.reset()


def said_by(layer: nn.Module, *arguments) -> str:
    try:
        layer(*arguments)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.GRU(3, 4, batch_first=True),
        lambda: nn.GRU(3, 4, 2, batch_first=True),
        lambda: nn.GRUCell(3, 4),
    ],
)
def test_pytorchs_own_error_for_nested_tensors(make, layout) -> None:
    layer = make()
    x = torch.nested.nested_tensor([torch.randn(2, 3), torch.randn(3, 3)], layout=layout)
    expected = said_by(layer, x)
    assert expected != "nothing"
    with warnings.catch_warnings(), grutrace.trace(layer):
        warnings.simplefilter("ignore", grutrace.GrutraceWarning)
        assert said_by(layer, x) == expected


def test_a_pre_hook_that_pads_a_nested_tensor() -> None:
    layer = nn.GRU(3, 4, batch_first=True)
    layer.register_forward_pre_hook(
        lambda _, args: (nn.utils.rnn.pad_sequence(args[0].unbind(), batch_first=True),)
    )
    x = torch.nested.nested_tensor([torch.randn(2, 3), torch.randn(3, 3)], layout=torch.jagged)
    expected = layer(x)[0]
    with grutrace.trace(layer, check="raise") as trace:
        assert torch.equal(layer(x)[0], expected)
    np.testing.assert_array_equal(trace["l0"].sequence(1).hidden, expected[1].detach())


def test_a_cell_with_input_size_0() -> None:
    cell, x = nn.GRUCell(0, 4), torch.randn(2, 0)
    expected = cell(x, torch.ones(2, 4))
    with grutrace.trace(cell, check="raise") as trace:
        assert torch.equal(cell(x, torch.ones(2, 4)), expected)
    np.testing.assert_array_equal(trace["cell"].hidden[:], expected.detach())
    assert trace.calls["residual"][0] < 1e-6


FSDP = """
import sys, tempfile
import torch, torch.distributed as dist, grutrace
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
try:
    from torch.distributed.fsdp import fully_shard
except ImportError:  # Before PyTorch 2.6.
    from torch.distributed._composable.fsdp import fully_shard
with tempfile.TemporaryDirectory() as folder:
    place = f"file://{{folder}}/rendezvous"
    dist.init_process_group("gloo", init_method=place, rank=0, world_size=1)
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.cell = nn.GRU(3, 4), nn.GRUCell(4, 4)
        def forward(self, x):
            return self.cell(self.rnn(x)[0][-1])
    def shard_path():
        torch.manual_seed(0)
        net = Net()
        fully_shard(net, mesh=init_device_mesh("cpu", (1,)))
        return net
    def step(net, x):
        net.zero_grad()
        out = net(x)
        out.square().sum().backward()
        return [out.detach(), *(p.grad.full_tensor().clone() for p in net.parameters())]
    x = torch.randn(5, 2, 3)
    expected = step(shard_path(), x)
    net = shard_path()
    with grutrace.trace(net, gates={gates!r}, shard=False) as trace:
        found = [step(net, x) for _ in range(2)]
    dist.destroy_process_group()
assert all(torch.equal(a, b) for each in found for a, b in zip(each, expected, strict=True))
assert len(trace.calls) == 4
assert trace["rnn.l0"].update[:].shape == (20, 4)
"""


@pytest.mark.skipif(
    torch.version.cuda is not None and not torch.cuda.is_available() and torch.__version__ < (2, 9),
    reason="FSDP of an older PyTorch's CUDA build needs a CUDA device",
)
@pytest.mark.parametrize("gates", GATES)
def test_weights_that_are_sharded_between_calls(gates) -> None:
    script = FSDP.format(gates=gates)
    done = forks.run("-W", "ignore", "-c", script)
    assert done.returncode == 0, done.stderr
