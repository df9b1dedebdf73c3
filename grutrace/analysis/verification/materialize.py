"""Store the gates of a deferred trace in a new file.

The records of the trace are rebuilt call by call, with the derived gates among their rows, and
written by the usual writer. The new file equals that of an inline trace.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from grutrace.analysis.verification.residuals import CallResiduals
from grutrace.errors import TraceFileError
from grutrace.records import (
    GATES,
    AnnotationRecord,
    Array,
    CallRecord,
    Fork,
    ModuleInfo,
    Sink,
    Site,
    SiteRows,
    TraceHeader,
    WeightsRecord,
)
from grutrace.storage.format.shard_stamp import MergedShard, merged_options
from grutrace.storage.open import open_sink
from grutrace.storage.read.recomputed import iter_recomputed
from grutrace.storage.read.site import SiteTrace
from grutrace.storage.read.snapshot import TraceSnapshot
from grutrace.storage.read.trace import Trace

#: Size of the rows of one module that are derived at once, over all sites and quantities, in bytes.
#: At least one call.
BLOCK_BYTES = 32 * 1024 * 1024


def materialize_file(
    trace: Trace,
    path: str | os.PathLike[str],
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write a trace file that stores what this trace derives.

    Calls, sequences, tags, annotations and weights are the same; each call's residual and tolerance
    are known now. Memory is bounded by the largest call.

    Args:
        trace: The trace. Calls recorded meanwhile are left out.
        path: Of the new file.
        progress: Called with how many calls are done, and how many there are.

    Raises:
        TraceFileError: The trace stores all its gates, or the file exists or cannot be written.
        NotRecordedError: Something that gates follow from was not recorded.
    """
    if not any(site.derived for module in trace.modules for site in module.sites):
        raise TraceFileError("nothing to derive: this trace already stores its gates")
    target = Path(path)
    if target.exists():
        raise TraceFileError(f"{target} exists: choose another path for the new file")
    snapshot = trace.snapshot
    sink = open_sink(target, stored_header(snapshot))
    try:
        _append_all(snapshot, sink, progress)
        sink.close()
    except BaseException:
        # An incomplete file that was closed properly would pass for a complete one.
        try:
            sink.close()
        finally:
            target.unlink(missing_ok=True)
        raise


def stored_header(snapshot: TraceSnapshot) -> TraceHeader:
    """The header of the same trace with everything stored that it derives."""
    header, shards = snapshot.header, snapshot.tables.shards
    modules = tuple(
        dataclasses.replace(module, sites=tuple(_stored(site) for site in module.sites))
        for module in header.modules
    )
    # The new file contains all parts of a run and is not a part itself.
    options = {name: value for name, value in header.options.items() if name != "run"}
    options["gates"] = "derived"
    copied = [MergedShard(shard.rank, shard.calls, shard.closed, {}) for shard in shards]
    options = merged_options(options, copied)
    return dataclasses.replace(header, modules=modules, options=options)


def _stored(site: Site) -> Site:
    return dataclasses.replace(site, quantities=site.available_quantities, derived=())


def _append_all(
    snapshot: TraceSnapshot, sink: Sink, progress: Callable[[int, int], None] | None
) -> None:
    records = [_ModuleRecords(snapshot, number) for number in range(len(snapshot.header.modules))]
    calls = snapshot.tables.calls
    for call, module in enumerate(calls["module"].tolist()):
        for record in records[module].next_call(call):
            sink.append(record)
        if progress is not None:
            progress(call + 1, len(calls))
    for annotation in _annotations(snapshot):
        sink.append(annotation)


def _annotations(snapshot: TraceSnapshot) -> Iterator[AnnotationRecord]:
    tables, start = snapshot.stored, 0
    for entry in tables.annotations:
        values = tables.values[start : start + int(entry["count"])].tolist()
        start += len(values)
        texts = [tables.texts[int(value)] for value in values] if entry["text"] else values
        name = tables.texts[entry["name"] - 1]
        yield AnnotationRecord(
            int(entry["module"]), int(entry["sequence"]), name, int(entry["first"]), tuple(texts)
        )


