"""The ratios to the untraced run that we aim at, by workload."""

from __future__ import annotations

from benchmarks.figures import Target

#: The workloads, in the order of the bounds below: their names, without the input size.
_WORKLOADS = (
    *("T128 B32 H256", "T64 B1 H128", "T256 B64 H512", "T50 B16 H64", "T100 B32 H1024"),
    *("T1 B32 H512", "T1000 B1 H64", "T512 B8 H256", "encoder-decoder", "training step"),
    "training encoder-decoder",
)

#: While the model waits.
_WAITS = (1.06, 1.08, 1.05, 1.08, 1.03, 1.10, 1.03, 1.05, 1.12, 1.03, 1.08)
TRACING: dict[str, tuple[float | None, ...]] = {
    "attached, not recording": (1.02,) * 11,
    "everything inline, in memory": (
        *(1.18, 1.20, 1.10, 1.25, 1.06, 1.20, 1.10, 1.25, 1.40, 1.08, 1.25),
    ),
    "the default, in memory": _WAITS,
    "deferred, to a file": (*_WAITS[:-1], 1.10),
}

#: With everything on disk, after the flush.
DISK: dict[str, tuple[float | None, ...]] = {
    "everything inline, to a file": (
        *(1.30, 1.30, 1.20, 1.40, 1.10, 1.40, 1.15, 1.35, 1.60, 1.15, 1.35),
    ),
    "deferred, to a file": (1.12, 1.12, 1.08, 1.15, 1.05, 1.20, 1.05, 1.12, 1.25, 1.08, 1.10),
    "deferred, every tenth call, to a file": (*[None] * 10, 1.02),
    "statistics only": (1.15, 1.20, 1.10, 1.30, 1.06, 1.25, 1.10, 1.20, 1.50, 1.10, None),
}


def target(
    bounds: dict[str, tuple[float | None, ...]], tracing: str, workload: str
) -> Target | None:
    """Return what we aim at; None if nothing was set.

    Args:
        bounds: `TRACING` or `DISK`.
        tracing: Name of the tracing.
        workload: Name of the workload.
    """
    words = [word for word in workload.split() if not word.startswith("I")]
    name = " ".join(words)
    # The longest first, since one name begins another.
    for known in sorted(_WORKLOADS, key=len, reverse=True):
        if name.startswith(known) and tracing in bounds:
            bound = bounds[tracing][_WORKLOADS.index(known)]
            return None if bound is None else Target(bound)
    return None
