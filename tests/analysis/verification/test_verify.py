"""Tests of verification: it accepts every correct trace and detects each kind of damage."""

from __future__ import annotations

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import nn

import grutrace
from grutrace.analysis.verification import verify as verification
from grutrace.analysis.verification.verify import verify
from tests.checks import EVERYTHING
from tests.strategies import Case, cases


@settings(max_examples=150, deadline=None)
@given(cases())
def test_every_correct_trace_passes(case: Case) -> None:
    for record, check in ((EVERYTHING, "gates"), (EVERYTHING[:4], None)):
        with grutrace.trace(case.layer, record=record) as trace:
            case.run()
        for item in verify(trace):
            assert item.holds, item
            assert item.check == check or check is None
            if item.steps and check:
                assert item.worst is not None


def two_layers(path, record=EVERYTHING, training=False, steps=20, gates="inline") -> nn.GRU:
    torch.manual_seed(0)
    layer = nn.GRU(3, 4, 2, bidirectional=True, dropout=0.5).train(training)
    with torch.no_grad(), grutrace.trace(layer, path, record=record, gates=gates):
        for _ in range(2):
            layer(torch.randn(steps, 5, 3))
            layer.weight_hh_l0[0, 0] += 1
    return layer


def checked(path) -> dict[str, verification.SiteVerification]:
    with grutrace.open(path) as trace:
        return {result.site: result for result in verify(trace)}


def test_the_checks_depend_on_the_recorded_quantities(tmp_path) -> None:
    expected = {
        EVERYTHING: ["gates", "gates"],
        ("reset", "update", "candidate", "hidden"): ["states", "gates"],
        ("update", "hidden"): [None, "gates"],
        ("reset", "update", "candidate"): [None, None],
    }
    for number, (record, checks) in enumerate(expected.items()):
        path = tmp_path / f"{number}.h5"
        two_layers(path, record)
        result = checked(path)
        assert [result["l0"].check, result["l1_reverse"].check] == checks
        assert all(result_of_site.holds for result_of_site in result.values())
        assert all(
            bool(result_of_site.reason) == (result_of_site.check != "gates")
            for result_of_site in result.values()
        )


@pytest.mark.parametrize("gates", ["inline", "deferred"])
def test_states_and_inputs_are_enough(tmp_path, gates) -> None:
    path = tmp_path / "run.h5"
    two_layers(path, ("hidden", "input"), gates=gates, training=True)
    assert {
        (result_of_site.check, result_of_site.holds) for result_of_site in checked(path).values()
    } == {("derived", True)}
    with h5py.File(path, "r+") as file:
        damage_weights(file["modules/%/l1"])
    assert [result_of_site.holds for result_of_site in checked(path).values()] == [
        True,
        True,
        False,
        True,
    ]


def test_states_before_dropout_are_not_used_as_input(tmp_path) -> None:
    two_layers(tmp_path / "run.h5", EVERYTHING[:4], training=True)
    assert checked(tmp_path / "run.h5")["l1"].check == "states"
    two_layers(tmp_path / "input.h5", EVERYTHING, training=True)
    result = checked(tmp_path / "input.h5")["l1"]
    assert result.check == "gates"
    assert result.holds


def damage_weights(group: h5py.Group) -> None:
    group["weight_hh"][1, 2, 3] += 0.01


def flip_direction(group: h5py.Group) -> None:
    # Of both: a layer has each direction once.
    for name in (group.name, f"{group.name}_reverse"):
        site = group.file[name]
        site.attrs["reverse"] = not site.attrs["reverse"]


def swap_reset_and_update(group: h5py.Group) -> None:
    reset, update = group["reset"][:], group["update"][:]
    group["reset"][:], group["update"][:] = update, reset


def shift_states(group: h5py.Group) -> None:
    group["hidden"][:] = np.roll(group["hidden"][:], 1, axis=0)


def negate_update(group: h5py.Group) -> None:
    """As other texts define it."""
    group["update"][:] = 1 - group["update"][:]


def one_bad_number(group: h5py.Group) -> None:
    group["update"][137, 2] = np.nan


