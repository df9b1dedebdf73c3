"""Tests of observed kernel calls: inputs and outputs are recorded, the model is unchanged."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
import threading
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.overrides import BaseTorchFunctionMode

import grutrace
from grutrace.capture.kernel_calls import subscription as kernel_calls
from grutrace.capture.kernel_calls.subscription import is_observing
from tests import oracles

GATES = ["inline", "background", "deferred"]


def offload(layer: nn.GRU) -> None:
    """Weights are there only while the forward runs, as accelerate's cpu_offload has it."""
    kept = {name: weight.detach().clone() for name, weight in layer.named_parameters()}
    inner = layer.forward

    def put(device: str) -> None:
        for name, weight in kept.items():
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
    layer.forward = lambda x, hx=None: tuple(each * 0.5 for each in inner(x * 2, hx))


def parametrize_late(layer: nn.GRU) -> None:
    class Halved(nn.Module):
        def forward(self, weight):
            return weight / 2

    parametrize.register_parametrization(layer, "weight_hh_l0", Halved())


def hook_the_output(layer: nn.GRU) -> None:
    layer.register_forward_hook(lambda *given: tuple(each * 0.5 for each in given[-1]))


def hook_the_output_first(layer: nn.GRU) -> None:
    layer.register_forward_hook(lambda *given: tuple(e * 0.5 for e in given[-1]), prepend=True)


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


class Listener:
    """Hears what the kernel is given and gives, in PyTorch's own words."""

    def __init__(self) -> None:
        self.heard = []

    def __enter__(self):
        self._own, torch._VF.gru = torch._VF.gru, self._gru
        return self

    def _gru(self, *args):
        result = self._own(*args)
        given = [each.clone() if isinstance(each, torch.Tensor) else each for each in args]
        given[2] = [weight.detach().clone() for weight in args[2]]
        self.heard.append((given, result))
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
    with Listener() as kernel:
        expected = untouched(x)
    (arguments, (output, _)), *others = kernel.heard
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


def test_a_direct_call_of_forward_is_recorded() -> None:
    layer, x = nn.GRU(3, 4, 2), torch.randn(5, 2, 3)
    expected = layer.forward(x)
    with grutrace.trace(layer) as trace:
        assert all(map(torch.equal, layer.forward(x), expected))
    assert len(trace.calls) == 1


class Packing(nn.GRU):
    def forward(self, x, lengths):
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        output, last = super().forward(packed)
        return pad_packed_sequence(output, batch_first=True)[0], last


class PackingByHand(nn.GRU):
    """Calls the kernel itself."""

    def forward(self, x, lengths):
        bundle = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        zeros = x.new_zeros(1, len(x), self.hidden_size)
        output, last = torch.gru(
            bundle.data, bundle.batch_sizes, zeros, self._flat_weights, True, 1, 0.0, False, False
        )
        return pad_packed_sequence(bundle._replace(data=output), batch_first=True)[0], last


class Nested(nn.Module):
    """Packs in a module around the layer."""

    def __init__(self, *args, **kwargs):
        super().__init__()
        self.rnn = nn.GRU(*args, **kwargs)

    def forward(self, x, lengths):
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        output, last = self.rnn(packed)
        return pad_packed_sequence(output, batch_first=True)[0], last


@pytest.mark.parametrize("kind", [Packing, PackingByHand, Nested])
@pytest.mark.parametrize("gates", GATES)
def test_sequences_are_in_the_order_of_the_batch(kind, gates) -> None:
    torch.manual_seed(0)
    layer = kind(3, 4, batch_first=True).requires_grad_(False)
    x, lengths = torch.randn(3, 5, 3), torch.tensor([2, 5, 3])
    with (
        grutrace.trace(layer, gates=gates) as trace,
        trace.recording(labels={"speaker": ["ann", "bob", "eve"]}),
    ):
        output, _ = layer(x, lengths)
    site = trace[trace.sites[0]]
    for row, speaker in enumerate(("ann", "bob", "eve")):
        sequence = site.sequence(row)
        np.testing.assert_array_equal(sequence.hidden, output[row, : lengths[row]].numpy())
        assert set(sequence.labels["speaker"]) == {speaker}


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
    with torch.no_grad():
        plain = model(x)[0]
        with grutrace.trace(model, gates=gates) as trace:
            assert torch.equal(model(x)[0], plain)
    assert len(trace.calls) == 1


