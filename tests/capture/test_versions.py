"""A change of the weights is seen, however it was made; no change is not."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from grutrace.capture.versions import WeightVersions


@pytest.fixture
def layer() -> nn.GRU:
    torch.manual_seed(0)
    return nn.GRU(3, 40)


def optimizer_step(layer: nn.GRU) -> None:
    layer(torch.randn(2, 3))[0].sum().backward()
    torch.optim.SGD(layer.parameters(), 0.1).step()


def write_through_data(layer: nn.GRU) -> None:
    layer.weight_hh_l0.data.mul_(0.5)


def load(layer: nn.GRU) -> None:
    layer.load_state_dict({name: value + 1 for name, value in layer.state_dict().items()})


def to_double(layer: nn.GRU) -> None:
    layer.double()


CHANGES = [optimizer_step, write_through_data, load, to_double]


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_a_new_version(layer: nn.GRU, change) -> None:
    versions = WeightVersions()
    assert versions.changed(layer._flat_weights) is not None
    assert versions.changed(layer._flat_weights) is None
    change(layer)
    copies = versions.changed(layer._flat_weights)
    assert copies is not None
    assert versions.count == 2
    for copy, weight in zip(copies, layer._flat_weights, strict=True):
        assert torch.equal(copy, weight)
        assert copy.data_ptr() != weight.data_ptr()
    assert versions.changed(layer._flat_weights) is None


def test_the_same_values_elsewhere_are_the_same_version(layer: nn.GRU) -> None:
    versions = WeightVersions()
    versions.changed(layer._flat_weights)
    layer.load_state_dict(layer.state_dict())
    assert versions.changed([weight.clone() for weight in layer._flat_weights]) is None
    assert versions.count == 1


def test_tensors_without_a_version_counter() -> None:
    with torch.inference_mode():
        weights = [weight.clone() for weight in nn.GRU(2, 3)._flat_weights]
        versions = WeightVersions()
        assert versions.changed(weights) is not None
        assert versions.changed(weights) is None
        weights[0][0, 0] += 1
        assert versions.changed(weights) is not None
