"""The model and the batch of most integration tests."""

from __future__ import annotations

import pytest
import torch

from tests.integration.models import Mixed


@pytest.fixture
def model() -> Mixed:
    torch.manual_seed(1)
    return Mixed().eval()


@pytest.fixture
def batch() -> torch.Tensor:
    return torch.randn(2, 5, 3)
