"""A subclass whose forward packs a padded batch with lengths."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import grutrace
from tests.packages.needs import needs
from tests.runs import check_run

needs("pytorch_forecasting")

import pandas as pd  # noqa: E402
from pytorch_forecasting import RecurrentNetwork, TimeSeriesDataSet  # noqa: E402
from pytorch_forecasting.models.nn import GRU  # noqa: E402

LENGTHS = torch.tensor([5, 0, 2, 0, 7])


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("given_state", [False, True])
def test_lengths_some_of_them_zero(layers: int, given_state: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = GRU(3, 8, layers, batch_first=True, dropout=0.2 * (layers - 1))
    padded = torch.randn(5, 7, 3)
    state = torch.randn(layers, 5, 8) if given_state else None

    def run(model: GRU) -> tuple[Tensor, Tensor]:
        output, final = model(padded, state, lengths=LENGTHS, enforce_sorted=False)
        output.square().mean().backward()
        return output, final

    trace = check_run(model, run, tmp_path)
    assert trace.sites == ("l0", "l1")[:layers]
    # The package packs an empty sequence as one step and throws that step away again.
    assert sorted(trace["l0"].lengths) == sorted(LENGTHS.clamp(min=1).tolist())


def test_all_lengths_zero_never_reach_the_kernel() -> None:
    model = GRU(3, 8, batch_first=True)
    with (
        pytest.warns(grutrace.GrutraceWarning, match="no call of PyTorch's GRU kernel"),
        grutrace.trace(model) as trace,
    ):
        model(torch.randn(2, 4, 3), lengths=torch.zeros(2, dtype=torch.long))
    assert len(trace.calls) == 0


@pytest.fixture(scope="module")
def data() -> TimeSeriesDataSet:
    """Twelve noisy waves; the encoder sees two to eight steps of each."""
    generator = np.random.default_rng(0)
    steps = np.arange(30)
    frame = pd.concat(
        (
            pd.DataFrame(
                {
                    "time": steps,
                    "wave": str(wave),
                    "value": np.sin(steps / (2 + wave)) + generator.normal(0, 0.1, 30),
                }
            )
            for wave in range(12)
        ),
        ignore_index=True,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return TimeSeriesDataSet(
            frame,
            time_idx="time",
            target="value",
            group_ids=["wave"],
            min_encoder_length=1,
            max_encoder_length=8,
            min_prediction_length=1,
            max_prediction_length=4,
            time_varying_unknown_reals=["value"],
            randomize_length=True,
        )


@pytest.mark.parametrize("training", [True, False])
def test_recurrent_network(training: bool, data: TimeSeriesDataSet, tmp_path: Path) -> None:
    """One layer is encoder and decoder: each series is one sequence through both."""
    torch.manual_seed(0)
    np.random.seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = RecurrentNetwork.from_dataset(
            data, cell_type="GRU", hidden_size=10, rnn_layers=2, dropout=0.1
        )
        batch: dict[str, Any] = next(iter(data.to_dataloader(train=True, batch_size=16)))[0]
    model.train(training)

    def run(model: nn.Module) -> Tensor:
        prediction = model(batch)["prediction"]
        if training:
            prediction.square().mean().backward()
        return prediction

    trace = check_run(model, run, tmp_path)
    assert trace.sites == ("rnn.l0", "rnn.l1")
    encoded = batch["encoder_lengths"] - 1
    decoded = batch["decoder_lengths"] if training else torch.full((16,), 4)
    assert (encoded == 0).any()
    lengths = (encoded + decoded)[encoded > 0].tolist()
    # A series without a past was packed as one step, which its decoder does not go on from.
    lengths += [1] * int((encoded == 0).sum()) + decoded[encoded == 0].tolist()
    assert sorted(trace["rnn.l0"].lengths.tolist()) == sorted(lengths)
    assert len(trace.calls) == (2 if training else 5)
