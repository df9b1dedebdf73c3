"""`grutrace.report`: a page that says what a trace shows."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from itertools import islice

import numpy as np

from grutrace.errors import as_path, require_extra
from grutrace.reprs import plural
from grutrace.storage.open import open_trace
from grutrace.storage.read.trace import Trace
from grutrace.view.picture_files import require_format, write_file

#: Largest number of sites with a section of their own, and with a line.
MAX_SECTIONS, MAX_LINES = 8, 50

#: Largest number of sites that are looked at to choose these.
MAX_SITES = 1000


def report(
    source: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | Trace,
    path: str | os.PathLike[str],
    *,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write a report about a trace: one HTML file that needs neither scripts nor other files.

    It opens with findings in words: whether the gates are proven, which units are stuck or
    constant, which follow a label, how long units remember, whether the network is chaotic, whether
    gradients vanish, and how gates moved over the recording. Each has its test, its picture and the
    command that repeats it. A finding is said only if its test says so, at 5 % and corrected for
    the number of units and sites. Where the trace holds too little, the report says that. A section
    for each site follows. The file is below 5 MiB, for a trace of any size: at a large site every
    k-th sequence is read, and the report says so.

    Args:
        source: A trace, or the path of a trace file, a glob or several paths, as for
            `grutrace.open`.
        path: The file to write, which ends in ``.html``. An existing file is replaced.
        progress: Called with the number of parts done, and of all parts.

    Raises:
        OptionError: `path` has another ending.
        TraceFileError: The trace cannot be read, or the report cannot be written.
        MissingExtraError: matplotlib is not installed.

    Examples:
        >>> import torch
        >>> import grutrace
        >>> gru = torch.nn.GRU(input_size=2, hidden_size=3)
        >>> with grutrace.trace(gru, "run.h5"):
        ...     output, state = gru(torch.randn(5, 4, 2))
        >>> grutrace.report("run.h5", "report.html")
    """
    target = as_path(path)
    require_format(target, ("html", "htm"))
    if isinstance(source, Trace):
        content = make_report(source, progress)
    else:
        with open_trace(source) as trace:
            content = make_report(trace, progress)
    write_file(target, content.encode())


def make_report(trace: Trace, progress: Callable[[int, int], None] | None = None) -> str:
    """Return the page of `report`."""
    with require_extra("grutrace.report", "plot"):
        from grutrace.view.report.dynamics import (
            find_chaos,
            find_course,
            find_gradients,
            find_timescales,
        )
        from grutrace.view.report.page import render
        from grutrace.view.report.proof import find_proof
        from grutrace.view.report.sample import sample_site
        from grutrace.view.report.site_section import describe_site
        from grutrace.view.report.units import find_label_units, find_stuck
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        # The report itself says which calls are unproven.
        warnings.simplefilter("ignore")
        names, others, more = _choose_sites(trace)
        samples = [sample_site(trace, name) for name in names]
        file = _file_name(trace)
        parts = [
            find_stuck, find_label_units, find_timescales, find_chaos, find_gradients, find_course,
        ]  # fmt: skip
        total = len(parts) + len(samples) + 1
        findings = [find_proof(trace, file, samples)]
        for find in parts:
            findings.append(find(file, samples))
            _advance(progress, len(findings), total)
        # What was found comes first; the order is the same otherwise.
        order = {"found": 0, "clear": 1, "unknown": 2}
        findings.sort(key=lambda finding: order[finding.state])
        sections = []
        for sample in samples:
            sections.append(describe_site(trace, file, sample))
            _advance(progress, len(findings) + len(sections), total)
        return render(_title(trace), _about(trace), findings, sections, others, more)


def _advance(progress: Callable[[int, int], None] | None, done: int, total: int) -> None:
    if progress is not None:
        progress(done, total)


def _choose_sites(trace: Trace) -> tuple[list[str], list[str], int]:
    """Return the sites with a section, lines about others, and the number of sites without either.

    Sites with the most steps come first.
    """
    looked_at = list(islice(iter(trace.sites), MAX_SITES))
    steps = {name: trace[name].extent.rows for name in looked_at}
    chosen = sorted(looked_at, key=lambda name: -steps[name])
    sections = [name for name in chosen[:MAX_SECTIONS] if steps[name]]
    kept = [name for name in looked_at if name in set(sections)]
    listed = [name for name in chosen if name not in set(kept)][:MAX_LINES]
    lines = [f"{name}: {steps[name]:,} steps" for name in listed]
    return kept, lines, len(trace.sites) - len(kept) - len(listed)


def _file_name(trace: Trace) -> str:
    """Return what stands for the trace in commands: they are for the folder of its files."""
    names = [path.name for path in trace.files]
    return names[0] if len(names) == 1 else "FILES" if names else "run.h5"


def _title(trace: Trace) -> str:
    name = trace.files[0].name if trace.files else f"a trace of {trace.header.model}"
    return f"Report: {name}"


def _about(trace: Trace) -> list[str]:
    header, tables = trace.header, trace.snapshot.tables
    sequences = sum(module.sequences for module in tables.module_counts)
    lines = [
        f"A trace of {header.model}: {plural(len(trace.sites), 'site')}, "
        f"{plural(len(tables.calls), 'call')}, {plural(sequences, 'sequence')}.",
    ]
    if trace.selection is not None:
        lines.append(
            f"Only sequences with {trace.selection}. The commands need the options that select "
            "them."
        )
    if len(trace.files) > 1:
        lines.append(f"{len(trace.files):,} files.")
    if not trace.closed and trace.files:
        lines.append(
            "The file was not closed: it is still being written, or its writer was killed."
        )
    if len(trace.sites) > MAX_SECTIONS:
        lines.append(
            f"The findings are about the {MAX_SECTIONS} sites with the most steps, of the first "
            f"{MAX_SITES:,}."
            if len(trace.sites) > MAX_SITES
            else f"The findings are about the {MAX_SECTIONS} sites with the most steps."
        )
    return lines
