"""Tests of fixed points, against theory; the map and its Jacobian against nn.GRUCell."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import grutrace
from grutrace.analysis.dynamics import fixed_points as module
from grutrace.analysis.dynamics.fixed_points import FIXED_Q, fixed_points
from grutrace.analysis.dynamics.gru_map import GRUMap
from grutrace.analysis.dynamics.slow_points import minimise
from grutrace.analysis.engine.site_data import SiteArrays, as_site_data
from grutrace.errors import NotRecordedError, OptionError
from tests.analysis import sites
from tests.analysis.everywhere import check_everywhere

#: The solution of x = tanh(2 x) above 0, by bisection in the test below.
UPPER = 0.957504


def weights_of(cell: nn.Module) -> dict[str, np.ndarray]:
    return {
        name.removesuffix("_l0"): value.detach().numpy() for name, value in cell.named_parameters()
    }


def cell_of(units: int) -> nn.GRUCell:
    """No weights: r = z = 1/2, n = 0."""
    cell = nn.GRUCell(1, units).double()
    with torch.no_grad():
        for parameter in cell.parameters():
            parameter.zero_()
    return cell


def arrays_of(cell: nn.Module, states: np.ndarray) -> SiteArrays:
    return SiteArrays(hidden=states, weights=weights_of(cell))


@pytest.mark.parametrize("bias", [True, False])
def test_the_map_and_its_jacobian_equal_those_of_grucell(bias) -> None:
    torch.manual_seed(0)
    cell = nn.GRUCell(3, 5, bias=bias).double()
    x, states = torch.randn(3).double(), torch.randn(4, 5).double()
    step = GRUMap(weights_of(cell), x.numpy())
    expected = cell(x.expand(4, 3), states)
    np.testing.assert_allclose(step(states.numpy()), expected.detach(), atol=1e-14)
    jacobian = torch.func.vmap(torch.func.jacrev(lambda h: cell(x[None], h[None])[0]))(states)
    np.testing.assert_allclose(step.jacobian(states.numpy()), jacobian.detach(), atol=1e-13)


def bistable(units: int = 1) -> nn.GRUCell:
    """n = tanh(2 h), z = 1/2: each unit has fixed points at 0 and at plus and minus UPPER."""
    cell = cell_of(units)
    with torch.no_grad():
        # The reset gate is 1/2 too.
        cell.weight_hh[2 * units :] = 4 * torch.eye(units)
    return cell


def test_known_points_and_their_eigenvalues() -> None:
    low, high = 0.5, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if np.tanh(2 * middle) > middle else (low, middle)
    assert low == pytest.approx(UPPER, abs=1e-6)
    states = np.random.default_rng(0).uniform(-1, 1, (60, 1))
    result = fixed_points(arrays_of(bistable(), states))
    assert result.fixed.all()
    assert sorted(np.round(result.states[:, 0], 6)) == pytest.approx([-UPPER, 0, UPPER], abs=2e-6)
    assert result.reached.sum() == result.starts == 60
    by_state = dict(zip(np.round(result.states[:, 0], 3) + 0.0, result.points, strict=True))
    # dF/dh = 1/2 + 1/2 * 2 (1 - n^2).
    upper = by_state[0.958]
    assert result.radius[by_state[0.0]] == pytest.approx(1.5)
    assert result.radius[upper] == pytest.approx(0.5 + 1 - UPPER**2, abs=1e-5)
    assert result.unstable[by_state[0.0]] == 1
    assert not result.stable[by_state[0.0]]
    assert result.stable[upper]
    assert result.timescale[upper] == pytest.approx(-1 / np.log(result.radius[upper]))
    assert (result.fixed_points, result.stable_points) == (3, 2)
    assert result.nearest.max() < 0.1


def test_saddles_of_several_units() -> None:
    states = np.random.default_rng(0).uniform(-1, 1, (400, 2))
    result = fixed_points(arrays_of(bistable(2), states), starts=400)
    assert len(result.points) == 9
    assert sorted(result.unstable.tolist()) == [0, 0, 0, 0, 1, 1, 1, 1, 2]


#: A start in the basin of each stable point of three units.
CORNERS = 0.5 * np.array(np.meshgrid(*3 * [[-1.0, 1.0]])).reshape(3, -1).T


def test_saddles_between_stable_points_are_found_from_starts_at_these_alone() -> None:
    """Each unit is at 0, where it is unstable, or at one of two stable places."""
    points = fixed_points(arrays_of(bistable(3), CORNERS), starts=CORNERS)
    assert (points.fixed_points, points.stable_points) == (27, 8)
    assert np.bincount(points.unstable).tolist() == [8, 12, 6, 1]
    np.testing.assert_array_equal((np.abs(points.states) < 1e-6).sum(1), points.unstable)
    assert points.reached.sum() == 8
    assert (points.reached[points.unstable > 0] == 0).all()


def test_control_without_midpoints_there_are_no_saddles(monkeypatch) -> None:
    monkeypatch.setattr(module, "ROUNDS", 0)
    points = fixed_points(arrays_of(bistable(3), CORNERS), starts=CORNERS)
    assert (points.fixed_points, points.stable_points) == (8, 8)


def test_no_midpoints_of_a_line_are_searched(monkeypatch) -> None:
    """A line of points would grow from each search to the next."""
    cell = cell_of(2)
    with torch.no_grad():
        cell.weight_hh[5, 1] = 4.0
        cell.bias_hh[2] = 60.0  # the first unit keeps its state
    starts = np.array([[-0.5, 0.5], [0.5, -0.5], [0.2, 0.4]])
    points = fixed_points(arrays_of(cell, starts), starts=starts)
    assert (points.marginal == 1).all()
    assert (points.reached > 0).all()


def test_a_line_of_fixed_points_is_found() -> None:
    cell = cell_of(3)
    with torch.no_grad():
        # The first unit keeps whatever it has (z = 1); the others forget by half a step.
        cell.bias_ih[3] = 800
    states = np.random.default_rng(0).uniform(-1, 1, (40, 3))
    result = fixed_points(arrays_of(cell, states))
    assert result.fixed.all()
    # Each state ends at its own place on the line, and nowhere off it.
    assert len(result.points) > 30
    np.testing.assert_allclose(result.states[:, 1:], 0, atol=1e-7)
    assert set(np.round(result.states[:, 0], 6)) <= set(np.round(states[:, 0], 6))
    assert (result.marginal == 1).all()
    assert (result.unstable == 0).all()
    assert not result.stable.any()
    np.testing.assert_allclose(result.eigenvalues, np.tile([1, 0.5, 0.5], (len(result.points), 1)))
    assert np.isinf(result.timescale).all()


def test_a_slow_point_is_not_a_fixed_point() -> None:
    cell = bistable()
    with torch.no_grad():
        # Past the fold the two upper points are gone, and a ghost of them is left.
        cell.bias_ih[2] = 0.55
    states = np.linspace(-1, 1, 41)[:, np.newaxis]
    result = fixed_points(arrays_of(cell, states), slow=1e-2)
    assert result.fixed.tolist() == [True, False]
    assert result.q[0] <= FIXED_Q < result.q[1]
    ghost = result.states[1, 0]
    fine = np.linspace(-1, 0, 100_001)
    speed = np.abs(np.tanh(0.55 + 2 * fine) - fine) / 2
    assert ghost == pytest.approx(fine[speed.argmin()], abs=1e-3)
    assert result.speed[1] == pytest.approx(speed.min(), rel=1e-6)
    # The control: asked for fixed points alone, it is none.
    assert len(fixed_points(arrays_of(cell, states), slow=FIXED_Q).points) == 1


def test_weights_like_those_of_a_trained_network() -> None:
    torch.manual_seed(3)
    layer = nn.GRU(2, 24)
    with torch.no_grad():
        layer.weight_hh_l0 *= 4
    with grutrace.trace(layer, record=("hidden", "input")) as trace:
        layer(torch.randn(200, 4, 2) + 0.5)
    result = fixed_points(trace["l0"], "mean", starts=40)
    mean = np.asarray(trace["l0"].input).mean(0)
    np.testing.assert_allclose(result.input, mean, rtol=1e-5)
    assert result.fixed_points > 0
    cell = nn.GRUCell(2, 24).double()
    cell.load_state_dict({k.removesuffix("_l0"): v for k, v in layer.state_dict().items()})
    x = torch.tensor(result.input)[None]
    for point in np.flatnonzero(result.fixed)[:5]:
        state = torch.tensor(result.states[point])
        with torch.no_grad():
            moved = (cell(x, state[None])[0] - state).norm().item()
        assert moved == pytest.approx(result.speed[point], abs=1e-12)
        assert moved < 1e-7
        jacobian = torch.func.jacrev(lambda h: cell(x, h[None])[0])(state).detach()
        expected = np.sort(np.abs(np.linalg.eigvals(jacobian.numpy())))[::-1]
        np.testing.assert_allclose(np.abs(result.eigenvalues[point]), expected, rtol=1e-6)


def test_the_version_of_the_weights() -> None:
    site = sites.in_memory()["encoder.l0"]
    first, last = (fixed_points(site, version=version) for version in (0, -1))
    assert np.abs(first.states[0] - last.states[0]).max() > 1e-3
    np.testing.assert_array_equal(fixed_points(site, version=2).states, last.states)


def test_states_with_nan_are_skipped() -> None:
    states = np.random.default_rng(0).uniform(-1, 1, (10, 1))
    states[3] = np.nan
    assert fixed_points(arrays_of(bistable(), states)).starts == 9
    with pytest.raises(OptionError, match="no finite state"):
        fixed_points(arrays_of(bistable(), np.full((2, 1), np.nan)))
    with pytest.raises(OptionError, match="no finite state"):
        fixed_points(arrays_of(bistable(), np.zeros((0, 1))))


def test_wrong_input_is_an_error() -> None:
    arrays = arrays_of(bistable(2), np.zeros((3, 2)))
    with pytest.raises(OptionError, match=r"input: expected shape \(1,\), found \(2,\)"):
        fixed_points(arrays, np.zeros(2))
    with pytest.raises(OptionError, match="'mean' or None; found 'zero'"):
        fixed_points(arrays, "zero")
    with pytest.raises(OptionError, match=r"starts: expected shape \(K, 2\)"):
        fixed_points(arrays, starts=np.zeros((4, 3)))
    with pytest.raises(NotRecordedError, match="no 'input'"):
        fixed_points(arrays, "mean")
    with pytest.raises(NotRecordedError, match="no weights"):
        fixed_points(SiteArrays(hidden=np.zeros((3, 2))))
    layer = nn.GRU(1, 4)
    with grutrace.trace(layer, record=("hidden",), units=[0, 2], gates="inline") as trace:
        layer(torch.randn(5, 1))
    with pytest.raises(NotRecordedError, match="states of 2 of 4 units"):
        fixed_points(trace["l0"])
    assert fixed_points(trace["l0"], starts=np.zeros((1, 4))).starts == 1


def test_the_input_is_no_column() -> None:
    result = fixed_points(arrays_of(bistable(), np.zeros((1, 1))))
    assert "input" not in result.columns()
    assert next(iter(result.columns())) == "point"


def test_every_kind_of_site_gives_the_same(tmp_path, monkeypatch) -> None:
    # States of one's own, since as arrays a site may have its rows in another order.
    def analyse(site):
        states = np.random.default_rng(0).uniform(-1, 1, (3, len(as_site_data(site).units)))
        return fixed_points(site, "mean", starts=states, slow=FIXED_Q)

    check_everywhere(analyse, tmp_path, monkeypatch)


def test_a_slow_point_has_an_eigenvalue_of_one() -> None:
    # Where q is smallest and not 0, its gradient (J - 1)^T (F(h) - h) is.
    cell = bistable()
    with torch.no_grad():
        cell.bias_ih[2] = 0.55
    result = fixed_points(arrays_of(cell, np.full((1, 1), -0.5)), slow=1e-2)
    assert not result.fixed[0]
    assert result.radius[0] == pytest.approx(1, abs=1e-4)


def test_points_lie_within_the_reachable_states() -> None:
    """Far out, z is near 1 and every point looks slow: an unbounded search would go there."""
    torch.manual_seed(0)
    cell = nn.GRUCell(1, 24).double()
    with torch.no_grad():
        cell.weight_hh.mul_(12)
    states = np.random.default_rng(0).uniform(-1, 1, (32, 24))
    result = fixed_points(arrays_of(cell, states), starts=states, slow=1.0)
    assert len(result.states)
    assert np.abs(result.states).max() <= 1
    # Control: without the walls it does.
    let_go = minimise(GRUMap(weights_of(cell), np.zeros(1)), states, limit=np.inf)
    assert np.abs(let_go).max() > 2


def ring() -> nn.GRUCell:
    """z = 0 and r = 1: each unit passes tanh(2 h) to the next of three."""
    cell = cell_of(3)
    with torch.no_grad():
        cell.bias_ih[:3] = 800
        cell.bias_ih[3:6] = -800
        cell.weight_hh[6:] = 2 * torch.eye(3).roll(1, 0)
    return cell


def test_cycles_of_three_steps() -> None:
    """F^3 maps each unit to itself by f(f(f(h))), so each is at 0 or at plus or minus UPPER."""
    # Cubed, so that some start near 0, where few of the others do.
    states = np.random.default_rng(0).uniform(-1, 1, (600, 3)) ** 3
    result = fixed_points(arrays_of(ring(), states), starts=states, period=3, slow=FIXED_Q)
    np.testing.assert_allclose(np.abs(result.states[np.abs(result.states) > 0.5]), UPPER, atol=1e-5)
    # Of the 27 points of F^3, 3 have equal units and are fixed; the others are 8 cycles.
    assert sorted(result.periods.tolist()) == [1] * 3 + [3] * 8
    assert result.reached.sum() == 600
    assert (result.period, result.fixed_points) == (3, 11)
    # The Jacobian of F^3 is diagonal: each value passes the same slope three times.
    slopes = 2 * (1 - np.tanh(2 * result.states) ** 2)
    np.testing.assert_allclose(result.radius, (slopes**3).max(1), rtol=1e-4)
    np.testing.assert_allclose(result.timescale, 3 / np.abs(np.log(result.radius)))
    # Control: one step maps only three states to themselves.
    assert len(fixed_points(arrays_of(ring(), states), starts=states, slow=FIXED_Q).points) == 3
    with pytest.raises(OptionError, match="period: expected a number of steps, 1 or more; found 0"):
        fixed_points(arrays_of(ring(), states), period=0)


def test_thousands_of_starts() -> None:
    states = np.random.default_rng(0).uniform(-1, 1, (5000, 4))
    result = fixed_points(arrays_of(bistable(4), states), starts=states)
    assert len(result.points) == 3**4
    assert result.reached.sum() == 5000
    assert np.bincount(result.unstable).tolist() == [16, 32, 24, 8, 1]
