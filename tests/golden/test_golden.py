"""Files of every released format version can be read and appended to.

What must be in them was worked out without grutrace when they were made: see `make.py`.
"""

from __future__ import annotations

import json
import lzma
import re
from pathlib import Path

import h5py
import numpy as np
import pytest

import grutrace
from grutrace.__main__ import main
from grutrace.analysis.verification.verify import verify
from tests.golden import make
from tests.golden.acted import ACTED, SCALE, STEPS, layer, train
from tests.golden.runs import EVERYTHING, GOLDENS
from tests.oracles import GATES
from tests.plain_reader import PlainTrace
from tests.statistics.test_file import plain_read

FOLDERS = sorted(Path(__file__).parent.glob("v*"))

#: What a file must hold, where another one holds the same.
SAME = {"killed": "deferred"}

#: Of the parts of a run, as one trace.
PARTS = {1: ("run.part0001", ""), 2: ("run.part0002", "Speaker.")}


@pytest.fixture(params=FOLDERS, ids=lambda folder: folder.name)
def goldens(request):
    return request.param


def unpack(goldens, name, folder):
    path = folder / f"{name}.h5"
    path.write_bytes(lzma.decompress((goldens / f"{name}.h5.xz").read_bytes()))
    return path


def expected(goldens, name):
    with np.load(goldens / f"{SAME.get(name, name)}.npz") as file:
        arrays = dict(file)
    return json.loads(str(arrays.pop("said"))), arrays


def sites_of(arrays):
    """By site, its arrays."""
    sites = {}
    for key, array in arrays.items():
        # A path may hold a slash: what comes after the suffix does not.
        site, name = re.fullmatch(r"(.*?[.](?:cell|l\d+(?:_reverse)?))/(.*)", key).groups()
        sites.setdefault(site, {})[name] = array
    return sites


def check_rows(quantity, rows_read, of_site, rows, columns):
    """States and inputs bit for bit; gates as the equations have them, to rounding."""
    exact = of_site[quantity][rows]
    exact = exact if quantity == "input" else exact[:, columns]
    if quantity in GATES:
        bound = of_site[f"{quantity}_bound"][rows][:, columns]
        # The gates are rounded once more to the type that they are kept in.
        bound = bound + np.finfo(rows_read.dtype).eps
        assert rows_read.shape == exact.shape
        assert (np.abs(rows_read.astype("f8") - exact) <= bound).all()
    else:
        np.testing.assert_array_equal(rows_read, exact)


def check_site(of_site, units, read):
    """Every sequence; `read` gives rows of a quantity, the initial state, the weights."""
    columns = slice(None) if units is None else units
    ends = np.cumsum(of_site["lengths"])
    for number, end in enumerate(ends.tolist()):
        rows = slice(end - int(of_site["lengths"][number]), end)
        for quantity in EVERYTHING if "input" in read.recorded else EVERYTHING[:-1]:
            check_rows(quantity, read.rows(number, quantity), of_site, rows, columns)
        np.testing.assert_array_equal(read.initial(number), of_site["initial"][number][columns])
    for key, array in of_site.items():
        if key.startswith("weights/"):
            _, version, name = key.split("/")
            np.testing.assert_array_equal(read.weights(int(version))[name], array)


class Ours:
    """One site as grutrace reads it."""

    def __init__(self, site):
        self.site, self.weights, self.recorded = site, site.weights, site.site.available_quantities

    def rows(self, number, quantity):
        return self.site.sequence(number).rows(quantity)

    def initial(self, number):
        return self.site.sequence(number).initial


class Appended(Ours):
    """What was appended to one site, as grutrace reads it.

    Args:
        site: The site.
        before: How many sequences it had.
        versions: The number of the first version of the weights that it used.
    """

    def __init__(self, site, before, versions):
        super().__init__(site)
        self.before = before
        self.weights = lambda version: site.weights(versions + version)

    def rows(self, number, quantity):
        return super().rows(self.before + number, quantity)

    def initial(self, number):
        return super().initial(self.before + number)


