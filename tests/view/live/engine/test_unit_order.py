"""Orders of units against what was planted."""

from __future__ import annotations

import numpy as np
import pytest

from grutrace.errors import OptionError
from grutrace.storage.read.lazy_rows import MemoryRows
from grutrace.view.live.engine import unit_order as unit_order_module
from grutrace.view.live.engine.unit_order import unit_order
from tests.view.live.engine.test_window import OneSequence


def waves(steps: int = 20_000) -> np.ndarray:
    """Units that follow one of three independent signals, in a shuffled order, (steps, 30)."""
    random = np.random.default_rng(0)
    signals = random.normal(size=(steps, 3)) * [3, 2, 1]
    group = np.arange(30) % 3
    return (signals[:, group] + 0.1 * random.normal(size=(steps, 30))).astype(np.float32)


def test_similar_units_are_neighbours() -> None:
    order = unit_order(MemoryRows(waves()), OneSequence(20_000), "similarity")
    groups = np.asarray(order) % 3
    assert sorted(np.asarray(order).tolist()) == list(range(30))
    # Three groups in a row change twice.
    assert np.count_nonzero(np.diff(groups)) == 2


def test_control_the_order_by_number_mixes_them() -> None:
    assert unit_order(MemoryRows(waves()), OneSequence(20_000), "number") is None
    assert np.count_nonzero(np.diff(np.arange(30) % 3)) == 29


def test_the_order_by_mean() -> None:
    values = np.random.default_rng(0).normal(size=(500, 9)).astype(np.float32)
    order = unit_order(MemoryRows(values), OneSequence(500), "mean")
    assert np.array_equal(order, np.argsort(values.mean(axis=0)))


@pytest.mark.parametrize("order", ["mean", "similarity"])
def test_nan_constant_and_single_units_have_a_place(order: str) -> None:
    values = np.zeros((50, 4), np.float32)
    values[:, 1], values[3, 2] = np.nan, np.inf
    found = unit_order(MemoryRows(values), OneSequence(50), order)
    assert sorted(np.asarray(found).tolist()) == [0, 1, 2, 3]
    single = unit_order(MemoryRows(values[:, :1]), OneSequence(50), order)
    assert np.asarray(single).tolist() == [0]
    assert unit_order(MemoryRows(values[:0]), OneSequence(0), order) is None


def test_large_files_are_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unit_order_module, "SAMPLE_BYTES", 4 * 30 * 10)
    read = []

    class Counted(MemoryRows):
        def __getitem__(self, key: object) -> np.ndarray:
            result = super().__getitem__(key)
            read.append(len(result))
            return result

    unit_order(Counted(waves()), OneSequence(20_000), "mean")
    assert read == [10] * 32


def test_unknown_orders_are_refused() -> None:
    with pytest.raises(OptionError, match="order: expected one of number, mean, similarity"):
        unit_order(MemoryRows(waves(10)), OneSequence(10), "size")
