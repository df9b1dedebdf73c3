"""`site.plot`: the pictures of a site. matplotlib is imported when the first is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from grutrace.errors import require_extra
from grutrace.storage.read.site import SiteTrace

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def _matplotlib(name: str) -> AbstractContextManager[None]:
    return require_extra(f"site.plot.{name}", "plot")


class SitePlots:
    """The pictures of a site, as ``site.plot``. Needs the extra `plot` (matplotlib).

    Each method draws in ``ax``, or in a new figure, and returns the axes. The title names the site
    and says how the units are sorted or chosen. In colours and on axes the update gate follows
    PyTorch: 1 keeps the state, 0 overwrites it.

    Args:
        site: The site.

    Examples:
        >>> import torch
        >>> import grutrace
        >>> gru = torch.nn.GRU(input_size=2, hidden_size=3)
        >>> with grutrace.trace(gru) as trace:
        ...     output, state = gru(torch.randn(5, 4, 2))
        >>> ax = trace["l0"].plot.heatmap("update", sequence=3)
        >>> ax.images[0].get_array().shape            # units, steps
        (3, 5)
        >>> ax.figure.savefig("update.png")
    """

    def __init__(self, site: SiteTrace) -> None:
        self._site = site

    def __repr__(self) -> str:
        kinds = ", ".join(name for name in vars(type(self)) if not name.startswith("_"))
        return f"<plots of {self._site.name}: {kinds}>"

    def heatmap(
        self,
        quantity: str = "update",
        sequence: int = 0,
        *,
        steps: slice | None = None,
        units: Sequence[int] | slice | None = None,
        order: str = "similarity",
        label: str | None = None,
        labels: Sequence[str] | None = None,
        ax: Axes | None = None,
    ) -> Axes:
        """Draw a quantity of one sequence: units along y, steps along x, tokens beneath.

        More than 2,000 steps are averaged to fewer columns.

        Args:
            quantity: reset, update, candidate, hidden, input or gradient.
            sequence: Number of the sequence.
            steps: A slice of its steps. Default: all.
            units: The units to draw. Default: all.
            order: How units are sorted from top to bottom. ``similarity``: clustered by their
                courses in these steps. ``timescale``: by how long they keep their state in these
                steps. ``label``: by the value of `label` that they separate best in the whole
                trace. ``last write``: by the last step with an update gate below 0.5. ``number``.
            label: The label of ``order="label"``.
            labels: Labels to write beneath the tokens. Default: all.
            ax: The axes to draw in.

        Raises:
            NotRecordedError: The quantity, the sequence or the label was not recorded.
            OptionError: An argument is wrong.
            MissingExtraError: matplotlib is not installed.
        """
        with _matplotlib("heatmap"):
            from grutrace.view.plots.heatmap import plot_heatmap
        return plot_heatmap(
            self._site, quantity, sequence, steps=steps, units=units, order=order, label=label,
            labels=labels, ax=ax,
        )  # fmt: skip

    def lines(
        self,
        quantity: str = "hidden",
        sequence: int = 0,
        *,
        steps: slice | None = None,
        units: Sequence[int] | slice | None = None,
        labels: Sequence[str] | None = None,
        ax: Axes | None = None,
    ) -> Axes:
        """Draw a quantity of some units of one sequence as lines over its steps.

        Args:
            quantity: reset, update, candidate, hidden, input or gradient.
            sequence: Number of the sequence.
            steps: A slice of its steps. Default: all.
            units: The units to draw. Default: the 6 that vary most in these steps.
            labels: Labels to write beneath the tokens. Default: all.
            ax: The axes to draw in.

        Raises:
            NotRecordedError: The quantity, the sequence or a label was not recorded.
            OptionError: An argument is wrong.
            MissingExtraError: matplotlib is not installed.
        """
        with _matplotlib("lines"):
            from grutrace.view.plots.unit_lines import plot_lines
        return plot_lines(
            self._site, quantity, sequence, steps=steps, units=units, labels=labels, ax=ax
        )