class Plain:
    """One site as the independent reader reads it."""

    def __init__(self, site):
        self.site, self.recorded = site, (*site.rows, *site.derived)

    def rows(self, number, quantity):
        return np.asarray(self.site.derive(number, quantity), self.site.initial.dtype)

    def initial(self, number):
        return self.site.initial[number]

    def weights(self, version):
        return {name: array[version] for name, array in self.site.weights.items()}


def check_ours(trace, said, arrays):
    """Everything that grutrace shows of a golden file."""
    sites = sites_of(arrays)
    assert set(trace.sites) == set(sites)
    for name, of_site in sites.items():
        assert trace[name].lengths[: len(of_site["lengths"])].tolist() == list(of_site["lengths"])
        check_site(of_site, said.get("units"), Ours(trace[name]))
    for call, row in zip(said["calls"], trace.calls, strict=False):
        assert {name: row[name] for name in call} == call
    for path, forks in said.get("forks", {}).items():
        for number, parent, steps in forks:
            sequence = trace[next(s for s in sites if s.startswith(path))].sequence(number)
            assert (sequence.parent, sequence.parent_steps) == (parent, steps)
    for path, number, named in said.get("annotations", []):
        sequence = trace[next(s for s in sites if s.startswith(path))].sequence(number)
        labels = {name: nones(values) for name, values in sequence.labels.items()}
        result = labels | ({"tokens": sequence.tokens} if sequence.tokens else {})
        assert result == named


def nones(values):
    if isinstance(values, list):
        return values
    return [None if np.isnan(value) else value for value in values.tolist()]


def check_plain(path, said, arrays):
    """Everything that a reader written from the specification reads."""
    plain, sites = PlainTrace(path), sites_of(arrays)
    results = {site.name: site for module in plain.modules for site in module.sites.values()}
    assert set(results) == set(sites)
    for name, of_site in sites.items():
        check_site(of_site, said.get("units"), Plain(results[name]))
    paths = {module.index: module.path for module in plain.modules}
    for call, row in zip(said["calls"], plain.calls, strict=False):
        assert (paths[row["module"]], plain.tag(row)) == (call["module"], call["tag"])
        for name in ("weights", "training", "batch"):
            assert row[name] == call[name]
    for module in plain.modules:
        forks = plain.forks[plain.forks["module"] == module.index]
        listed = [list(fork)[1:] for fork in forks.tolist()]
        exact = [list(fork) for fork in said.get("forks", {}).get(module.path, [])]
        assert listed[: len(exact)] == exact
    for path_, number, named in said.get("annotations", []):
        (module,) = (module for module in plain.modules if module.path == path_)
        steps = module.annotated(number)
        assert {
            name: [steps[name].get(step) for step in range(len(values))]
            for name, values in named.items()
        } == named
    return plain


@pytest.mark.parametrize("name", GOLDENS)
def test_a_golden_file_is_read(goldens, name, tmp_path):
    path = unpack(goldens, name, tmp_path)
    message, arrays = expected(goldens, name)
    with grutrace.open(path) as trace:
        check_ours(trace, message, arrays)
        assert len(trace.calls) == len(message["calls"])
        assert trace.closed is (name != "killed")
        assert all(check.holds and check.check for check in verify(trace))
    plain = check_plain(path, message, arrays)
    assert plain.closed is (name != "killed")
    for command in ("info", "stats", "verify"):
        assert main([command, str(path), "--json"]) == 0


