"""Several sources read as one trace whose modules differ: the parts of a run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path

import numpy as np

from grutrace.records import Array, ModuleInfo, TraceHeader
from grutrace.storage.format.tables import Tables
from grutrace.storage.interfaces import AppendOnlySource, Rows, SnapshotReader


class UnionSource:
    """Sources one after another as one `Source`, which closes them.

    Their modules follow one another, their calls are in the order of time, and rows, states and
    weights are read from where they are. Each source shows a consistent prefix, at a moment of its
    own: a call of one may be there a little before an earlier one of another, so the places of
    calls can change when the trace is refreshed. Numbers of modules and sequences stay.

    Args:
        name: Of the whole.
        sources: At least one; more can be added.
        labels: What to put before the paths of a source where they are taken (see
            `distinct_modules`); the class of its model unless given.
    """

    def __init__(
        self, name: str, sources: Sequence[AppendOnlySource], labels: Sequence[str] | None = None
    ) -> None:
        self.name = name
        self.live = any(source.live for source in sources)
        self._sources = list(sources)
        self._labels = list(labels or map(_label, sources))
        self._latest: tuple[Tables, ...] = ()
        self._tables: Tables | None = None
        self._merge_headers()

    def __reduce__(self) -> tuple[object, ...]:
        """Pickled, it is its sources, without what was read of them."""
        return UnionSource, (self.name, self._sources, self._labels)

    @property
    def sources(self) -> tuple[AppendOnlySource, ...]:
        """All of them."""
        return tuple(self._sources)

    @property
    def files(self) -> tuple[Path, ...]:
        """The files of all sources."""
        return tuple(file for source in self._sources for file in source.files)

    def locate(self, module: int) -> tuple[AppendOnlySource, int]:
        """Which of the sources holds a module, and at which place."""
        return self._module_sources[module]

    def add(self, source: AppendOnlySource) -> None:
        """Have one more source, whose modules come last."""
        self._sources.append(source)
        self._labels.append(_label(source))
        self._merge_headers()

    def _merge_headers(self) -> None:
        headers = [source.header for source in self._sources]
        self.header = union_header(headers, self._labels)
        self._module_sources = [
            (source, number)
            for source in self._sources
            for number in range(len(source.header.modules))
        ]

    def refresh(self) -> Tables:
        """The tables of everything there is by now."""
        latest = tuple(source.refresh() for source in self._sources)
        known = len(latest) == len(self._latest) and all(map(_is, latest, self._latest))
        if self._tables is None or not known:
            self._tables = latest[0] if len(latest) == 1 else union_tables(latest)
            self._latest = latest
        return self._tables

    def as_of(self, tables: Tables) -> SnapshotReader:  # noqa: ARG002
        """The source itself: what is there stays where it is."""
        return self

    def rows(self, module: int, suffix: str, quantity: str, count: int) -> Rows:
        """The first `count` rows, (count, H or I)."""
        source, number = self._module_sources[module]
        return source.rows(number, suffix, quantity, count)

    def initial(self, module: int, suffix: str, count: int) -> Rows:
        """The states that the first `count` sequences began from, (count, H)."""
        source, number = self._module_sources[module]
        return source.initial(number, suffix, count)

    def checks(self, module: int, suffix: str, count: int) -> Array:
        """Of the module's first `count` calls, (count,) of type `schema.CHECK`."""
        source, number = self._module_sources[module]
        return source.checks(number, suffix, count)

    def weights(self, module: int, suffix: str, version: int) -> dict[str, Array]:
        """One version of a site's weights."""
        source, number = self._module_sources[module]
        return source.weights(number, suffix, version)

    def close(self) -> None:
        """Close all sources. Closing twice does nothing."""
        for source in self._sources:
            source.close()


def union_header(headers: Sequence[TraceHeader], labels: Sequence[str]) -> TraceHeader:
    """One header for all: that of the first, with the models and modules of each."""
    if len(headers) == 1:
        return headers[0]
    models = dict.fromkeys(header.model for header in headers)
    modules = distinct_modules([header.modules for header in headers], labels)
    return replace(headers[0], model=", ".join(models), modules=modules)


