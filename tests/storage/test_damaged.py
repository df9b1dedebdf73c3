"""A file that is no trace, or a damaged or hostile one, gives one clear error."""

from __future__ import annotations

import random
import resource
import shutil

import h5py
import numpy as np
import pytest

from grutrace.errors import NotRecordedError, StateError, TraceFileError
from grutrace.storage.open import open_trace
from grutrace.storage.write.writer import Writer
from tests.storage.oracle import check_trace
from tests.storage.streams import full_stream

SITE = "modules/encoder.rnn/l0"


@pytest.fixture(scope="session")
def sound(tmp_path_factory):
    path = tmp_path_factory.mktemp("sound") / "run.h5"
    stream = full_stream()
    writer = Writer(path, stream.header)
    for record in stream.records:
        writer.write(record)
    writer.close()
    return path


@pytest.fixture
def path(sound, tmp_path):
    shutil.copy(sound, tmp_path / "run.h5")
    return tmp_path / "run.h5"


def replace(file, dataset_path, data=None, **options):
    del file[dataset_path]
    file.create_dataset(dataset_path, data=data, **options)


def set_field(file, dataset_path, field, index, value):
    table = file[dataset_path][:]
    table[field][index] = value
    file[dataset_path][:] = table


def set_count(file, name, value):
    counts = file["committed"][()]
    counts[name] = value
    file["committed"][()] = counts


def link_out(file, dataset_path, link):
    del file[dataset_path]
    file[dataset_path] = link


def external_storage(file):
    shape, dtype = file[SITE + "/update"].shape, file[SITE + "/update"].dtype
    del file[SITE + "/update"]
    file.create_dataset(
        SITE + "/update",
        shape=shape,
        dtype=dtype,
        external=[("/etc/passwd", 0, h5py.h5f.UNLIMITED)],
    )


def virtual(file):
    shape, dtype = file[SITE + "/update"].shape, file[SITE + "/update"].dtype
    layout = h5py.VirtualLayout(shape=shape, dtype=dtype)
    layout[:] = h5py.VirtualSource("/tmp/other.h5", "update", shape=shape)
    del file[SITE + "/update"]
    file.create_virtual_dataset(SITE + "/update", layout)


def huge_without_data(file):
    replace(
        file, "calls", shape=(10**13,), maxshape=(None,), chunks=(1000,), dtype=file["calls"].dtype
    )
    set_count(file, "calls", 10**13)


