"""Tests of Lyapunov exponents, against determinants, eigenvalues and known spectra."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import grutrace
from grutrace.analysis.dynamics import growth as growth_sums
from grutrace.analysis.dynamics import lyapunov as module
from grutrace.analysis.dynamics.jacobian import jacobian
from grutrace.analysis.dynamics.lyapunov import kaplan_yorke, lyapunov
from grutrace.analysis.engine.site_data import SiteArrays
from grutrace.errors import NotRecordedError, OptionError
from tests.analysis import sites
from tests.analysis.everywhere import ORDER, as_arrays, assert_same, check_everywhere
from tests.checks import EVERYTHING
from tests.instruction_sets import INSTRUCTION_SETS

#: With each instruction set of the compiled library, and with NumPy.
each_set = pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS, indirect=True)


def random_layer(units: int, gain: float, seed: int = 0) -> nn.GRU:
    """Recurrent weights of the candidate with this spread over sqrt(H); gates half open."""
    torch.manual_seed(seed)
    layer = nn.GRU(1, units, dtype=torch.float64)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
        layer.weight_hh_l0[2 * units :].normal_(0, gain / units**0.5)
        layer.weight_ih_l0[2 * units :].normal_(0, 0.1)
        layer.bias_hh_l0[:units] = 20.0
    return layer


def run(layer: nn.GRU, steps: int, batch: int = 1, initial: float = 0.5) -> grutrace.Trace:
    torch.manual_seed(1)
    start = initial * torch.randn(1, batch, layer.hidden_size, dtype=torch.float64)
    with torch.no_grad(), grutrace.trace(layer, record=EVERYTHING) as trace:
        layer(torch.randn(steps, batch, 1, dtype=torch.float64), start)
    return trace


@each_set
@pytest.mark.usefixtures("instruction_set")
def test_the_exponents_add_up_to_the_log_determinants() -> None:
    """With changing weights, continued sequences and both directions."""
    trace = sites.in_memory()
    for name in trace.sites:
        site = trace[name]
        logs = [
            np.linalg.slogdet(jacobian(site, number, step)).logabsdet
            for number in range(len(site))
            for step in range(len(site.sequence(number)))
        ]
        result = lyapunov(site, count=100, skip=0)
        assert result.steps == len(logs)
        assert len(result.exponents) == result.units
        np.testing.assert_allclose(result.exponents.sum(), np.mean(logs), rtol=1e-9)
        assert (np.diff(result.exponents) <= 0).all()


def test_a_linear_network_has_the_eigenvalues_of_its_jacobian() -> None:
    """At h = 0 without input, J = z + (1 - z) r W_hn is constant."""
    units = 12
    layer = random_layer(units, 1.0)
    with torch.no_grad():
        weight = layer.weight_hh_l0[2 * units :]
        weight.copy_(weight + weight.T)
        layer.bias_hh_l0[:units] = 0.7
        layer.bias_ih_l0[units : 2 * units] = -0.4
        with grutrace.trace(layer) as trace:
            layer(torch.zeros(3000, 1, dtype=torch.float64))
    z, r = 1 / (1 + np.exp(0.4)), 1 / (1 + np.exp(-0.7))
    step = z * np.eye(units) + (1 - z) * r * weight.detach().numpy()
    expected = np.sort(np.log(np.abs(np.linalg.eigvalsh(step))))[::-1]
    result = lyapunov(trace["l0"], count=units)
    np.testing.assert_allclose(result.exponents, expected, atol=2e-3)
    assert result.largest == result.exponents[0]
    # Control: of another z they are others.
    other = np.sort(np.log(np.abs(np.linalg.eigvalsh(step + 0.05 * np.eye(units)))))[::-1]
    assert np.abs(result.exponents - other).max() > 0.02


def growth(layer: nn.GRU, steps: int) -> float:
    """Nats a step by which two runs of PyTorch's own layer, once close, draw apart."""
    torch.manual_seed(1)
    state = 0.5 * torch.randn(1, 1, layer.hidden_size, dtype=torch.float64)
    inputs = torch.randn(steps, 1, 1, dtype=torch.float64)
    size = 1e-7
    other = state + size * torch.nn.functional.normalize(torch.randn_like(state), dim=-1)
    logs = []
    with torch.no_grad():
        for x in inputs.split(5):
            _, state = layer(x, state)
            _, other = layer(x, other)
            apart = (other - state).norm().item()
            logs.append(np.log(apart / size))
            other = state + (other - state) * (size / apart)
    return float(np.mean(logs[len(logs) // 10 :]) / 5)


@pytest.mark.parametrize(("gain", "chaotic"), [(0.3, False), (6.0, True)])
def test_small_weights_forget_and_large_ones_are_chaotic(gain, chaotic) -> None:
    layer = random_layer(64, gain)
    result = lyapunov(run(layer, 1500)["l0"], count=64)
    assert result.chaotic is chaotic
    assert (result.largest > 0) is chaotic
    assert (result.dimension > 0) is (result.entropy_rate > 0) is chaotic
    # As the two runs say. Both are means over the same steps.
    assert result.largest == pytest.approx(growth(layer, 1500), abs=0.1 * abs(result.largest))
    if chaotic:
        # After so many steps a difference of one rounding is as large as the states.
        torch.manual_seed(1)
        start = 0.5 * torch.randn(1, 1, 64, dtype=torch.float64)
        inputs = torch.randn(1500, 1, 1, dtype=torch.float64)
        with torch.no_grad():
            apart = layer(inputs, start)[0] - layer(inputs, start * (1 + 2.0**-52))[0]
        sizes = apart.norm(dim=-1).squeeze() / 8
        assert sizes[: int(0.5 * result.horizon)].max() < 1e-5
        assert sizes[int(2 * result.horizon) :].max() > 0.1
    else:
        assert result.horizon == np.inf


def test_errors_match_independent_steps() -> None:
    """Without recurrent weights J = diag(z), and z is drawn at each step."""
    layer, drawn = random_layer(1, 0.0), []
    with torch.no_grad():
        layer.weight_ih_l0[1] = 1.0
    for seed in range(30):
        torch.manual_seed(seed)
        with torch.no_grad(), grutrace.trace(layer, record=EVERYTHING) as trace:
            layer(torch.randn(200, 4, 1, dtype=torch.float64))
        result = lyapunov(trace["l0"], skip=0)
        logs = np.log(np.asarray(trace["l0"].update))
        assert result.largest == pytest.approx(logs.mean())
        drawn.append((result.largest, result.largest_error))
    means, errors = np.array(drawn).T
    assert errors.mean() == pytest.approx(means.std(ddof=1), rel=0.4)


@each_set
@pytest.mark.parametrize("together", [1, 3000, 10**9])
@pytest.mark.usefixtures("instruction_set")
def test_sequences_together_or_one_by_one(together, monkeypatch) -> None:
    torch.manual_seed(0)
    layer = nn.GRU(2, 6, dtype=torch.float64)
    lengths = torch.tensor([9, 30, 1, 17, 30])
    packed = nn.utils.rnn.pack_padded_sequence(
        torch.randn(30, 5, 2, dtype=torch.float64), lengths, enforce_sorted=False
    )
    with grutrace.trace(layer, record=EVERYTHING) as trace:
        layer(packed)
    site = trace["l0"]
    expected = lyapunov(site, count=6)
    monkeypatch.setattr(growth_sums, "BATCH_BYTES", together)
    assert_same(lyapunov(site, count=6), expected, ORDER)
    assert_same(lyapunov(as_arrays(site), count=6), expected, ORDER)
    # A tenth of each is not counted, rounded up.
    assert expected.steps == 8 + 27 + 0 + 15 + 27


def test_every_kind_of_site_gives_the_same(tmp_path, monkeypatch) -> None:
    check_everywhere(lambda site: lyapunov(site, count=3), tmp_path, monkeypatch)


def test_known_spectra() -> None:
    # The Lorenz attractor: dimension 2.06 (Sprott 2003).
    assert kaplan_yorke(np.array([0.9056, 0.0, -14.5723]), 3) == pytest.approx(2.062, abs=1e-3)
    assert kaplan_yorke(np.array([-0.1, -0.2]), 2) == 0
    assert kaplan_yorke(np.array([0.3, 0.1]), 2) == 2
    assert np.isnan(kaplan_yorke(np.array([0.3, 0.1]), 3))
    assert kaplan_yorke(np.array([0.5, -np.inf]), 2) == 1


@each_set
@pytest.mark.usefixtures("instruction_set")
def test_invalid_input_gives_nan() -> None:
    rows = {name: np.zeros((40, 2)) for name in ("reset", "update", "candidate", "hidden")}
    weights = {"weight_hh": np.zeros((6, 2))}
    lost = lyapunov(SiteArrays(**rows, weights=weights))
    assert lost.exponents.tolist() == [-np.inf, -np.inf]
    assert not lost.chaotic
    rows["update"] = np.full((40, 2), np.nan)
    unknown = lyapunov(SiteArrays(**rows, weights=weights))
    assert np.isnan([*unknown.exponents, unknown.dimension, unknown.entropy_rate]).all()
    assert not unknown.chaotic
    nothing = {name: np.zeros((0, 2)) for name in rows}
    assert np.isnan(lyapunov(SiteArrays(**nothing, lengths=[])).exponents).all()


def test_wrong_options_are_errors() -> None:
    layer = nn.GRU(2, 4)
    with grutrace.trace(layer, units=[0, 2], gates="inline") as trace:
        layer(torch.randn(3, 2))
    with pytest.raises(NotRecordedError, match="has 2 of 4 units"):
        lyapunov(trace["l0"])
    with pytest.raises(OptionError, match="count: expected"):
        lyapunov(trace["l0"], count=0)
    with pytest.raises(OptionError, match="skip: expected"):
        lyapunov(trace["l0"], skip=-1)
    with pytest.raises(OptionError, match="interval: expected a number of steps"):
        lyapunov(trace["l0"], interval=0)


def test_short_sequences_give_no_exponents() -> None:
    """A network that forgets everything makes differences larger for a step or two.

    At h = 0 without input its Jacobian is constant and not normal: eigenvalues of 0.5, and a
    singular value of 4.
    """
    step, keep = np.array([[0.5, 4.0], [0.0, 0.5]]), 0.4
    layer = random_layer(2, 0.0)
    with torch.no_grad():
        layer.bias_ih_l0[2:4] = np.log(keep / (1 - keep))
        layer.weight_hh_l0[4:] = torch.from_numpy((step - keep * np.eye(2)) / (1 - keep))
    results = {}
    for length in (2, 3000):
        with torch.no_grad(), grutrace.trace(layer) as trace:
            layer(torch.zeros(length, 50, 1, dtype=torch.float64))
        results[length] = lyapunov(trace["l0"], skip=0)
    assert results[2].largest > 0.1
    assert results[2].length == 2
    assert results[2].chaotic is None
    assert np.isnan(results[2].horizon)
    # That of many steps is the larger eigenvalue's; a double one is neared as log(n) / n.
    assert results[3000].largest == pytest.approx(np.log(0.5), abs=np.log(3000 * 8) / 3000)
    assert results[3000].chaotic is False
    assert results[3000].horizon == np.inf


def count_intervals(monkeypatch, site, **options) -> tuple[module.Lyapunov, int]:
    """Exponents, and the number of intervals that NumPy's path took."""
    calls = 0
    qr = np.linalg.qr

    def counting(matrices):
        nonlocal calls
        calls += matrices.ndim == 3
        return qr(matrices)

    with monkeypatch.context() as patch:
        patch.setattr(np.linalg, "qr", counting)
        return lyapunov(site, **options), calls


@each_set
@pytest.mark.parametrize("gain", [0.5, 6.0])
def test_the_interval_does_not_matter(gain, monkeypatch, instruction_set) -> None:
    """A QR at every step, at chosen steps, and after too many."""
    site = run(random_layer(24, gain), 400, batch=3)["l0"]
    for count in (1, 4, 17, 24):
        expected, all_steps = count_intervals(monkeypatch, site, count=count, interval=1)
        found, qrs = count_intervals(monkeypatch, site, count=count)
        # The compiled library does both without NumPy's QR.
        assert all_steps == (400 if instruction_set == "none" else 0)
        assert qrs < all_steps or instruction_set != "none"
        for name in ("exponents", "errors", "drift"):
            np.testing.assert_allclose(getattr(found, name), getattr(expected, name), atol=1e-10)
    if gain > 1:
        # Control: after so many steps the smallest directions have lost their digits.
        lost = lyapunov(site, count=24, interval=200)
        assert np.abs(lost.exponents - expected.exponents).max() > 1e-9


@each_set
@pytest.mark.usefixtures("instruction_set")
def test_steps_that_lost_digits_are_repeated(monkeypatch) -> None:
    site = run(random_layer(24, 6.0), 400)["l0"]
    expected = lyapunov(site, count=24, interval=1)
    # It always tries the longest interval.
    monkeypatch.setattr(growth_sums, "SPREAD", np.inf)
    found = lyapunov(site, count=24)
    np.testing.assert_allclose(found.exponents, expected.exponents, atol=1e-10)
    # Control: it takes what it gets.
    monkeypatch.setattr(growth_sums, "MAX_SPREAD", np.inf)
    assert np.abs(lyapunov(site, count=24).exponents - expected.exponents).max() > 1e-7


def test_the_drift_is_that_between_the_halves() -> None:
    """Without recurrent weights the exponents are the means of log z."""
    update = np.full((400, 1), 0.9)
    update[200:] = 0.1
    rows = {name: np.zeros((400, 1)) for name in ("reset", "candidate", "hidden")}
    site = SiteArrays(**rows, update=update, weights={"weight_hh": np.zeros((3, 1))})
    result = lyapunov(site, skip=0)
    assert result.drift == pytest.approx(np.log(0.1 / 0.9))
    assert result.exponents == pytest.approx(np.log(update).mean())


def test_sequences_on_several_threads(monkeypatch) -> None:
    site = run(random_layer(16, 4.0), 60, batch=7)["l0"]
    expected = lyapunov(site, count=5)
    monkeypatch.setattr(module, "PART_VALUES", 1000)
    assert_same(lyapunov(site, count=5), expected, ORDER)
