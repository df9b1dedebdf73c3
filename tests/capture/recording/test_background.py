"""Gates in the background: stored is what an inline trace stores, and the model waits less."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import threading
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import nn

import grutrace
from grutrace.analysis.verification.verify import verify
from grutrace.capture.recording import module_recorder, weight_versions
from grutrace.gru import cell, kernel_gates
from grutrace.gru.replay import GateReplay
from grutrace.records import GATES
from grutrace.storage.write.writer import Writer
from tests import forks, oracles
from tests.capture.models import EncoderDecoder, StepwiseDecoder
from tests.checks import EVERYTHING, check_untouched_and_exact, rounding
from tests.strategies import Case, cases
from tests.test_both_sinks import assert_same, run

BACKGROUND = {"gates": "background", "record": EVERYTHING}


@contextmanager
def harvesting(always: bool):
    """Have gates of calls in the background harvested, whatever that costs, or never."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel_gates, "is_cheaper", lambda *_: always)
        if always:
            patch.setattr("grutrace.capture.recording.background.recompute", None)
        yield


#: Gates computed of what was copied, and gates harvested that are proven later.
both_ways = pytest.mark.parametrize("always", [False, True], ids=["copied", "harvested"])


def assert_same_as_inline(inline, background) -> None:
    """Compare two traces of the same run: states bit for bit, gates within rounding."""
    assert inline.sequences.tolist() == background.sequences.tolist()
    for name in inline.sites:
        one, other = inline[name], background[name]
        allowed = rounding(one, other)
        for quantity in one.site.quantities:
            a, b = np.asarray(one.rows(quantity)), np.asarray(other.rows(quantity))
            assert (a.dtype, a.shape) == (b.dtype, b.shape)
            if quantity in GATES:
                assert (np.abs(a.astype(float) - b) <= allowed).all(), (name, quantity)
            else:
                np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(one.initial, other.initial)
        np.testing.assert_array_equal(one.checks["precision"], other.checks["precision"])
        assert (other.checks["residual"] <= other.checks["tolerance"]).all()
        # From the sizes of the same products, each rounded once.
        rtol = 4 * float(one.checks["precision"].max(initial=2.0**-23))
        np.testing.assert_allclose(one.checks["tolerance"], other.checks["tolerance"], rtol=rtol)


# -- the same as inline -----------------------------------------------------------------------


def has_steps(case: Case) -> bool:
    """Whether the kernel makes any step: of an empty batch there is none to harvest."""
    input = case.args[0] if case.args else case.kwargs["input"]
    return bool(getattr(input, "data", input).numel())


@settings(max_examples=100, deadline=None)
@given(cases())
@both_ways
def test_the_lattice_in_memory(always: bool, case: Case) -> None:
    with harvesting(always and has_steps(case)):
        check_untouched_and_exact(case, gates="background")


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(cases())
@both_ways
def test_the_lattice_in_a_file(tmp_path: Path, always: bool, case: Case) -> None:
    path = tmp_path / "run.h5"
    with harvesting(always and has_steps(case)):
        check_untouched_and_exact(case, gates="background", path=path, mode="overwrite")
    with grutrace.open(path) as trace:
        for result in verify(trace):
            assert (result.check, result.holds) == ("gates", True), result


@settings(max_examples=100, deadline=None)
@given(cases(dtypes=(torch.float32, torch.float64, torch.float16, torch.bfloat16)))
@both_ways
def test_the_lattice_beside_inline(always: bool, case: Case) -> None:
    with (
        harvesting(always and has_steps(case)),
        grutrace.trace(case.layer, record=EVERYTHING, check="raise") as inline,
        grutrace.trace(case.layer, **BACKGROUND) as background,
    ):
        case.run()
        case.run()
    assert_same_as_inline(inline, background)


