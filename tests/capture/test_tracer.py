"""Tests of the tracer's interface: attach, record on demand, detach, read."""

from __future__ import annotations

import threading
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence

import grutrace
from tests.capture.changes import while_the_kernel_runs
from tests.capture.models import StepwiseDecoder, hooks
from tests.checks import EVERYTHING, tensors


def test_every_site_of_every_gru(model, batch) -> None:
    with grutrace.trace(model) as trace:
        model(batch)
    assert trace.sites == ("encoder.l0", "encoder.l1", "decoder.cell")
    assert [len(trace[site]) for site in trace.sites] == [3, 3, 3]
    assert trace["encoder.l1"].update.shape == (21, 6)
    assert trace["decoder.cell"].sequence(2).candidate.shape == (3, 6)
    assert hooks(model) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"sites": "encodr.*"},
            r"matches no site of the model .*: encoder.l0, encoder.l1, dec",
        ),
        ({"sites": []}, r"sites: expected a glob .*; found \[\]"),
        (
            {"record": ("update", "forget")},
            "reset, update, candidate, hidden, input, gradient; found 'forg",
        ),
        ({"record": ()}, r"record: expected names .*; found \(\)"),
        ({"stacks": "loop"}, "stacks: expected one of rerun, auto, split; found 'loop'"),
        ({"check": True}, "check: expected one of warn, raise, off; found True"),
        ({"mode": "x"}, "mode"),
    ],
)
def test_a_wrong_option_is_one_clear_error(model, tmp_path, options, message) -> None:
    with pytest.raises(grutrace.OptionError, match=message):
        grutrace.trace(model, tmp_path / "run.h5", **options)
    assert hooks(model) == 0
    assert list(tmp_path.iterdir()) == []


def test_recording_blocks_and_tags(model, batch) -> None:
    tracer = grutrace.Tracer(model, recording=False)
    with tracer.recording(tag="valid"):
        model(batch)
    model(batch)
    with tracer.recording():
        model(batch)
    tracer.close()
    assert list(tracer.calls["tag"]) == ["valid"] * 4 + [None] * 4


@pytest.mark.parametrize("path", [None, "run.h5"])
def test_a_tag_that_is_no_text_is_an_error_and_loses_no_rows(path, model, batch, tmp_path) -> None:
    with grutrace.trace(model, path and tmp_path / path) as tracer:
        model(batch)
        with pytest.raises(grutrace.OptionError, match="tag: expected a str or None, found 5"):
            tracer.recording(tag=5).__enter__()
        with (
            pytest.raises(grutrace.OptionError, match="expected a text as a name, found 5"),
            tracer.recording(labels={5: [1, 2, 3]}),
        ):
            model(batch)
        model(batch)
    assert len(tracer.calls) == 3 * 4
    assert set(tracer.calls["tag"]) == {None}


def test_a_nested_recording_restores_the_tag(model, batch) -> None:
    with grutrace.trace(model, sites="encoder.*") as tracer:
        model(batch)
        with tracer.recording(tag="inner"):
            model(batch)
        assert tracer.is_recording
        model(batch)
    assert list(tracer.calls["tag"]) == [None, "inner", None]


def test_a_closed_tracer_can_be_read_but_not_started(model, batch, tmp_path) -> None:
    for path in (None, tmp_path / "run.h5"):
        with grutrace.trace(model, path) as tracer:
            model(batch)
        assert tracer["encoder.l0"].hidden.shape == (21, 6)
        tracer.close()
        with pytest.raises(grutrace.StateError, match="closed"):
            tracer.start()
        with pytest.raises(grutrace.StateError, match="closed"), tracer:
            pass
        assert hooks(model) == 0


@pytest.mark.parametrize("path", [None, "run.h5"])
def test_a_live_tracer_reads_like_a_trace(path, model, batch, tmp_path) -> None:
    with grutrace.trace(model, path and tmp_path / path) as tracer:
        site = tracer["encoder.l0"]
        assert len(site) == 0
        for calls in (1, 2, 3):
            model(batch)
            assert len(site) == 3 * calls
            assert len(tracer.calls) == 4 * calls
            assert len(tracer.sequences) == 2 * 3 * calls
            model.eval()
    assert tracer.calls["training"].tolist() == [True] * 4 + [False] * 8


def test_decoder_cells_give_one_sequence_per_row(model, batch) -> None:
    with grutrace.trace(model) as trace:
        model(batch, steps=5)
        model(batch, steps=2)
    site = trace["decoder.cell"]
    assert site.lengths.tolist() == [5, 5, 5, 2, 2, 2]
    first = site.sequence(0)
    np.testing.assert_array_equal(first.previous[1:], first.hidden[:-1])
    np.testing.assert_array_equal(first.initial, trace["encoder.l1"].sequence(0).hidden[-1])
    assert len(first.calls) == 5


