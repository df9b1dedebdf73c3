"""The warnings of a tracer: calls that it cannot record or assign, rows that were lost, residuals.

Other modules find these cases; the texts that users see are here. The reason why a single call was
skipped comes with the call (`SkippedCall.reason`).
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Iterable, Sequence

from torch import nn

from grutrace.capture.kernel_calls.compiled_graphs import can_run_eagerly
from grutrace.capture.kernel_calls.torch_context import dynamo_loaded
from grutrace.capture.recording.journal import Finding, MarkedSequences, SkippedCallNotice
from grutrace.capture.selection import SelectedModule
from grutrace.errors import (
    GrutraceWarning,
    ResidualError,
    ResidualWarning,
    SinkError,
    user_stacklevel,
)
from grutrace.gru.residual import ResidualViolation
from grutrace.options import Check
from grutrace.records import Origin

#: A trace in memory that exceeds this size causes one warning. Bytes.
LARGE_TRACE_BYTES = 2 * 1024**3

_FORKED_CHILD = (
    "a traced model was called in a forked child process: its calls are not recorded. Create a "
    "tracer in the child process"
)

_LARGE_TRACE = (
    "the trace in memory has grown past 2 GiB. To use less memory, give the tracer a path "
    "(grutrace.trace(model, 'run.h5')), gates='deferred', units=, every= or max_bytes=, or "
    "sink=grutrace.Statistics(); or call trace.clear() once you have read it"
)

_COMPILED_GRAPH = (
    "torch.compile has made a graph that contains a GRU kernel: if it belongs to this model, its "
    "calls are not recorded. Pass compiled='eager', which runs compiled code as Python code while "
    "recording"
)

_GRAPHS_BEFORE_TORCH_2_6 = (
    "torch.compile has made graphs: if one contains a GRU kernel and belongs to this model, its "
    "calls are not recorded. Call the model itself instead of the compiled one, or use PyTorch 2.6 "
    "or newer, which can run compiled code as Python code"
)

_GARBAGE_COLLECTED = (
    "a tracer was garbage-collected while recording: it is closed, and its trace is complete. Keep "
    "the tracer in a variable, and close it"
)

#: By the mark of the sequence.
_MARKED_SEQUENCE = {
    "ambiguous": (
        "cannot tell which sequence a call of {} continues: several sequences ended with the state "
        "that it starts from. It starts a new sequence, with the origin 'ambiguous'. Name the "
        "sequences: with tracer.recording(sequences=...)"
    ),
    "dropped": (
        "a call of {} continues a sequence whose final state is no longer in memory. It starts a "
        "new sequence, with the origin 'dropped'. Pass state_memory='64 MiB', or more, "
        "to the tracer"
    ),
}


class TracerWarnings:
    """Warns once about each subject, such as a module or a failed sink.

    It takes no lock: in a forked child process no thread may be left to release it.

    Args:
        selections: The recorded modules.
        check: What to do when a residual exceeds the tolerance.
    """

    def __init__(self, selections: Sequence[SelectedModule], check: Check) -> None:
        self._selections, self._check = selections, check
        self._subjects: set[str] = set()

    def warn_once(
        self, subject: str, message: str, category: type[GrutraceWarning] = GrutraceWarning
    ) -> None:
        """Warn, unless there was a warning about this subject before."""
        if subject not in self._subjects:
            self._subjects.add(subject)
            self.show(message, category)

    def show(self, message: str, category: type[GrutraceWarning]) -> None:
        """Show a warning to the user."""
        warnings.warn(message, category, stacklevel=4)

    def path(self, index: int) -> str:
        """Return the name of a recorded module in messages."""
        return self._selections[index].description.path or "the model"

    def forked_child(self) -> None:
        """Warn that calls in a forked child process are not recorded."""
        self.warn_once("forked child", _FORKED_CHILD)

    def large_trace(self) -> None:
        """Warn that a trace in memory has become large."""
        self.warn_once("large trace", _LARGE_TRACE)

    def compiled_graph(self) -> None:
        """Warn of a compiled graph that contains a GRU kernel, whose calls are not recorded."""
        message = _COMPILED_GRAPH if can_run_eagerly() else _GRAPHS_BEFORE_TORCH_2_6
        self.warn_once("compiled", message)

    def replaced_module(self, path: str, kind: str) -> None:
        """Warn of a recorded layer that the model has replaced by a module of another kind."""
        self.warn_once(
            f"replaced {path}",
            f"{path} was replaced by a {kind} after the tracer was created: calls of the "
            "replacement are not recorded",
        )

    def skipped_call(self, index: int, reason: str) -> None:
        """Warn of a call that was not recorded, once per module."""
        path = self.path(index)
        self.warn_once(path, f"a call of {path} was not recorded: {reason}")

    def sequence_names(self, index: int, message: str) -> None:
        """Warn that the names of sequences do not fit a call, once per module."""
        self.warn_once(f"names of {self.path(index)}", message)

    def failed_sink(self, error: SinkError) -> None:
        """Warn that recording has stopped because the sink has failed."""
        message = f"recording has stopped, and the model continues untraced: {error}"
        self.warn_once(message, message)

    def lost_calls(self, trace: str, stored: int, lost: int) -> None:
        """Warn of calls that could not be written to a trace of this name."""
        message = (
            f"{trace} holds {stored} calls of this recording, and {lost} more are lost, because "
            "they could not be written"
        )
        self.warn_once(message, message)

    def uncalled_modules(self, indices: Sequence[int]) -> None:
        """Warn of modules that were never called while recording, and of possible causes."""
        own = [self.path(index) for index in indices if _has_own_forward(self._selections[index])]
        python = (
            f"; or the forward of {', '.join(own)} computes the GRU itself, without the kernel"
            if own
            else ""
        )
        compiled = (
            "; or it was called inside a graph of torch.compile, which is not observed "
            "(compiled='eager' runs compiled code as Python code while recording)"
            if dynamo_loaded()
            else ""
        )
        warnings.warn(
            f"nothing was recorded of {', '.join(map(self.path, indices))}: no call of PyTorch's "
            f"GRU kernel while recording{python}{compiled}",
            GrutraceWarning,
            stacklevel=user_stacklevel(),
        )

    def report_findings(self, findings: deque[Finding], calls_before: int) -> None:
        """Report and remove the findings of a journal.

        Args:
            findings: The findings, oldest first.
            calls_before: Number of calls that the trace had before the first of the journal.

        Raises:
            ResidualError: A residual exceeds the tolerance, and ``check`` is ``raise``.
        """
        while findings:
            finding = findings.popleft()
            if isinstance(finding, SkippedCallNotice):
                self.skipped_call(finding.module, finding.reason)
            elif isinstance(finding, str):
                self.warn_once(finding, finding)
            elif isinstance(finding, MarkedSequences):
                self._report_marks(finding.module, finding.origins)
            else:
                call = None if finding.call is None else calls_before + finding.call
                self.report_violations([finding._replace(call=call)])

    def _report_marks(self, index: int, origins: Iterable[Origin]) -> None:
        path = self.path(index)
        for origin in origins:
            if origin.mark in _MARKED_SEQUENCE:
                message = _MARKED_SEQUENCE[origin.mark].format(path)
                self.warn_once(f"{origin.mark} in {path}", message)

    def report_violations(self, violations: Iterable[ResidualViolation]) -> None:
        """Report residuals that exceed the tolerance, once per site.

        Raises:
            ResidualError: ``check`` is ``raise``.
        """
        for violation in violations if self._check != "off" else ():
            if self._check == "raise":
                raise ResidualError(violation.message)
            self.warn_once(violation.site.name, violation.message, ResidualWarning)


def warn_of_garbage_collection() -> None:
    """Warn that a tracer was garbage-collected while it was recording."""
    warnings.warn(_GARBAGE_COLLECTED, GrutraceWarning, stacklevel=3)


def _has_own_forward(selection: SelectedModule) -> bool:
    module = selection.module
    return module is not None and type(module).forward not in (nn.GRU.forward, nn.GRUCell.forward)
