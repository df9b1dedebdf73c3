"""Merge the shards of a run into one file with tables of its own and virtual datasets.

Rows, initial states, checks and weights become virtual datasets, which any HDF5 tool reads. HDF5
does not open a shard that is flagged as being written, so the content of such a shard is copied.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import h5py
import numpy as np

from grutrace.distributed import Shard
from grutrace.errors import TraceFileError
from grutrace.records import LOG_PREFIX, QUANTITIES, Array, ModuleInfo
from grutrace.storage.format.datasets import (
    COPIED,
    SELF,
    CreateDataset,
    SourceSpan,
    create_datasets,
    create_growing_dataset,
    create_virtual_dataset,
)
from grutrace.storage.format.dimension_scales import create_scales, extend_scales
from grutrace.storage.format.header import write_header
from grutrace.storage.format.schema import (
    COMMITTED,
    LIBVER,
    TABLES,
    call_tables,
    dataset_specs,
    input_owner,
    module_path,
    pieces_path,
    site_path,
    weight_shapes,
)
from grutrace.storage.format.shard_stamp import MergedShard, merged_options
from grutrace.storage.format.tables import ModuleCounts, Tables, dataset_lengths
from grutrace.storage.hdf5.atomic_write import publish, temporary_path, unlink_on_error
from grutrace.storage.hdf5.errors import translate_write_errors
from grutrace.storage.hdf5.filters import row_filters
from grutrace.storage.interfaces import AppendOnlySource, Rows, SnapshotReader
from grutrace.storage.read.lazy_rows import BLOCK, item_bytes, items_per_block
from grutrace.storage.shards.concatenated import ConcatenatedSource
from grutrace.storage.shards.joined_tables import ModuleIndices
from grutrace.storage.shards.open_files import open_files
from grutrace.storage.shards.union import UnionSource

#: Called with the number of copied bytes and the total.
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class MergeReport:
    """The result of a merge.

    Attributes:
        shards: The shards, in the order of their ranks.
        unclosed: Files of shards that their writer did not close. Their rows were copied.
        copied: Number of copied bytes.
    """

    shards: tuple[MergedShard, ...]
    unclosed: tuple[Path, ...]
    copied: int


def merge_shards(
    paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    *,
    copy: bool = False,
    progress: Progress | None = None,
) -> MergeReport:
    """Write one trace file over several shards, with everything that is committed now.

    Without `copy`, the file must be in the folder of the shards, and needs them there. The rows of
    a shard that its writer did not close are copied in any case.

    Args:
        paths: A glob, or the paths of the shards.
        output: Path of the new file.
        copy: Whether to copy all rows, so that the shards are no longer needed.
        progress: Called with the number of copied bytes and the total.

    Raises:
        OptionError: There are no paths.
        TraceFileError: A shard cannot be read; the shards belong to different runs or models; or
            the output exists, is in another folder than the shards, or cannot be written.

    Warns:
        GrutraceWarning: The file of a rank is missing.
    """
    target = Path(output)
    temporary = temporary_path(target, "w")
    source = open_files(paths)
    try:
        if not isinstance(source, ConcatenatedSource):
            raise TraceFileError(f"{source.name} is one file: expected several shards to merge")
        if not copy:
            _require_same_folder(target, source.files)
        merge = _Merge(source, copy, progress)
        with translate_write_errors(target, "written"), unlink_on_error(temporary):
            # No lock is needed for a temporary file, and some file systems have no locks.
            with h5py.File(temporary, "x", libver=LIBVER, locking=False) as file:
                merge.write(file)
            publish(temporary, target, "w")
        return merge.report
    finally:
        source.close()


def _require_same_folder(target: Path, files: Sequence[Path]) -> None:
    folder = Path(os.path.realpath(target)).parent
    for file in files:
        if Path(os.path.realpath(file)) != folder / file.name:
            raise TraceFileError(
                f"{target} cannot be merged from {file}, which is not a file of the same folder: "
                "write to that folder, or merge with --copy (copy=True)"
            )


class _Merge:
    """One merge of the present content of several shards.

    Args:
        source: All shards.
        copy: Whether to copy the rows of all shards.
        progress: Called with the number of copied bytes and the total.
    """

    def __init__(self, source: ConcatenatedSource, copy: bool, progress: Progress | None) -> None:
        self._tables = source.refresh()
        self._reader, self._header = source.as_of(self._tables), source.header
        self._copy, self._progress = copy, progress
        self._shards = [
            _Shard(shard, shard_source, tables, indices, linked=tables.closed and not copy)
            for shard, shard_source, tables, indices in zip(
                source.shards,
                source.sources,
                source.shard_tables,
                source.module_indices,
                strict=True,
            )
        ]
        self._copied_bytes = 0
        self._total = sum(shard.nbytes for shard in self._shards if not shard.linked)
        self.report = MergeReport(
            tuple(shard.summary for shard in self._shards),
            tuple(shard.source.files[0] for shard in self._shards if not shard.tables.closed),
            self._total,
        )

    def write(self, file: h5py.File) -> None:
        """Fill the new file."""
        options = merged_options(self._header.options, self.report.shards)
        header = replace(self._header, options=options)
        write_header(file, header)
        # Copied rows keep their filters.
        create = partial(create_growing_dataset, row_filters=row_filters(header))
        if self._copy:
            create_datasets(file, header.modules, create)
            for index, module in enumerate(header.modules):
                counts = self._tables.module_counts[index]
                self._copy_module(file, module, self._reader, index, counts)
        else:
            for shard in self._shards:
                if not shard.linked:
                    self._copy_shard(file, shard, create)
            spans = self._spans()
            create_datasets(file, header.modules, partial(create_virtual_dataset, spans))
        self._write_tables(file)
        create_scales(file, header.modules)
        extend_scales(file, header.modules, dataset_lengths(self._tables, header.modules))

    def _write_tables(self, file: h5py.File) -> None:
        for name in TABLES:
            _fill(file[name], getattr(self._tables, name))
        for module, pieces in zip(self._header.modules, self._tables.pieces, strict=True):
            _fill(file[pieces_path(module)], pieces)
        counts = np.zeros((), COMMITTED)
        for name in TABLES:
            counts[name] = len(getattr(self._tables, name))
        counts["closed"] = True
        file["committed"][()] = counts

    def _spans(self) -> dict[str, list[SourceSpan]]:
        """Return the spans of each virtual dataset, by path."""
        spans: dict[str, list[SourceSpan]] = {}
        for shard in self._shards:
            for local_index, index in enumerate(shard.module_indices):
                module, counts = (
                    self._header.modules[index],
                    shard.tables.module_counts[local_index],
                )
                for dataset_path, name in _row_datasets(module):
                    count = _count(counts, name)
                    if count:
                        spans.setdefault(dataset_path, []).append(
                            shard.span(local_index, module, dataset_path, count)
                        )
        return spans

    def _copy_shard(self, file: h5py.File, shard: _Shard, create: CreateDataset) -> None:
        """Copy the datasets of one shard to a group of the new file."""
        for local_index, index in enumerate(shard.module_indices):
            module = self._header.modules[index]
            specs = dataset_specs([module])
            for dataset_path, _ in _row_datasets(module):
                create(file, f"{shard.prefix}{dataset_path}", specs[dataset_path])
            counts = shard.tables.module_counts[local_index]
            self._copy_module(file, module, shard.source, local_index, counts, shard.prefix)

    def _copy_module(
        self,
        file: h5py.File,
        module: ModuleInfo,
        source: SnapshotReader,
        index: int,
        counts: ModuleCounts,
        prefix: str = "",
    ) -> None:
        for site in module.sites:

            def dataset_path(name: str, suffix: str = site.suffix) -> str:
                return prefix + site_path(module, suffix, name)

            for quantity in site.quantities:
                if quantity != "input" or input_owner(module, site) is site:
                    rows = source.rows(index, site.suffix, quantity, counts.rows)
                    self._copy_rows(file[dataset_path(quantity)], rows)
            initial = source.initial(index, site.suffix, counts.sequences)
            self._copy_rows(file[dataset_path("initial")], initial)
            for name in call_tables(site):
                items = getattr(source, name)(index, site.suffix, counts.calls)
                self._copy_rows(file[dataset_path(name)], items)
            for name in weight_shapes(module, site):
                _resize(file[dataset_path(name)], counts.versions)
            for version in range(counts.versions):
                weights = source.weights(index, site.suffix, version)
                for name, array in weights.items():
                    file[dataset_path(name)][version] = array
                    self._advance(array.nbytes)

    def _copy_rows(self, dataset: h5py.Dataset, rows: Rows | Array) -> None:
        _resize(dataset, len(rows))
        # In whole chunks, so that no chunk is written twice.
        chunk = dataset.chunks[0]
        step = chunk * items_per_block(BLOCK, chunk * item_bytes(dataset))
        for start in range(0, len(rows), step):
            block = np.asarray(rows[start : start + step])
            dataset[start : start + len(block)] = block
            self._advance(block.nbytes)

    def _advance(self, nbytes: int) -> None:
        self._copied_bytes += nbytes
        if self._progress is not None:
            self._progress(self._copied_bytes, self._total)


@dataclass(frozen=True)
class _Shard:
    """A shard that is merged.

    Attributes:
        shard: Run, rank and world size of the shard.
        source: Source of the shard.
        tables: Tables of the shard.
        module_indices: Its modules, as indexes into the modules of all shards.
        linked: Whether its rows stay in its file.
    """

    shard: Shard
    source: AppendOnlySource
    tables: Tables
    module_indices: ModuleIndices
    linked: bool

    @property
    def prefix(self) -> str:
        """Path prefix of its copied datasets."""
        return f"{COPIED}/rank{self.shard.rank:04}/"

    @property
    def summary(self) -> MergedShard:
        """Its description in the merged file."""
        files = {file.files[0].name: file.header.created for file in _file_sources(self.source)}
        calls, closed = len(self.tables.calls), self.tables.closed
        return MergedShard(self.shard.rank, calls, closed, files if self.linked else {})

    @property
    def nbytes(self) -> int:
        """Bytes of all its datasets except the tables."""
        size = 0
        for module, counts in zip(
            self.source.header.modules, self.tables.module_counts, strict=True
        ):
            specs = dataset_specs([module])
            for dataset_path, name in _row_datasets(module):
                spec = specs[dataset_path]
                size += _count(counts, name) * math.prod(spec.item_shape) * spec.dtype.itemsize
        return size

    def span(
        self, local_index: int, module: ModuleInfo, dataset_path: str, count: int
    ) -> SourceSpan:
        """Return the span of a dataset of one of its modules."""
        if not self.linked:
            return SourceSpan(SELF, f"{self.prefix}{dataset_path}", count)
        file, index = (
            self.source.locate(local_index)
            if isinstance(self.source, UnionSource)
            else (self.source, local_index)
        )
        # In its own file, the module may have another path.
        path = module_path(file.header.modules[index]) + dataset_path.removeprefix(
            module_path(module)
        )
        return SourceSpan(file.files[0].name, path, count)


def _file_sources(source: AppendOnlySource) -> Sequence[AppendOnlySource]:
    return source.sources if isinstance(source, UnionSource) else [source]


def _row_datasets(module: ModuleInfo) -> Iterator[tuple[str, str]]:
    """Yield path and name of each dataset of a module, except tables."""
    for dataset_path in dataset_specs([module]):
        if dataset_path not in TABLES and dataset_path != pieces_path(module):
            yield dataset_path, dataset_path.rpartition("/")[2]


def _count(counts: ModuleCounts, name: str) -> int:
    """Return the number of items of a dataset."""
    if name in QUANTITIES or name.startswith(LOG_PREFIX):
        return counts.rows
    lengths = {"initial": counts.sequences, "checks": counts.calls, "backward": counts.calls}
    return lengths.get(name, counts.versions)


def _fill(dataset: h5py.Dataset, items: Array) -> None:
    _resize(dataset, len(items))
    if len(items):
        dataset[:] = items


def _resize(dataset: h5py.Dataset, count: int) -> None:
    dataset.resize(count, axis=0)
