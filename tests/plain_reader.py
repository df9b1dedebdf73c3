"""A reader of trace files, written from docs/format.md with plain h5py, without grutrace.

Slow and simple on purpose: loops over pieces, no cleverness, so that it can be checked by reading
it beside the specification.
"""

from __future__ import annotations

import json

import h5py
import numpy as np


class PlainTrace:
    """Everything in a trace file, read at once; with the names of its axes if ``labels``."""

    def __init__(self, path, labels=True, swmr=True):
        self.has_labels = labels
        with h5py.File(path, "r", swmr=swmr) as file:
            assert file.attrs["format"] == "grutrace"
            assert file.attrs["format_version"][0] == 1
            # Read the counts first: everything else may grow in the meantime.
            committed = file["committed"][()]
            self.closed = bool(committed["closed"])
            self.model = file.attrs["model"]
            self.created = file.attrs["created"]
            self.versions = json.loads(file.attrs["versions"])
            self.options = json.loads(file.attrs["options"])
            self.calls = file["calls"][: committed["calls"]]
            self.forks = file["forks"][: committed["forks"]]
            self.annotations = file["annotations"][: committed["annotations"]]
            self.values = file["values"][: committed["values"]]
            ends = file["strings"][: committed["strings"]]
            characters = file["characters"][: committed["characters"]]
            starts = [0, *ends[:-1]]
            self.strings = [
                bytes(characters[int(start) : int(end)]).decode("utf-8", "replace")
                for start, end in zip(starts, ends, strict=False)
            ]
            modules = [PlainModule(group, self) for group in file["modules"].values()]
        self.modules = sorted(modules, key=lambda module: module.index)
        assert [module.index for module in self.modules] == list(range(len(modules)))

    def tag(self, call):
        return self.strings[call["tag"] - 1] if call["tag"] else None


class PlainModule:
    """One module's group."""

    ATTRIBUTES = (
        *("index", "path", "kind", "type", "input_size", "hidden_size", "num_layers"),
        *("bidirectional", "bias", "batch_first", "dropout"),
    )

    def __init__(self, group, trace):
        self.index = int(group.attrs["index"])
        self.group_name = group.name.rsplit("/", 1)[1]
        self.attributes = {name: group.attrs[name] for name in self.ATTRIBUTES}
        self.path = group.attrs["path"]
        self.trace = trace
        self.calls = np.flatnonzero(trace.calls["module"] == self.index)
        pieces = group["pieces"][: int(trace.calls["batch"][self.calls].sum())]
        rows = int(pieces["steps"].sum())
        self.count = int(pieces["sequence"].max()) + 1 if len(pieces) else 0
        weights = trace.calls["weights"][self.calls]
        self.weight_versions = int(weights.max()) + 1 if len(weights) else 0
        self.pieces = self._list_pieces(pieces)
        self.sites = {
            suffix: PlainSite(site, self, rows)
            for suffix, site in group.items()
            if isinstance(site, h5py.Group)
        }

    def _list_pieces(self, pieces):
        """By sequence: (call, place in the batch, first row, steps) of its pieces in order."""
        results = {number: [] for number in range(self.count)}
        row, row_of_batch, calls = 0, 0, iter(self.calls)
        call, batch = None, 0
        for piece in pieces:
            while row_of_batch == batch:
                call = next(calls)
                batch, row_of_batch = int(self.trace.calls["batch"][call]), 0
            steps = int(piece["steps"])
            results[int(piece["sequence"])].append((int(call), row_of_batch, row, steps))
            row, row_of_batch = row + steps, row_of_batch + 1
        return results

    def annotated(self, sequence):
        """By name, {step: value}; a later value replaces an earlier one."""
        result, start = {}, 0
        for entry in self.trace.annotations:
            values = self.trace.values[start : start + int(entry["count"])]
            start += int(entry["count"])
            if (entry["module"], entry["sequence"]) == (self.index, sequence):
                steps = result.setdefault(self.trace.strings[entry["name"] - 1], {})
                for step, value in enumerate(values, int(entry["first"])):
                    steps[step] = self.trace.strings[int(value)] if entry["text"] else float(value)
        return result


