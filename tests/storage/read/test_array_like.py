"""Rows behave as NumPy arrays: in memory, in one or several files, and recomputed."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import nn

import grutrace
from grutrace.storage.read import array_like
from grutrace.storage.read import lazy_rows as rows_module
from grutrace.storage.read.lazy_rows import ConcatenatedRows, MemoryRows
from tests.storage.read.test_lazy_rows import file_rows

RANDOM = np.random.default_rng(5)
DATA = RANDOM.uniform(-1, 1, (23, 3)).astype(np.float32)


def in_memory(data: np.ndarray) -> MemoryRows:
    return MemoryRows(data.copy())


def in_a_file(data: np.ndarray) -> Any:
    return file_rows(data)[0]


def in_several(data: np.ndarray) -> ConcatenatedRows:
    """Parts in memory and in files, one of them empty."""
    cut = len(data) // 3
    parts = [in_memory(data[:cut]), in_a_file(data[cut:cut]), in_a_file(data[cut:])]
    return ConcatenatedRows(parts, data.shape, data.dtype)


KINDS = {"memory": in_memory, "file": in_a_file, "several": in_several}

#: What somebody would try first. Each is evaluated for rows and for the array that they stand for.
EXPRESSIONS: dict[str, Callable[[Any], Any]] = {
    "len": len,
    "size": lambda a: (a.size, a.nbytes, a.itemsize, a.ndim, a.shape, a.dtype),
    "row": lambda a: a[3],
    "last row": lambda a: a[-1],
    "element": lambda a: a[3, 1],
    "slice": lambda a: a[2:10],
    "strided": lambda a: a[1::4, ::2],
    "backwards": lambda a: a[::-1, ::-1],
    "ellipsis": lambda a: a[..., 1],
    "everything": lambda a: a[...],
    "as h5py": lambda a: a[()],
    "integers": lambda a: a[[3, 3, -1, 0]],
    "no integers": lambda a: a[[]],
    "no columns": lambda a: a[:, []],
    "columns": lambda a: a[:, [2, 0]],
    "pairs": lambda a: a[[3, 4], [0, 2]],
    "grid": lambda a: a[np.ix_([3, 4], [0, 2])],
    "integers of two axes": lambda a: a[np.array([[0, 1], [2, 3]])],
    "new axis": lambda a: a[:, None, 1:],
    "NumPy integer": lambda a: a[np.int64(3), np.uint8(1)],
    "mask of rows": lambda a: a[np.arange(len(a)) % 2 == 0],
    "mask of columns": lambda a: a[:, np.array([True, False, True])],
    "mask of a column": lambda a: a[a[:, 0] > 0, 1],
    "mask": lambda a: a[a > 0.5],
    "mask in a tuple": lambda a: a[(np.abs(a) < 0.5,)],
    "keeps": lambda a: 1 - a,
    "left": lambda a: (a + 1, a - 1, a * 2, a / 2, a // 2, a % 2, a**2),
    "right": lambda a: (1 + a, 1 - a, 2 * a, 2 / a, 2 // a, 2 % a, 2 ** abs(a)),
    "divmod": lambda a: (divmod(a, 2), divmod(2, a)),
    "unary": lambda a: (-a, +a, abs(a)),
    "rows and rows": lambda a: (a * a, a - a[:], a[:] - a),
    "a broadcast array": lambda a: (a - a[0], np.float32(1) - a, np.ones(3) * a),
    "matrix product": lambda a: (a[:] @ np.ones((3, 2)), a @ np.eye(3), np.ones(len(a)) @ a),
    "comparisons": lambda a: (a > 0, a >= 0, a < 0, a <= 0, a == a[0], a != a[0]),
    "share above": lambda a: (a > 0.9).mean(),
    "extremes": lambda a: (a.min(), a.max(), a.min(axis=0), a.max(1), a.min(axis=(0, 1))),
    "kept axes": lambda a: (a.max(axis=0, keepdims=True), a.min(keepdims=True)),
    "contains": lambda a: (a[0, 0] in a, 17.0 in a),
    "list": lambda a: a.tolist(),
    "iteration": lambda a: [row.sum() for row in a],
    "transposed": lambda a: a.T,
    "methods": lambda a: (a.argmax(), a.any(), a.reshape(-1), a.astype("f8"), a.clip(0, 1)),
    "asarray": lambda a: np.asarray(a),
    "asarray of a type": lambda a: np.asarray(a, dtype=np.float64),
    "array": lambda a: np.array(a, copy=True),
    "ufuncs": lambda a: (np.abs(a), np.exp(a), np.maximum(a, 0), np.add(a, a), np.isnan(a)),
    "reduced ufunc": lambda a: np.maximum.reduce(a, axis=0),
    "functions": lambda a: (np.max(a), np.min(a, axis=0), np.median(a), np.argmax(a, axis=0)),
    "joined": lambda a: (np.concatenate([a, a]), np.stack([a, a]), np.vstack([a[:2], a])),
    "sorted": lambda a: (np.sort(a, axis=0), np.quantile(a, 0.9, axis=0)),
    "where": lambda a: np.where(a > 0, a, 0),
    "shape": lambda a: (np.shape(a), np.size(a), np.ndim(a)),
    "equality": lambda a: (np.array_equal(a, a[:]), np.allclose(a, a)),
    "linear algebra": lambda a: np.linalg.norm(a, axis=1),
    "a tensor": lambda a: (torch.as_tensor(a).numpy(), torch.tensor(a).numpy()),
    "as another tensor": lambda a: torch.as_tensor(a, dtype=torch.float64).numpy(),
    "by DLPack": lambda a: (np.from_dlpack(a), torch.from_dlpack(a).numpy()),
    "a tensor of a part": lambda a: torch.from_numpy(a[2:5]).numpy(),
}


def assert_alike(actual: Any, exact: Any) -> None:
    if isinstance(exact, (tuple, list)):
        assert type(actual) is type(exact)
        for left, right in zip(actual, exact, strict=True):
            assert_alike(left, right)
        return
    assert type(actual) is type(exact)
    np.testing.assert_array_equal(actual, exact)
    assert getattr(actual, "dtype", None) == getattr(exact, "dtype", None)
    assert np.shape(actual) == np.shape(exact)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_an_expression_equals_that_of_an_array(expression: str, kind: str) -> None:
    evaluate = EXPRESSIONS[expression]
    assert_alike(evaluate(KINDS[kind](DATA)), evaluate(DATA.copy()))


def test_control_other_rows_give_other_results() -> None:
    for name in ("slice", "keeps", "share above", "extremes", "a tensor"):
        with pytest.raises(AssertionError):
            assert_alike(EXPRESSIONS[name](in_memory(DATA)), EXPRESSIONS[name](DATA[::-1] * 0.5))


@pytest.mark.parametrize("kind", KINDS)
def test_block_sizes_make_no_difference(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(array_like, "BLOCK", 4 * DATA.itemsize * 3)
    monkeypatch.setattr(rows_module, "BLOCK", 4 * DATA.itemsize * 3)
    for name in ("extremes", "iteration", "mask", "mask in a tuple", "kept axes"):
        assert_alike(EXPRESSIONS[name](KINDS[kind](DATA)), EXPRESSIONS[name](DATA))


ROWS_OF_NOTHING = np.empty((0, 3), np.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_without_any_rows(kind: str) -> None:
    rows = KINDS[kind](ROWS_OF_NOTHING)
    assert_alike((rows.sum(), rows.sum(axis=0), 1 - rows, rows[:]), (
        ROWS_OF_NOTHING.sum(), ROWS_OF_NOTHING.sum(axis=0), 1 - ROWS_OF_NOTHING, ROWS_OF_NOTHING
    ))  # fmt: skip
    assert list(rows) == []
    with pytest.raises(ValueError, match="zero-size"):
        rows.max()
    with pytest.warns(RuntimeWarning):
        assert np.isnan(rows.mean())


REDUCTIONS = ("sum", "mean", "var", "std", "min", "max")


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    name=st.sampled_from(REDUCTIONS),
    axis=st.sampled_from([None, 0, 1, -1, -2, (0, 1), (1,), (-2,)]),
    keepdims=st.booleans(),
    dtype=st.sampled_from(["float16", "float32", "float64"]),
    shape=st.tuples(st.integers(1, 40), st.integers(1, 5)),
    block=st.integers(1, 300),
    offset=st.sampled_from([0.0, 1.0, 30.0]),
    seed=st.integers(0, 99),
)
@example("var", 0, False, "float64", (40, 2), 1, 30.0, 0)
def test_a_reduction_equals_that_of_all_rows_within_rounding(
    name, axis, keepdims, dtype, shape, block, offset, seed
):
    data = (np.random.default_rng(seed).standard_normal(shape) + offset).astype(dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(array_like, "BLOCK", block)
        results = [getattr(KINDS[kind](data), name)(axis=axis, keepdims=keepdims) for kind in KINDS]
    exact = getattr(data.astype(np.float64), name)(axis=axis, keepdims=keepdims)
    # The sum is made in float64; what is left is the rounding to the type, half a unit.
    bound = np.abs(exact) * np.finfo(dtype).eps + np.abs(data).max() ** 2 * shape[0] * 1e-15
    for result in results:
        assert result.dtype == dtype
        assert np.shape(result) == np.shape(exact)
        assert (np.abs(result.astype(np.float64) - exact) <= bound).all()
        np.testing.assert_array_equal(result, results[0])


def test_control_float32_sums_are_less_accurate() -> None:
    """NumPy's own mean along the steps loses digits that blocks in float64 keep."""
    data = np.full((1_000_000, 1), 0.1, np.float32)
    exact = data.astype(np.float64).mean()
    off = abs(float(MemoryRows(data).mean(axis=0)[0]) - exact)
    assert off <= np.finfo(np.float32).eps * exact
    assert abs(float(data.mean(axis=0)[0]) - exact) > 100 * off


