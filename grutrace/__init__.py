"""Record and read the gates and hidden states of the GRUs in a PyTorch model.

`trace` and `Tracer` record every `nn.GRU` and `nn.GRUCell` of a model, in memory or to a file.
`open` reads a file. `Statistics` counts while a model runs, without storing rows. Analyses are in
`grutrace.analysis`. Reading a trace does not import torch.

Examples:
    Record a call in memory; a model that is itself a GRU has the sites ``l0``, ``l1``, ...

    >>> import torch
    >>> import grutrace
    >>> model = torch.nn.GRU(input_size=2, hidden_size=3)
    >>> x = torch.randn(4, 1, 2)                  # 4 steps, 1 sequence
    >>> with grutrace.trace(model) as trace:
    ...     output, final = model(x)
    >>> trace.sites
    ('l0',)
    >>> sequence = trace["l0"].sequence(0)
    >>> sequence.update.shape                     # steps, hidden size
    (4, 3)
    >>> bool((sequence.hidden == output[:, 0].detach().numpy()).all())
    True

    Record to a file, and read it:

    >>> with grutrace.trace(model, "run.h5"):
    ...     output, final = model(x)
    >>> with grutrace.open("run.h5") as trace:
    ...     trace["l0"].reset.shape
    (4, 3)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from grutrace.accessors import register_accessor as _register_accessor
from grutrace.errors import (
    GrutraceError,
    GrutraceWarning,
    NotRecordedError,
    OptionError,
    ResidualError,
    ResidualWarning,
    SinkError,
    StateError,
    TraceFileError,
    UnsupportedError,
)
from grutrace.version import VERSION as __version__
from grutrace.view.live.serve import view

if TYPE_CHECKING:
    from grutrace.capture.differentiable.trace import DifferentiableTrace
    from grutrace.capture.tracer import Tracer, trace
    from grutrace.conversion.convert import convert
    from grutrace.intervention.effects import effects
    from grutrace.intervention.intervene import intervene
    from grutrace.statistics.running import Statistics
    from grutrace.storage.open import open_trace as open
    from grutrace.storage.read.trace import Trace
    from grutrace.view.report.report import report

__all__ = [
    "DifferentiableTrace",
    "GrutraceError",
    "GrutraceWarning",
    "NotRecordedError",
    "OptionError",
    "ResidualError",
    "ResidualWarning",
    "SinkError",
    "StateError",
    "Statistics",
    "Trace",
    "TraceFileError",
    "Tracer",
    "UnsupportedError",
    "__version__",
    "convert",
    "effects",
    "intervene",
    "open",
    "report",
    "trace",
    "view",
]

#: Module and name of the objects that are imported when first used, so that reading a trace does
#: not import torch.
_LAZY = {
    "DifferentiableTrace": ("grutrace.capture.differentiable.trace", "DifferentiableTrace"),
    "Statistics": ("grutrace.statistics.running", "Statistics"),
    "Trace": ("grutrace.storage.read.trace", "Trace"),
    "open": ("grutrace.storage.open", "open_trace"),
    "report": ("grutrace.view.report.report", "report"),
    "Tracer": ("grutrace.capture.tracer", "Tracer"),
    "trace": ("grutrace.capture.tracer", "trace"),
    "convert": ("grutrace.conversion.convert", "convert"),
    "effects": ("grutrace.intervention.effects", "effects"),
    "intervene": ("grutrace.intervention.intervene", "intervene"),
}

_register_accessor("plot", "grutrace.view.site_plots", "SitePlots")


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name not in _LAZY:
        raise AttributeError(f"module 'grutrace' has no attribute {name!r}")
    module, attribute = _LAZY[name]
    value = getattr(import_module(module), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
