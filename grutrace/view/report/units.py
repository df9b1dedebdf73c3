"""Findings about units: stuck and constant ones, and those that follow a label."""

from __future__ import annotations

from functools import partial

import numpy as np

from grutrace.analysis.descriptive.saturation import saturation
from grutrace.analysis.descriptive.stuck_units import PART_STEPS, TYPICAL, StuckUnits, stuck_units
from grutrace.analysis.labels.selectivity import Selectivity, selectivity
from grutrace.errors import GrutraceError, NotRecordedError
from grutrace.reprs import plural
from grutrace.view.plots.axes import printable
from grutrace.view.plots.saturation import MEANINGS, plot_saturation
from grutrace.view.plots.selectivity import plot_selectivity
from grutrace.view.report.finding import (
    LEVEL,
    Finding,
    as_p,
    as_percent,
    command,
    list_sites,
    list_units,
)
from grutrace.view.report.pictures import draw
from grutrace.view.report.sample import SiteSample

#: Names of gates in sentences.
GATE_NAMES = {"reset": "a reset gate", "update": "an update gate", "candidate": "a candidate"}

#: Largest number of pairs of a site and a label that are tested.
MAX_PAIRS = 12

#: Largest number of labels of one site that are tested.
MAX_LABELS = 3


def find_stuck(file: str, samples: list[SiteSample]) -> Finding:
    """Find units with a gate that is stuck, or a state that is constant."""
    finding = Finding("Which units are stuck or constant?")
    results = []
    for sample in samples:
        try:
            results.append((sample, stuck_units(sample.data)))
        except NotRecordedError:
            continue
    tested = [(sample, found) for sample, found in results if found.enough]
    finding.how = (
        "A gate is stuck in a sequence if it is below 0.1, or above 0.9, in 99 % of its steps; a "
        "state is constant within 0.001. (Sequences are divided into parts of "
        f"{PART_STEPS} steps.) Binomial test that this holds in more than {100 * TYPICAL:.0f} % of "
        f"all sequences, at {LEVEL:.0%}; corrected for all units, gates and sides of a site (Holm) "
        f"and for {plural(len(tested), 'site')} (Bonferroni)."
    )
    counts = {}
    for sample, found in tested:
        said, count = _stuck_sentences(found, len(tested))
        finding.sentences += said[:4]
        counts[sample.name] = count
    few = [sample.name for sample, found in results if not found.enough]
    if sum(counts.values()):
        finding.state = "found"
    elif tested:
        finding.state = "clear"
        names = list_sites([sample.name for sample, _ in tested])
        finding.sentences.append(f"No unit is shown to be stuck or constant at {names}.")
    if few:
        finding.sentences.append(
            f"Too few sequences to tell at {list_sites(few)}: "
            f"{min(found.samples for _, found in results if not found.enough)} samples or more, "
            "where some 50 are needed."
        )
    if not results:
        finding.sentences.append("Neither gates nor states were recorded.")
    for sample, found in sorted(tested, key=lambda pair: -counts[pair[0].name])[:1]:
        gates = list(found.stuck)
        finding.commands.append(command(file, "stats {} stuck_units", sample, "--each"))
        if gates:
            numbers = {name: np.count_nonzero(found.stuck[name]) for name in gates}
            gate = max(gates, key=lambda name: (numbers[name], name == "update"))
            alt = f"Saturation of the {gate} of each unit at {sample.name}"
            shown = saturation(sample.data)
            finding.add_picture(draw(partial(plot_saturation, shown, gate), alt, 4.6))
            more = ("--gate", gate, "-o", "saturation.png")
            finding.commands.append(command(file, "plot {} saturation", sample, *more))
    return finding


