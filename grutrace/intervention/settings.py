"""Settings: which quantity of which site is set to which value, and at which steps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, get_args

from torch import Tensor, nn

from grutrace.capture.selection import SelectedModule, select
from grutrace.errors import OptionError, join_names, require_one_of, short_repr, suggest_name
from grutrace.intervention.selection import (
    Numbers,
    Steps,
    StepSelection,
    select_sequences,
    select_units,
)
from grutrace.intervention.values import Align, Recorded, Tokens, Value, Values, make_value
from grutrace.records import GATES

#: Quantities that can be set, in the order in which a step computes them.
SETTABLE = (*(f"{gate}_preactivation" for gate in GATES), *GATES, "hidden")


#: Options of `intervene`.
OPTIONS = ("units", "steps", "sequences", "tokens", "align")


@dataclass(frozen=True, eq=False)
class Setting:
    """One quantity of one site, and the value that it is set to.

    Attributes:
        site: Name of the site.
        layer: Number of the layer.
        reverse: Whether it is the reverse direction.
        quantity: One of `SETTABLE`.
        value: The value.
        hidden_size: H
        units: (U,) the units; None for all.
        steps: The steps; None for all.
        sequences: The sequences; None for all.
        tokens: Tokens of the sequences, for functions.
        masks: Masks of the units and rows, which `edits` makes.
        held: What is held with other settings, which `held_steps` makes.
    """

    site: str
    layer: int
    reverse: bool
    quantity: str
    value: Value
    hidden_size: int
    units: tuple[int, ...] | None
    steps: StepSelection | None
    sequences: tuple[int, ...] | None
    tokens: Tokens | None
    masks: dict[Any, Tensor] = field(default_factory=dict)
    held: dict[tuple[bool, ...], Any] = field(default_factory=dict)

    @property
    def what(self) -> str:
        """The setting in error messages."""
        return f"{self.quantity} of {self.site}"

    @property
    def depends_on_step(self) -> bool:
        """Whether it needs the number of a step, or the position of a sequence."""
        return self.steps is not None or self.sequences is not None or self.value.depends_on_step

    @property
    def unit_numbers(self) -> range | tuple[int, ...]:
        """(U,) the units."""
        return range(self.hidden_size) if self.units is None else self.units


def make_settings(
    model: nn.Module,
    site: str | Mapping[str, Mapping[str, Any]],
    quantities: Mapping[str, Any],
    *,
    units: Numbers | None,
    steps: Steps | None,
    sequences: Numbers | None,
    tokens: Any,
    align: Align,
) -> list[tuple[SelectedModule, list[Setting]]]:
    """Return the settings of each module, in the order in which they take effect.

    Args:
        model: The model.
        site: Glob for the names of sites; or, by such globs, values by quantity.
        quantities: Values by quantity, if `site` is a glob.
        units: The units.
        steps: The steps.
        sequences: The sequences.
        tokens: Tokens of the sequences.
        align: How recorded sequences correspond to those of the batch.

    Raises:
        OptionError: Something does not exist or does not fit.
    """
    require_one_of("align", align, get_args(Align))
    step_selection = None if steps is None else StepSelection(steps)
    chosen = select_sequences(sequences)
    checked_tokens = None if tokens is None else _tokens(tokens)
    selections = select(model)
    found: dict[int, list[Setting]] = {}
    for glob, by_quantity in _by_glob(site, quantities):
        for index, name in _matching(selections, glob):
            module = selections[index].description
            matched = next(e for e in module.sites if e.name == name)
            for quantity, value in by_quantity.items():
                what = f"{quantity} of {name}"
                selected = select_units(units, module.hidden_size, name)
                numbers = range(module.hidden_size) if selected is None else selected
                made = make_value(
                    value, quantity, what, numbers, module.hidden_size, align, checked_tokens
                )
                if isinstance(made, Values):
                    count = None if step_selection is None else step_selection.count
                    batch = None if chosen is None else len(chosen)
                    made.require(count, batch, len(numbers))
                setting = Setting(
                    name,
                    matched.layer,
                    matched.reverse,
                    quantity,
                    made,
                    module.hidden_size,
                    selected,
                    step_selection,
                    chosen,
                    checked_tokens,
                )
                found.setdefault(index, []).append(setting)
    values = [setting.value for settings in found.values() for setting in settings]
    if align == "token" and not any(isinstance(value, Recorded) for value in values):
        raise OptionError(
            "align: expected a recorded site or sequence among the values for 'token', found none: "
            "only recorded values have tokens"
        )
    return [(selections[index], settings) for index, settings in sorted(found.items())]


def _by_glob(
    site: object, quantities: Mapping[str, Any]
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield each glob with its values by quantity."""
    allowed = ", ".join(SETTABLE)
    if isinstance(site, Mapping):
        if quantities:
            raise OptionError(
                "site: expected a name with values as keywords, or a dict of values by site; found "
                f"a dict and {next(iter(quantities))}="
            )
        pairs = list(site.items())
    else:
        pairs = [(site, quantities)]
    for glob, values in pairs:
        if not isinstance(glob, str):
            raise OptionError(f"site: expected the name of a site, found {short_repr(glob)}")
        if not isinstance(values, Mapping):
            raise OptionError(
                f"{glob}: expected values by quantity, such as {{'update': 0.0}}; found "
                f"{short_repr(values)}"
            )
        if not values:
            raise OptionError(f"{glob}: expected a value of one of {allowed}; found none")
        for quantity in values:
            if quantity not in SETTABLE:
                near = suggest_name(str(quantity), (*SETTABLE, *OPTIONS))
                raise OptionError(
                    f"{quantity}: unknown quantity or option{near}; the quantities are {allowed}, "
                    f"and the options {', '.join(OPTIONS)}"
                )
        yield glob, values
    if not pairs:
        raise OptionError("site: expected at least one site, found none")


def _matching(selections: Sequence[SelectedModule], glob: str) -> list[tuple[int, str]]:
    names = [
        (index, site.name)
        for index, selection in enumerate(selections)
        for site in selection.description.sites
    ]
    matching = [(index, name) for index, name in names if fnmatchcase(name, glob)]
    if not matching:
        known = [name for _, name in names]
        raise OptionError(
            f"site: {glob!r} matches no site of the model{suggest_name(glob, known)}: "
            f"{join_names(known)}"
        )
    return matching


def _tokens(tokens: Any) -> Tokens:
    expected = "a list of tokens for each sequence"
    if isinstance(tokens, str) or not isinstance(tokens, Sequence):
        raise OptionError(f"tokens: expected {expected}, found {short_repr(tokens)}")
    for row in tokens:
        if isinstance(row, str) or not isinstance(row, Sequence):
            raise OptionError(f"tokens: expected {expected}, found {short_repr(row)} among them")
    return tokens
