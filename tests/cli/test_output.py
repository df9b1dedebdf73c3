"""Tests of printed tables: one line a row, long names shortened in the middle."""

from __future__ import annotations

import pytest
from rich.cells import cell_len

from grutrace.cli import output
from grutrace.cli.output import new_table, print_table, shorten


def filled(rows, name="rnn{}[/red]\x1b[2J"):
    table = new_table("site")
    table.add_column("steps", justify="right")
    table.add_column("")
    for number in range(rows):
        table.add_row(name.format(number), str(number**2), *(["x"] if number % 2 else []))
    return table


@pytest.mark.parametrize("rows", [0, 1, 30, 300])
def test_each_row_is_one_line(rows, capsys):
    print_table(filled(rows))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + rows
    assert [line.split()[1] for line in lines] == ["steps", *(str(n**2) for n in range(rows))]
    assert all("x" in line.split() for line in lines[2::2])
    assert len({line.rindex("x") for line in lines[2::2]}) <= 1
    assert "\x1b" not in "".join(lines)


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_wide_tables_are_cut_to_the_terminal(columns, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(columns))
    name = "encoder.layers.{}." + "block." * 20 + "rnn.l0_reverse"
    print_table(filled(12, name))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 13
    assert all(cell_len(line) <= columns for line in lines)
    is_cut = columns < len(name) + 10
    assert all((output.ELLIPSIS in line) == is_cut for line in lines[1:])
    assert all(line.startswith("encoder.") for line in lines[1:])
    assert all("reverse" in line for line in lines[1:])


def test_wide_letters_take_two_columns(capsys):
    table = new_table("site")
    table.add_column("steps", justify="right")
    table.add_row("\u95e8.l0", "1")
    table.add_row("gate.l0", "10")
    print_table(table)
    lines = capsys.readouterr().out.splitlines()
    assert len({cell_len(line) for line in lines}) == 1
    assert len(lines[1]) < len(lines[2])


def test_both_ends_of_a_long_name_are_shown() -> None:
    assert shorten("encoder.l0", 10) == "encoder.l0"
    assert shorten("encoder.rnn.l0_reverse", 15) == "encode..." + "everse"
    assert len(shorten("x" * 100, 16)) == 16