@pytest.mark.parametrize("kind", KINDS)
def test_reductions_with_rare_options_are_numpys_own(kind: str) -> None:
    rows = KINDS[kind](DATA)
    for evaluate in (
        lambda a: a.max(initial=2.0),
        lambda a: a.sum(axis=0, where=np.array([True, False, True])),
        lambda a: a.mean(axis=()),
        lambda a: a.sum(out=np.empty(3, np.float32), axis=0),
        lambda a: np.sum(a, dtype=np.int64),
    ):
        assert_alike(evaluate(rows), evaluate(DATA))
    np.testing.assert_allclose(rows.std(ddof=1), DATA.astype("f8").std(ddof=1), rtol=1e-6)
    assert rows.mean(dtype=np.float64) == pytest.approx(DATA.astype("f8").mean(), rel=1e-14)
    assert rows.mean(dtype=np.float64).dtype == np.float64
    for axis in (2, "a", (0, 0)):
        with pytest.raises((ValueError, TypeError)):
            DATA.mean(axis=axis)
        with pytest.raises((ValueError, TypeError)):
            rows.mean(axis=axis)
    spoilt = DATA.copy()
    spoilt[4, 1] = np.nan
    for name in REDUCTIONS:
        result = getattr(KINDS[kind](spoilt), name)(axis=0)
        assert np.isnan(result).tolist() == [False, True, False]


