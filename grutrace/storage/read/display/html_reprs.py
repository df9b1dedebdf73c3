"""What is in a trace, a site or a sequence, as a small table for a notebook.

Names, tags, labels and tokens come from files of others: they are always escaped.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

import numpy as np

from grutrace.errors import GrutraceError
from grutrace.records import LOG_PREFIX, Site
from grutrace.reprs import plural, shorten
from grutrace.storage.read.annotations import annotation_names
from grutrace.storage.read.display.text_reprs import (
    MAX_NAME_CHARS,
    label_names,
    short_list,
    tag_names,
    token_text,
)
from grutrace.storage.read.display.thumbnails import thumbnail
from grutrace.storage.read.sequence_index import Integers
from grutrace.storage.read.snapshot import TraceSnapshot

#: Numbers of sites, of sequences and of tokens that are shown.
MAX_SITES, MAX_SEQUENCES, MAX_TOKENS = 8, 5, 24

#: Steps of a sequence that a thumbnail reads at most.
MAX_STEPS = 256

_LEFT = "text-align:left;padding-right:1em"
_RIGHT = "text-align:right;padding-right:1em"
_IMAGE = "image-rendering:pixelated;vertical-align:middle"


def trace_html(snapshot: TraceSnapshot, location: str, selection: str | None) -> str:
    """Return a trace as HTML: a table of its sites, each with a picture of a sequence."""
    header, tables = snapshot.header, snapshot.tables
    sites = [(n, site) for n, module in enumerate(header.modules) for site in module.sites]
    sequences = sum(module.sequences for module in tables.module_counts)
    facts = [
        f"{plural(len(sites), 'site')}, {plural(len(tables.calls), 'call')}, "
        f"{plural(sequences, 'sequence')}"
    ]
    if selection is not None:
        facts.append(f"selected: {shorten(selection)}")
    if names := tag_names(snapshot):
        facts.append(f"tags: {short_list(names)}")
    if names := label_names(snapshot):
        facts.append(f"labels: {short_list(names)}")
    rows = []
    for number, site in sites[:MAX_SITES]:
        module, extent = header.modules[number], snapshot.extent(number)
        kind = f"{module.kind}({module.input_size}, {module.hidden_size})"
        rows.append(
            [
                _text(site.name),
                _text(kind),
                str(extent.sequences),
                str(extent.rows),
                _text(", ".join(site.available_quantities)),
                _picture(snapshot, number, site, _pictured(site)),
            ]
        )
    if len(sites) > MAX_SITES:
        rows.append([_text(f"and {plural(len(sites) - MAX_SITES, 'more site')}")])
    titles = ("site", "layer", "sequences", "steps", "quantities", "first sequence")
    title = f"trace of {header.model} in {location}"
    return _block(title, facts, _table(titles, rows, numbers=(2, 3)))


def site_html(snapshot: TraceSnapshot, module: int, site: Site, residual: float) -> str:
    """Return a site as HTML: its quantities with pictures, and its first sequences."""
    info, extent = snapshot.header.modules[module], snapshot.extent(module)
    direction = "backward" if site.reverse else "forward"
    units = info.unit_count(site)
    facts = [
        f"{plural(extent.sequences, 'sequence')}, {plural(extent.rows, 'step')}, "
        f"{plural(extent.calls, 'call')}",
        f"layer {site.layer}, {direction}: {site.input_size} inputs, {plural(units, 'unit')}"
        + ("" if site.units is None else f" of {info.hidden_size}"),
        "residual: recomputed on reading" if np.isnan(residual) else f"residual: {residual:.1e}",
    ]
    if logged := snapshot.logged(module):
        facts.append(f"logged: {short_list(logged)}")
    if names := annotation_names(snapshot.tables, module):
        facts.append(f"labels: {short_list(names)}")
    if site.derived:
        facts.append(f"recomputed on reading: {', '.join(site.derived)}")
    tables = _pictures(snapshot, module, site, _first_sequence(snapshot, module))
    listed = [
        [str(number), str(len_), _text(tag or ""), _tokens(tokens)]
        for number, len_, tag, tokens in _sequences(snapshot, module)
    ]
    tables += _table(("sequence", "steps", "tag", "tokens"), listed, numbers=(0, 1))
    if extent.sequences > MAX_SEQUENCES:
        tables += f"<div>and {extent.sequences - MAX_SEQUENCES} more sequences</div>"
    return _block(f"site {site.name}", facts, tables)


def sequence_html(
    snapshot: TraceSnapshot,
    module: int,
    site: Site,
    number: int,
    tag: str | None,
    origin: str,
    tokens: Sequence[object] | None,
) -> str:
    """Return a sequence as HTML: its tokens, and a picture of each stored quantity."""
    index = snapshot.index(module)
    calls = index.calls[index.pieces(number)]
    facts = [
        f"{plural(int(index.lengths[number]), 'step')} in {plural(len(calls), 'call')}, "
        f"from call {calls[0]} on; began as {origin}",
    ]
    if tag is not None:
        facts.append(f"tag: {shorten(tag, MAX_NAME_CHARS)}")
    if names := [n for n in annotation_names(snapshot.tables, module) if n != "tokens"]:
        facts.append(f"labels: {short_list(names)}")
    content = "" if tokens is None else f"<div>tokens: {_tokens(tokens)}</div>"
    content += _pictures(snapshot, module, site, number)
    return _block(f"sequence {number} of {site.name}", facts, content)


def _pictures(snapshot: TraceSnapshot, module: int, site: Site, number: int | None) -> str:
    """Return a table with a picture of each stored quantity of a sequence, and what they show."""
    if number is None or not site.quantities:
        return ""
    names = [name for name in site.quantities if not name.startswith(LOG_PREFIX)]
    pictures = [_picture(snapshot, module, site, name, number) for name in names]
    return (
        _table(names, [pictures])
        + f"<div>sequence {number}: steps from left to right, units downwards; reset and update "
        "from 0 (dark) to 1 (bright), the others from -1 (blue) over 0 (white) to 1 (red), or to "
        "their largest value</div>"
    )


def _sequences(
    snapshot: TraceSnapshot, module: int
) -> Iterable[tuple[int, int, str | None, Sequence[object] | None]]:
    """Yield the number, length, tag and tokens of the first sequences."""
    index, annotations = snapshot.index(module), snapshot.annotations(module)
    for number in range(min(MAX_SEQUENCES, len(index))):
        length = int(index.lengths[number])
        call = index.calls[index.first_pieces[number]]
        tokens = annotations.values(number, min(length, MAX_TOKENS + 1)).get("tokens")
        yield number, length, snapshot.tags[call], None if tokens is None else list(tokens)


def _first_sequence(snapshot: TraceSnapshot, module: int) -> int | None:
    """Return the first sequence with steps, or None."""
    lengths: Integers = snapshot.index(module).lengths
    return int(np.argmax(lengths > 0)) if len(lengths) and lengths.max() else None


def _pictured(site: Site) -> str | None:
    """Return the quantity that stands for a site: one that is stored, and says most."""
    wanted = ("update", "hidden", "reset", "candidate", "input", "gradient")
    return next((name for name in wanted if name in site.quantities), None)


def _picture(
    snapshot: TraceSnapshot,
    module: int,
    site: Site,
    quantity: str | None,
    number: int | None = None,
) -> str:
    """Return a picture of a stored quantity of one sequence, the first by default; or nothing."""
    if number is None:
        number = _first_sequence(snapshot, module)
    if number is None or quantity not in site.quantities or quantity is None:
        return ""
    rows = snapshot.index(module).rows(number)
    count = len(rows) if not isinstance(rows, slice) else rows.stop - rows.start
    if not count:
        return ""
    rows = (
        slice(rows.start, rows.start + min(count, MAX_STEPS))
        if isinstance(rows, slice)
        else (rows[:MAX_STEPS])
    )
    try:
        values = np.asarray(snapshot.rows(module, site, quantity)[rows])
    except GrutraceError:
        # For example, a filter of another program is not installed: the table does without.
        return ""
    uri, width, height = thumbnail(values, signed=quantity not in ("reset", "update"))
    steps = f"steps 0 to {len(values) - 1}"
    text = escape(f"{quantity} of sequence {number}, {steps}, {values.shape[1]} values each")
    return (
        f'<img src="{uri}" width="{width}" height="{height}" style="{_IMAGE}" '
        f'alt="{text}" title="{text}">'
    )


def _tokens(tokens: Sequence[object] | None) -> str:
    if tokens is None:
        return ""
    shown = " ".join(f"<code>{escape(token_text(token))}</code>" for token in tokens[:MAX_TOKENS])
    return shown + (" ..." if len(tokens) > MAX_TOKENS else "")


def _text(text: str) -> str:
    return escape(shorten(text))


def _table(
    titles: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[int] = ()
) -> str:
    """Return a table. The cells are HTML; those of the columns `numbers` are aligned right."""
    if not rows:
        return ""
    styles = [_RIGHT if column in numbers else _LEFT for column in range(len(titles))]
    head = "".join(
        f'<th style="{style}">{escape(title)}</th>'
        for title, style in zip(titles, styles, strict=True)
    )
    body = "".join(
        "<tr>"
        + "".join(
            f'<td style="{style}">{cell}</td>' for cell, style in zip(row, styles, strict=False)
        )
        + "</tr>"
        for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _block(title: str, facts: Iterable[str], content: str) -> str:
    lines = "".join(f"<div>{escape(fact)}</div>" for fact in facts)
    return f"<div><div><b>{_text(title)}</b></div>{lines}{content}</div>"
