"""Whether the gates of the trace are proven."""

from __future__ import annotations

import numpy as np

from grutrace.errors import GrutraceError
from grutrace.storage.read.trace import Trace
from grutrace.view.report.finding import Finding, command, list_sites
from grutrace.view.report.sample import SiteSample


def find_proof(trace: Trace, file: str, samples: list[SiteSample]) -> Finding:
    """Say which calls are proven, and which sites have a residual beyond the tolerance."""
    finding = Finding("Are the gates proven?", answers=("no", "yes"))
    finding.how = (
        "Not a statistical test. A call is proven if its gates reproduce the states of the kernel "
        "within the tolerance of rounding; all calls are counted."
    )
    finding.commands.append(command(file, "verify {}"))
    calls = trace.calls
    if not len(calls):
        finding.sentences.append("The trace has no calls.")
        return finding
    unproven = calls["proof"] == "unproven"
    unchecked = int(np.count_nonzero(calls["proof"] == "unchecked"))
    off = []
    for sample in samples:
        checks = trace[sample.name].checks
        with np.errstate(invalid="ignore"):
            if (checks["residual"] > checks["tolerance"]).any():
                off.append(f"{sample.name} ({np.nanmax(checks['residual']):.2g})")
    if unproven.any():
        modules = sorted({str(module) for module in calls["module"][unproven]})
        finding.state = "found"
        finding.sentences.append(
            f"{np.count_nonzero(unproven):,} of {len(calls):,} calls are unproven: no recorded "
            f"version of the weights reproduces their states. Modules: {list_sites(modules)}."
        )
    if off:
        finding.state = "found"
        finding.sentences.append(
            f"The residual exceeds the tolerance at {list_sites(off)}: the gates do not explain "
            "the states there."
        )
    if unchecked:
        finding.sentences.append(
            f"{unchecked:,} of {len(calls):,} calls are unchecked: their gates are computed when "
            "they are read. The command checks them."
        )
    if not finding.sentences:
        finding.state = "clear"
        residual = np.nanmax(calls["residual"]) if np.isfinite(calls["residual"]).any() else np.nan
        largest = f" The largest residual is {residual:.2g}." if np.isfinite(residual) else ""
        finding.sentences.append(f"All {len(calls):,} calls are proven.{largest}")
    return finding


def changes_weights(sample: SiteSample) -> bool:
    """Whether the weights of a site changed during the recording."""
    try:
        return sample.site.extent.versions > 1
    except GrutraceError:
        return False
