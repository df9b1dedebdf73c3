"""Hearing a kernel call from inside a module's own forward.

A tap is a TorchFunctionMode that is in force only while the forward of one module runs. PyTorch
calls hooks around a forward, but after a KeyboardInterrupt it does not call the one behind it. A
tap that was left behind so is told by the frame that called the hook: it no longer runs.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any, TypeAlias

import torch
from torch.overrides import TorchFunctionMode

#: The kernels that a tap hears.
_KERNELS = frozenset((torch.gru, torch.gru_cell))

Kernel: TypeAlias = Callable[..., Any]
#: Answers a kernel call in the kernel's place.
Answer: TypeAlias = Callable[[Kernel, tuple[Any, ...]], Any]


class _OpenTaps(threading.local):
    """The taps in force in this thread, the innermost last."""

    def __init__(self) -> None:
        self.taps: list[Tap] = []


_open = _OpenTaps()


class Tap(TorchFunctionMode):
    """Lets ``answer`` answer the kernel calls of one forward.

    Args:
        answer: Called with the kernel and its arguments; what it returns is the kernel's answer.
        owner: The listener that opened it.
        caller: The frame of PyTorch's that called the hook; it runs as long as the forward does.
    """

    def __init__(self, answer: Answer, owner: object, caller: FrameType) -> None:
        super().__init__()
        self.owner = owner
        self._answer = answer
        self._caller: FrameType | None = caller

    def open(self) -> None:
        """Put the tap in force in this thread."""
        close_forgotten()
        self.__enter__()  # type: ignore[no-untyped-call]
        _open.taps.append(self)

    def close(self) -> None:
        """Take it out of force, and with it any that was left behind inside it."""
        while self in _open.taps:
            innermost = _open.taps.pop()
            innermost._caller = None
            innermost.__exit__(None, None, None)  # type: ignore[no-untyped-call]

    @property
    def forgotten(self) -> bool:
        """Whether the forward that it was opened for has ended. Ask in its own thread only."""
        frame: FrameType | None = sys._getframe()
        while frame is not None:
            if frame is self._caller:
                return False
            frame = frame.f_back
        return True

    def __torch_function__(
        self,
        func: Kernel,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Pass everything on, but for a kernel call of the forward that it was opened for."""
        if func in _KERNELS and not kwargs and _open.taps[-1] is self:
            return self._answer(func, args)
        return func(*args, **(kwargs or {}))


def innermost(owner: object) -> Tap | None:
    """Return the innermost tap in this thread that the owner opened."""
    return next((tap for tap in reversed(_open.taps) if tap.owner is owner), None)


def close_forgotten() -> None:
    """Close the taps in this thread whose forward has ended without a word."""
    forgotten = next((tap for tap in _open.taps if tap.forgotten), None)
    if forgotten is not None:
        forgotten.close()
