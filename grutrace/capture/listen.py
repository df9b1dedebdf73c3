"""Hearing every call of a module's kernel, exactly as the kernel was called.

There are two ways, and all tracers of a module share one:

- A plain forward hook where the module's forward is PyTorch's own and it has one layer: what such
  a hook is given determines what the kernel was given.
- A tap on the kernel itself everywhere else (see tap.py). It sees the kernel's arguments after
  whatever the forward did to them (a subclass may pack a padded batch, a wrapper may make fresh
  weights), and through it a stack is answered layer by layer.

T steps, B sequences in a batch, I input size, H hidden size, L layers, D directions.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any, NamedTuple
from weakref import WeakSet

from torch import nn
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.rnn import PackedSequence
from torch.utils.hooks import RemovableHandle

from grutrace.capture import observe
from grutrace.capture.observe import GRUModule, Observation, Stacks
from grutrace.capture.surroundings import (
    Missed,
    aside,
    compiler_is_loaded,
    hindrance,
    is_recomputation,
    uncompiled,
)
from grutrace.capture.tap import Kernel, Tap, close_forgotten, innermost
from grutrace.errors import UnsupportedError
from grutrace.gru.gather import NOTHING, Asked, together

Receiver = Callable[[Observation | Missed], None]
#: Asked once before each call is heard; if it says no, the call is left alone.
Wants = Callable[[], bool]


def always() -> bool:
    """Want every call."""
    return True


class Ear:
    """Calls ``receiver`` after every call of a module's kernel, while it listens.

    A call that repeats an earlier one for the backward pass (activation checkpointing) is left out.

    Args:
        module: The layer.
        receiver: Called in the thread that runs the model, before anyone can change the output;
            with `Missed` where the call cannot be observed.
        stacks: How to see between the layers of a stack: ``split``, ``rerun``, or ``auto`` for
            split on a CPU and rerun elsewhere. Where the receivers of one module differ, rerun
            wins, then auto: whatever leaves the kernel's answer alone.
        wants: Whether the call that comes now is to be heard. Where no receiver of a module wants
            it, nothing is done for it.
        asked: Which of the kernel's own gates the receiver wants, where they can be had.
    """

    def __init__(
        self,
        module: GRUModule,
        receiver: Receiver,
        stacks: Stacks = "auto",
        wants: Wants = always,
        asked: Asked = NOTHING,
    ) -> None:
        self._module = module
        self._wish = _Wish(receiver, stacks, wants, asked)
        self._listener: _Listener | None = None

    def start(self) -> None:
        """Listen from now on."""
        with _lock:
            # One listener a module, so that several tracers share one tap, and a stack is split
            # once. It is found by its hooks: nothing else keeps it, or the module, alive.
            self._listener = next(_listeners_on(self._module), None) or _Listener(self._module)
            self._listener.add(self, self._wish)

    def stop(self) -> bool:
        """Listen no longer. Twice does nothing.

        Returns:
            Whether it heard everything: not if somebody else has removed its hooks meanwhile.
        """
        return self._listener is None or self._listener.remove(self)


class _Wish(NamedTuple):
    """What one ear wants; see there."""

    receiver: Receiver
    stacks: Stacks
    wants: Wants
    asked: Asked


def _listeners_on(module: nn.Module) -> Iterator[_Listener]:
    for hook in module._forward_hooks.values():
        if isinstance(hook, _Hook):
            yield hook.listener


def _is_plain(module: GRUModule) -> bool:
    # Reading a parametrized weight computes it anew: other random numbers, another power iteration.
    if "forward" in vars(module) or is_parametrized(module):
        return False
    forward = type(module).forward
    if isinstance(module, nn.GRUCell):
        return forward is nn.GRUCell.forward
    return forward is nn.GRU.forward and module.num_layers == 1


class _Listener:
    """The hooks of one module, there as long as someone listens."""

    def __init__(self, module: GRUModule) -> None:
        self._module = module
        self._wishes: dict[object, _Wish] = {}
        self._before: RemovableHandle | None = None
        self._after: RemovableHandle | None = None
        self._taps: WeakSet[Tap] = WeakSet()

    def add(self, key: object, wish: _Wish) -> None:
        _keep_the_compiler_out()
        plain = _is_plain(self._module)
        with _lock:
            self._wishes[key] = wish
            if not _is_on(self._after):
                hook = _Hook(self, self.after_plain_forward if plain else self.after_forward)
                self._after = self._module.register_forward_hook(
                    hook, prepend=True, with_kwargs=True, always_call=True
                )
            if not _is_on(self._before) and (wish.asked.columns or not plain):
                before = self.before_plain_forward if plain else self.before_forward
                self._before = self._module.register_forward_pre_hook(
                    _Hook(self, before), with_kwargs=True
                )

    def remove(self, key: object) -> bool:
        with _lock:
            hooks = (self._before, self._after)
            heard_all = all(_is_on(hook) for hook in hooks if hook is not None)
            heard_all = heard_all or key not in self._wishes
            self._wishes.pop(key, None)
            if not self._wishes and self._before is not None:
                self._before.remove()
                self._before = None
        close_forgotten()
        self._remove_after()
        return heard_all

    def _remove_after(self) -> None:
        """Remove the hook behind the forward, once no forward that it must end is running."""
        with _lock:
            running = any(tap.running for tap in tuple(self._taps))
            if not self._wishes and not running and self._after is not None:
                self._after.remove()
                self._after = None

    # PyTorch keeps in a second place that a hook takes keywords. One that is put on or taken off
    # while a forward runs, in another thread or by another hook, is called without them once.

    def before_plain_forward(
        self, module: GRUModule, args: tuple[Any, ...], *with_kwargs: dict[str, Any]
    ) -> None:
        for kwargs in with_kwargs:
            if observe.is_worth_harvesting(module, args, kwargs, self._asked()):
                self.before_forward(module, args, kwargs)

    def after_plain_forward(
        self, module: GRUModule, args: tuple[Any, ...], *kwargs_and_output: Any
    ) -> None:
        tap = innermost(self)
        if tap is not None and not tap.forgotten:
            self.after_forward()
            return
        if len(kwargs_and_output) < 2:
            return
        kwargs, output = kwargs_and_output
        # Without an output the forward has failed, and there was no tap to close.
        if output is None or is_recomputation():
            return
        listening = self._listening()
        if not listening:
            return
        missed = hindrance((*args, *kwargs.values(), output))
        if missed is not None:
            _tell(listening, missed)
            return
        with aside():
            _tell(listening, observe.plain_call(module, args, kwargs, output))

    def before_forward(
        self, module: GRUModule, args: tuple[Any, ...], *with_kwargs: dict[str, Any]
    ) -> None:
        if not with_kwargs:
            return
        given = (*args, *with_kwargs[0].values())
        packed = (each for each in given if isinstance(each, PackedSequence))
        sorted_indices = next((each.sorted_indices for each in packed), None)

        def answer(kernel: Kernel, arguments: tuple[Any, ...]) -> Any:
            if not observe.is_own_call(module, arguments):
                return kernel(*arguments)
            repeats = is_recomputation()
            listening = [] if repeats else self._listening()
            if not (repeats or listening):
                return kernel(*arguments)
            missed = hindrance(arguments)
            if missed is not None:
                _tell(listening, missed)
                return kernel(*arguments)
            result, observation = observe.kernel_call(
                module,
                kernel,
                arguments,
                sorted_indices,
                self._stacks(),
                self._asked(),
            )
            if listening:
                with aside():
                    _tell(listening, observation)
            return result

        with _lock:
            if not self._wishes:
                return
            tap = Tap(answer, self)
            self._taps.add(tap)
        tap.open()

    def after_forward(self, *_: Any) -> None:
        tap = innermost(self)
        if tap is not None:
            tap.close()
        self._remove_after()

    def _stacks(self) -> Stacks:
        asked = {wish.stacks for wish in tuple(self._wishes.values())}
        return next((each for each in observe.STACKS if each in asked), "auto")

    def _asked(self) -> Asked:
        wishes = [wish.asked for wish in tuple(self._wishes.values())]
        return wishes[0] if len(wishes) == 1 else together(wishes, self._module.hidden_size)

    def _listening(self) -> list[Receiver]:
        """Return those who want the call that comes now. Ask once a call: they count."""
        return [wish.receiver for wish in tuple(self._wishes.values()) if wish.wants()]


def _tell(receivers: list[Receiver], observation: Observation | Missed) -> None:
    """Tell all receivers, also if one of them fails."""
    errors = []
    for receiver in receivers:
        try:
            receiver(observation)
        except Exception as error:
            errors.append(error)
    if errors:
        raise errors[0]


_lock = threading.RLock()


def _renew_lock() -> None:
    global _lock
    _lock = threading.RLock()


# Another thread of the parent may have held it.
if hasattr(os, "register_at_fork"):  # There is none on Windows.
    os.register_at_fork(after_in_child=_renew_lock)


def _is_on(handle: RemovableHandle | None) -> bool:
    """Whether the hook of a handle is still on its module."""
    hooks = None if handle is None else handle.hooks_dict_ref()
    return hooks is not None and handle is not None and handle.id in hooks


class _NotScriptableError(UnsupportedError, AttributeError):
    """Also an AttributeError, so that whoever merely looks for the attribute finds none."""


class _Hook:
    """A hook that does nothing in a copy of its module, be it deep-copied, pickled or saved."""

    def __init__(self, listener: _Listener, function: Callable[..., None]) -> None:
        self.listener = listener
        self._function = function

    def __call__(self, *args: Any) -> None:
        if _keep_the_compiler_out():
            self(*args)
        else:
            self._function(*args)

    def __getattr__(self, name: str) -> Any:
        # The first thing that torch.jit.script asks of a hook, which it would compile.
        if name == "__name__":
            raise _NotScriptableError(
                "torch.jit.script compiles the hooks of a module with it, and those of a tracer "
                "cannot be: stop recording first, and record the model itself, not the script"
            )
        raise AttributeError(name)

    def __reduce__(self) -> tuple[Any, ...]:
        # A standard callable that takes anything and returns None, so that a saved model can be
        # loaded where there is no grutrace.
        return getattr, (nullcontext(), "__exit__")


def _keep_the_compiler_out() -> bool:
    """Have torch.compile call hooks and taps as they are, from when on it is there.

    Returns:
        Whether that is so only now.
    """
    if not compiler_is_loaded() or hasattr(_Hook.__call__, "_torchdynamo_disable"):
        return False
    for kind, name in ((_Hook, "__call__"), (Tap, "__torch_function__")):
        setattr(kind, name, uncompiled(getattr(kind, name)))
    return True