DAMAGES = {
    "no format": (lambda f: f.attrs.__delitem__("format"), "another HDF5 file"),
    "another format": (lambda f: f.attrs.__setitem__("format", "netcdf"), "another HDF5 file"),
    "newer version": (
        lambda f: f.attrs.__setitem__("format_version", np.array([2, 0])),
        r"format version 2\.0.*reads versions up to 1",
    ),
    "no version": (lambda f: f.attrs.__setitem__("format_version", "1.0"), "format_version"),
    "options that are no JSON": (lambda f: f.attrs.__setitem__("options", "{"), "options"),
    "versions that are no object": (lambda f: f.attrs.__setitem__("versions", "[]"), "versions"),
    "a number as text": (
        lambda f: f["modules/%"].attrs.__setitem__("hidden_size", "5"),
        "hidden_size",
    ),
    "derived and stored": (
        lambda f: f[SITE].attrs.__setitem__("derived", "update"),
        "l0.*derived",
    ),
    "derived of no such name": (
        lambda f: f[SITE].attrs.__setitem__("derived", "reset,forget"),
        "l0.*derived",
    ),
    "derived that is no text": (lambda f: f[SITE].attrs.__setitem__("derived", 3), "l0.*derived"),
    **{
        f"units {what}": (
            lambda f, units=units: f[SITE].attrs.__setitem__("units", units),
            r"l0.*units.*at least one of \d+ units, each once",
        )
        for what, units in {
            "as text": "0,1",
            "as one number": 1,
            "that are none": np.zeros(0, "i8"),
            "twice": np.array([1, 1]),
            "below the first": np.array([-1, 0]),
            "beyond the last": np.array([0, 99]),
            "more than there are": np.arange(99),
            "of two axes": np.array([[0]]),
        }.items()
    },
    "units of another number than there are columns": (
        lambda f: f[SITE].attrs.__setitem__("units", np.array([0])),
        "l0/",
    ),
    "an attribute missing": (lambda f: f[SITE].attrs.__delitem__("reverse"), "l0.*reverse"),
    "an index twice": (lambda f: f["modules/%"].attrs.__setitem__("index", 0), "modules"),
    "a dataset missing": (lambda f: f.__delitem__(SITE + "/checks"), "checks"),
    "no committed": (lambda f: f.__delitem__("committed"), "committed"),
    "a group as dataset": (
        lambda f: (f.__delitem__("values"), f.create_group("values")),
        "values",
    ),
    "committed of another type": (lambda f: replace(f, "committed", 3), "committed"),
    "rows of another type": (
        lambda f: replace(f, SITE + "/update", np.zeros((99, 3), "i4")),
        "l0/update",
    ),
    "rows of another width": (
        lambda f: replace(f, SITE + "/update", np.zeros((99, 4), "f4")),
        "l0/update",
    ),
    "rows in one axis": (lambda f: replace(f, SITE + "/update", np.zeros(99, "f4")), "l0/update"),
    "rows that are one number": (
        lambda f: replace(f, SITE + "/update", np.float32(0)),
        "l0/update",
    ),
    "objects as initial": (
        lambda f: replace(f, SITE + "/initial", shape=(9, 3), dtype=h5py.string_dtype()),
        "initial",
    ),
    "calls beyond the data": (lambda f: set_count(f, "calls", 1000), "calls.*1000"),
    "calls beyond all numbers": (lambda f: set_count(f, "calls", 2**64 - 1), "calls"),
    "counts without data": (huge_without_data, "calls"),
    "steps beyond the rows": (
        lambda f: set_field(f, "modules/encoder.rnn/pieces", "steps", 0, 2**32 - 1),
        "encoder.rnn",
    ),
    "batches beyond the pieces": (lambda f: set_field(f, "calls", "batch", 0, 2**32 - 1), "pieces"),
    "a sequence left out": (
        lambda f: set_field(f, "modules/encoder.rnn/pieces", "sequence", 1, 7),
        "pieces.sequence",
    ),
    "a sequence beyond all": (
        lambda f: set_field(f, "modules/encoder.rnn/pieces", "sequence", 1, 2**64 - 1),
        "pieces.sequence",
    ),
    "a first sequence that is not 0": (
        lambda f: set_field(f, "modules/%/pieces", "sequence", 0, 1),
        "pieces.sequence",
    ),
    "a module that is not there": (lambda f: set_field(f, "calls", "module", 0, 5), "calls.module"),
    "weights that are not there": (lambda f: set_field(f, "calls", "weights", 0, 99), "weight_ih"),
    "a tag that is not there": (lambda f: set_field(f, "calls", "tag", 0, 1000), "calls.tag"),
    "a name that is none": (
        lambda f: set_field(f, "annotations", "name", 0, 0),
        "annotations.name",
    ),
    "values that are not there": (
        lambda f: set_field(f, "annotations", "count", 0, 2**63),
        "annotations.count",
    ),
    "many values that are not there": (
        lambda f: set_field(f, "annotations", "count", slice(None), 15),
        "annotations.count",
    ),
    "a token that is not there": (lambda f: f["values"].__setitem__(0, 1e300), "values"),
    "a token that is no number": (lambda f: f["values"].__setitem__(0, np.nan), "values"),
    "an annotation of nothing": (
        lambda f: set_field(f, "annotations", "sequence", 0, 99),
        "annotations.sequence",
    ),
    "a parent that is not there": (
        lambda f: set_field(f, "forks", "parent", 0, 99),
        "forks.parent",
    ),
    "ends that decrease": (lambda f: f["strings"].__setitem__(0, 99), "strings"),
    "ends beyond the characters": (lambda f: f["strings"].__setitem__(-1, 2**63), "strings"),
    "an external link": (
        lambda f: link_out(f, SITE + "/update", h5py.ExternalLink("other.h5", "/x")),
        "ExternalLink",
    ),
    "an external link to a module": (
        lambda f: link_out(f, "modules/idle", h5py.ExternalLink("other.h5", "/x")),
        "ExternalLink",
    ),
    "a soft link in a circle": (
        lambda f: link_out(f, "modules/idle", h5py.SoftLink("/modules/idle")),
        "SoftLink",
    ),
    "external storage": (external_storage, "l0/update.*another file"),
    "a virtual dataset": (virtual, "l0/update.*virtual"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_one_error_with_path_and_location(path, damage):
    spoil, message = DAMAGES[damage]
    with h5py.File(path, "r+", libver=("v110", "v110")) as file:
        spoil(file)
    with pytest.raises(TraceFileError, match=message) as caught:
        open_trace(path)
    assert str(path) in str(caught.value)


def test_control_the_undamaged_file_opens(path):
    stream = full_stream()
    with open_trace(path) as trace:
        check_trace(trace, stream.header, stream.records)


def test_additions_of_a_newer_minor_version_are_ignored(path):
    stream = full_stream()
    with h5py.File(path, "r+", libver=("v110", "v110")) as file:
        file.attrs["format_version"] = np.array([1, 7])
        file.attrs["new"] = "something"
        file["new"] = [1, 2]
        file["modules/%/new"] = [1, 2]
        file[SITE + "/new"] = [1, 2]
    with open_trace(path) as trace:
        check_trace(trace, stream.header, stream.records)


@pytest.mark.parametrize("content", [b"", b"plain text", bytes(10_000)])
def test_files_that_are_not_hdf5(tmp_path, content):
    path = tmp_path / "run.h5"
    path.write_bytes(content)
    with pytest.raises(TraceFileError, match=r"run\.h5"):
        open_trace(path)


def test_missing_files_and_folders(tmp_path):
    with pytest.raises(TraceFileError, match=r"run\.h5 does not exist"):
        open_trace(tmp_path / "run.h5")
    with pytest.raises(TraceFileError, match="not a file"):
        open_trace(tmp_path)


def test_another_hdf5_file(tmp_path):
    path = tmp_path / "run.h5"
    with h5py.File(path, "w") as file:
        file["x"] = [1, 2, 3]
    with pytest.raises(
        TraceFileError, match=r"run\.h5 is not a grutrace trace \(it is another HDF5 file\)"
    ):
        open_trace(path)


@pytest.mark.parametrize("part", [0.001, 0.01, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_file(path, part):
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * part)])
    with pytest.raises(TraceFileError, match=r"run\.h5"):
        open_trace(path)


def test_flipped_bytes_never_hang(path, tmp_path):
    """Checksums protect HDF5's own structures, but not rows."""
    chance = random.Random(5)
    sound = path.read_bytes()
    refused = 0
    for _ in range(40):
        content = bytearray(sound)
        for _ in range(20):
            content[chance.randrange(12, 60_000)] ^= 1 << chance.randrange(8)
        path.write_bytes(content)
        try:
            open_trace(path).close()
        except TraceFileError:
            refused += 1
    assert refused > 0


@pytest.mark.measures
def test_damage_allocates_no_memory(path):
    """No more memory is allocated than the file could fill, whatever its counts say."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with h5py.File(path, "r+", libver=("v110", "v110")) as file:
        huge_without_data(file)
    with pytest.raises(TraceFileError, match="calls"):
        open_trace(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB


def test_a_closed_trace_is_an_error(path):
    trace = open_trace(path)
    site, rows = trace["encoder.rnn.l0"], trace["encoder.rnn.l0"].update
    trace.close()
    trace.close()
    for use in (trace.refresh, lambda: rows[0], lambda: site.sequence(0).update):
        with pytest.raises(StateError, match=r"run\.h5 is closed"):
            use()


def test_an_unrecorded_quantity_is_named_with_those_recorded(path):
    with open_trace(path) as trace:
        with pytest.raises(NotRecordedError, match=r"'encoder\.\*'.*'encoder\.rnn\.l0'"):
            trace["encoder.*"]
        with pytest.raises(NotRecordedError, match=r"'reset'.*'l0'.*update, hidden"):
            trace["l0"].reset  # noqa: B018
        with pytest.raises(NotRecordedError, match="'gate'"):
            trace["l0"].rows("gate")
        with pytest.raises(NotRecordedError, match="hidden"):
            trace["idle.l0"].padded("hidden")
        for number in (3, -4, 10**30):
            with pytest.raises(NotRecordedError, match=f"{number}.*has 3"):
                trace["l0"].sequence(number)
        for version in (1, -2):
            with pytest.raises(NotRecordedError, match=f"version {version}"):
                trace["l0"].weights(version)
        with pytest.raises(NotRecordedError, match="version -1"):
            trace["idle.l0"].weights()
        assert trace["l0"].sequence(-1).number == 2
        assert trace["encoder.rnn.l0"].sequence(0).tokens == ["the", None, None]
        assert trace["encoder.rnn.l0"].sequence(1).labels == {}