class PlainSite:
    """One site's group."""

    QUANTITIES = ("reset", "update", "candidate", "hidden", "input", "gradient")
    WEIGHTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")

    def __init__(self, group, module, rows):
        self.module = module
        self.name = group.attrs["name"]
        self.suffix = group.name.rpartition("/")[2]
        self.layer = int(group.attrs["layer"])
        self.reverse = bool(group.attrs["reverse"])
        self.input_size = int(group.attrs["input_size"])
        self.rows = {name: group[name][:rows] for name in self.QUANTITIES if name in group}
        # The units that the columns of gates and states are of.
        self.units = list(group.attrs.get("units", range(module.attributes["hidden_size"])))
        self.derived = tuple(filter(None, group.attrs.get("derived", "").split(",")))
        self.labels = {}
        if module.trace.has_labels:
            self.labels = {name: [d.label for d in group[name].dims] for name in self.rows}
        self.initial = group["initial"][: module.count]
        self.checks = group["checks"][: len(module.calls)]
        self.backward = None
        if "gradient" in self.rows:
            self.backward = group["backward"][: len(module.calls)]
            assert len(self.backward) == len(module.calls)
        self.weights = {
            name: group[name][: module.weight_versions] for name in self.WEIGHTS if name in group
        }
        for name, array in self.rows.items():
            assert len(array) == rows, f"{group.name}/{name} holds less than is committed"
        assert self.initial.shape == (module.count, len(self.units))
        for name, array in self.rows.items():
            width = self.input_size if name == "input" else len(self.units)
            assert array.shape[1] == width, f"{group.name}/{name} is not as wide as it says"
        assert len(self.checks) == len(module.calls)

    def sequence(self, number, quantity):
        parts = [
            self.rows[quantity][row : row + steps]
            for _, _, row, steps in self.module.pieces[number]
        ]
        return np.concatenate(parts)

    def previous(self, number):
        hidden, initial = self.sequence(number, "hidden"), self.initial[number : number + 1]
        if self.reverse:
            return np.concatenate([hidden, initial])[1:]
        return np.concatenate([initial, hidden])[: len(hidden)]

    def read(self, number):
        """The input of a sequence: stored, or the states of the layer below."""
        if "input" in self.rows:
            return self.sequence(number, "input")
        below = [site for site in self.module.sites.values() if site.layer == self.layer - 1]
        below.sort(key=lambda site: site.reverse)
        return np.concatenate([site.sequence(number, "hidden") for site in below], axis=1)

    def derive(self, number, quantity):
        """A quantity of a sequence in float64: stored, or derived step by step."""
        if quantity in self.rows:
            return self.sequence(number, quantity)
        x = self.read(number)
        if quantity == "input":
            return x
        previous, rows = self.previous(number), []
        versions = [
            int(self.module.trace.calls["weights"][call])
            for call, _, _, steps in self.module.pieces[number]
            for _ in range(steps)
        ]
        for step, version in enumerate(versions):
            weights = {name: array[version].astype("f8") for name, array in self.weights.items()}
            i = weights["weight_ih"] @ x[step] + weights.get("bias_ih", 0)
            h = weights["weight_hh"] @ previous[step] + weights.get("bias_hh", 0)
            (i_r, i_z, i_n), (h_r, h_z, h_n) = np.split(i, 3), np.split(h, 3)
            r, z = 1 / (1 + np.exp(-i_r - h_r)), 1 / (1 + np.exp(-i_z - h_z))
            r, z = self.as_set("reset", r, number, step), self.as_set("update", z, number, step)
            n = self.as_set("candidate", np.tanh(i_n + r * h_n), number, step)
            rows.append({"reset": r, "update": z, "candidate": n}[quantity])
        return np.array(rows).reshape(len(versions), -1)

    def as_set(self, gate, values, number, step):
        """A gate at one step, with the values that an intervention has set."""
        prefix = f"grutrace:value:{self.suffix}:{gate}["
        for name, by_step in self.module.annotated(number).items():
            if name.startswith(prefix) and step in by_step:
                units = name.removeprefix(prefix).removesuffix("]").split(",")
                values[[int(unit) for unit in units]] = by_step[step]
        return values
