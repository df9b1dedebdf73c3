"""`grutrace info`: what a trace file holds."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from grutrace.cli.arguments import AsJSON, File
from grutrace.cli.output import new_console, new_table, print_json, say
from grutrace.storage.parts import parts_of
from grutrace.storage.sinks import open_trace
from grutrace.storage.trace import Trace

#: The version that is not printed: it says where, and not with what.
_WHERE = "platform"


def info(file: File, as_json: AsJSON = False) -> None:
    """Say what a trace file holds."""
    with open_trace(file) as trace:
        print_json(describe(trace, file)) if as_json else print_info(trace, file)


def describe(trace: Trace, file: Path) -> dict[str, Any]:
    """Return what `info` says, as JSON values."""
    header, parts = trace.header, parts_of(file)
    return {
        "file": str(file),
        "parts": [str(part) for part in parts],
        "bytes": sum(part.stat().st_size for part in parts),
        "model": header.model,
        "created": datetime.fromtimestamp(header.created, UTC).isoformat(timespec="seconds"),
        "closed": trace.closed,
        "versions": dict(header.versions),
        "options": dict(header.options),
        "modules": [
            dataclasses.asdict(module)
            | dataclasses.asdict(trace[module.sites[0].name].extent)
            | {"sites": [site_info(trace, site.name) for site in module.sites]}
            for module in header.modules
        ],
    }


def site_info(trace: Trace, name: str) -> dict[str, Any]:
    """Return what `info` says of a site."""
    site = trace[name]
    return {
        "name": name,
        "quantities": site.site.quantities,
        "derived": site.site.derived,
        "units": site.units,
        "residual": site.residual,
    }


def print_info(trace: Trace, file: Path) -> None:
    """Print what a file holds."""
    about = describe(trace, file)
    state = "closed" if about["closed"] else "not closed: still being written, or its writer died"
    parts = f" in {len(about['parts'])} files" if len(about["parts"]) > 1 else ""
    say(f"{file}: trace of {about['model']}, {about['bytes'] / 1e6:.1f} MB{parts}, {state}")
    versions = [f"{name} {about['versions'][name]}" for name in about["versions"] if name != _WHERE]
    say(f"recorded {about['created']} with {', '.join(versions)}")
    narrowing = [f"{name} {value}" for name, value in narrowed(about["options"])]
    if narrowing:
        say(f"asked for less: {', '.join(narrowing)}")
    table = new_table("site", "layer", "recorded")
    for name in ("calls", "sequences", "steps", "weights"):
        table.add_column(name, justify="right")
    for module in about["modules"]:
        kind = f"{module['kind']}({module['input_size']}, {module['hidden_size']})"
        counts = (module[name] for name in ("calls", "sequences", "rows", "versions"))
        row = [kind, None, *map(str, counts)]
        for site in module["sites"]:
            derived = f"; derived: {', '.join(site['derived'])}" if site["derived"] else ""
            row[1] = ", ".join(site["quantities"]) + derived
            table.add_row(site["name"], *row)
    new_console().print(table)


def narrowed(options: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield those options of a trace that leave something of its calls out, or round it."""
    for name in ("every", "max_calls", "max_bytes", "dtype", "units", "steps"):
        if name in options:
            yield name, options[name]
