"""The base class of all results of analyses: frozen, with columns for a table."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from grutrace.errors import require_extra
from grutrace.records import Array
from grutrace.reprs import fields_repr

if TYPE_CHECKING:
    from pandas import DataFrame


@dataclasses.dataclass(frozen=True, eq=False)
class Result:
    """Base class of the results of analyses.

    Attributes:
        site: Name of the site.
    """

    #: The field that is the index of the table.
    index_field: ClassVar[str] = "units"

    #: Columns that locate a row; quantiles of them are meaningless.
    index_columns: ClassVar[tuple[str, ...]] = ()

    #: Arrays that are too large to print.
    array_only_fields: ClassVar[tuple[str, ...]] = ()

    #: Arrays that are not columns, even if they have the right length.
    excluded_columns: ClassVar[tuple[str, ...]] = ()

    site: str

    __repr__ = fields_repr

    def __init_subclass__(cls) -> None:
        # Otherwise `dataclass` generates a repr that prints all arrays.
        cls.__repr__ = Result.__repr__  # type: ignore[method-assign]

    def columns(self) -> dict[str, Array]:
        """Return the columns of the table by name, starting with the index column.

        A column is a field with one value for each entry of `index_field`. A dictionary of such
        arrays gives
        one column for each key: ``update_left``.
        """
        numbers = getattr(self, self.index_field)
        columns = {self.index_field.removesuffix("s"): np.asarray(numbers)}
        excluded = (self.index_field, *self.excluded_columns)
        for name, value in self._fields():
            of_field = value.items() if isinstance(value, dict) else [("", value)]
            for key, array in of_field:
                if name not in excluded and np.shape(array) == (len(numbers),):
                    columns[f"{key}_{name}" if key else name] = np.asarray(array)
        return columns

    def scalars(self) -> dict[str, Any]:
        """Return the fields that are a single number or text, by name; None where unknown."""
        single = (bool, int, float, str, np.generic, type(None))
        return {
            name: value
            for name, value in self._fields()
            if name not in ("site", *self.excluded_columns) and isinstance(value, single)
        }

    def to_dict(self) -> dict[str, Any]:
        """Return all fields by name, except those too large to print."""
        return {
            name: value
            for name, value in dataclasses.asdict(self).items()
            if name not in self.array_only_fields
        }

    def to_frame(self) -> DataFrame:
        """The columns as a pandas table, numbered as the first of them says.

        Raises:
            MissingExtraError: There is no pandas.
        """
        with require_extra("a table", "analysis"):
            from pandas import DataFrame
        columns = self.columns()
        index = next(iter(columns))
        return DataFrame(columns).set_index(index)

    def _fields(self) -> list[tuple[str, Any]]:
        return [(field.name, getattr(self, field.name)) for field in dataclasses.fields(self)]
