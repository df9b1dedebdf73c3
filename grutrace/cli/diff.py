"""`grutrace diff`: compare two traces."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

import typer

from grutrace.analysis.comparison import TraceDifference, ValueDifference, ValuePair, compare
from grutrace.cli.common import EXIT_NO, AsJSON, File, Record, Sites, open_traces, split_names
from grutrace.cli.output import echo, new_table, print_json, print_table, progress_bar


def diff(
    a: File,
    b: File,
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
    with (
        open_traces([a]) as trace_a,
        open_traces([b]) as trace_b,
        progress_bar("comparing") as advance,
    ):
        difference = compare(
            trace_a,
            trace_b,
            sites=site,
            record=split_names(record),
            tolerance=tolerance,
            exact=exact,
            progress=advance,
        )
    if as_json:
        print_json({"a": a, "b": b, **_to_json(difference)})
    else:
        print_difference(difference)
    if not difference.same:
        raise typer.Exit(EXIT_NO)


def print_difference(difference: TraceDifference) -> None:
    """Print the compared values, the other differences, the likely cause and the answer."""
    table = new_table("site", "compared")
    for name in ("values", "largest difference", "tolerance", "beyond it"):
        table.add_column(name, justify="right")
    site = None
    for value in difference.values:
        largest = f"{value.largest.difference:.1e}" if value.largest else "none"
        row = [str(value.values), largest, f"{value.tolerance:.1e}", str(value.beyond)]
        table.add_row("" if value.site == site else value.site, value.quantity, *row)
        site = value.site
    if difference.values:
        print_table(table)
    for mismatch in difference.mismatches:
        echo(str(mismatch))
    for value in difference.values:
        if value.beyond:
            echo(f"{value.site}: {value.quantity}, first at {value.first}")
            echo(f"{value.site}: {value.quantity}, most at {value.largest}")
    for context in difference.context:
        echo(f"({context})")
    # If values differ, the first one is the likely cause, which is printed below.
    for weights in difference.weights[bool(difference.cause) :]:
        echo(f"(weights of {weights})")
    if difference.cause:
        echo(f"Likely cause: {difference.cause}")
    print("The traces are the same." if difference.same else "The traces differ.")


def _to_json(difference: TraceDifference) -> dict[str, Any]:
    """Return the result as JSON values, with the derived properties."""
    values = [
        dataclasses.asdict(value)
        | {"largest": _pair_to_json(value.largest), "first": _pair_to_json(value.first)}
        for value in difference.values
    ]
    first: ValueDifference | None = difference.first
    properties = {
        "same": difference.same,
        "cause": difference.cause,
        "first": {"site": first.site, "quantity": first.quantity} if first else None,
    }
    return properties | dataclasses.asdict(difference) | {"values": values}


def _pair_to_json(pair: ValuePair | None) -> dict[str, Any] | None:
    if pair is None:
        return None
    return dataclasses.asdict(pair) | {"difference": pair.difference}