@pytest.mark.parametrize("name", [name for name in GOLDENS if name != "killed"])
def test_a_golden_file_can_be_appended_to(goldens, name, tmp_path):
    """The old content stays. The new content equals PyTorch's results on this processor."""
    again = tmp_path / "again"
    again.mkdir()
    path, golden = unpack(goldens, name, tmp_path), GOLDENS[name]
    message, arrays = expected(goldens, name)
    model = golden.build()
    with grutrace.Tracer(model, path, mode="a", recording=False, **golden.options) as tracer:
        golden.run(model, tracer.recording)
    now = sites_of(make.about(golden)[0])
    with grutrace.open(path) as trace, grutrace.open(unpack(goldens, name, again)) as old:
        check_ours(trace, message, arrays)
        for site in trace.sites:
            before = len(old[site])
            # The weights that the file ended with are not stored again.
            made = {key.split("/")[1] for key in now[site] if key.startswith("weights/")}
            versions = trace[site].extent.versions - len(made)
            assert versions in (old[site].extent.versions, old[site].extent.versions - 1)
            assert len(trace[site]) == 2 * before
            check_site(now[site], message.get("units"), Appended(trace[site], before, versions))
            for first, second in zip(old[site], list(trace[site])[before:], strict=True):
                assert len(first) == len(second)
                assert (first.tokens, first.tag) == (second.tokens, second.tag)
        assert all(check.holds for check in verify(trace))
    check_plain(path, message, arrays)


def test_a_golden_run_of_parts_is_one_trace(goldens, tmp_path):
    first = unpack(goldens, "run", tmp_path)
    unpack(goldens, "run.part0002", tmp_path)
    message, arrays = [], {}
    for name, prefix in PARTS.values():
        of_part, own = expected(goldens, name)
        message.append(of_part["calls"])
        arrays |= {f"{prefix}{key}": array for key, array in own.items()}
    with grutrace.open(first) as trace:
        check_ours(trace, {"calls": []}, arrays)
        # The two models were called in turn.
        assert trace.calls["module"].tolist() == ["rnn", "Speaker.rnn"] * 2
        assert trace.calls["steps"][::2].tolist() == [call["steps"] for call in message[0]]
        assert trace.calls["steps"][1::2].tolist() == [call["steps"] for call in message[1]]
    for part, (name, _) in PARTS.items():
        path = first if part == 1 else tmp_path / f"run.part{part:04}.h5"
        check_plain(path, *expected(goldens, name))


def test_control_a_killed_writer_leaves_uncommitted_rows(goldens, tmp_path):
    """The file contains rows that must not be read."""
    path = unpack(goldens, "killed", tmp_path)
    with h5py.File(path, "r", swmr=True) as file:
        counted = int(file["committed"][()]["calls"])
        assert counted == len(expected(goldens, "killed")[0]["calls"])
        assert len(file["calls"]) > counted


def test_golden_statistics_can_be_read(goldens, tmp_path):
    """Against NumPy over the values of PyTorch and the equations from when the file was written."""
    path = unpack(goldens, "statistics", tmp_path)
    message, arrays = expected(goldens, "decoder")
    ((name, of_site),) = sites_of(arrays).items()
    figures, counted = plain_read(path)
    loaded = grutrace.Statistics.load(path)
    bins = int(counted["bins"])
    module, _, quantities = figures[name]
    steps = int(of_site["lengths"].sum())
    assert module.item() == (len(message["calls"]), len(of_site["lengths"]), steps, 1)
    assert (loaded.calls, loaded.steps) == (len(message["calls"]), steps)
    for quantity, (units, histogram) in quantities.items():
        values = of_site[quantity][:, message["units"]].astype("f8")
        off = of_site.get(f"{quantity}_bound", np.zeros(1)).max()
        low = 0.0 if quantity in ("reset", "update") else -1.0
        # No value is so near an edge that rounding could put it into either bin.
        edges = np.linspace(low, 1, bins + 1)[1:-1]
        assert np.abs(values[..., None] - edges).min() > off
        exact = np.array([np.histogram(column, bins, (low, 1))[0] for column in values.T])
        ours = getattr(loaded[name], quantity)
        assert histogram.tolist() == exact.tolist() == ours.histogram.tolist()
        for mean in (units["mean"], ours.mean):
            np.testing.assert_allclose(mean, values.mean(axis=0), rtol=0, atol=off + 1e-15)
        variance = values.var(axis=0)
        np.testing.assert_allclose(units["squares"] / steps, variance, rtol=0, atol=4 * off + 1e-15)
        np.testing.assert_allclose(ours.variance, variance, rtol=0, atol=4 * off + 1e-15)
    assert main(["stats", str(path)]) == 0
    goes_on = grutrace.Statistics(path, mode="a", bins=bins)
    model, golden = GOLDENS["decoder"].build(), GOLDENS["decoder"]
    with grutrace.Tracer(model, sink=goes_on, recording=False, **golden.options) as tracer:
        golden.run(model, tracer.recording)
    assert grutrace.Statistics.load(path).steps == 2 * steps


