"""Ways to change weights during a recording."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def while_the_kernel_runs(change: Callable[[], None]) -> Iterator[None]:
    """Run something once, in the middle of the next call of a kernel that keeps a graph.

    Autograd asks for each tensor that the kernel keeps whether it is to be packed.
    """
    waiting = [change]

    def pack(value: Tensor) -> Tensor:
        # The first tensors are kept before the first step is made.
        if len(seen) > 12 and waiting:
            with torch.no_grad():
                waiting.pop()()
        seen.append(value)
        return value.detach().clone()

    seen: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        yield
    assert not waiting
