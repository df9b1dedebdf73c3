"""The commands: arguments to functions to an exit code.

0 is success, 1 means that the answer is no, 2 that there is no answer.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from rich.console import Console
from rich.progress import Progress, track
from rich.table import Table

from grutrace.analysis.summary import OPEN, SHUT, SiteSummary, summarize_site
from grutrace.errors import GrutraceError
from grutrace.record import DEFAULT_RECORD, QUANTITIES
from grutrace.run.launch import launch
from grutrace.run.settings import CHECKS, DTYPES, GATES, MODES, STACKS, Settings
from grutrace.run.texts import size
from grutrace.statistics.file import is_statistics
from grutrace.statistics.statistics import Statistics
from grutrace.statistics.table import summarize_statistics
from grutrace.storage.parts import parts_of
from grutrace.storage.sinks import open_trace
from grutrace.storage.trace import Trace

if TYPE_CHECKING:
    from grutrace.analysis.verification import SiteVerification

NO, NO_ANSWER = 1, 2

File = Annotated[Path, typer.Argument(help="A trace file.", show_default=False)]
AsJSON = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
Item = TypeVar("Item")

app = typer.Typer(
    help="See inside the GRUs of a running model: trace a script, look into traces.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return its exit code. An error becomes one line."""
    try:
        app(None if argv is None else list(argv), prog_name="grutrace")
    except GrutraceError as error:
        print(f"grutrace: {error}", file=sys.stderr)
        return NO_ANSWER
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else NO_ANSWER * bool(ended.code)
    return 0


@app.command()
def info(file: File, as_json: AsJSON = False) -> None:
    """Say what a trace file holds."""
    with open_trace(file) as trace:
        print_json(describe(trace, file)) if as_json else print_info(trace, file)


@app.command()
def stats(file: File, as_json: AsJSON = False) -> None:
    """Summarize every site: sequences, steps, residual, and how open its gates are.

    FILE is a trace, or what a grutrace.Statistics wrote.
    """
    if is_statistics(file):
        found = summarize_statistics(Statistics.load(file))
    else:
        with open_trace(file) as trace:
            found = summaries(trace)
    if as_json:
        print_json([dataclasses.asdict(each) for each in found])
    else:
        print_stats(found)


@app.command()
def verify(file: File, as_json: AsJSON = False) -> None:
    """Check the gates against weights, inputs and states, or else the states against the gates.

    Exits with 1 if a trace does not hold together, and with 2 if nothing could be checked.
    """
    # Here since it needs torch, which takes longer to load than the other commands to run.
    from grutrace.analysis.verification import verify_site

    with open_trace(file) as trace:
        results = [verify_site(trace, name) for name in with_progress(trace.sites, "verifying")]
    if as_json:
        print_json([dataclasses.asdict(each) | {"holds": each.holds} for each in results])
    else:
        print_verification(results)
    if not all(each.holds for each in results):
        raise typer.Exit(NO)
    if not any(each.check for each in results):
        raise typer.Exit(NO_ANSWER)


