"""Hearing a kernel call from inside a module's own forward.

A tap is a TorchFunctionMode that is in force only while the forward of one module runs. PyTorch
calls hooks around a forward, but after a KeyboardInterrupt it does not call the one behind it, nor
if somebody has removed it. A tap that was left behind so is told by the frame that called the hook:
it no longer runs. It answers nothing then, and is closed when the next one is opened.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any, TypeAlias

import torch
from torch import overrides
from torch.nn.modules import module as module_calls
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
    """

    def __init__(self, answer: Answer, owner: object) -> None:
        super().__init__()
        self.owner = owner
        self._answer = answer
        self._caller = _caller()
        self._thread = threading.get_ident()

    def open(self) -> None:
        """Put the tap in force in this thread."""
        close_forgotten()
        # In this order, and the other one in `close`: an interruption in between loses nothing.
        _open.taps.append(self)
        _put_beneath(self)

    def close(self) -> None:
        """Take it out of force, and with it any that was left behind inside it."""
        while self in _open.taps:
            _take_off(_open.taps[-1])
            _open.taps.pop()._caller = None

    @property
    def running(self) -> bool:
        """Whether the forward that it was opened for may still run."""
        if self._thread != threading.get_ident():
            return self._caller is not None
        return self._caller is not None and not self.forgotten

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
        if func in _KERNELS and not kwargs and _open.taps[-1] is self and not self.forgotten:
            return self._answer(func, args)
        return func(*args, **(kwargs or {}))


def _caller() -> FrameType | None:
    """Return the frame of PyTorch's that calls the hooks of a module; it outlives its forward."""
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_code.co_filename != module_calls.__file__:
        frame = frame.f_back
    return frame


def _put_beneath(mode: TorchFunctionMode) -> None:
    """Put a mode beneath all others of this thread.

    There it hears the kernel as they leave it, and nothing that it does is heard by them. And if
    it is left behind, they still find themselves on top when they end.
    """
    with _without_modes() as others:
        others.insert(0, mode)


def _take_off(mode: TorchFunctionMode) -> None:
    """Remove a mode from this thread's stack, wherever it is."""
    with _without_modes() as others:
        if mode in others:
            others.remove(mode)


@contextmanager
def _without_modes() -> Iterator[list[TorchFunctionMode]]:
    """Take all modes off, then put those on that are in the list by then, the lowest first."""
    stack: Any = overrides
    modes: list[TorchFunctionMode] = stack._get_current_function_mode_stack()
    try:
        for _ in tuple(modes):
            stack._pop_mode()
        yield modes
    finally:
        for each in modes[stack._len_torch_function_stack() :]:
            stack._push_mode(each)


def innermost(owner: object) -> Tap | None:
    """Return the innermost tap in this thread that the owner opened."""
    return next((tap for tap in reversed(_open.taps) if tap.owner is owner), None)


def close_forgotten() -> None:
    """Close the taps in this thread whose forward has ended without a word."""
    forgotten = next((tap for tap in _open.taps if tap.forgotten), None)
    if forgotten is not None:
        forgotten.close()
