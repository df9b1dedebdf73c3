"""Which programs read a trace file: the table of docs/other-tools.md.

    python -m tools.readers [NAME ...] [--json]

Traces of several kinds are made in a temporary folder. Each reader reads the rows of one gate from
each, in a process of its own, and the table `pieces` of the first. What it reads is compared with
h5py's values. A reader that is not installed is left out. The Python packages come from the
environment that runs this; h5dump, ncdump, ncks, gdal_translate, octave-cli and Rscript from the
PATH; h5wasm from NODE_PATH.

    pip install xarray h5netcdf netCDF4 pyfive tables silx pandas kerchunk virtualizarr hdf5plugin
    apt-get install hdf5-tools netcdf-bin nco gdal-bin octave-netcdf r-cran-ncdf4 r-bioc-rhdf5
    npm install h5wasm
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from unittest.mock import patch

import h5py
import numpy as np
import torch
from torch import nn

import grutrace
from grutrace.storage.shards.merge import merge_shards

GROUP = "modules/rnn/l0"
ROWS, TABLE = f"{GROUP}/update", "modules/rnn/pieces"

#: Seconds for one reader and file, and the result of one that takes longer.
TIMEOUT, UNFINISHED = 30, "does not finish"


class Model(nn.Module):
    """A model with a path, so that group names are plain."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(3, 8)

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        states: torch.Tensor = self.rnn(batch)[0]
        return states


def traced(path: Path, **options: object) -> None:
    model = Model()
    with grutrace.trace(model, path, **options):  # type: ignore[call-overload]
        for _ in range(3):
            model(torch.randn(20, 2, 3))


KILLED = """
import os, signal, sys
import torch, grutrace
from tools.readers import Model
model = Model()
tracer = grutrace.Tracer(model, sys.argv[1])
tracer.start()
for _ in range(3):
    model(torch.randn(20, 2, 3))
tracer.flush()
os.kill(os.getpid(), signal.SIGKILL)
"""


#: Kinds that no option makes. Types with names are tried here only: docs/format.md says why.
OTHER_KINDS = ("named types", "merged", "copied", "killed")


def make_files(folder: Path) -> dict[str, Path]:
    """By kind, a trace."""
    kinds: dict[str, dict[str, object]] = {
        "plain": {},
        "checksums": {"checksums": True},
        "gzip": {"compression": "gzip"},
        "blosc2": {"compression": "blosc2"},
        "float16": {"dtype": "float16"},
    }
    files = {kind: folder / f"{kind}.h5" for kind in (*kinds, *OTHER_KINDS)}
    for kind, options in kinds.items():
        traced(files[kind], **options)
    with named_types():
        traced(files["named types"])
    for rank in range(2):
        traced(folder / "shard.h5", shard=(rank, 2))
    shards = sorted(folder.glob("shard.rank*.h5"))
    merge_shards(shards, files["merged"])
    merge_shards(shards, files["copied"], copy=True)
    subprocess.run([sys.executable, "-c", KILLED, str(files["killed"])], check=False)
    return files


@contextmanager
def named_types() -> Iterator[None]:
    """Give the types of tables names in the file: netCDF-C 4.9 shows no table without."""
    original = h5py.Group.create_dataset

    def create(
        group: h5py.Group,
        name: str,
        *,
        dtype: object = None,
        data: object = None,
        **options: object,
    ) -> h5py.Dataset:
        found = np.dtype(dtype or getattr(data, "dtype", None))
        if found.names:
            # An upper case letter, so that types come before the datasets.
            type_name = f"Type_{'_'.join(found.names)}"
            if type_name not in group.file:
                group.file[type_name] = found
            dtype = group.file[type_name]
        return original(group, name, dtype=dtype, data=data, **options)

    with patch.object(h5py.Group, "create_dataset", create):
        yield


def expected_rows(path: Path) -> list[float]:
    with h5py.File(path, "r", swmr=path.stem == "killed") as file:
        rows = file[ROWS][()].astype(float)
    return summary(rows)


def summary(rows: np.ndarray) -> list[float]:
    """All values, the first row and the last row, as sums."""
    return [float(part.sum()) for part in (rows, rows[0], rows[-1])]


PYTHON = """
import json, sys, warnings
warnings.simplefilter("ignore")
path, what = sys.argv[1:]
GROUP, ROWS, TABLE = {paths!r}
def show(values):
    if what == "table":
        values = [(int(s), int(n)) for s, n in values]
        print(json.dumps([len(values), sum(n for _, n in values)]))
    else:
        rows = values.astype("f8")
        print(json.dumps([float(part.sum()) for part in (rows, rows[0], rows[-1])]))
name = TABLE if what == "table" else ROWS
{code}
"""