@app.command(context_settings={"allow_interspersed_args": False})
def run(
    program: Annotated[
        list[str],
        typer.Argument(metavar="SCRIPT [ARGS]...", help="A script and its own arguments."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The trace.")] = Path("run.h5"),
    module: Annotated[bool, typer.Option("-m", help="SCRIPT is a module.")] = False,
    sites: Annotated[
        list[str] | None, typer.Option(help="Glob for names of sites. Can be repeated.")
    ] = None,
    record: Annotated[
        list[str] | None,
        typer.Option(help=f"Out of {', '.join(QUANTITIES)}; commas between. Can be repeated."),
    ] = None,
    mode: Annotated[str, typer.Option(help=f"For a trace that exists: {', '.join(MODES)}.")] = "w",
    check: Annotated[
        str, typer.Option(help=f"What a residual past rounding does: {', '.join(CHECKS)}.")
    ] = "warn",
    stacks: Annotated[
        str, typer.Option(help=f"How lower layers are seen: {', '.join(STACKS)}.")
    ] = "auto",
    gates: Annotated[
        str, typer.Option(help=f"When they are computed: {', '.join(GATES)}.")
    ] = "auto",
    every: Annotated[int, typer.Option(help="Of each module, only each n-th call.")] = 1,
    max_calls: Annotated[
        int | None, typer.Option(help="Record no more than this many calls.")
    ] = None,
    max_bytes: Annotated[
        str | None, typer.Option(help="Record no more than this: 10GB, 512MiB.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help=f"What rows are kept as: {', '.join(DTYPES)}.")
    ] = None,
    units: Annotated[str | None, typer.Option(help="Only these units: 0,3,7 or 0:32.")] = None,
    steps: Annotated[
        str | None, typer.Option(help="Only these steps of each sequence: 5:20.")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing of our own.")] = False,
) -> None:
    """Run a script as python would, and trace the GRUs of every model in it."""
    asked = [name for names in record or [",".join(DEFAULT_RECORD)] for name in names.split(",")]
    settings = Settings(
        str(output),
        tuple(sites or ()),
        tuple(asked),
        mode,
        stacks,
        check,
        gates,
        every=every,
        max_calls=max_calls,
        max_bytes=None if max_bytes is None else size(max_bytes),
        dtype=dtype,
        units=units,
        steps=steps,
        quiet=quiet,
    )
    launch(settings, program, module=module)


@app.command()
def derive(
    file: File,
    output: Annotated[
        Path, typer.Option("-o", "--output", help="The file to write.", show_default=False)
    ],
) -> None:
    """Write a trace file that stores what this one derives when it is read.

    Exits with 2 if the output exists, or there is nothing to derive.
    """
    # Here for the same reason.
    from grutrace.analysis.derivation import derive_file

    with open_trace(file) as trace, progress_bar("deriving") as advance:
        derive_file(trace, output, advance)


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
    print(f"{file}: trace of {about['model']}, {about['bytes'] / 1e6:.1f} MB{parts}, {state}")
    print(
        f"recorded {about['created']} with "
        + ", ".join(
            f"{name} {version}" for name, version in about["versions"].items() if name != "platform"
        )
    )
    narrowing = [f"{name} {value}" for name, value in narrowed(about["options"])]
    if narrowing:
        print(f"asked for less: {', '.join(narrowing)}")
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
    Console().print(table)


def narrowed(options: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield those options of a trace that leave something of its calls out, or round it."""
    for name in ("every", "max_calls", "max_bytes", "dtype", "units", "steps"):
        if name in options:
            yield name, options[name]


def summaries(trace: Trace) -> list[SiteSummary]:
    """Return the summary of every site."""
    return [summarize_site(trace[name]) for name in with_progress(trace.sites, "reading")]


def print_stats(found: Sequence[SiteSummary]) -> None:
    """Print a table of every site: sequences, steps, residual, and how open its gates are."""
    table = new_table("site")
    for name in ("sequences", "steps", "residual"):
        table.add_column(name, justify="right")
    table.add_column("")
    for name in ("mean", f"< {SHUT}", f"> {OPEN}"):
        table.add_column(name, justify="right")
    for each in found:
        about = [each.site, str(each.sequences), str(each.steps), f"{each.residual:.1e}"]
        for name, gate in each.gates.items() or [("", None)]:
            shares = [f"{gate.mean:.3f}", percent(gate.below), percent(gate.above)] if gate else []
            table.add_row(*about, name, *shares)
            about = [""] * len(about)
    Console().print(table)
    print("Shares are of all steps and units; those of the candidate are of its size, |n|.")


def print_verification(results: Sequence[SiteVerification]) -> None:
    """Print what was checked of every site, and where it holds least."""
    table = new_table("site", "checked", "")
    table.add_column("steps", justify="right")
    table.add_column("worst difference", justify="right")
    table.add_column("of tolerance", justify="right")
    for each in results:
        verdict = ("holds" if each.holds else "DOES NOT HOLD") if each.check else ""
        row = [each.site, each.check or "nothing", verdict, str(each.steps)]
        if each.worst:
            of_tolerance = each.worst.difference / each.worst.tolerance
            row += [f"{each.worst.difference:.1e}", f"{of_tolerance:.2g}"]
        table.add_row(*row)
    Console().print(table)
    for each in results:
        if each.reason:
            print(f"{each.site}: {each.reason}")
        if each.worst and not each.holds:
            worst = each.worst
            print(
                f"{each.site}: sequence {worst.sequence}, step {worst.step}, unit {worst.unit}: "
                f"{worst.quantity} is {worst.recorded:.7g}, should be {worst.expected:.7g} "
                f"within {worst.tolerance:.1e}"
            )


def new_table(*columns: str) -> Table:
    """Return an empty table in the style of all commands."""
    return Table(*columns, box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))


def percent(share: float) -> str:
    """Write a share in percent."""
    return "" if math.isnan(share) else f"{100 * share:.1f} %"


def with_progress(items: Sequence[Item], doing: str) -> Iterable[Item]:
    """Yield the items, with a bar on a terminal."""
    console = Console(stderr=True)
    return track(items, doing, console=console, transient=True, disable=not console.is_terminal)


@contextmanager
def progress_bar(doing: str) -> Iterator[Callable[[int, int], None]]:
    """Show a bar on a terminal, which is told how much is done of how much."""
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(doing)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def print_json(value: Any) -> None:
    """Print a value as JSON. What is no number is null, and an infinity a text."""
    print(json.dumps(_plain(value), indent=2, allow_nan=False))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    return value
