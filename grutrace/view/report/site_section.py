"""The section of a site: what it holds, and pictures of its gates and states."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
from matplotlib.axes import Axes

from grutrace.analysis.descriptive.geometry import geometry
from grutrace.analysis.descriptive.saturation import saturation
from grutrace.analysis.memory.autocorrelation import autocorrelation
from grutrace.analysis.memory.decomposition import memory_map
from grutrace.storage.read.trace import Trace
from grutrace.view.plots.heatmap import plot_heatmap
from grutrace.view.plots.memory import plot_memory_map
from grutrace.view.plots.saturation import plot_saturation
from grutrace.view.plots.timescales import plot_autocorrelation
from grutrace.view.plots.trajectories import plot_trajectories
from grutrace.view.report.finding import command
from grutrace.view.report.pictures import Picture, draw
from grutrace.view.report.sample import SiteSample

#: Steps of the sequence that is drawn.
MAX_STEPS = 60


@dataclass(frozen=True)
class SiteSection:
    """What the report says about one site.

    Attributes:
        name: Name of the site.
        facts: By name, a fact about the site.
        pictures: Pictures, each with the command that draws it, or an empty text.
    """

    name: str
    facts: dict[str, str]
    pictures: list[tuple[Picture, str]]


def describe_site(trace: Trace, file: str, sample: SiteSample) -> SiteSection:
    """Collect the facts and pictures of a site."""
    site = trace[sample.name]
    residual = site.residual if len(site.checks) else float("nan")
    facts = {
        "sequences and steps": sample.text,
        "units": f"{site.module.hidden_size}"
        + ("" if site.units is None else f", {len(site.units)} of them recorded"),
        "recorded": ", ".join(site.site.quantities),
        "computed when read": ", ".join(site.site.derived) or "nothing",
        "labels": ", ".join(site.label_names) or "none",
        "versions of the weights": f"{site.extent.versions}",
        "largest residual": "not computed" if np.isnan(residual) else f"{residual:.2g}",
    }
    return SiteSection(sample.name, facts, _pictures(file, sample))


def _pictures(file: str, sample: SiteSample) -> list[tuple[Picture, str]]:
    site, name = sample.site, sample.name
    quantities = site.site.available_quantities
    lengths = np.asarray(site.lengths)
    if not lengths.sum():
        return []
    # The first sequence that fits and is not very short, or the first of all.
    fitting = np.flatnonzero((lengths >= 5) & (lengths <= MAX_STEPS))
    number = int(fitting[0]) if len(fitting) else int(lengths.argmax())
    shown = ("--sequence", str(number), "--steps", f"0:{MAX_STEPS}")
    plots: list[tuple[bool, Callable[[Axes], object], str, tuple[str, ...]]] = []
    for quantity in ("update", "hidden"):
        plots.append(
            (
                quantity in quantities,
                partial(_heatmap, sample, quantity, number),
                f"Heatmap of {quantity} of every unit at {name}, by step",
                ("heatmap", "--quantity", quantity, *shown),
            )
        )
    gate = next((name for name in ("update", "reset", "candidate") if name in quantities), None)
    plots += [
        (
            {"update", "candidate", "hidden"} <= set(quantities) and lengths[number] <= MAX_STEPS,
            lambda ax: plot_memory_map(site, memory_map(site, number), ax),
            f"What each step wrote into each state at {name}",
            ("memory_map", "--sequence", str(number)),
        ),
        (
            gate is not None,
            lambda ax: plot_saturation(saturation(sample.data), gate or "", ax),
            f"Saturation of the {gate} of every unit at {name}",
            ("saturation", "--gate", gate or ""),
        ),
        (
            "hidden" in quantities,
            lambda ax: plot_autocorrelation(autocorrelation(sample.data, 200), ax),
            f"Autocorrelation of the hidden states at {name}",
            ("autocorrelation", "--lags", "200"),
        ),
        (
            "hidden" in quantities and bool((lengths <= 1000).any()),
            lambda ax: plot_trajectories(
                site,
                geometry(sample.data),
                sequences=np.flatnonzero(lengths <= 1000)[:6].tolist(),
                ax=ax,
            ),
            f"Hidden states at {name} in two principal components",
            ("trajectories",),
        ),
    ]
    pictures = []
    for possible, plot, alt, words in plots:
        picture = draw(plot, alt, 4.2) if possible else None
        if picture is not None:
            text = command(file, f"plot {{}} {words[0]}", sample, *words[1:], "-o", "picture.png")
            pictures.append((picture, text))
    return pictures


def _heatmap(sample: SiteSample, quantity: str, number: int, ax: Axes) -> None:
    plot_heatmap(sample.site, quantity, number, steps=slice(0, MAX_STEPS), ax=ax)
