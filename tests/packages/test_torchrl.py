"""Reinforcement learning: the memory of a policy, and GRUs written in Python."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import grutrace
from tests.packages.needs import needs
from tests.runs import check_run, run_once

needs("torchrl.modules")

from tensordict import TensorDict  # noqa: E402
from torchrl.modules import GRU, GRUCell, GRUModule, set_recurrent_mode  # noqa: E402

KEYS = {"in_keys": ["observed", "memory"], "out_keys": ["features", ("next", "memory")]}


def test_episodes_in_one_batch_are_split_where_they_begin(tmp_path: Path) -> None:
    """`GRUModule` cuts a batch of steps into episodes and packs them before it calls nn.GRU."""
    torch.manual_seed(0)
    model = GRUModule(input_size=5, hidden_size=8, num_layers=1, **KEYS)
    begins = torch.zeros(2, 10, 1, dtype=torch.bool)
    begins[:, 0] = begins[0, 4] = True
    observed, memory = torch.randn(2, 10, 5), torch.zeros(2, 10, 1, 8)

    def train(model: GRUModule) -> Tensor:
        steps = TensorDict({"observed": observed, "memory": memory, "is_init": begins}, [2, 10])
        with set_recurrent_mode(True):
            features = model(steps)["features"]
        features.square().mean().backward()
        return features

    trace = check_run(model, train, tmp_path)
    assert trace.sites == ("gru.l0",)
    assert trace["gru.l0"].lengths.tolist() == [4, 6, 10]


def test_acting_step_by_step_is_one_sequence(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = GRUModule(input_size=5, hidden_size=8, num_layers=2, **KEYS)
    observed = torch.randn(6, 3, 5)

    def act(model: GRUModule) -> list[Tensor]:
        memory, outputs = torch.zeros(3, 2, 8), []
        for number, step in enumerate(observed):
            begins = torch.full((3, 1), number == 0)
            now = TensorDict({"observed": step, "memory": memory, "is_init": begins}, [3])
            after = model(now)
            memory = after["next", "memory"].detach()
            outputs.append(after["features"])
        return outputs

    trace = check_run(model, act, tmp_path)
    assert trace["gru.l1"].lengths.tolist() == [6] * 3


@pytest.mark.parametrize("look_alike", [GRU(4, 6), GRUCell(4, 6)])
def test_grus_written_in_python_are_reported(look_alike: nn.Module) -> None:
    """They do not use nn.GRU's kernel, so there is nothing to trace."""
    name = f"torchrl.modules.tensordict_module.rnn.{type(look_alike).__name__}"
    with pytest.raises(
        grutrace.UnsupportedError, match=f"the model is a GRU implementation of its own .{name}"
    ):
        grutrace.trace(look_alike)
    model = nn.ModuleDict({"ours": nn.GRUCell(4, 6), "theirs": look_alike})
    input = torch.randn(3, 4) if isinstance(look_alike, GRUCell) else torch.randn(3, 5, 4)

    def run(model: nn.ModuleDict) -> list[Tensor]:
        return [model["ours"](torch.ones(2, 4)), *_list(model["theirs"](input))]

    expected = run_once(model, run)
    with (
        pytest.warns(
            grutrace.GrutraceWarning, match=f"^theirs is a GRU implementation of its own .{name}"
        ),
        grutrace.trace(model) as trace,
    ):
        expected.assert_same(run_once(model, run))
    assert trace.sites == ("ours.cell",)


def _list(result: Tensor | tuple[Tensor, ...]) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)
