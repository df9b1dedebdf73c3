"""`every`, `max_calls` and `max_bytes`: calls that are left out cost nothing, and break nothing."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import grutrace
from grutrace.analysis.verification.verify import verify
from grutrace.capture.kernel_calls import observation, subscription
from grutrace.gru import kernel
from grutrace.records import GATES
from tests.capture.models import EncoderDecoder, StepwiseDecoder
from tests.checks import rounding, same_result
from tests.plain_reader import PlainTrace


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def assert_same_call(part: Any, whole: Any, call: int, of: int, gates: Any) -> None:
    """A sequence in one trace is a sequence in another; gates that are computed apart, nearly."""
    allowed = 0 if gates == "inline" else rounding(part)[0]
    for quantity in part.site.available_quantities:
        actual, expected = (
            site.sequence(n).rows(quantity) for site, n in ((part, call), (whole, of))
        )
        off = np.abs(actual - expected)
        assert (off <= (allowed if quantity in GATES else 0)).all(), (quantity, off.max())
    np.testing.assert_array_equal(part.sequence(call).initial, whole.sequence(of).initial)


LAYERS = {
    "one layer": lambda: nn.GRU(3, 4),
    "stack": lambda: nn.GRU(3, 4, 2, bidirectional=True),
    "cell": lambda: nn.GRUCell(3, 4),
}


@pytest.fixture(params=LAYERS)
def layer(request) -> nn.Module:
    torch.manual_seed(0)
    return LAYERS[request.param]()


@pytest.mark.parametrize("gates", ["inline", "background"])
@pytest.mark.parametrize("every", [1, 2, 3])
def test_each_nth_call_of_a_module(every, gates, layer) -> None:
    inputs = torch.randn(7, 5, 3)
    with (
        grutrace.trace(layer, gates=gates) as whole,
        grutrace.trace(layer, gates=gates, every=every) as part,
    ):
        for x in inputs:
            layer(x)
    recorded_calls = range(0, 7, every)
    assert len(part.calls) == len(recorded_calls)
    steps = len(whole[whole.sites[0]]) // 7
    for name in part.sites:
        for call, of in enumerate(recorded_calls):
            assert_same_call(part[name], whole[name], call * steps, of * steps, gates)
    assert all(result.holds for result in verify(part))


def test_modules_are_counted_each_on_its_own() -> None:
    model = EncoderDecoder()
    with grutrace.trace(model, every=2) as trace:
        for _ in range(4):
            model(torch.randn(2, 5, 5), steps=3)
    assert trace.calls["module"].tolist().count("encoder") == 2
    assert trace.calls["module"].tolist().count("decoder") == 6


def test_calls_while_not_recording_do_not_count(layer) -> None:
    with grutrace.trace(layer, every=2) as trace:
        layer(torch.randn(5, 3))
        trace.stop()
        layer(torch.randn(5, 3))
        trace.start()
        layer(torch.randn(5, 3))
        assert len(trace.calls) == 1
        layer(torch.randn(5, 3))
    assert len(trace.calls) == 2


def test_a_call_that_is_left_out_is_left_alone(layer, monkeypatch) -> None:
    """Nothing is looked at, split, run again or copied; the kernel gets what it was given."""
    x = torch.randn(5, 3)
    expected = layer(x)
    with grutrace.trace(layer, every=2) as trace:
        layer(x)
        with monkeypatch.context() as patch:
            for owner, name in [
                (observation, "run_kernel"),
                (kernel, "run_layerwise"),
                (kernel, "rerun_lower_layers"),
                (subscription, "unsupported_reason"),
                (observation, "isolated_context"),
            ]:
                patch.setattr(owner, name, None)
            assert same_result(expected, layer(x))
        # The control: the same patches are noticed by a call that is recorded.
        with monkeypatch.context() as patch:
            patch.setattr(subscription, "unsupported_reason", None)
            with pytest.raises(TypeError):
                layer(x)
    assert len(trace.calls) == 1


def test_a_call_left_out_goes_to_another_tracer_all_the_same(layer) -> None:
    with grutrace.trace(layer, every=3) as few, grutrace.trace(layer, every=2) as more:
        for x in torch.randn(6, 5, 3):
            layer(x)
    assert (len(few.calls), len(more.calls)) == (2, 3)


@pytest.mark.parametrize("make", [StepwiseDecoder, lambda: StepwiseDecoder(1)])
def test_what_a_decoder_goes_on_with_begins_a_sequence(make) -> None:
    decoder = make()
    layers = decoder.rnn.num_layers
    with (
        grutrace.trace(decoder, gates="inline") as whole,
        grutrace.trace(decoder, gates="inline", every=3) as part,
    ):
        decoder(torch.randn(1, 2, 4), torch.randn(layers, 2, 6), steps=7)
    assert whole["rnn.l0"].lengths.tolist() == [7, 7]
    assert part["rnn.l0"].lengths.tolist() == [1] * 6
    for name in part.sites:
        for call, step in enumerate(range(0, 7, 3)):
            sequence, of = part[name].sequence(2 * call), whole[name].sequence(0)
            np.testing.assert_array_equal(sequence.update[0], of.update[step])
            np.testing.assert_array_equal(sequence.initial, of.previous[step])


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("options", [{"every": 2}, {"max_calls": 1}])
def test_checkpointing(options, reentrant) -> None:
    """A recomputation is no call; a call that was left out is recomputed like any other."""
    torch.manual_seed(0)
    layer, x = nn.GRU(3, 4, 3, dropout=0.2), torch.randn(5, 2, 3, requires_grad=True)

    def gradients() -> list[torch.Tensor]:
        torch.manual_seed(1)
        layer.zero_grad()
        for _ in range(4):
            checkpoint(layer, x, use_reentrant=reentrant)[0].square().sum().backward()
        return [parameter.grad.clone() for parameter in layer.parameters()]

    expected = gradients()
    with grutrace.trace(layer, **options) as trace:
        assert all(map(torch.equal, expected, gradients()))
    assert len(trace.calls) == (2 if "every" in options else 1)


@pytest.mark.parametrize("path", [None, "run.h5"])
def test_max_calls_ends_recording_for_good(path, layer, tmp_path) -> None:
    x = torch.randn(5, 3)
    expected = layer(x)
    with grutrace.trace(layer, path and tmp_path / path, max_calls=2) as trace:
        for calls in (1, 2):
            assert trace.is_recording
            layer(x)
            assert len(trace.calls) == calls
        assert not trace.is_recording
        assert hooks(layer) == 0
        assert same_result(expected, layer(x))
        trace.start("more")
        assert not trace.is_recording
        with trace.recording("more", tokens=[["a"]]):
            assert same_result(expected, layer(x))
        assert hooks(layer) == 0
    assert len(trace.calls) == 2
    assert trace.header.options["max_calls"] == 2


def test_max_calls_within_a_forward_of_many_modules() -> None:
    model, x = EncoderDecoder(layers=2), torch.randn(2, 5, 5)
    model.eval()
    expected = model(x)
    with grutrace.trace(model, max_calls=1) as trace:
        assert torch.equal(model(x), expected)
        assert hooks(model) == 0
    # Of the decoder nothing was recorded, and no warning says so: warnings are errors here.
    assert trace.calls["module"].tolist() == ["encoder"]


def test_tokens_of_what_lies_beyond_the_limit() -> None:
    decoder = StepwiseDecoder(1)
    with grutrace.trace(decoder, max_calls=3) as trace:
        with trace.recording(tokens=[list("abcd")]):
            decoder(torch.randn(1, 1, 4), torch.randn(1, 1, 6), steps=4)
        assert len(trace.calls) == 3
    with (
        grutrace.trace(decoder) as trace,
        pytest.raises(grutrace.OptionError, match="rnn has 1 sequence of up to 3 steps"),
        trace.recording(tokens=[list("abcd")]),
    ):
        decoder(torch.randn(1, 1, 4), torch.randn(1, 1, 6), steps=3)


@pytest.mark.parametrize("gates", ["inline", "deferred"])
def test_max_bytes_counts_rows_states_and_weights(gates, layer, tmp_path) -> None:
    x = torch.randn(5, 3)

    def taken(trace: Any) -> int:
        sites = [trace[name] for name in trace.sites]
        rows = {
            np.asarray(site.rows(name)).ctypes.data: np.asarray(site.rows(name)).nbytes
            for site in sites
            for name in site.site.quantities
        }
        weights = [w for site in sites for w in site.weights().values()]
        initial = [np.asarray(site.initial) for site in sites]
        return sum(rows.values()) + sum(array.nbytes for array in (*weights, *initial))

    with grutrace.trace(layer, gates=gates) as two:
        layer(x)
        layer(x)
    bytes_of_two = taken(two)
    for allowed, calls in [(bytes_of_two, 2), (bytes_of_two - 1, 1), (1, 0)]:
        path = tmp_path / f"{allowed}.h5"
        with grutrace.trace(layer, path, gates=gates, max_bytes=allowed) as trace:
            for _ in range(3):
                layer(x)
            assert not trace.is_recording
            assert hooks(layer) == 0
        plain = PlainTrace(path)
        assert len(plain.calls) == calls
        assert plain.options["max_bytes"] == allowed
        for suffix, site in plain.modules[0].sites.items():
            assert len(site.initial) == len(two[suffix]) * calls // 2


def test_threads_share_the_limit() -> None:
    layer = nn.GRU(3, 4)
    with grutrace.trace(layer, max_calls=10) as trace:
        threads = [
            threading.Thread(target=lambda: [layer(torch.randn(5, 3)) for _ in range(20)])
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert hooks(layer) == 0
    assert len(trace.calls) == 10


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "every: expected a whole number from 1, found 0"),
        ({"every": 1.5}, r"every: expected a whole number from 1, found 1\.5"),
        ({"every": True}, "every: expected a whole number from 1, found True"),
        ({"max_calls": -1}, "max_calls: expected a whole number from 1, found -1"),
        ({"max_bytes": "10GB"}, "max_bytes: expected a whole number from 1, found '10GB'"),
    ],
)
def test_a_wrong_number_is_one_clear_error(options, message) -> None:
    with pytest.raises(grutrace.OptionError, match=message):
        grutrace.Tracer(nn.GRU(2, 3), **options)


def test_numbers_of_numpy_will_do() -> None:
    trace = grutrace.Tracer(nn.GRU(2, 3), every=np.int64(2), max_calls=np.uint8(3))
    assert (trace.header.options["every"], trace.header.options["max_calls"]) == (2, 3)
