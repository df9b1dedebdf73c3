"""How does a GRU compute nested arithmetic? Diagnostic classifiers on a trace, as in a paper.

Hupkes, Veldhoen and Zuidema (2018, https://arxiv.org/abs/1711.10203, JAIR 61) train a GRU to read
an expression such as ( 5 - ( 2 + 3 ) ) word by word and to say what it comes to. Two strategies
would do. The recursive one keeps a stack: it works out each bracket, then puts it in its place. The
cumulative one keeps a running total, and adds or subtracts every numeral as it comes in. Linear
models that read the intermediate results of the one or the other from the hidden state tell them
apart: diagnostic classifiers.

    pip install ".[analysis,plot]"         # in a checkout of grutrace
    python examples/nested_arithmetic.py

trains the network (a minute or two), traces it, prints the tables, and leaves the traces of the
trained and of the untrained network in arithmetic.h5 and arithmetic_untrained.h5, and a picture in
arithmetic.png. What comes out, and what of it the paper has: docs/nested-arithmetic.ipynb.

In the traces, each step has the word that it read, and what each strategy holds after it as labels.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

import grutrace
from arithmetic.language import LANGUAGES, SHOWN, TRAINED, Expression, to_test, to_train
from arithmetic.network import Arithmetic, outcomes, record, train

INSTALL = (
    'this example needs two extras: pip install ".[analysis,plot]" in the checkout of grutrace'
)

try:
    import matplotlib

    from arithmetic.diagnosis import (
        QUANTITIES,
        STRATEGIES,
        Findings,
        Steps,
        agreement,
        diagnose,
        diagnose_mode,
        findings,
        read,
        shuffled,
        together,
    )
    from arithmetic.picture import draw
except ImportError:
    if __name__ != "__main__":
        raise
    print(INSTALL, file=sys.stderr)
    sys.exit(2)


def print_network(said: dict[str, list[float]], corpora: dict[str, list[Expression]]) -> None:
    print("\nThe network: mean squared error of what it says, and of saying the mean outcome")
    print(f"  {'':5}{'trained on':>12}{'network':>10}{'mean':>9}{'r':>8}")
    for name in LANGUAGES:
        expected = np.array(outcomes(corpora[f"test {name}"]))
        result = agreement(np.array(said[f"test {name}"]), expected)
        known = "yes" if name in TRAINED else ""
        print(f"  {name:5}{known:>12}{result.error:10.2f}{expected.var():9.1f}{result.r:8.3f}")


def print_findings(findings: Findings) -> None:
    print(f"  {'':5}{'cumulative':>18}{'recursive':>18}{'control':>10}{'mode':>10}{'its most':>10}")
    print(
        f"  {'':5}{'error':>10}{'r':>8}{'error':>10}{'r':>8}{'r':>10}{'right':>10}{'frequent':>10}"
    )
    for name in LANGUAGES:
        figures = "".join(
            f"{findings.strategies[strategy][name].error:10.2f}{findings.strategies[strategy][name].r:8.3f}"
            for strategy in STRATEGIES
        )
        shares = f"{findings.mode[name]:10.3f}{findings.frequent[name]:10.3f}"
        print(f"  {name:5}{figures}{findings.control[name]:10.3f}{shares}")


def print_quantities(fitted: Steps, tested: Steps) -> None:
    """What can be read from each quantity, in all languages together."""
    fitted, tested = together(fitted), together(tested)
    print(f"  {'':18}{'cumulative r':>14}{'recursive r':>14}{'mode right':>12}")
    for quantity in QUANTITIES:
        r = [diagnose(fitted, tested, strategy, quantity)["all"].r for strategy in STRATEGIES]
        right = diagnose_mode(fitted, tested, quantity)["all"]
        print(f"  {quantity:18}{r[0]:14.3f}{r[1]:14.3f}{right:12.3f}")
    fitted, tested = shuffled(fitted), shuffled(tested)
    r = [diagnose(fitted, tested, strategy)["all"].r for strategy in STRATEGIES]
    right = diagnose_mode(fitted, tested)["all"]
    print(f"  {'hidden, shuffled':18}{r[0]:14.3f}{r[1]:14.3f}{right:12.3f}")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Which strategy does a GRU use for arithmetic?")
    parser.add_argument("--output", type=Path, default=Path("arithmetic.h5"), help="the trace")
    parser.add_argument("--seed", type=int, default=0, help="of expressions and weights")
    parser.add_argument("--steps", type=positive, default=6000, help="of training")
    parser.add_argument("--train", type=positive, default=10000, help="expressions a language")
    parser.add_argument("--fit", type=positive, default=1000, help="of those, for the classifiers")
    parser.add_argument("--test", type=positive, default=500, help="expressions a language")
    return parser.parse_args(argv)


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, found {number}")
    return number


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    matplotlib.use("Agg")  # a file is written, no window is opened
    chance = random.Random(arguments.seed)
    torch.manual_seed(arguments.seed)
    tested = to_test(arguments.test, chance)
    trained = to_train(arguments.train, tested, chance)
    corpora = {f"fit {name}": expressions[: arguments.fit] for name, expressions in trained.items()}
    corpora |= {f"test {name}": expressions for name, expressions in tested.items()}
    corpora["show L6"] = [SHOWN.split()]

    model = Arithmetic()
    output = arguments.output
    untrained_output = output.with_name(f"{output.stem}_untrained{output.suffix}")
    try:
        record(model, corpora, untrained_output)
        print(f"Training on {arguments.train} expressions of each of {', '.join(TRAINED)}")
        train(model, trained, arguments.steps)
        message = record(model, corpora, output)
    except grutrace.GrutraceError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2

    print_network(message, corpora)
    with grutrace.open(untrained_output) as trace:
        before = read(trace)
    with grutrace.open(output) as trace:
        steps = read(trace)
    untrained = findings(before["fit"], before["test"])
    result = findings(steps["fit"], steps["test"])
    print("\nWhat linear classifiers read from its hidden states after every word")
    print_findings(result)
    print("\nFrom those of the network before training")
    print_findings(untrained)
    print("\nFrom the gates of the trained network, all languages together")
    print_quantities(steps["fit"], steps["test"])
    picture = output.with_suffix(".png")
    draw(picture, result, untrained, steps["fit"], steps["test"], steps["show"])
    print(f"\ntraces: {output}, {untrained_output}\npicture: {picture}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
