"""What to store of a module whose gates are derived when they are read.

A gate follows from the weights, the layer's input and the state before the step. The states of all
layers are stored. The input of a layer above the first is the states of the layer below, so it is
stored only where it could not be had from them: where dropout may come between, or where a
direction of the layer below is not recorded.
"""

from __future__ import annotations

from dataclasses import replace

from grutrace.record import GATES, QUANTITIES, Module, Site


def defer(module: Module) -> Module:
    """Return the description of a module, its gates derived and what they follow from stored.

    Sites of which no gate is asked for are left as they are.
    """
    return replace(module, sites=tuple(_defer(module, site) for site in module.sites))


def _defer(module: Module, site: Site) -> Site:
    if not set(GATES) & set(site.quantities):
        return site
    stored = {"hidden"} if _reads_states(module, site) else {"hidden", "input"}
    return replace(
        site,
        quantities=tuple(name for name in QUANTITIES if name in stored),
        derived=tuple(name for name in site.quantities if name not in stored),
    )


def _reads_states(module: Module, site: Site) -> bool:
    """Whether the input of a site is sure to be the recorded states of the layer below."""
    below = [each for each in module.sites if each.layer == site.layer - 1]
    return len(below) == (2 if module.bidirectional else 1) and not module.dropout