#: By name, the lines of a Python reader; they call `show` with rows, or entries of the table.
PYTHON_READERS = {
    "h5py": """
import h5py
try:
    import hdf5plugin
except ImportError:
    pass
show(h5py.File(path)[name][()])""",
    "h5py, on a Python file object": """
import h5py
show(h5py.File(open(path, "rb"))[name][()])""",
    "xarray, engine h5netcdf": """
import xarray
group, _, variable = name.rpartition("/")
show(xarray.open_dataset(path, group=group, engine="h5netcdf")[variable].values)""",
    "xarray, engine netcdf4": """
import xarray
group, _, variable = name.rpartition("/")
show(xarray.open_dataset(path, group=group, engine="netcdf4")[variable].values)""",
    "netCDF4": """
import netCDF4
variable = netCDF4.Dataset(path)[name]
variable.set_auto_mask(False)
show(variable[:])""",
    "pyfive": """
import pyfive
show(pyfive.File(path)[name][:])""",
    "PyTables": """
import tables
node = tables.open_file(path).get_node("/" + name)
show(node.read())""",
    "pandas.read_hdf": """
import pandas
frame = pandas.read_hdf(path, "/" + name)
show(frame[["sequence", "steps"]].to_numpy() if what == "table" else frame.to_numpy())""",
    "silx": """
import silx.io
show(silx.io.open(path)[name][()])""",
    "kerchunk": """
import kerchunk.hdf, xarray
references = kerchunk.hdf.SingleHdf5ToZarr(path, inline_threshold=0).translate()
group, _, variable = name.rpartition("/")
store = xarray.open_dataset(references, engine="kerchunk", group=group)
show(store[variable].values)""",
    "VirtualiZarr": """
import virtualizarr, xarray, zarr
from obspec_utils.registry import ObjectStoreRegistry
from obstore.store import LocalStore
from virtualizarr.parsers import HDFParser
registry = ObjectStoreRegistry({"file://": LocalStore()})
group, _, variable = name.rpartition("/")
store = HDFParser(group=group)("file://" + path, registry)
show(zarr.open_group(store, mode="r")[variable][...])""",
}

OCTAVE = """
pkg load netcdf
path = argv(){1};
x = double(ncread(path, "/%s"));
printf("[%%.9g, %%.9g, %%.9g]\\n", sum(x(:)), sum(x(:, 1)), sum(x(:, end)));
"""

R = """
library(ncdf4)
x <- ncvar_get(nc_open(commandArgs(TRUE)[1]), "%s")
cat(sprintf("[%%.9g, %%.9g, %%.9g]\\n", sum(x), sum(x[, 1]), sum(x[, ncol(x)])))
"""

RHDF5 = """
library(rhdf5)
path <- commandArgs(TRUE)[1]
if (commandArgs(TRUE)[2] == "table") {
  x <- h5read(path, "%s")
  cat(sprintf("[%%d, %%d]\\n", nrow(x), sum(as.numeric(x$steps))))
} else {
  x <- h5read(path, "%s")
  cat(sprintf("[%%.9g, %%.9g, %%.9g]\\n", sum(x), sum(x[, 1]), sum(x[, ncol(x)])))
}
"""

H5WASM = """
const path = process.argv[2], what = process.argv[3];
import(process.env.NODE_PATH + "/h5wasm/dist/node/hdf5_hl.js").then(async (h5wasm) => {
  await h5wasm.ready;
  const file = new h5wasm.File(path, "r");
  const set = file.get(what === "table" ? "%s" : "%s");
  if (what === "table") {
    const rows = set.to_array();
    console.log(JSON.stringify([rows.length, rows.reduce((s, r) => s + Number(r[1]), 0)]));
  } else {
    const x = Array.from(set.value), n = set.shape[1];
    const sum = (a) => a.reduce((s, v) => s + v, 0);
    console.log(JSON.stringify([sum(x), sum(x.slice(0, n)), sum(x.slice(-n))]));
  }
});
"""


@dataclass(frozen=True)
class Reader:
    """A reader that is no Python package: its command, and how its output gives numbers."""

    program: str
    command: Callable[[Path, str], list[str]]
    parse: Callable[[str, str], list[float]]


def numbers_between(start: str, end: str) -> Callable[[str, str], list[float]]:
    """Parse the dump of a dataset: numbers of rows, or pairs of a table."""

    def parse(output: str, what: str) -> list[float]:
        found = re.search(f"(?:{start})(.*?)(?:{end})", output, re.S)
        text = found[1] if found else ""
        if what == "table":
            pairs = re.findall(r"\{\s*(\d+),\s*(\d+)\s*\}", text)
            return [len(pairs), sum(int(steps) for _, steps in pairs)]
        values = np.array([float(word) for word in re.findall(r"-?\d+\.?\d*(?:e[-+]?\d+)?", text)])
        return summary(values.reshape(-1, 8))

    return parse


def parse_json(output: str, what: str) -> list[float]:
    del what
    result: list[float] = json.loads(output.strip().splitlines()[-1])
    return result


def parse_xyz(output: str, what: str) -> list[float]:
    del what
    values = np.array([float(line.split()[2]) for line in output.splitlines()])
    return summary(values.reshape(-1, 8))


def dump_path(what: str) -> str:
    return TABLE if what == "table" else ROWS