def test_control_one_bit_is_detected(goldens, tmp_path):
    path = unpack(goldens, "inline", tmp_path)
    message, arrays = expected(goldens, "inline")
    with h5py.File(path, "r+") as file:
        rows = file["modules/both/l0/hidden"]
        rows[2, 1] = np.nextafter(rows[2, 1], np.float32(2))
    with grutrace.open(path) as trace, pytest.raises(AssertionError):
        check_ours(trace, message, arrays)
    with pytest.raises(AssertionError):
        check_plain(path, message, arrays)


def test_control_a_wrong_gate_is_detected(goldens, tmp_path):
    path = unpack(goldens, "deferred", tmp_path)
    message, arrays = expected(goldens, "deferred")
    arrays["rnn.l1_reverse/update"][0, 0] += 1e-4
    with grutrace.open(path) as trace, pytest.raises(AssertionError):
        check_ours(trace, message, arrays)
    with pytest.raises(AssertionError):
        check_plain(path, message, arrays)


def set_version(path, major, minor):
    with h5py.File(path, "r+") as file:
        file.attrs["format_version"] = np.array([major, minor])


def test_a_newer_minor_version_is_read(goldens, tmp_path):
    path, statistics = unpack(goldens, "inline", tmp_path), unpack(goldens, "statistics", tmp_path)
    for file_path in (path, statistics):
        set_version(file_path, 1, 2**40)
        with h5py.File(file_path, "r+") as file:
            file["something_new"] = [1, 2]
    with grutrace.open(path) as trace:
        check_ours(trace, *expected(goldens, "inline"))
    assert grutrace.Statistics.load(statistics).calls == 4


