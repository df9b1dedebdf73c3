"""Gates are those of the weights that the kernel used, however these were changed before."""

from __future__ import annotations

import copy
import threading
import warnings
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch import nn

import grutrace
from grutrace.__main__ import main
from grutrace.analysis.verification.verify import verify
from grutrace.capture.recording import weight_versions
from tests import oracles
from tests.capture.changes import while_the_kernel_runs

GATES = [{"gates": "inline"}, {"gates": "background"}, {"gates": "deferred"}, {"units": [17, 3]}]


@pytest.fixture(params=["cheap", "dear", "dear and unseen"])
def comparisons(request, monkeypatch) -> str:
    """Weights are compared at each call; or only where they must be; without a sample then."""
    if request.param != "cheap":
        monkeypatch.setattr(weight_versions, "MAX_COMPARE_FRACTION", -1.0)
        monkeypatch.setattr(weight_versions, "SAMPLE_SECONDS", -1.0)
    if request.param == "dear and unseen":
        monkeypatch.setattr(weight_versions._WeightFingerprint, "has_sample_of", lambda *_: True)
    return request.param


def through_data(layer: nn.GRU) -> None:
    layer.weight_hh_l0.data[64 + 17] = 0


def through_numpy(layer: nn.GRU) -> None:
    layer.weight_hh_l0.detach().numpy()[64 + 17] = 0


def by_a_mask(layer: nn.GRU) -> None:
    mask = torch.ones(192, 64)
    mask[64 + 17] = 0
    layer.weight_hh_l0.data *= mask


def by_an_average(layer: nn.GRU) -> None:
    for weight in layer.parameters():
        weight.data.copy_(weight.detach() * 0.5)


def of_one_element(layer: nn.GRU) -> None:
    layer.weight_hh_l0.data[64 + 17, 3] += 2


def by_load_state_dict(layer: nn.GRU) -> None:
    layer.load_state_dict({name: 0.5 * value for name, value in layer.state_dict().items()})


CHANGES = [
    through_data,
    through_numpy,
    by_a_mask,
    by_an_average,
    of_one_element,
    by_load_state_dict,
]


def used(layer: nn.GRU) -> oracles.Weights:
    return copy.deepcopy(oracles.weights_of(layer, "l0"))


def assert_gates(site, sequence: int, weights: oracles.Weights, x: torch.Tensor) -> None:
    """The rows of a sequence are those that these weights lead to, x being (T, I)."""
    actual = site.sequence(sequence)
    columns = slice(None) if site.units is None else list(site.units)
    hidden, rows = np.zeros((1, weights["weight_hh"].shape[1])), x.numpy()
    for t, row in enumerate(rows):
        expected = oracles.gates(weights, row[None], hidden, 2**-20)
        hidden = expected.values["hidden"]
        for quantity in ("reset", "update", "candidate", "hidden"):
            value = expected.values[quantity][0, columns]
            np.testing.assert_allclose(getattr(actual, quantity)[t], value, rtol=0, atol=1e-5)


@contextmanager
def quietly():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", grutrace.GrutraceWarning)
        yield


@pytest.mark.parametrize("to_file", [False, True])
@pytest.mark.parametrize("options", GATES, ids=str)
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_between_two_calls(change, options, to_file, comparisons, tmp_path) -> None:
    torch.manual_seed(0)
    layer, x = nn.GRU(8, 64).requires_grad_(False), torch.randn(6, 2, 8)
    path = tmp_path / "run.h5" if to_file else None
    with grutrace.trace(layer, path, **options) as tracer:
        layer(x)
        before = used(layer)
        change(layer)
        layer(x)
        after = used(layer)
        site = tracer["l0"]
        assert_gates(site, 0, before, x[:, 0])
        assert_gates(site, 2, after, x[:, 0])
        assert tracer.calls["weights"].tolist() == [0, 1]
        np.testing.assert_array_equal(site.weights(1)["weight_hh"], after["weight_hh"])
        assert "unproven" not in tracer.calls["proof"]
    # The control: with the other weights the gates are others.
    with pytest.raises(AssertionError):
        assert_gates(site, 2, before, x[:, 0])


@pytest.mark.parametrize("options", GATES, ids=str)
def test_the_usual_lesion_study(options, comparisons) -> None:
    """A unit is silenced in a recording block, and set back: every value of every call is right."""
    torch.manual_seed(0)
    layer, x = nn.GRU(8, 64).requires_grad_(False), torch.randn(6, 2, 8)
    intact = used(layer)
    weight = layer.weight_hh_l0.detach().clone()
    with grutrace.Tracer(layer, recording=False, **options) as tracer:
        with tracer.recording(tag="intact"):
            layer(x)
        for unit in (17, 3, 40):
            with tracer.recording(tag=f"without {unit}"):
                layer.weight_hh_l0.data[64 + unit] = 0
                lesioned = used(layer)
                layer(x)
                layer(x)
                layer.weight_hh_l0.data.copy_(weight)
            assert_gates(tracer["l0"], -1, lesioned, x[:, 1])
            assert_gates(tracer["l0"], -3, lesioned, x[:, 1])
        with tracer.recording(tag="intact"):
            layer(x)
        assert_gates(tracer["l0"], -1, intact, x[:, 1])
        numbers = tracer.calls["weights"].tolist()
        assert numbers[:-1] == [0, 1, 1, 2, 2, 3, 3]
        last = tracer["l0"].weights(numbers[-1])
        np.testing.assert_array_equal(last["weight_hh"], intact["weight_hh"])
    assert set(tracer.calls["proof"]) <= {"proven", "unchecked"}


