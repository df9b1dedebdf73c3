"""Globs for shards, in folders that may have brackets in their names."""

from __future__ import annotations

import glob
import os
import re

#: Characters that make a path a glob.
_MAGIC = re.compile(r"[*?\[]")


def is_glob(path: str) -> bool:
    """Return whether a path contains glob characters."""
    return bool(_MAGIC.search(path))


def matching_files(pattern: str) -> list[str]:
    """Return the files that match a glob, sorted.

    An existing folder takes precedence over a glob: ``runs [1]`` is the folder of that name. If a
    name matches nothing, its brackets are literal: ``run[1].rank*.h5`` matches the shards of
    ``run[1].h5``.
    """
    drive, rest = os.path.splitdrive(pattern)
    found = [drive]
    for component in re.findall(
        r"[^/\\]*[/\\]+|[^/\\]+$" if os.sep == "\\" else r"[^/]*/+|[^/]+$", rest
    ):
        found = [path for above in found for path in _matching(above, component)]
    return sorted(path for path in found if os.path.isfile(path))


def _matching(above: str, component: str) -> list[str]:
    literal = above + component
    if not is_glob(component) or os.path.lexists(literal):
        return [literal]
    within = glob.escape(above)
    return glob.glob(within + component) or glob.glob(within + component.replace("[", "[[]"))