@both_ways
def test_whole_runs(tmp_path, always) -> None:
    """Dropout, weights that change within the run, packed and stepwise, an empty batch."""
    torch.manual_seed(1)
    model = EncoderDecoder(layers=2, dropout=0.3)
    with (
        # It has an empty batch, too.
        pytest.MonkeyPatch.context() as patch,
        grutrace.trace(model, record=EVERYTHING, check="raise") as inline,
        grutrace.trace(model, **BACKGROUND) as memory,
        grutrace.trace(model, tmp_path / "run.h5", **BACKGROUND) as file,
    ):
        patch.setattr(kernel_gates, "is_cheaper", lambda *_: always)
        run(model, inline, memory, file)
        assert_same_as_inline(inline, memory)
        # How many calls are computed together is not the same in both.
        assert_same(memory, file, apart=not always)
    with grutrace.open(tmp_path / "run.h5") as opened:
        assert max(opened.calls["weights"]) > 0
        assert_same_as_inline(inline, opened)
        assert all(result.holds for result in verify(opened))


@both_ways
def test_a_decoder_whose_batch_shrinks_and_is_reordered(always) -> None:
    torch.manual_seed(0)
    decoder, layer = StepwiseDecoder(2), nn.GRUCell(4, 6)
    both = nn.ModuleDict({"decoder": decoder, "cell": layer})
    with (
        harvesting(always),
        torch.no_grad(),
        grutrace.trace(both, record=EVERYTHING, check="raise") as inline,
        grutrace.trace(both, **BACKGROUND) as background,
    ):
        decoder(torch.randn(1, 3, 4), torch.randn(2, 3, 6), 5)
        state = torch.randn(4, 6)
        for rows in ([0, 1, 2, 3], [2, 0, 3], [1, 1, 0], [0, 1]):
            state = layer(torch.randn(len(rows), 4), state[rows])
    assert_same_as_inline(inline, background)


def test_only_some_steps() -> None:
    torch.manual_seed(0)
    layer = nn.GRU(3, 4, 2, bidirectional=True)
    options = {"record": EVERYTHING, "steps": slice(2, 5)}
    with (
        grutrace.trace(layer, check="raise", **options) as inline,
        grutrace.trace(layer, gates="background", **options) as background,
    ):
        layer(torch.randn(7, 3, 3))
    assert background["l0_reverse"].sequence(1).update.shape == (3, 4)
    assert_same_as_inline(inline, background)


@pytest.mark.parametrize(
    "record", ["update", ("reset", "input"), "hidden", ("hidden", "candidate")]
)
@both_ways
def test_what_was_asked_for_is_stored_and_nothing_else(record, always, tmp_path) -> None:
    layer = nn.GRU(3, 40, 2)
    with (
        harvesting(always),
        grutrace.trace(
            layer, tmp_path / "a.h5", record=record, gates="background", on_error="raise"
        ) as trace,
    ):
        layer(torch.randn(5, 2, 3))
    assert (trace["l1"].checks["residual"] <= trace["l1"].checks["tolerance"]).all() or (
        record == "hidden"
    )
    assert all(result.holds for result in verify(trace) if result.check == "gates")
    asked = (record,) if isinstance(record, str) else record
    assert set(trace["l1"].site.quantities) == set(asked)
    assert all(trace["l1"].rows(name).shape[0] == 10 for name in asked)
    with pytest.raises(grutrace.NotRecordedError):
        trace["l1"].rows(next(name for name in EVERYTHING if name not in asked))


@both_ways
def test_rows_in_a_smaller_type_are_those_of_an_inline_trace(always) -> None:
    """The copies keep the kernel's own type: nothing is derived from rounded states."""
    torch.manual_seed(0)
    layer = nn.GRU(6, 30)
    options = {"record": EVERYTHING, "dtype": "float16"}
    with (
        harvesting(always),
        grutrace.trace(layer, check="raise") as whole,
        grutrace.trace(layer, check="raise", **options) as inline,
        grutrace.trace(layer, gates="background", **options) as background,
    ):
        layer(torch.randn(20, 4, 6))
    for name in EVERYTHING:
        a, b = (np.asarray(trace["l0"].rows(name)) for trace in (inline, background))
        assert a.dtype == b.dtype == np.float16
        if name in GATES:
            # Two float32 that are that near are rounded to float16 that are neighbours, or as near.
            allowed = rounding(whole["l0"]) + np.spacing(np.maximum(abs(a), abs(b)))
            assert (np.abs(a.astype(float) - b) <= allowed).all(), name
        else:
            np.testing.assert_array_equal(a, b)
    assert background["l0"].residual < 1e-6
    assert all(result.holds for result in verify(background))


