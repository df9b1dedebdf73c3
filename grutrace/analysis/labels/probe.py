"""Linear probes: how well a label can be decoded from the states.

Alain and Bengio (2017), "Understanding intermediate layers using linear classifier probes". A high
score may only show that the probe learns well. Hewitt and Liang (2019), "Designing and interpreting
probes with control tasks", assign each type of token a random label, drawn from the frequencies of
the labels, and train the same probe on it. That task can only be memorized. The difference of the
two scores is the probe's *selectivity*.

Whole sequences are used for training or for testing, together with those that branched from them.

N rows, S sequences, H units, C classes, n rows that are used.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt

from grutrace.analysis.engine.map_reduce import summarize_rows
from grutrace.analysis.engine.result import Result
from grutrace.analysis.engine.site_data import (
    SiteData,
    SiteLike,
    as_site_data,
    sequence_ids,
    with_columns,
)
from grutrace.analysis.labels.label_coding import encode_classes
from grutrace.errors import OptionError, require_extra, short_repr
from grutrace.records import Array
from grutrace.storage.read.annotations import LabelColumn
from grutrace.storage.read.sequence_index import Integers


def split_rows(
    data: SiteData,
    sequences: Integers,
    labels: LabelColumn,
    test: float,
    steps: int,
    random: np.random.Generator,
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Split the rows into training and test rows, by sequence.

    scikit-learn's `GroupShuffleSplit` is not used because it takes a share of the groups, not of
    rows.

    Args:
        data: The site.
        sequences: (N,) the sequence of each row.
        labels: The label; rows without it are not used.
        test: Approximate share of the labelled rows for testing; at least one sequence.
        steps: Largest number of rows in each part.
        random: Random generator.

    Returns:
        (N,) which rows are used, and (N,) which rows belong to test sequences.

    Raises:
        OptionError: The label occurs in fewer than two unrelated sequences.
    """
    families = _root_sequences(data.parents).astype(sequences.dtype)[sequences]
    labelled = labels.codes >= 0
    counts = np.bincount(families, labelled, len(data.lengths)).astype(np.int64)
    labelled_families = random.permutation(np.flatnonzero(counts))
    if len(labelled_families) < 2:
        raise OptionError(
            f"label: expected {labels.name!r} in at least two sequences, one to train on and one "
            f"to test on; found it in {len(labelled_families)}"
        )
    ends = np.cumsum(counts[labelled_families])
    # At least one sequence for training and one for testing.
    test_families = int(
        np.clip(1 + np.searchsorted(ends, test * ends[-1]), 1, len(labelled_families) - 1)
    )
    for_test = np.isin(families, labelled_families[:test_families])
    used = np.zeros(len(labelled), bool)
    for rows in (np.flatnonzero(labelled & for_test), np.flatnonzero(labelled & ~for_test)):
        used[rows if len(rows) <= steps else random.choice(rows, steps, replace=False)] = True
    return used, for_test


def _root_sequences(parents: Integers) -> Integers:
    """Return the sequence that each sequence goes back to over all branches: (S,)."""
    roots = np.where(parents >= 0, parents, np.arange(len(parents)))
    while np.any((further := roots[roots]) != roots):
        roots = further
    return roots


def collect_rows(
    data: SiteData, quantity: str, used: npt.NDArray[np.bool_]
) -> tuple[Array, Integers]:
    """Read the used rows that are finite, (n, H), and their numbers, (n,)."""
    marked = with_columns(data, {"used": used[:, np.newaxis]})
    states = np.concatenate(summarize_rows(marked, (quantity, "used"), _used_rows)["states"])
    rows = np.flatnonzero(used)
    finite = np.isfinite(states).all(1)
    return (states, rows) if finite.all() else (states[finite], rows[finite])


def _used_rows(rows: Mapping[str, Array]) -> dict[str, list[Array]]:
    values, used = rows.values()
    return {"states": [values[used[:, 0]]]}


#: Largest number of iterations of the solver.
ITERATIONS = 1000

#: A label with more distinct numbers than this is fitted by a regression.
NUMBERS = 20


