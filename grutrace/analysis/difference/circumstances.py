"""How two traces were made otherwise: weights, mode, batches, types, versions, options."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from grutrace.analysis.difference.correspondence import Pair, Side
from grutrace.analysis.difference.discrepancies import Circumstance, WeightsDifference
from grutrace.analysis.distance import differences
from grutrace.record import Array
from grutrace.storage.moment import Moment

#: Floating-point types by their spacing at 1, as the file has it.
_TYPES = {2.0**-52: "float64", 2.0**-23: "float32", 2.0**-10: "float16", 2.0**-7: "bfloat16"}

_MISSING = "none"


def weights_difference(pair: Pair) -> WeightsDifference | None:
    """Compare the weights of a site, version by version; None where all are equal.

    Versions correspond by their number. Both must have the same sizes.
    """
    a, b = pair.a.trace, pair.b.trace
    first: WeightsDifference | None = None
    versions = 0
    for version in range(min(a.extent.versions, b.extent.versions)):
        found = _differing(a.name, version, a.weights(version), b.weights(version))
        versions += found is not None
        first = first or found
    return first and replace(first, versions=versions)


def _differing(
    site: str, version: int, a: Mapping[str, Array], b: Mapping[str, Array]
) -> WeightsDifference | None:
    """Where the weights that both have differ most; None if all are equal."""
    found: tuple[float, WeightsDifference | None] = 0.0, None
    for name in (each for each in a if each in b):
        off = differences(a[name].astype(np.float64), b[name].astype(np.float64))
        if not off.size:
            continue
        place = np.unravel_index(int(off.argmax()), off.shape)
        if off[place] > found[0]:
            values = float(a[name][place]), float(b[name][place])
            found = float(off[place]), WeightsDifference(site, version, 1, name, *values)
    return found[1]


def of_traces(a: Moment, b: Moment) -> Iterator[Circumstance]:
    """Yield what differs between the traces as wholes."""
    yield from _unequal("model", a.header.model, b.header.model)
    for name in dict.fromkeys([*a.header.versions, *b.header.versions]):
        texts = (each.header.versions.get(name, _MISSING) for each in (a, b))
        yield from _unequal(name, *texts)
    for name in dict.fromkeys([*a.header.options, *b.header.options]):
        # Every run has an id of its own.
        if name != "run":
            yield from _unequal(f"option {name}", *(_option(each, name) for each in (a, b)))


def _option(moment: Moment, name: str) -> str:
    options: Mapping[str, Any] = moment.header.options
    return json.dumps(options[name]) if name in options else _MISSING


def of_modules(a: Side, b: Side) -> Iterator[Circumstance]:
    """Yield what differs between the calls of a module, of which these are the same site."""
    path = f"{a.module.path}: " if a.module.path else ""
    yield from _unequal(f"{path}class", a.module.type, b.module.type)
    yield from _unequal(f"{path}dropout", str(a.module.dropout), str(b.module.dropout))
    yield from _unequal(f"{path}calls in training mode", *map(_training, (a, b)))
    yield from _unequal(f"{path}batches", *map(_batches, (a, b)), same=_same_batches(a, b))
    versions = (str(side.moment.extent(side.number).versions) for side in (a, b))
    yield from _unequal(f"{path}versions of the weights", *versions)
    yield from _unequal(f"{path}tags", *map(_tags, (a, b)))


def of_sites(pair: Pair) -> Iterator[Circumstance]:
    """Yield what differs between the types of a site, and whether its input was recorded."""
    name = pair.a.site.name
    yield from _unequal(f"{name}: computed in", *map(_precisions, (pair.a, pair.b)))
    kept = (side.module.dtype for side in (pair.a, pair.b))
    yield from _unequal(f"{name}: kept as", *kept)
    yield from _unequal(f"{name}: input", *map(_input, (pair.a, pair.b)))


def _input(side: Side) -> str:
    return "recorded" if "input" in side.site.readable else "not recorded"


def _unequal(what: str, a: str, b: str, *, same: bool | None = None) -> Iterator[Circumstance]:
    if not (a == b if same is None else same):
        yield Circumstance(what, a, b)


def _training(side: Side) -> str:
    training = side.moment.tables.calls["training"][side.index.call_numbers] > 0
    if not training.any():
        return "none"
    return "all" if training.all() else f"{training.sum()} of {len(training)}"


def _sizes(side: Side) -> Array:
    return np.asarray(side.moment.tables.calls["batch"][side.index.call_numbers])


def _same_batches(a: Side, b: Side) -> bool:
    return np.array_equal(_sizes(a), _sizes(b))


def _batches(side: Side) -> str:
    sizes = _sizes(side)
    if not len(sizes):
        return "no calls"
    size = str(sizes[0]) if (sizes == sizes[0]).all() else f"{sizes.min()} to {sizes.max()}"
    return f"{len(sizes)} call{'s' * (len(sizes) > 1)} of {size}"


def _tags(side: Side) -> str:
    tags = dict.fromkeys(side.moment.tags[side.index.call_numbers].tolist())
    return ", ".join("none" if tag is None else repr(tag) for tag in tags)


def _precisions(side: Side) -> str:
    found = np.unique(side.trace.checks["precision"]).tolist()
    return ", ".join(_TYPES.get(each, f"a spacing of {each:g}") for each in found)
