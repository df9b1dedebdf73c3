"""`effects`: what holding each unit's gate does to a metric.

n sequences of the user's data, U units of a site, k copies of the data in a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from grutrace.capture.options import integer
from grutrace.capture.selection import select
from grutrace.errors import (
    GLOBS,
    OptionError,
    join_names,
    reject_unknown_options,
    require_extra,
    short_repr,
    string_list,
    suggest_name,
)
from grutrace.intervention.intervene import Intervention, intervene
from grutrace.intervention.selection import Numbers, Steps, select_units
from grutrace.intervention.settings import SETTABLE
from grutrace.intervention.values import Context
from grutrace.records import Array
from grutrace.reprs import named_repr

if TYPE_CHECKING:
    from pandas import DataFrame

#: Number of bootstrap samples of the sequences.
BOOTSTRAP_SAMPLES = 1000

#: Maximum relative difference between copies of the data in one batch: products of other shapes
#: differ in the last digits.
COPY_TOLERANCE = 1e-4

#: What a unit is held at: a number; the mean of its values; or values drawn from all of its values.
Held: TypeAlias = float | Literal["mean", "resample"]


@dataclass(frozen=True, eq=False)
class Effects:
    """Effects of holding units, one row for each site, quantity, unit and value.

    Attributes:
        site: (rows,) names of the sites.
        quantity: (rows,) quantities.
        unit: (rows,) units.
        value: (rows,) what the unit was held at: a number, ``mean`` or ``resample``.
        effect: (rows,) mean difference of the metric from the untouched model.
        standard_error: (rows,) bootstrap standard error of the effect over sequences; NaN for a
            single sequence.
        baseline: (rows,) mean of the metric of the untouched model.
        differences: (rows, n) difference of each sequence.
        untouched: (n,) metric of each sequence of the untouched model.
    """

    site: Array
    quantity: Array
    unit: Array
    value: Array
    effect: Array
    standard_error: Array
    baseline: Array
    differences: Array
    untouched: Array

    def __len__(self) -> int:
        return len(self.site)

    def __repr__(self) -> str:
        return named_repr(
            "Effects",
            [("rows", len(self)), ("sites", tuple(dict.fromkeys(self.site.tolist())))]
            + [(name, getattr(self, name)) for name in ("effect", "standard_error")]
            + [("baseline", float(self.untouched.mean()))],
        )

    def sorted(self) -> Effects:
        """Return the rows in the order of their absolute effect, the largest first."""
        order = np.argsort(-np.abs(self.effect), kind="stable")
        columns = {name: getattr(self, name)[order] for name in (*_COLUMNS, "differences")}
        return Effects(**columns, untouched=self.untouched)

    def to_frame(self) -> DataFrame:
        """Return the rows as a pandas table.

        Raises:
            MissingExtraError: pandas is not installed.
        """
        with require_extra("a table", "analysis"):
            from pandas import DataFrame
        return DataFrame({name: getattr(self, name) for name in _COLUMNS})


_COLUMNS = ("site", "quantity", "unit", "value", "effect", "standard_error", "baseline")


@reject_unknown_options
def effects(
    model: nn.Module,
    run: Callable[[Any], Any],
    metric: Callable[[Any], Any],
    *,
    sites: str | Sequence[str] | None = None,
    quantities: str | Sequence[str] = ("update",),
    units: Numbers | None = None,
    steps: Steps | None = None,
    to: float | str | Sequence[Held] = (0.0, 1.0, "mean", "resample"),
    batched: int = 1,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Effects:
    """Measure what holding each unit's gate, or state, does to a metric.

    The model runs once for each site, quantity, unit and value, without gradients and from the same
    RNG state. The untouched model runs in the same way, with the same code in place of PyTorch's
    kernel. So the effect of a unit that nothing uses is exactly 0.

    Args:
        model: The model.
        run: Runs the model on your data: ``run(model)`` returns what `metric` takes.
        metric: Returns (n,) one number for each sequence of the data.
        sites: Glob, or list of globs, for the names of sites; None for all.
        quantities: One or more of the quantities that `intervene` sets.
        units: The units, as numbers or a slice; None for all.
        steps: The steps at which they are held; None for all.
        to: What to hold them at. A number; ``mean``: the mean of the unit's values over all steps
            and sequences of the data; ``resample``: values drawn at random from these.
        batched: Number of units to measure in one run. `run` must then repeat the data as often in
            one batch (copy after copy, ``x.repeat(1, batched, 1)`` for (T, B, I)), and `metric`
            must return (batched * n,) numbers. The model must treat the sequences of a batch
            independently, which is checked first.
        seed: Seed of the model's random numbers, and of those of ``resample`` and the bootstrap.
        progress: Called with the number of runs done and of all runs.

    Raises:
        OptionError: An option has an invalid value, the metric returns something else, or the
            sequences of a batch are not independent.
        UnsupportedError: The model has no GRU.
        StateError: `run` does not call a site.

    Examples:
        >>> import torch
        >>> import grutrace
        >>> gru, x = torch.nn.GRU(2, 3), torch.randn(5, 4, 2)
        >>> def final_state_of_unit_0(states):
        ...     return states[0, :, 0]
        >>> table = grutrace.effects(gru, lambda gru: gru(x)[1], final_state_of_unit_0, to=1.0)
        >>> table.unit, len(table.differences[0])
        (array([0, 1, 2]), 4)
        >>> bool(abs(table.effect[0] + table.baseline[0]) < 1e-6)   # unit 0 keeps its state of 0
        True
    """
    copies = integer("batched", batched, "a whole number from 1")
    if copies < 1:
        raise OptionError(f"batched: expected a whole number from 1, found {copies}")
    held = _held(to)
    chosen = _quantities(quantities)
    experiment = _Experiment(model, run, metric, copies, seed, steps)
    selected = _sites(model, sites, units)
    if copies > 1:
        experiment.require_independence(selected[0][0], chosen[0])
    total = sum(1 + -(-len(numbers) // copies) * len(held) for _, numbers in selected) * len(chosen)
    rows: list[tuple[str, str, int, Held, Array, float]] = []
    done, untouched = 0, np.zeros(0)
    for site, numbers in selected:
        for quantity in chosen:
            untouched, pool = experiment.run_untouched(site, quantity, keep="resample" in held)
            done = _report(progress, done, total)
            for value in held:
                for first in range(0, len(numbers), copies):
                    group = numbers[first : first + copies]
                    changed = experiment.run_held(site, quantity, group, value, pool)
                    done = _report(progress, done, total)
                    for unit, metrics in zip(group, changed, strict=False):
                        difference = metrics - untouched
                        rows.append((site, quantity, unit, value, difference, untouched.mean()))
    return _table(rows, untouched, seed)


class _Pool:
    """The values of a quantity in the untouched model.

    Attributes:
        count: Number of rows.
    """

    def __init__(self, *, keep: bool) -> None:
        self.count, self._keep = 0, keep
        self._sum: Tensor | None = None
        self._rows: list[Tensor] = []

    def note(self, gate: Tensor, _: Context) -> Tensor:
        """Note the values of one step, and return them unchanged."""
        total = gate.double().sum(0)
        self._sum = total if self._sum is None else self._sum + total
        self.count += len(gate)
        if self._keep:
            self._rows.append(gate.detach().cpu().clone())
        # A copy, so that the model goes on with the values of this code and not of the kernel.
        return gate.clone()

    def mean(self, unit: int) -> float:
        """Return the mean of a unit."""
        assert self._sum is not None
        return float(self._sum[unit] / self.count)

    def draw(self, unit: int, count: int, generator: torch.Generator) -> Tensor:
        """Return values of a unit, (count,), drawn with replacement."""
        if len(self._rows) > 1:
            self._rows = [torch.cat(self._rows)]
        rows = torch.randint(len(self._rows[0]), (count,), generator=generator)
        return self._rows[0][rows, unit]


class _Experiment:
    """Runs the model on the user's data.

    Args:
        model: The model.
        run: Runs it.
        metric: Returns one number for each sequence.
        copies: k
        seed: Seed of the random numbers.
        steps: The steps at which units are held.
    """

    def __init__(
        self,
        model: nn.Module,
        run: Callable[[Any], Any],
        metric: Callable[[Any], Any],
        copies: int,
        seed: int,
        steps: Steps | None,
    ) -> None:
        self._model, self._run, self._metric = model, run, metric
        self._copies, self._seed, self._steps = copies, seed, steps
        self._count: int | None = None

    def run_untouched(self, site: str, quantity: str, *, keep: bool) -> tuple[Array, _Pool]:
        """Return the metric of each sequence, (n,), and the values of the quantity."""
        pool = _Pool(keep=keep)
        metrics = self._measure(self._intervene(site, quantity, pool.note, None))
        if not pool.count:
            raise OptionError(
                f"steps: expected steps that {site} makes, found {short_repr(self._steps)}"
            )
        if not np.isfinite(metrics).all():
            raise OptionError(
                "metric: expected finite numbers from the untouched model, found "
                f"{metrics[~np.isfinite(metrics)][0]}"
            )
        return metrics[0], pool

    def run_held(
        self, site: str, quantity: str, units: Sequence[int], value: Held, pool: _Pool
    ) -> Array:
        """Return the metric of each sequence with one unit held in each copy, (k, n)."""
        generator = torch.Generator().manual_seed(self._seed)
        numbers = None
        if value != "resample":
            numbers = [pool.mean(unit) if value == "mean" else float(value) for unit in units]
        count = self._count
        assert count is not None

        def hold(gate: Tensor, at: Context) -> Tensor:
            # (n, units): the unit of each copy.
            of_copy = torch.tensor(at.sequences).unsqueeze(1) // count
            is_held = of_copy == torch.arange(len(units))
            if numbers is not None:
                held = torch.tensor(numbers, dtype=gate.dtype).expand(gate.shape)
            else:
                drawn = [pool.draw(unit, len(gate), generator) for unit in units]
                held = torch.stack(drawn, 1).to(gate.dtype)
            return torch.where(is_held.to(gate.device), held.to(gate.device), gate)

        return self._measure(self._intervene(site, quantity, hold, units))

    def require_independence(self, site: str, quantity: str) -> None:
        """Require that copies of the data in one batch do not depend on one another.

        Raises:
            OptionError: They do.
        """
        metrics, pool = self.run_untouched(site, quantity, keep=False)
        copies = self._measure(self._intervene(site, quantity, pool.note, None))
        scale = COPY_TOLERANCE * max(1.0, float(np.abs(metrics).max()))
        if np.abs(copies - metrics).max() > scale:
            raise OptionError(
                f"batched: expected the same metric from {self._copies} copies of the data in one "
                f"batch, found differences up to {np.abs(copies - metrics).max():.3g}. Repeat the "
                "data copy after copy, and use eval mode: dropout differs between copies"
            )
        count = len(metrics)

        def change_first(gate: Tensor, at: Context) -> Tensor:
            is_first = torch.tensor(at.sequences).unsqueeze(1) < count
            return torch.where(is_first.to(gate.device), 1 - gate, gate)

        changed = self._measure(self._intervene(site, quantity, change_first, None))
        if not np.array_equal(changed[1:], copies[1:]):
            raise OptionError(
                "batched: expected a model that treats the sequences of a batch independently; "
                "found that a change in one copy of the data changes others. Use batched=1"
            )

    def _intervene(
        self,
        site: str,
        quantity: str,
        function: Callable[[Tensor, Context], Tensor],
        units: Sequence[int] | None,
    ) -> Intervention:
        # The name is no pattern: names of modules may have brackets.
        name = "".join(f"[{letter}]" if letter in "*?[" else letter for letter in site)
        settings = {name: {quantity: function}}
        return intervene(self._model, settings, units=units, steps=self._steps)

    def _measure(self, intervention: Intervention) -> Array:
        """Return the metric, (k, n)."""
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(self._seed)
            with intervention:
                result = self._run(self._model)
            metrics = self._metric(result)
        expected = "one number for each sequence, (n,)"
        try:
            tensor = torch.as_tensor(metrics).detach().cpu().double()
        except (TypeError, ValueError, RuntimeError):
            raise OptionError(f"metric: expected {expected}, found {short_repr(metrics)}") from None
        if tensor.dim() != 1 or not len(tensor):
            raise OptionError(f"metric: expected {expected}, found {short_repr(metrics)}")
        if len(tensor) % self._copies:
            raise OptionError(
                f"metric: expected a multiple of batched={self._copies} numbers, found "
                f"{len(tensor)}"
            )
        count = len(tensor) // self._copies
        if self._count not in (None, count):
            raise OptionError(
                f"metric: expected {self._count} sequences in each run, found {count}"
            )
        self._count = count
        array: Array = tensor.numpy().reshape(self._copies, count)
        return array


def _held(to: Any) -> list[Held]:
    expected = "numbers, 'mean' or 'resample'"
    values = [to] if isinstance(to, (str, int, float)) else to
    try:
        listed = list(values)
    except TypeError:
        raise OptionError(f"to: expected {expected}, found {short_repr(to)}") from None
    held: list[Held] = []
    for value in listed:
        if value in ("mean", "resample"):
            held.append(value)
            continue
        if isinstance(value, (bool, str)) or not isinstance(value, (int, float, np.number)):
            raise OptionError(f"to: expected {expected}, found {short_repr(value)}")
        if not np.isfinite(float(value)):
            raise OptionError(f"to: expected finite numbers, found {value}")
        held.append(float(value))
    if not held:
        raise OptionError(f"to: expected {expected}, found none")
    return held


def _quantities(quantities: Any) -> list[str]:
    expected = f"names out of {', '.join(SETTABLE)}"
    chosen = string_list("quantities", quantities, expected)
    for name in chosen:
        if name not in SETTABLE:
            raise OptionError(
                f"quantities: expected {expected}; found {name!r}{suggest_name(name, SETTABLE)}"
            )
    return chosen


def _sites(
    model: nn.Module, sites: str | Sequence[str] | None, units: Numbers | None
) -> list[tuple[str, Sequence[int]]]:
    """Return the matching sites with their units."""
    sizes = {
        site.name: selection.description.hidden_size
        for selection in select(model)
        for site in selection.description.sites
    }
    globs = ["*"] if sites is None else string_list("sites", sites, GLOBS)
    for glob in globs:
        if not any(fnmatchcase(name, glob) for name in sizes):
            raise OptionError(
                f"sites: {glob!r} matches no site of the model{suggest_name(glob, sizes)}: "
                f"{join_names(sizes)}"
            )
    found: list[tuple[str, Sequence[int]]] = []
    for name, size in sizes.items():
        if any(fnmatchcase(name, glob) for glob in globs):
            selected = select_units(units, size, name)
            found.append((name, range(size) if selected is None else selected))
    return found


def _report(progress: Callable[[int, int], None] | None, done: int, total: int) -> int:
    if progress is not None:
        progress(done + 1, total)
    return done + 1


def _table(
    rows: Sequence[tuple[str, str, int, Held, Array, float]], untouched: Array, seed: int
) -> Effects:
    sites, quantities, units, values, differences, baselines = zip(*rows, strict=True)
    stacked = np.stack(differences)
    is_text = any(isinstance(value, str) for value in values)
    return Effects(
        np.array(sites),
        np.array(quantities),
        np.array(units),
        np.array(values, object if is_text else np.float64),
        stacked.mean(1),
        np.array(list(_standard_errors(stacked, seed))),
        np.array(baselines),
        stacked,
        untouched,
    )


def _standard_errors(differences: Array, seed: int) -> Iterator[float]:
    """Yield the bootstrap standard error of the mean of each row, (rows, n)."""
    count = differences.shape[1]
    if count < 2:
        yield from (np.nan for _ in differences)
        return
    generator = np.random.default_rng(seed)
    counts = generator.multinomial(count, np.full(count, 1 / count), BOOTSTRAP_SAMPLES)
    for row in differences:
        # The spread between samples understates that of the mean by (n - 1) / n.
        spread = (counts @ row / count).std()
        yield float(spread * np.sqrt(count / (count - 1)))