def _stuck_sentences(found: StuckUnits, sites: int) -> tuple[list[str], int]:
    """Return what is said about a site, and the number of units that it is said about."""
    sentences, count = [], 0
    name = printable(found.site, 60)
    for gate, p in found.p.items():
        low, high = MEANINGS.get(gate, ("near 0", "saturated"))
        for side, share, meaning in (
            (-1, found.left_share[gate], f"below 0.1 ({low})"),
            (1, found.right_share[gate], f"above 0.9 ({high})"),
        ):
            chosen = (found.stuck[gate] == side) & (p * sites < LEVEL)
            if chosen.any():
                count += int(chosen.sum())
                least = share[chosen].min()
                sentences.append(
                    f"{name}: {chosen.sum()} of {len(chosen)} units have "
                    f"{GATE_NAMES[gate]} that is stuck {meaning}: "
                    f"{list_units(found.units[chosen])}, in at least {as_percent(least)} "
                    f"of {found.samples} sequences ({as_p(p[chosen].max() * sites)})."
                )
    constant = found.constant & (found.constant_p * sites < LEVEL)
    if constant.any():
        count += int(constant.sum())
        sentences.append(
            f"{name}: the hidden state of {constant.sum()} of {len(constant)} units is constant: "
            f"{list_units(found.units[constant])} "
            f"({as_p(found.constant_p[constant].max() * sites)})."
        )
    return sentences, count


def find_label_units(file: str, samples: list[SiteSample]) -> Finding:
    """Find units whose state follows a label."""
    finding = Finding("Which units follow a label?")
    pairs = [
        (sample, label)
        for sample in samples
        if "hidden" in sample.site.site.available_quantities
        # Labels first: that states follow the tokens that are read is no surprise.
        for label in sorted(sample.site.label_names, key=lambda name: name == "tokens")[:MAX_LABELS]
    ]
    left_out, pairs = len(pairs[MAX_PAIRS:]), pairs[:MAX_PAIRS]
    if not pairs:
        finding.sentences.append(
            "No labels or tokens were recorded with hidden states, so this cannot be told. Record "
            "them with tracer.recording(labels=...), or add them with trace.annotate."
        )
        return finding
    permutations = max(200, 25 * len(pairs))
    results: list[tuple[SiteSample, Selectivity]] = []
    silent = []
    for sample, label in pairs:
        try:
            results.append((sample, selectivity(sample.data, label, permutations=permutations)))
        except GrutraceError:
            silent.append(f"{sample.name}: {printable(label)}")
    finding.how = (
        f"Mutual information of the hidden state and the label, against {permutations} "
        "permutations of the labels that keep their course within sequences; the largest of all "
        f"units counts, which corrects for the units. At {LEVEL:.0%}, and corrected for "
        f"{len(results)} pairs of a site and a label (Bonferroni)."
        + (f" {left_out} further pairs were not tested." if left_out else "")
    )
    best: tuple[float, SiteSample, Selectivity] | None = None
    for sample, found in results:
        follows = found.p * len(results) < LEVEL
        count = int(np.count_nonzero(follows))
        if count:
            at = int(np.flatnonzero(found.units == found.ranking[0])[0])
            if not follows[at]:
                at = int(np.flatnonzero(follows)[np.nanargmax(found.information[follows])])
            finding.sentences.append(
                f"{printable(sample.name, 60)}: {count} of {len(follows)} units follow "
                f"{printable(found.label, 30)!r}. Unit {found.units[at]} tells most about it: "
                f"{found.information[at]:.2f} bits, by chance {found.null_mean[at]:.2f}. It is "
                f"{'larger' if found.auc[at] > 0.5 else 'smaller'} at "
                f"{printable(found.best[at], 30)!r} with a probability of "
                f"{max(found.auc[at], 1 - found.auc[at]):.2f} "
                f"({as_p(found.p[at] * len(results))})."
            )
        # A label of the user's is shown rather than the tokens.
        value = count * (0.001 if found.label == "tokens" else 1)
        if best is None or value > best[0]:
            best = value, sample, found
    if finding.sentences:
        finding.state = "found"
    elif results:
        finding.state = "clear"
        labels = sorted({printable(found.label, 30) for _, found in results})
        finding.sentences.append(
            f"No unit is shown to follow a label (tested: {', '.join(labels[:6])})."
        )
    if silent:
        finding.sentences.append(f"Not tested, as there is one value only: {list_sites(silent)}.")
    if best is not None:
        _, sample, found = best
        alt = f"Information of each unit at {sample.name} about {printable(found.label)}"
        finding.add_picture(draw(partial(plot_selectivity, found), alt))
        more = ("--label", found.label)
        finding.commands += [
            command(file, "stats {} selectivity", sample, *more, "--each"),
            command(file, "plot {} selectivity", sample, *more, "-o", "selectivity.png"),
        ]
    return finding
