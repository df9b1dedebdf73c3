"""Tests of gates copied from the kernel: they are bit for bit those that it used."""

from __future__ import annotations

import logging
import subprocess
import sys
import textwrap
import threading
from contextlib import nullcontext
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import nn
from torch.autograd.graph import save_on_cpu
from torch.utils._python_dispatch import TorchDispatchMode

import grutrace
from grutrace.analysis.verification.verify import verify
from grutrace.gru import dispatcher, kernel_gates
from grutrace.gru.replay import GateReplay, PartialReplay
from grutrace.records import GATES
from tests import forks, oracles
from tests.checks import EVERYTHING, check_untouched, check_untouched_and_exact, same_result
from tests.strategies import Case, cases


class Harvesting(pytest.MonkeyPatch):
    """Has every call harvested whatever it costs, and none replayed."""

    def __enter__(self) -> Harvesting:
        self.setattr(kernel_gates, "is_cheaper", lambda *_, **__: True)
        self.setattr(GateReplay, "replay", None)
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()


@pytest.fixture
def harvesting():
    with Harvesting() as patch:
        yield patch


def has_steps(case: Case) -> bool:
    """Whether the kernel makes any step: of an empty batch there is none to tell."""
    input = case.args[0] if case.args else case.kwargs["input"]
    return bool(getattr(input, "data", input).numel())


@settings(max_examples=200, deadline=None)
@given(cases())
@pytest.mark.parametrize("stacks", ["split", "rerun"])
def test_the_lattice_with_a_graph(stacks: str, case: Case) -> None:
    if has_steps(case):
        with Harvesting():
            check_untouched_and_exact(case, stacks=stacks)


@settings(max_examples=200, deadline=None)
@given(cases())
def test_the_lattice_without_a_graph(case: Case) -> None:
    """Under no_grad, copied gates equal those of the autograd graph."""
    if not has_steps(case):
        return
    with_graph = case.run(case.untouched())
    with torch.no_grad():
        expected = case.run(case.untouched())
        with Harvesting(), grutrace.trace(case.layer, record=EVERYTHING, check="raise") as trace:
            result = case.run()
    assert same_result(expected, result)
    assert_gates_of_graph(case.layer, with_graph, trace)


@settings(max_examples=200, deadline=None)
@given(cases(), st.data())
@pytest.mark.parametrize("grad", [True, False])
def test_the_lattice_of_partial_gates(grad: bool, case: Case, data: st.DataObject) -> None:
    """Two tracers request different gates and units, and each gets the kernel's values."""
    if not has_steps(case):
        return
    size = case.layer.hidden_size
    units = data.draw(st.slices(size).filter(lambda selected: range(size)[selected]))
    record = data.draw(st.lists(st.sampled_from(EVERYTHING), min_size=1, unique=True))
    part = {"record": record, "units": units, "gates": "inline", "check": "raise"}
    numbers = list(range(size))[units]
    with torch.set_grad_enabled(grad), Harvesting() as patch:
        if numbers == sorted(numbers):
            patch.setattr(PartialReplay, "replay", None)
        expected = case.run(case.untouched())
        with grutrace.trace(case.layer, **part) as alone:
            assert same_result(expected, case.run())
        with (
            grutrace.trace(case.layer, gates="inline", check="raise") as whole,
            grutrace.trace(case.layer, **part) as beside,
        ):
            assert same_result(expected, case.run())
    for trace in (alone, beside):
        for name in trace.sites:
            for quantity in {*record} - {"input"}:
                result, kernel = trace[name].rows(quantity), whole[name].rows(quantity)
                if numbers == sorted(numbers):
                    np.testing.assert_array_equal(result, kernel[:, numbers])
                else:
                    allowed = whole[name].checks["tolerance"].max() + 1e-5
                    np.testing.assert_allclose(result, kernel[:, numbers], atol=allowed)


