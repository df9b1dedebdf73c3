"""The profile of a traced call names its parts, and leaves the functions as they were."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from benchmarks import profiles
from benchmarks.workloads import Workload


@pytest.mark.parametrize("gates", ["inline", "deferred"])
def test_parts_and_the_rest_add_up(gates, monkeypatch) -> None:
    monkeypatch.setattr(profiles, "RUNS", 3)
    before = [vars(owner)[name] for part in profiles.PARTS.values() for owner, name in part]
    layer, x = nn.GRU(8, 16), torch.randn(5, 2, 8)
    workload = Workload("a layer", layer, lambda: layer(x))
    figures = profiles.profile(workload, gates)
    parts = [figures[name] for name in (*profiles.PARTS, "elsewhere")]
    assert figures["traced"] - figures["untraced"] == pytest.approx(sum(parts))
    assert figures["records"] > 0
    assert figures["sequences"] > 0
    assert (figures["products"] > 0) == (gates == "inline")
    after = [vars(owner)[name] for part in profiles.PARTS.values() for owner, name in part]
    assert after == before


def test_time_of_other_parts_is_left_out() -> None:
    clock = profiles.Clock()
    busy = clock.timed("inner", lambda: sum(range(200_000)))
    clock.timed("outer", busy)()
    assert clock.seconds["outer"] < clock.seconds["inner"] / 10
    # The control: its time with that of the other part.
    clock.clear()
    clock.timed("outer", lambda: sum(range(200_000)))()
    assert clock.seconds["outer"] > 0.0005
