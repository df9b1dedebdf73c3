"""Tests of the example's own checks: each fails when its claim is wrong."""

import pytest


def test_every_claim_holds(hidden_states_example, capsys):
    assert hidden_states_example.main() == 0
    printed = capsys.readouterr().out
    claims = [line for line in printed.splitlines() if line.startswith("  ok  ")]
    assert len(claims) >= 40
    for quantity in ("reset", "update", "candidate", "hidden"):
        assert f"grutrace: {quantity} follows PyTorch's equation" in printed


def test_a_false_claim_stops_the_script(hidden_states_example):
    with pytest.raises(AssertionError, match="two is three"):
        hidden_states_example.claim("two is three", False)


def test_wrong_equations_are_detected(hidden_states_example, monkeypatch):
    right = hidden_states_example.equations

    def overwriting(gru, x, previous):
        r, z, n, _ = right(gru, x, previous)
        return r, 1 - z, n, z * n + (1 - z) * previous

    monkeypatch.setattr(hidden_states_example, "equations", overwriting)
    with pytest.raises(AssertionError, match="update"):
        hidden_states_example.main()


def test_a_wrong_conversion_is_detected(hidden_states_example, monkeypatch):
    monkeypatch.setattr(hidden_states_example, "with_negated_update", lambda gru: gru)
    with pytest.raises(AssertionError, match="update rows negated"):
        hidden_states_example.main()
