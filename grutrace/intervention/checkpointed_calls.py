"""Calls that activation checkpointing runs in a block, and repeats for the backward pass.

A repeated call is set as the call that it repeats. Which one that is, the checkpoint itself says:
PyTorch keeps the same object from the forward pass to the backward pass.

L layers, D directions, B sequences in a batch, H hidden size.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from hashlib import blake2b
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary, WeakSet

import numpy as np
import torch
from torch import Tensor

from grutrace.capture.kernel_calls.torch_context import (
    Checkpoints,
    active_checkpoints,
    is_wrapped,
    isolated_context,
    unwrap_functorch,
)
from grutrace.errors import UnsupportedError
from grutrace.intervention.step_counter import Progress

#: By a digest of the states that a call starts from, how far its sequences had come; None if two
#: calls of a checkpoint start from the same states after different numbers of steps.
Starts: TypeAlias = dict[bytes, Progress | None]


class CheckpointedCalls:
    """The calls of one module that activation checkpointing runs in one block.

    A checkpoint around the whole block repeats the block, too, and so is none of its own.

    Args:
        names: Names the settings in errors.
    """

    def __init__(self, names: str) -> None:
        self._names = names
        self._lock = threading.Lock()
        self._has_ended = threading.Event()
        around = active_checkpoints()
        self._around: WeakSet[Any] = WeakSet([*around.forward, *around.repeating])
        self._starts: WeakKeyDictionary[Any, Starts] = WeakKeyDictionary()

    def end(self) -> None:
        """End the block."""
        self._has_ended.set()

    def find_repeated(self, checkpoints: Checkpoints) -> Starts | None:
        """Return the calls of the checkpoint that repeats this call; None if none repeats it.

        Args:
            checkpoints: Those around the call.

        Raises:
            UnsupportedError: The call that it repeats was made outside the block.
        """
        own = self._own(checkpoints.repeating)
        if not own:
            return None
        with self._lock:
            starts = self._starts.get(own[0])
        if starts is None:
            raise UnsupportedError(
                f"intervene: {self._names}: activation checkpointing repeats a call that was made "
                "outside the block: call backward() outside the block, too"
            )
        return starts

    def progress_of(self, starts: Starts, initial: Tensor) -> Progress:
        """Return how far the sequences had come before the call that is repeated.

        Args:
            starts: The calls of the checkpoint.
            initial: (L * D, B, H) the states that the call starts from.

        Raises:
            UnsupportedError: The states do not say which call it repeats.
        """
        with self._lock:
            progress = starts.get(_digest(initial))
        if progress is None:
            raise UnsupportedError(
                f"intervene: {self._names}: activation checkpointing repeats a call from states "
                "that no call of the forward pass, or more than one, started from: set gates at "
                "all steps, by a number or an array without steps, or do not checkpoint the layer"
            )
        return progress

    def note(self, checkpoints: Checkpoints, initial: Tensor, progress: Progress | None) -> None:
        """Note a call, which may be repeated.

        Args:
            checkpoints: Those around the call.
            initial: (L * D, B, H) the states that the call starts from.
            progress: How far the sequences have come; None if it does not matter.
        """
        own = self._own(checkpoints.forward)
        if not own:
            return
        digest = b"" if progress is None else _digest(initial)
        with self._lock:
            for each in own:
                starts = self._starts.setdefault(each, {})
                is_new = digest not in starts
                if is_new or _are_same(starts[digest], progress):
                    starts[digest] = progress
                else:
                    starts[digest] = None

    def guard(self, checkpoints: Checkpoints) -> None:
        """Refuse a backward pass after the block, which would repeat a call without settings.

        Args:
            checkpoints: Those around the call.
        """
        # What is kept in the checkpoint keeps nothing of the block alive.
        refuse = partial(_refuse_late_backward, self._has_ended, self._names)
        for each in self._own(checkpoints.forward):
            if not hasattr(each, "recompute_fn"):
                each.register_prehook(refuse)
                continue
            if not isinstance(each.recompute_fn, _GuardedRecompute):
                each.recompute_fn = _GuardedRecompute(each.recompute_fn)
            each.recompute_fn.refusals[self._has_ended] = refuse

    def _own(self, checkpoints: list[Any]) -> list[Any]:
        return [each for each in checkpoints if each not in self._around] if checkpoints else []


class _GuardedRecompute:
    """Repeats a checkpointed call, unless a block in which it was made has ended.

    Args:
        recompute: Repeats the call.

    Attributes:
        refusals: By the event that ends a block, a function that raises an error after it.
    """

    def __init__(self, recompute: Callable[..., Any]) -> None:
        self._recompute = recompute
        self.refusals: dict[threading.Event, Callable[[None], None]] = {}

    def __call__(self, *args: Any) -> Any:
        for refuse in self.refusals.values():
            refuse(None)
        return self._recompute(*args)


def _refuse_late_backward(has_ended: threading.Event, names: str, _: Any) -> None:
    """Refuse the backward pass of a checkpointed call if the block has ended.

    Raises:
        UnsupportedError: It has.
    """
    if has_ended.is_set():
        raise UnsupportedError(
            f"intervene: {names}: the call ran in an activation checkpoint, which runs it again in "
            "the backward pass, and the block has ended: call backward() within the block"
        )


def context_of(states: Tensor) -> AbstractContextManager[None]:
    """Return a context in which states inside a transform of torch.func can be read."""
    return isolated_context() if is_wrapped(states) else nullcontext()


def _digest(states: Tensor) -> bytes:
    """Return a digest of the bytes of states."""
    with context_of(states):
        values = unwrap_functorch(states).detach().cpu().contiguous()
        return blake2b(values.view(torch.uint8).numpy().tobytes(), digest_size=16).digest()


def _are_same(one: Progress | None, other: Progress | None) -> bool:
    if one is None or other is None:
        return one is other
    return np.array_equal(one.steps, other.steps) and np.array_equal(one.positions, other.positions)