@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16])
@both_ways
def test_autocast(cast, always) -> None:
    torch.manual_seed(0)
    layer = nn.GRU(5, 16)
    with (
        harvesting(always),
        grutrace.trace(layer, record=EVERYTHING, check="raise") as inline,
        grutrace.trace(layer, **BACKGROUND) as background,
        torch.autocast("cpu", dtype=cast),
    ):
        layer(torch.randn(6, 4, 5))
    assert background["l0"].checks["precision"][0] == torch.finfo(cast).eps
    assert_same_as_inline(inline, background)


def test_a_chaotic_network(tmp_path) -> None:
    """The control, a free run from the first state, ends elsewhere."""
    torch.manual_seed(0)
    layer = nn.GRU(8, 64).requires_grad_(False)
    layer.weight_hh_l0.normal_(0, 3)
    x = torch.randn(500, 2, 8)
    with grutrace.trace(layer, tmp_path / "run.h5", **BACKGROUND) as trace:
        layer(x)
    sequence = trace["l0"].sequence(1)
    weights = oracles.weights_of(layer, "l0")
    expected = oracles.gates(weights, sequence.input, sequence.previous, 2.0**-23)
    for gate in GATES:
        assert (np.abs(sequence.rows(gate) - expected.values[gate]) <= expected.bounds[gate]).all()
    state, free = np.zeros((1, 64)), []
    for row in x[:, 1].numpy():
        step = oracles.gates(weights, row[np.newaxis], state, 0.0)
        state = step.values["hidden"]
        free.append(step.values["update"][0])
    assert np.abs(np.array(free) - sequence.update).max() > 0.5


# -- outside the model's forward --------------------------------------------------------------


