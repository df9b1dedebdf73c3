"""`grutrace diff`: compare two traces."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from grutrace.analysis.comparison import TraceDifference, ValueDifference, ValuePair, compare
from grutrace.cli.common import EXIT_NO, AsJSON, Record, Sites, open_traces, split_names
from grutrace.cli.output import echo, new_table, print_json, print_table, progress_bar


def diff(
    a: Annotated[Path, typer.Argument(help="A trace file.", show_default=False)],
    b: Annotated[Path, typer.Argument(help="Another trace file.", show_default=False)],
    tolerance: Annotated[
        float | None,
        typer.Option(
            help="Largest accepted |a - b| / max(1, |a|, |b|). "
            "[default: the rounding tolerance of the coarser type, 3.1e-5 for float32]",
            show_default=False,
        ),
    ] = None,
    exact: Annotated[
        bool,
        typer.Option("--exact", help="No tolerance; compare weights and row types too."),
    ] = False,
    site: Sites = None,
    record: Record = None,
    as_json: AsJSON = False,
) -> None:
    """Compare two traces: sites, sequences, gates, states and tokens.

    Prints where they differ, and the likely cause. Exit codes: 0 the same, 1 different, 2 error.
    """
    with open_traces([a]) as one, open_traces([b]) as other, progress_bar("comparing") as advance:
        found = compare(
            one,
            other,
            sites=site,
            record=split_names(record),
            tolerance=tolerance,
            exact=exact,
            progress=advance,
        )
    if as_json:
        print_json({"a": str(a), "b": str(b), **_to_json(found)})
    else:
        print_difference(found)
    if not found.same:
        raise typer.Exit(EXIT_NO)


def print_difference(found: TraceDifference) -> None:
    """Print the compared values, the other differences, the likely cause and the answer."""
    table = new_table("site", "compared")
    for name in ("values", "largest difference", "tolerance", "beyond it"):
        table.add_column(name, justify="right")
    site = None
    for each in found.values:
        largest = f"{each.largest.difference:.1e}" if each.largest else "none"
        row = [str(each.values), largest, f"{each.tolerance:.1e}", str(each.beyond)]
        table.add_row("" if each.site == site else each.site, each.quantity, *row)
        site = each.site
    if found.values:
        print_table(table)
    for mismatch in found.mismatches:
        echo(str(mismatch))
    for each in found.values:
        if each.beyond:
            echo(f"{each.site}: {each.quantity}, first at {each.first}")
            echo(f"{each.site}: {each.quantity}, most at {each.largest}")
    for difference in found.context:
        echo(f"({difference})")
    # If values differ, the first one is the likely cause, which is printed below.
    for weights in found.weights[bool(found.cause) :]:
        echo(f"(weights of {weights})")
    if found.cause:
        echo(f"Likely cause: {found.cause}")
    print("The traces are the same." if found.same else "The traces differ.")


def _to_json(found: TraceDifference) -> dict[str, Any]:
    """The result as JSON values, with the derived properties."""
    values = [
        dataclasses.asdict(each)
        | {"largest": _pair_to_json(each.largest), "first": _pair_to_json(each.first)}
        for each in found.values
    ]
    first: ValueDifference | None = found.first
    about = {
        "same": found.same,
        "cause": found.cause,
        "first": {"site": first.site, "quantity": first.quantity} if first else None,
    }
    return about | dataclasses.asdict(found) | {"values": values}


def _pair_to_json(pair: ValuePair | None) -> dict[str, Any] | None:
    if pair is None:
        return None
    return dataclasses.asdict(pair) | {"difference": pair.difference}