DAMAGES = [
    damage_weights,
    flip_direction,
    swap_reset_and_update,
    shift_states,
    negate_update,
    one_bad_number,
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_control_each_kind_of_damage_is_caught(tmp_path, damage) -> None:
    path = tmp_path / "run.h5"
    two_layers(path)
    assert checked(path)["l1"].holds
    with h5py.File(path, "r+") as file:
        damage(file["modules/%/l1"])
    result = checked(path)
    assert not result["l1"].holds
    assert result["l0"].holds


def damage_one_input(group: h5py.Group) -> None:
    group["input"][137, 2] += 0.01


def damage_one_state(group: h5py.Group) -> None:
    group["hidden"][137, 2] += 1e-4


def damage_initial(group: h5py.Group) -> None:
    group["initial"][3, 1] += 0.01


def no_number(group: h5py.Group) -> None:
    group["hidden"][137, 2] = np.nan


DERIVED_DAMAGES = [
    *(damage_weights, flip_direction, shift_states),
    *(damage_one_input, damage_one_state, damage_initial, no_number),
]


@pytest.mark.parametrize("block", [1, 10**9])
@pytest.mark.parametrize("damage", DERIVED_DAMAGES)
def test_control_each_kind_of_damage_to_a_deferred_file_is_caught(
    tmp_path, damage, block, monkeypatch
) -> None:
    monkeypatch.setattr(verification, "BLOCK_BYTES", block * 4096)
    path = tmp_path / "run.h5"
    two_layers(path, gates="deferred", training=True)
    result = checked(path)
    assert all(
        result_of_site.holds and result_of_site.check == "derived"
        for result_of_site in result.values()
    )
    with h5py.File(path, "r+") as file:
        damage(file["modules/%/l1"])
    result = checked(path)
    assert not result["l1"].holds
    assert result["l0"].holds


def test_the_largest_error_of_a_deferred_file_is_located(tmp_path) -> None:
    path = tmp_path / "run.h5"
    two_layers(path, gates="deferred", training=True)
    # Row 139 of sequences of 20 steps each: the last step, from which no other starts.
    with h5py.File(path, "r+") as file:
        file["modules/%/l1/hidden"][139, 2] += 0.5
    worst = checked(path)["l1"].worst
    assert (worst.quantity, worst.sequence, worst.step, worst.unit) == ("hidden", 6, 19, 2)
    assert worst.difference == pytest.approx(0.5, abs=1e-5)


def test_the_states_alone_show_a_wrong_gate(tmp_path) -> None:
    path = tmp_path / "run.h5"
    two_layers(path, EVERYTHING[:4])
    with h5py.File(path, "r+") as file:
        file["modules/%/l0/update"][137, 2] += 1e-3
    result = checked(path)["l0"]
    assert result.check == "states"
    assert not result.holds


@pytest.mark.parametrize("block", [1, 10**9])
def test_the_largest_error_is_located(tmp_path, block, monkeypatch) -> None:
    monkeypatch.setattr(verification, "BLOCK_BYTES", block)
    path = tmp_path / "run.h5"
    two_layers(path)
    # Row 137 of sequences of 20 steps each.
    with h5py.File(path, "r+") as file:
        file["modules/%/l1_reverse/candidate"][137, 2] += 0.5
    worst = checked(path)["l1_reverse"].worst
    assert (worst.quantity, worst.sequence, worst.step, worst.unit) == ("candidate", 6, 17, 2)
    assert worst.difference == pytest.approx(0.5, abs=1e-5)


def test_pieces_of_one_sequence_are_connected(tmp_path) -> None:
    """In stepwise decoding, the previous state of a piece is in an earlier call."""
    torch.manual_seed(0)
    cell, state = nn.GRUCell(2, 3), torch.randn(4, 3)
    with torch.no_grad(), grutrace.trace(cell, tmp_path / "run.h5", record=EVERYTHING):
        for rows in ([0, 1, 2, 3], [2, 0, 3], [1, 1, 0], [0, 1, 2]):
            state = cell(torch.randn(len(rows), 2), state[rows])
    assert checked(tmp_path / "run.h5")["cell"].holds
    with h5py.File(tmp_path / "run.h5", "r+") as file:
        hidden = file["modules/%/cell/hidden"]
        hidden[:4] = hidden[:4][[1, 0, 2, 3]]
    assert not checked(tmp_path / "run.h5")["cell"].holds
