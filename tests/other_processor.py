"""A pytest plugin that simulates a processor whose matrix products round differently.

    python -m pytest -p tests.other_processor tests/...

On some processors the last digit of a product depends on the number of rows that are computed at
once and on where they lie in memory; on the one at hand it may not. With this plugin it does: each
product that grutrace makes is moved by up to one unit in the last place, by an amount that follows
from the place of the element, the number of rows and the address. So whatever the documentation
says is the same bits must not follow from products that were made twice, unless they are made of
the same shape and at an aligned address (docs/equations.md).
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from grutrace.gru import cell


def moved(made: Tensor, operands: tuple[Tensor, ...]) -> Tensor:
    """Return a product with some of its elements one unit in the last place larger.

    Args:
        made: The product, (..., R).
        operands: What it was made of.
    """
    rows = made.shape[:-1].numel()
    addresses = sum(operand.data_ptr() % cell.ALIGNMENT for operand in operands)
    positions = torch.arange(made.numel(), device=made.device).reshape(made.shape)
    odd = ((positions + 1) * (2 * rows + 1) * 40503 + addresses * 9973) >> 7 & 1
    return made * (1 + torch.finfo(made.dtype).eps * odd.to(made.dtype))


def install(patch: pytest.MonkeyPatch) -> None:
    """Make this process compute as such a processor, until the patch is undone."""
    plain = cell.linear

    def linear(values: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return moved(plain(values, weight, bias), (values, weight))

    patch.setattr(cell, "linear", linear)


def pytest_configure(config: pytest.Config) -> None:
    """Install the simulation for all tests."""
    patch = pytest.MonkeyPatch()
    install(patch)
    config.add_cleanup(patch.undo)
