"""Options of a tracer: their allowed values, defaults and one-sentence summaries.

The tracer, the command line and the documentation read them from here. Imports neither torch nor
h5py.
"""

from __future__ import annotations

import re
from typing import Literal, NamedTuple, TypeAlias, get_args

from grutrace.records import DEFAULT_RECORD, QUANTITIES

#: When gates are computed: during the call, after it but before they are stored (to a file, on CUDA
#: only), or when they are read. "auto" is "background" in memory and "inline" for a file
#: (docs/performance.md).
Gates: TypeAlias = Literal["auto", "inline", "background", "deferred"]

#: How the layers below the top of a stack are observed. If several tracers observe one module, the
#: first of these values that any of them asks for is used.
Stacks: TypeAlias = Literal["rerun", "auto", "split"]

#: What to do when a residual exceeds the tolerance.
Check: TypeAlias = Literal["warn", "raise", "off"]

#: What happens to the run if the sink fails: an exception ends it, or it continues untraced.
OnError: TypeAlias = Literal["raise", "warn"]

#: How weight changes are detected that do not bump PyTorch's version counter.
WeightChecks: TypeAlias = Literal["auto", "exact"]

#: How code compiled by torch.compile runs while recording.
CompiledCode: TypeAlias = Literal["auto", "eager", "keep"]

#: What to do if the file exists: refuse it, replace it, or append to it.
Mode: TypeAlias = Literal["w", "overwrite", "a"]

#: Compression filters for the rows of a file. "blosc2" and "zstd" need the extra `compress`. "gzip"
#: is slower, but every HDF5 tool has it.
Compression: TypeAlias = Literal["blosc2", "zstd", "gzip"]

#: Data types in which rows can be stored.
STORAGE_DTYPES = ("float16", "float32", "float64")

#: Default memory for final states. For one module with 256 float32 units it holds about 2,800
#: sequences that can continue, and 360 states from which a sequence can fork.
DEFAULT_STATE_MEMORY = "4 MiB"

#: Default memory for calls that wait to be stored.
DEFAULT_BUFFER = "8 MiB"

STACK_MODES: tuple[Stacks, ...] = get_args(Stacks)


class Option(NamedTuple):
    """An option of a tracer.

    Attributes:
        summary: One sentence that says what the option does.
        default: Its default value.
        values: Its allowed values, if they are words; else empty.
    """

    summary: str
    default: object
    values: tuple[str, ...] = ()

    @property
    def help(self) -> str:
        """The summary and the allowed values, as the command line shows them."""
        return f"{self.summary} One of: {', '.join(self.values)}." if self.values else self.summary


#: Options by name, in the order of the tracer's parameters.
OPTIONS: dict[str, Option] = {
    "sites": Option("Glob, or list of globs, for the names of the sites to record.", None),
    "record": Option("Quantities to record.", DEFAULT_RECORD, QUANTITIES),
    "gates": Option("When gates are computed.", "auto", get_args(Gates)),
    "recording": Option("Whether recording starts on entering the context manager.", True),
    "mode": Option("What to do if the file exists.", "w", get_args(Mode)),
    "stacks": Option("How the lower layers of a stack are observed.", "auto", STACK_MODES),
    "check": Option("What to do when a residual exceeds the tolerance.", "warn", get_args(Check)),
    "every": Option("Record every n-th call of each module.", 1),
    "max_calls": Option("Stop recording after this many calls.", None),
    "max_bytes": Option("Stop recording before the trace exceeds this many bytes.", None),
    "dtype": Option("Data type in which rows are stored.", None, STORAGE_DTYPES),
    "units": Option("Units to record, as a list of numbers or a slice.", None),
    "steps": Option("Steps of each sequence to record, as a slice.", None),
    "log": Option("Names of values to log beside the gates, or their numbers by name.", None),
    "shard": Option("Whether to write one file per rank of a distributed run.", True),
    "sink": Option(
        "A grutrace.Statistics that counts rows; without a path, instead of storing them.", None
    ),
    "on_error": Option(
        "What happens to the run if rows cannot be written.", "raise", get_args(OnError)
    ),
    "fsync": Option("Whether every commit waits until the rows are on the disk.", False),
    "compression": Option(
        "Compression filter for the rows of the file.", None, get_args(Compression)
    ),
    "checksums": Option("Whether each chunk of rows has a checksum.", False),
    "weights": Option(
        "How weight changes are detected that do not bump PyTorch's version counter.",
        "auto",
        get_args(WeightChecks),
    ),
    "compiled": Option(
        "How code compiled by torch.compile runs while recording.", "auto", get_args(CompiledCode)
    ),
    "state_memory": Option(
        "Memory for final states, used to find the sequence that a call continues.",
        DEFAULT_STATE_MEMORY,
    ),
    "buffer": Option("Memory for recorded calls that wait to be stored.", DEFAULT_BUFFER),
    "grad_scaler": Option("The GradScaler whose scale recorded gradients are divided by.", None),
}

#: Decimal and binary multiples of a byte.
_MULTIPLES = {
    "": 1,
    **{letter: 1000**power for power, letter in enumerate("KMGT", 1)},
    **{f"{letter}I": 1024**power for power, letter in enumerate("KMGT", 1)},
}


def parse_bytes(text: str) -> int | None:
    """Parse a number of bytes such as 500000, 10GB or 1.5 GiB; None if it has another form."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]I?)?B?", text.strip().upper())
    return None if match is None else int(float(match[1]) * _MULTIPLES[match[2] or ""])
