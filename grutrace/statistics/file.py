"""The file of running statistics, specified by docs/format.md."""

from __future__ import annotations

import contextlib
import math
import os
import threading
import time
from pathlib import Path
from typing import Any, TypeAlias

import h5py
import numpy as np

from grutrace.errors import TraceFileError, as_path, require_one_of
from grutrace.options import OPTIONS
from grutrace.records import QUANTITIES, Array
from grutrace.statistics.accumulator import CHECK_DTYPE, MODULE_DTYPE, Accumulator, SiteLayout
from grutrace.statistics.histogram import ALLOWED_BINS
from grutrace.statistics.moments import UNIT_DTYPE
from grutrace.storage.format.attributes import check_version, format_of, require_format
from grutrace.storage.format.schema import STATISTICS_FORMAT
from grutrace.storage.hdf5.atomic_write import fsync_directory, fsync_file, publish, temporary_path
from grutrace.storage.hdf5.errors import (
    FormatError,
    require,
    translate_read_errors,
    translate_write_errors,
)
from grutrace.storage.hdf5.locks import HeldFile
from grutrace.storage.hdf5.safe_access import get_member, has_member, require_local_data
from grutrace.storage.hdf5.safe_open import open_for_reading
from grutrace.storage.write.claims import Claim, require_unclaimed
from grutrace.storage.write.overwrite import require_replaceable

#: Major and minor version. A reader refuses a newer major version; a newer minor version only adds
#: data.
VERSION = (1, 0)

TOTALS_DTYPE = np.dtype(
    [("created", "<f8"), ("saved", "<f8"), ("bins", "<i8"), ("annotations", "<i8")]
)
SITE_DTYPE = np.dtype(
    [("module", "<i8"), *((name, CHECK_DTYPE[name]) for name in CHECK_DTYPE.names or ())]
)

_KIND = "grutrace statistics file"


class StatisticsFile:
    """A statistics file that is replaced atomically, so that it can be read at any time.

    Args:
        path: Path of the file.
        mode: "w" refuses an existing path, "overwrite" replaces it, "a" continues from its counts.
        fsync: Whether to fsync each new file before it replaces the previous one.

    Raises:
        OptionError: The mode is none of these.
        TraceFileError: The file exists and may not be replaced, another writer uses it, or its
            folder does not exist.
    """

    def __init__(self, path: str | os.PathLike[str], mode: str, *, fsync: bool = False) -> None:
        require_one_of("mode", mode, OPTIONS["mode"].values)
        self.path = Path(os.path.realpath(path))
        self._continues = mode == "a" and self.path.exists()
        self._mode = "overwrite" if self._continues else mode
        self._fsync = fsync
        self._lock = threading.Lock()
        self._claim: Claim | None = None
        self._writers = 0
        # Status of the file that may be replaced, once known.
        self._expected_status: _Status | None = None
        require_unclaimed(self.path)
        temporary_path(self.path, self._mode)
        if self._mode == "overwrite":
            require_replaceable(self.path)

    def load_existing(self) -> Accumulator | None:
        """Load the counts to continue from; None if there are none.

        Raises:
            TraceFileError: The file is not a statistics file, or is damaged.
        """
        if not self._continues:
            return None
        self._expected_status = _status(self.path)
        return load(self.path)

    def acquire(self) -> None:
        """Claim the path for writing until `release` was called as often as `acquire`.

        Raises:
            TraceFileError: Another writer uses the path.
        """
        with self._lock:
            if not self._writers:
                self._claim = Claim(self.path)
                try:
                    if self._mode == "overwrite":
                        require_replaceable(self.path)
                except BaseException:
                    self._claim.release()
                    raise
            self._writers += 1

    def release(self) -> None:
        """Undo one `acquire`; the last one gives up the claim."""
        with self._lock:
            self._writers -= 1
            if not self._writers and self._claim is not None:
                self._claim.release()
                self._claim = None

    def save(self, accumulator: Accumulator) -> None:
        """Write a new file and rename it to the path. The caller has acquired the path.

        Raises:
            TraceFileError: It cannot be written, or the file is not the one that was written last.
                The previous file is unchanged.
        """
        with self._lock:
            self._require_in_place()
            new = temporary_path(self.path, self._mode)
            held = None
            try:
                with translate_write_errors(self.path, "written"):
                    self._write_bytes(_image(accumulator, new), new)
                    held, own = HeldFile.of(new), _status(new)
                self._require_in_place()
                publish(new, self.path, self._mode)
            except BaseException:
                if held is not None:
                    held.close()
                with contextlib.suppress(OSError):
                    new.unlink(missing_ok=True)
                raise
            if held is not None and self._claim is not None:
                self._claim.hold(held)
            # From now on this instance owns the file.
            self._mode, self._expected_status = "overwrite", own

    def require_in_place(self) -> None:
        """Check that the file is still the one that was written last.

        Raises:
            TraceFileError: It was deleted, or replaced by another.
        """
        with self._lock:
            self._require_in_place()

    def _require_in_place(self) -> None:
        if self._expected_status is None:
            return
        try:
            status = _status(self.path)
        except FileNotFoundError:
            raise TraceFileError(
                f"{self.path} was deleted or moved while it was written: nothing more can be "
                "written to it"
            ) from None
        except OSError:
            return
        if status != self._expected_status:
            raise TraceFileError(
                f"{self.path} was replaced by another file while it was written: nothing more can "
                "be written to it"
            )

    def sync_directory(self) -> None:
        """If requested, fsync the directory, so that the new name survives a loss of power.

        Raises:
            TraceFileError: The fsync failed; the file is there all the same.
        """
        if self._fsync:
            with translate_write_errors(self.path, "written"):
                fsync_directory(self.path)

    def _write_bytes(self, image: bytes, new: Path) -> None:
        with new.open("xb") as file:
            file.write(image)
            if self._fsync:
                file.flush()
                fsync_file(file.fileno())


