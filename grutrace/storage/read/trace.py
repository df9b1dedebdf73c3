"""`Trace`, the reading interface of a trace in memory or in a file, complete or growing."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

from grutrace.errors import (
    NotRecordedError,
    StateError,
    join_names,
    require_extra,
    short_repr,
    suggest_name,
)
from grutrace.records import Array, ModuleInfo, Site, TraceHeader
from grutrace.reprs import wrap_text
from grutrace.storage.format.tables import Tables
from grutrace.storage.interfaces import InMemorySource, Source
from grutrace.storage.memory import MemoryCopy
from grutrace.storage.read.site import SiteTrace
from grutrace.storage.read.snapshot import TraceSnapshot
from grutrace.storage.save import array_items, save_trace

if TYPE_CHECKING:
    import dask.array
    import xarray


class Trace:
    """The recorded data of one run: sites by name, calls and sequences as tables.

    A trace that is opened from a file shows the state of its last `refresh`. In the process that
    records it, a trace always shows everything recorded so far.

    Args:
        source: The source to read from.

    Examples:
        >>> import torch
        >>> import grutrace
        >>> gru = torch.nn.GRU(input_size=2, hidden_size=3)
        >>> with grutrace.trace(gru) as tracer:
        ...     output, state = gru(torch.randn(5, 4, 2))  # 5 steps, 4 sequences
        >>> tracer.save("run.h5")
        >>> with grutrace.open("run.h5") as trace:
        ...     print(trace.sites)
        ...     print(trace["l0"].update.shape)
        ...     print(trace.calls["steps"])
        ...     print(trace.sequences["steps"])
        ('l0',)
        (20, 3)
        [20]
        [5 5 5 5]
    """

    def __init__(self, source: Source) -> None:
        self._source = source
        self._memory = source if isinstance(source, InMemorySource) else None
        self._load(source.refresh())

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of the recorded sites, in the model's order."""
        return tuple(self._sites_by_name)

    def __getitem__(self, name: str) -> SiteTrace:
        """Return the site of this name.

        Raises:
            NotRecordedError: The site was not recorded. The message lists the recorded sites.
        """
        return SiteTrace(self._refresh_snapshot, *self._find_site(name))

    def _find_site(self, name: str) -> tuple[int, Site]:
        if name not in self._sites_by_name:
            suggestion = suggest_name(name, self.sites) if isinstance(name, str) else ""
            sites = join_names(repr(site) for site in self.sites)
            raise NotRecordedError(
                f"site {short_repr(name)} was not recorded{suggestion}; recorded sites: {sites}"
            )
        return self._sites_by_name[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.sites)

    def __contains__(self, name: object) -> bool:
        return name in self._sites_by_name

    def __repr__(self) -> str:
        counts = f"{len(self.sites)} sites"
        # A sink of statistics stores no calls, and raises.
        with contextlib.suppress(NotRecordedError):
            tables = self._refresh_snapshot().tables
            sequences = sum(module.sequences for module in tables.module_counts)
            counts += f", {len(tables.calls)} calls, {sequences} sequences"
        return wrap_text(f"<trace of {self.header.model} in {self._source.name}: {counts}>")

    @property
    def calls(self) -> Array:
        """A structured array with one row for each recorded call, in the order of recording.

        Calls of several ranks are in the order of the ranks. Fields:

        - module: Path of the module.
        - tag: Tag of the call, or None.
        - weights: Version of the module's weights.
        - training: Whether the module was in training mode.
        - batch: Number of sequences in the batch.
        - steps: Total number of steps of all sequences in the batch.
        - time: Seconds since the epoch.
        - residual: Largest residual of the module's sites. NaN if the gates are recomputed when
          they are read.
        - proof: "proven" if the gates reproduce the kernel's states within the tolerance.
          "unchecked" if the gates are recomputed when they are read, and the weights were not
          compared during the call. "unproven" if no recorded version of the weights reproduces
          the states.
        - rank: Rank of the recording process; 0 for a single process.
        """
        # The snapshot's array is shared and read-only.
        return self._refresh_snapshot().calls.copy()

    @property
    def sequences(self) -> Array:
        """A structured array with one row for each sequence of each module, module by module.

        Fields:

        - module: Path of the module.
        - sequence: Number of the sequence within the module.
        - call: First call of the sequence, a row of `calls`.
        - place: Batch index of the sequence in that call.
        - steps: Number of steps.
        - pieces: Number of calls with steps of this sequence.
        - parent, parent_steps: The sequence that this one was forked from, and how many steps the
          parent had made. -1 for a sequence that was not forked.
        - origin: How the sequence began; see `Sequence.origin`.
        - tag: Tag of the first call, or None.
        - rank: Rank of the recording process; 0 for a single process.
        """
        return self._refresh_snapshot().sequences.copy()

    @property
    def header(self) -> TraceHeader:
        """Model, versions, options and modules of the trace."""
        return self._snapshot.header

    @property
    def modules(self) -> tuple[ModuleInfo, ...]:
        """The traced modules."""
        return self.header.modules

    @property
    def options(self) -> Mapping[str, Any]:
        """The options of the trace."""
        return self.header.options

    @property
    def files(self) -> tuple[Path, ...]:
        """The files of the trace: one file, the parts of a run, or shards. Empty in memory."""
        return self._source.files

    @property
    def snapshot(self) -> TraceSnapshot:
        """An immutable snapshot of the trace, for code that reads all of it."""
        return self._refresh_snapshot()

    @property
    def closed(self) -> bool:
        """Whether the writer closed the file. False while it is written, or after a crash."""
        return self._refresh_snapshot().stored.closed

    @property
    def nbytes(self) -> int:
        """Approximate size in memory, in bytes. 0 for a trace in a file."""
        return 0 if self._memory is None else self._memory.nbytes

    def save(self, path: str | os.PathLike[str], *, mode: Literal["w", "overwrite"] = "w") -> None:
        """Write a trace in memory to a file, with the content that a tracer would have written.

        The file has the same rows bit for bit, and the same calls, sequences, weights, tokens,
        labels and options. It is written under a temporary name and renamed when it is complete.
        Calls that are recorded in the meantime are left out.

        Args:
            path: Path of the file. No rank is added to it, even if several processes trace.
            mode: What to do with an existing file. ``w`` raises an error, ``overwrite`` replaces
                the file.

        Raises:
            OptionError: `path` is not a path, or `mode` is unknown.
            StateError: The trace is already in a file, or has no rows.
            TraceFileError: The file exists, or cannot be written. No partial file remains.

        Examples:
            >>> import torch
            >>> import grutrace
            >>> gru = torch.nn.GRU(2, 3)
            >>> with grutrace.trace(gru) as tracer:
            ...     output, state = gru(torch.randn(5, 4, 2))
            >>> tracer.save("kept.h5")
            >>> with grutrace.open("kept.h5") as trace:
            ...     print((trace["l0"].hidden == tracer["l0"].hidden).all())
            True
        """
        snapshot, memory = self._refresh_snapshot(), self._require_memory("saved")
        items = memory.as_of(snapshot.tables).all_items(snapshot.tables)
        counts = {dataset_path: len(array) for dataset_path, array in items.items()}
        blocks = chain.from_iterable(map(array_items, items, items.values()))
        save_trace(path, self.header, counts, blocks, mode)

    def clear(self) -> None:
        """Delete all records of a trace in memory.

        Site objects follow the trace and become empty. Arrays, sequences and tables that were read
        before keep their content.

        Raises:
            StateError: The trace is in a file, or has no rows.
        """
        self._require_memory("cleared").clear()
        self.refresh()

    def _require_memory(self, action: str) -> InMemorySource:
        """Return the source in memory.

        Args:
            action: What needs it, for the message: "saved" or "cleared".

        Raises:
            StateError: The trace is not in memory.
        """
        if self._memory is None:
            location = ", ".join(map(str, self.files[:1])) or self._source.name
            raise StateError(
                f"only a trace in memory can be {action}; this one is in {location}"
                + (": copy that file" if self.files and action == "saved" else "")
            )
        return self._memory

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle a trace in a file as its path, and a trace in memory with its rows.

        The unpickled trace is for reading only and does not follow this one.
        """
        snapshot = self._refresh_snapshot()
        if self._memory is None:
            return Trace, (self._source,)
        items = self._memory.as_of(snapshot.tables).all_items(snapshot.tables)
        return Trace, (MemoryCopy(self.header, items),)

    def to_dask(self, site: str, quantity: str) -> dask.array.Array:
        """Return the rows of a quantity as a dask array, (N, H), or (N, I) for the input.

        Computing the array reads chunks of about 16 MiB, which are whole chunks of the file. The
        threads of this process, other processes and clusters that can read the file are supported:
        a worker receives the path of the file. A trace in memory sends its rows instead.

        The array has the rows that are recorded now. It stays valid after more rows are recorded
        and after the trace is closed.

        Args:
            site: Name of the site.
            quantity: reset, update, candidate, hidden or input.

        Raises:
            NotRecordedError: The site or the quantity was not recorded.
            MissingExtraError: dask is not installed.

        Examples:
            >>> import torch
            >>> import grutrace
            >>> gru = torch.nn.GRU(2, 3)
            >>> with grutrace.trace(gru, "run.h5") as tracer:
            ...     output, state = gru(torch.randn(5, 4, 2))
            >>> with grutrace.open("run.h5") as trace:
            ...     update = trace.to_dask("l0", "update")
            >>> update.shape
            (20, 3)
            >>> bool(0 < update.mean().compute() < 1)
            True
        """
        from grutrace.arrays.dask_arrays import to_dask

        return to_dask(self._refresh_snapshot(), *self._find_site(site), quantity)

    def to_xarray(self, site: str, *, padded: bool = False) -> xarray.Dataset:
        """Return a site as an xarray Dataset that loads its values lazily.

        The variables are all available quantities, stored or recomputed, with the rows that are
        recorded now. They are dask arrays if dask is installed, with the chunks of `to_dask`.

        The default layout has one row for each step of each sequence, as the ragged arrays of the
        CF conventions (contiguous or indexed). Its dimensions are step and unit (feature for the
        input). Its coordinates are sequence, time (the step within the sequence), call (a row of
        `calls`), unit and, if recorded, tag, token and label_NAME. The dimension instance has one
        item for each sequence, with the variables initial (the initial state) and length.

        The padded layout has the dimensions sequence, time and unit. Values after the end of a
        sequence are NaN. Its coordinates are length, call (the first call of the sequence), tag,
        token and label_NAME.

        Write ``dataset["update"]``: ``dataset.update`` is a method of xarray.

        Args:
            site: Name of the site.
            padded: Whether to use the padded layout.

        Raises:
            NotRecordedError: The site was not recorded.
            MissingExtraError: xarray is not installed.

        Examples:
            >>> import torch
            >>> import grutrace
            >>> gru = torch.nn.GRU(2, 3)
            >>> with grutrace.trace(gru) as tracer:
            ...     output, state = gru(torch.randn(5, 4, 2))
            >>> dataset = tracer.to_xarray("l0")
            >>> dataset["update"].groupby("sequence").mean().shape
            (4, 3)
            >>> tracer.to_xarray("l0", padded=True)["update"].dims
            ('sequence', 'time', 'unit')
        """
        with require_extra("to_xarray", "xarray"):
            from grutrace.arrays.xarray_dataset import to_xarray

        return to_xarray(self._refresh_snapshot(), *self._find_site(site), padded=padded)

    def refresh(self) -> None:
        """Read what was recorded since the last refresh. Existing site objects follow.

        Raises:
            TraceFileError: The file is damaged.

        Examples:
            >>> import torch
            >>> import grutrace
            >>> cell = torch.nn.GRUCell(2, 3)
            >>> tracer = grutrace.Tracer(cell, "live.h5")
            >>> with tracer, grutrace.open("live.h5") as trace:
            ...     state = cell(torch.randn(4, 2))
            ...     tracer.flush()
            ...     trace.refresh()
            ...     print(len(trace.calls))
            1
        """
        tables = self._source.refresh()
        if tables is not self._snapshot.stored:
            self._load(tables)

    def _load(self, tables: Tables) -> None:
        # The sites are read again too: `grutrace run` may have found more modules.
        self._snapshot = TraceSnapshot(self._source, tables)
        self._sites_by_name = {
            site.name: (number, site)
            for number, module in enumerate(self._source.header.modules)
            for site in module.sites
        }

    def close(self) -> None:
        """Close the file. Closing twice has no effect."""
        self._source.close()

    def __enter__(self) -> Trace:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _refresh_snapshot(self) -> TraceSnapshot:
        if self._source.live:
            self.refresh()
        return self._snapshot