@pytest.fixture
def products(monkeypatch) -> list[int]:
    """The rows of each matrix product that grutrace makes."""
    rows: list[int] = []
    plain = cell.linear

    def counted(values, *weights):
        rows.append(values.numel() // values.shape[-1])
        return plain(values, *weights)

    monkeypatch.setattr(cell, "linear", counted)
    return rows


def test_the_forward_computes_nothing_and_many_calls_are_computed_at_once(products) -> None:
    layer = nn.GRUCell(4, 6)
    state = torch.randn(3, 6)
    with grutrace.trace(layer, gates="background") as trace:
        for _ in range(50):
            state = layer(torch.randn(3, 4), state)
        assert products == []
        assert trace["cell"].update.shape == (150, 6)
        assert products == [150, 150]
        state = layer(torch.randn(3, 4), state)
        assert len(trace["cell"].update) == 153
    assert products == [150, 150, 3, 3]


def test_control_inline_computes_with_each_call(products, monkeypatch) -> None:
    # Without the library, it does not keep the kernel's own gates.
    monkeypatch.setattr(module_recorder, "load", lambda: None)
    layer = nn.GRUCell(4, 6)
    with grutrace.trace(layer, gates="inline"):
        for _ in range(5):
            layer(torch.randn(3, 4))
    assert products == [3] * 10


def test_the_thread_that_writes_computes(tmp_path, monkeypatch) -> None:
    threads = set()
    plain = cell.linear
    monkeypatch.setattr(
        cell, "linear", lambda *a: threads.add(threading.current_thread().name) or plain(*a)
    )
    layer = nn.GRU(4, 6)
    with grutrace.trace(layer, tmp_path / "run.h5", gates="background") as tracer:
        layer(torch.randn(5, 2, 4))
        tracer.flush()
        assert threads == {"grutrace writer"}


def test_the_default_is_the_background_where_it_can_be(tmp_path) -> None:
    layer = nn.GRU(4, 6)
    for options, gates in (
        ({}, "background"),
        ({"path": tmp_path / "a.h5"}, "inline"),
        ({"check": "raise"}, "inline"),
        ({"units": [1]}, "inline"),
        ({"sink": grutrace.Statistics()}, "inline"),
        ({"gates": "deferred"}, "deferred"),
    ):
        with grutrace.Tracer(layer, recording=False, **options) as tracer:
            assert tracer.options["gates"] == gates


TEAMS = """
    import os, sys, threading, time
    import torch, grutrace
    from grutrace.capture.recording import background
    from torch import nn
    from grutrace.capture import selection

    selection.BACKGROUND_ON_CPU = True

    torch.set_num_threads(4)
    if sys.argv[1] == "control":
        background.limit_torch_threads = lambda: None
    layer, x = nn.GRU(128, 256).requires_grad_(False), torch.randn(64, 64, 128)
    layer(x)
    before = len(os.listdir("/proc/self/task"))
    with grutrace.trace(layer, sys.argv[2], gates="background") as trace:
        layer(x)
        trace.flush()
        # That of the writer, and those of its team.
        print(len(os.listdir("/proc/self/task")) - before)
        assert torch.get_num_threads() == 4
        found = []
        other = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
        other.start(), other.join()
        assert found == [4]
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux's /proc")
def test_the_thread_that_computes_has_no_team_of_its_own(tmp_path) -> None:
    """With more of torch's threads than cores the model's own wait for each other asleep."""

    def threads(way: str) -> int:
        command = [sys.executable, "-c", textwrap.dedent(TEAMS), way, str(tmp_path / f"{way}.h5")]
        return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    assert threads("kept") == 1
    assert threads("control") > 1


def test_what_cannot_be_in_the_background() -> None:
    layer = nn.GRU(4, 6)
    with pytest.raises(grutrace.OptionError, match=r"units: expected None with gates='background'"):
        grutrace.Tracer(layer, gates="background", units=[1])
    with pytest.raises(grutrace.OptionError, match=r"gates and sink: .* found 'background'"):
        grutrace.Tracer(layer, gates="background", sink=grutrace.Statistics())


# -- the proof --------------------------------------------------------------------------------


@pytest.fixture
def wrong_weights(monkeypatch) -> None:
    """What is taken for the weights is not what the kernel used."""
    monkeypatch.setattr(weight_versions, "_copy", lambda weight: weight.detach() + 0.1)


@pytest.mark.usefixtures("wrong_weights")
def test_a_residual_beyond_rounding_is_said_when_it_is_known(tmp_path) -> None:
    layer, x = nn.GRU(4, 6), torch.randn(5, 2, 4)
    with grutrace.trace(layer, gates="background") as trace:
        layer(x)
        with pytest.warns(grutrace.ResidualWarning, match=r"l0: the gates of call 0 are unproven"):
            assert trace["l0"].residual > 1e-3
        layer(x)
        assert len(trace.calls) == 2
    with grutrace.Tracer(layer, tmp_path / "a.h5", gates="background") as tracer:
        layer(x)
        with pytest.warns(grutrace.ResidualWarning, match="rounding explains"):
            tracer.flush()
    with (
        pytest.warns(grutrace.ResidualWarning),
        grutrace.Tracer(layer, tmp_path / "b.h5", gates="background"),
    ):
        layer(x)
    with grutrace.Tracer(layer, tmp_path / "c.h5", gates="background", check="off") as tracer:
        layer(x)
        tracer.flush()


@pytest.mark.parametrize("record", ["update", EVERYTHING])
def test_control_harvested_gates_that_are_wrong_are_said(record, monkeypatch) -> None:
    gates_of = kernel_gates.GateBuffers.gates.fget

    def mixed_up(room):
        return {name: 1 - gate for name, gate in gates_of(room).items()}

    layer = nn.GRU(3, 40)
    with harvesting(True), grutrace.trace(layer, record=record) as trace:
        assert kernel_gates.kernel_supported()
        monkeypatch.setattr(kernel_gates.GateBuffers, "gates", property(mixed_up))
        layer(torch.randn(5, 2, 3))
        with pytest.warns(grutrace.ResidualWarning, match="rounding explains"):
            trace["l0"].update[:]


def test_where_a_harvest_costs_a_fraction_it_takes_the_place_of_computing(products) -> None:
    layer = nn.GRU(512, 512).requires_grad_(False)
    with grutrace.trace(layer) as trace:
        layer(torch.randn(10, 64, 512))
        layer(torch.randn(10, 1, 512))
    assert trace["l0"].update.shape == (650, 512)
    assert products == [10, 10]


@pytest.mark.usefixtures("wrong_weights")
def test_a_residual_beyond_rounding_can_be_an_error(tmp_path) -> None:
    layer, x, path = nn.GRU(4, 6), torch.randn(5, 2, 4), tmp_path / "a.h5"
    tracer = grutrace.Tracer(layer, path, gates="background", check="raise")
    tracer.start()
    expected = layer(x)[0]
    with pytest.raises(grutrace.ResidualError, match="the gates of call 0 are unproven"):
        tracer.flush()
    tracer.close()
    with grutrace.open(path) as trace:
        np.testing.assert_array_equal(
            trace["l0"].sequence(1).hidden, expected[:, 1].detach().numpy()
        )


def test_values_that_are_no_number_prove_nothing_wrong() -> None:
    layer = nn.GRU(4, 6)
    x = torch.randn(5, 2, 4)
    x[2, 1, 0] = float("nan")
    with grutrace.trace(layer, gates="background") as trace:
        layer(x)
    assert trace["l0"].residual <= trace["l0"].checks["tolerance"][0] < 1e-4
    assert np.isnan(trace["l0"].sequence(1).update[2:]).all()
    assert np.isfinite(trace["l0"].sequence(0).update).all()


# -- errors, and how much there is ------------------------------------------------------------


def test_an_error_while_gates_are_made_loses_no_state_and_no_result(tmp_path, monkeypatch) -> None:
    layer, x = nn.GRU(4, 6), torch.randn(5, 2, 4)
    tracer = grutrace.Tracer(layer, tmp_path / "a.h5", gates="background")
    tracer.start()
    layer(x)
    tracer.flush()

    def fails(*_: object) -> None:
        raise MemoryError("on purpose")

    monkeypatch.setattr("grutrace.capture.recording.background.recompute", fails)
    expected = layer(x)
    assert torch.isfinite(expected[0]).all()
    with pytest.raises(grutrace.SinkError, match="on purpose"):
        tracer.flush()
    tracer.close()
    with grutrace.open(tmp_path / "a.h5") as trace:
        assert len(trace.calls) == 1
        assert all(result.holds for result in verify(trace))


def test_a_full_queue_slows_the_model_and_grows_no_memory(tmp_path, monkeypatch) -> None:
    """The writer is held back: the model stops, and goes on once it may write again."""
    free, written = threading.Event(), []
    plain = Writer.write

    def held(self, record):
        free.wait()
        written.append(record)
        plain(self, record)

    monkeypatch.setattr(Writer, "write", held)
    layer, x = nn.GRU(8, 32), torch.randn(64, 16, 8)
    limit = 6 * 1024 * 1024
    calls = 400
    done = []
    with grutrace.Tracer(layer, tmp_path / "a.h5", gates="background") as tracer:
        writer = tracer._guarded_sink.sink._thread
        writer._limit = limit

        def model() -> None:
            with torch.no_grad():
                for _ in range(calls):
                    layer(x)
                    done.append(writer._unwritten)

        thread = threading.Thread(target=model)
        thread.start()
        stopped = -1
        while thread.is_alive() and (not done or len(done) > stopped):
            stopped = len(done)
            thread.join(0.5)
        waits = thread.is_alive()
        # Before anything can fail: the tracer waits for the writer when it is closed.
        free.set()
        thread.join()
        assert waits
        assert stopped < calls
        assert max(done[:stopped]) <= limit
        tracer.flush()
        assert len(tracer.calls) == calls
    assert len(written) == calls + 1


PEAK = """
    import sys
    import torch
    from torch import nn
    import grutrace
    from grutrace.capture import selection

    selection.BACKGROUND_ON_CPU = True

    def peak():
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))

    torch.set_num_threads(1)
    layer, x = nn.GRU(32, 64), torch.randn(20, 8, 32)
    path = None if sys.argv[1] == "memory" else sys.argv[1]
    with torch.no_grad(), grutrace.trace(layer, path, gates=sys.argv[2]) as tracer:
        for call in range(int(sys.argv[3])):
            layer(x)
            # So that what waits for the disk is a few MiB, however slow the disk is.
            if call % 10 == 9 and path is not None:
                tracer.flush()
    print(peak())
