"""grutrace: see inside the GRUs of a running model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    from grutrace.capture.tracer import Tracer, trace
    from grutrace.statistics.running import Statistics
    from grutrace.storage.open import open_trace as open
    from grutrace.storage.read.trace import Trace

__all__ = [
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
    "open",
    "trace",
]

#: Where the names live that are loaded when first used, so that reading a trace needs no torch.
_LAZY = {
    "Statistics": ("grutrace.statistics.running", "Statistics"),
    "Trace": ("grutrace.storage.read.trace", "Trace"),
    "open": ("grutrace.storage.open", "open_trace"),
    "Tracer": ("grutrace.capture.tracer", "Tracer"),
    "trace": ("grutrace.capture.tracer", "trace"),
}


def __getattr__(name: str) -> Any:
    from importlib import import_module, metadata

    if name == "__version__":
        return metadata.version("grutrace")
    if name not in _LAZY:
        raise AttributeError(f"module 'grutrace' has no attribute {name!r}")
    module, attribute = _LAZY[name]
    value = getattr(import_module(module), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