def test_control_a_wrong_part_has_a_residual(harvesting) -> None:
    """The update gate of the units beside the requested ones."""
    make_buffer = kernel_gates.GateBuffers._make_buffer

    def make_shifted(buffers, names, columns, width):
        buffer = make_buffer(buffers, names, columns, width)
        return buffer._replace(offset=buffer.offset + ("update" in names))

    harvesting.setattr(kernel_gates.GateBuffers, "_make_buffer", make_shifted)
    layer = nn.GRU(5, 40)
    with (
        pytest.raises(grutrace.ResidualError),
        grutrace.trace(layer, record="update", units=range(16), check="raise"),
    ):
        layer(torch.randn(4, 3, 5))


def assert_gates_of_graph(layer, result, trace) -> None:
    """Compare with the gates that an independent walk through the untouched graph finds."""
    is_cell = isinstance(layer, nn.GRUCell)
    output = result if is_cell else result[0]
    data = getattr(output, "data", output) if hasattr(output, "batch_sizes") else output
    directions = 2 if not is_cell and layer.bidirectional else 1
    kernel = oracles.harvest_layers(data.grad_fn, directions * layer.hidden_size)
    plain = layer if is_cell else nn.GRU(1, 1)
    for index, suffix in enumerate(trace.sites):
        number, reverse = divmod(index, directions)
        for name, used in kernel[number].items():
            whole = output._replace(data=used) if hasattr(output, "batch_sizes") else used
            width = directions * layer.hidden_size
            for b, both in enumerate(oracles.as_sequences(plain, whole, width)):
                own = np.split(both, directions, axis=1)[reverse]
                np.testing.assert_array_equal(getattr(trace[suffix].sequence(b), name), own)


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("batch_first", [False, True])
def test_inference_mode(harvesting, layers, batch_first) -> None:
    layer, x = nn.GRU(5, 7, layers, batch_first=batch_first), torch.randn(4, 3, 5)
    with torch.inference_mode():
        inputs = x.clone()
        expected = layer(inputs)
        with grutrace.trace(layer, check="raise") as trace:
            result = layer(inputs)
    assert all(tensor.is_inference() for tensor in result)
    assert same_result(expected, result)
    harvesting.undo()
    with grutrace.trace(layer) as replayed:
        layer(x)
    for name in trace.sites:
        for gate in GATES:
            np.testing.assert_allclose(trace[name].rows(gate), replayed[name].rows(gate), atol=1e-6)


def test_weights_that_are_inference_tensors(harvesting) -> None:
    with torch.inference_mode():
        layer, x = nn.GRU(5, 7), torch.randn(4, 3, 5)
        expected = layer(x)
        with grutrace.trace(layer, check="raise") as trace:
            assert same_result(expected, layer(x))
    assert trace["l0"].update.shape == (12, 7)


def test_a_training_run_is_the_same(harvesting) -> None:
    def train(tracing) -> list[torch.Tensor]:
        torch.manual_seed(0)
        layer = nn.GRU(5, 8, 2, dropout=0.4, bidirectional=True)
        optimizer = torch.optim.Adam(layer.parameters(), 0.01)
        with tracing(layer):
            for _ in range(20):
                optimizer.zero_grad()
                layer(torch.randn(6, 3, 5))[0].square().mean().backward()
                optimizer.step()
        return list(layer.parameters())

    traced = train(lambda layer: grutrace.trace(layer, check="raise"))
    assert all(map(torch.equal, traced, train(lambda _: nullcontext())))


def test_a_graph_freed_or_changed_afterwards(harvesting) -> None:
    layer = nn.GRU(3, 4, batch_first=True)
    x = torch.randn(2, 5, 3)
    with grutrace.trace(layer) as trace:
        output, _ = layer(x)
        before = trace["l0"].update.copy()
        output.sum().backward()
        with torch.no_grad():
            output.zero_()
    np.testing.assert_array_equal(trace["l0"].update, before)