PROGRAMS = {
    "h5dump": Reader(
        "h5dump",
        lambda path, what: [
            *("h5dump", "-y", "-w", "0", "-m", "%.9g"),
            *("-d", f"/{dump_path(what)}", str(path)),
        ],
        numbers_between("DATA {", "ATTRIBUTE|$"),
    ),
    "ncdump": Reader(
        "ncdump",
        lambda path, what: [
            *("ncdump", "-p", "9,17", "-v", f"/{dump_path(what)}", str(path)),
        ],
        numbers_between("update =|pieces =", ";"),
    ),
    "NCO, ncks": Reader(
        "ncks",
        lambda path, what: [
            *("ncks", "--trd", "-H", "-C", "-s", "%.9g\n"),
            *("-g", os.path.dirname(dump_path(what)), "-v", os.path.basename(dump_path(what))),
            str(path),
        ],
        numbers_between("^", "$"),
    ),
    "GDAL": Reader(
        "gdal_translate",
        lambda path, what: [
            *("gdal_translate", "-q", "-of", "XYZ"),
            *(f'HDF5:"{path}"://{dump_path(what)}', "/vsistdout/"),
        ],
        parse_xyz,
    ),
    "GNU Octave, ncread": Reader(
        "octave-cli",
        lambda path, what: ["octave-cli", "-q", script(OCTAVE % dump_path(what), "m"), str(path)],
        parse_json,
    ),
    "R, ncdf4": Reader(
        "Rscript",
        lambda path, what: ["Rscript", script(R % dump_path(what), "R"), str(path)],
        parse_json,
    ),
    "R, rhdf5": Reader(
        "Rscript",
        lambda path, what: ["Rscript", script(RHDF5 % (TABLE, ROWS), "R"), str(path), what],
        parse_json,
    ),
    "h5wasm": Reader(
        "node",
        lambda path, what: ["node", script(H5WASM % (TABLE, ROWS), "js"), str(path), what],
        parse_json,
    ),
}
READERS = (*PYTHON_READERS, *PROGRAMS)


def script(text: str, ending: str) -> str:
    """A file with this text."""
    with tempfile.NamedTemporaryFile("w", suffix=f".{ending}", delete=False) as file:
        file.write(text)
    return file.name


def read(name: str, path: Path, what: str) -> tuple[list[float] | None, str]:
    """What a reader reads, or None and its error."""
    if name in PYTHON_READERS:
        code = PYTHON.replace("{paths!r}", repr((GROUP, ROWS, TABLE)))
        code = code.replace("{code}", PYTHON_READERS[name])
        command = [sys.executable, "-c", code, str(path), what]
        parse = parse_json
    else:
        command, parse = PROGRAMS[name].command(path, what), PROGRAMS[name].parse
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    except subprocess.TimeoutExpired:
        return None, UNFINISHED
    if done.returncode < 0:
        return None, "the process ends"
    lines = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
    lines = [line for line in lines if re.search("error", line, re.IGNORECASE)][-1:] or lines
    if done.returncode:
        return None, f"refused: {lines[-1][:100]}".replace(
            str(path), path.name
        ) if lines else "refused"
    try:
        return parse(done.stdout, what), ""
    except (ValueError, IndexError):
        return None, f"refused: {lines[-1][:100]}" if lines else "prints nothing"


def is_installed(name: str, path: Path) -> bool:
    if name in PROGRAMS and shutil.which(PROGRAMS[name].program) is None:
        return False
    found, error = read(name, path, "rows")
    return found is not None or not re.search(
        r"No module named|Cannot find module|there is no package", error
    )


def cell(name: str, path: Path, what: str) -> str:
    found, error = read(name, path, what)
    if found is None:
        return error
    if what == "table":
        with h5py.File(path) as file:
            expected = [float(len(file[TABLE])), float(file[TABLE]["steps"].sum())]
    else:
        expected = expected_rows(path)
    # JSON has no NaN.
    found = [np.nan if value is None else value for value in found]
    is_equal = len(found) == len(expected) and np.allclose(found, expected, rtol=1e-5, atol=1e-4)
    return "ok" if is_equal else f"wrong: {found}"


def main(arguments: list[str]) -> None:
    names = [argument for argument in arguments if argument != "--json"] or list(READERS)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        files = make_files(Path(folder))
        table = {}
        for name in names:
            if not is_installed(name, files["plain"]):
                print(f"{name} is not installed", file=sys.stderr)
                continue
            plain = cell(name, files["plain"], "rows")
            table[name] = dict.fromkeys((*files, "tables", "tables, named types"), plain)
            if plain != UNFINISHED:
                table[name] = {kind: cell(name, path, "rows") for kind, path in files.items()}
                table[name]["tables"] = cell(name, files["plain"], "table")
                table[name]["tables, named types"] = cell(name, files["named types"], "table")
            if "--json" not in arguments:
                print(f"{name} ({date.today()})", flush=True)
                for kind, result in table[name].items():
                    print(f"    {kind:20}{result}", flush=True)
        if "--json" in arguments:
            print(json.dumps(table, indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])