class Growing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.top = nn.GRU(3, 4), nn.GRU(4, 4)

    def forward(self, x):
        return self.top(self.rnn(x)[0])[0]


def test_a_replaced_layer_is_recorded_under_its_path() -> None:
    net, x = Growing(), torch.randn(5, 2, 3)
    with grutrace.trace(net, check="raise") as trace:
        net(x)
        net.rnn = nn.GRU(3, 4)
        net(x)
        expected = net.rnn(x)[0]
    assert trace.calls["module"].tolist() == ["rnn", "top", "rnn", "top", "rnn"]
    assert trace.calls["weights"].tolist() == [0, 0, 1, 0, 1]
    np.testing.assert_array_equal(trace["rnn.l0"].sequence(4).hidden, expected[:, 0].detach())


def test_a_new_layer_or_another_shape_is_reported() -> None:
    net, x = Growing(), torch.randn(5, 2, 3)
    with grutrace.trace(net, sites="rnn.*") as trace:
        net(x)
        net.rnn = nn.GRU(3, 4, bidirectional=True)
        with pytest.warns(grutrace.GrutraceWarning, match="rnn was replaced by a layer of an"):
            net.rnn(x)
        net.head = nn.GRUCell(3, 3)
        with pytest.warns(grutrace.GrutraceWarning, match="head was added after the tracer"):
            net.head(x[0])
        # What was left out on purpose is not named.
        net.top(torch.randn(5, 2, 4))
    assert len(trace.calls) == 1


def test_a_layer_replaced_by_another_module_is_reported() -> None:
    net, x = Growing(), torch.randn(5, 2, 3)
    trace = grutrace.trace(net)
    trace.start()
    net(x)
    net.rnn = nn.RNN(3, 4)
    net(x)
    with pytest.warns(grutrace.GrutraceWarning, match="^rnn was replaced by a RNN after"):
        trace.close()
    assert trace.calls["module"].tolist() == ["rnn", "top", "top"]


def test_cells_created_in_each_call_are_reported_once() -> None:
    class Vocoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.GRU(3, 4)

        def forward(self, x):
            return self.rnn(x)[0]

        def generate(self, x):
            cell = nn.GRUCell(3, 4)
            cell.weight_ih.data, cell.weight_hh.data = self.rnn.weight_ih_l0, self.rnn.weight_hh_l0
            return cell(x)

    model, x = Vocoder(), torch.randn(5, 2, 3)
    neighbour = nn.GRUCell(3, 4)
    with grutrace.trace(model):
        model(x)
        neighbour(x[0])
        with pytest.warns(grutrace.GrutraceWarning, match="a GRUCell that is not part"):
            model.generate(x[0])
        # Once: any other warning is an error.
        model.generate(x[0])


def test_a_subclass_that_never_calls_the_kernel_is_reported() -> None:
    class NormedCell(nn.GRUCell):
        def forward(self, x, h):
            return torch.tanh(nn.functional.linear(x, self.weight_ih)[:, :4] + h)

    model = nn.ModuleDict({"cell": NormedCell(3, 4), "gru": nn.GRU(3, 4)})
    trace = grutrace.trace(model)
    trace.start()
    model["gru"](torch.randn(5, 2, 3))
    model["cell"](torch.randn(2, 3), torch.zeros(2, 4))
    with pytest.warns(grutrace.GrutraceWarning, match=r"of cell.*without the kernel"):
        trace.close()


