"""Diagnostic classifiers: linear models that predict a strategy's values from recorded steps."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from sklearn.linear_model import LinearRegression, LogisticRegression

from arithmetic.language import NUMBERS, WORDS
from grutrace.records import Array
from grutrace.storage.read.trace import Trace

SITE = "gru.l0"
QUANTITIES = ("hidden", "candidate", "reset", "update")
STRATEGIES = ("cumulative", "recursive")
LABELS = (*STRATEGIES, "mode", "tokens", "language", "use")


@dataclass(frozen=True)
class Steps:
    """Recorded steps, those of all expressions end to end.

    Attributes:
        quantities: By name, what was recorded, (N, H).
        targets: By name, what a strategy holds after the step, (N,).
        words: (N,) what the step read.
        languages: (N,) the language that its expression is of.
    """

    quantities: dict[str, Array]
    targets: dict[str, Array]
    words: Array
    languages: Array

    def where(self, chosen: Array) -> Steps:
        """Those that are chosen, (N,) true or false."""
        return Steps(
            {name: values[chosen] for name, values in self.quantities.items()},
            {name: values[chosen] for name, values in self.targets.items()},
            self.words[chosen],
            self.languages[chosen],
        )

    def of(self, language: str) -> Steps:
        """Those of one language."""
        return self.where(self.languages == language)


def read(trace: Trace) -> dict[str, Steps]:
    """The steps of a trace, by what their expressions are for: ``fit``, ``test`` or ``show``."""
    site = trace[SITE]
    labels = {name: site.row_labels(name).to_array() for name in LABELS}
    steps = Steps(
        {name: np.asarray(site.rows(name), float) for name in QUANTITIES},
        {name: labels[name] for name in (*STRATEGIES, "mode")},
        labels["tokens"],
        labels["language"],
    )
    return {use: steps.where(labels["use"] == use) for use in dict.fromkeys(labels["use"])}


@dataclass(frozen=True)
class Agreement:
    """Of what a classifier reads with what a strategy holds, over all steps of one language.

    Attributes:
        error: Mean squared error.
        r: Pearson's correlation; NaN if one of the two never changes.
    """

    error: float
    r: float


def agreement(decoded: Array, target: Array) -> Agreement:
    varies = min(decoded.std(), target.std()) > 1e-9
    r = float(np.corrcoef(decoded, target)[0, 1]) if varies else float("nan")
    return Agreement(float(np.mean((decoded - target) ** 2)), r)


def diagnose(
    fitted: Steps, tested: Steps, strategy: str, quantity: str = "hidden"
) -> dict[str, Agreement]:
    """By language, how well least squares on one set of steps reads a strategy in the other."""
    classifier = LinearRegression().fit(fitted.quantities[quantity], fitted.targets[strategy])
    result = classifier.predict(tested.quantities[quantity])
    return {
        name: agreement(result[chosen], tested.targets[strategy][chosen])
        for name in dict.fromkeys(tested.languages)
        for chosen in [tested.languages == name]
    }


def diagnose_mode(fitted: Steps, tested: Steps, quantity: str = "hidden") -> dict[str, float]:
    """By language, the share of steps in which logistic regression reads the right mode."""
    classifier = LogisticRegression(max_iter=5000)
    classifier.fit(fitted.quantities[quantity], fitted.targets["mode"])
    right = classifier.predict(tested.quantities[quantity]) == tested.targets["mode"]
    names = dict.fromkeys(tested.languages)
    return {name: float(right[tested.languages == name].mean()) for name in names}


def most_frequent(tested: Steps) -> dict[str, float]:
    """By language, the share of its steps that have the more frequent mode."""
    shares = {}
    for name in dict.fromkeys(tested.languages):
        adding = float((tested.of(name).targets["mode"] == "add").mean())
        shares[name] = max(adding, 1 - adding)
    return shares


def control_task(fitted: Steps, tested: Steps, repeats: int = 20) -> dict[str, float]:
    """By language, the mean r for targets that are one random number a word.

    A control task (Hewitt and Liang 2019, https://arxiv.org/abs/1909.03368): what a classifier of
    this kind can read from these states of something that no strategy needs.
    """
    draw = np.random.default_rng(0)
    results: dict[str, list[float]] = {}
    for _ in range(repeats):
        values = draw.normal(size=len(WORDS))
        with_control = [
            replace(steps, targets={"control": values[[NUMBERS[word] for word in steps.words]]})
            for steps in (fitted, tested)
        ]
        for name, agreed in diagnose(*with_control, "control").items():
            results.setdefault(name, []).append(agreed.r)
    return {name: float(np.mean(values)) for name, values in results.items()}


def shuffled(steps: Steps) -> Steps:
    """The same steps with their targets exchanged among them at random."""
    order = np.random.default_rng(0).permutation(len(steps.words))
    return replace(steps, targets={name: values[order] for name, values in steps.targets.items()})


def together(steps: Steps) -> Steps:
    """The same steps as if they were all of one language."""
    return replace(steps, languages=np.full(len(steps.words), "all"))


@dataclass(frozen=True)
class Findings:
    """What the classifiers read from the hidden states of one network, by language.

    Attributes:
        strategies: By strategy, how well its intermediate results are read.
        mode: The share of steps in which the mode is read right.
        frequent: The share that has the more frequent mode.
        control: The mean r of the control task.
    """

    strategies: dict[str, dict[str, Agreement]]
    mode: dict[str, float]
    frequent: dict[str, float]
    control: dict[str, float]


def findings(fitted: Steps, tested: Steps) -> Findings:
    return Findings(
        {strategy: diagnose(fitted, tested, strategy) for strategy in STRATEGIES},
        diagnose_mode(fitted, tested),
        most_frequent(tested),
        control_task(fitted, tested),
    )
