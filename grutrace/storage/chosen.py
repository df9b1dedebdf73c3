"""Which sites and quantities of a trace are asked for: globs for names of sites, names."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from grutrace.errors import GLOBS, OptionError, brief, nearest, texts_of
from grutrace.record import QUANTITIES, Site
from grutrace.storage.moment import Moment


def chosen_sites(moment: Moment, globs: str | Sequence[str] | None) -> dict[str, tuple[int, Site]]:
    """By name, in the model's order: the place of the module in the header, and the site.

    Args:
        moment: Of the trace.
        globs: A glob, or several; None for all sites.

    Raises:
        OptionError: It is none of these.
    """
    asked = None if globs is None else texts_of("sites", globs, GLOBS)
    return {
        site.name: (number, site)
        for number, module in enumerate(moment.header.modules)
        for site in module.sites
        if asked is None or any(fnmatchcase(site.name, glob) for glob in asked)
    }


def chosen_quantities(record: str | Sequence[str] | None) -> tuple[str, ...]:
    """The quantities asked for, in the order of `QUANTITIES`; None for all.

    Raises:
        OptionError: One is none.
    """
    if record is None:
        return QUANTITIES
    asked = texts_of("record", record, f"some of {', '.join(QUANTITIES)}")
    for name in asked:
        if name not in QUANTITIES:
            raise OptionError(
                f"record: expected some of {', '.join(QUANTITIES)}; found {brief(name)}"
                f"{nearest(name, QUANTITIES)}"
            )
    return tuple(name for name in QUANTITIES if name in asked)
