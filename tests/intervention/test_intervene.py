"""Interventions compute what the equations say, and change nothing else."""

from __future__ import annotations

import copy
import importlib
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import grutrace
from grutrace.intervention.settings import SETTABLE
from tests import oracles
from tests.checks import same_result, tensors
from tests.intervention.loops import Edit, initial_states, run_loop, suffixes
from tests.leaks import kernels_are_overridden
from tests.strategies import Case, cases


@pytest.fixture(autouse=True)
def no_kernels_left() -> Any:
    yield
    assert not kernels_are_overridden()


def unchanged(_: str, __: str, ___: int, ____: int, values: np.ndarray) -> np.ndarray:
    return values


def gru(*args: Any, **options: Any) -> nn.GRU:
    torch.manual_seed(0)
    return nn.GRU(*args, dtype=torch.float64, **options)


def held(quantity: str, number: float, units: list[int], steps: range, site: str = "l0") -> Edit:
    def edit(at: str, name: str, step: int, sequence: int, values: np.ndarray) -> np.ndarray:
        if at == site and name == quantity and step in steps:
            values = values.copy()
            values[units] = number
        return values

    return edit


def outputs_of(layer: nn.GRU | nn.GRUCell, result: Any) -> list[np.ndarray]:
    output = result if isinstance(layer, nn.GRUCell) else result[0]
    directions = 2 if getattr(layer, "bidirectional", False) else 1
    return oracles.as_sequences(layer, output, directions * layer.hidden_size)


# What is set


@pytest.mark.parametrize("quantity", SETTABLE)
def test_each_quantity_of_some_units_and_steps(quantity: str) -> None:
    layer, x = gru(3, 5), torch.randn(7, 4, 3, dtype=torch.float64)
    with grutrace.intervene(layer, "l0", units=[1, -1], steps=slice(2, 6, 2), **{quantity: 0.3}):
        output, final = layer(x)
    edit = held(quantity, 0.3, [1, 4], range(2, 6, 2))
    expected, last = run_loop(layer, list(x.transpose(0, 1).numpy()), None, edit)
    assert np.allclose(output.detach().numpy(), np.stack(expected, 1), rtol=0, atol=1e-12)
    assert np.allclose(final.detach().numpy(), last, rtol=0, atol=1e-12)
    # A control: another step would be seen.
    other, _ = run_loop(
        layer, list(x.transpose(0, 1).numpy()), None, held(quantity, 0.3, [1, 4], range(3, 6, 2))
    )
    assert not np.allclose(output.detach().numpy(), np.stack(other, 1), rtol=0, atol=1e-6)


_names = st.sampled_from(SETTABLE)


@settings(deadline=None)
@given(cases(dtypes=(torch.float64,)), st.data())
def test_the_lattice_against_a_loop(case: Case, data: st.DataObject) -> None:
    layer = case.layer
    assume(not getattr(layer, "dropout", 0.0))
    for parameter in layer.parameters():
        # Weights of moderate size: a chaotic layer would amplify rounding.
        parameter.data.clamp_(-0.5, 0.5)
    input = case.args[0] if case.args else case.kwargs["input"]
    inputs = oracles.as_sequences(layer, input, layer.input_size)
    batch = len(inputs)
    assume(batch)
    sites = [name for name, _, _ in suffixes(layer)]
    site, quantity = data.draw(st.sampled_from(sites)), data.draw(_names)
    units = data.draw(st.sets(st.integers(0, layer.hidden_size - 1), min_size=1))
    longest = max(map(len, inputs))
    steps = data.draw(st.sets(st.integers(0, longest - 1), min_size=1))
    sequences = data.draw(st.sets(st.integers(0, batch - 1), min_size=1))
    kind = data.draw(st.sampled_from(("number", "function", "array")))
    generator = np.random.default_rng(0)
    array = generator.uniform(-0.9, 0.9, (len(steps), len(sequences), len(units)))
    value: Any = {"number": 0.4, "function": lambda g, at: g * 0.5 - at.step / 10, "array": array}
    chosen_steps, chosen = sorted(steps), sorted(sequences)

    def edit(at: str, name: str, step: int, sequence: int, values: np.ndarray) -> np.ndarray:
        if at != site or name != quantity or step not in steps or sequence not in sequences:
            return values
        values, columns = values.copy(), sorted(units)
        if kind == "number":
            values[columns] = 0.4
        elif kind == "function":
            values[columns] = values[columns] * 0.5 - step / 10
        else:
            values[columns] = array[chosen_steps.index(step), chosen.index(sequence)]
        return values

    with warnings.catch_warnings():
        # The chosen sequences may be shorter than the chosen steps.
        warnings.simplefilter("ignore", grutrace.GrutraceWarning)
        with grutrace.intervene(
            layer,
            {site: {quantity: value[kind]}},
            units=sorted(units),
            steps=chosen_steps,
            sequences=chosen,
        ):
            result = case.run()
    initial = initial_states(layer, case.initial)
    expected, last = run_loop(layer, inputs, initial, edit)
    for found, wanted in zip(outputs_of(layer, result), expected, strict=True):
        assert np.allclose(found, wanted, rtol=0, atol=1e-9)
    if not isinstance(layer, nn.GRUCell):
        states = result[1].detach().numpy().reshape(last.shape)
        assert np.allclose(states, last, rtol=0, atol=1e-9)


@pytest.mark.parametrize("form", ["padded", "packed", "cell"])
def test_an_update_gate_of_one_keeps_the_initial_state(form: str) -> None:
    torch.manual_seed(0)
    initial = torch.randn(1, 3, 6)
    if form == "cell":
        cell = nn.GRUCell(4, 6)
        with grutrace.intervene(cell, "cell", update=1.0):
            states = cell(100 * torch.randn(3, 4), initial[0])[None]
    else:
        layer = nn.GRU(4, 6)
        x: Any = 100 * torch.randn(8, 3, 4)
        if form == "packed":
            x = pack_padded_sequence(x, torch.tensor([2, 8, 5]), enforce_sorted=False)
        with grutrace.intervene(layer, "l0", update=1.0):
            _, states = layer(x, initial)
    assert torch.allclose(states, initial, atol=1e-6)