@pytest.mark.parametrize("layers", [1, 2])
def test_a_gru_called_per_token_gives_one_sequence_per_row(layers) -> None:
    decoder = StepwiseDecoder(layers)
    state = torch.randn(layers, 4, 6)
    with grutrace.trace(decoder, record=("update", "hidden", "input")) as trace:
        output = decoder(torch.randn(1, 4, 4), state, steps=6)
    top = trace[f"rnn.l{layers - 1}"]
    assert top.lengths.tolist() == [6] * 4
    padded, lengths = top.padded("hidden")
    np.testing.assert_array_equal(padded, output.detach().transpose(0, 1).numpy())
    assert lengths.tolist() == [6] * 4
    np.testing.assert_array_equal(trace["rnn.l0"].initial, state[0].numpy())


def test_a_batch_that_shrinks_during_decoding() -> None:
    cell = nn.GRUCell(2, 3)
    state = torch.randn(4, 3)
    with grutrace.trace(cell) as trace:
        state = cell(torch.randn(4, 2), state)
        state = cell(torch.randn(3, 2), state[[0, 2, 3]])
        state = cell(torch.randn(2, 2), state[[2, 0]])
    site = trace["cell"]
    assert site.lengths.tolist() == [3, 1, 2, 3]
    np.testing.assert_array_equal(site.sequence(3).hidden[-1], state[0].detach().numpy())


def test_beams_keep_their_parents() -> None:
    cell = nn.GRUCell(2, 3)
    with grutrace.trace(cell) as trace:
        state = cell(torch.randn(2, 2), torch.randn(2, 3))
        cell(torch.randn(3, 2), state[[1, 1, 0]])
    assert trace["cell"].lengths.tolist() == [2, 2, 1]
    assert trace["cell"].sequence(2).parent == 1
    assert trace["cell"].sequence(2).parent_steps == 1
    np.testing.assert_array_equal(trace["cell"].sequence(2).initial, state[1].detach().numpy())


def test_a_changed_state_begins_a_new_sequence() -> None:
    cell = nn.GRUCell(2, 3)
    with grutrace.trace(cell) as trace:
        state = cell(torch.randn(2, 2))
        cell(torch.randn(2, 2), 2 * state)
    assert trace["cell"].lengths.tolist() == [1, 1, 1, 1]
    np.testing.assert_array_equal(trace["cell"].sequence(2).initial, 2 * state[0].detach().numpy())


def test_chunks_of_a_long_sequence_are_one_sequence() -> None:
    torch.manual_seed(3)
    layer, x = nn.GRU(2, 3, 2), torch.randn(12, 2, 2)
    state = None
    with grutrace.trace(layer) as trace:
        for chunk in x.split(5):
            _, state = layer(chunk, state)
    assert trace["l1"].lengths.tolist() == [12, 12]
    hidden, _ = trace["l1"].padded("hidden")
    np.testing.assert_allclose(
        hidden, layer(x)[0].detach().transpose(0, 1).numpy(), atol=1e-6, rtol=0
    )


def test_bidirectional_calls_never_continue() -> None:
    layer = nn.GRU(2, 3, bidirectional=True)
    with grutrace.trace(layer) as trace:
        _, state = layer(torch.randn(4, 2, 2))
        layer(torch.randn(4, 2, 2), state)
    assert trace["l0"].lengths.tolist() == trace["l0_reverse"].lengths.tolist() == [4] * 4