#: Device, inode, size and modification time. A file is never changed after it was renamed.
_Status: TypeAlias = tuple[int, int, int, int]


def _status(path: Path) -> _Status:
    status = path.stat()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _image(accumulator: Accumulator, new: Path) -> bytes:
    """Return the bytes of a new file.

    The image is built in memory, because HDF5 never closes a file whose end it could not write.
    """
    with h5py.File(new, "w", driver="core", backing_store=False) as file:
        _write(file, accumulator)
        file.flush()
        return bytes(file.id.get_file_image())


def _write(file: h5py.File, accumulator: Accumulator) -> None:
    file.attrs["format"] = STATISTICS_FORMAT
    file.attrs["format_version"] = np.array(VERSION, "<i8")
    file.attrs["model"] = accumulator.model
    counted = (accumulator.created, time.time(), accumulator.bins, accumulator.annotations)
    file["counted"] = np.array(counted, TOTALS_DTYPE)
    file["modules"] = accumulator.modules
    sites = file.create_group("sites")
    for number, site in enumerate(accumulator.layout):
        group = sites.create_group(str(number))
        group.attrs["name"] = site.name
        group["site"] = np.array((site.module, *accumulator.checked[number].item()), SITE_DTYPE)
        for quantity, counts in accumulator.accumulators[number].items():
            location = group.create_group(quantity)
            location["units"] = counts.units
            if counts.histogram.shape[1]:
                location["histogram"] = counts.histogram


def is_statistics(path: str | os.PathLike[str]) -> bool:
    """Return whether a file is marked as a statistics file. False if it cannot be read."""
    try:
        with translate_read_errors(Path(path)), open_for_reading(Path(path)) as file:
            return format_of(file) == STATISTICS_FORMAT
    except TraceFileError:
        return False


def load(path: str | os.PathLike[str]) -> Accumulator:
    """Read a statistics file. All its contents are validated.

    Raises:
        TraceFileError: It is missing, not a statistics file, of a newer format, or damaged.
    """
    path = as_path(path)
    with translate_read_errors(path, _KIND), open_for_reading(path, _KIND) as file:
        return _Reader(file, path.stat().st_size).read()