@dataclass(frozen=True, eq=False)
class Probe(Result):
    """Result of a probe of a site for a label.

    Attributes:
        label: Name of the label.
        quantity: The probed quantity: hidden, a gate, or input.
        kind: ``classes`` for a logistic regression, whose score is the accuracy on the test steps;
            ``numbers`` for a ridge regression, whose score is R^2, relative to the training mean.
        score: Score on the test steps.
        error: Standard error of the score, clustered by test sequence. NaN for R^2 or for a single
            test sequence.
        baseline: Score of always predicting the most frequent training class; 0 for R^2.
        control: Name of the label whose values are the types of the control task; empty for none.
        control_score: Score of the control task on the same steps; NaN without one.
        selectivity: score - control_score.
        train_steps, test_steps: Numbers of steps used.
        train_sequences, test_sequences: Numbers of sequences used.
        converged: Whether the solvers converged.
        classes: (C,) the values of the label, or groups of them; empty for numbers.
        recall: (C,) share of the test steps of each class that are correct.
        units: (H,) numbers of the units.
        weight: (H,) length of the unit's coefficients over all classes, for standardized units.
    """

    excluded_columns: ClassVar[tuple[str, ...]] = ("recall",)

    label: str
    quantity: str
    kind: str
    score: float
    error: float
    baseline: float
    control: str
    control_score: float
    selectivity: float
    train_steps: int
    test_steps: int
    train_sequences: int
    test_sequences: int
    converged: bool
    classes: tuple[str | float, ...]
    recall: Array
    units: Integers
    weight: Array


def probe(
    site: SiteLike,
    label: str,
    quantity: str = "hidden",
    *,
    control: str | None = None,
    test: float = 0.25,
    steps: int = 20_000,
    penalty: float = 1.0,
    seed: int = 0,
) -> Probe:
    """Train a linear probe that predicts a label from the states.

    The rows are read once. The used rows are kept in memory, with a few copies for the solver.

    Args:
        site: A site with the quantity, and labels.
        label: Name of the label, or ``tokens``. Rows without it, or with values that are not
            finite, are skipped. Of texts with many values the rarest share a class.
        quantity: hidden, a gate, or input.
        control: Name of the label whose values are the types of the control task. Default:
            ``tokens`` if recorded, otherwise no control task.
        test: Approximate share of the labelled steps for testing.
        steps: Largest number of steps for training, and for testing, drawn from all.
        penalty: Weight of the squared coefficients for units of standard deviation 1: 1 / C of
            scikit-learn's logistic regression, alpha of its ridge regression.
        seed: Seed of all random draws.

    Returns:
        The scores and the weights of the units.

    Raises:
        MissingExtraError: scikit-learn is not installed.
        NotRecordedError: The quantity was not recorded, or there is no such label.
        OptionError: The label has fewer than two values, or occurs in fewer than two sequences.

    Examples:
        >>> import numpy as np
        >>> from grutrace.analysis import SiteArrays, probe
        >>> states = np.random.default_rng(0).uniform(-1, 1, (400, 3))
        >>> labels = {"sign": np.where(states[:, 1] > 0, "plus", "minus")}
        >>> result = probe(SiteArrays(hidden=states, lengths=[10] * 40, labels=labels), "sign")
        >>> result.score > 0.9 > result.baseline, int(result.weight.argmax())
        (True, 1)
    """
    sklearn = _import_sklearn()  # Before the rows are read.
    data = as_site_data(site)
    data.require(quantity)
    if not 0 < test < 1:
        raise OptionError(f"test: expected a share between 0 and 1, found {short_repr(test)}")
    labels = data.labels(label)
    target, classes = _target(labels)
    control = control or ("tokens" if "tokens" in data.label_names and label != "tokens" else "")
    random = np.random.default_rng(seed)
    sequences = sequence_ids(data)
    used, for_test = split_rows(data, sequences, labels, test, steps, random)
    states, rows = collect_rows(data, quantity, used)
    testing = for_test[rows]
    train, tested = rows[~testing], rows[testing]
    if not len(train) or not len(tested):
        raise OptionError(f"label: no step with finite {quantity} is left for {label!r}")
    # By the mean and the deviation of the training rows.
    scaler = sklearn.preprocessing.StandardScaler()
    train_inputs = scaler.fit_transform(states[~testing].astype(np.float64))
    test_inputs = scaler.transform(states[testing].astype(np.float64))
    del states
    prediction = _fit(train_inputs, target[train], test_inputs, bool(classes), penalty)
    score = _score(prediction.values, target[train], target[tested], bool(classes))
    baseline = 0.0
    if classes:
        baseline = _mean(target[tested] == np.bincount(target[train]).argmax())
    converged, control_score = prediction.converged, np.nan
    if control:
        drawn = _control_targets(data.labels(control), target, labels.codes >= 0, random)
        controlled = _fit(train_inputs, drawn[train], test_inputs, bool(classes), penalty)
        control_score = _score(controlled.values, drawn[train], drawn[tested], bool(classes))
        converged = converged and controlled.converged
    right = prediction.values == target[tested]
    return Probe(
        site=data.name,
        label=label,
        quantity=quantity,
        kind="classes" if classes else "numbers",
        score=score,
        error=_clustered_error(right, sequences[tested]) if classes else np.nan,
        baseline=baseline,
        control=control,
        control_score=control_score,
        selectivity=score - control_score,
        train_steps=len(train),
        test_steps=len(tested),
        train_sequences=len(np.unique(sequences[train])),
        test_sequences=len(np.unique(sequences[tested])),
        converged=converged,
        classes=classes,
        recall=np.array([_mean(right[target[tested] == code]) for code in range(len(classes))]),
        units=data.units if quantity != "input" else np.arange(len(prediction.weight)),
        weight=prediction.weight,
    )