@pytest.mark.parametrize("gates", ["background", "deferred"])
def test_a_change_that_is_undone_before_anybody_looks(gates, monkeypatch, tmp_path) -> None:
    """No version in the trace fits: the call is marked, and a warning says its number."""
    monkeypatch.setattr(weight_versions, "MAX_COMPARE_FRACTION", -1.0)
    monkeypatch.setattr(weight_versions, "SAMPLE_SECONDS", -1.0)
    monkeypatch.setattr(weight_versions._WeightFingerprint, "has_sample_of", lambda *_: True)
    layer, x = nn.GRU(8, 64).requires_grad_(False), torch.randn(6, 2, 8)
    weight = layer.weight_hh_l0.detach().clone()
    tracer = grutrace.trace(layer, gates=gates)
    with tracer:
        layer(x)
        layer.weight_hh_l0.data.mul_(-1)
        layer(x)
        layer.weight_hh_l0.data.copy_(weight)
        layer(x)
        if gates == "deferred":
            assert tracer.calls["proof"].tolist() == ["proven", "unchecked", "unchecked"]
        with pytest.warns(grutrace.ResidualWarning, match="call 1 are unproven") as said:
            assert tracer["l0"].update[:].shape == (36, 64)
        assert len(said) == 1
        assert tracer.calls["proof"].tolist() == ["proven", "unproven", "proven"]
    # The control: with every call compared it is a version of its own.
    with grutrace.trace(layer, gates=gates, weights="exact") as exact:
        layer(x)
        layer.weight_hh_l0.data.mul_(-1)
        layer(x)
        layer.weight_hh_l0.data.copy_(weight)
        layer(x)
    assert exact.calls["weights"].tolist() == [0, 1, 0]
    assert exact.calls["proof"].tolist() == ["proven"] * 3


def test_a_file_is_marked_and_its_reader_finds_out(monkeypatch, tmp_path, capsys) -> None:
    """Deferred gates in a file: which weights a call used is found out when it is read."""
    monkeypatch.setattr(weight_versions, "MAX_COMPARE_FRACTION", -1.0)
    monkeypatch.setattr(weight_versions, "SAMPLE_SECONDS", -1.0)
    monkeypatch.setattr(weight_versions._WeightFingerprint, "has_sample_of", lambda *_: True)
    layer, x = nn.GRU(8, 64).requires_grad_(False), torch.randn(6, 2, 8)
    path = tmp_path / "run.h5"
    with grutrace.trace(layer, path, gates="deferred") as tracer:
        layer(x)
        layer(x)
        tracer.flush()
        layer.weight_hh_l0.data.mul_(-1)
        after = used(layer)
        layer(x)
        layer(x)
    assert main(["info", str(path)]) == 0
    assert "unchecked: 1 calls, whose weights were not compared" in capsys.readouterr().out
    with grutrace.open(path) as trace:
        assert trace.calls["proof"].tolist().count("unchecked") == 1
        assert trace.calls["weights"].tolist() == [0, 0, 1, 1]
        assert_gates(trace["l0"], -1, after, x[:, 1])
        assert all(result.holds for result in verify(trace))
        assert trace["l0"].update[:].shape == (48, 64)
        assert trace.calls["proof"].tolist() == ["proven"] * 4


@pytest.mark.parametrize("gates", ["inline", "background", "deferred"])
def test_weights_that_change_while_the_kernel_runs(gates) -> None:
    """Hogwild training: no weights lead to these states, and the call says so."""
    layer, x = nn.GRU(3, 40), torch.randn(4, 2, 3)

    def disturb() -> None:
        layer.weight_hh_l0.data += 0.1

    with grutrace.trace(layer, gates=gates) as tracer, quietly():
        layer(x)
        with while_the_kernel_runs(disturb):
            layer(x)
        layer(x)
        proofs = tracer.calls["proof"].tolist()
        # Weights were compared after the call, and had changed by then: seen when gates are made.
        assert proofs[1] == ("proven" if gates == "deferred" else "unproven")
        assert proofs[0] == proofs[2] == "proven"
    if gates == "deferred":
        assert not all(result.holds for result in verify(tracer))


def test_threads_with_weights_of_their_own_versions() -> None:
    torch.manual_seed(0)
    layer, x = nn.GRU(8, 64).requires_grad_(False), torch.randn(6, 2, 8)
    copies = [copy.deepcopy(layer) for _ in range(2)]
    for thread in copies[1:]:
        thread.weight_hh_l0.mul_(-1)
    model = nn.ModuleList(copies)

    def run(copied: nn.GRU) -> None:
        with torch.no_grad():
            for _ in range(20):
                copied(x)

    with grutrace.trace(model, gates="inline") as tracer:
        threads = [threading.Thread(target=run, args=(copied,)) for copied in copies]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert set(tracer.calls["proof"]) == {"proven"}
    for number in range(2):
        assert_gates(tracer[f"{number}.l0"], 7, used(copies[number]), x[:, 1])


def test_nothing_is_done_to_the_users_tensors() -> None:
    layer, cell, x = nn.GRU(3, 4), nn.GRUCell(3, 4), torch.randn(5, 2, 3)
    packed = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([5, 3]))
    watched = [*layer.parameters(), *cell.parameters(), packed.batch_sizes, x]
    for gates in ("inline", "background", "deferred"):
        with grutrace.trace(nn.ModuleList([layer, cell]), gates=gates) as trace:
            layer(x)
            layer(packed)
            layer.weight_hh_l0.data[3] = 0
            layer(x)
            cell(x[0])
            assert trace["0.l0"].update.shape == (28, 4)
    assert all(weight.untyped_storage().resizable() for weight in watched)
    # The control: this is what must not happen.
    x.numpy()
    assert not x.untyped_storage().resizable()