def test_numpys_functions_call_the_methods(monkeypatch: pytest.MonkeyPatch) -> None:
    data = np.ones((1000, 3))
    rows, counting = file_rows(data)
    monkeypatch.setattr(array_like, "BLOCK", 3 * 8 * 100)
    for function in (np.mean, np.sum, np.std, np.var, np.min, np.max):
        counting.reads = 0
        assert function(rows) == function(data)
        assert counting.reads == 10


@pytest.mark.parametrize("kind", KINDS)
def test_returned_arrays_are_writable_copies(kind: str) -> None:
    data = DATA.copy()
    rows = KINDS[kind](data)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for part in (rows[:], rows[3], rows[2:9], rows[..., 1], rows[::-1], rows[[1, 2]], rows.T,
                     np.asarray(rows), rows.copy(), next(iter(rows)), rows[rows > 0]):  # fmt: skip
            part[...] = 7
            torch.from_numpy(np.asarray(part)).zero_()
        torch.as_tensor(rows).zero_()
    np.testing.assert_array_equal(rows, DATA)
    with pytest.raises(ValueError, match="read-only"):
        rows[0] = 1
    changed = rows
    changed -= 1
    assert type(changed) is np.ndarray
    np.testing.assert_array_equal(rows, DATA)


@pytest.mark.parametrize("kind", KINDS)
def test_errors_are_those_of_an_array(kind: str) -> None:
    rows = KINDS[kind](DATA)
    for key in [(0, 0, 0), 23, -24, (0, 3), np.zeros(22, bool), np.zeros((23, 2), bool), "a",
                1.5, [0.5], [23], (slice(None), [3]), np.zeros((2, 2))]:  # fmt: skip
        with pytest.raises((IndexError, TypeError)):
            DATA[key]
        with pytest.raises((IndexError, TypeError)):
            rows[key]
    for refused in (bool, hash, lambda a: a.sort(), lambda a: a.fill(0), lambda a: a.nothing):
        with pytest.raises((ValueError, TypeError, AttributeError)):
            refused(rows)
    with pytest.raises(ValueError, match="copy"):
        np.array(rows, copy=False)


@pytest.mark.parametrize("kind", KINDS)
def test_copies_and_pickles_are_arrays(kind: str) -> None:
    rows = KINDS[kind](DATA)
    for other in (copy.copy(rows), copy.deepcopy(rows), pickle.loads(pickle.dumps(rows))):
        assert_alike(other, DATA)


