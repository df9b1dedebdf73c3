"""Export to LSTMVis (Strobelt et al. 2018, "LSTMVis: A Tool for Visual Analysis of Hidden State
Dynamics in Recurrent Neural Networks").

Each folder with a `lstm.yml` is a project of the LSTMVis server: one long sequence of words, with
states for each position. A module becomes a project with its sequences concatenated, and each
quantity of each site becomes a type of states. The layout follows the README and docs/chapter of
LSTMVis, and `lstmdata/data_handler.py`, which reads the files.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from grutrace.errors import NotRecordedError
from grutrace.export.output_file import open_for_hdf5
from grutrace.export.variables import ExportContent, SiteContent, Variable, as_text

#: Gates that are never negative, marked as unsigned for the server.
UNSIGNED = ("reset", "update")

#: Word of a step without a token.
MISSING_WORD = "<none>"

#: Replacement for a space in a word: the server splits the lines of its dictionaries at spaces.
VISIBLE_SPACE = "\N{OPEN BOX}"


def write_lstmvis(content: ExportContent, path: Path) -> list[str]:
    """Write projects into a folder for the server's option `-dir`.

    Returns:
        Notes on values that LSTMVis shows differently.

    Raises:
        NotRecordedError: The trace has no steps.
    """
    modules: dict[int, list[SiteContent]] = {}
    for site in content.sites:
        if site.row_count:
            modules.setdefault(site.number, []).append(site)
    if not modules:
        raise NotRecordedError("nothing to export: the trace has no steps")
    names = _Names()
    notes: list[str] = []
    for sites in modules.values():
        folder = names.new(sites[0].module.path or "model")
        (path / folder).mkdir()
        project = _Project(path / folder, str(content.attributes["model"]), sites)
        notes += [f"{folder}: {note}" for note in project.write()]
    return notes


class _Project:
    """The folder of one module."""

    def __init__(self, folder: Path, model: str, sites: list[SiteContent]) -> None:
        self._folder, self._model, self._sites = folder, model, sites
        self._module = sites[0].module
        self._columns = {variable.name: variable for variable in sites[0].per_step()}
        self._notes: list[str] = []

    def write(self) -> list[str]:
        """Write states, words, metadata of each step and the configuration; return notes."""
        files = {"states": "states.h5", "words": "words.h5", "word_dict": "words.dict"}
        types = self._write_states()
        with _new_file(self._folder / "words.h5") as file:
            single = self._write_words(file)
        with _new_file(self._folder / "meta.h5") as file:
            meta = dict(self._write_meta(file, files))
        files["meta"] = "meta.h5"
        name = f"{self._model} {self._module.path}".strip()
        config = {
            "name": name,
            "description": f"gates and states of {name}, recorded by grutrace",
            "files": files,
            "word_sequence": {"file": "words", "path": "word_ids", "dict_file": "word_dict"},
            "states": {"file": "states", "types": types},
            "meta": meta,
            # LSTMVis searches the first letter of each word.
            "etc": {"regex_search": single},
        }
        (self._folder / "lstm.yml").write_text(f"{to_yaml(config)}\n", encoding="utf-8")
        return self._notes

    def _write_states(self) -> list[dict[str, Any]]:
        types = []
        finite = True
        with open_for_hdf5(self._folder / "states.h5") as raw, h5py.File(raw, "w") as file:
            for site in self._sites:
                for rows in site.rows():
                    path = f"{rows.name}_{site.site.suffix}"
                    # Not all readers support half precision.
                    dataset = file.create_dataset(path, rows.shape, _at_least_single(rows.dtype))
                    for part, block in rows.blocks():
                        dataset[part] = block
                        raw.check()
                        finite = finite and bool(np.isfinite(block).all())
                    types.append(
                        {
                            "type": rows.name + " reverse" * site.site.reverse,
                            "layer": site.site.layer + 1,
                            "path": path,
                            "unsigned": rows.name in UNSIGNED,
                            "transform": "none",
                        }
                    )
        if not finite:
            self._notes.append("some values are NaN or infinite, which LSTMVis cannot show")
        return types

    def _write_words(self, file: h5py.File) -> bool:
        """Write the words. Return whether each has one letter."""
        tokens = self._columns.get("token", self._columns["time"])
        if tokens.name == "time":
            self._notes.append("there are no tokens, so the words are the step numbers")
        words = self._write_coded(file, "word_ids", tokens, self._folder / "words.dict")
        return all(len(word) == 1 for word in words)

    def _write_coded(
        self, file: h5py.File, name: str, column: Variable, dictionary: Path
    ) -> Iterable[str]:
        """Write words as numbers in order of appearance, and their dictionary. Return the words."""
        numbers: dict[str, int] = {}
        dataset = file.create_dataset(name, column.shape, np.int64)
        for part, block in column.blocks():
            dataset[part] = [
                numbers.setdefault(word, len(numbers) + 1) for word in map(word_of, block.tolist())
            ]
        with dictionary.open("w", encoding="utf-8", newline="\n") as lines:
            lines.writelines(f"{word} {number}\n" for word, number in numbers.items())
        return numbers

    def _write_meta(
        self, file: h5py.File, files: dict[str, str]
    ) -> Iterable[tuple[str, dict[str, Any]]]:
        names = _Names()
        for column in self._columns.values():
            if column.name in ("token", "call"):
                continue
            name = names.new(column.name.removeprefix("label_"))
            vis: dict[str, Any]
            if column.is_text or not _all_finite(column):
                files[f"{name}_dict"] = f"meta_{name}.dict"
                self._write_coded(file, name, column, self._folder / f"meta_{name}.dict")
                yield (
                    name,
                    {
                        "file": "meta",
                        "path": name,
                        "dict": f"{name}_dict",
                        "vis": {"type": "discrete", "range": "dict"},
                    },
                )
                continue
            low, high = np.inf, -np.inf
            dataset = file.create_dataset(name, column.shape, column.dtype)
            for part, block in column.blocks():
                dataset[part] = block
                low, high = min(low, float(block.min())), max(high, float(block.max()))
            vis = {"type": "scalar", "range": [low, high if high > low else low + 1]}
            yield name, {"file": "meta", "path": name, "vis": vis}


@contextmanager
def _new_file(path: Path) -> Iterator[h5py.File]:
    with open_for_hdf5(path) as raw, h5py.File(raw, "w") as file:
        yield file


def word_of(token: str | float | None) -> str:
    """Return a token as a word of a dictionary, not empty and without white space.

    The exception is a single space, which the server reads correctly at the start of a line.
    """
    text = as_text(token)
    if text == " ":
        return text
    return "".join(map(_visible, text)) or MISSING_WORD


def _visible(letter: str) -> str:
    if letter == " ":
        return VISIBLE_SPACE
    return letter.encode("unicode_escape").decode("ascii") if letter.isspace() else letter


def _at_least_single(dtype: Any) -> np.dtype[Any]:
    return np.promote_types(dtype, np.float32)


def _all_finite(column: Variable) -> bool:
    return all(bool(np.isfinite(block).all()) for _, block in column.blocks())


class _Names:
    """Generates unique names that are valid in file names and URLs."""

    def __init__(self) -> None:
        self._used: set[str] = set()

    def new(self, wish: str) -> str:
        """Return a new name that resembles `wish`."""
        plain = re.sub(r"[^A-Za-z0-9_.-]", "_", wish).strip(".") or "_"
        name, number = plain, 1
        while name.lower() in self._used:
            number += 1
            name = f"{plain}_{number}"
        self._used.add(name.lower())
        return name


def to_yaml(values: Mapping[str, Any]) -> str:
    """Return values as YAML: as JSON, except that YAML reads 1e-05 as a string."""
    text = json.dumps(values, indent=2, ensure_ascii=False)
    without_point = r'("(?:[^"\\]|\\.)*")|(?<![.\d])(\d+)e'
    return re.sub(without_point, lambda match: match[1] or f"{match[2]}.0e", text)
