"""`Trace`, the reading interface of a trace in memory or in a file, complete or growing."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, starmap
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

from grutrace.errors import (
    NotRecordedError,
    OptionError,
    StateError,
    join_names,
    reject_unknown_options,
    require_extra,
    short_repr,
    suggest_name,
)
from grutrace.records import AnnotationRecord, Array, ModuleInfo, Site, TraceHeader
from grutrace.reprs import wrap_text
from grutrace.storage.annotate import annotation_records
from grutrace.storage.format.tables import Tables, dataset_lengths
from grutrace.storage.interfaces import AnnotatableSource, InMemorySource, Rows, Source
from grutrace.storage.memory import MemoryCopy
from grutrace.storage.read.annotations import annotation_names
from grutrace.storage.read.display.html_reprs import trace_html
from grutrace.storage.read.display.text_reprs import trace_repr
from grutrace.storage.read.selection.criteria import Criteria
from grutrace.storage.read.selection.selected_source import (
    SelectedSource,
    selected_source,
    several_files,
)
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
        # A sink of statistics stores no calls, and raises.
        with contextlib.suppress(NotRecordedError):
            return trace_repr(self._refresh_snapshot(), self._source.name, self.selection)
        return wrap_text(
            f"<trace of {self.header.model} in {self._source.name}: {len(self.sites)} sites>"
        )

    def _repr_html_(self) -> str | None:
        """Return a small table for notebooks. None, for `repr`, if the sink stores no rows."""
        with contextlib.suppress(NotRecordedError):
            return trace_html(self._refresh_snapshot(), self._source.name, self.selection)
        return None

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
        - set: What `grutrace.intervene` has set in the call, such as ``l0: update[3,7]``; None if
          nothing. The label ``grutrace:set:l0`` says at which steps.
        - attached: If gradients were recorded, whether they flow on to the states that the call
          started from. False for states that were detached, given as a leaf, or zeros.
        - scale: The factor of the loss, if a `grad_scaler` was given; else 0.
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
        - original: In a selection (`select`), its number in the whole trace; else as ``sequence``.
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

    @reject_unknown_options
    def select(
        self,
        *,
        tag: str | Iterable[str] | None = None,
        label: str | Mapping[str, Any] | None = None,
        length: int | slice | Iterable[int] | None = None,
        calls: int | slice | Iterable[int] | None = None,
        tokens: str | Sequence[str | float] | None = None,
        sequences: int | slice | Iterable[int] | None = None,
    ) -> Trace:
        """Return the sequences that meet all conditions, as a trace of their own.

        The result has the interface of a trace: sites, sequences, tables, arrays, analyses and
        exports. It copies no rows, and follows this trace when the result is refreshed. Its
        sequences and calls are numbered anew, from 0, as if nothing else had been recorded;
        ``trace.sequences["original"]`` and `Sequence.original` give the numbers of before. Calls
        without a selected sequence are left out.

        A glob is one of `fnmatch`, in which case matters: ``*`` matches any text, ``?`` one
        character, ``[ab]`` one of these, ``[!ab]`` one of the others. Numbers match by their text:
        ``3`` and ``0.5``.

        Args:
            tag: Glob, or list of globs, for the tag of the call in which a sequence began.
            label: Name of a label that one of the steps has; or, by name, a glob or a number, or
                a list of them, that matches the label of one of the steps.
            length: Number of steps; a slice, ``slice(10, None)`` for 10 or more; or a list.
            calls: Rows of `calls`: a number, a slice or a list. A sequence belongs to the call in
                which it began.
            tokens: Globs for consecutive tokens, separated by spaces, or in a list: ``"the a*"``
                selects the sequences in which a token that begins with "a" follows "the". The
                first may be ``^``, for the start of the sequence, and the last ``$``, for its end.
                A step without a token matches no glob.
            sequences: Numbers of sequences within their module: a number, a slice or a list.

        Raises:
            OptionError: A condition is unknown or has an invalid value.
            NotRecordedError: No step has such a label, or a token.

        Examples:
            >>> import torch
            >>> import grutrace
            >>> gru = torch.nn.GRU(2, 3)
            >>> with grutrace.trace(gru) as trace:
            ...     with trace.recording(tag="valid", tokens=[["the", "ant"], ["the", "bee"]]):
            ...         output, state = gru(torch.randn(2, 2, 2))
            >>> ants = trace.select(tag="valid", tokens="the a*")
            >>> len(ants["l0"]), ants["l0"].sequence(0).tokens
            (1, ['the', 'ant'])
            >>> trace.select(sequences=-1).sequences["original"]
            array([1])
        """
        criteria = Criteria.parse(
            tag=tag, label=label, length=length, calls=calls, tokens=tokens, sequences=sequences
        )
        snapshot = self._refresh_snapshot()
        criteria.require_recorded(snapshot)
        present = self._refresh_snapshot if self._source.live else None
        return Trace(selected_source(self._source, criteria, snapshot, present))

    @reject_unknown_options
    def annotate(
        self,
        *,
        tokens: Any = None,
        labels: Mapping[str, Any] | None = None,
        module: str | None = None,
        replace: bool = False,
    ) -> None:
        """Give tokens or labels to sequences that are recorded already.

        They are added to the trace in memory, or to its file, which must be closed. Rows and all
        other content stay as they are. In a file all of it is committed at once: a process that is
        killed meanwhile leaves all of it or nothing (and may leave a file that was not closed in
        order, which `open` reads and ``grutrace recover`` closes). A selection gives them to its
        own sequences in the whole trace. Other traces that are open see them after `refresh`.

        Args:
            tokens: For each sequence of a module, in order, a list of texts or of token ids, one
                per step. Lists may be arrays or tensors. In an array (sequences, longest) values
                beyond the end of a sequence are padding. A value may be None, or NaN, for a step
                without one, and a list None for a sequence without any. Or by number of a sequence:
                ``{3: ["a", "b"]}``. Or any of these by path, or glob, of a module.
            labels: By name, the same with numbers or texts; or one value for all steps of a
                sequence.
            module: Path or glob of the module. Without it, values go to every module with so many
                sequences of these lengths.
            replace: Whether steps that already have such a label may get another one. The new one
                is read from then on.

        Raises:
            OptionError: The values do not fit the sequences, are neither texts nor numbers, or
                steps have such a label already.
            StateError: The trace is being recorded to a file, or is in several files.
            TraceFileError: The file cannot be written.

        Examples:
            >>> import torch
            >>> import grutrace
            >>> gru = torch.nn.GRU(2, 3)
            >>> with grutrace.trace(gru, "run.h5") as tracer:
            ...     output, state = gru(torch.randn(3, 2, 2))
            >>> with grutrace.open("run.h5") as trace:
            ...     trace.annotate(tokens=["ant", "bee"], labels={"kind": ["a", "b"]})
            ...     sequence = trace["l0"].sequence(1)
            ...     print(sequence.tokens, sequence.labels)
            ['b', 'e', 'e'] {'kind': ['b', 'b', 'b']}
        """
        if labels is not None and not isinstance(labels, Mapping):
            raise OptionError(f"labels: expected values by name, found {short_repr(labels)}")
        values = {"tokens": tokens, **(labels or {})}
        snapshot, source = self._refresh_snapshot(), self._source
        if not isinstance(source, AnnotatableSource):
            raise StateError(several_files(source))
        modules = range(len(self.modules))
        lengths = [snapshot.index(number).lengths.tolist() for number in modules]
        stored = [snapshot.stored_numbers(number) for number in modules]
        records = [
            record
            for name, of_sequences in values.items()
            if of_sequences is not None
            for record in annotation_records(name, of_sequences, self.modules, lengths, module)
        ]
        if not replace:
            _require_unlabelled(snapshot, records)
        source.annotate(
            [dataclasses.replace(r, sequence=int(stored[r.module][r.sequence])) for r in records]
        )
        self.refresh()

    @property
    def selection(self) -> str | None:
        """What the sequences of a selection have in common, in words. None for a whole trace."""
        return str(self._source) if isinstance(self._source, SelectedSource) else None

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
        """Write a trace in memory, or a selection, to a file, as a tracer would have written it.

        The file has the same rows bit for bit, and the same calls, sequences, weights, tokens,
        labels and options. It is written under a temporary name and renamed when it is complete.
        Calls that are recorded in the meantime are left out.

        Args:
            path: Path of the file. No rank is added to it, even if several processes trace.
            mode: What to do with an existing file. ``w`` raises an error, ``overwrite`` replaces
                the file.

        Raises:
            OptionError: `path` is not a path, or `mode` is unknown.
            StateError: The trace is already in a file and is no selection, or has no rows.
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
        snapshot, header = self._refresh_snapshot(), self.header
        items: Iterable[tuple[str, Rows | Array]]
        if isinstance(self._source, SelectedSource):
            items, header = self._source.datasets(snapshot.stored), self._source.saved_header
        else:
            reader = self._require_memory("saved").as_of(snapshot.stored)
            items = reader.all_items(snapshot.stored).items()
        counts = dataset_lengths(snapshot.stored, header.modules)
        blocks = chain.from_iterable(starmap(array_items, items))
        save_trace(path, header, counts, blocks, mode)

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
        items = self._memory.as_of(snapshot.stored).all_items(snapshot.stored)
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


def _require_unlabelled(snapshot: TraceSnapshot, records: Sequence[AnnotationRecord]) -> None:
    """Require that no step of these records has such a label already.

    Raises:
        OptionError: A step has.
    """
    for module in sorted({record.module for record in records}):
        names = {record.name for record in records if record.module == module}
        if not names & set(annotation_names(snapshot.tables, module)):
            continue
        annotations, lengths = snapshot.annotations(module), snapshot.index(module).lengths
        for record in records:
            if record.module != module:
                continue
            present = annotations.values(record.sequence, int(lengths[record.sequence]))
            values = present.get(record.name, ())
            for step in range(record.first, min(len(values), record.first + len(record.values))):
                value = values[step]
                # None and NaN are not a label.
                if value is not None and value == value:
                    raise OptionError(
                        f"{record.name}: step {step} of sequence {record.sequence} has "
                        f"{short_repr(value if isinstance(value, str) else float(value))} already; "
                        "replace=True gives it another value"
                    )