def test_control_an_update_gate_of_one_keeps_only_the_units_that_it_holds() -> None:
    torch.manual_seed(0)
    layer, x, initial = nn.GRU(4, 6), torch.randn(8, 3, 4), torch.randn(1, 3, 6)
    with grutrace.intervene(layer, "l0", update=1.0, units=[1, 4]):
        _, states = layer(x, initial)
    is_kept = torch.isclose(states, initial, atol=1e-6).all(1)[0]
    assert is_kept.tolist() == [False, True, False, False, True, False]
    assert not torch.isclose(layer(x, initial)[1], initial, atol=1e-6).all(1).any()


@pytest.mark.parametrize("gate", ["reset", "update", "candidate"])
def test_a_moved_preactivation_is_a_moved_bias(gate: str) -> None:
    layer, x = gru(3, 5, 2, bidirectional=True), torch.randn(7, 4, 3, dtype=torch.float64)
    moved = copy.deepcopy(layer)
    index = ("reset", "update", "candidate").index(gate)
    with torch.no_grad():
        moved.bias_ih_l0_reverse[index * 5 + 2] += 0.7
    move = {f"{gate}_preactivation": lambda values, _: values + 0.7}
    with grutrace.intervene(layer, {"l0_reverse": move}, units=2):
        output, _ = layer(x)
    assert torch.allclose(output, moved(x)[0], rtol=0, atol=1e-12)
    assert not torch.allclose(output, layer(x)[0], rtol=0, atol=1e-4)


# Nothing changed


def results_and_gradients(case: Case, layer: nn.Module, run: Callable[[], Any]) -> list[Tensor]:
    layer.zero_grad()
    result = run()
    values = tensors(result)
    if any(value.requires_grad for value in values):
        sum((value.sin() * value).sum() for value in values).backward()
    return [*(v.detach() for v in values), *(p.grad for p in layer.parameters())]


