"""A change of the weights is found, by whatever route it comes; no change is not."""

from __future__ import annotations

from collections import deque

import numpy as np
import pytest
import torch
from torch import nn

from grutrace.capture.recording import weight_versions as module
from grutrace.capture.recording.weight_versions import WeightVersionTracker


@pytest.fixture
def layer() -> nn.GRU:
    torch.manual_seed(0)
    return nn.GRU(3, 40)


@pytest.fixture(autouse=True)
def cheap(monkeypatch) -> None:
    """Every byte is compared at each call."""
    monkeypatch.setattr(module, "SAMPLE_SECONDS", 1.0)


@pytest.fixture
def only_marks(monkeypatch, cheap) -> None:
    """Every byte is compared only when it has to be."""
    monkeypatch.setattr(module, "MAX_COMPARE_FRACTION", -1.0)
    monkeypatch.setattr(module, "SAMPLE_SECONDS", -1.0)


def optimizer_step(layer: nn.GRU) -> None:
    layer(torch.randn(2, 3))[0].sum().backward()
    torch.optim.SGD(layer.parameters(), 0.1).step()


def write_through_data(layer: nn.GRU) -> None:
    layer.weight_hh_l0.data.mul_(0.5)


def write_through_numpy(layer: nn.GRU) -> None:
    layer.weight_hh_l0.detach().numpy()[40 + 17] = 0


def lesion_one_input(layer: nn.GRU) -> None:
    layer.weight_ih_l0.data[:, 1] = 0


def load(layer: nn.GRU) -> None:
    layer.load_state_dict({name: value + 1 for name, value in layer.state_dict().items()})


def to_double(layer: nn.GRU) -> None:
    layer.double()


CHANGES = [
    optimizer_step,
    write_through_data,
    write_through_numpy,
    lesion_one_input,
    load,
    to_double,
]


def look(versions: WeightVersionTracker, layer: nn.GRU, times: int = 1) -> list[bool]:
    return [versions.check(layer._flat_weights) for _ in range(times)]


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_a_new_version(layer: nn.GRU, change) -> None:
    versions = WeightVersionTracker()
    assert look(versions, layer, 2) == [True, True]
    assert versions.present.number == 0
    change(layer)
    assert look(versions, layer) == [True]
    assert [version.number for version in versions.known] == [1, 0]
    for copy, weight in zip(versions.present.weights, layer._flat_weights, strict=True):
        assert torch.equal(copy, weight)
        assert copy.data_ptr() != weight.data_ptr()
    assert [version.number for version in versions.new_versions] == [0, 1]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced"])
def test_a_sample_finds_whole_rows_and_columns(layer, change, layout, only_marks) -> None:
    if layout == "transposed":
        for weight in (layer.weight_ih_l0, layer.weight_hh_l0):
            weight.data = weight.data.t().contiguous().t()
    elif layout == "sliced":
        for weight in (layer.weight_ih_l0, layer.weight_hh_l0):
            weight.data = torch.cat([weight.data, weight.data], 1)[:, : weight.shape[1]]
    versions = WeightVersionTracker()
    assert look(versions, layer, 4) == [True, False, False, False]
    change(layer)
    # A part of the sample a call; slices have none, and are compared when rows are handed on.
    actual = look(versions, layer, 4)
    assert any(actual) or (layout == "sliced" and change not in (optimizer_step, load, to_double))
    versions.recheck()
    assert versions.present.number == 1


def test_one_element_is_found_by_comparing_every_byte(layer: nn.GRU, only_marks) -> None:
    """And by nothing else: the control."""
    versions = WeightVersionTracker()
    look(versions, layer)
    layer.weight_hh_l0.data[3, 3] += 1
    assert look(versions, layer, 8) == [False] * 8
    versions.expect_changes()
    assert look(versions, layer) == [True]
    assert versions.present.number == 1
    layer.weight_hh_l0.data[3, 3] += 1
    exact = WeightVersionTracker("exact")
    assert look(exact, layer, 2) == [True, True]
    layer.weight_hh_l0.data[3, 3] += 1
    assert look(exact, layer) == [True]
    assert exact.present.number == 1


