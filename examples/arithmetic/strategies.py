"""The values that each of the two strategies holds after each word of an expression.

They are those of Hupkes, Veldhoen and Zuidema (2018), and agree with their code.
"""

from __future__ import annotations

from collections.abc import Sequence


def cumulative(words: Sequence[str]) -> tuple[list[int], list[str]]:
    """The running total after each word, and the mode: whether to add or subtract what comes.

    A bracket opens in the mode of its place, a minus turns the mode round, and where the bracket
    ends, the mode is again what it was where it opened.
    """
    total, mode = 0, 1
    opened: list[int] = []
    totals: list[int] = []
    modes: list[str] = []
    for word in words:
        if word == "(":
            opened.append(mode)
        elif word == ")":
            mode = opened.pop()
        elif word == "-":
            mode = -mode
        elif word != "+":
            total += mode * int(word)
        totals.append(total)
        modes.append("add" if mode > 0 else "subtract")
    return totals, modes


def recursive(words: Sequence[str]) -> list[int]:
    """The result so far of the innermost open bracket, after each word; those around it wait."""
    result, sign = 0, 1
    waiting: list[tuple[int, int]] = []
    results: list[int] = []
    for word in words:
        if word == "(":
            waiting.append((result, sign))
            result, sign = 0, 1
        elif word == ")":
            before, sign = waiting.pop()
            result = before + sign * result
        elif word in "+-":
            sign = 1 if word == "+" else -1
        else:
            result += sign * int(word)
        results.append(result)
    return results
