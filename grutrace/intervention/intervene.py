"""`intervene`: hold or change gates and states of a model's GRUs within a block."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor, nn

from grutrace.capture.kernel_calls import compiled_graphs
from grutrace.capture.kernel_calls.observation import KernelRun
from grutrace.capture.kernel_calls.replacement import InterceptedCall, PreparedCall, Replacement
from grutrace.capture.kernel_calls.subscription import Subscription
from grutrace.capture.kernel_calls.torch_context import (
    SkippedCall,
    active_checkpoints,
    unwrap_functorch,
)
from grutrace.capture.selection import SelectedModule
from grutrace.errors import GrutraceWarning, StateError, UnsupportedError, join_names
from grutrace.intervention.bound import BoundSetting
from grutrace.intervention.checkpointed_calls import CheckpointedCalls, Starts, context_of
from grutrace.intervention.replaced_call import PreparedIntervention
from grutrace.intervention.selection import Numbers, Steps
from grutrace.intervention.settings import Setting, make_settings
from grutrace.intervention.step_counter import Progress, StepCounter
from grutrace.intervention.values import Align, Tokens, Values
from grutrace.reprs import wrap_text

if TYPE_CHECKING:
    from typing_extensions import Self


_NO_COLUMNS = np.empty(0, np.int64)


class ModuleIntervention:
    """The settings of one module, in one block.

    Args:
        settings: The settings, in the order in which they take effect.

    Attributes:
        was_called: Whether the module was called.
        applied: The settings that applied to a step.
    """

    def __init__(self, settings: Sequence[Setting]) -> None:
        self._settings = list(settings)
        self._counter = StepCounter()
        self._lock = threading.Lock()
        self._counts = any(setting.depends_on_step for setting in settings)
        self.was_called = False
        self.applied: set[Setting] = set()
        self._checkpointed = CheckpointedCalls(_names(settings))

    def end(self) -> None:
        """End the block."""
        self._checkpointed.end()

    def prepare(self, active: Sequence[Replacement], call: InterceptedCall) -> PreparedCall:
        """Prepare a call with the settings of all blocks."""
        settings: dict[tuple[int, bool], list[BoundSetting]] = {}
        noted: list[tuple[ModuleIntervention, Progress | None]] = []
        sizes = _sizes(call)
        checkpoints = active_checkpoints()
        interventions = [each for each in active if isinstance(each, ModuleIntervention)]
        # Sorting takes as long as a small step.
        counts = any([intervention._counts for intervention in interventions])
        columns = np.argsort(call.layout.columns) if counts else _NO_COLUMNS
        for intervention in interventions:
            intervention.was_called = True
            repeated = intervention._checkpointed.find_repeated(checkpoints)
            if repeated is None:
                progress = intervention._progress(call, columns)
                noted.append((intervention, progress))
            else:
                progress = intervention._progress_of_repeat(call, columns, repeated)
            # A checkpoint that is repeated runs those within it anew.
            intervention._checkpointed.note(checkpoints, call.call.initial, progress)
            for setting in intervention._settings:
                needed = progress if setting.depends_on_step else None
                bound = BoundSetting(setting, needed, sizes)
                settings.setdefault((setting.layer, setting.reverse), []).append(bound)

        def finish(final: Tensor) -> None:
            if call.call.bidirectional:
                return
            for intervention, progress in noted:
                if progress is not None:
                    with intervention._lock, context_of(final):
                        own = unwrap_functorch(final)
                        intervention._counter.add(own, progress, call.layout.lengths[columns])

        prepared = PreparedIntervention(call, settings, finish)
        for intervention in interventions:
            own = prepared.applied & set(intervention._settings)
            intervention.applied |= own
            if own:
                intervention._checkpointed.guard(checkpoints)
        return prepared

    def _progress(self, call: InterceptedCall, columns: np.ndarray) -> Progress | None:
        """Return how far the sequences of a call have come; None if no setting needs to know."""
        if not self._counts:
            return None
        if call.call.bidirectional:
            return Progress(np.zeros(len(columns), np.int64), columns)
        initial = call.call.initial
        with self._lock, context_of(initial):
            return self._counter.before(unwrap_functorch(initial), columns)

    def _progress_of_repeat(
        self, call: InterceptedCall, columns: np.ndarray, repeated: Starts
    ) -> Progress | None:
        """Return how far the sequences had come before the call that is repeated."""
        if not self._counts or call.call.bidirectional:
            return self._progress(call, columns)
        return self._checkpointed.progress_of(repeated, call.call.initial)


def _names(settings: Sequence[Setting]) -> str:
    return join_names(dict.fromkeys(setting.what for setting in settings))


def _sizes(call: InterceptedCall) -> list[int]:
    sizes = call.call.batch_sizes
    if sizes is not None:
        return list(sizes.tolist())
    steps, batch = call.call.input.shape[:2]
    return [batch] * steps


class Intervention:
    """Settings of a model's GRUs that hold within a ``with`` block. `intervene` makes it.

    Args:
        by_module: The settings of each module.
    """

    def __init__(self, by_module: Sequence[tuple[SelectedModule, Sequence[Setting]]]) -> None:
        self._by_module = by_module
        self._modules: list[ModuleIntervention] = []
        self._subscriptions: list[Subscription | compiled_graphs.EagerCode] = []

    def __repr__(self) -> str:
        settings = [setting.what for _, settings in self._by_module for setting in settings]
        return wrap_text(f"<intervention: {join_names(settings)}>")

    def __enter__(self) -> Self:
        if self._subscriptions:
            raise StateError("the intervention is active: make another one, with the same values")
        self._modules = [ModuleIntervention(settings) for _, settings in self._by_module]
        try:
            if compiled_graphs.any_with_gru_kernel():
                self._start(compiled_graphs.EagerCode())
            for (selection, _), replacement in zip(self._by_module, self._modules, strict=True):
                module = selection.module
                if module is None:
                    raise StateError(
                        f"{selection.description.path}: the module was garbage-collected"
                    )
                self._start(Subscription(module, _refuse, replacement=replacement))
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop()
        if kind is None:
            self._report()

    def _start(self, subscription: Subscription | compiled_graphs.EagerCode) -> None:
        # Stored before it starts: an interruption must not leave it active.
        self._subscriptions.append(subscription)
        subscription.start()

    def _stop(self) -> None:
        for module in self._modules:
            module.end()
        while self._subscriptions:
            self._subscriptions[-1].stop()
            self._subscriptions.pop()

    def _report(self) -> None:
        """Report settings that had no effect.

        Raises:
            StateError: A module was not called.
        """
        for (_, settings), module in zip(self._by_module, self._modules, strict=True):
            names = join_names(dict.fromkeys(setting.site for setting in settings))
            if not module.was_called:
                raise StateError(
                    f"intervene: expected the model to call {names} within the block; found no call"
                )
            for setting in settings:
                message = None
                if setting not in module.applied:
                    message = (
                        f"intervene: {setting.what} was not set: no call had the selected steps "
                        "and sequences"
                    )
                elif isinstance(setting.value, Values) and not setting.value.is_used_up:
                    value = setting.value
                    message = (
                        f"intervene: {setting.what}: the array has {value.shape[0]} steps, and "
                        f"only {value.used_steps} were used"
                    )
                if message is not None:
                    warnings.warn(message, GrutraceWarning, stacklevel=3)


def _refuse(run: KernelRun | SkippedCall) -> None:
    """Refuse a call whose output cannot be replaced.

    Raises:
        UnsupportedError: Always.
    """
    assert isinstance(run, SkippedCall)
    reason = run.reason.partition(":")[0]
    raise UnsupportedError(f"intervene: expected a call whose output can be replaced; {reason}")


def intervene(
    model: nn.Module,
    site: str | Mapping[str, Mapping[str, Any]],
    *,
    units: Numbers | None = None,
    steps: Steps | None = None,
    sequences: Numbers | None = None,
    tokens: Tokens | None = None,
    align: Align = "step",
    **quantities: Any,
) -> Intervention:
    """Set gates or states of a model's GRUs to other values, within a ``with`` block.

    The quantities are passed as keywords: ``reset``, ``update``, ``candidate`` and ``hidden``; and
    ``reset_preactivation``, ``update_preactivation`` and ``candidate_preactivation``, the arguments
    of the sigmoids and the tanh. In PyTorch's convention, an update gate of 1 keeps the old state.

    PyTorch's kernel runs as usual up to the first step that is set. From there on, the layer is
    computed step by step, with the kernel's own equations (Cho et al. 2014, in the form of
    torch.nn.GRU). Gradients flow through everything that is not set, and into values that require
    them. Calls of all threads are affected. Blocks may be nested: the inner one gets the values
    that the outer one has set.

    The values are numbers; arrays that broadcast to (steps, sequences, units) of those selected;
    functions; or a site or sequence of a trace. A function gets the gate of one step, (n, U), and
    its `Context`: ``at.site``, ``at.step``, ``at.sequences``, ``at.tokens``, ``at.units``.
    Sequence i of a recorded site gives the values of sequence i of the batch; a recorded sequence
    gives those of every sequence.

    Args:
        model: The model. It is not changed.
        site: Name of a site, or a glob; or a dict of values by site and quantity.
        units: Units to set, as numbers or a slice. None sets all.
        steps: Steps to set, counted from 0 over all calls of a sequence, in time order also for a
            reverse direction. As numbers or a slice; None sets all. A call continues a sequence if
            it starts from the state that an earlier call in the block ended with.
        sequences: Sequences to set, as positions in the batch in which they start. None sets all.
        tokens: Tokens of each sequence of the batch, for functions and ``align="token"``.
        align: ``step``: values of a recorded sequence are used at the same step. ``token``: at the
            same occurrence of the same token; other steps are not set.
        **quantities: Values by quantity.

    Returns:
        A context manager.

    Raises:
        OptionError: A site, quantity, unit or step does not exist, or a value does not fit. If that
            depends on the batch, the model's call raises it, before the layer runs. A function that
            returns another shape or NaN makes the model's call raise it.
        StateError: At the end of the block, if a site was not called.
        UnsupportedError: The model has no GRU, or nn.DataParallel makes replicas of it. The model's
            call raises it if its output cannot be replaced.

    Examples:
        >>> import torch
        >>> import grutrace
        >>> gru = torch.nn.GRU(input_size=2, hidden_size=4)
        >>> x = torch.randn(6, 3, 2)                     # 6 steps, 3 sequences
        >>> with grutrace.intervene(gru, "l0", update=1.0, units=[0, 2], steps=slice(2, None)):
        ...     output, final = gru(x)
        >>> torch.allclose(output[2:, :, 2], output[1, :, 2], atol=1e-6)   # unit 2 keeps its state
        True
        >>> with grutrace.intervene(gru, "l0", reset=lambda gate, at: gate.clamp(max=0.5)):
        ...     output, final = gru(x)

        Values of another run:

        >>> with grutrace.trace(gru) as other:
        ...     expected, final = gru(torch.randn(6, 3, 2))
        >>> with grutrace.intervene(gru, {"l0": {"hidden": other["l0"]}}):
        ...     output, final = gru(x)
        >>> torch.equal(output, expected)
        True
    """
    by_module = make_settings(
        model,
        site,
        quantities,
        units=units,
        steps=steps,
        sequences=sequences,
        tokens=tokens,
        align=align,
    )
    _refuse_replicas(model, by_module)
    return Intervention(by_module)


def _refuse_replicas(
    model: nn.Module, by_module: Sequence[tuple[SelectedModule, Sequence[Setting]]]
) -> None:
    """Refuse modules of which nn.DataParallel makes replicas.

    Raises:
        UnsupportedError: There is one.
    """
    for wrapper in model.modules():
        if isinstance(wrapper, nn.DataParallel) and len(wrapper.device_ids) > 1:
            replicated = set(wrapper.modules())
            for selection, settings in by_module:
                if selection.module in replicated:
                    raise UnsupportedError(
                        f"intervene: expected one module, found {_names(settings)} in an "
                        f"nn.DataParallel, which makes {len(wrapper.device_ids)} replicas in each "
                        "call: run the model without it, or in one process per device"
                    )
