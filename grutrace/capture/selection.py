"""What of the selected modules is kept, as the options ask: planned once, when a tracer is made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from grutrace.capture.deferral import defer
from grutrace.capture.options import Options
from grutrace.capture.sites import Selection
from grutrace.errors import OptionError
from grutrace.gru.partial import PartialShadow, needed
from grutrace.record import GATES, Module, Site


def narrow(selections: Sequence[Selection], options: Options) -> list[Selection]:
    """Return the selections with descriptions of what the options leave of them."""
    return [replace(each, description=_narrow(each.description, options)) for each in selections]


def _narrow(module: Module, options: Options) -> Module:
    if options.dtype is not None:
        module = replace(module, dtype=options.dtype)
    if options.units is not None:
        sites = (
            replace(site, units=_units(site, module.hidden_size, options.units))
            for site in module.sites
        )
        module = replace(module, sites=tuple(sites))
    return defer(module) if options.gates == "deferred" else module


def _units(site: Site, size: int, asked: slice | tuple[int, ...]) -> tuple[int, ...] | None:
    """Return the numbers of the units from 0, or None where that is all of them in order."""
    if isinstance(asked, slice):
        units = range(size)[asked]
        if not units:
            raise OptionError(f"units: expected some of {site.name}, which has {size}: found none")
        return None if units == range(size) else tuple(units)
    found: dict[int, int] = {}
    for number in asked:
        if not -size <= number < size:
            raise OptionError(
                f"units: expected numbers of units of {site.name}, which has {size}: found {number}"
            )
        unit = number % size
        if unit in found:
            raise OptionError(
                f"units: expected each unit of {site.name} once: found {found[unit]} and {number}"
            )
        found[unit] = number
    return None if list(found) == list(range(size)) else tuple(found)


def partial_shadow(module: Module, site: Site) -> PartialShadow | None:
    """Return what computes just what is asked for of a site; None where that is everything."""
    gates = [name for name in GATES if name in site.quantities]
    if needed(gates) == set(GATES) and site.units is None:
        return None
    units = range(module.hidden_size) if site.units is None else site.units
    stored: torch.dtype = getattr(torch, module.dtype)
    return PartialShadow(module.hidden_size, gates, units, site.reverse, stored)
