"""Graphs of torch.compile that have taken in a GRU kernel, whose calls cannot be heard.

torch.compile leaves nn.GRU out of its graphs, and code with an nn.GRU in it as it is. It takes in
the kernel of nn.GRUCell. Once such a graph is made, nothing is left of the cell's call. While
something records, compiled code can be run as the Python code that it was made from
(``torch.compiler.set_stance("force_eager")``). That acts on the whole process.
"""

from __future__ import annotations

import sys
import threading
from types import CodeType
from typing import Any

import torch

from grutrace.errors import UnsupportedError


def any_with_gru_kernel() -> bool:
    """Whether there is a graph that has taken in a GRU kernel, as far as torch.compile tells."""
    if "torch._dynamo" not in sys.modules:
        return False
    try:
        from torch._dynamo import convert_frame

        codes = [reference() for reference in tuple(convert_frame.input_codes.seen)]
        return any(_has_kernel(code) for code in codes if code is not None)
    except (ImportError, AttributeError):
        # Another version of PyTorch keeps this otherwise.
        return False


#: By code, with how many graphs: whether one of them has a GRU kernel.
_known: dict[CodeType, tuple[int, bool]] = {}


def _has_kernel(code: CodeType) -> bool:
    entries = torch._C._dynamo.eval_frame._debug_get_cache_entry_list(code)
    if not entries:
        return False
    known = _known.get(code)
    if known is None or known[0] != len(entries):
        # Its guards name every function that it has taken in.
        found = any("gru" in str(entry.guard_manager).lower() for entry in entries)
        known = _known[code] = len(entries), found
    return known[1]


class EagerCode:
    """Has compiled code run as the Python code that it was made from, from `start` to `stop`."""

    def __init__(self) -> None:
        self._is_on = False

    def start(self) -> None:
        """Run it so from now on, in the whole process.

        Raises:
            UnsupportedError: PyTorch is older than 2.6, and cannot.
        """
        if not hasattr(torch.compiler, "set_stance"):
            raise UnsupportedError(
                "compiled='eager' needs PyTorch 2.6 or newer; found "
                f"{torch.__version__}. Call the model itself instead of the compiled one"
            )
        if not self._is_on:
            self._is_on = True
            _stance.acquire()

    def stop(self) -> None:
        """Run compiled code again, if nobody else asks for the other. Twice does nothing."""
        if self._is_on:
            self._is_on = False
            _stance.release()


class _Stance:
    """Sets PyTorch's stance for the first who asks, and puts it back after the last."""

    def __init__(self) -> None:
        self._users = 0
        self._before: Any = None
        self._lock = threading.Lock()

    def acquire(self) -> None:
        with self._lock:
            if not self._users:
                set_stance: Any = torch.compiler.set_stance
                self._before = set_stance("force_eager")
            self._users += 1

    def release(self) -> None:
        with self._lock:
            self._users -= 1
            if not self._users:
                # As a context manager it would put the stance of before back.
                self._before.__exit__(None, None, None)


_stance = _Stance()
