"""What of the selected modules is kept, as the options ask: planned once, when a tracer is made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from grutrace.capture.deferral import defer
from grutrace.capture.options import Options
from grutrace.capture.sites import Selection
from grutrace.record import Module


def narrow(selections: Sequence[Selection], options: Options) -> list[Selection]:
    """Return the selections with descriptions of what the options leave of them."""
    return [replace(each, description=_narrow(each.description, options)) for each in selections]


def _narrow(module: Module, options: Options) -> Module:
    if options.dtype is not None:
        module = replace(module, dtype=options.dtype)
    return defer(module) if options.gates == "deferred" else module
