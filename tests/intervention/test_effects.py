"""Effects of holding units: planted truths, and the definition."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import grutrace


class Memory(nn.Module):
    """Unit 2 of 6 keeps the sign of the first input until the end; unit 4 is used by nothing."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.rnn = nn.GRU(2, 6)
        with torch.no_grad():
            for parameter in self.rnn.parameters():
                parameter.mul_(0.3)
            # It writes only if the second input, which marks the first step, is 1.
            self.rnn.weight_ih_l0[6 + 2] = torch.tensor([0.0, -20.0])
            self.rnn.bias_ih_l0[6 + 2] = 10.0
            self.rnn.weight_ih_l0[12 + 2] = torch.tensor([3.0, 0.0])
            self.rnn.weight_hh_l0[[2, 6 + 2, 12 + 2]] = 0.0
            self.rnn.weight_hh_l0[:, [2, 4]] = 0.0

    def forward(self, x: Tensor) -> Tensor:
        state: Tensor = self.rnn(x)[1][0]
        return state[:, 2] + 0.01 * state[:, [0, 1, 3, 5]].sum(1)


def data(batch: int = 40, steps: int = 12) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(steps, batch, 2, generator=generator)
    x[0, :, 0] = x[0, :, 0].sign()
    x[..., 1] = 0.0
    x[0, :, 1] = 1.0
    return x, x[0, :, 0]


def measure(copies: int = 1, **options: Any) -> Any:
    x, sign = data()
    repeated, signs = x.repeat(1, copies, 1), sign.repeat(copies)
    return grutrace.effects(
        Memory(),
        lambda model: model(repeated),
        lambda out: out * signs,
        **{"batched": copies, **options},
    )


@pytest.mark.parametrize("to", [0.0, 1.0, "mean", "resample"])
def test_the_unit_that_carries_the_bit_comes_first_and_an_unused_one_is_exactly_0(to: Any) -> None:
    table = measure(to=to)
    assert table.sorted().unit[0] == 2
    assert table.effect[2] < -0.5
    assert (table.differences[4] == 0).all()
    assert table.effect[4] == table.standard_error[4] == 0
    # The others have an effect, but a small one.
    others = np.abs(table.effect[[0, 1, 3, 5]])
    assert (others < 0.1).all()
    assert (others > 0).any()


def test_control_the_bit_that_nothing_reads_has_no_effect() -> None:
    """So it is the path of the bit that puts its unit first, and not its large gates."""

    class Forgetting(Memory):
        def forward(self, x: Tensor) -> Tensor:
            state: Tensor = self.rnn(x)[1][0]
            return state[:, 4] + 0.01 * state[:, [0, 1, 3, 5]].sum(1)

    x, sign = data()
    table = grutrace.effects(Forgetting(), lambda m: m(x), lambda out: out * sign, to=(0.0,))
    assert (table.differences[2] == 0).all()
    assert (table.differences[4] != 0).any()
    assert table.sorted().unit[0] != 2


def test_the_baseline_is_the_untouched_model() -> None:
    x, sign = data()
    expected = (Memory()(x) * sign).detach().numpy()
    table = measure(to=1.0)
    assert np.array_equal(table.untouched, expected.astype(np.float64))
    assert (table.baseline == table.untouched.mean()).all()


def test_an_effect_is_the_difference_that_an_intervention_makes() -> None:
    x, sign = data()
    model = Memory()
    table = measure(to=(0.25, "mean"), quantities=("update", "candidate"), units=[1, 2])
    assert table.quantity.tolist() == ["update"] * 4 + ["candidate"] * 4
    assert table.value.tolist() == [0.25, 0.25, "mean", "mean"] * 2
    with grutrace.trace(model) as trace:
        model(x)
    for row in range(len(table)):
        quantity, unit, value = table.quantity[row], int(table.unit[row]), table.value[row]
        if value == "mean":
            value = float(np.asarray(trace["rnn.l0"][quantity], np.float64)[:, unit].mean())
        with grutrace.intervene(model, "rnn.l0", units=unit, **{quantity: value}):
            held = model(x) * sign
        expected = (held - model(x) * sign).detach().double().numpy()
        assert np.allclose(table.differences[row], expected, rtol=0, atol=1e-6)
        assert table.effect[row] == pytest.approx(expected.mean(), abs=1e-6)


@pytest.mark.parametrize("copies", [2, 3, 6, 7])
def test_several_units_in_one_batch(copies: int) -> None:
    one = measure(to=(0.0, "mean"))
    several = measure(copies, to=(0.0, "mean"))
    assert several.unit.tolist() == one.unit.tolist()
    assert np.allclose(several.differences, one.differences, rtol=0, atol=1e-6)
    assert (several.differences[several.unit == 4] == 0).all()


def test_the_standard_error_is_that_of_a_mean() -> None:
    table = measure(to=1.0)
    expected = table.differences.std(1, ddof=1) / np.sqrt(table.differences.shape[1])
    assert np.allclose(table.standard_error, expected, rtol=0.15)


