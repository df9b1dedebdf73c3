"""The arithmetic language of Hupkes, Veldhoen and Zuidema (2018): brackets, plus, minus, -10 to 10.

An expression of the language L3 has three numerals: ( ( 5 - 2 ) + -3 ). Where its brackets are is
drawn as in the code of that paper (https://github.com/dieuwkehupkes/processing_arithmetics).
"""

from __future__ import annotations

import random

NUMERALS = tuple(str(number) for number in range(-10, 11))
WORDS = (*NUMERALS, "+", "-", "(", ")")
NUMBERS = {word: number for number, word in enumerate(WORDS)}

#: By name, how many numerals an expression has, and on which side its brackets nest (None: any).
LANGUAGES: dict[str, tuple[int, str | None]] = {
    **{f"L{numerals}": (numerals, None) for numerals in range(1, 10)},
    "L9L": (9, "left"),
    "L9R": (9, "right"),
}
TRAINED = ("L1", "L2", "L4", "L5", "L7")

#: What is shown word by word. Six numerals, a length that the network was not trained on.
SHOWN = "( 5 - ( ( 2 - 6 ) - ( 7 - ( -3 + 8 ) ) ) )"

Expression = list[str]


def expression(numerals: int, draw: random.Random, nesting: str | None = None) -> Expression:
    """An expression of so many numerals, its brackets drawn anew or nested on one side."""
    if numerals == 1:
        return [draw.choice(NUMERALS)]
    left = {"left": numerals - 1, "right": 1}.get(nesting or "") or draw.randint(1, numerals - 1)
    return [
        "(",
        *expression(left, draw, nesting),
        draw.choice("+-"),
        *expression(numerals - left, draw, nesting),
        ")",
    ]


def to_test(count: int, draw: random.Random) -> dict[str, list[Expression]]:
    """By language, expressions that all differ: so many, but no more than a quarter of L2.

    Of L1 it is all 21 there are.
    """
    tested = {"L1": [[numeral] for numeral in NUMERALS]}
    for name, (numerals, nesting) in LANGUAGES.items():
        if numerals > 1:
            most = min(count, len(NUMERALS) ** numerals * 2 ** (numerals - 1) // 4)
            results: dict[str, Expression] = {}
            while len(results) < most:
                words = expression(numerals, draw, nesting)
                results[" ".join(words)] = words
            tested[name] = list(results.values())
    return tested


def to_train(
    count: int, tested: dict[str, list[Expression]], draw: random.Random
) -> dict[str, list[Expression]]:
    """By language, so many expressions, none of which is tested unless it is a single numeral."""
    withheld = {
        " ".join(words)
        for expressions in tested.values()
        for words in expressions
        if len(words) > 1
    }
    withheld.add(SHOWN)
    drawn: dict[str, list[Expression]] = {}
    for name in TRAINED:
        drawn[name] = []
        while len(drawn[name]) < count:
            words = expression(LANGUAGES[name][0], draw)
            if " ".join(words) not in withheld:
                drawn[name].append(words)
    return drawn