@settings(deadline=None)
@given(cases(), st.data())
def test_functions_that_change_nothing(case: Case, data: st.DataObject) -> None:
    layer = case.layer
    expected = results_and_gradients(case, layer, case.run)
    expected = [value.clone() for value in expected]
    copies = data.draw(st.booleans())
    quantities = data.draw(st.sets(_names, min_size=1))
    function = (lambda gate, _: gate.clone()) if copies else (lambda gate, _: gate)
    first = 0 if copies else data.draw(st.integers(0, 3))
    settings = {name: dict.fromkeys(quantities, function) for name, _, _ in suffixes(layer)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", grutrace.GrutraceWarning)
        with grutrace.intervene(layer, settings, steps=slice(first, None)):
            found = results_and_gradients(case, layer, case.run)
    for a, b in zip(expected, found, strict=True):
        assert torch.equal(a, b), (a - b).abs().max()


@pytest.mark.parametrize("quantity", SETTABLE)
def test_control_a_function_that_changes_one_value_changes_bits(quantity: str) -> None:
    torch.manual_seed(0)
    layer, x = nn.GRU(3, 5), torch.randn(6, 2, 3)

    def run() -> list[Tensor]:
        layer.zero_grad()
        output, _ = layer(x)
        output.sin().sum().backward()
        return [
            output.detach(),
            *(p.grad.clone() for p in layer.parameters() if p.grad is not None),
        ]

    expected = run()
    with grutrace.intervene(layer, {"l0": {quantity: lambda gate, _: gate * 1.001}}, units=2):
        found = run()
    assert len(found) == len(expected) == 5
    assert not any(map(torch.equal, found, expected))


@settings(deadline=None)
@given(cases())
def test_a_setting_of_no_step_leaves_the_layout(case: Case) -> None:
    expected = case.run()
    intervention = grutrace.intervene(case.layer, "*", update=0.0, steps=slice(50, None))
    with pytest.warns(grutrace.GrutraceWarning, match="was not set"), intervention:
        result = case.run()
    assert same_result(expected, result)


def test_sequences_and_steps_that_are_not_set_have_the_kernel_s_bits() -> None:
    torch.manual_seed(0)
    layer, x = nn.GRU(3, 37), torch.randn(9, 5, 3)
    expected, last = layer(x)
    with grutrace.intervene(layer, "l0", update=0.0, sequences=[1, 3], steps=slice(4, None)):
        output, final = layer(x)
    assert torch.equal(output[:, [0, 2, 4]], expected[:, [0, 2, 4]])
    assert torch.equal(output[:4], expected[:4])
    assert torch.equal(final[:, [0, 2, 4]], last[:, [0, 2, 4]])
    assert not torch.isclose(output[4:, [1, 3]], expected[4:, [1, 3]]).all()


def test_a_layer_that_is_not_set_runs_as_usual() -> None:
    torch.manual_seed(0)
    layer, x = nn.GRU(3, 37, 2, bidirectional=True), torch.randn(9, 5, 3)
    expected = layer(x)[0]
    with grutrace.intervene(layer, "l1_reverse", update=0.0):
        output = layer(x)[0]
    assert torch.equal(output[..., :37], expected[..., :37])
    assert not torch.isclose(output[..., 37:], expected[..., 37:]).all()


def test_layers_below_have_the_kernel_s_bits() -> None:
    torch.manual_seed(0)
    layer, x = nn.GRU(3, 37, 3), torch.randn(9, 5, 3)
    with grutrace.trace(layer) as before:
        layer(x)
    with grutrace.intervene(layer, "l1", update=0.0), grutrace.trace(layer) as after:
        layer(x)
    assert np.array_equal(before["l0"].hidden, after["l0"].hidden)
    assert not np.array_equal(before["l1"].hidden, after["l1"].hidden)


# Several settings


def test_settings_apply_in_order_and_blocks_nest() -> None:
    layer, x = gru(3, 5), torch.randn(7, 2, 3, dtype=torch.float64)
    seen = []

    def double(gate: Tensor, at: Any) -> Tensor:
        seen.append(gate.clone())
        return gate * 2

    with grutrace.intervene(layer, "l0", update=0.25):
        with grutrace.intervene(layer, "l0", update=double):
            inner, _ = layer(x)
        outer, _ = layer(x)
    assert all((gate == 0.25).all() for gate in seen)
    assert len(seen) == 7
    with grutrace.intervene(layer, "l0", update=0.5):
        expected, _ = layer(x)
    assert torch.equal(inner, expected)
    with grutrace.intervene(layer, "l0", update=0.25):
        assert torch.equal(outer, layer(x)[0])


def test_several_sites_and_quantities_at_once() -> None:
    layer, x = gru(3, 4, 2), torch.randn(6, 3, 3, dtype=torch.float64)
    settings = {"l0": {"update": 1.0, "reset": 0.5}, "l1": {"candidate": lambda n, _: -n}}

    def edit(at: str, name: str, step: int, sequence: int, values: np.ndarray) -> np.ndarray:
        changed = {
            ("l0", "update"): np.ones(4),
            ("l0", "reset"): np.full(4, 0.5),
            ("l1", "candidate"): -values,
        }
        return changed.get((at, name), values)

    with grutrace.intervene(layer, settings):
        output, _ = layer(x)
    expected, _ = run_loop(layer, list(x.transpose(0, 1).numpy()), None, edit)
    assert np.allclose(output.detach().numpy(), np.stack(expected, 1), rtol=0, atol=1e-12)


def test_the_context_of_a_function() -> None:
    layer = gru(2, 3, batch_first=True)
    x = torch.randn(3, 4, 2, dtype=torch.float64)
    packed = pack_padded_sequence(
        x, torch.tensor([2, 4, 1]), batch_first=True, enforce_sorted=False
    )
    tokens = [["a", "b"], ["c", "d", "e", "f"], ["g"]]
    contexts = []

    def note(gate: Tensor, at: Any) -> Tensor:
        contexts.append((at.site, at.step, at.sequences, at.tokens, tuple(at.units), gate.shape))
        return gate

    with grutrace.intervene(layer, "l0", update=note, units=[2, 0], tokens=tokens):
        layer(packed)
    assert contexts == [
        ("l0", 0, (0, 1, 2), ("a", "c", "g"), (2, 0), (3, 2)),
        ("l0", 1, (0, 1), ("b", "d"), (2, 0), (2, 2)),
        ("l0", 2, (1,), ("e",), (2, 0), (1, 2)),
        ("l0", 3, (1,), ("f",), (2, 0), (1, 2)),
    ]


def test_the_rows_of_a_packed_batch_are_in_the_user_s_order() -> None:
    layer = gru(2, 3)
    x = torch.randn(4, 3, 2, dtype=torch.float64)
    lengths = torch.tensor([2, 4, 3])
    packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
    values = torch.rand(4, 3, 3, dtype=torch.float64)
    with grutrace.intervene(layer, "l0", hidden=values):
        output, final = layer(packed)
    padded, _ = pad_packed_sequence(output)
    for b, length in enumerate(lengths.tolist()):
        assert torch.equal(padded[:length, b], values[:length, b])
        assert torch.equal(final[0, b], values[length - 1, b])


# Decoders


class Decoder(nn.Module):
    """Calls its layer once per step."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.kind = kind
        self.rnn: nn.GRU | nn.GRUCell = nn.GRU(3, 5, 2) if kind == "gru" else nn.GRUCell(3, 5)
        self.double()

    def forward(self, x: Tensor, detach: bool = False) -> Tensor:
        state, outputs = None, []
        for step in x:
            if self.kind == "gru":
                output, state = self.rnn(step.unsqueeze(0), state)
                outputs.append(output[0])
                state = state.detach() if detach else state
            else:
                state = self.rnn(step, state)
                outputs.append(state)
                state = state.detach() if detach else state
        return torch.stack(outputs)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize("kind", ["gru", "cell"])
def test_a_decoder_counts_steps_through_the_sequence(kind: str, detach: bool, grad: bool) -> None:
    model, x = Decoder(kind), torch.randn(8, 3, 3, dtype=torch.float64)
    suffix = "l0" if kind == "gru" else "cell"
    edit = held("update", 0.0, [1], range(3, 6), suffix)
    for _ in range(2):
        # A second sequence starts from zeros, at step 0.
        intervention = grutrace.intervene(
            model, f"rnn.{suffix}", update=0.0, units=1, steps=slice(3, 6)
        )
        with torch.set_grad_enabled(grad), intervention:
            output = model(x, detach)
            again = model(x, detach)
        assert torch.equal(output, again)
    whole = nn.GRU(3, 5, dtype=torch.float64)
    layer: Any = model.rnn if kind == "gru" else whole
    if kind == "cell":
        for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
            getattr(whole, f"{name}_l0").data.copy_(getattr(model.rnn, name))
        edit = held("update", 0.0, [1], range(3, 6), "l0")
    expected, _ = run_loop(layer, list(x.transpose(0, 1).numpy()), None, edit)
    assert np.allclose(output.detach().numpy(), np.stack(expected, 1), rtol=0, atol=1e-12)


def test_a_state_of_zeros_goes_on_if_it_is_the_very_tensor() -> None:
    cell, steps = nn.GRUCell(2, 3), []

    def note(gate: Tensor, at: Any) -> Tensor:
        steps.append(at.step)
        return gate

    with grutrace.intervene(cell, {"cell": {"hidden": 0.0, "update": note}}):
        state = None
        for _ in range(3):
            state = cell(torch.randn(2, 2), state)
    assert steps == [0, 1, 2]


def test_a_batch_that_shrinks_and_is_reordered_keeps_its_positions() -> None:
    cell, seen = nn.GRUCell(2, 3), []

    def note(gate: Tensor, at: Any) -> Tensor:
        seen.append((at.step, at.sequences))
        return gate

    with grutrace.intervene(cell, "cell", update=note, sequences=[0, 2]):
        state = cell(torch.randn(4, 2))
        state = cell(torch.randn(4, 2), state)
        state = cell(torch.randn(3, 2), state[[3, 2, 0]])
        cell(torch.randn(2, 2), state[[0, 1]].relu() * 0 + state[[0, 1]])
    assert seen == [(0, (0, 2)), (1, (0, 2)), (2, (0, 2)), (3, (2,))]


# Values of other runs


def trace_of(model: nn.Module, *args: Any, **options: Any) -> Any:
    quantities = ("reset", "update", "candidate", "hidden", "input")
    with grutrace.trace(model, record=quantities, **options) as trace:
        model(*args)
    return trace


@pytest.mark.parametrize("quantity", SETTABLE)
def test_a_run_s_own_values_change_nothing(quantity: str) -> None:
    layer, x = gru(3, 5, bidirectional=True), torch.randn(7, 4, 3, dtype=torch.float64)
    trace, expected = trace_of(layer, x), layer(x)[0]
    values = {site: {quantity: trace[site]} for site in trace.sites}
    with grutrace.intervene(layer, values):
        output, _ = layer(x)
    assert torch.allclose(output, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("quantity", ["reset", "update", "candidate", "hidden"])
def test_gates_copied_from_the_kernel_change_no_bit(quantity: str) -> None:
    torch.manual_seed(0)
    layer, x = nn.GRU(64, 128), torch.randn(20, 16, 64)
    with grutrace.trace(layer, gates="inline") as trace:
        expected, _ = layer(x)
    with grutrace.intervene(layer, {"l0": {quantity: trace["l0"]}}):
        output, _ = layer(x)
    is_copied = trace["l0"].checks["tolerance"].max() < 1e-6
    assert is_copied
    assert torch.equal(output, expected)


@pytest.mark.parametrize("quantity", SETTABLE)
def test_control_the_values_of_another_sequence_change_a_run(quantity: str) -> None:
    layer, x = gru(3, 5), torch.randn(7, 2, 3, dtype=torch.float64)
    trace, expected = trace_of(layer, x), layer(x)[0]
    with grutrace.intervene(layer, {"l0": {quantity: trace["l0"].sequence(1)}}):
        output, _ = layer(x)
    assert torch.allclose(output[:, 1], expected[:, 1], rtol=0, atol=1e-13)
    assert not torch.allclose(output[:, 0], expected[:, 0], rtol=0, atol=1e-4)


def test_all_states_of_another_run() -> None:
    torch.manual_seed(0)
    layer, x, y = nn.GRU(3, 5, 2), torch.randn(7, 4, 3), torch.randn(7, 4, 3)
    expected, _ = layer(y)
    trace = trace_of(layer, y)
    with grutrace.intervene(layer, {"l1": {"hidden": trace["l1"]}}):
        output, _ = layer(x)
    assert torch.equal(output, expected)
    assert not torch.equal(layer(x)[0], expected)


def test_one_recorded_sequence_for_every_sequence_of_the_batch() -> None:
    torch.manual_seed(0)
    layer, x = nn.GRU(3, 5), torch.randn(7, 4, 3)
    trace = trace_of(layer, x)
    with grutrace.intervene(layer, {"l0": {"hidden": trace["l0"].sequence(2)}}, sequences=[1, 3]):
        output, _ = layer(x)
    expected = layer(x)[0]
    for b, source in enumerate((0, 2, 2, 2)):
        assert torch.equal(output[:, b], expected[:, source])


def test_alignment_by_token() -> None:
    torch.manual_seed(0)
    layer, x, y = nn.GRU(3, 5), torch.randn(4, 1, 3), torch.randn(5, 1, 3)
    with grutrace.Tracer(layer, recording=False) as tracer:
        with tracer.recording(tokens=[["x", "a", "b", "a", "c"]]):
            layer(y)
        other = tracer["l0"].sequence(0)
    with grutrace.intervene(
        layer, {"l0": {"hidden": other}}, tokens=[["a", "q", "a", "b"]], align="token"
    ):
        output, _ = layer(x)
    for step, source in ((0, 1), (2, 3), (3, 2)):
        assert np.array_equal(output[step, 0].detach().numpy(), other.hidden[source])
    assert not np.array_equal(output[1, 0].detach().numpy(), other.hidden[1])


# Gradients


def test_gradients_flow_as_in_a_loop_of_cells() -> None:
    layer, x = gru(3, 4), torch.randn(6, 2, 3, dtype=torch.float64, requires_grad=True)
    value = torch.rand(2, dtype=torch.float64, requires_grad=True)
    initial = torch.randn(1, 2, 4, dtype=torch.float64, requires_grad=True)
    inputs = [x, value, initial, *layer.parameters()]

    def loss(output: Tensor, final: Tensor) -> Tensor:
        return output.sin().sum() + (final**2).sum()

    with grutrace.intervene(layer, "l0", update=value, units=[0, 3], steps=slice(2, 5)):
        found = torch.autograd.grad(loss(*layer(x, initial)), inputs)
    state, outputs = initial[0], []
    for step, row in enumerate(x):
        products = row @ layer.weight_ih_l0.T + layer.bias_ih_l0
        hidden = state @ layer.weight_hh_l0.T + layer.bias_hh_l0
        i_r, i_z, i_n = products.chunk(3, 1)
        h_r, h_z, h_n = hidden.chunk(3, 1)
        reset, update = (i_r + h_r).sigmoid(), (i_z + h_z).sigmoid()
        if 2 <= step < 5:
            columns = [value[0].expand(2), update[:, 1], update[:, 2], value[1].expand(2)]
            update = torch.stack(columns, 1)
        candidate = (i_n + reset * h_n).tanh()
        state = (1 - update) * candidate + update * state
        outputs.append(state)
    expected = torch.autograd.grad(loss(torch.stack(outputs), state[None]), inputs)
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-10)
    assert found[1].abs().min() > 0


def test_an_array_that_was_used_without_gradients_is_used_with_them() -> None:
    layer, x = gru(2, 3), torch.randn(4, 2, 2, dtype=torch.float64)
    with grutrace.intervene(layer, "l0", update=np.float32([0.2, 0.4, 0.6])):
        with torch.inference_mode():
            expected = layer(x)[0]
        output = layer(x)[0]
        output.sum().backward()
    assert torch.allclose(output, expected, rtol=0, atol=1e-12)
    assert layer.weight_hh_l0.grad is not None


def test_gradcheck() -> None:
    layer, x = gru(2, 3, 2, bidirectional=True), torch.randn(4, 2, 2, dtype=torch.float64)

    def run(x: Tensor) -> Tensor:
        with grutrace.intervene(layer, "l0_reverse", reset=lambda r, _: r * r, steps=slice(1, 3)):
            output: Tensor = layer(x)[0]
            return output

    assert torch.autograd.gradcheck(run, (x.requires_grad_(),))


# Contexts


@pytest.mark.parametrize("mode", ["inference", "no_grad", "autocast", "func"])
def test_other_contexts(mode: str) -> None:
    torch.manual_seed(0)
    layer, x = nn.GRU(3, 5, 2), torch.randn(6, 2, 3)

    def run(x: Tensor) -> Tensor:
        output: Tensor = layer(x)[0]
        return output

    def run_in_mode() -> Tensor:
        if mode == "inference":
            with torch.inference_mode():
                return run(x)
        if mode == "no_grad":
            with torch.no_grad():
                return run(x)
        if mode == "autocast":
            with torch.autocast("cpu"):
                return run(x)
        return torch.func.grad(lambda x: run(x).sin().sum())(x)

    expected = run_in_mode()
    with grutrace.intervene(layer, "*", update=lambda gate, _: gate.clone()):
        assert torch.equal(run_in_mode(), expected)
    with grutrace.intervene(layer, "l1", update=0.5, steps=slice(3, None)):
        assert not torch.equal(run_in_mode(), expected)


def test_a_decoder_under_torch_func_counts_its_steps() -> None:
    model, x = Decoder("cell"), torch.randn(6, 2, 3, dtype=torch.float64)
    intervention = grutrace.intervene(model, "rnn.cell", update=0.3, steps=slice(2, 4))
    with intervention:
        inputs = x.clone().requires_grad_()
        (expected,) = torch.autograd.grad(model(inputs).sin().sum(), inputs)
        found = torch.func.grad(lambda x: model(x).sin().sum())(x)
    assert torch.allclose(found, expected, rtol=0, atol=1e-12)


def test_checkpointing_repeats_the_setting() -> None:
    from torch.utils.checkpoint import checkpoint

    layer, x = gru(3, 5), torch.randn(6, 2, 3, dtype=torch.float64, requires_grad=True)
    with grutrace.intervene(layer, "l0", update=0.3, steps=slice(2, None)):
        (expected,) = torch.autograd.grad(layer(x)[0].sin().sum(), x)
        output = checkpoint(lambda x: layer(x)[0], x, use_reentrant=False)
        (found,) = torch.autograd.grad(output.sin().sum(), x)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("loss_on", ["output", "final"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_backward_pass_of_a_checkpoint_after_the_block_is_refused(
    reentrant: bool, loss_on: str
) -> None:
    from torch.utils.checkpoint import checkpoint

    layer, x = gru(3, 5, 2), torch.randn(6, 2, 3, dtype=torch.float64, requires_grad=True)
    settings: dict[str, Any] = {"l0": {"update": 0.3}}

    def run(model: Any = layer) -> Tensor:
        result = checkpoint(model, x, use_reentrant=reentrant)
        return (result[0] if loss_on == "output" else result[1]).sin().sum()

    with grutrace.intervene(layer, settings):
        loss, later, within = run(), run(), run()
        within.backward()
        expected, x.grad = x.grad, None
        layer.zero_grad()
    message = "update of l0: .* backward.. within the block"
    with pytest.raises(grutrace.UnsupportedError, match=message):
        loss.backward()
    # Nothing wrong is left behind, also in another block.
    assert x.grad is None
    assert all(not p.grad.any() for p in layer.parameters() if p.grad is not None)
    with grutrace.intervene(layer, settings):
        other = run()
        with pytest.raises(grutrace.UnsupportedError, match=message):
            later.backward()
        other.backward()
    assert torch.equal(x.grad, expected)
    # A checkpoint in a checkpoint.
    with grutrace.intervene(layer, settings):
        nested = checkpoint(run, use_reentrant=False) if not reentrant else run()
    with pytest.raises(grutrace.UnsupportedError, match=message):
        nested.backward()
    # Control: without a checkpoint nothing runs again, and nothing is refused.
    with grutrace.intervene(layer, settings):
        plain = layer(x)[0 if loss_on == "output" else 1].sin().sum()
    x.grad = None
    plain.backward()
    assert torch.equal(x.grad, expected)
    # Without gradients there is no backward pass.
    with torch.no_grad(), grutrace.intervene(layer.requires_grad_(False), settings):
        checkpoint(layer, x, use_reentrant=reentrant)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_call_from_outside_the_block_is_not_set(reentrant: bool) -> None:
    from torch.utils.checkpoint import checkpoint

    layer, x = gru(3, 5), torch.randn(6, 2, 3, dtype=torch.float64, requires_grad=True)
    layer(x)[0].sin().sum().backward()
    expected, x.grad = x.grad, None
    loss = checkpoint(layer, x, use_reentrant=reentrant)[0].sin().sum()
    with grutrace.intervene(layer, "l0", update=0.3):
        layer(x)
        with pytest.raises(grutrace.UnsupportedError, match="made outside the block"):
            loss.backward()
    assert x.grad is None
    loss = checkpoint(layer, x, use_reentrant=reentrant)[0].sin().sum()
    loss.backward()
    assert torch.equal(x.grad, expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_is_repeated_as_it_ran(reentrant: bool) -> None:
    from torch.utils.checkpoint import checkpoint

    layer, x = gru(3, 5, 2), torch.randn(6, 2, 3, dtype=torch.float64, requires_grad=True)
    with grutrace.intervene(layer, "l1", reset=lambda gate, _: gate * 0.5, steps=slice(2, None)):
        layer(x)[0].sin().sum().backward()
        expected, x.grad = x.grad, None
        inner = partial(checkpoint, layer, use_reentrant=reentrant)
        checkpoint(inner, x, use_reentrant=reentrant)[0].sin().sum().backward()
    assert torch.equal(x.grad, expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_call_without_gradients_is_repeated_as_it_ran_or_refused(
    reentrant: bool,
) -> None:
    """A frozen layer: no gradient arrives at its call, but those of the model depend on it."""
    from torch.utils.checkpoint import checkpoint

    layer, head = gru(3, 5).requires_grad_(False), torch.ones(5, dtype=torch.float64)
    x = torch.randn(20, 2, 3, dtype=torch.float64)
    head.requires_grad_()

    def model(head: Tensor) -> Tensor:
        state = None
        for step in x.split(1):
            output, state = layer(step, state)
        return (output * head).sin().sum()

    with grutrace.intervene(layer, "l0", update=0.3):
        (expected,) = torch.autograd.grad(model(head), head)
        checkpoint(model, head, use_reentrant=reentrant).backward()
        loss: Any = checkpoint(model, head, use_reentrant=reentrant)
    assert head.grad is not None
    assert torch.equal(head.grad, expected)
    with pytest.raises(grutrace.UnsupportedError, match="the block has ended"):
        loss.backward()
    assert torch.equal(head.grad, expected)
    # The control: without the setting, other gradients.
    assert not torch.allclose(torch.autograd.grad(model(head), head)[0], expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_from_outside_is_told_from_one_of_the_block(reentrant: bool) -> None:
    """Two calls of the same layer, with the same values, one of them made outside."""
    from torch.utils.checkpoint import checkpoint

    layer, x = gru(3, 5), torch.randn(6, 2, 3, dtype=torch.float64, requires_grad=True)
    settings: dict[str, Any] = {"l0": {"update": 0.3}}

    def run() -> Any:
        return checkpoint(layer, x, use_reentrant=reentrant)[0].sin().sum()

    def gradients(loss: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        x.grad = layer.weight_hh_l0.grad = None
        loss.backward(**options)
        return x.grad, layer.weight_hh_l0.grad  # type: ignore[return-value]

    with grutrace.intervene(layer, settings):
        expected = gradients(layer(x)[0].sin().sum())
    untouched = gradients(layer(x)[0].sin().sum())
    outside, kept = run(), run()
    with grutrace.intervene(layer, settings) as block:
        within, twice, later = run(), run(), run()
        with pytest.raises(grutrace.UnsupportedError, match="made outside the block"):
            gradients(outside)
        assert x.grad is None
        assert all(map(torch.equal, gradients(within), expected))
        assert all(map(torch.equal, gradients(twice, retain_graph=True), expected))
        assert all(map(torch.equal, gradients(twice), expected))
    assert all(map(torch.equal, gradients(kept), untouched))
    # The same block again is another one.
    with block:
        run()
        with pytest.raises(grutrace.UnsupportedError, match="the block has ended"):
            gradients(later)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_and_nested_blocks(reentrant: bool) -> None:
    from torch.utils.checkpoint import checkpoint

    layer, x = gru(3, 5), torch.randn(6, 2, 3, dtype=torch.float64, requires_grad=True)

    def run(model: Any = layer) -> Any:
        return model(x)[0].sin().sum()

    checkpointed = partial(checkpoint, layer, use_reentrant=reentrant)
    with grutrace.intervene(layer, "l0", update=0.3, units=[0]):
        of_outer = run(checkpointed)
        with grutrace.intervene(layer, "l0", update=0.6, units=[1]):
            run().backward()
            expected, x.grad = x.grad, None
            of_both, of_both_late = run(checkpointed), run(checkpointed)
            with pytest.raises(grutrace.UnsupportedError, match="made outside the block"):
                of_outer.backward()
            of_both.backward()
            assert torch.equal(x.grad, expected)
        with pytest.raises(grutrace.UnsupportedError, match="the block has ended"):
            of_both_late.backward()
        x.grad = None
        run().backward()
        expected, x.grad = x.grad, None
        run(checkpointed).backward()
        assert torch.equal(x.grad, expected)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", ["gru", "cell"])
def test_a_block_within_a_checkpoint_is_repeated_with_it(kind: str, reentrant: bool) -> None:
    from torch.utils.checkpoint import checkpoint

    decoder = Decoder(kind)
    x = torch.randn(6, 2, 3, dtype=torch.float64, requires_grad=True)

    def run(x: Tensor, steps: slice = slice(2, 4)) -> Any:
        with grutrace.intervene(
            decoder, f"rnn.{'cell' if kind == 'cell' else 'l0'}", update=0.3, steps=steps
        ):
            return decoder(x)

    run(x).sin().sum().backward()
    expected, x.grad = x.grad, None
    assert expected is not None
    output: Any = checkpoint(run, x, use_reentrant=reentrant)
    output.sin().sum().backward()
    assert torch.equal(x.grad, expected)
    # The control: other steps, other gradients.
    x.grad = None
    run(x, slice(1, 4)).sin().sum().backward()
    assert not torch.allclose(x.grad, expected)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("steps", [1, 2])
def test_checkpointing_parts_of_a_sequence_is_exact(steps: int, reentrant: bool) -> None:
    """More calls than are remembered: each is repeated as it ran."""
    from torch.utils.checkpoint import checkpoint

    layer, x = gru(3, 5), torch.randn(60, 2, 3, dtype=torch.float64)

    def run(layer: Any, first: int) -> Tensor:
        x.grad, state, total = None, torch.ones(1, 2, 5, dtype=torch.float64), torch.zeros(())
        with grutrace.intervene(model, "l0", update=0.3, steps=slice(first, None)):
            for part in x.requires_grad_().split(steps):
                output, state = layer(part, state)
                total = total + output.sin().sum()
            total.backward()
        assert x.grad is not None
        return x.grad

    model = layer
    expected = run(layer, 3)
    assert torch.equal(run(partial(checkpoint, layer, use_reentrant=reentrant), 3), expected)
    # The control: counted from another step, other gradients.
    assert not torch.allclose(run(layer, 2), expected)


def test_a_checkpoint_whose_calls_start_from_the_same_states_is_refused() -> None:
    from torch.utils.checkpoint import checkpoint

    decoder, x = Decoder("cell"), torch.randn(6, 2, 3, dtype=torch.float64, requires_grad=True)

    def run(first: int) -> Any:
        # All states are zeros before the first step that is set.
        with grutrace.intervene(
            decoder, {"rnn.cell": {"hidden": lambda h, at: h if at.step >= first else h.zero_()}}
        ):
            checkpoint(decoder, x, use_reentrant=False).sin().sum().backward()

    with pytest.raises(grutrace.UnsupportedError, match="or more than one"):
        run(3)
    run(0)


def test_the_repr() -> None:
    intervention = grutrace.intervene(LAYER, "*", update=0.0)
    assert repr(intervention) == "<intervention: update of l0, update of l1>"


@pytest.mark.parametrize("kind", ["gru", "cell"])
def test_the_replicas_that_pytorch_makes_are_refused(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """nn.DataParallel runs shallow copies of the model. Here PyTorch makes them on the CPU."""

    def copies(tensors: list[Tensor], devices: list[int], detach: bool = False) -> Any:
        return [[tensor.clone() for tensor in tensors] for _ in devices]

    replicate = importlib.import_module("torch.nn.parallel.replicate")
    monkeypatch.setattr(replicate, "_broadcast_coalesced_reshape", copies)
    model, other = Decoder(kind), Decoder(kind)
    x = torch.randn(4, 6, 3, dtype=torch.float64)
    expected = model(x)
    site = "rnn.l0" if kind == "gru" else "rnn.cell"
    with grutrace.intervene(model, site, update=1.0):
        model(x)
        for replica, part in zip(replicate.replicate(model, [0, 1]), x.chunk(2, 1), strict=True):
            with pytest.raises(grutrace.UnsupportedError, match=r"replica of nn\.DataParallel"):
                replica(part)
        # Controls: replicas of another model, and copies that are models of their own.
        (replica,) = replicate.replicate(other, [0])
        for unset in (replica, copy.deepcopy(model)):
            assert torch.allclose(unset(x), expected, rtol=0, atol=1e-12)
    (replica,) = replicate.replicate(model, [0])
    assert torch.allclose(replica(x), expected, rtol=0, atol=1e-12)


def test_dropout_between_the_layers_draws_the_same_masks() -> None:
    torch.manual_seed(0)
    layer, x = nn.GRU(3, 5, 2, dropout=0.5), torch.randn(6, 2, 3)
    torch.manual_seed(1)
    expected, after = layer(x)[0], torch.get_rng_state()
    torch.manual_seed(1)
    with grutrace.intervene(layer, "l1", hidden=lambda h, _: h.clone()):
        output = layer(x)[0]
    assert torch.equal(output, expected)
    assert torch.equal(torch.get_rng_state(), after)


def test_a_call_without_data_is_refused() -> None:
    layer = nn.GRU(2, 3, device="meta")
    x = torch.randn(5, 2, 2, device="meta")
    intervention = grutrace.intervene(layer, "l0", update=0.0)
    with pytest.raises(grutrace.UnsupportedError, match="tensors hold no data"), intervention:
        layer(x)


class Replicating(nn.DataParallel[nn.Module]):
    """Runs two replicas of a layer, made as on two devices, each on half of the batch."""

    def forward(self, x: Tensor) -> Tensor:
        outputs = []
        dim = x.dim() - 2
        for half in x.chunk(2, dim):
            replica = self.module._replicate_for_data_parallel()
            for name, parameter in self.module._parameters.items():
                setattr(replica, name, parameter.clone())
            output = replica(half)
            outputs.append(output[0] if isinstance(output, tuple) else output)
        return torch.cat(outputs, dim)


@pytest.mark.parametrize("kind", ["GRU", "GRUCell"])
def test_a_replica_of_data_parallel_is_refused(kind: str) -> None:
    is_cell = kind == "GRUCell"
    layer, other = getattr(nn, kind)(2, 3), getattr(nn, kind)(2, 3)
    site = "cell" if is_cell else "l0"
    x = torch.randn(4, 2) if is_cell else torch.randn(5, 4, 2)
    intervention = grutrace.intervene(layer, site, update=0.0)
    message = "replica of nn.DataParallel"
    with pytest.raises(grutrace.UnsupportedError, match=message), intervention:
        Replicating(layer)(x)
    # Control: replicas of another layer run in the block, and all replicas outside of it.
    with grutrace.intervene(layer, site, update=0.0):
        layer(x)
        inside = Replicating(other)(x)
    for found, expected in ((inside, other(x)), (Replicating(layer)(x), layer(x))):
        assert torch.allclose(found, expected if is_cell else expected[0], atol=1e-6)


def test_data_parallel_on_several_devices_is_refused_before_the_model_runs() -> None:
    model = nn.ModuleDict({"a": nn.DataParallel(nn.GRU(2, 3)), "b": nn.GRU(2, 3)})
    # On a CPU it makes no replicas: the module itself runs.
    with grutrace.intervene(model, "a.module.l0", update=1.0):
        output, _ = model["a"](torch.randn(5, 4, 2))
    assert not output.any()
    model["a"].device_ids = [0, 1]
    with pytest.raises(
        grutrace.UnsupportedError, match=r"a\.module\.l0 in an nn.DataParallel.*2 rep"
    ):
        grutrace.intervene(model, "a.*", update=1.0)
    grutrace.intervene(model, "b.*", update=1.0)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_runs_a_cell_for_each_sample() -> None:
    cell, x = nn.GRUCell(2, 3), torch.randn(4, 2, 2)
    with grutrace.intervene(cell, "cell", candidate=0.4, units=1):
        expected = torch.stack([cell(sample) for sample in x])
        assert torch.allclose(torch.func.vmap(cell)(x), expected)


# Errors

LAYER = nn.GRU(2, 3, 2)


@pytest.mark.parametrize(
    ("site", "options", "message"),
    [
        ("l7", {"update": 0.0}, r"'l7' matches no site of the model.*l0, l1"),
        ("l0", {}, "expected a value of one of reset_preactivation"),
        ("l0", {"updat": 0.0}, "unknown quantity or option .did you mean 'update'"),
        ("l0", {"update": 0.0, "unit": 3}, "unknown quantity or option .did you mean 'units'"),
        ("l0", {"update": lambda gate: gate}, "a function of two arguments"),
        ("l0", {"update": "x"}, "update of l0: expected a number, an array, a function"),
        ("l0", {"update": 10**400}, "update of l0: expected a number that fits a float"),
        ("l0", {"update": float("nan")}, "update of l0: expected finite numbers, found NaN"),
        ("l0", {"update": np.array([0.0, np.inf, 1])}, "found an infinite value"),
        ("l0", {"update": [0.0, 1.0]}, r"broadcasts to \(T, B, 3\).*2 units"),
        ("l0", {"update": np.zeros((4, 1, 3)), "steps": slice(0, 3)}, r"\(3, B, 3\).*4 steps"),
        ("l0", {"update": np.zeros((3, 3)), "sequences": [0, 1]}, r"\(T, 2, 3\).*3 sequences"),
        ("l0", {"update": np.zeros((1, 1, 1, 3))}, "broadcast to"),
        ("l0", {"update": 0.0, "units": [3]}, "units from 0 to 2 at l0, found 3"),
        ("l0", {"update": 0.0, "units": [1, 1]}, "different units"),
        ("l0", {"update": 0.0, "units": []}, "different units"),
        ("l0", {"update": 0.0, "units": "1"}, "units: expected a slice, a number or numbers"),
        ("l0", {"update": 0.0, "steps": -1}, "steps: expected numbers from 0, found -1"),
        ("l0", {"update": 0.0, "steps": slice(-3, None)}, "expected numbers from 0, found -3"),
        ("l0", {"update": 0.0, "steps": slice(3, 3)}, "expected some steps"),
        ("l0", {"update": 0.0, "steps": "all"}, "steps: expected a slice, a number or numbers"),
        ("l0", {"update": 0.0, "sequences": [-1]}, "positions in the batch, from 0"),
        ("l0", {"update": 0.0, "sequences": slice(1, None)}, "a slice from 0 with an end"),
        ("l0", {"update": 0.0, "tokens": "ab"}, "tokens: expected a list of tokens"),
        ("l0", {"update": 0.0, "align": "time"}, "align: expected one of step, token"),
        ("l0", {"update": np.zeros((4, 2, 3)), "align": "token"}, "align: expected a recorded"),
        ({"l0": 0.0}, {}, "l0: expected values by quantity"),
        ({"l0": {"update": 0.0}}, {"reset": 1.0}, "found a dict and reset="),
        ({}, {}, "at least one site"),
    ],
)
def test_bad_input_is_refused_at_once(site: Any, options: Any, message: str) -> None:
    with pytest.raises(grutrace.OptionError, match=message):
        grutrace.intervene(LAYER, site, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"update": np.zeros((1, 4, 3))}, r"broadcasts to \(T, 2, 3\).*4 sequences"),
        ({"update": np.zeros((4, 1, 3))}, "found 4 steps in the array at step 4"),
        ({"update": 0.0, "sequences": [2]}, "a batch of 2 sequences, found 2"),
        ({"update": lambda gate, _: gate[:, :2]}, r"values of shape \(2, 3\).*at step 0"),
        ({"update": lambda *_: None}, "values of shape .*found None at step 0"),
        ({"update": lambda gate, _: gate * float("nan")}, "found NaN at step 0"),
    ],
)
def test_what_does_not_fit_the_batch_is_refused_in_the_call(options: Any, message: str) -> None:
    intervention = grutrace.intervene(LAYER, "l0", **options)
    with pytest.raises(grutrace.OptionError, match=message), intervention:
        LAYER(torch.randn(5, 2, 2))
    assert LAYER(torch.randn(5, 2, 2))[0].shape == (5, 2, 3)


def test_a_shorter_recorded_sequence_is_refused() -> None:
    trace = trace_of(LAYER, torch.randn(3, 2, 2))
    with (
        pytest.raises(grutrace.OptionError, match="3 steps in recorded sequence 0 at step 3"),
        grutrace.intervene(LAYER, {"l0": {"update": trace["l0"]}}),
    ):
        LAYER(torch.randn(5, 2, 2))


def test_unused_steps_of_an_array_are_named() -> None:
    intervention = grutrace.intervene(LAYER, "l0", update=np.zeros((7, 1, 3)))
    with pytest.warns(grutrace.GrutraceWarning, match="7 steps, and only 5 were"), intervention:
        LAYER(torch.randn(5, 2, 2))


def test_a_site_that_is_never_called_is_named() -> None:
    model = nn.ModuleDict({"used": nn.GRU(2, 3), "unused": nn.GRU(2, 3)})
    intervention = grutrace.intervene(model, "*", update=0.0)
    with pytest.raises(grutrace.StateError, match=r"to call unused\.l0 within"), intervention:
        model["used"](torch.randn(4, 2, 2))


def test_an_exception_in_an_inner_block_leaves_the_outer_one() -> None:
    layer, x = gru(3, 5), torch.randn(4, 2, 3, dtype=torch.float64)
    untouched = layer(x)[0]

    def fail(gate: Tensor, at: Any) -> Tensor:
        if at.step == 2:
            raise ZeroDivisionError
        return gate

    with grutrace.intervene(layer, "l0", update=1.0):
        with pytest.raises(ZeroDivisionError), grutrace.intervene(layer, "l0", reset=fail):
            layer(x)
        assert not layer(x)[0].any()
    assert torch.equal(layer(x)[0], untouched)


def test_an_exception_ends_the_intervention() -> None:
    x = torch.randn(5, 2, 2)
    expected = LAYER(x)[0]

    def fail() -> None:
        with grutrace.intervene(LAYER, "l0", update=0.0):
            LAYER(x)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert torch.equal(LAYER(x)[0], expected)


def test_a_packed_result_stays_packed() -> None:
    packed = pack_padded_sequence(torch.randn(4, 2, 2), torch.tensor([4, 2]))
    with grutrace.intervene(LAYER, "l1", candidate=0.1):
        output, _ = LAYER(packed)
    assert isinstance(output, PackedSequence)
