"""Streams of records, written by hand or drawn, with values that encode their position."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from hypothesis import strategies as st

from grutrace.records import (
    DEFAULT_RECORD,
    QUANTITIES,
    AnnotationRecord,
    CallRecord,
    Fork,
    ModuleInfo,
    Record,
    Site,
    SiteRows,
    TraceHeader,
    WeightsRecord,
)


def make_module(
    path="rnn",
    *,
    hidden=3,
    width=2,
    layers=1,
    directions=(False,),
    record=DEFAULT_RECORD,
    derived=(),
    bias=True,
    dtype="float32",
    kind="GRU",
):
    dot = "." if path else ""
    sites = []
    for layer in range(layers):
        for reverse in directions:
            suffix = "cell" if kind == "GRUCell" else f"l{layer}" + "_reverse" * reverse
            read = width if layer == 0 else hidden * len(directions)
            name = path + dot + suffix
            sites.append(Site(name, suffix, layer, reverse, read, tuple(record), tuple(derived)))
    return ModuleInfo(
        path=path,
        kind=kind,
        type=f"torch.nn.modules.rnn.{kind}",
        input_size=width,
        hidden_size=hidden,
        num_layers=layers,
        bidirectional=len(directions) == 2,
        bias=bias,
        batch_first=False,
        dropout=0.25,
        dtype=dtype,
        weights_dtype="float32",
        sites=tuple(sites),
    )


def make_header(*modules, **changes):
    fields = {
        "model": "tests.Model",
        "created": 1.5e9,
        "versions": {"torch": "2.13", "python": "3.11"},
        "options": {"record": list(DEFAULT_RECORD), "every": 1},
        "modules": tuple(modules),
    }
    return TraceHeader(**{**fields, **changes})


class Stream:
    """Builds a consistent list of records."""

    def __init__(self, header: TraceHeader, seed: int = 0) -> None:
        self.header = header
        self.records: list[Record] = []
        self.begun = [0] * len(header.modules)
        self.versions = [0] * len(header.modules)
        self._random = np.random.default_rng(seed)

    def numbers(self, shape, dtype):
        return self._random.standard_normal(shape).astype(dtype)

    def weights(self, module=0):
        kind = self.header.modules[module]
        sites = {}
        for site in kind.sites:
            stacked = 3 * kind.hidden_size
            shapes = {"weight_ih": (stacked, site.input_size), "weight_hh": (stacked, stacked // 3)}
            if kind.bias:
                shapes |= {"bias_ih": (stacked,), "bias_hh": (stacked,)}
            sites[site.suffix] = {
                name: self.numbers(shape, kind.weights_dtype) for name, shape in shapes.items()
            }
        record = WeightsRecord(module, self.versions[module], sites)
        self.versions[module] += 1
        return self._keep(record)

    def call(self, steps, *, module=0, go_on=None, tag=None, forks=(), weights=-1, training=False):
        """Add a call. `go_on` has the sequence that each batch row continues; None begins one."""
        if not self.versions[module]:
            self.weights(module)
        kind = self.header.modules[module]
        first = self.begun[module]
        numbers = []
        for sequence in go_on if go_on is not None else [None] * len(steps):
            if sequence is None:
                sequence = self.begun[module]
                self.begun[module] += 1
            numbers.append(sequence)
        rows = sum(steps)
        layer_inputs = {}
        sites = {}
        for site in kind.sites:
            arrays = {}
            for quantity in site.quantities:
                shape = (rows, site.input_size if quantity == "input" else kind.hidden_size)
                arrays[quantity] = self.numbers(shape, kind.dtype)
            if "input" in arrays:
                arrays["input"] = layer_inputs.setdefault(site.layer, arrays["input"])
            initial = self.numbers((self.begun[module] - first, kind.hidden_size), kind.dtype)
            residual, tolerance = (abs(float(x)) for x in self.numbers(2, "float32"))
            sites[site.suffix] = SiteRows(arrays, initial, residual, tolerance, 2.0**-23)
        record = CallRecord(
            module=module,
            time=1.6e9 + len(self.records) / 8,
            tag=tag,
            training=training,
            weights=weights % self.versions[module],
            steps=np.array(steps, np.uint32),
            sequences=np.array(numbers, np.uint64),
            sites=sites,
            forks=tuple(forks),
        )
        return self._keep(record)

    def annotate(self, sequence, name, values, *, module=0, first=0):
        return self._keep(AnnotationRecord(module, sequence, name, first, tuple(values)))

    def _keep(self, record):
        self.records.append(record)
        return record


ODD_PATHS = ("", "a/b", "100%", ".", "..", "x.y", "ключ", "a b\n", "%2E", "A", "a")


def full_stream() -> Stream:
    """A stream with everything that the format can hold."""
    modules = [
        make_module("encoder.rnn", layers=2, directions=(False, True), record=QUANTITIES),
        make_module("decoder/step", kind="GRUCell", dtype="float64", bias=False),
        make_module("", record=("update", "hidden"), hidden=5, dtype="float16"),
        make_module("idle", record=("input",)),
        make_module("deferred", record=("hidden", "input"), derived=("reset", "candidate")),
    ]
    stream = Stream(make_header(*modules))
    stream.call([3, 1, 4], tag="valid")
    for number, word in enumerate(("the", "a", "the")):
        stream.annotate(number, "tokens", [word] * (number + 1))
    stream.call([1] * 4, module=1, training=True, tag="décode \U0001f642")
    stream.call([1] * 4, module=1, go_on=[0, 1, 2, 3])
    stream.annotate(2, "pos", [1.5, -2.0], module=1, first=1)
    stream.call([1] * 3, module=1, go_on=[3, 0, 1])
    stream.weights(1)
    stream.call([2, 1], module=1, go_on=[None, 1], forks=[Fork(4, 0, 2)])
    stream.annotate(1, "pos", [9.0], module=1, first=2)
    stream.annotate(1, "kind", ["x", ""], module=1)
    stream.call([], module=1)
    stream.call([0, 2], tag="")
    stream.call([7], module=2, tag="valid")
    stream.call([5, 0, 1], module=2, go_on=[0, None, None])
    stream.annotate(2, "tokens", [], module=2)
    stream.call([2, 3], module=4)
    return stream


@st.composite
def drawn_modules(draw):
    paths = draw(st.lists(st.sampled_from(ODD_PATHS), min_size=1, max_size=3, unique=True))
    modules = []
    for path in paths:
        directions = draw(st.sampled_from([(False,), (True,), (False, True)]))
        quantities = draw(st.lists(st.sampled_from(QUANTITIES), unique=True))
        others = [name for name in QUANTITIES if name not in quantities]
        derived = []
        if others and "hidden" in quantities:
            derived = draw(st.lists(st.sampled_from(others), unique=True))
        modules.append(
            make_module(
                path,
                hidden=draw(st.integers(1, 4)),
                width=draw(st.integers(1, 3)),
                layers=draw(st.integers(1, 2)),
                directions=directions,
                record=sorted(quantities, key=QUANTITIES.index),
                derived=sorted(derived, key=QUANTITIES.index),
                bias=draw(st.booleans()),
                dtype=draw(st.sampled_from(["float16", "float32", "float64"])),
            )
        )
    return modules


@st.composite
def drawn_streams(draw):
    stream = Stream(make_header(*draw(drawn_modules())), seed=draw(st.integers(0, 9)))
    for _ in range(draw(st.integers(0, 12))):
        module = draw(st.integers(0, len(stream.header.modules) - 1))
        action = draw(st.sampled_from(["call", "call", "call", "weights", "annotate"]))
        if action == "weights":
            stream.weights(module)
        elif action == "annotate" and stream.begun[module]:
            _draw_annotation(draw, stream, module)
        else:
            _draw_call(draw, stream, module)
    return stream


def _draw_call(draw, stream, module):
    begun = stream.begun[module]
    go_on = []
    if begun and not any(site.reverse for site in stream.header.modules[module].sites):
        go_on = draw(st.lists(st.integers(0, begun - 1), unique=True, max_size=4))
    go_on = draw(st.permutations([*go_on, *[None] * draw(st.integers(0, 3))]))
    steps = [draw(st.integers(0, 3)) for _ in go_on]
    forks = []
    if None in go_on and begun and draw(st.booleans()):
        forks = [Fork(begun, draw(st.integers(0, begun - 1)), draw(st.integers(0, 3)))]
    tag = draw(st.none() | st.text(max_size=4))
    stream.call(
        steps, module=module, go_on=go_on, tag=tag, forks=forks, training=draw(st.booleans())
    )


def _draw_annotation(draw, stream, module):
    name = draw(st.sampled_from(["tokens", "pos", "名"]))
    number = st.floats(allow_nan=False, width=32)
    values = draw(st.lists(st.text(max_size=3), max_size=4) | st.lists(number, max_size=4))
    sequence = draw(st.integers(0, stream.begun[module] - 1))
    stream.annotate(sequence, name, values, module=module, first=draw(st.integers(0, 4)))


def batches(records: list[Record], count: int) -> Iterator[list[Record]]:
    """Split the records into this many parts."""
    for part in np.array_split(np.arange(len(records)), count):
        yield [records[index] for index in part]