def test_steps_are_counted_and_progress_is_reported() -> None:
    calls: list[tuple[int, int]] = []
    table = measure(to=1.0, steps=slice(1, None), units=2, progress=lambda *c: calls.append(c))
    # The bit is written at step 0. Without the hold it fades by sigmoid(10) per step.
    assert abs(table.effect[0]) < 1e-3
    assert calls == [(1, 2), (2, 2)]


def test_dropout_and_the_user_s_random_numbers() -> None:
    model = nn.Sequential(nn.GRU(2, 4, 2, dropout=0.5))
    x = torch.randn(5, 3, 2)
    state = torch.get_rng_state()
    table = grutrace.effects(
        model, lambda m: m[0](x)[0], lambda out: out[-1].sum(1), sites="0.l1", to="resample"
    )
    again = grutrace.effects(
        model, lambda m: m[0](x)[0], lambda out: out[-1].sum(1), sites="0.l1", to="resample"
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert np.array_equal(table.differences, again.differences)


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.cell = nn.GRUCell(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for step in x:
            state = self.cell(step, state)
        assert state is not None
        return state


def test_a_decoder_in_one_batch() -> None:
    x = torch.randn(6, 4, 2)
    tables = [
        grutrace.effects(
            Decoder(),
            lambda model, k=k: model(x.repeat(1, k, 1)),
            lambda state: state.sum(1),
            to=0.5,
            steps=slice(2, None),
            batched=k,
        )
        for k in (1, 3)
    ]
    assert np.allclose(tables[0].differences, tables[1].differences, rtol=0, atol=1e-6)
    assert np.abs(tables[0].effect).min() > 0


def test_the_table() -> None:
    pandas = pytest.importorskip("pandas")
    table = measure(to=(0.0, "mean"), units=slice(0, 2))
    frame = table.to_frame()
    assert isinstance(frame, pandas.DataFrame)
    assert list(frame) == [
        *("site", "quantity", "unit", "value", "effect", "standard_error", "baseline")
    ]
    assert len(frame) == len(table) == 4
    assert repr(table).startswith("Effects(rows=4, sites=('rnn.l0',)")


class Mixed(Memory):
    """Its output for one sequence depends on the others."""

    def forward(self, x: Tensor) -> Tensor:
        output = super().forward(x)
        return output - output.mean()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"to": "median"}, "to: expected numbers, 'mean' or 'resample', found 'median'"),
        ({"to": ()}, "found none"),
        ({"to": float("nan")}, "finite numbers, found nan"),
        ({"to": None}, "to: expected numbers"),
        ({"quantities": "gate"}, "quantities: expected names out of reset_preactivation"),
        ({"sites": "decoder.*"}, r"'decoder\.\*' matches no site of the model.*rnn\.l0"),
        ({"units": [6]}, "units from 0 to 5 at rnn.l0, found 6"),
        ({"batched": 0}, "batched: expected a whole number from 1, found 0"),
        ({"unit": 3}, "unit: unknown option .did you mean 'units'"),
    ],
)
def test_bad_options(options: Any, message: str) -> None:
    with pytest.raises(grutrace.OptionError, match=message):
        measure(**options)


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        (lambda out: out.mean(), r"one number for each sequence, \(n,\), found"),
        (lambda out: out[:, None], "one number for each sequence"),
        (lambda _: "good", "one number for each sequence"),
        (lambda out: out * float("nan"), "finite numbers from the untouched model, found nan"),
    ],
)
def test_a_bad_metric(metric: Any, message: str) -> None:
    x, _ = data()
    with pytest.raises(grutrace.OptionError, match=message):
        grutrace.effects(Memory(), lambda model: model(x), metric)


def test_copies_that_are_none_or_depend_on_one_another() -> None:
    x, _ = data()
    with pytest.raises(grutrace.OptionError, match="the same metric from 2 copies"):
        grutrace.effects(Memory(), lambda model: model(x), lambda out: out, batched=2)
    repeated = x.repeat(1, 2, 1)
    with pytest.raises(grutrace.OptionError, match="sequences of a batch independently"):
        grutrace.effects(Mixed(), lambda model: model(repeated), lambda out: out, batched=2)
    with pytest.raises(grutrace.OptionError, match="a multiple of batched=3 numbers, found 40"):
        grutrace.effects(Memory(), lambda model: model(x), lambda out: out, batched=3)


@pytest.mark.filterwarnings("ignore:intervene. update of rnn.l0 was not set")
def test_steps_that_no_call_makes() -> None:
    with pytest.raises(grutrace.OptionError, match=r"steps that rnn.l0 makes, found \[99\]"):
        measure(steps=[99])


def test_a_site_that_is_not_called() -> None:
    model = nn.ModuleDict({"used": nn.GRU(2, 3), "unused": nn.GRU(2, 3)})
    x = torch.randn(4, 2, 2)
    with pytest.raises(grutrace.StateError, match=r"unused\.l0"):
        grutrace.effects(model, lambda m: m["used"](x)[1][0], lambda state: state.sum(1))


def test_the_default_values() -> None:
    table = measure(units=[0])
    assert list(dict.fromkeys(table.value.tolist())) == [0.0, 1.0, "mean", "resample"]