def test_weights_that_come_back_are_the_version_that_they_were(layer: nn.GRU) -> None:
    versions, before = WeightVersionTracker(), layer.weight_hh_l0.detach().clone()
    for _ in range(3):
        look(versions, layer)
        layer.weight_hh_l0.data[17] = 0
        look(versions, layer)
        assert versions.present.number == 1
        layer.weight_hh_l0.data.copy_(before)
        look(versions, layer)
        assert versions.present.number == 0


def test_the_same_values_elsewhere_are_the_same_version(layer: nn.GRU) -> None:
    versions = WeightVersionTracker()
    look(versions, layer)
    layer.load_state_dict(layer.state_dict())
    versions.check([weight.clone() for weight in layer._flat_weights])
    assert versions.present.number == 0


def test_numbers_that_are_not_equal_to_themselves_are_no_change(layer: nn.GRU) -> None:
    layer.weight_hh_l0.data[0, 0] = np.nan
    versions = WeightVersionTracker()
    look(versions, layer)
    versions.check([weight.clone() for weight in layer._flat_weights])
    assert versions.present.number == 0


def test_tensors_without_a_version_counter() -> None:
    with torch.inference_mode():
        weights = [weight.clone() for weight in nn.GRU(2, 3)._flat_weights]
        versions = WeightVersionTracker()
        assert versions.check(weights)
        assert versions.check(weights)
        weights[0][0, 0] += 1
        assert versions.check(weights)
        assert versions.present.number == 1


def test_weights_are_left_as_they_are(layer: nn.GRU) -> None:
    versions, weights = WeightVersionTracker(), list(layer.parameters())
    look(versions, layer, 3)
    versions.recheck()
    assert all(weight.untyped_storage().resizable() for weight in weights)
    layer.weight_hh_l0.untyped_storage().resize_(0)
    # Taken away between calls, as FSDP does: nothing is read, and nothing changes.
    assert versions.recheck()
    # The control: a view of NumPy's does what the above must not.
    weights[0].detach().numpy()
    assert not weights[0].untyped_storage().resizable()


def test_nothing_keeps_the_weights_alive(layer: nn.GRU) -> None:
    versions, weights = (
        WeightVersionTracker(),
        [flat_weight.detach().clone() for flat_weight in layer._flat_weights],
    )
    versions.check(weights)
    del weights
    assert versions.recheck()


def test_an_interruption_after_a_new_version_leaves_its_number_used() -> None:
    class Interrupted(deque):  # type: ignore[type-arg]
        def append(self, value: object) -> None:
            super().append(value)
            raise KeyboardInterrupt

    tracker = WeightVersionTracker("exact")
    weights = [torch.ones(2)]
    versions, tracker.new_versions = tracker.new_versions, Interrupted()
    with pytest.raises(KeyboardInterrupt):
        tracker.compare(weights)
    versions.extend(tracker.new_versions)
    tracker.new_versions = versions
    tracker.compare(weights)
    assert [version.number for version in versions] == [0, 1]


def test_comparisons_take_a_twentieth_of_the_time(layer: nn.GRU, monkeypatch) -> None:
    now = 100.0
    monkeypatch.setattr(module.time, "perf_counter", lambda: now)
    monkeypatch.setattr(module, "SAMPLE_SECONDS", 0.0)
    versions = WeightVersionTracker()
    assert look(versions, layer) == [True]
    # A comparison takes a millisecond.
    plain = module._WeightFingerprint.has_bytes_of

    def dear(self, weights) -> bool:
        nonlocal now
        now += 1e-3
        return plain(self, weights)

    monkeypatch.setattr(module._WeightFingerprint, "has_bytes_of", dear)
    compared = 0
    for _ in range(1000):
        now += 1e-3
        compared += look(versions, layer)[0]
    # Of 1,000 ms and what the comparisons took themselves.
    assert compared == pytest.approx(1000 * 0.05, rel=0.15)
    # Where the calls are far apart, as in training, each is compared.
    for _ in range(10):
        now += 30e-3
        assert look(versions, layer) == [True]
    # A pause does not pay for more than `MAX_ALLOWANCE_SECONDS`.
    now += 3600
    assert sum(look(versions, layer, 100)) <= 22
