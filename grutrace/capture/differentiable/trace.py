"""`DifferentiableTrace`: the gates of a model's GRUs as tensors in the graph of its forward."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from grutrace.capture.attachment import Attachment
from grutrace.capture.differentiable.graph_call import GraphCall
from grutrace.capture.differentiable.module_calls import ModuleCalls
from grutrace.capture.differentiable.site import DifferentiableSite
from grutrace.capture.kernel_calls.observation import KernelRun
from grutrace.capture.kernel_calls.torch_context import (
    SkippedCall,
    is_checkpoint_forward,
    is_transformed,
)
from grutrace.capture.options import byte_count
from grutrace.capture.selection import select
from grutrace.capture.tracer_warnings import TracerWarnings, warn_of_garbage_collection
from grutrace.errors import (
    NotRecordedError,
    OptionError,
    ResidualError,
    ResidualWarning,
    StateError,
    join_names,
    reject_unknown_options,
    require_one_of,
    short_repr,
    suggest_name,
)
from grutrace.gru.gate_copies import NO_GATES
from grutrace.options import DEFAULT_STATE_MEMORY, STACK_MODES, Check, CompiledCode, Stacks
from grutrace.records import FORWARD_QUANTITIES, Site
from grutrace.reprs import wrap_text

if TYPE_CHECKING:
    from typing_extensions import Self

#: Which calls a trace holds: all with the present weights, or the last of each module.
Keep: TypeAlias = Literal["all", "last"]

_TRANSFORMED = (
    "it ran under a transform of torch.func, whose gradients are not in autograd's graph: compute "
    "them with backward() or torch.autograd.grad"
)
_SET = (
    "an intervention set its gates, which do not follow from the weights: leave the intervention "
    "first, or record the call with a trace that is not differentiable"
)
_CHECKPOINTED = (
    "it ran in a reentrant activation checkpoint, whose forward has no graph: pass "
    "use_reentrant=False to torch.utils.checkpoint.checkpoint"
)
_NOT_IN_GRAPH = (
    "the lower layers of its stack ran apart from the model's forward, so their states are not in "
    "its graph: pass stacks='split', and give other tracers of this model no stacks='rerun'"
)


class DifferentiableTrace:
    """The gates of a model's GRUs as tensors in the autograd graph of the model's own forward.

    ``grutrace.trace(model, differentiable=True)`` returns one. Nothing is run again: a gate is a
    function of the input, the weights and the state before its step, and that state is the kernel's
    own output. So the gradient of a loss on gates is exact, and flows on through the kernel's own
    backward. The gates are computed when they are read. If no loss is computed from them, the
    model's gradients are unchanged bit for bit.

    The trace keeps the graph of its calls alive, and so their memory, until `clear`. Read gates
    before ``optimizer.step()``: afterwards the weights that they follow from are gone, and the next
    call of a module drops its earlier ones. So memory does not grow in a training loop, unless the
    weights of the GRU are frozen.

    Args:
        model: A model that contains nn.GRU or nn.GRUCell modules, or such a module.
        sites: Glob, or list of globs, for the names of the sites. None for all sites.
        keep: ``all`` keeps all calls since the weights changed. ``last`` keeps the last call of
            each module only, so that memory never grows; a decoder makes one call per step.
        recording: Whether calls are kept from entering the context manager on.
        stacks: How to see between the layers of a stack. ``split`` replaces the fused call with one
            call per layer, which has the same bits on a CPU. ``auto`` does so on a CPU, and
            elsewhere if no recorded layer has dropout, because dropout would draw other masks.
        check: What to do if the states that the gates lead to differ from the kernel's states by
            more than rounding: ``warn``, ``raise`` a `ResidualError`, or ``off``. The check is made
            when gates are computed.
        compiled: How code compiled by torch.compile runs; see `grutrace.Tracer`.
        state_memory: Memory for final states, to find the sequence that a call continues.

    Raises:
        OptionError: An option has an invalid value, or a glob matches no site.
        UnsupportedError: The model contains no GRU.

    Examples:
        A loss that keeps the update gate small:

        >>> import torch
        >>> import grutrace
        >>> model = torch.nn.GRU(4, 3)
        >>> with grutrace.trace(model, differentiable=True) as trace:
        ...     output, final = model(torch.randn(5, 2, 4))
        ...     loss = output.square().mean() + 0.1 * trace["l0"].update.mean()
        ...     loss.backward()
        >>> model.weight_ih_l0.grad.shape
        torch.Size([9, 4])
    """

    @reject_unknown_options
    def __init__(
        self,
        model: nn.Module,
        *,
        sites: str | Sequence[str] | None = None,
        keep: Keep = "all",
        recording: bool = True,
        stacks: Stacks = "auto",
        check: Check = "warn",
        compiled: CompiledCode = "auto",
        state_memory: int | str = DEFAULT_STATE_MEMORY,
    ) -> None:
        require_one_of("keep", keep, get_args(Keep))
        require_one_of("stacks", stacks, STACK_MODES)
        require_one_of("check", check, get_args(Check))
        require_one_of("compiled", compiled, get_args(CompiledCode))
        if stacks == "rerun":
            raise OptionError(
                "stacks: expected 'split' or 'auto' with differentiable=True, because layers that "
                "run again are not in the model's graph; found 'rerun'"
            )
        selections = select(model, sites, FORWARD_QUANTITIES)
        if stacks == "auto" and not any(each.description.dropout for each in selections):
            stacks = "split"
        memory = byte_count("state_memory", state_memory) // len(selections)
        self._model_name = type(model).__qualname__
        self._selections, self._check, self._records_on_enter = selections, check, recording
        self._calls = [ModuleCalls(keep == "last", memory) for _ in selections]
        self._skipped: dict[int, str] = {}
        self._called: set[int] = set()
        self._is_closed = self._has_recorded = False
        self._sites: dict[str, tuple[int, Site]] = {
            site.name: (index, site)
            for index, selection in enumerate(selections)
            for site in selection.description.sites
        }
        self._warnings = TracerWarnings(selections, check)
        self._attachment = Attachment(
            model,
            selections,
            [NO_GATES] * len(selections),
            stacks,
            compiled,
            self._receive,
            self._should_record,
            self._warnings,
        )
        self._finalizer = weakref.finalize(self, _stop_unreferenced, self._attachment)
        self._finalizer.atexit = False

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of the sites, in the model's order."""
        return tuple(self._sites)

    def __getitem__(self, name: str) -> DifferentiableSite:
        """Return the site of this name.

        Raises:
            NotRecordedError: There is no such site. The message lists the sites.
        """
        if name not in self._sites:
            near = suggest_name(name, self.sites) if isinstance(name, str) else ""
            sites = join_names(repr(site) for site in self.sites)
            raise NotRecordedError(f"site {short_repr(name)} is not traced{near}; sites: {sites}")
        index, site = self._sites[name]
        return DifferentiableSite(
            site,
            self._calls[index],
            partial(self._rows, index, site),
            partial(self._require_calls, index, site),
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self.sites)

    def __contains__(self, name: object) -> bool:
        return name in self._sites

    def __repr__(self) -> str:
        calls = sum(len(module.calls) for module in self._calls)
        return wrap_text(
            f"<differentiable trace of {self._model_name}: {len(self.sites)} sites, {calls} calls>"
        )

    @property
    def is_recording(self) -> bool:
        """Whether calls of the model are being kept."""
        return self._attachment.is_active

    def start(self) -> None:
        """Keep calls from now on.

        Raises:
            StateError: The trace is closed.
        """
        self._require_open()
        with self._attachment.lock:
            if not self._attachment.is_active:
                self._has_recorded = True
                try:
                    self._attachment.start()
                except BaseException:
                    self._attachment.stop()
                    raise

    def stop(self) -> None:
        """Keep no more calls. Those that are kept stay."""
        with self._attachment.lock:
            self._attachment.stop()

    def clear(self) -> None:
        """Release all calls, and the graph that the trace keeps alive. Sequences count from 0.

        Tensors that were read before stay valid, and keep the graph that they belong to.
        """
        for calls in self._calls:
            calls.clear()

    def close(self) -> None:
        """Keep no more calls, for good. Gates can still be read. Closing twice does nothing."""
        if self._close():
            self._warn_of_uncalled_modules()

    def __enter__(self) -> Self:
        self._require_open()
        if self._records_on_enter:
            self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._close() and kind is None:
            self._warn_of_uncalled_modules()

    def _close(self) -> bool:
        if self._attachment.is_active:
            self._attachment.warn_of_unobserved_code()
        self.stop()
        was_open, self._is_closed = not self._is_closed, True
        self._finalizer.detach()
        return was_open

    def _require_open(self) -> None:
        if self._is_closed:
            raise StateError("the trace is closed: create a new one to trace again")

    def _warn_of_uncalled_modules(self) -> None:
        uncalled = [index for index in range(len(self._selections)) if index not in self._called]
        if self._has_recorded and uncalled:
            self._warnings.uncalled_modules(uncalled)

    def _should_record(self, _index: int) -> bool:
        return True

    def _receive(self, index: int, run: KernelRun | SkippedCall) -> None:
        """Keep a call of a module."""
        self._called.add(index)
        reason = run.reason if isinstance(run, SkippedCall) else _refusal(run)
        if reason is None and isinstance(run, KernelRun):
            call = GraphCall(run)
            if call.edges.is_complete:
                self._calls[index].add(call)
                return
            reason = _NOT_IN_GRAPH
        if reason is not None:
            self._skipped[index] = reason
            self._warnings.skipped_call(index, reason)

    def _require_calls(self, index: int, site: Site) -> None:
        """Require that the trace holds a call of a module.

        Raises:
            NotRecordedError: It holds none.
        """
        if self._calls[index].calls:
            return
        reason = self._skipped.get(index)
        if reason is not None:
            raise NotRecordedError(f"no call of {site.name} was kept: {reason}")
        raise NotRecordedError(
            f"the trace holds no call of {site.name}: call the model while the trace is recording, "
            "and read the gates before trace.clear()"
        )

    def _rows(self, index: int, site: Site, quantity: str) -> Tensor:
        self._require_calls(index, site)
        calls = self._calls[index]
        rows = calls.rows(site, quantity)
        if self._check != "off" and quantity not in ("hidden", "input"):
            check = calls.residual(site)
            if check.residual > check.tolerance:
                message = (
                    f"the gates of {site.name} do not lead to the states of the kernel: the "
                    f"residual is {check.residual:.3g}, and rounding explains "
                    f"{check.tolerance:.3g}. The weights or the layer's input were probably "
                    "changed without PyTorch noticing (.data, a NumPy view)"
                )
                if self._check == "raise":
                    raise ResidualError(message)
                self._warnings.warn_once(site.name, message, ResidualWarning)
        return rows


def _refusal(run: KernelRun) -> str | None:
    """Return why the gates of the present call cannot be in the graph; None if they can."""
    if any(run.gates_as_set or ()):
        return _SET
    if is_transformed():
        return _TRANSFORMED
    if not torch.is_grad_enabled() and is_checkpoint_forward():
        return _CHECKPOINTED
    return None


def _stop_unreferenced(attachment: Attachment) -> None:
    """Stop a trace that was garbage-collected while it was recording."""
    was_recording = attachment.is_active
    attachment.stop()
    if was_recording:
        warn_of_garbage_collection()
