"""Long tables are printed a row a line, with what short ones have."""

from __future__ import annotations

from grutrace.cli.output import LONG, new_table, print_table


def filled(rows):
    table = new_table("site")
    table.add_column("steps", justify="right")
    table.add_column("")
    for number in range(rows):
        table.add_row(f"rnn{number}[/red]\x1b[2J", str(number**2), *(["x"] if number % 2 else []))
    return table


def test_a_long_table_has_what_a_short_one_has(capsys):
    print_table(filled(LONG))
    short = capsys.readouterr().out.splitlines()
    print_table(filled(LONG + 1))
    long = capsys.readouterr().out.splitlines()
    assert len(long) == 2 + LONG
    assert [line.split() for line in long[:-1]] == [line.split() for line in short]
    assert long[1].index("0") == long[1].index("rnn0") + 3
    assert {line.index(" x") for line in long if line.endswith(" x")} == {long[2].index(" x")}
    assert "\x1b" not in "".join(long)
