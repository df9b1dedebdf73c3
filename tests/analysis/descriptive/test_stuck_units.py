"""Tests of `stuck_units`: planted units are found, and noise gives no more than the level."""

from __future__ import annotations

import numpy as np
import pytest

from grutrace.analysis import SiteArrays, saturation, stuck_units
from grutrace.analysis.descriptive import stuck_units as module
from grutrace.errors import NotRecordedError
from tests.analysis.everywhere import check_everywhere


def arrays(random, sequences=60, length=20, units=10):
    """Gates and states that are uniform, and the same all along a sequence but for some noise."""
    shape = sequences * length, units
    level = np.repeat(random.uniform(0.05, 0.95, (sequences, units)), length, axis=0)
    update = np.clip(level + random.normal(0, 0.02, shape), 0, 1)
    hidden = random.uniform(-0.9, 0.9, shape)
    return SiteArrays(update=update, hidden=hidden, lengths=[length] * sequences)


def test_planted_units_are_found_and_no_others() -> None:
    site = arrays(np.random.default_rng(0))
    site.update[:, 3], site.update[:, 7], site.hidden[:, 5] = 0.97, 0.02, 0.25
    site.update[::17, 3] = 0.5  # One step of some sequences.
    site.update[5:1100, 1] = 0.97  # Not in the last sequences.
    found = stuck_units(site)
    assert found.stuck["update"].tolist() == [0, 0, 0, 0, 0, 0, 0, -1, 0, 0]
    assert np.flatnonzero(found.constant).tolist() == [5]
    site.update[:, 3] = 0.97
    assert stuck_units(site).stuck["update"][3] == 1
    assert found.samples == 60
    assert found.enough
    # Shares are those of the sequences, from NumPy.
    parts = site.update.reshape(60, 20, 10) > 0.9
    expected = (parts.sum(1) >= 0.99 * 20).mean(0)
    np.testing.assert_allclose(stuck_units(site).right_share["update"], expected)


def test_a_few_sequences_are_not_enough() -> None:
    site = arrays(np.random.default_rng(0), sequences=12)
    site.update[:, 3] = 0.97
    found = stuck_units(site)
    assert not found.enough
    assert not found.stuck["update"].any()
    assert saturation(site).stuck["update"][3] == 1  # Control: in these steps it is stuck.


def test_long_sequences_are_divided() -> None:
    site = arrays(np.random.default_rng(0), sequences=2, length=2000)
    site.update[:, 3] = 0.97
    found = stuck_units(site)
    assert found.samples == 80
    assert found.stuck["update"][3] == 1


def test_under_noise_no_more_than_the_level_is_found() -> None:
    """Units that are stuck in 80 % of the sequences: at 5 %, 60 traces give more than 9 in 1 %."""
    random, false = np.random.default_rng(1), 0
    for _ in range(60):
        site = arrays(random, sequences=80, length=5)
        stuck = np.repeat(random.uniform(size=(80, 10)) < module.TYPICAL, 5, axis=0)
        site.update[stuck] = 0.95
        site.update[~stuck] = 0.5
        found = stuck_units(site)
        false += bool(found.stuck["update"].any() or found.constant.any())
    assert false <= 9


def test_control_uncorrected_p_values_find_too_much() -> None:
    random, false = np.random.default_rng(1), 0
    for _ in range(60):
        stuck = random.binomial(80, module.TYPICAL, 30)
        false += bool((module.binomial_tail(stuck, 80, module.TYPICAL) < 0.05).any())
    assert false > 20


def test_it_is_the_same_everywhere(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(module, "PART_STEPS", 4)
    check_everywhere(stuck_units, tmp_path, monkeypatch)


def test_nan_is_neither_stuck_nor_constant() -> None:
    site = arrays(np.random.default_rng(0))
    site.update[:], site.hidden[:] = np.nan, np.nan
    found = stuck_units(site)
    assert not found.stuck["update"].any()
    assert not found.constant.any()


def test_an_empty_site_has_no_samples() -> None:
    found = stuck_units(SiteArrays(update=np.zeros((0, 2)), lengths=[]))
    assert (found.samples, found.enough) == (0, False)
    with pytest.raises(NotRecordedError):
        stuck_units(SiteArrays(input=np.zeros((3, 2))))