@pytest.mark.parametrize("kind", KINDS)
def test_the_repr_fits_a_screen(kind: str) -> None:
    for data in (DATA, np.full((10**5, 512), -1.23456789e-7, np.float32), ROWS_OF_NOTHING):
        lines = repr(KINDS[kind](data)).splitlines()
        assert len(lines) < 10
        assert max(map(len, lines)) <= 80
        assert str(data.shape) in lines[0]
        assert "float32" in lines[0]


@pytest.fixture
def traces(tmp_path: Path) -> Iterator[dict[str, Any]]:
    """One run in memory, in a file, and with its gates derived from either."""
    torch.manual_seed(0)
    model = nn.GRU(3, 5, 2, bidirectional=True)
    with (
        grutrace.trace(model, gates="inline") as memory,
        grutrace.trace(model, tmp_path / "inline.h5", gates="inline"),
        grutrace.trace(model, gates="deferred") as derived,
        grutrace.trace(model, tmp_path / "deferred.h5", gates="deferred"),
    ):
        for steps in (4, 7):
            model(torch.randn(steps, 2, 3))
    with (
        grutrace.open(tmp_path / "inline.h5") as file,
        grutrace.open(tmp_path / "deferred.h5") as stored,
    ):
        yield {"memory": memory, "file": file, "derived": derived, "derived, file": stored}


def user_code(site: Any) -> list[Any]:
    """As it would stand in a notebook."""
    return [
        len(site),
        site[0].update,
        site[-1].hidden,
        [sequence.number for sequence in site[1:3]],
        [len(sequence) for sequence in site],
        site["update"][:3],
        1 - site.update,
        (site.update > 0.5).mean(),
        site.hidden.mean(axis=0),
        np.mean(site.reset),
        site.hidden[..., 3],
        site.update[site.update > 0.5],
        site.initial[0],
        site.initial.mean(),
        site.lengths,
        torch.as_tensor(site.hidden).mean(0).numpy(),
    ]


def test_code_runs_unchanged_in_memory_and_from_a_file(traces) -> None:
    for name in traces["memory"].sites:
        expected = user_code(traces["memory"][name])
        for kind, trace in traces.items():
            for value, exact in zip(user_code(trace[name]), expected, strict=True):
                assert type(value) is type(exact) or exact is None or kind.startswith("derived")
                if exact is not None and value is not None:
                    # Gates of the four traces are equal to rounding only.
                    np.testing.assert_allclose(value, exact, rtol=2e-5, atol=2e-6)


def test_derived_gates_are_the_same_kind_of_object(traces) -> None:
    """The block that they are computed in may change the last digit, and no more."""
    for trace in (traces["derived"], traces["derived, file"]):
        for name in trace.sites:
            for rows in (trace[name].update, trace[name].preactivation("update")):
                whole = np.asarray(rows)
                for item, exact in (
                    (rows[1::3, ::2], whole[1::3, ::2]),
                    (rows[[3, 1]], whole[[3, 1]]),
                    (1 - rows, 1 - whole),
                    (rows.mean(axis=0), whole.mean(axis=0)),
                    (rows.max(), whole.max()),
                    (rows[..., 2], whole[..., 2]),
                ):
                    assert item.dtype == exact.dtype
                    np.testing.assert_allclose(item, exact, rtol=1e-6, atol=1e-7)


def test_arrays_of_a_trace_may_be_written_to(traces) -> None:
    for trace in traces.values():
        site = trace[trace.sites[0]]
        sequence = site[1]
        before = [np.array(values) for values in (site.update, site.initial, trace.calls["steps"])]
        handed = [
            site.update[:], site.initial[:], site.initial[0], site.lengths, site.parents,
            site.checks["residual"], site.padded("update")[0], site.previous(),
            *site.weights().values(), sequence.update, sequence.initial, sequence.previous,
            sequence.calls, trace.calls["steps"], trace.sequences["steps"],
            site.row_versions(slice(None)), site.row_calls(),
        ]  # fmt: skip
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for array in handed:
                torch.from_numpy(np.ascontiguousarray(array))
                array[...] = 9
        after = [site.update, site.initial, trace.calls["steps"]]
        for left, right in zip(after, before, strict=True):
            np.testing.assert_array_equal(left, right)
        assert site.lengths.tolist() == [4, 4, 7, 7]


def test_a_sequence_is_found_by_its_number(traces) -> None:
    for trace in traces.values():
        site = trace[trace.sites[0]]
        for number in (0, 3, -1, np.int64(2)):
            assert site[number].number == site.sequence(number).number
        for number in (4, -5):
            with pytest.raises(LookupError, match="there is no sequence"):
                site[number]
        with pytest.raises(LookupError, match="not recorded"):
            site["nothing"]
        with pytest.raises(TypeError):
            site[1.5]
