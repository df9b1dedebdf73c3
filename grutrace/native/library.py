"""Load the compiled library, and describe its functions to ctypes.

The library is optional. Without a C compiler at installation, or on an unsupported processor or
system, grutrace computes the same values with NumPy and torch. Copies and counts have the same bits
either way; sums differ by rounding.

Every caller calls `load`, and uses NumPy or torch if it returns None. ctypes releases the GIL
during a call, except for functions that are described as keeping it.
"""

from __future__ import annotations

import ctypes
import logging
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from grutrace.version import VERSION

logger = logging.getLogger(__name__)

#: Environment variable: the instruction set to use, ``none`` for none, or empty for the best.
VARIABLE = "GRUTRACE_COMPILED"

#: Name of the instruction set if no compiled library is in use.
NONE = "none"

_SUFFIXES = {"win32": ".dll", "darwin": ".dylib"}

_address, _integer = ctypes.c_void_p, ctypes.c_int64


class CountOptions(ctypes.Structure):
    """How values are counted; `count_options` in kernels.c."""

    _fields_ = [
        ("bins", _integer),
        ("low", ctypes.c_double),
        ("high", ctypes.c_double),
        ("below", ctypes.c_double),
        ("above", ctypes.c_double),
        ("shares", _integer),
        ("moments", _integer),
        ("cubes", _address),
        ("fourths", _address),
    ]


class GateCopy(ctypes.Structure):
    """The source and the target of a gate copy; `gate_copy` in kernels.c."""

    _fields_ = [
        ("row_stride", _integer),
        ("offset", _integer),
        ("unit_step", _integer),
        ("units", _integer),
        ("itemsize", _integer),
        # A number, so that it can be added to.
        ("target", ctypes.c_size_t),
        ("target_row_stride", _integer),
        ("target_step_stride", _integer),
        ("target_offsets", _address),
    ]


#: Two strides, and the addresses of three gates.
Integers2, ReplayTargets = _integer * 2, _address * 3


class ReplayBlock(ctypes.Structure):
    """Steps whose gates are computed from their products; `replay_block` in kernels.c."""

    _fields_ = [
        ("input", _address),
        ("product", _address),
        ("previous", _address),
        ("states", _address),
        ("previous_strides", Integers2),
        ("state_strides", Integers2),
        ("gates", ReplayTargets),
        ("gate_strides", Integers2),
        ("steps", _integer),
        ("batch", _integer),
        ("units", _integer),
        ("grouping", _integer),
        ("checks", _address),
    ]


class HeldStep(ctypes.Structure):
    """Steps whose gates are held at some units; `held_step` in kernels.c."""

    _fields_ = [
        ("product", _address),
        ("state", _address),
        ("masks", _address * 4),
        ("values", _address * 4),
        ("batch", _integer),
        ("units", _integer),
    ]


class DirectionSteps(ctypes.Structure):
    """Steps along which directions are multiplied by Jacobians; `direction_steps` in kernels.c."""

    _fields_ = [
        ("weights", _address),
        ("keep", _address),
        ("gates", ReplayTargets),
        ("directions", _address),
        ("logs", _address),
        ("memory", _address),
        ("steps", _integer),
        ("units", _integer),
        ("columns", _integer),
        ("count", _integer),
        ("interval", _integer),
        ("longest", _integer),
        ("spread", ctypes.c_double),
        ("most_spread", ctypes.c_double),
    ]


class CopyPlan(ctypes.Structure):
    """The copies of a call; `copy_plan` in kernels.c."""

    _fields_ = [
        ("product", ctypes.POINTER(GateCopy)),
        ("candidate", ctypes.POINTER(GateCopy)),
        ("product_count", _integer),
        ("candidate_count", _integer),
        ("rows", _address),
        ("steps", _integer),
        ("step", _integer),
        ("sum", _address),
    ]