def distinct_modules(
    parts: Sequence[Sequence[ModuleInfo]], labels: Sequence[str]
) -> tuple[ModuleInfo, ...]:
    """All modules, each with a path of its own.

    A part keeps its paths unless one of them is taken by a part before it. Then its label and a dot
    come before all of them; or, if it is the k-th part with this label, ``label#k`` and a dot; or
    the next larger number with which no path is taken.
    """
    used_paths: set[str] = set()
    modules: list[ModuleInfo] = []
    for index, (part, label) in enumerate(zip(parts, labels, strict=True)):
        for prefix in _prefixes(label, labels[: index + 1].count(label)):
            renamed = [_renamed(module, prefix) for module in part]
            if used_paths.isdisjoint(module.path for module in renamed):
                break
        used_paths |= {module.path for module in renamed}
        modules += renamed
    return tuple(modules)


def _prefixes(label: str, number: int) -> Iterator[str]:
    yield ""
    for each in count(number):
        yield label if each == 1 else f"{label}#{each}"


def _renamed(module: ModuleInfo, prefix: str) -> ModuleInfo:
    if not prefix:
        return module
    path = f"{prefix}.{module.path}" if module.path else prefix
    sites = tuple(replace(site, name=f"{prefix}.{site.name}") for site in module.sites)
    return replace(module, path=path, sites=sites)


def union_tables(parts: Sequence[Tables]) -> Tables:
    """The tables of all parts as if one trace had recorded everything."""
    calls, forks, annotations, values, strings, characters = ([] for _ in range(6))
    modules = string_count = character_count = 0
    for part in parts:
        calls.append(_shift_references(part.calls, modules, {"tag": string_count}))
        forks.append(_shift_references(part.forks, modules, {}))
        annotations.append(_shift_references(part.annotations, modules, {"name": string_count}))
        values.append(annotation_values(part, string_count))
        strings.append(part.strings + np.uint64(character_count))
        # What nothing points at would become the beginning of the next part's first string.
        characters.append(part.characters[: int(part.strings[-1]) if len(part.strings) else 0])
        modules += len(part.pieces)
        string_count += len(part.strings)
        character_count += len(characters[-1])
    joined = np.concatenate(calls)
    return Tables(
        calls=joined[_in_time_order(calls)],
        forks=np.concatenate(forks),
        annotations=np.concatenate(annotations),
        values=np.concatenate(values),
        strings=np.concatenate(strings),
        characters=np.concatenate(characters),
        pieces=tuple(pieces for part in parts for pieces in part.pieces),
        module_counts=tuple(extent for part in parts for extent in part.module_counts),
        closed=all(part.closed for part in parts),
    )


def _shift_references(table: Array, modules: int, string_count: dict[str, int]) -> Array:
    """A copy whose modules, and fields that are one more than a string's number, come later."""
    moved = table.copy()
    moved["module"] += np.uint32(modules)
    for name, number in string_count.items():
        moved[name][table[name] > 0] += np.uint32(number)
    return moved


def annotation_values(part: Tables, string_count: int) -> Array:
    """The values of its annotations, where they are numbers of strings those of later ones."""
    counts = part.annotations["count"].astype(np.int64)
    values = part.values[: int(counts.sum())].copy()
    values[np.repeat(part.annotations["text"] > 0, counts)] += string_count
    return values


def _in_time_order(calls: Sequence[Array]) -> Array:
    """Where to find each call among all. Those of one part stay in their order, come what may.

    Threads, or a clock that was put back, can make a call's time smaller than that of the call
    before it; and which rows a call made depends on the order.
    """
    times = [np.maximum.accumulate(each["time"]) for each in calls]
    return np.argsort(np.concatenate(times), kind="stable")


def _label(source: AppendOnlySource) -> str:
    return source.header.model.rpartition(".")[2]


def _is(first: object, second: object) -> bool:
    return first is second