class _ModuleRecords:
    """Makes the records of one module anew, in the order of its calls."""

    def __init__(self, snapshot: TraceSnapshot, number: int) -> None:
        self._snapshot, self._number = snapshot, number
        self._module: ModuleInfo = snapshot.header.modules[number]
        self._sites = [SiteTrace(lambda: snapshot, number, site) for site in self._module.sites]
        self._index = self._snapshot.index(number)
        self._pieces = self._snapshot.stored.pieces[number]
        forks = self._snapshot.stored.forks
        own = forks[forks["module"] == number]
        self._forks = own[np.argsort(own["sequence"], kind="stable")]
        self._announced = self._piece = self._begun = 0
        self._rows = self._site_rows()

    def next_call(self, call: int) -> Iterator[WeightsRecord | CallRecord]:
        """The records of the module's next call, which is this one of all calls."""
        entry = self._snapshot.tables.calls[call]
        for version in range(self._announced, int(entry["weights"]) + 1):
            sites = {site.site.suffix: site.weights(version) for site in self._sites}
            yield WeightsRecord(self._number, version, sites)
            self._announced = version + 1
        pieces = self._pieces[self._piece : self._piece + int(entry["batch"])]
        self._piece += len(pieces)
        before = self._begun
        if len(pieces):
            self._begun = max(before, int(pieces["sequence"].max()) + 1)
        yield CallRecord(
            module=self._number,
            time=float(entry["time"]),
            tag=self._snapshot.tags[call],
            training=bool(entry["training"]),
            weights=int(entry["weights"]),
            steps=pieces["steps"].astype(np.uint32),
            sequences=pieces["sequence"].astype(np.uint64),
            sites=self._with_initial(next(self._rows), before),
            forks=self._forks_of(before),
        )

    def _forks_of(self, before: int) -> tuple[Fork, ...]:
        """The origins of the sequences that a call began."""
        bounds = np.array([before, self._begun], np.uint64)
        first, last = np.searchsorted(self._forks["sequence"], bounds)
        return tuple(
            Fork(int(fork["sequence"]), int(fork["parent"]), int(fork["steps"]))
            for fork in self._forks[first:last]
        )

    def _with_initial(self, rows: dict[str, SiteRows], before: int) -> dict[str, SiteRows]:
        """Add the states that the sequences of a call began from."""
        none = np.empty((0, self._module.hidden_size), self._module.dtype)
        source, count = (
            self._snapshot.source,
            self._snapshot.stored.module_counts[self._number].sequences,
        )
        initial = {
            site.site.suffix: np.array(
                source.initial(self._number, site.site.suffix, count)[before : self._begun]
            )
            if before < self._begun
            else none
            for site in self._sites
        }
        return {
            suffix: dataclasses.replace(each, initial=initial[suffix])
            for suffix, each in rows.items()
        }

    def _site_rows(self) -> Iterator[dict[str, SiteRows]]:
        """The rows of each call, by site, without initial states."""
        ends = np.cumsum(self._index.call_steps)
        starts = ends - self._index.call_steps
        width = sum(
            site.input_size + len(site.available_quantities) * self._module.hidden_size
            for site in self._module.sites
        )
        most = max(1, BLOCK_BYTES // (width * np.dtype(self._module.dtype).itemsize))
        residuals = [CallResiduals(site) for site in self._sites]
        first = 0
        while first < len(ends):
            last = max(first + 1, int(np.searchsorted(ends, starts[first] + most, side="right")))
            found = [
                _derive(
                    site, each, range(first, last), slice(int(starts[first]), int(ends[last - 1]))
                )
                for site, each in zip(self._sites, residuals, strict=True)
            ]
            for call in range(first, last):
                part = slice(starts[call] - starts[first], ends[call] - starts[first])
                yield {
                    site.site.suffix: SiteRows(
                        {name: array[part] for name, array in rows.items()},
                        np.empty(0),
                        *checks[call - first].tolist(),
                    )
                    for site, (rows, checks) in zip(self._sites, found, strict=True)
                }
            first = last


def _derive(
    site: SiteTrace, residuals: CallResiduals, calls: range, rows: slice
) -> tuple[dict[str, Array], Array]:
    """Return all quantities of a site in these rows, and the checks of the calls that they are."""
    checks = np.array(residuals.checks[calls.start : calls.stop])
    gates = [name for name in GATES if name in site.site.derived]
    found = {
        name: np.asarray(site.rows(name)[rows])
        for name in site.site.available_quantities
        if name not in gates
    }
    if not gates:
        return found, checks
    hidden = site.rows("hidden")
    shape = rows.stop - rows.start, site.module.hidden_size
    found |= {name: np.empty(shape, site.module.dtype) for name in gates}
    for each, derivation in iter_recomputed(site.gate_inputs, np.arange(rows.start, rows.stop)):
        for name in gates:
            found[name][each.block] = derivation.gate(name)
        residuals.add(each, derivation, hidden)
    checks["residual"] = residuals.residuals[calls.start : calls.stop]
    checks["tolerance"] = residuals.tolerances(calls)
    return found, checks
