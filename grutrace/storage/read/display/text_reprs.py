"""What is in a trace, a site or a sequence, in a few lines of text."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence

import numpy as np

from grutrace.records import Site
from grutrace.reprs import WIDTH, plural, shorten, wrap_text
from grutrace.storage.read.annotations import annotation_names
from grutrace.storage.read.snapshot import TraceSnapshot

#: Numbers of sites, tags and tokens that are shown.
MAX_SITES, MAX_NAMES, MAX_TOKENS = 5, 8, 12

#: Characters of a name that are shown.
MAX_NAME_CHARS = 40

_INDENT = "    "


def trace_repr(snapshot: TraceSnapshot, location: str, selection: str | None) -> str:
    """Return the repr of a trace: its counts, its sites, tags and labels."""
    header, tables = snapshot.header, snapshot.tables
    sites = [(n, site) for n, module in enumerate(header.modules) for site in module.sites]
    sequences = sum(module.sequences for module in tables.module_counts)
    counts = [plural(len(sites), "site"), plural(len(tables.calls), "call")]
    what = f"trace of {header.model} in {location}"
    if selection is not None:
        what = f"selection ({shorten(selection)}) of the {what}"
    lines = [wrap_text(f"<{what}: {', '.join(counts)}, {plural(sequences, 'sequence')}")]
    lines += [_indented(_site_line(snapshot, *site)) for site in sites[:MAX_SITES]]
    if len(sites) > MAX_SITES:
        lines.append(_indented(f"and {plural(len(sites) - MAX_SITES, 'more site')}"))
    if names := tag_names(snapshot):
        lines.append(_indented(f"tags: {short_list(names)}"))
    if names := [name for module in range(len(header.modules)) for name in snapshot.logged(module)]:
        lines.append(_indented(f"logged: {short_list(dict.fromkeys(names))}"))
    if names := label_names(snapshot):
        lines.append(_indented(f"labels: {short_list(names)}"))
    return "\n".join(lines) + ">"


def site_repr(snapshot: TraceSnapshot, module: int, site: Site) -> str:
    """Return the repr of a site: its counts, quantities and labels."""
    extent = snapshot.extent(module)
    recorded = ", ".join(site.available_quantities)
    labels = annotation_names(snapshot.tables, module)
    sequences = plural(extent.sequences, "sequence")
    lines = [
        wrap_text(f"<site {site.name}: {sequences}, {plural(extent.rows, 'step')} of {recorded}")
    ]
    if logged := snapshot.logged(module):
        lines.append(_indented(f"logged: {short_list(logged)}"))
    if labels:
        lines.append(_indented(f"labels: {short_list(labels)}"))
    return "\n".join(lines) + ">"


def sequence_repr(
    number: int, site: Site, length: int, tag: str | None, tokens: Sequence[object] | None
) -> str:
    """Return the repr of a sequence: its length, tag and first tokens."""
    text = f"sequence {number} of {site.name}: {plural(length, 'step')}"
    if tag is not None:
        text += f", tag {shorten(tag, MAX_NAME_CHARS)!r}"
    if tokens is not None:
        shown = [token_text(token) for token in tokens[:MAX_TOKENS]]
        text += f", tokens: {' '.join(shown)}{' ...' if len(tokens) > MAX_TOKENS else ''}"
    return wrap_text(f"<{text}>")


def _site_line(snapshot: TraceSnapshot, number: int, site: Site) -> str:
    extent, recorded = snapshot.extent(number), ", ".join(site.available_quantities)
    sequences = plural(extent.sequences, "sequence")
    name = shorten(site.name, MAX_NAME_CHARS)
    return f"{name}: {sequences}, {plural(extent.rows, 'step')} of {recorded or 'nothing'}"


def tag_names(snapshot: TraceSnapshot) -> list[str]:
    """Return the tags of the calls, in the order of recording."""
    numbers, first_calls = np.unique(snapshot.tables.calls["tag"], return_index=True)
    in_order = numbers[np.argsort(first_calls)].tolist()
    return list(dict.fromkeys(snapshot.tables.texts[n - 1] for n in in_order if n))


def label_names(snapshot: TraceSnapshot) -> list[str]:
    """Return the labels of all modules, ``tokens`` among them."""
    modules = range(len(snapshot.header.modules))
    names = (annotation_names(snapshot.tables, module) for module in modules)
    return list(dict.fromkeys(name for module_names in names for name in module_names))


def short_list(names: Iterable[str]) -> str:
    """Return the first names, each shortened, and the number of the others."""
    listed = list(names)
    text = ", ".join(shorten(name, MAX_NAME_CHARS // 2) for name in listed[:MAX_NAMES])
    more = len(listed) - MAX_NAMES
    return text if more <= 0 else f"{text} and {more} more"


def token_text(token: object) -> str:
    """Return a token as a short text, and a middle dot for none."""
    return "\N{MIDDLE DOT}" if token is None else shorten(str(token), MAX_NAME_CHARS // 2)


def _indented(text: str) -> str:
    return textwrap.fill(
        text,
        WIDTH - 1,
        initial_indent=_INDENT,
        subsequent_indent=2 * _INDENT,
        break_on_hyphens=False,
    )
