"""Findings about time: timescales, chaos, gradients, and change over the recording."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import numpy as np

from grutrace.analysis.comparison.stages import Stages, stages
from grutrace.analysis.dynamics.lyapunov import MIN_LENGTH, Lyapunov, lyapunov
from grutrace.analysis.engine.multiple_tests import binomial_tail, holm
from grutrace.analysis.memory.gradients import Gradients, gradients
from grutrace.analysis.memory.timescales import Timescales, timescales
from grutrace.errors import GrutraceError, MissingExtraError
from grutrace.reprs import plural
from grutrace.view.plots.axes import printable
from grutrace.view.plots.changes import plot_stages
from grutrace.view.plots.colors import QUANTITY_NAMES
from grutrace.view.plots.gradients import plot_gradients
from grutrace.view.plots.timescales import plot_timescales
from grutrace.view.report.finding import LEVEL, Finding, as_p, command, list_sites, list_units
from grutrace.view.report.pictures import draw, plot_exponents
from grutrace.view.report.proof import changes_weights
from grutrace.view.report.sample import SiteSample

#: Smallest number of steps for a statement about timescales.
MIN_STEPS = 50

#: Smallest number of stages of a run for a test of its gradients: 2^-5 is below the level.
MIN_STAGES = 5


def find_timescales(file: str, samples: list[SiteSample]) -> Finding:
    """Say how long the units keep their state."""
    finding = Finding("How long do units remember?", answers=("", "measured"))
    finding.how = (
        "The timescale is -1 over the mean of log z: the steps in which a unit forgets to 1/e. An "
        "inverse gamma distribution is fitted to the units of a site; its p-value is that of a "
        "parametric bootstrap, corrected for the number of sites (Holm)."
    )
    results: list[tuple[SiteSample, Timescales]] = []
    few = []
    for sample in samples:
        if "update" not in sample.site.site.available_quantities:
            continue
        if sample.steps < MIN_STEPS:
            few.append(sample.name)
            continue
        try:
            results.append((sample, timescales(sample.data)))
        except MissingExtraError as error:
            finding.sentences.append(f"Not computed: {error}.")
            return finding
        except GrutraceError:
            continue
    fits = holm(np.array([found.fit_p for _, found in results]))
    for (sample, found), fit_p in zip(results, fits, strict=True):
        known = np.flatnonzero(~np.isnan(found.tau))
        if not len(known):
            continue
        quantiles = np.quantile(found.tau[known], [0.1, 0.5, 0.9], method="nearest")
        low, median, high = (f"{tau:.2g}" if np.isfinite(tau) else "endless" for tau in quantiles)
        longest = known[found.tau[known].argmax()]
        tau = found.tau[longest]
        finding.state = "clear"
        text = (
            f"{printable(sample.name, 60)}: half of the units keep their state for at least "
            f"{median} steps (10 %: {low}, 90 %: {high}); unit {found.units[longest]} "
            + (f"for {tau:.3g}." if np.isfinite(tau) else "never forgot (z was 1 at every step).")
        )
        if np.isfinite(fit_p):
            fit = "does not fit" if fit_p < LEVEL else "is not rejected"
            text += f" An inverse gamma distribution {fit} ({as_p(fit_p)})."
        finding.sentences.append(text)
    if few:
        finding.sentences.append(
            f"Too little to tell at {list_sites(few)}: fewer than {MIN_STEPS} steps."
        )
    if not finding.sentences:
        finding.sentences.append("No finite update gates were recorded.")
    for sample, found in results[:1]:
        alt = f"Distribution of the timescales of the units at {sample.name}"
        finding.add_picture(draw(partial(plot_timescales, found), alt))
        finding.commands += [
            command(file, "stats {} timescales", sample, "--each"),
            command(file, "plot {} timescales", sample, "-o", "timescales.png"),
        ]
    return finding


def find_chaos(file: str, samples: list[SiteSample]) -> Finding:
    """Say which sites are chaotic along the recorded sequences."""
    finding = Finding("Is the network chaotic?", answers=("yes", "no"))
    short, results = [], list[tuple[SiteSample, Lyapunov]]()
    for sample in samples:
        lengths = np.asarray(sample.site.lengths)
        steps = min(sample.steps, int(lengths.sum()))
        # The mean length of the sequence of a step.
        if steps == 0 or (lengths**2).sum() / lengths.sum() * 0.9 < MIN_LENGTH:
            short.append(sample.name)
            continue
        try:
            found = lyapunov(sample.data)
        except GrutraceError:
            continue
        if found.chaotic is None or not np.isfinite([found.largest, found.largest_error]).all():
            short.append(sample.name)
        else:
            results.append((sample, found))
    finding.how = (
        "Largest Lyapunov exponent along the recorded sequences, with its standard error from "
        f"blocks of steps; a normal test of each side of 0 at {LEVEL:.0%}, corrected for both "
        f"sides and {plural(len(results), 'site')} (Holm). Sequences need {MIN_LENGTH} counted "
        "steps."
    )
    scores = np.array(
        [found.largest / max(found.largest_error, 1e-12) for _, found in results], np.float64
    )
    tails = np.array([[_normal_tail(score), _normal_tail(-score)] for score in scores])
    corrected = holm(tails.reshape(-1, 2))
    for (sample, found), (above, below) in zip(results, corrected, strict=True):
        exponent = f"largest exponent {found.largest:.3g} ± {found.largest_error:.1g} nats a step"
        name = printable(sample.name, 60)
        if above < LEVEL:
            finding.state = "found"
            text = (
                f"{name} is chaotic: {exponent} ({as_p(above)}). Rounding differences grow as "
                f"large as the states in about {found.horizon:.0f} steps."
            )
        elif below < LEVEL:
            text = f"{name} is not chaotic: {exponent} ({as_p(below)}). Differences shrink."
        else:
            text = f"{name}: undecided, {exponent}."
        finding.sentences.append(text)
    if results and finding.state != "found":
        finding.state = "clear"
    if short:
        finding.sentences.append(
            f"The sequences are too short to tell at {list_sites(short)}: about {MIN_LENGTH} "
            "counted steps are needed."
        )
    if not finding.sentences:
        finding.sentences.append(
            "This needs reset, update, candidate, hidden states and weights of all units, which "
            "were not recorded."
        )
    for sample, found in sorted(results, key=lambda pair: -pair[1].largest)[:1]:
        alt = f"The largest Lyapunov exponents at {sample.name}"
        finding.add_picture(draw(partial(plot_exponents, found), alt, 3.0))
        finding.commands.append(command(file, "stats {} lyapunov", sample, "--each"))
    return finding


def _normal_tail(score: float) -> float:
    """Return the probability that a standard normal value is at least this."""
    return 0.5 * math.erfc(score / math.sqrt(2))


def find_gradients(file: str, samples: list[SiteSample]) -> Finding:
    """Say where the gradient of the loss vanishes or explodes through time."""
    finding = Finding("Does the gradient vanish?", answers=("yes", "not shown"))
    recorded = [sample for sample in samples if "gradient" in sample.site.site.available_quantities]
    results: list[tuple[SiteSample, Gradients]] = []
    for sample in recorded:
        if not sample.has_whole_sequences:
            finding.sentences.append(f"{printable(sample.name, 60)}: the sequences are too long.")
            continue
        try:
            results.append((sample, gradients(sample.site)))
        except GrutraceError:
            continue
    if not recorded:
        finding.sentences.append(
            "No gradients were recorded: record=('hidden', 'gradient') records them in training."
        )
        return finding
    p_values = []
    for _, found in results:
        known = found.stage_half_life[~np.isnan(found.stage_half_life)]
        falls = np.array([np.count_nonzero(np.isfinite(known))])
        p_values.append(
            float(binomial_tail(falls, len(known), 0.5)[0]) if len(known) else float("nan")
        )
    corrected = holm(np.array(p_values))
    finding.how = (
        "The norm of dL/dh is fitted by a constant factor a step of distance from the loss, in up "
        "to ten stages of the run. Sign test that it falls in more than half of the stages, at "
        f"{LEVEL:.0%}, corrected for {plural(len(results), 'site')} (Holm)."
    )
    for (sample, found), p in zip(results, corrected, strict=True):
        name = printable(sample.name, 60)
        stage_count = np.count_nonzero(~np.isnan(found.stage_half_life))
        if stage_count < MIN_STAGES or np.isnan(found.factor):
            finding.sentences.append(
                f"{name}: too little to tell, {found.sequences} sequences with a gradient."
            )
        elif p < LEVEL and found.factor < 1:
            finding.state = "found"
            longest = len(found.norms) - 1
            finding.sentences.append(
                f"{name}: the gradient falls by a factor of {found.factor:.3g} a step and halves "
                f"every {found.half_life:.3g} steps ({as_p(p)}); over {longest} steps "
                f"{found.factor**longest:.1g} of it is left. The half-life was "
                f"{found.first_half_life:.3g} at first and {found.last_half_life:.3g} at last."
            )
        else:
            finding.state = "clear" if finding.state == "unknown" else finding.state
            finding.sentences.append(
                f"{name}: the gradient is not shown to fall (factor {found.factor:.3g} a step)."
            )
    for sample, found in results[:1]:
        alt = f"Gradient norm by distance from the loss at {sample.name}"
        finding.add_picture(draw(partial(plot_gradients, found), alt))
        finding.commands += [
            command(file, "stats {} gradients", sample),
            command(file, "plot {} gradients", sample, "-o", "gradients.png"),
        ]
    return finding


def find_course(file: str, samples: list[SiteSample]) -> Finding:
    """Say how gates moved while the weights changed."""
    finding = Finding("Did gates move over the recording?", answers=("yes", "not shown"))
    changing = [
        sample for sample in samples if changes_weights(sample) and sample.has_whole_sequences
    ]
    if not changing:
        finding.sentences.append("The weights did not change over the sequences that were read.")
        return finding
    results: list[tuple[SiteSample, Stages]] = []
    for sample in changing:
        try:
            results.append((sample, stages(sample.site)))
        except GrutraceError:
            continue
    tests = sum(len(found.p) for _, found in results)
    finding.how = (
        "Correlation between the mean of a unit in each sequence and the order of the sequences, "
        "against 999 permuted orders; the largest of all units counts, which corrects for the "
        f"units. At {LEVEL:.0%}, corrected for {tests} pairs of a site and a quantity "
        "(Bonferroni). A change of the inputs counts, too."
    )
    best: tuple[int, SiteSample, Stages, str] | None = None
    few = []
    for sample, found in results:
        if found.groups < 6:
            few.append(sample.name)
            continue
        for quantity, p in found.p.items():
            moves = p * tests < LEVEL
            count = int(np.count_nonzero(moves))
            if best is None or (count, quantity == "update") > (best[0], best[3] == "update"):
                best = count, sample, found, quantity
            if count:
                finding.state = "found"
                moved = np.where(moves, found.moved[quantity], 0.0)
                most = int(np.abs(moved).argmax())
                first, last = found.mean[quantity][[0, -1], most]
                finding.sentences.append(
                    f"{printable(sample.name, 60)}: the mean {QUANTITY_NAMES[quantity]} moved for "
                    f"{count} of {len(p)} units; most for {list_units([found.units[most]])}, from "
                    f"{first:.2f} to {last:.2f} ({as_p(p[most] * tests)})."
                )
    if few:
        finding.sentences.append(f"Too few sequences to tell at {list_sites(few)}.")
    if best is not None:
        count, sample, found, quantity = best
        if not count:
            finding.state = "clear"
            finding.sentences.insert(0, "No unit is shown to have moved.")
        alt = f"Change of the mean {quantity} of each unit at {sample.name} over the recording"
        # Sequences of a sample have other numbers in the trace.
        first_numbers = [sample.site.sequence(int(number)).original for number in found.first]
        shown = replace(found, first=np.array(first_numbers))
        finding.add_picture(draw(partial(plot_stages, shown, quantity, None), alt, 4.2))
        finding.commands += [
            command(file, "stats {} stages", sample, "--each"),
            command(file, "plot {} stages", sample, "--quantity", quantity, "-o", "stages.png"),
        ]
    return finding
