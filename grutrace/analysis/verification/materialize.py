"""Store the gates of a deferred trace in a new file.

All tables and rows of the trace are copied, with the derived gates among the rows. The new file
equals that of an inline trace.

n rows.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from grutrace.analysis.verification.residuals import CallResiduals
from grutrace.analysis.verification.set_values import SetValues, unknown_states
from grutrace.errors import TraceFileError
from grutrace.records import GATES, Array, ModuleInfo, Site, TraceHeader
from grutrace.storage.format.schema import (
    TABLES,
    dataset_specs,
    pieces_path,
    quantity_path,
    site_path,
    weight_shapes,
)
from grutrace.storage.format.shard_stamp import MergedShard, merged_options
from grutrace.storage.format.tables import dataset_lengths
from grutrace.storage.read.lazy_rows import block_slices
from grutrace.storage.read.recomputed import iter_recomputed
from grutrace.storage.read.site import SiteTrace
from grutrace.storage.read.snapshot import TraceSnapshot
from grutrace.storage.read.trace import Trace
from grutrace.storage.save import array_items, save_trace

#: Size of the gates of one site that are derived at once, in bytes.
BLOCK_BYTES = 32 * 1024 * 1024


def materialize_file(
    trace: Trace,
    path: str | os.PathLike[str],
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write a trace file that stores what this trace derives.

    Calls, sequences, tags, annotations and weights are the same; each call's residual and tolerance
    are known now. Rows are derived in blocks, so memory is bounded.

    Args:
        trace: The trace. Calls recorded meanwhile are left out.
        path: Of the new file.
        progress: Called with the number of bytes that are written, and of all bytes.

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
    header = stored_header(snapshot)
    counts = dataset_lengths(snapshot.stored, header.modules)
    total = sum(
        counts[dataset_path] * math.prod(spec.item_shape) * spec.dtype.itemsize
        for dataset_path, spec in dataset_specs(header.modules).items()
    )

    def advance(done: int) -> None:
        if progress is not None:
            progress(done, total)

    save_trace(target, header, counts, _items(snapshot, header), "w", advance)


def stored_header(snapshot: TraceSnapshot) -> TraceHeader:
    """Return the header of the same trace with everything stored that it derives."""
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


def _items(snapshot: TraceSnapshot, header: TraceHeader) -> Iterator[tuple[str, Array]]:
    """Yield the items of all datasets in blocks, each with the path of its dataset."""
    tables = snapshot.stored
    for name in TABLES:
        yield from array_items(name, getattr(tables, name))
    for number, module in enumerate(header.modules):
        yield from array_items(pieces_path(module), tables.pieces[number])
        for site, recorded in zip(module.sites, snapshot.header.modules[number].sites, strict=True):
            source = SiteTrace(lambda: snapshot, number, recorded)
            yield from _site_items(snapshot, source, module, site)


def _site_items(
    snapshot: TraceSnapshot, source: SiteTrace, module: ModuleInfo, site: Site
) -> Iterator[tuple[str, Array]]:
    """Yield the items of a site: first its rows, which the residuals of its calls follow from."""
    number, suffix = source.module_index, site.suffix
    gates = [name for name in GATES if name in source.site.derived]
    for quantity in site.quantities:
        path = quantity_path(module, site, quantity)
        # Both directions of a layer share the input.
        if quantity not in gates and path == site_path(module, suffix, quantity):
            yield from array_items(path, source.rows(quantity))
    residuals = CallResiduals(source)
    if gates:
        for block in _derived_blocks(source, gates, residuals):
            for name, values in block.items():
                yield quantity_path(module, site, name), values
    checks = np.array(residuals.checks)
    if gates:
        checks["residual"] = residuals.residuals
        checks["tolerance"] = residuals.tolerances(range(len(checks)))
    yield site_path(module, suffix, "checks"), checks
    counts = snapshot.stored.module_counts[number]
    if "gradient" in site.quantities:
        backward = snapshot.source.backward(number, suffix, counts.calls)
        yield site_path(module, suffix, "backward"), backward
    initial = snapshot.source.initial(number, suffix, counts.sequences)
    yield from array_items(site_path(module, suffix, "initial"), initial)
    for version in range(counts.versions):
        weights = snapshot.source.weights(number, suffix, version)
        for name in weight_shapes(module, site):
            yield site_path(module, suffix, name), weights[name][np.newaxis]


def _derived_blocks(
    source: SiteTrace, gates: list[str], residuals: CallResiduals
) -> Iterator[dict[str, Array]]:
    """Yield the derived gates of a site in order, (n, H) each, and collect their residuals."""
    hidden, set_values = source.rows("hidden"), SetValues(source)
    width, dtype = source.module.hidden_size, np.dtype(source.module.dtype)
    for part in block_slices(len(hidden), BLOCK_BYTES, len(gates) * width * dtype.itemsize):
        rows = np.arange(part.start, part.stop)
        block = {name: np.empty((len(rows), width), dtype) for name in gates}
        for inputs, derivation in iter_recomputed(source.gate_inputs, rows):
            for name in gates:
                block[name][inputs.block] = derivation.gate(name)
            block_rows = slice(int(inputs.rows[0]), int(inputs.rows[-1]) + 1)
            unknown = unknown_states(source, set_values, block_rows)
            residuals.add(inputs, derivation, hidden, unknown)
        yield block
