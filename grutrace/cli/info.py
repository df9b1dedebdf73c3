"""`grutrace info`: describe a trace file."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from datetime import datetime, timezone
from typing import Any

import numpy as np

from grutrace.cli.common import AsJSON, Files, display_name, open_traces
from grutrace.cli.output import echo, new_table, print_json, print_table
from grutrace.cli.selection import EVERYTHING, Selection, with_selection
from grutrace.errors import join_names
from grutrace.storage.read.proofs import PROOFS, UNPROVEN
from grutrace.storage.read.trace import Trace

#: The entry among the versions that is not printed: it names the system, not a library.
_PLATFORM_KEY = "platform"

#: Number of unproven calls that are listed.
MAX_LISTED = 8

#: Largest rounding error of values up to 1: half the spacing below 1, by storage type.
ROUNDING_ERROR = {"float16": 2.0**-12, "float32": 2.0**-25}


@with_selection
def info(files: Files, as_json: AsJSON = False, selection: Selection = EVERYTHING) -> None:
    """Describe a trace: model, options, layers, and counts of calls, sequences and steps."""
    with open_traces(files) as whole:
        trace, name = selection.apply(whole), display_name(files)
        print_json(describe(trace, name)) if as_json else print_info(trace, name)


def describe(trace: Trace, name: str) -> dict[str, Any]:
    """Return the description of a trace as JSON values."""
    header = trace.header
    return {
        "file": name,
        "parts": [str(file) for file in trace.files] or [name],
        "bytes": sum(file.stat().st_size for file in trace.files) if trace.files else None,
        "selection": trace.selection,
        "shards": [dataclasses.asdict(shard) for shard in trace.snapshot.tables.shards],
        "model": header.model,
        "created": datetime.fromtimestamp(header.created, timezone.utc).isoformat(
            timespec="seconds"
        ),
        "closed": trace.closed,
        "versions": dict(header.versions),
        "options": dict(header.options),
        "proofs": proofs(trace),
        "modules": [
            dataclasses.asdict(module)
            | dataclasses.asdict(trace[module.sites[0].name].extent)
            | {"sites": [site_info(trace, site.name) for site in module.sites]}
            for module in header.modules
        ],
    }


def site_info(trace: Trace, name: str) -> dict[str, Any]:
    """Return the description of a site as JSON values."""
    site = trace[name]
    return {
        "name": name,
        "quantities": site.site.quantities,
        "derived": site.site.derived,
        "units": site.units,
        "residual": site.residual,
    }


def print_info(trace: Trace, name: str) -> None:
    """Print the description of a trace."""
    description = describe(trace, name)
    state = "closed"
    if not description["closed"]:
        state = "not closed: still being written, or its writer was killed"
    parts = f" in {len(description['parts'])} files" if len(description["parts"]) > 1 else ""
    size = "on a server"
    if description["bytes"] is not None:
        size = f"{description['bytes'] / 1e6:.1f} MB"
    echo(f"{name}: trace of {description['model']}, {size}{parts}, {state}")
    versions = [
        f"{library} {version}"
        for library, version in description["versions"].items()
        if library != _PLATFORM_KEY
    ]
    echo(f"recorded {description['created']} with {', '.join(versions)}")
    if description["selection"]:
        echo(f"only the sequences with {description['selection']}")
    for line in rank_lines(description):
        echo(line)
    restrictions = [
        f"{option} {value}" for option, value in restricting_options(description["options"])
    ]
    if restrictions:
        echo(f"recorded only in part: {', '.join(restrictions)}")
    if description["options"].get("dtype") in ROUNDING_ERROR:
        dtype = description["options"]["dtype"]
        echo(
            f"rows are rounded to {dtype}: values up to 1 are off by "
            f"{ROUNDING_ERROR[dtype]:.3g} at most; `grutrace stats FILE quantization` says more"
        )
    if "compression" in description["options"]:
        echo(f"rows are compressed with {description['options']['compression']}")
    if description["options"].get("checksums"):
        echo("rows have checksums")
    for line in quantity_lines(description):
        echo(line)
    for line in proof_lines(description["proofs"]):
        echo(line)
    table = new_table("site", "layer")
    for name in ("calls", "sequences", "steps", "weights"):
        table.add_column(name, justify="right")
    for module in description["modules"]:
        kind = f"{module['kind']}({module['input_size']}, {module['hidden_size']})"
        counts = [module[name] for name in ("calls", "sequences", "rows", "versions")]
        for site in module["sites"]:
            table.add_row(site["name"], kind, *counts)
    print_table(table)


def proofs(trace: Trace) -> dict[str, Any]:
    """Return the number of calls with each proof mark, and the first unproven calls."""
    marks = trace.snapshot.proof_marks
    counts = np.bincount(marks, minlength=len(PROOFS)).tolist()
    unproven = np.flatnonzero(marks == UNPROVEN)[:MAX_LISTED].tolist()
    return dict(zip(PROOFS, counts, strict=True)) | {"unproven_calls": unproven}


def proof_lines(proofs: Mapping[str, Any]) -> Iterator[str]:
    """Yield lines about the calls that are not proven."""
    if proofs["unchecked"]:
        yield (
            f"unchecked: {proofs['unchecked']} calls, whose weights were not compared when they "
            "ran; run `grutrace verify` to check them"
        )
    if proofs["unproven"]:
        numbers = ", ".join(map(str, proofs["unproven_calls"]))
        ellipsis = ", ..." if proofs["unproven"] > MAX_LISTED else ""
        yield (
            f"unproven: {proofs['unproven']} calls, whose gates do not lead to the model's states "
            f"({numbers}{ellipsis})"
        )


def quantity_lines(description: Mapping[str, Any]) -> Iterator[str]:
    """Yield lines with the recorded quantities: one for each group of sites that have the same."""
    groups: dict[str, list[str]] = {}
    sites = [site for module in description["modules"] for site in module["sites"]]
    for site in sites:
        derived = f"; derived: {', '.join(site['derived'])}" if site["derived"] else ""
        groups.setdefault(", ".join(site["quantities"]) + derived, []).append(site["name"])
    for quantities, names in groups.items():
        suffix = "" if len(groups) == 1 else f" (of {join_names(names)})"
        yield f"recorded: {quantities}{suffix}"


def rank_lines(description: Mapping[str, Any]) -> Iterator[str]:
    """Yield lines about the ranks of a distributed run; none for a single process."""
    options, shards = description["options"], description["shards"]
    if "shard" in options:
        yield f"rank {options['shard']['rank']} of {options['shard']['world_size']}"
    if shards:
        calls = ", ".join(f"{shard['rank']} ({shard['calls']} calls)" for shard in shards)
        yield f"of {options['shards']['world_size']} ranks: {calls}"
    if unclosed := [str(shard["rank"]) for shard in shards if not shard["closed"]]:
        yield f"not closed by rank {', '.join(unclosed)}: still running, or killed"


def restricting_options(options: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the options that omit calls, units or steps, or round rows, with their values."""
    for name in ("every", "max_calls", "max_bytes", "dtype", "units", "steps"):
        if name in options:
            yield name, options[name]
