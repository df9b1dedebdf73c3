"""Tests of the mean age of a state's information, against explicit weights and known gates."""

from __future__ import annotations

import numpy as np
import pytest

from grutrace.analysis.engine.site_data import SiteArrays
from grutrace.analysis.memory import age as module
from grutrace.analysis.memory.age import state_age
from grutrace.errors import NotRecordedError
from tests.analysis import sites
from tests.analysis.everywhere import as_arrays, assert_same, check_everywhere


def written_out(update: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(T, H) ages and (H,) what is left of the beginning, of gates in the order of the steps."""
    update, ages = update.astype(np.float64), []
    for step in range(len(update)):
        weights = [
            (1 - update[past]) * np.prod(update[past + 1 : step + 1], axis=0)
            for past in range(step + 1)
        ]
        beginning = np.prod(update[: step + 1], axis=0)
        np.testing.assert_allclose(sum(weights) + beginning, 1)
        ages.append(
            sum(weight * (step - past) for past, weight in enumerate(weights))
            + beginning * (step + 1)
        )
    return np.array(ages), beginning


@pytest.mark.parametrize("chunk", [1, 3, 64])
def test_equals_the_weights_written_out(chunk, monkeypatch) -> None:
    monkeypatch.setattr(module, "CHUNK_STEPS", chunk)
    trace = sites.in_memory()
    for name in trace.sites:
        site, ages, ends, remaining = trace[name], [], [], []
        for sequence in site:
            result, beginning = written_out(sequence.update[:: -1 if site.site.reverse else 1])
            ages.append(result)
            ends.append(result[-1])
            remaining.append(beginning)
        result = state_age(site)
        np.testing.assert_allclose(result.age, np.concatenate(ages).mean(0))
        np.testing.assert_allclose(result.age_at_end, np.mean(ends, axis=0))
        np.testing.assert_allclose(result.initial_left, np.mean(remaining, axis=0))


def test_a_constant_gate() -> None:
    gate = np.array([0.0, 0.5, 0.9, 0.99, 1.0])
    result = state_age(SiteArrays(update=np.tile(gate, (5000, 1))))
    np.testing.assert_allclose(result.age_at_end[:4], gate[:4] / (1 - gate[:4]))
    assert result.age_at_end[4] == 5000
    # The second is smaller than any number.
    expected = [0, 0, gate[2] ** 5000, gate[3] ** 5000, 1]
    np.testing.assert_allclose(result.initial_left, expected, rtol=1e-11)
    # Half a step less than the timescale, or nearly so.
    assert result.age_at_end[3] == pytest.approx(-1 / np.log(0.99) - 0.5, rel=1e-3)


@pytest.mark.parametrize("together", [1, 10**9])
def test_every_kind_of_site_gives_the_same(together, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(module, "BATCH_BYTES", together)
    check_everywhere(state_age, tmp_path, monkeypatch)
    site = sites.in_memory()["encoder.l1_reverse"]
    assert_same(state_age(as_arrays(site)), state_age(site), 1e-11)


def test_control_the_other_direction_has_another_age() -> None:
    update = np.linspace(0, 0.9, 50)[:, np.newaxis]
    ages = [state_age(SiteArrays(update=update, reverse=way)).age_at_end for way in (False, True)]
    assert ages[0] > 3 * ages[1]


def test_invalid_input_gives_nan() -> None:
    update = np.full((10, 2), 0.5)
    update[3, 0] = np.nan
    result = state_age(SiteArrays(update=update, lengths=[5, 0, 5]))
    assert np.isnan(result.age[0])
    assert np.isfinite(result.age[1])
    assert result.sequences == 2
    nothing = state_age(SiteArrays(update=np.zeros((0, 2)), lengths=[]))
    assert np.isnan(nothing.age_at_end).all()
    with pytest.raises(NotRecordedError, match="no 'update'"):
        state_age(SiteArrays(hidden=np.zeros((2, 1))))
