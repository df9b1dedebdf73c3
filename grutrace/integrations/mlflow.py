"""Write figures to MLflow."""

from __future__ import annotations

import re
import time
from typing import Any

from grutrace.errors import StateError, require_extra
from grutrace.integrations.figures import Figures, Histogram

#: Most metrics in one request of MLflow.
MOST_METRICS = 1000


class MLflowLog:
    """Write scalars as metrics of an MLflow run, and histograms as its artifacts.

    MLflow has no histograms. Those of an interval are one JSON file, such as
    ``gates/train/step_00000050.json``, with the edges and counts of each quantity by name.

    Args:
        run_id: Id of the run; None is the run that is active at the first log.
        client: An ``MlflowClient``; None connects to the tracking store that MLflow is set to.

    Raises:
        MissingExtraError: mlflow is not installed.
    """

    def __init__(self, run_id: str | None = None, client: Any = None) -> None:
        with require_extra("MLflowLog", "integrations", "mlflow"):
            import mlflow
        self._mlflow, self._run_id, self._client = mlflow, run_id, client
        self._files: set[str] = set()

    def write(self, figures: Figures) -> None:
        """Write the figures of an interval.

        Raises:
            StateError: There is no run.
        """
        entities = self._mlflow.entities
        if self._client is None:
            self._client = self._mlflow.MlflowClient()
        if self._run_id is None:
            run = self._mlflow.active_run()
            if run is None:
                raise StateError("no run of mlflow is active: mlflow.start_run() before the log")
            self._run_id = run.info.run_id
        now = int(time.time() * 1000)
        metrics = [
            entities.Metric(_metric_name(name), value, now, figures.step)
            for name, value in figures.scalars.items()
        ]
        for first in range(0, len(metrics), MOST_METRICS):
            self._client.log_batch(self._run_id, metrics[first : first + MOST_METRICS])
        contents = {name: _as_json(histogram) for name, histogram in figures.histograms.items()}
        self._client.log_dict(self._run_id, contents, self._new_file(figures))

    def _new_file(self, figures: Figures) -> str:
        """Return a name that no other interval has."""
        base = f"gates/{_metric_name(figures.tag)}/step_{figures.step:08}"
        name, number = f"{base}.json", 1
        while name in self._files:
            number += 1
            name = f"{base}-{number}.json"
        self._files.add(name)
        return name

    def close(self) -> None:
        """Do nothing: the run belongs to the user."""


def _metric_name(name: str) -> str:
    """Return a name in the characters that MLflow allows."""
    return re.sub(r"[^\w\-. :/]", "_", name, flags=re.ASCII)


def _as_json(histogram: Histogram) -> dict[str, Any]:
    return {
        "edges": histogram.edges.tolist(),
        "counts": histogram.counts.tolist(),
        "minimum": histogram.minimum,
        "maximum": histogram.maximum,
    }