class Counting(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


def run_within(surrounding, layer, x) -> tuple[torch.Tensor, torch.Tensor, grutrace.Trace]:
    with surrounding():
        expected = layer(x)
    with surrounding(), grutrace.trace(layer, check="raise", record=EVERYTHING) as trace:
        result = layer(x)
    return expected, result, trace


@pytest.mark.parametrize(
    "surrounding",
    [
        save_on_cpu,
        lambda: torch.autocast("cpu"),
        lambda: torch.autograd.detect_anomaly(check_nan=False),
        lambda: torch.autograd.graph.disable_saved_tensors_hooks("no hooks here"),
    ],
    ids=["saved tensor hooks", "autocast", "anomaly", "hooks disabled"],
)
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_every_state_of_autograd_and_autocast(harvesting, surrounding, grad) -> None:
    torch.manual_seed(0)
    layer, x = nn.GRU(5, 7, 2), torch.randn(4, 3, 5)
    with torch.set_grad_enabled(grad):
        expected, result, trace = run_within(surrounding, layer, x)
    assert same_result(expected, result)
    assert len(trace.calls) == 1
    harvesting.undo()
    assert all(result.holds for result in verify(trace))


def test_autocast_has_the_gates_of_its_graph(harvesting) -> None:
    torch.manual_seed(0)
    layer, x = nn.GRU(5, 7, bidirectional=True), torch.randn(4, 3, 5)
    with torch.autocast("cpu"):
        output, _ = layer(x)
        with grutrace.trace(layer, check="raise") as trace:
            layer(x)
    (kernel,) = oracles.harvest_layers(output.grad_fn, 14)
    for name, used in kernel.items():
        assert used.dtype == torch.bfloat16
        for reverse, site in enumerate(trace.sites):
            own = used.detach().float().transpose(0, 1)[..., 7 * reverse : 7 * (reverse + 1)]
            np.testing.assert_array_equal(trace[site].rows(name), own.reshape(12, 7))


@pytest.mark.parametrize("grad", [True, False])
def test_gates_are_replayed_under_a_dispatch_mode(monkeypatch, grad) -> None:
    """The mode could see the copies."""
    monkeypatch.setattr(kernel_gates, "is_cheaper", lambda *_, **__: True)
    monkeypatch.setattr(kernel_gates, "copy_kernel_gates", None)
    torch.manual_seed(0)
    layer, x = nn.GRU(5, 7, 2), torch.randn(4, 3, 5)
    with torch.set_grad_enabled(grad):
        expected, result, trace = run_within(Counting, layer, x)
    assert same_result(expected, result)
    assert all(result.holds for result in verify(trace))


@pytest.mark.parametrize("grad", [True, False])
def test_additions_outside_the_call_are_not_observed(harvesting, grad) -> None:
    """Additions of other threads, and of this thread before and after a call."""
    layer, x, told = nn.GRU(64, 64), torch.randn(200, 8, 64), []
    stop = threading.Event()

    def add() -> None:
        while not stop.is_set():
            told.append(bool((torch.ones(8, 64) + torch.ones(8, 64) == 2).all()))

    other = threading.Thread(target=add)
    other.start()
    try:
        with torch.set_grad_enabled(grad), grutrace.trace(layer, check="raise") as trace:
            for _ in range(10):
                layer(x + x)
    finally:
        stop.set()
        other.join()
    assert len(told) > 10
    assert all(told)
    assert (trace["l0"].checks["residual"] == 0).all()


@pytest.mark.parametrize("make", [nn.GRU, nn.GRUCell])
@pytest.mark.parametrize("shape", [(), (4,), (2, 3, 4), (2, 2, 3, 4)])
@pytest.mark.parametrize("harvested", [True, False])
def test_wrong_input_gives_pytorchs_own_error(make, shape, harvested, monkeypatch) -> None:
    monkeypatch.setattr(kernel_gates, "is_cheaper", lambda *_, **__: harvested)
    layer, x = make(4, 6), torch.randn(shape)

    def said() -> tuple[type, str] | None:
        try:
            layer(x)
        except Exception as error:
            return type(error), str(error)
        return None

    expected = said()
    with grutrace.Tracer(layer, gates="inline") as tracer:
        assert said() == expected
        layer(torch.randn(3, 4))
        assert len(tracer.calls) == 1 + (expected is None)
    assert not layer._forward_hooks


def test_an_interruption_within_a_step_leaves_nothing_behind(harvesting, monkeypatch) -> None:
    layer, x = nn.GRU(5, 7), torch.randn(4, 3, 5)
    heard = dispatcher.observe_additions

    def interrupted(listener, run):
        def listen(*arguments):
            raise KeyboardInterrupt

        return heard(listen, run)

    with grutrace.trace(layer, check="raise") as trace:
        with monkeypatch.context() as patch:
            patch.setattr(dispatcher, "observe_additions", interrupted)
            with pytest.raises(KeyboardInterrupt):
                layer(x)
        assert torch.equal(x + x, 2 * x)
        assert dispatcher._local.listener is None
        layer(x)
    assert len(trace.calls) == 1


def test_verification_and_residual_of_copied_gates(harvesting, tmp_path) -> None:
    torch.manual_seed(0)
    layer = nn.GRU(5, 40, 2, bidirectional=True).requires_grad_(False)
    for parameter in layer.parameters():
        parameter *= 5
    with grutrace.trace(layer, tmp_path / "run.h5", record=EVERYTHING, check="raise") as trace:
        layer(torch.randn(30, 3, 5))
    assert trace["l0"].residual == 0.0
    with grutrace.open(tmp_path / "run.h5") as opened:
        assert all(result.check == "gates" and result.holds for result in verify(opened))


@pytest.mark.parametrize("grad", [True, False])
def test_control_wrong_gates_have_a_residual(harvesting, grad) -> None:
    """The residual shows that the gates do not lead to the states."""
    assert kernel_gates.kernel_supported()
    right = kernel_gates.GateBuffers.gates

    def mixed_up(room):
        gates = right.fget(room)
        return gates | {"update": gates["candidate"], "candidate": gates["update"]}

    harvesting.setattr(kernel_gates.GateBuffers, "gates", property(mixed_up))
    layer = nn.GRU(5, 7)
    with (
        torch.set_grad_enabled(grad),
        pytest.raises(grutrace.ResidualError),
        grutrace.trace(layer, check="raise"),
    ):
        layer(torch.randn(4, 3, 5))


@pytest.fixture
def unknown_kernel(monkeypatch):
    """Another PyTorch, whose kernel makes the hidden product in memory of another layout."""
    heard = dispatcher.observe_additions

    def of_another(listener, run):
        return heard(
            lambda one, product, total: listener(one, product.contiguous(), total),
            run,
        )

    monkeypatch.setattr(kernel_gates, "is_cheaper", lambda *_, **__: True)
    monkeypatch.setattr(dispatcher, "observe_additions", of_another)
    return monkeypatch


@pytest.fixture
def unknown_pytorch(unknown_kernel):
    kernel_gates.kernel_supported.cache_clear()
    yield
    unknown_kernel.undo()
    kernel_gates.kernel_supported.cache_clear()
    assert kernel_gates.kernel_supported()


def test_an_unknown_kernel_is_replayed_and_warns_once(unknown_pytorch, caplog) -> None:
    layer = nn.GRU(5, 7, 2)
    with caplog.at_level(logging.DEBUG, "grutrace"):
        for grad in (True, False):
            with torch.set_grad_enabled(grad), grutrace.trace(layer, check="raise") as trace:
                layer(torch.randn(4, 3, 5))
            assert trace["l1"].update.shape == (12, 7)
    (record,) = caplog.records
    assert record.levelno == logging.DEBUG
    assert "gates are replayed, not copied" in record.message


def check_replayed(grad: bool) -> None:
    layer, x = nn.GRU(5, 7, 2), torch.randn(4, 3, 5)
    with torch.set_grad_enabled(grad):
        expected = layer(x)
        with grutrace.trace(layer, check="raise", record=EVERYTHING) as trace:
            assert same_result(expected, layer(x))
    assert trace["l0"].residual < 1e-6
    assert all(result.holds for result in verify(trace))


@pytest.mark.parametrize("grad", [True, False])
def test_a_kernel_that_differs_in_one_call(grad, request) -> None:
    """It is recognised when the tracer attaches, but a later call differs and is replayed."""
    assert kernel_gates.kernel_supported()
    request.getfixturevalue("unknown_kernel")
    check_replayed(grad)


@pytest.mark.parametrize("more", [-1, 1])
@pytest.mark.parametrize("grad", [True, False])
def test_a_kernel_of_more_or_fewer_additions_is_replayed(monkeypatch, grad, more) -> None:
    assert kernel_gates.kernel_supported()
    heard = dispatcher.observe_additions

    def of_another(listener, run):
        count = 0

        def listen(*arguments):
            nonlocal count
            count += 1
            for _ in range(1 + more if count == 1 else 1):
                listener(*arguments)

        return heard(listen, run)

    monkeypatch.setattr(kernel_gates, "is_cheaper", lambda *_, **__: True)
    monkeypatch.setattr(dispatcher, "observe_additions", of_another)
    check_replayed(grad)


def test_gates_are_replayed_if_the_dispatch_key_is_in_use() -> None:
    program = """
        import torch
        from torch.library import Library, fallthrough_kernel
        theirs = Library("_", "IMPL", "Fake")
        if hasattr(theirs, "fallback"):
            theirs.fallback(fallthrough_kernel)
        else:  # Before PyTorch 2.5.
            theirs.m.fallback_fallthrough("Fake")
        import grutrace
        from grutrace.gru import kernel_gates
        layer = torch.nn.GRU(512, 512)
        with torch.no_grad(), grutrace.trace(layer, gates="inline") as trace:
            layer(torch.randn(3, 32, 512))
        assert not kernel_gates.kernel_supported()
        assert trace["l0"].update.shape == (96, 512)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=True)


@pytest.mark.parametrize(
    "name",
    [
        "_dispatch_key_parse",
        "_dispatch_has_backend_fallback",
        "_dispatch_tls_is_dispatch_key_included",
        "_IncludeDispatchKeyGuard",
        "DispatchKeySet",
    ],
)
def test_gates_are_replayed_if_pytorch_lacks_what_copies_them(name) -> None:
    program = f"""
        import torch
        import grutrace.capture.tracer
        from grutrace.gru import kernel_gates
        del torch._C.{name}
        layer, x = torch.nn.GRU(512, 512), torch.randn(3, 32, 512)
        with torch.no_grad():
            expected = layer(x)[0]
            with grutrace.trace(layer, gates="inline", check="raise") as trace:
                assert torch.equal(layer(x)[0], expected)
        assert not kernel_gates.kernel_supported()
        assert trace["l0"].update.shape == (96, 512)
        assert trace.calls["residual"].max() < 1e-5
    """
    done = forks.run("-c", textwrap.dedent(program))
    assert done.returncode == 0, done.stderr


def test_half_types(harvesting) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        layer = nn.GRU(5, 7, 2, bidirectional=True).to(dtype)
        check_untouched(Case(layer, (torch.randn(6, 3, 5, dtype=dtype),)))


@pytest.mark.parametrize("grad", [True, False])
def test_a_chaotic_network(harvesting, grad) -> None:
    """Copied, replayed and recomputed gates are equal. A free run diverges."""
    torch.manual_seed(0)
    layer = nn.GRU(8, 64)
    with torch.no_grad():
        layer.weight_hh_l0 *= 12
    x = torch.randn(500, 1, 8)
    with torch.set_grad_enabled(grad):
        with grutrace.trace(layer, check="raise", record=EVERYTHING) as harvested:
            output, _ = layer(x)
        harvesting.undo()
        with (
            grutrace.trace(layer, check="raise", record=EVERYTHING) as replayed,
            grutrace.trace(layer, gates="deferred", record=EVERYTHING) as deferred,
        ):
            layer(x)
    for gate in GATES:
        np.testing.assert_allclose(harvested["l0"].rows(gate), replayed["l0"].rows(gate), atol=1e-5)
        np.testing.assert_allclose(harvested["l0"].rows(gate), deferred["l0"].rows(gate), atol=1e-5)
    weights = oracles.weights_of(layer, "l0")
    hidden, free = np.zeros((1, 64)), []
    for step in x.numpy():
        expected = oracles.gates(weights, step, hidden, 0.0)
        hidden = expected.values["hidden"]
        free.append(expected.values["update"][0])
    assert np.abs(np.array(free) - harvested["l0"].update).max() > 0.9
    assert output.shape == (500, 1, 64)


def test_replay_is_chosen_for_small_steps() -> None:
    all_of = {
        size: kernel_gates.GateRequest(dict.fromkeys(GATES, range(size))) for size in (64, 1024)
    }
    assert not kernel_gates.is_cheaper(1000, 1, 64, 64, all_of[64])
    assert not kernel_gates.is_cheaper(1, 4, 64, 64, all_of[64])
    assert kernel_gates.is_cheaper(10, 64, 1024, 1024, all_of[1024])
    few = kernel_gates.GateRequest({"update": range(1), "candidate": range(1)})
    assert not kernel_gates.is_cheaper(10, 1, 1024, 1024, few)


def test_one_step_is_not_copied_in_the_background() -> None:
    inline = kernel_gates.GateRequest(dict.fromkeys(GATES, range(1024)))
    background = inline._replace(max_cost_ratio=1 / 3)
    for steps, expected in (1, False), (10, True):
        assert kernel_gates.is_cheaper(steps, 64, 1024, 1024, background) is expected
        assert kernel_gates.is_cheaper(steps, 64, 1024, 1024, inline)


#: Prints the peak memory of each way to compute gates, in KiB. Each runs in a fork of its own.
PEAK = """
    import os, sys
    import torch
    from torch import nn
    import grutrace
    from grutrace.gru import kernel_gates

    def run(way):
        kernel_gates.is_cheaper = lambda *_, **__: way == "harvested"
        layer, x = nn.GRU(512, 512), torch.randn(256, 64, 512)
        if way == "graph":
            kept = layer(x)
        elif way == "untraced":
            with torch.no_grad():
                layer(x)
        else:
            with torch.no_grad(), grutrace.trace(layer, gates="inline"):
                layer(x)
        with open("/proc/self/status") as status:
            print(next(line.split()[1] for line in status if line.startswith("VmHWM")), flush=True)

    torch.set_num_threads(1)
    for way in sys.argv[1:]:
        child = os.fork()
        if not child:
            try:
                run(way)
            finally:
                os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
"""

#: The size of the three gates and the states above, and the memory allowed on top. KiB.
ROWS, MARGIN = 4 * 256 * 64 * 512 * 4 // 1024, 16 * 1024


def peaks(*ways: str) -> dict[str, int]:
    done = forks.run("-c", textwrap.dedent(PEAK), *ways, check=True)
    return dict(zip(ways, map(int, done.stdout.split()), strict=True))


@pytest.mark.measures
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_inline_gates_need_little_memory_beyond_their_rows() -> None:
    kilobytes = peaks("untraced", "harvested", "replayed", "graph")
    for way in ("harvested", "replayed"):
        assert kilobytes[way] - kilobytes["untraced"] < ROWS + MARGIN, way
    # Control: autograd keeps more of the same call.
    assert kilobytes["graph"] - kilobytes["untraced"] > ROWS + MARGIN


def test_a_listener_that_an_interruption_left_behind_goes_with_the_next_call() -> None:
    dispatcher._local.listener = lambda *_: pytest.fail("it was called")
    heard = []
    dispatcher.observe_additions(
        lambda *operands: heard.append(operands), lambda: torch.ones(2) + torch.ones(2)
    )
    assert len(heard) == 1
    assert dispatcher._local.listener is None