class _Reader:
    """Reads a file, and never more data in total than the file can hold."""

    def __init__(self, file: h5py.File, size: int) -> None:
        self._file = file
        self._left = size

    def read(self) -> Accumulator:
        file = self._file
        _check_format(file)
        counted = self._array(file, "counted", TOTALS_DTYPE, ())
        bins, annotations = int(counted["bins"]), int(counted["annotations"])
        require(bins in ALLOWED_BINS, "counted.bins", f"one of {ALLOWED_BINS}", bins)
        require(annotations >= 0, "counted.annotations", "no negative number", annotations)
        modules = self._array(file, "modules", MODULE_DTYPE, (None,))
        _check_counts(modules, "modules")
        sites = get_member(file, "sites", h5py.Group)
        groups = [get_member(sites, str(number), h5py.Group) for number in range(len(sites))]
        read = [self._site(group, len(modules), bins) for group in groups]
        accumulator = Accumulator(
            _text(file, "model"),
            float(counted["created"]),
            [layout for layout, _, _ in read],
            bins,
        )
        require(
            len(accumulator.modules) == len(modules),
            "modules",
            f"{len(accumulator.modules)}, as the sites name",
            len(modules),
        )
        accumulator.modules, accumulator.annotations = modules, annotations
        for number, (_, checked, accumulators) in enumerate(read):
            for name in CHECK_DTYPE.names or ():
                accumulator.checked[number][name] = checked[name]
            for quantity, (units, histogram) in accumulators.items():
                counts = accumulator.accumulators[number][quantity]
                counts.units, counts.histogram = units, histogram
        return accumulator

    def _site(
        self, group: h5py.Group, modules: int, bins: int
    ) -> tuple[SiteLayout, Array, dict[str, tuple[Array, Array]]]:
        site = self._array(group, "site", SITE_DTYPE, ())
        module = int(site["module"])
        require(0 <= module < modules, f"{group.name}/site", f"a module below {modules}", module)
        accumulators = {
            quantity: self._counts(get_member(group, quantity, h5py.Group), bins)
            for quantity in QUANTITIES
            if has_member(group, quantity)
        }
        widths = tuple((quantity, len(units)) for quantity, (units, _) in accumulators.items())
        return SiteLayout(_text(group, "name"), module, widths), site, accumulators

    def _counts(self, group: h5py.Group, bins: int) -> tuple[Array, Array]:
        units = self._array(group, "units", UNIT_DTYPE, (None,))
        location = f"{group.name}/units"
        _check_counts(units, location)
        if group.name.endswith("/input"):
            return units, np.zeros((len(units), 0), np.int64)
        histogram = self._array(group, "histogram", np.dtype("<i8"), (len(units), bins))
        require((histogram >= 0).all(), f"{group.name}/histogram", "no negative number", "one")
        total = histogram.sum(axis=1) + units["underflow"] + units["overflow"]
        wrong = total != units["count"]
        require(
            not wrong.any(), location, "a count that its histogram adds up to", units[wrong][:1]
        )
        return units, histogram

    def _array(
        self, group: h5py.Group, name: str, dtype: np.dtype[Any], shape: tuple[int | None, ...]
    ) -> Array:
        """Read a dataset of this type and shape from this file; None is any length."""
        dataset = get_member(group, name, h5py.Dataset)
        location = f"{group.name.rstrip('/')}/{name}"
        require_local_data(dataset, location)
        actual = dataset.shape
        require(dataset.dtype == dtype, location, dtype, dataset.dtype)
        fits = actual is not None and len(actual) == len(shape)
        fits = fits and all(want in (None, has) for want, has in zip(shape, actual, strict=True))
        require(fits, location, f"shape {shape}", actual)
        filters = dataset.id.get_create_plist().get_nfilters()
        require(
            not filters and dataset.chunks is None, location, "uncompressed data", "compressed data"
        )
        size = math.prod(actual) * dtype.itemsize
        self._left -= size
        require(self._left >= 0, location, "data that the file can hold", f"{size} bytes")
        return np.asarray(dataset[()])


def _check_format(file: h5py.File) -> None:
    require_format(file, STATISTICS_FORMAT)
    check_version(file, VERSION[0])


def _text(group: h5py.Group, name: str) -> str:
    location = f"{group.name}: attribute {name!r}"
    require(name in group.attrs, location, "a text", "nothing")
    require(group.attrs.get_id(name).shape == (), location, "a text", "an array")
    value = group.attrs[name]
    if not isinstance(value, str):
        raise FormatError(location, "a text", type(value).__name__)
    return value


def _check_counts(table: Array, location: str) -> None:
    for name in table.dtype.names or ():
        if table.dtype[name].kind == "i":
            wrong = table[name] < 0
            require(
                not wrong.any(), f"{location}.{name}", "no negative number", table[name][wrong][:1]
            )
    if "count" in (table.dtype.names or ()):
        outside = table["below"] + table["above"] > table["count"]
        require(not outside.any(), location, "shares of the values that there are", "more")
