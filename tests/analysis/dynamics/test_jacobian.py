"""Tests of Jacobians, against automatic differentiation of nn.GRUCell."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import grutrace
from grutrace.analysis.dynamics.jacobian import factors, jacobian, jacobians, step_jacobians
from grutrace.analysis.engine.site_data import SiteArrays
from grutrace.errors import NotRecordedError, OptionError
from tests.analysis import sites
from tests.analysis.everywhere import as_arrays, check_everywhere
from tests.checks import EVERYTHING


def cell_of(weights: dict[str, np.ndarray]) -> nn.GRUCell:
    """A cell in float64 with recorded weights."""
    weight_ih = weights["weight_ih"]
    cell = nn.GRUCell(weight_ih.shape[1], weight_ih.shape[0] // 3, "bias_ih" in weights).double()
    with torch.no_grad():
        for name, value in weights.items():
            getattr(cell, name).copy_(torch.from_numpy(np.array(value)))
    return cell


def differentiated(cell: nn.GRUCell, x: np.ndarray, before: np.ndarray) -> np.ndarray:
    x_, before_ = (torch.from_numpy(values.astype(np.float64)) for values in (x, before))
    return torch.func.jacrev(lambda h: cell(x_, h))(before_).detach().numpy()


def check_all_steps(site, tolerance: float) -> int:
    """Compare every step of every sequence; return how many there were."""
    versions, count = site.row_versions(slice(None)), 0
    for number, sequence in enumerate(site):
        rows = np.arange(site.extent.rows)[site.rows_between(number, number + 1)]
        for step in range(len(sequence)):
            cell = cell_of(site.weights(int(versions[rows[step]])))
            expected = differentiated(cell, sequence.input[step], sequence.previous[step])
            result = jacobian(site, number, step)
            np.testing.assert_allclose(result, expected, atol=tolerance)
            count += 1
    return count


def test_equals_automatic_differentiation(tmp_path) -> None:
    """With changing weights, continued sequences and both directions. Gates are in float32."""
    trace = sites.in_memory()
    for name in ("encoder.l1_reverse", "decoder.rnn.l1"):
        assert check_all_steps(trace[name], 1e-4) == trace[name].extent.rows > 50
    with sites.in_a_file(tmp_path / "deferred.h5", "deferred") as file:
        check_all_steps(file["decoder.rnn.l1"], 1e-4)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("scale", [0.3, 1.0, 30.0])
def test_of_any_weights_in_float64(bias, scale) -> None:
    torch.manual_seed(0)
    layer = nn.GRU(3, 6, bias=bias, bidirectional=True, dtype=torch.float64)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(0, scale)
    initial = 3 * torch.randn(2, 2, 6, dtype=torch.float64)
    with grutrace.trace(layer, record=EVERYTHING) as trace:
        layer(torch.randn(5, 2, 3, dtype=torch.float64), initial)
    for name in trace.sites:
        assert check_all_steps(trace[name], 1e-10 * scale) == 10


def test_control_a_missing_term_is_detected() -> None:
    site = sites.in_memory()["encoder.l0"]
    sequence = site.sequence(0)
    gates = {name: sequence.rows(name) for name in ("reset", "update", "candidate")}
    weights = site.weights(0)
    of = factors(gates, sequence.previous, weights)
    expected = jacobians(of, weights)
    for name in of._fields:
        without = of._replace(**{name: np.zeros_like(of.keep)})
        assert np.abs(jacobians(without, weights) - expected).max() > 1e-3


def test_steps_of_a_site() -> None:
    site = sites.in_memory()["encoder.l1_reverse"]
    result = step_jacobians(site, 20)
    lengths = site.lengths
    assert len(result.steps) == 20
    rows = (np.cumsum(lengths) - lengths)[result.sequences] + result.steps
    assert np.ptp(np.diff(rows)) <= 1
    assert rows[0] < 4
    assert lengths.sum() - rows[-1] < 5
    for number, (sequence, step) in enumerate(zip(result.sequences, result.steps, strict=True)):
        expected = jacobian(site, int(sequence), int(step))
        assert result.radius[number] == pytest.approx(np.abs(np.linalg.eigvals(expected)).max())
        assert result.norm[number] == pytest.approx(np.linalg.norm(expected, 2))
        shrinking = np.linalg.slogdet(expected).logabsdet / 5
        assert result.shrinking[number] == pytest.approx(shrinking)
    assert len(step_jacobians(site, 10**6).steps) == lengths.sum()
    assert list(result.columns()) == ["step", "sequences", "radius", "norm", "shrinking"]


def test_every_kind_of_site_gives_the_same(tmp_path, monkeypatch) -> None:
    check_everywhere(lambda site: step_jacobians(site, 10), tmp_path, monkeypatch)
    site = sites.in_memory()["encoder.l1_reverse"]
    np.testing.assert_array_equal(jacobian(as_arrays(site, 0), 0, -1), jacobian(site, 0, -1))


def test_wrong_options_are_errors() -> None:
    torch.manual_seed(0)
    layer = nn.GRU(2, 4)
    with grutrace.trace(layer, units=[0, 2], gates="inline") as part:
        layer(torch.randn(3, 2))
    with pytest.raises(NotRecordedError, match="has 2 of 4 units, and this analysis needs all"):
        jacobian(part["l0"], 0, 0)
    with grutrace.trace(layer, record=("update", "hidden")) as no_gates:
        layer(torch.randn(3, 2))
    with pytest.raises(NotRecordedError, match="no 'reset'"):
        step_jacobians(no_gates["l0"])
    with grutrace.trace(layer) as trace:
        layer(torch.randn(3, 2))
    with pytest.raises(NotRecordedError, match=r"sequence 0 of .* has no step 3; it has 3"):
        jacobian(trace["l0"], 0, 3)
    with pytest.raises(NotRecordedError, match="has no sequence 1; it has 1"):
        jacobian(trace["l0"], 1, 0)
    with pytest.raises(OptionError, match="most: expected a number of steps, 1 or more; found 0"):
        step_jacobians(trace["l0"], 0)


def test_empty_input_and_nan() -> None:
    nothing = {name: np.zeros((0, 2)) for name in ("reset", "update", "candidate", "hidden")}
    assert len(step_jacobians(SiteArrays(**nothing, lengths=[])).radius) == 0
    rows = {name: np.full((2, 2), np.nan) for name in nothing}
    weights = {"weight_hh": np.ones((6, 2))}
    result = step_jacobians(SiteArrays(**rows, weights=weights))
    assert np.isnan(result.radius).all()
    zeros = {name: np.zeros((1, 2)) for name in nothing}
    # z = 0, n = 0, r = 0: nothing is kept and nothing is passed on.
    result = step_jacobians(SiteArrays(**zeros, weights=weights))
    assert (result.radius, result.norm, result.shrinking) == (0, 0, -np.inf)
