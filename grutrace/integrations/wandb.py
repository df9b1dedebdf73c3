"""Write figures to Weights & Biases."""

from __future__ import annotations

from typing import Any

from grutrace.errors import OptionError, StateError, require_extra, short_repr
from grutrace.integrations.figures import Figures

#: Name of the step of the figures.
STEP = "gates/step"


class WandbLog:
    """Write histograms and scalars to a run of Weights & Biases, online or offline.

    The figures have a step of their own, ``gates/step``, which is the x-axis of their charts.

    Args:
        run: The run, which stays open; None is the run that is active at the first log.
        pass_step: Whether to call ``run.log(..., step=step)``. Needed, with the same steps, if the
            training does so: W&B drops values of an earlier step than its latest, and a log without
            a step counts as the next one. Lightning and Hugging Face pass no step.

    Raises:
        OptionError: The run is of another type.
        MissingExtraError: wandb is not installed.
    """

    def __init__(self, run: Any = None, *, pass_step: bool = False) -> None:
        with require_extra("WandbLog", "integrations", "wandb"):
            import wandb
        if run is not None and not (hasattr(run, "log") and hasattr(run, "define_metric")):
            raise OptionError(f"run: expected what wandb.init() returns; found {short_repr(run)}")
        self._wandb, self._run, self._is_defined = wandb, run, False
        self._pass_step = pass_step

    def write(self, figures: Figures) -> None:
        """Write the figures of an interval.

        Raises:
            StateError: There is no run.
        """
        run = self._run = self._run or self._wandb.run
        if run is None:
            raise StateError("no run of wandb is active: wandb.init() before the first log")
        if not self._is_defined:
            run.define_metric(STEP, hidden=True)
            run.define_metric("gates/*", step_metric=STEP)
            self._is_defined = True
        histograms = {
            name: self._wandb.Histogram(np_histogram=(histogram.counts, histogram.edges))
            for name, histogram in figures.histograms.items()
        }
        row = {STEP: figures.step, **figures.scalars, **histograms}
        run.log(row, step=figures.step if self._pass_step else None)

    def close(self) -> None:
        """Do nothing: the run belongs to the user."""
