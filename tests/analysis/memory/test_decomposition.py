"""Tests of the decomposition: the contributions of past steps add up to the state."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import nn

import grutrace
from grutrace.analysis.engine.site_data import SiteArrays
from grutrace.analysis.memory import decomposition as module
from grutrace.analysis.memory.decomposition import decompose, memory_map
from grutrace.errors import NotRecordedError, OptionError
from tests.analysis import sites
from tests.analysis.everywhere import as_arrays, assert_same
from tests.checks import EVERYTHING
from tests.strategies import Case, cases


def allowed(site: Any, number: int, step: int, eps: float) -> np.ndarray:
    """(H,) what may be left over.

    A recorded state is off from what its gates make of the state before it by the residual at most,
    beside the few roundings of making it. That goes on as the state does: by the products of the
    update gates that come later.
    """
    sequence = site.sequence(number)
    way = slice(None, None, -1 if site.site.reverse else 1)
    made = len(sequence) - 1 - step if site.site.reverse else step
    update = sequence.update[way][: made + 1].astype(np.float64)
    sizes = 1 + np.abs(sequence.previous[way][: made + 1])
    weight = np.ones_like(update[0])
    total = np.zeros_like(weight)
    for past in range(made, -1, -1):
        total += weight * (site.residual + 4 * eps * sizes[past])
        weight = weight * update[past]
    return total


@given(case=cases())
@settings(deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))
def test_adds_up_on_every_network(case: Case) -> None:
    with grutrace.trace(case.layer, record=EVERYTHING, check="off", gates="inline") as trace:
        case.run()
    for name in trace.sites:
        site = trace[name]
        eps = float(site.checks["precision"][0]) if len(site.checks) else 0.0
        for number in range(len(site)):
            for step in {0, len(site.sequence(number)) - 1}:
                result = decompose(site, number, step)
                off = np.abs(result.written.sum(0) + result.before - result.hidden)
                assert (off <= allowed(site, number, step, eps)).all()
                assert result.difference == pytest.approx(off.max(), abs=1e-14)
                ones = result.weights.sum(0) + result.before_weight
                np.testing.assert_allclose(ones, 1, atol=1e-12)


def test_equals_exact_arithmetic() -> None:
    """With fractions, and with gates that are exactly 0 and 1."""
    random = np.random.default_rng(0)
    update, candidate = random.uniform(size=(30, 3)), random.uniform(-1, 1, (30, 3))
    update[10, 0], update[5:25, 1], update[:, 2] = 0.0, 1.0, 1 - 1e-9 * update[:, 2]
    initial = np.array([[1e6, -3.0, 0.5]])
    states, before, exact = [], [Fraction(x) for x in initial[0]], {}
    for step in range(30):
        z, n = ([Fraction(x) for x in rows[step]] for rows in (update, candidate))
        exact = {
            past: [w * k for w, k in zip(terms, z, strict=True)] for past, terms in exact.items()
        }
        exact[step] = [(1 - k) * c for k, c in zip(z, n, strict=True)]
        before = [k * b for k, b in zip(z, before, strict=True)]
        states.append([float(sum(terms)) for terms in zip(*exact.values(), before, strict=True)])
    arrays = SiteArrays(
        update=update, candidate=candidate, hidden=np.array(states), initial=initial
    )
    result = decompose(arrays, 0)
    expected = np.array([[float(x) for x in exact[past]] for past in range(30)])
    np.testing.assert_allclose(result.written, expected, rtol=1e-14)
    np.testing.assert_allclose(result.before, [float(x) for x in before], rtol=1e-13)
    assert (result.written[:10, 0] == 0).all()
    assert result.difference < 1e-9
    assert result.share.sum() + result.before_share == pytest.approx(1, abs=1e-12)
    # Control: sums of logarithms, or quotients of products from the left, fail at a gate of 0.
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.cumsum(np.log(update), axis=0)
        from_logs = (1 - update) * np.exp(logs[-1] - logs) * candidate
        products = np.cumprod(update, axis=0)
        from_left = (1 - update) * products[-1] / products * candidate
    assert np.isnan(from_logs[:, 0]).any()
    assert np.isnan(from_left[:, 0]).any()


@pytest.mark.parametrize("block", [1, 1000, 10**9])
def test_long_sequences_in_blocks(block, monkeypatch) -> None:
    """20000 steps: products below the smallest float, and a unit that never changes."""
    monkeypatch.setattr(module, "BLOCK_BYTES", block * 32)
    steps = 3000 if block == 1 else 20_000
    random = np.random.default_rng(0)
    update = random.uniform(size=(steps, 4))
    update[:, 2], update[:, 3] = 1.0, 1 - 1e-6
    candidate = random.uniform(-1, 1, (steps, 4))
    initial, states = np.array([1e300, 1.0, 7.0, 1.0]), np.empty((steps, 4))
    before = initial
    for step in range(steps):
        before = update[step] * before + (1 - update[step]) * candidate[step]
        states[step] = before
    site = SiteArrays(
        update=update, candidate=candidate, hidden=states, initial=initial[np.newaxis]
    )
    result = decompose(site, 0)
    assert result.difference < 1e-12 * steps
    assert result.before[2] == 7
    assert result.before_weight[3] == pytest.approx((1 - 1e-6) ** steps, rel=1e-9)
    assert (result.written[:1000, 0] == 0).all()
    recent = decompose(site, 0, back=500)
    np.testing.assert_array_equal(recent.written, result.written[-500:])
    np.testing.assert_allclose(
        recent.before, result.written[:-500].sum(0) + result.before, 1e-9, 1e-15
    )


def test_maps_equal_the_states_step_by_step(tmp_path, monkeypatch) -> None:
    trace = sites.in_memory()
    for name in ("encoder.l1", "encoder.l1_reverse", "decoder.rnn.l1"):
        for back in (None, 3):
            for block in (1, 10**9):
                monkeypatch.setattr(module, "BLOCK_BYTES", block)
                check_map(trace[name], back)
    with sites.in_a_file(tmp_path / "run.h5", "deferred") as trace:
        check_map(trace["encoder.l1_reverse"], 3)


def check_map(site: Any, back: int | None) -> None:
    result = memory_map(site, -1, first=1, back=back)
    length = len(site.sequence(-1))
    assert result.steps.tolist() == list(range(1, length))
    for number, step in enumerate(result.steps):
        one = decompose(site, -1, int(step), back=back)
        # From the step that made it, backwards.
        way = slice(None, None, 1 if site.site.reverse else -1)
        past = len(one.steps)
        np.testing.assert_allclose(result.share[number, :past], one.share[way], atol=1e-6)
        np.testing.assert_allclose(result.size[number, :past], one.size[way], atol=1e-6)
        assert (result.share[number, past:] == 0).all()
        assert result.before_share[number] == pytest.approx(one.before_share, abs=1e-6)
    whole = result.share.sum(axis=1) + result.before_share
    np.testing.assert_allclose(whole, 1, atol=1e-5)


def test_a_planted_memory_is_found() -> None:
    """z is 1 except at step 20, where it is 0: step 20 alone wrote all later states."""
    update = np.ones((50, 2))
    update[20] = 0
    candidate = np.random.default_rng(0).uniform(0.1, 1, (50, 2))
    hidden = np.concatenate([np.zeros((20, 2)), np.tile(candidate[20], (30, 1))])
    site = SiteArrays(update=update, candidate=candidate, hidden=hidden)
    result = decompose(site, 0)
    assert result.steps[np.argmax(result.share)] == 20
    assert result.share[20] == pytest.approx(1)
    np.testing.assert_array_equal(result.written[20], hidden[-1])
    shares = memory_map(site, 0, first=20).share
    np.testing.assert_allclose(shares[np.arange(30), np.arange(30)], 1)
    backwards = SiteArrays(
        update=update[::-1], candidate=candidate[::-1], hidden=hidden[::-1], reverse=True
    )
    assert decompose(backwards, 0, 0).share[29] == pytest.approx(1)
    assert decompose(backwards, 0, 0).steps.tolist() == list(range(50))


def test_some_units() -> None:
    torch.manual_seed(0)
    layer = nn.GRU(2, 6)
    with grutrace.trace(layer, units=[4, 1, 5], gates="inline") as trace:
        layer(torch.randn(20, 2))
    result = decompose(trace["l0"], 0, units=[2, 0])
    assert result.units.tolist() == [5, 4]
    assert result.difference < 1e-6
    assert result.columns().keys() == {"step", "share", "size"}
    assert "written" not in result.to_dict()
    site = sites.in_memory()["encoder.l1_reverse"]
    assert_same(decompose(as_arrays(site), 2), decompose(site, 2), 1e-12)


def test_wrong_options_are_errors() -> None:
    rows = {name: np.zeros((3, 2)) for name in ("update", "candidate", "hidden")}
    site = SiteArrays(**rows, lengths=[3, 0])
    assert np.isnan(decompose(site, 0).share).all()
    assert memory_map(site, 1).share.shape == (0, 0)
    for wrong, message in (
        ((2,), "no sequence 2; it has 2"),
        ((0, 3), "sequence 0 of 'arrays' has no step 3; it has 3"),
        ((1,), "sequence 1 of 'arrays' has no step -1; it has 0"),
    ):
        with pytest.raises(NotRecordedError, match=message):
            decompose(site, *wrong)
    with pytest.raises(NotRecordedError, match="no 'candidate'"):
        decompose(SiteArrays(update=np.zeros((3, 2))), 0)
    with pytest.raises(OptionError, match="back: expected a number of steps, 1 or more; found 0"):
        decompose(site, 0, back=0)
    with pytest.raises(OptionError, match="units: expected columns from 0 to 1"):
        decompose(site, 0, units=[2])
    long = SiteArrays(**{name: np.zeros((20_000, 1)) for name in rows})
    with pytest.raises(OptionError, match="20000 states and 20000 past steps"):
        memory_map(long, 0)


def test_control_other_gates_do_not_add_up() -> None:
    site = sites.in_memory()["encoder.l1"]
    arrays = as_arrays(site)
    wrong = SiteArrays(
        lengths=arrays.lengths,
        update=arrays.reset,
        candidate=arrays.candidate,
        hidden=arrays.hidden,
        initial=arrays.initial,
    )
    eps = float(np.finfo(np.float32).eps)
    for number, sequence in enumerate(site):
        bound = allowed(site, number, len(sequence) - 1, eps)
        assert decompose(site, number).difference <= bound.max()
        assert decompose(wrong, number).difference > 1000 * bound.max()
