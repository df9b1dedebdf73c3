"""`site.plot`: the pictures of a site. matplotlib is imported when the first is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import numpy as np

from grutrace.analysis.comparison.change import change
from grutrace.analysis.comparison.stages import STAGES, stages
from grutrace.analysis.descriptive.geometry import geometry
from grutrace.analysis.descriptive.moments import moments
from grutrace.analysis.descriptive.saturation import saturation
from grutrace.analysis.dynamics.fixed_points import FixedPoints, fixed_points
from grutrace.analysis.labels.selectivity import selectivity
from grutrace.analysis.memory.autocorrelation import autocorrelation
from grutrace.analysis.memory.decomposition import decompose, memory_map
from grutrace.analysis.memory.gradients import gradients
from grutrace.analysis.memory.timescales import timescales
from grutrace.errors import NotRecordedError, OptionError, require_extra
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

    def saturation(self, gate: str = "update", *, ax: Axes | None = None) -> Axes:
        """Draw the share of steps with a gate below 0.1 against that above 0.9, unit by unit.

        The figure of Karpathy, Johnson and Li (2015); see `grutrace.analysis.saturation`.

        Args:
            gate: reset, update or candidate.
            ax: The axes to draw in.

        Raises:
            NotRecordedError: The gate was not recorded.
            MissingExtraError: matplotlib is not installed.
        """
        with _matplotlib("saturation"):
            from grutrace.view.plots.saturation import plot_saturation
        return plot_saturation(saturation(self._site), gate, ax)

    def timescales(self, *, ax: Axes | None = None) -> Axes:
        """Draw the distribution of the units' timescales and its fit; see `analysis.timescales`.

        Args:
            ax: The axes to draw in.

        Raises:
            NotRecordedError: The update gate was not recorded.
            MissingExtraError: matplotlib or SciPy is not installed.
        """
        with _matplotlib("timescales"):
            from grutrace.view.plots.timescales import plot_timescales
        return plot_timescales(timescales(self._site), ax)

    def autocorrelation(self, lags: int | None = None, *, ax: Axes | None = None) -> Axes:
        """Draw the autocorrelation of the hidden states; see `analysis.autocorrelation`.

        Args:
            lags: Largest lag.
            ax: The axes to draw in.

        Raises:
            NotRecordedError: The hidden states were not recorded.
            OptionError: `lags` is wrong.
            MissingExtraError: matplotlib is not installed.
        """
        with _matplotlib("autocorrelation"):
            from grutrace.view.plots.timescales import plot_autocorrelation
        return plot_autocorrelation(autocorrelation(self._site, lags), ax)

    def decompose(self, sequence: int = 0, step: int = -1, *, ax: Axes | None = None) -> Axes:
        """Draw what each past step wrote into one state; see `analysis.decompose`.

        Args:
            sequence: Number of the sequence.
            step: The step after which the state is taken. Negative numbers count from the end.
            ax: The axes to draw in.

        Raises:
            NotRecordedError: A needed quantity or the step was not recorded.
            MissingExtraError: matplotlib is not installed.
        """
        with _matplotlib("decompose"):
            from grutrace.view.plots.memory import plot_decomposition
        return plot_decomposition(self._site, decompose(self._site, sequence, step), ax)

    def memory_map(self, sequence: int = 0, *, ax: Axes | None = None) -> Axes:
        """Draw what each past step wrote into every state; see `analysis.memory_map`.

        Args:
            sequence: Number of the sequence.
            ax: The axes to draw in.

        Raises:
            NotRecordedError: A needed quantity or the sequence was not recorded.
            OptionError: The sequence is too long for a map.
            MissingExtraError: matplotlib is not installed.
        """
        with _matplotlib("memory_map"):
            from grutrace.view.plots.memory import plot_memory_map
        return plot_memory_map(self._site, memory_map(self._site, sequence), ax)

    def trajectories(
        self,
        sequences: Sequence[int] | None = None,
        *,
        points: FixedPoints | bool = False,
        label: str | None = None,
        ax: Axes | None = None,
    ) -> Axes:
        """Draw hidden states in their first two principal components; see `analysis.geometry`.

        Args:
            sequences: Numbers of the sequences. Default: the first 8.
            points: Fixed points to draw, or True to search for them, at the mean of the recorded
                inputs or, without them, at an input of zeros; see `analysis.fixed_points`. A filled
                circle is stable, an open one unstable, a cross a slow point.
            label: A label, or ``tokens``, whose values colour the states.
            ax: The axes to draw in.

        Raises:
            NotRecordedError: The hidden states, a sequence or the label were not recorded.
            OptionError: The states vary in fewer than two directions.
            MissingExtraError: matplotlib is not installed.
        """
        with _matplotlib("trajectories"):
            from grutrace.view.plots.trajectories import plot_trajectories
        site = self._site
        if isinstance(points, FixedPoints):
            found: FixedPoints | None = points
        else:
            has_input = "input" in site.site.available_quantities
            found = fixed_points(site, "mean" if has_input else None) if points else None
        return plot_trajectories(site, geometry(site), found, sequences, label, ax)

    def selectivity(self, label: str, quantity: str = "hidden", *, ax: Axes | None = None) -> Axes:
        """Draw how much each unit tells about a label, against chance; see `analysis.selectivity`.

        Args:
            label: Name of the label, or ``tokens``.
            quantity: hidden, a gate, or input.
            ax: The axes to draw in.

        Raises:
            NotRecordedError: The quantity or the label was not recorded.
            OptionError: The label has fewer than two values.
            MissingExtraError: matplotlib is not installed.
        """
        with _matplotlib("selectivity"):
            from grutrace.view.plots.selectivity import plot_selectivity
        return plot_selectivity(selectivity(self._site, label, quantity), ax)

    def gradients(self, *, ax: Axes | None = None) -> Axes:
        """Draw the norm of the gradient by its distance from the loss; see `analysis.gradients`.

        Args:
            ax: The axes to draw in.

        Raises:
            NotRecordedError: The gradient was not recorded.
            MissingExtraError: matplotlib is not installed.
        """
        with _matplotlib("gradients"):
            from grutrace.view.plots.gradients import plot_gradients
        return plot_gradients(gradients(self._site), ax)

    def change(
        self,
        against: SiteTrace,
        quantity: str = "update",
        *,
        paired: bool = False,
        ax: Axes | None = None,
    ) -> Axes:
        """Draw how each unit moved from this trace to another; see `analysis.change`.

        Args:
            against: The same site in the later trace.
            quantity: reset, update, candidate or hidden.
            paired: Whether both traces have the same inputs in the same order, so that errors are
                those of differences step by step.
            ax: The axes to draw in.

        Raises:
            NotRecordedError: The quantity is not in both traces.
            OptionError: `paired` is set and the sequences differ.
            MissingExtraError: matplotlib is not installed.
        """
        with _matplotlib("change"):
            from grutrace.view.plots.changes import plot_change
        return plot_change(change(self._site, against, paired=paired), quantity, ax)

    def stages(
        self, quantity: str = "update", count: int = STAGES, *, ax: Axes | None = None
    ) -> Axes:
        """Draw how the mean of each unit changes over the recording; see `analysis.stages`.

        Args:
            quantity: reset, update, candidate or hidden.
            count: Number of stages.
            ax: The axes to draw in.

        Raises:
            NotRecordedError: The quantity was not recorded.
            OptionError: `count` is not an integer of 1 or more.
            MissingExtraError: matplotlib is not installed.
        """
        with _matplotlib("stages"):
            from grutrace.view.plots.changes import plot_stages
        found = stages(self._site, count)
        calls = [int(self._site.sequence(int(first)).calls[0]) for first in found.first]
        return plot_stages(found, quantity, calls, ax)

    def checkpoints(
        self, *later: SiteTrace, quantity: str = "update", ax: Axes | None = None
    ) -> Axes:
        """Draw how the mean of each unit changes over traces, such as those of checkpoints.

        Args:
            later: The same site in the later traces, in order.
            quantity: reset, update, candidate or hidden.
            ax: The axes to draw in.

        Raises:
            NotRecordedError: A trace does not have the quantity.
            OptionError: The sites have different units.
            MissingExtraError: matplotlib is not installed.
        """
        with _matplotlib("checkpoints"):
            from grutrace.view.plots.changes import plot_checkpoints
        sites = [self._site, *later]
        found = [moments(site) for site in sites]
        units = found[0].units
        for site, each in zip(sites, found, strict=True):
            if quantity not in each.mean:
                raise NotRecordedError(
                    f"{site.name!r} has {', '.join(each.mean)}, but not {quantity!r}"
                )
            if not np.array_equal(each.units, units):
                raise OptionError(
                    f"checkpoints: expected {len(units)} units of {self._site.name!r} in every "
                    f"trace, found {len(each.units)} others at {site.name!r}"
                )
        means = np.array([each.mean[quantity] for each in found])
        names = [getattr(site.snapshot.source, "name", "memory") for site in sites]
        return plot_checkpoints(means, quantity, names, units, self._site.name, ax)
