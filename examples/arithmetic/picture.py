"""The figure: accuracy by length, predictions word by word, and the update gate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from sklearn.linear_model import LinearRegression

from arithmetic.diagnosis import STRATEGIES, Findings, Steps
from arithmetic.language import LANGUAGES, NUMERALS, TRAINED
from grutrace.records import Array

COLOURS = {"cumulative": "tab:blue", "recursive": "tab:orange"}


def kinds(steps: Steps) -> dict[str, Array]:
    """By the kind of word that was read, which steps read one, (N,)."""
    numeral = np.isin(steps.words, NUMERALS)
    results = {word: steps.words == word for word in "()+-"}
    for mode in ("add", "subtract"):
        results[f"{mode} a\nnumeral"] = numeral & (steps.targets["mode"] == mode)
    return results


def draw_correlations(axes: Any, trained: Findings, untrained: Findings) -> None:
    names = list(LANGUAGES)
    nested = [name for name in names if LANGUAGES[name][1]]
    for item, label, style in ((trained, "", "-o"), (untrained, ", untrained", ":.")):
        for strategy in STRATEGIES:
            r = {name: item.strategies[strategy][name].r for name in names}
            drawn = {name: np.nan if name in nested else r[name] for name in names}
            colour = COLOURS[strategy]
            axes.plot(names, list(drawn.values()), style, color=colour, label=strategy + label)
            axes.plot(nested, [r[name] for name in nested], style[-1], color=colour)
    axes.plot(
        names, list(trained.control.values()), "x", color="0.5", label="random number per word"
    )
    for column, name in enumerate(names):
        if name in TRAINED:
            axes.axvspan(column - 0.5, column + 0.5, color="0.94", zorder=0)
    axes.set_ylim(-0.4, 1.05)  # room for the legend
    axes.set_xlim(-0.5, len(names) - 0.5)
    axes.set_ylabel("correlation with the values of the strategy")
    axes.set_title("Classifiers of the hidden state (grey: trained lengths)")
    axes.set_yticks(np.arange(0, 1.1, 0.2))
    axes.legend(loc="lower center", ncols=2, frameon=False)


def draw_reading(axes: Any, fitted: Steps, shown: Steps, strategy: str) -> None:
    """One expression, word by word: what the strategy holds, and what is read of it."""
    classifier = LinearRegression().fit(fitted.quantities["hidden"], fitted.targets[strategy])
    steps = np.arange(len(shown.words))
    held, result = shown.targets[strategy], classifier.predict(shown.quantities["hidden"])
    axes.step(steps, held, where="mid", color="0.4", label=f"{strategy} strategy")
    axes.plot(steps, result, "o", color=COLOURS[strategy], label="read from the hidden state")
    axes.vlines(steps, held, result, color=COLOURS[strategy], linewidth=1)
    axes.set_xticks(steps, shown.words)
    axes.legend(loc="upper left", ncols=2, frameon=False)
    low, high = axes.get_ylim()
    axes.set_ylim(low, high + 0.35 * (high - low))  # room for the legend


def draw_update_gate(kinds_axes: Any, words_axes: Any, tested: Steps, shown: Steps) -> None:
    """The update gate of each unit: its mean by the kind of word, and in one expression."""
    means = {
        kind: tested.quantities["update"][chosen].mean(axis=0)
        for kind, chosen in kinds(tested).items()
    }
    columns = list(means.values())
    # Units that tell adding from subtracting are at the top and at the bottom.
    order = np.argsort(columns[-2] - columns[-1])
    drawn = ((kinds_axes, np.stack(columns, axis=1)), (words_axes, shown.quantities["update"].T))
    for axes, values in drawn:
        image = axes.imshow(values[order], aspect="auto", cmap="magma", vmin=0, vmax=1)
        axes.set_yticks(range(len(order)), order, fontsize=7)
    kinds_axes.set_xticks(range(len(means)), list(means))
    kinds_axes.set_title("Mean update gate, by the word that is read")
    kinds_axes.set_ylabel("unit (top: keeps more when subtracting)")
    words_axes.set_xticks(range(len(shown.words)), shown.words)
    words_axes.set_title("Update gate, word by word")
    bar = words_axes.figure.colorbar(image, ax=words_axes, aspect=25)
    bar.set_ticks([0, 0.5, 1], labels=["0: overwrites", "0.5", "1: keeps"])


def draw(
    path: Path, trained: Findings, untrained: Findings, fitted: Steps, tested: Steps, shown: Steps
) -> None:
    """Draw both strategies' readings, and the update gate."""
    figure, axes = plt.subplot_mosaic(
        [["r", "cumulative"], ["r", "recursive"], ["kinds", "update"]],
        figsize=(13, 8.6),
        width_ratios=(1, 1.35),
        height_ratios=(1, 1, 1.5),
        layout="constrained",
    )
    draw_correlations(axes["r"], trained, untrained)
    for strategy in STRATEGIES:
        draw_reading(axes[strategy], fitted, shown, strategy)
        axes[strategy].set_xlim(-0.5, len(shown.words) - 0.5)
    axes["cumulative"].set_title("One expression, of a length not trained on, word by word")
    draw_update_gate(axes["kinds"], axes["update"], tested, shown)
    figure.savefig(path, dpi=100)
    plt.close(figure)
