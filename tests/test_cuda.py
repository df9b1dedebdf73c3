"""Tests on a CUDA device, skipped without one. Not run yet: see docs/support.md.

GRUTRACE_TEST_DEVICE=cpu puts a CPU in the device's place, to try the tests themselves.
"""

from __future__ import annotations

import copy
import os

import pytest
import torch
from torch import nn

import grutrace
from grutrace.analysis.verification.verify import verify
from tests.checks import EVERYTHING, same_result

DEVICE = os.environ.get("GRUTRACE_TEST_DEVICE", "cuda")

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(
        DEVICE == "cuda" and not torch.cuda.is_available(), reason="there is no CUDA device"
    ),
]

LAYERS = {
    "one layer": lambda: nn.GRU(5, 16, bidirectional=True),
    "stack": lambda: nn.GRU(5, 16, 3, batch_first=True),
    "stack in eval": lambda: nn.GRU(5, 16, 3, dropout=0.3).eval(),
    "cell": lambda: nn.GRUCell(5, 16),
}


@pytest.mark.parametrize("gates", ["inline", "background", "deferred"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", LAYERS)
def test_a_traced_call_is_untouched_and_verifies(kind, dtype, gates, tmp_path) -> None:
    torch.manual_seed(0)
    layer = LAYERS[kind]().to(DEVICE, dtype)
    x = torch.randn((30, 5) if kind == "cell" else (6, 30, 5), device=DEVICE, dtype=dtype)
    expected = copy.deepcopy(layer)(x)
    path = tmp_path / "run.h5"
    with grutrace.trace(layer, path, record=EVERYTHING, gates=gates, check="raise") as trace:
        assert same_result(expected, layer(x))
    result = verify(trace)
    assert result
    assert all(
        result_of_site.holds and result_of_site.worst is not None for result_of_site in result
    )


def test_values_changed_right_after_the_call_are_recorded_unchanged(tmp_path) -> None:
    """Copies run beside the model's stream, which may reuse the memory at once."""
    torch.manual_seed(0)
    layer, x = nn.GRU(64, 256).to(DEVICE), torch.randn(200, 64, 64, device=DEVICE)

    def clear(
        _layer: nn.Module, _inputs: object, result: tuple[torch.Tensor, torch.Tensor]
    ) -> None:
        result[0].zero_()

    layer.register_forward_hook(clear)
    with (
        torch.no_grad(),
        grutrace.trace(layer, tmp_path / "run.h5", record=EVERYTHING, gates="background") as trace,
    ):
        for _ in range(20):
            layer(x)
    assert all(result.holds for result in verify(trace))
    assert trace["l0"].hidden[:].any()
