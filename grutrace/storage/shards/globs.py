"""Globs for paths of shards, in folders that may have brackets in their names."""

from __future__ import annotations

import glob
import os
import re

#: What makes a path a glob.
_MAGIC = re.compile(r"[*?\[]")


def is_glob(path: str) -> bool:
    """Whether a path has characters of a glob."""
    return bool(_MAGIC.search(path))


def matching_files(pattern: str) -> list[str]:
    """The files that a glob matches, in order.

    A folder that is called like a part of the glob is taken as it is: ``runs [1]`` is that folder.
    Where a name matches nothing, its brackets are taken as they are: a run that is called
    ``run[1].h5`` has shards ``run[1].rank*.h5``.
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
