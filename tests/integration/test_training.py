"""Training gives the same weights with and without a tracer; each version is stored."""

from __future__ import annotations

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from torch import nn

import grutrace
from tests.checks import check_sequence
from tests.integration.models import CALLS, Mixed, trace
from tests.oracles import weights_of

OPTIMIZERS = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, 0.1, momentum=0.9),
    "Adam": lambda parameters: torch.optim.Adam(parameters, 0.01),
}


def train(make, steps: int = 20, seed: int = 0, **options) -> tuple[Mixed, torch.Tensor]:
    """Train a model from a seed; the state of the generator in the end. Traced with options."""
    torch.manual_seed(seed)
    model = Mixed()
    optimizer = make(model.parameters())
    tracer = trace(model, **options) if options else None
    if tracer is not None:
        tracer.start()
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(3, 5, 3)).square().mean().backward()
        optimizer.step()
    if tracer is not None:
        tracer.close()
        assert len(tracer.calls) == steps * len(CALLS)
        assert len(set(tracer.calls["weights"])) == steps
    return model, torch.get_rng_state()


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(map(torch.equal, a.state_dict().values(), b.state_dict().values()))


@pytest.mark.parametrize("stacks", ["split", "rerun"])
@pytest.mark.parametrize("path", [None, "run.h5"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_twenty_steps_end_in_the_same_weights(name, path, stacks, tmp_path) -> None:
    expected, generator = train(OPTIMIZERS[name])
    model, ended = train(OPTIMIZERS[name], path=path and tmp_path / path, stacks=stacks)
    assert same(model, expected)
    assert torch.equal(generator, ended)
    # The control: another stream of random numbers ends in other weights.
    assert not same(train(OPTIMIZERS[name], seed=1)[0], expected)


@pytest.fixture
def model() -> Mixed:
    torch.manual_seed(1)
    return Mixed()


def through_pickle(model):
    return pickle.loads(pickle.dumps(model))


def through_a_file(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def through_its_state(model):
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    fresh = Mixed()
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    return fresh


@pytest.mark.parametrize("way", [copy.deepcopy, through_pickle, through_a_file, through_its_state])
def test_copies_of_an_attached_model_work_and_are_not_traced(way, model, batch) -> None:
    keys = list(model.state_dict())
    with trace(model) as tracer:
        assert list(model.state_dict()) == keys
        twin = way(model)
        model.eval()
        twin.eval()
        assert torch.equal(twin(batch), model(batch))
        assert len(tracer.calls) == len(CALLS)
    with trace(twin) as again:
        twin(batch)
    assert len(again.calls) == len(CALLS)


def test_an_averaged_copy_of_an_attached_model(model, batch) -> None:
    with trace(model) as tracer:
        average = torch.optim.swa_utils.AveragedModel(model)
        average.update_parameters(model)
        average(batch)
        assert len(tracer.calls) == 0
        model(batch)


def test_switching_between_training_and_evaluation(model, batch) -> None:
    expected = []
    for item in (None, trace(model)):
        if item is not None:
            item.start()
        torch.manual_seed(4)
        for training in (True, False, True):
            model.train(training)
            expected.append(model(batch))
        if item is not None:
            item.close()
    assert all(map(torch.equal, expected[:3], expected[3:]))
    assert not torch.equal(expected[0], expected[1])
    assert item.calls["training"].tolist() == [True] * 4 + [False] * 4 + [True] * 4


def load_other_weights(model):
    model.load_state_dict(Mixed().state_dict())


def take_a_step(model):
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()


def write_through_data(model):
    for parameter in model.parameters():
        parameter.data.mul_(1.5)


def replace_the_parameters(model):
    for layer in (model.stack, model.layer, model.cell):
        for name, value in list(layer.named_parameters()):
            setattr(layer, name, nn.Parameter(value.detach() * 1.5))


def there_and_back(model):
    model.to(torch.float64).to(torch.float32)
    take_a_step(model)


CHANGES = [
    load_other_weights,
    take_a_step,
    write_through_data,
    replace_the_parameters,
    there_and_back,
]


@pytest.mark.parametrize("change", CHANGES)
def test_each_version_of_the_weights_is_stored(change, model, batch, tmp_path) -> None:
    model.eval()
    versions = []
    path = tmp_path / "run.h5"
    with trace(model, path=path):
        for _ in range(3):
            model(batch)
            versions.append(copy.deepcopy(model))
            change(model)
    with grutrace.open(path) as reopened:
        assert reopened.calls["weights"].tolist() == [0] * 4 + [1] * 4 + [2] * 4
        for site in ("stack.l1", "layer.l0_reverse", "cell.cell"):
            module, _, suffix = site.rpartition(".")
            per_version = len(reopened[site]) // 3
            for version, then in enumerate(versions):
                weights = weights_of(getattr(then, module), suffix)
                stored = reopened[site].weights(version)
                for name, value in weights.items():
                    np.testing.assert_array_equal(stored[name], value)
                for sequence in list(reopened[site])[version * per_version :][:per_version]:
                    check_sequence(sequence, weights, sequence.previous)


def test_a_model_converted_to_half_while_attached(model, batch) -> None:
    model.eval()
    with trace(model) as tracer:
        model(batch)
        model.half()
        output = model(batch.half())
    assert output.dtype == torch.float16
    assert tracer.calls["weights"].tolist() == [0] * 4 + [1] * 4
    stored = tracer["stack.l0"].weights(1)["weight_ih"]
    np.testing.assert_array_equal(stored, model.stack.weight_ih_l0.detach().float().numpy())


@pytest.mark.parametrize("attached", [torch.inference_mode, torch.no_grad, torch.enable_grad])
@pytest.mark.parametrize("called", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_attached_with_and_called_without_gradients(attached, called, model, batch) -> None:
    model.eval()
    with called():
        expected = model(batch)
    with attached():
        result = trace(model)
        result.start()
    with called():
        output = model(batch)
    with attached():
        result.close()
    assert torch.equal(output, expected)
    assert output.requires_grad == expected.requires_grad
    assert output.is_inference() == expected.is_inference()
    assert result.calls["module"].tolist() == CALLS


def test_weights_made_in_inference_mode(batch) -> None:
    with torch.inference_mode():
        model = Mixed().eval()
        with trace(model) as tracer:
            model(batch)
            model.cell.weight_hh.mul_(2)
            model(batch)
    assert tracer.calls["weights"].tolist() == [0, 0, 0, 0, 0, 0, 1, 1]


def test_anomaly_detection(model, batch) -> None:
    with trace(model) as tracer, torch.autograd.set_detect_anomaly(True, check_nan=True):
        model(batch).sum().backward()
    assert len(tracer.calls) == len(CALLS)