def _target(labels: LabelColumn) -> tuple[Array, tuple[str | float, ...]]:
    """Return codes of classes (N,) and their names; or numbers, and no names."""
    if len(labels.values) > NUMBERS and not any(isinstance(value, str) for value in labels.values):
        return labels.to_array(), ()
    classes = encode_classes(labels)
    return classes.codes, classes.names


def _control_targets(
    types: LabelColumn, target: Array, labelled: Array, random: np.random.Generator
) -> Array:
    """Draw a target for each type from those of all steps; steps without a type share one: (N,)."""
    drawn = random.choice(target[labelled], len(types.values) + 1)
    return np.asarray(drawn[types.codes])


class _Prediction(NamedTuple):
    """What a model predicts for the test rows.

    Attributes:
        values: The predicted targets, (tested rows,).
        converged: Whether the solver converged.
        weight: (H,) length of the coefficients of each unit.
    """

    values: Array
    converged: bool
    weight: Array


def _import_sklearn() -> Any:
    """Import scikit-learn with the modules that a probe needs.

    Raises:
        MissingExtraError: scikit-learn is not installed.
    """
    with require_extra("a probe", "analysis"):
        import sklearn.exceptions
        import sklearn.linear_model
        import sklearn.preprocessing
    return sklearn


def _fit(train: Array, target: Array, test: Array, classes: bool, penalty: float) -> _Prediction:
    """Fit a ridge regression, or a logistic regression where the target is classes."""
    sklearn = _import_sklearn()
    if not classes:
        model = sklearn.linear_model.Ridge(alpha=penalty).fit(train, target)
        return _Prediction(model.predict(test), True, np.abs(model.coef_))
    if len(np.unique(target)) < 2:
        # LogisticRegression refuses a single class.
        return _Prediction(np.full(len(test), target[0]), True, np.zeros(train.shape[1]))
    model = sklearn.linear_model.LogisticRegression(C=1 / penalty, max_iter=ITERATIONS)
    with warnings.catch_warnings():
        # The field `converged` reports it.
        warnings.simplefilter("ignore", sklearn.exceptions.ConvergenceWarning)
        model.fit(train, target)
    converged = bool((model.n_iter_ < ITERATIONS).all())
    return _Prediction(model.predict(test), converged, np.linalg.norm(model.coef_, axis=0))


def _r_squared(predicted: Array, trained: Array, tested: Array) -> float:
    """R^2 of the test rows, relative to the mean of the training rows."""
    total = float(np.square(tested - trained.mean()).sum())
    residual = float(np.square(tested - predicted).sum())
    return 1 - residual / total if total > 0 else float("nan")


def _score(predicted: Array, trained: Array, tested: Array, classes: bool) -> float:
    """Share of correct predictions, or R^2."""
    return _mean(predicted == tested) if classes else _r_squared(predicted, trained, tested)


def _clustered_error(right: Array, sequences: Integers) -> float:
    """Standard error of a share, clustered by sequence (a ratio of two sums)."""
    _, position = np.unique(sequences, return_inverse=True)
    counts, wins = np.bincount(position), np.bincount(position, right)
    if len(counts) < 2:
        return float("nan")
    delta = wins - counts * right.mean()
    return float(np.sqrt(delta @ delta * len(counts) / (len(counts) - 1)) / counts.sum())


def _mean(right: Array) -> float:
    return float(right.mean()) if len(right) else float("nan")
