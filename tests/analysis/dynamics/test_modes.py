"""Tests of the modes near a state, against runs of nn.GRUCell."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from grutrace.analysis.dynamics.fixed_points import fixed_points
from grutrace.analysis.dynamics.modes import modes
from grutrace.analysis.engine.site_data import SiteArrays
from grutrace.errors import OptionError


def make() -> tuple[nn.GRUCell, SiteArrays]:
    torch.manual_seed(0)
    cell = nn.GRUCell(2, 6).double()
    weights = {name: value.detach().numpy() for name, value in cell.named_parameters()}
    return cell, SiteArrays(hidden=np.zeros((1, 6)), weights=weights)


def test_amplitudes_decay_and_follow_the_input() -> None:
    cell, site = make()
    x = np.array([0.3, -0.2])
    points = fixed_points(site, x, starts=np.zeros((1, 6)))
    assert points.fixed.all()
    at = points.states[0]
    found = modes(site, at, x)
    np.testing.assert_allclose(found.eigenvalues, points.eigenvalues[0])
    np.testing.assert_allclose(found.left @ found.right, np.eye(6), atol=1e-10)

    def advance(h, u):
        with torch.no_grad():
            return cell(torch.tensor(u)[None], torch.tensor(h)[None])[0].numpy()

    small = 1e-6
    for mode in range(6):
        before = at + small * found.right[:, mode].real
        change = (advance(before, x) - at) / small
        expected = (found.eigenvalues[mode] * found.right[:, mode]).real
        np.testing.assert_allclose(change, expected, atol=1e-5)
    # A step with another input moves the amplitudes as said.
    u = np.array([0.7, 1.1])
    amplitudes = found.left @ (advance(at, x + small * u) - at) / small
    np.testing.assert_allclose(amplitudes, found.input_directions @ u, atol=1e-4)
    # Control: the right eigenvectors do not say so.
    assert (
        np.abs(found.right.T @ (advance(at, x + small * u) - at) / small - amplitudes).max() > 0.1
    )
    np.testing.assert_allclose(found.input_gain, np.linalg.norm(found.input_directions, axis=1))


def test_time_constants_and_turns() -> None:
    """Without reset and with z = 1/2, J = 1/2 + W / 2 at h = 0: a rotation by a known angle."""
    angle, size = 2 * np.pi / 12, 0.9
    turn = size * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    weight_hh = np.zeros((6, 2))
    weight_hh[4:] = 2 * (2 * turn - np.eye(2))
    site = SiteArrays(
        hidden=np.zeros((1, 2)), weights={"weight_ih": np.zeros((6, 1)), "weight_hh": weight_hh}
    )
    found = modes(site, np.zeros(2))
    np.testing.assert_allclose(np.abs(found.eigenvalues), size)
    np.testing.assert_allclose(found.timescale, -1 / np.log(size))
    np.testing.assert_allclose(found.rotation, 12)
    assert list(found.columns()) == ["mode", "eigenvalues", "timescale", "rotation", "input_gain"]
    assert "right" not in found.to_dict()


def test_wrong_input_is_an_error() -> None:
    _, site = make()
    with pytest.raises(OptionError, match=r"state: expected shape \(6,\), found \(5,\)"):
        modes(site, np.zeros(5))
    with pytest.raises(OptionError, match=r"input: expected shape \(2,\), found \(3,\)"):
        modes(site, np.zeros(6), np.zeros(3))
    with pytest.raises(OptionError, match="state: expected finite numbers"):
        modes(site, np.full(6, np.nan))