def test_complex_layers_are_refused_by_name() -> None:
    layer = nn.GRU(3, 4, dtype=torch.complex64)
    with pytest.raises(grutrace.UnsupportedError, match="complex"):
        grutrace.trace(layer)
    model = nn.ModuleList([layer, nn.GRU(3, 4)])
    with pytest.warns(grutrace.GrutraceWarning, match="^0 is complex"):
        trace = grutrace.trace(model)
    assert trace.sites == ("1.l0",)
    trace.close()


def said_by(layer: nn.Module, *given) -> str:
    try:
        layer(*given)
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
    layer.register_forward_pre_hook(lambda _, args: (torch.nested.to_padded_tensor(args[0], 0.0),))
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


def test_a_rebound_tracer_is_closed(tmp_path) -> None:
    """As in a notebook cell that runs again."""
    layer, x = nn.GRU(3, 4), torch.randn(5, 2, 3)
    for number in range(3):
        path = tmp_path / f"{number}.h5"
        with warnings.catch_warnings(record=True) as messages:
            warnings.simplefilter("always")
            tracer = grutrace.Tracer(layer, path)
        assert len(messages) == bool(number), messages
        tracer.start()
        layer(x)
        if number:
            assert "a tracer was garbage-collected while recording" in str(messages[0].message)
            with grutrace.open(tmp_path / f"{number - 1}.h5") as before:
                assert before.closed
                assert len(before.calls) == 1
    tracer.close()
    assert not is_observing()


def test_two_tracers_may_be_open() -> None:
    layer, x = nn.GRU(3, 4), torch.randn(5, 2, 3)
    held = [grutrace.Tracer(layer) for _ in range(2)]
    for each in held:
        each.start()
    layer(x)
    assert [len(each.calls) for each in held] == [1, 1]
    for each in held:
        each.close()


def test_kernels_are_registered_and_removed_while_threads_run(monkeypatch) -> None:
    """A removed kernel is kept while a thread may be about to call it."""
    cell, x, h = nn.GRUCell(4, 8), torch.randn(2, 4), torch.zeros(2, 8)
    expected, end, errors, calls = cell(x, h), threading.Event(), [], [0] * 3

    def run(number: int) -> None:
        with torch.no_grad():
            while not end.is_set():
                try:
                    assert torch.equal(cell(x, h), expected)
                    calls[number] += 1
                except BaseException as error:
                    errors.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(3)]
    for each in threads:
        each.start()
    heard = []
    try:
        for _ in range(200):
            subscription = kernel_calls.Subscription(cell, heard.append)
            subscription.start()
            subscription.stop()
    finally:
        end.set()
        for thread in threads:
            thread.join()
    assert not errors
    assert all(calls)
    assert not is_observing()


STAYING = """
import threading
import grutrace, torch
from torch import nn
from grutrace.capture.kernel_calls import registration
from grutrace.capture.kernel_calls.subscription import is_observing

registration._kernel_handle = lambda *_: None
layer, x = nn.GRU(3, 4), torch.randn(5, 2, 3)
end = threading.Event()
other = threading.Thread(target=end.wait)
other.start()
with grutrace.trace(layer) as trace:
    layer(x)
assert is_observing()
expected = layer(x)
end.set()
other.join()
with grutrace.trace(layer) as again:
    assert all(map(torch.equal, layer(x), expected))
assert not is_observing()
assert len(trace.calls) == len(again.calls) == 1
"""


def test_a_kernel_stays_while_threads_may_call_it() -> None:
    """Without a handle to a removed kernel, it is removed once no other thread runs Python.

    In a process of its own: a test runner may have threads.
    """
    subprocess.run([sys.executable, "-c", STAYING], check=True)


FSDP = """
import sys, tempfile
import torch, torch.distributed as dist, grutrace
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
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


@pytest.mark.parametrize("gates", GATES)
def test_weights_that_are_sharded_between_calls(gates) -> None:
    script = FSDP.format(gates=gates)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
