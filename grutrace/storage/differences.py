"""In what two modules differ that should be the same, in words."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from grutrace.record import Module


def module_differences(module: Module, other: Module) -> Iterator[str]:
    """What differs between two modules of the same path, sites and all."""
    place = f"module {module.path!r}"
    yield from _field_differences(place, module, other, leave_out="sites")
    names = [site.suffix for site in module.sites]
    if names != [site.suffix for site in other.sites]:
        yield difference(f"sites of {place}", names, [site.suffix for site in other.sites])
    for site, other_site in zip(module.sites, other.sites, strict=False):
        yield from _field_differences(f"site {site.name!r}", site, other_site)


def difference(place: str, before: object, now: object) -> str:
    """One difference in words."""
    return f"{place}: there {before!r}, here {now!r}"


def _field_differences(
    place: str, before: object, now: object, leave_out: str = ""
) -> Iterator[str]:
    for field in dataclasses.fields(before):  # type: ignore[arg-type]
        old, new = getattr(before, field.name), getattr(now, field.name)
        if old != new and field.name != leave_out:
            yield difference(f"{field.name} of {place}", old, new)