"""


def peak_kilobytes(path: object, gates: str, calls: int) -> int:
    # In forks of one process, whose own memory is in both of two compared peaks.
    done = forks.run("-c", textwrap.dedent(PEAK), str(path), gates, str(calls), check=True)
    return int(done.stdout)


@pytest.mark.measures
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("gates", ["inline", "background", "deferred"])
def test_a_run_ten_times_longer_takes_no_more_memory(gates, tmp_path) -> None:
    # Calls are small and the short run is long enough for all buffers to have their full size.
    short = peak_kilobytes(tmp_path / "short.h5", gates, 300)
    long = peak_kilobytes(tmp_path / "long.h5", gates, 3000)
    assert long - short < 16 * 1024


@pytest.mark.measures
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_control_a_trace_in_memory_grows() -> None:
    short, long = (peak_kilobytes("memory", "background", calls) for calls in (300, 3000))
    assert long - short > 100 * 1024


def test_nothing_of_the_shadow_is_needed(monkeypatch) -> None:
    monkeypatch.setattr(GateReplay, "replay", None)
    layer = nn.GRU(2, 3, 2)
    with nullcontext(), grutrace.trace(layer, gates="background") as trace:
        layer(torch.randn(4, 2))
    assert trace["l1"].update.shape == (4, 3)


# -- beside the model's stream ----------------------------------------------------------------


class SlowDevice:
    """In the place of a side stream: copies are made when somebody waits for them, not before."""

    waits = 0

    def __init__(self) -> None:
        self.begun: list[tuple[torch.Tensor, np.ndarray]] = []

    def takes(self, _values: torch.Tensor) -> bool:
        return True

    def copy(self, own: torch.Tensor, dtype: np.dtype) -> np.ndarray:
        self.begun.append((own, np.full(own.shape, 7.0, dtype)))
        return self.begun[-1][1]

    def pop_sync(self):
        begun, self.begun = self.begun, []

        def ready() -> None:
            type(self).waits += 1
            for own, rows in begun:
                rows[:] = own.numpy()

        return ready


@pytest.fixture
def slow_device(monkeypatch) -> type[SlowDevice]:
    monkeypatch.setattr("grutrace.capture.recording.tensor_copy.SideStream", SlowDevice)
    # As on a device, where calls form no series.
    monkeypatch.setattr("grutrace.capture.recording.journal.can_join_series", lambda _: False)
    monkeypatch.setattr(SlowDevice, "waits", 0)
    return SlowDevice


def changing(model: nn.Module) -> list[torch.utils.hooks.RemovableHandle]:
    """Have a model change what a layer has read and made, right after it."""

    def change(module, args, output) -> None:
        for tensor in (*args, *(output if isinstance(output, tuple) else (output,))):
            getattr(tensor, "data", tensor).add_(1)

    return [module.register_forward_hook(change) for module in model.children()]


@pytest.mark.parametrize("packed", [False, True])
def test_what_is_copied_later_is_what_it_was_when_the_call_returned(
    slow_device, packed, tmp_path
) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"rnn": nn.GRU(4, 6, 2, bidirectional=True), "cell": nn.GRUCell(4, 6)})
    inputs, state = torch.randn(5, 3, 4), torch.randn(2, 6)
    if packed:
        inputs = nn.utils.rnn.pack_padded_sequence(inputs, [2, 5, 3], enforce_sorted=False)
    changing(model)
    with (
        torch.no_grad(),
        grutrace.trace(model, record=EVERYTHING, check="raise") as inline,
        grutrace.trace(model, tmp_path / "a.h5", **BACKGROUND) as background,
    ):
        for _ in range(3):
            model["rnn"](inputs)
            state = model["cell"](torch.randn(2, 4), state)
        background.flush()
        assert slow_device.waits == 6
    assert_same_as_inline(inline, background)
    assert all(result.holds for result in verify(background))


def test_control_unless_somebody_waits_nothing_is_there(slow_device, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(SlowDevice, "pop_sync", lambda _: None)
    layer = nn.GRU(4, 6)
    with (
        pytest.warns(grutrace.ResidualWarning),
        grutrace.trace(layer, tmp_path / "a.h5", gates="background"),
    ):
        layer(torch.randn(5, 3, 4))


def test_in_memory_nothing_is_copied_beside(slow_device) -> None:
    layer = nn.GRU(4, 6)
    with grutrace.trace(layer, gates="background") as trace:
        layer(torch.randn(5, 3, 4))
    assert trace["l0"].residual < 1e-6
    assert slow_device.waits == 0
