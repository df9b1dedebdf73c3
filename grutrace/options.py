"""The options of a run: which values each may have. Loads neither torch nor HDF5.

The tracer, the command line and the documentation take them from here.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, TypeAlias, get_args

from grutrace.records import DEFAULT_RECORD, QUANTITIES

#: When gates are computed: with the call, outside the model's forward but before they are stored,
#: or when they are read. "auto" is "background" in memory and "inline" to a file
#: (docs/performance.md).
Gates: TypeAlias = Literal["auto", "inline", "background", "deferred"]

#: How the layers below the top of a stack are seen. Where several are asked for, the first wins.
Stacks: TypeAlias = Literal["rerun", "auto", "split"]

#: What follows from a residual above the tolerance.
Check: TypeAlias = Literal["warn", "raise", "off"]

#: What a failing sink does to the run: end it, or let it go on untraced.
OnError: TypeAlias = Literal["raise", "warn"]

#: How changes of the weights are found that move no version counter.
WeightChecks: TypeAlias = Literal["auto", "exact"]

#: What to do about compiled code while recording.
CompiledCode: TypeAlias = Literal["auto", "eager", "keep"]

#: What happens to a file that exists: it is refused, replaced, or appended to.
Mode: TypeAlias = Literal["w", "overwrite", "a"]

#: Filters for rows in a file; "blosc2" and "zstd" need the extra `compress`.
Compression: TypeAlias = Literal["blosc2", "zstd"]

#: Types that rows may be stored as.
DTYPES = ("float16", "float32", "float64")

#: Bytes of final states that are remembered, to tell which sequence a call goes on with: with one
#: module of 256 float32 units, some 2,800 sequences that wait, and 360 states to fork from.
STATE_MEMORY = "4 MiB"

STACKS: tuple[Stacks, ...] = get_args(Stacks)


class Option(NamedTuple):
    """An option of a tracer.

    Attributes:
        summary: What it does, in one sentence.
        default: What it is unless set.
        values: Its values, where they are words.
    """

    summary: str
    default: object
    values: tuple[str, ...] = ()

    @property
    def help(self) -> str:
        """The summary, with the values, for the command line."""
        return f"{self.summary} One of: {', '.join(self.values)}." if self.values else self.summary


#: By name, in the order of the tracer's parameters.
OPTIONS: dict[str, Option] = {
    "sites": Option("Glob for site names, or several globs.", None),
    "record": Option("Quantities to record.", DEFAULT_RECORD, QUANTITIES),
    "gates": Option("When gates are computed.", "auto", get_args(Gates)),
    "recording": Option("Start recording on entering the context.", True),
    "mode": Option("What happens to a file that exists.", "w", get_args(Mode)),
    "stacks": Option("How lower layers of a stack are observed.", "auto", STACKS),
    "check": Option("What follows from a residual above the tolerance.", "warn", get_args(Check)),
    "every": Option("Record each n-th call of a module only.", 1),
    "max_calls": Option("Stop recording after this many calls.", None),
    "max_bytes": Option("Stop recording before the trace is larger than this.", None),
    "dtype": Option("Storage type of rows.", None, DTYPES),
    "units": Option("Record these units only.", None),
    "steps": Option("Record these steps of each sequence only.", None),
    "shard": Option("Write one file per rank of a distributed run.", True),
    "sink": Option("A grutrace.Statistics, to count instead of storing rows.", None),
    "on_error": Option("What a failing sink does to the run.", "raise", get_args(OnError)),
    "fsync": Option("fsync every commit.", False),
    "compression": Option("Filter for the rows of the file.", None, get_args(Compression)),
    "weights": Option(
        "How changed weights are detected that bump no version counter.",
        "auto",
        get_args(WeightChecks),
    ),
    "compiled": Option(
        "How code compiled by torch.compile runs while recording.", "auto", get_args(CompiledCode)
    ),
    "state_memory": Option(
        "Bytes of final states to remember, to recognize the sequence that a call continues.",
        STATE_MEMORY,
    ),
}