@pytest.mark.parametrize("gates", ["inline", "deferred"])
@pytest.mark.parametrize(("steps", "batch"), [(4, 2), (1, 2), (4, 1), (1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["gru", "packed", "reverse", "cell"])
def test_values_changed_in_place_right_after_the_call(kind, dtype, steps, batch, gates) -> None:
    """The model may overwrite its input, output and states as soon as it has them."""
    layer = nn.GRUCell(2, 3) if kind == "cell" else nn.GRU(2, 3, bidirectional=kind == "reverse")
    layer.to(dtype)
    x = torch.randn((batch, 2) if kind == "cell" else (steps, batch, 2)).to(dtype)
    initial = torch.randn(*layer(x)[1].shape).to(dtype) if kind != "cell" else torch.randn(batch, 3)
    initial = initial.to(dtype)
    options: Any = {"record": EVERYTHING, "check": "raise", "gates": gates}
    with torch.no_grad(), grutrace.trace(layer, **options) as trace:
        input = pack_sequence(list(x.unbind(1))) if kind == "packed" else x
        result = layer(input, initial)
        expected = [tensor.clone() for tensor in (x, initial, *tensors(result))]
        for tensor in (x, initial, *tensors(input), *tensors(result)):
            if tensor.is_floating_point():
                tensor.fill_(7)
    with grutrace.trace(layer, **options) as again:
        layer(
            pack_sequence(list(expected[0].unbind(1))) if kind == "packed" else expected[0],
            expected[1],
        )
    for site in trace.sites:
        for quantity in EVERYTHING:
            np.testing.assert_array_equal(trace[site].rows(quantity), again[site].rows(quantity))
        np.testing.assert_array_equal(trace[site].initial, again[site].initial)


def test_other_hooks_on_the_module_are_unaffected() -> None:
    """The trace has the kernel's input and output, not those that the hooks return."""
    layer = nn.GRU(2, 3)
    layer.register_forward_pre_hook(lambda _, args: (args[0] * 2,))
    layer.register_forward_hook(lambda *arguments: (arguments[-1][0] * 0, arguments[-1][1]))
    x = torch.randn(4, 2, 2)
    with grutrace.trace(layer, record=("hidden", "input"), check="raise") as trace:
        output, _ = layer(x)
    assert not output.any()
    assert trace["l0"].hidden.any()
    np.testing.assert_array_equal(trace["l0"].sequence(0).input, 2 * x[:, 0].numpy())


def test_weight_versions(tmp_path) -> None:
    layer, x = nn.GRU(2, 3, 2, bidirectional=True), torch.randn(4, 2, 2)
    optimizer = torch.optim.Adam(layer.parameters(), 0.1)
    with grutrace.trace(layer, tmp_path / "run.h5") as trace:
        for _ in range(3):
            weights = {k: v.clone() for k, v in layer.state_dict().items()}
            layer(x)[0].sum().backward()
            layer(x)
            optimizer.step()
    assert trace.calls["weights"].tolist() == [0, 0, 1, 1, 2, 2]
    last = trace["l1_reverse"].weights(2)
    np.testing.assert_array_equal(last["weight_hh"], weights["weight_hh_l1_reverse"].numpy())
    np.testing.assert_array_equal(last["bias_ih"], weights["bias_ih_l1_reverse"].numpy())


def test_gradients_are_untouched(model, batch) -> None:
    def gradients(seed: int) -> list[torch.Tensor]:
        torch.manual_seed(seed)
        model.zero_grad()
        model(batch).square().sum().backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    expected = gradients(seed=5)
    with grutrace.trace(model):
        assert all(map(torch.equal, expected, gradients(seed=5)))
        # The control: another dropout mask gives other gradients.
        assert not all(map(torch.equal, expected, gradients(seed=6)))


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_rerun_layers_equal_the_kernel_bit_for_bit(bias, batch_first, grad) -> None:
    """The lowest layer alone is the reference. With autograd, products may round differently."""
    torch.manual_seed(1)
    options = {"bias": bias, "batch_first": batch_first}
    stack, alone = nn.GRU(5, 5, num_layers=2, **options), nn.GRU(5, 5, **options)
    alone.load_state_dict({name: stack.state_dict()[name] for name in alone.state_dict()})
    x = torch.randn(3, 2, 5)
    with torch.set_grad_enabled(grad), grutrace.trace(stack, stacks="rerun") as trace:
        stack(x)
        expected = alone(x)[0].detach()
    rows = expected if batch_first else expected.transpose(0, 1)
    np.testing.assert_array_equal(trace["l0"].hidden, rows.reshape(-1, 5).numpy())


def test_threads_that_run_the_model_concurrently() -> None:
    torch.manual_seed(0)
    layer = StepwiseDecoder(2)
    inputs = [(torch.randn(1, 2, 4), torch.randn(2, 2, 6)) for _ in range(4)]
    with grutrace.trace(layer, check="raise") as trace:
        threads = [threading.Thread(target=layer, args=(*arguments, 8)) for arguments in inputs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert trace["rnn.l1"].lengths.tolist() == [8] * 8
    results = {states.tobytes() for states in trace["rnn.l1"].padded("hidden")[0]}
    with torch.no_grad():
        expected = [layer(*arguments, 8).transpose(0, 1).numpy() for arguments in inputs]
    assert results == {row.tobytes() for rows in expected for row in rows}


@pytest.mark.parametrize("path", [None, "run.h5"])
def test_empty_batch_and_inference_mode(path, tmp_path) -> None:
    layer = nn.GRU(2, 3, 2)
    with (
        torch.inference_mode(),
        grutrace.trace(layer, path and tmp_path / path, check="raise") as trace,
    ):
        layer(torch.randn(4, 0, 2))
        layer(torch.randn(4, 2, 2))
    assert len(trace["l1"]) == 2


def test_weights_changed_during_the_kernel_are_detected() -> None:
    """Control of the residual: the kernel and the replay had different weights."""
    layer, x = nn.GRU(3, 4), torch.randn(4, 2, 3)

    def disturb() -> None:
        layer.weight_hh_l0[0, 0] += 0.1

    with grutrace.trace(layer, gates="inline") as trace:
        layer(x)
        with while_the_kernel_runs(disturb):
            layer(x)
        with pytest.warns(grutrace.ResidualWarning, match=r"l0: the gates of call 1 are unproven"):
            trace.flush()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            layer(x)
            trace.flush()
    assert trace["l0"].residual > 1e-4
    assert trace.calls["proof"].tolist() == ["proven", "unproven", "proven"]
    with (
        grutrace.trace(layer, check="raise"),
        while_the_kernel_runs(disturb),
        pytest.raises(grutrace.ResidualError, match="l0"),
    ):
        layer(x)
