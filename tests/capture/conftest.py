"""The model and the batch that most tests of recording use."""

from __future__ import annotations

import pytest
import torch

from tests.capture.models import EncoderDecoder


@pytest.fixture
def model() -> EncoderDecoder:
    torch.manual_seed(0)
    return EncoderDecoder(layers=2, dropout=0.2)


@pytest.fixture
def batch() -> torch.Tensor:
    return torch.randn(3, 7, 5)