class CallSeries(ctypes.Structure):
    """Memory for similar calls of one step; `call_series` in kernels.c."""

    _fields_ = [
        ("input", _address),
        ("initial", _address),
        ("final", _address),
        ("gates", ReplayTargets),
        ("input_size", _integer),
        ("state_size", _integer),
        ("batch", _integer),
        ("units", _integer),
        ("itemsize", _integer),
        ("residuals", _address),
    ]


@dataclass(frozen=True)
class Library:
    """The functions of the compiled library. kernels.c describes their arguments.

    Attributes:
        instruction_set: Name of its instruction set: ``avx512``, ``avx2``, ``neon`` or
            ``portable``.
        copy_step: Copies the gates of one step, as a `CopyPlan` says.
        states: By NumPy type: copies the states of a call, and compares them with the gates.
        count: By NumPy type: counts values unit by unit.
        replay: Computes gates and checks from products in float32; see `ReplayBlock`.
        held_step: Computes a step whose gates are held at some units in float32; see `HeldStep`.
        directions: Multiplies directions by the Jacobians of steps; see `DirectionSteps`.
        add_call: Copies a call of one step to a `CallSeries`. Keeps the GIL, because releasing it
            takes longer than the work.
    """

    instruction_set: str
    copy_step: Callable[..., None]
    states: dict[str, Callable[..., float]]
    count: dict[str, Callable[..., None]]
    replay: Callable[..., int]
    held_step: Callable[..., None]
    directions: Callable[..., int]
    add_call: Callable[..., int]


@cache
def load() -> Library | None:
    """Return the compiled library; None if there is none, or the environment says so."""
    wanted = os.environ.get(VARIABLE, "")
    if wanted == NONE:
        return None
    # In a separate folder, so that Python does not import it as a module.
    path = Path(__file__).parent / "lib" / ("kernels" + _SUFFIXES.get(sys.platform, ".so"))
    try:
        return _describe(ctypes.CDLL(str(path)), ctypes.PyDLL(str(path)), wanted)
    except (OSError, AttributeError) as error:
        logger.debug("no compiled library: %s", error)
        return None


def instruction_set() -> str:
    """Return the name of the instruction set in use; ``none`` without a compiled library."""
    library = load()
    return NONE if library is None else library.instruction_set


def version_line() -> str:
    """Return the line of ``grutrace --version``: the version, and the instruction set in use."""
    return f"grutrace {VERSION} (compiled: {instruction_set()})"


def _describe(library: ctypes.CDLL, held: ctypes.PyDLL, wanted: str) -> Library | None:
    select = library.grutrace_select
    select.argtypes, select.restype = [ctypes.c_char_p], ctypes.c_char_p
    name = select(wanted.encode() or None)
    if name is None:
        logger.warning(
            "%s: expected the name of an instruction set of this processor, found %r; nothing "
            "compiled is used",
            VARIABLE,
            wanted,
        )
        return None
    states = [_address, _address, _address, _integer, _integer, _address, _address, *[_integer] * 4]
    count = [_address, _integer, _integer, _address, _address, _address]

    def by_type(name: str, arguments: list[Any], result: Any = None) -> dict[str, Any]:
        return {
            dtype: _function(getattr(library, f"grutrace_{name}_{suffix}"), arguments, result)
            for dtype, suffix in (("float32", "f32"), ("float64", "f64"))
        }

    return Library(
        name.decode(),
        _function(library.grutrace_copy_step, [_address, _address, _address]),
        by_type("states", states, ctypes.c_double),
        by_type("count", count),
        _function(library.grutrace_replay, [_address], _integer),
        _function(library.grutrace_held_step, [_address, _address, _address]),
        _function(library.grutrace_directions, [_address], _integer),
        _function(held.grutrace_add_call, [_address, _integer, *[_address] * 5], _integer),
    )


def _function(function: Any, arguments: list[Any], result: Any = None) -> Any:
    function.argtypes, function.restype = arguments, result
    return function