@pytest.mark.parametrize("version", [(2, 0), (2**62, 3)])
def test_a_newer_major_version_is_refused_by_name(goldens, tmp_path, version, capsys):
    path, statistics = unpack(goldens, "inline", tmp_path), unpack(goldens, "statistics", tmp_path)
    major, minor = version
    golden = GOLDENS["inline"]
    message = rf"format version {major}\.{minor}.*reads versions up to 1.*upgrade grutrace"
    for file_path, use in (
        (path, lambda: grutrace.open(path)),
        (path, lambda: grutrace.Tracer(golden.build(), path, mode="a", **golden.options)),
        (statistics, lambda: grutrace.Statistics.load(statistics)),
        (statistics, lambda: grutrace.Statistics(statistics, mode="a")),
    ):
        set_version(file_path, major, minor)
        before = file_path.read_bytes()
        with pytest.raises(grutrace.TraceFileError, match=message) as caught:
            use()
        assert str(file_path) in str(caught.value)
        assert "damaged" not in str(caught.value)
        assert file_path.read_bytes() == before
    assert main(["info", str(path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("version", [(0, 9), (-1, 0)])
def test_an_unknown_version_is_refused(goldens, tmp_path, version):
    path = unpack(goldens, "inline", tmp_path)
    set_version(path, *version)
    with pytest.raises(grutrace.TraceFileError, match="format_version"):
        grutrace.open(path)


def test_there_are_golden_files():
    assert [folder.name for folder in FOLDERS][:1] == ["v1.0"]
    for folder in FOLDERS:
        assert {path.name for path in folder.glob("*.xz")} >= {
            f"{name}.h5.xz" for name in (*GOLDENS, "run", "run.part0002", "statistics")
        }


@pytest.fixture(params=[folder for folder in FOLDERS if (folder / "set.h5.xz").exists()])
def acted(request):
    """A folder with files of gradients and of set gates."""
    return request.param


def unpack_acted(folder, name, tmp_path):
    if not (folder / f"{name}.h5.xz").exists():
        pytest.skip(f"{folder.name} has no such file")
    with np.load(folder / f"{name}.npz") as file:
        return unpack(folder, name, tmp_path), dict(file)


def test_golden_gradients_can_be_read(acted, tmp_path):
    path, exact = unpack_acted(acted, "gradients", tmp_path)
    plain = PlainTrace(path).modules[0].sites["l0"]
    for found in (grutrace.open(path)["l0"]["gradient"][:], plain.rows["gradient"]):
        np.testing.assert_allclose(found, exact["gradient"], rtol=1e-6, atol=1e-6)
    assert plain.backward["attached"].astype(bool).tolist() == exact["attached"].tolist()
    assert plain.backward["scale"].tolist() == exact["scale"].tolist()
    with grutrace.open(path) as trace:
        for name in ("attached", "scale"):
            assert trace.calls[name].tolist() == exact[name].tolist()
        sequence, rows = trace["l0"].sequence(0), exact["gradient"] / SCALE
        # The states of the first call: what arrived at its end came from the call after it, too.
        np.testing.assert_allclose(sequence.gradient("hidden")[2], rows[2], rtol=1e-5)
        sources = sequence.gradient_sources(2)
        np.testing.assert_allclose(sources[2:4].sum(0), rows[2], rtol=1e-5)
        assert not sources[4:].any()
        assert all(check.holds for check in verify(trace))


@pytest.mark.parametrize("name", ["set", "set_deferred"])
def test_golden_set_gates_can_be_read(acted, name, tmp_path):
    path, exact = unpack_acted(acted, name, tmp_path)
    (module,) = PlainTrace(path).modules
    plain = module.sites["l0"]
    assert set(exact) == {*GATES, "hidden"}
    with grutrace.open(path) as trace:
        for quantity, values in exact.items():
            read = np.concatenate([plain.derive(number, quantity) for number in (2, 3)])
            for rows in (trace["l0"][quantity][8:], read):
                np.testing.assert_allclose(rows, values, rtol=0, atol=1e-5)
        assert trace.calls["set"].tolist() == [None, "l0: update[1,3]"]
        label = [None, "update[1,3]", "update[1,3]", None]
        assert trace["l0"].sequence(2).labels["grutrace:set:l0"] == label
        steps = module.annotated(3)["grutrace:set:l0"]
        assert steps == {step: "update[1,3]" for step in STEPS}
        kind = "derived" if name == "set_deferred" else "gates"
        assert all(check.holds and check.check == kind for check in verify(trace))


@pytest.mark.parametrize("name", ACTED)
def test_golden_files_of_acting_can_be_appended_to(acted, name, tmp_path):
    path, _ = unpack_acted(acted, name, tmp_path)
    before = grutrace.open(path)
    old = {quantity: before["l0"].rows(quantity)[:] for quantity in before["l0"].site.quantities}
    calls = before.calls
    before.close()
    record = ("update", "gradient") if name == "gradients" else EVERYTHING
    model, gates = layer(), "deferred" if name == "set_deferred" else "auto"
    with grutrace.trace(model, path, mode="a", record=record, gates=gates):
        train(model)
    with grutrace.open(path) as trace:
        count = len(calls)
        for column in calls.dtype.names:
            np.testing.assert_array_equal(trace.calls[column][:count], calls[column])
        assert len(trace.calls) == count + 4
        for quantity, rows in old.items():
            np.testing.assert_array_equal(trace["l0"][quantity][: len(rows)], rows)
        if name == "gradients":
            appended = trace["l0"]["gradient"][len(rows) :]
            np.testing.assert_allclose(appended, rows, rtol=1e-5, atol=1e-5)
