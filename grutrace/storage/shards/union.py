"""`UnionSource` reads several sources with different modules as one trace: the parts of a run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import count

from grutrace.records import Array, ModuleInfo, TraceHeader
from grutrace.storage.format.tables import Tables
from grutrace.storage.interfaces import AppendOnlySource, Rows, SnapshotReader
from grutrace.storage.shards.joined_tables import JoinedSource, union_tables


class UnionSource(JoinedSource):
    """Several sources as one `Source`.

    The modules of the sources are concatenated, and their calls are sorted by time. Each source
    shows a consistent prefix of its own. A call may become visible before an earlier call of
    another source, so call numbers can change when the trace is refreshed. The numbers of modules
    and sequences do not change. Closing the union closes its sources.

    Args:
        name: Name of the union, for messages.
        sources: The sources, at least one. More can be added.
        labels: Prefix of each source for module paths that are already used (see
            `distinct_modules`). By default, the class name of its model.
    """

    def __init__(
        self, name: str, sources: Sequence[AppendOnlySource], labels: Sequence[str] | None = None
    ) -> None:
        super().__init__(name, sources)
        self.live = any(source.live for source in sources)
        self._labels = list(labels or map(_label, sources))
        self._merge_headers()

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle the sources, without cached tables."""
        return UnionSource, (self.name, self._sources, self._labels)

    def locate(self, module: int) -> tuple[AppendOnlySource, int]:
        """Return the source of a module, and its index in that source."""
        return self._module_sources[module]

    def add(self, source: AppendOnlySource) -> None:
        """Append a source. Its modules follow those of the other sources."""
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

    def _join(self, tables: tuple[Tables, ...]) -> Tables:
        return tables[0] if len(tables) == 1 else union_tables(tables)

    def as_of(self, tables: Tables) -> SnapshotReader:  # noqa: ARG002
        """Return the source itself: rows are only appended."""
        return self

    def rows(self, module: int, suffix: str, quantity: str, count: int) -> Rows:
        """Return the first `count` rows, (count, H or I)."""
        source, number = self._module_sources[module]
        return source.rows(number, suffix, quantity, count)

    def initial(self, module: int, suffix: str, count: int) -> Rows:
        """Return the initial states of the first `count` sequences, (count, H)."""
        source, number = self._module_sources[module]
        return source.initial(number, suffix, count)

    def checks(self, module: int, suffix: str, count: int) -> Array:
        """Return the checks of the module's first `count` calls, (count,), type `schema.CHECK`."""
        source, number = self._module_sources[module]
        return source.checks(number, suffix, count)

    def backward(self, module: int, suffix: str, count: int) -> Array:
        """Return facts about the backward passes of these calls, (count,), `schema.BACKWARD`."""
        source, number = self._module_sources[module]
        return source.backward(number, suffix, count)

    def weights(self, module: int, suffix: str, version: int) -> dict[str, Array]:
        """Return one version of a site's weights."""
        source, number = self._module_sources[module]
        return source.weights(number, suffix, version)


def union_header(headers: Sequence[TraceHeader], labels: Sequence[str]) -> TraceHeader:
    """Return the header of the first source, with the models and modules of all sources."""
    if len(headers) == 1:
        return headers[0]
    models = dict.fromkeys(header.model for header in headers)
    modules = distinct_modules([header.modules for header in headers], labels)
    return replace(headers[0], model=", ".join(models), modules=modules)


def distinct_modules(
    sources: Sequence[Sequence[ModuleInfo]], labels: Sequence[str]
) -> tuple[ModuleInfo, ...]:
    """Return the modules of all sources, with distinct paths.

    A source keeps its paths unless an earlier source uses one of them. Otherwise all its paths get
    the prefix ``label.``, or ``label#k.`` for the k-th source with this label. If such a path is
    used too, k is the next number without a conflict.
    """
    used_paths: set[str] = set()
    modules: list[ModuleInfo] = []
    for index, (source_modules, label) in enumerate(zip(sources, labels, strict=True)):
        for prefix in _prefixes(label, labels[: index + 1].count(label)):
            renamed = [_renamed(module, prefix) for module in source_modules]
            if used_paths.isdisjoint(module.path for module in renamed):
                break
        used_paths |= {module.path for module in renamed}
        modules += renamed
    return tuple(modules)


def _prefixes(label: str, start: int) -> Iterator[str]:
    """Yield the prefixes to try: none, then the label with the numbers from `start` on."""
    yield ""
    for number in count(start):
        yield label if number == 1 else f"{label}#{number}"


def _renamed(module: ModuleInfo, prefix: str) -> ModuleInfo:
    if not prefix:
        return module
    path = f"{prefix}.{module.path}" if module.path else prefix
    sites = tuple(replace(site, name=f"{prefix}.{site.name}") for site in module.sites)
    return replace(module, path=path, sites=sites)


def _label(source: AppendOnlySource) -> str:
    return source.header.model.rpartition(".")[2]
