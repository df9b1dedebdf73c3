"""Limit the BLAS that NumPy uses to one thread, while threads of our own share the work.

OpenBLAS runs one product at a time on all of its threads, so two of our threads that call it wait
for each other: the eigenvalues of 16 matrices of 256 rows take as long on two threads as on one,
and half of that once each call keeps to its own thread.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

#: Names of the functions that return and set the number of threads, in NumPy's builds of OpenBLAS.
_NAMES = (
    ("scipy_openblas_get_num_threads64_", "scipy_openblas_set_num_threads64_"),
    ("scipy_openblas_get_num_threads", "scipy_openblas_set_num_threads"),
    ("openblas_get_num_threads64_", "openblas_set_num_threads64_"),
    ("openblas_get_num_threads", "openblas_set_num_threads"),
)

_lock = threading.Lock()
_users = 0
_before = 1


@contextmanager
def single_blas_thread() -> Iterator[None]:
    """Compute every product of this process on the thread that asks for it.

    Contexts may nest and overlap; the last one restores the number of threads. Nothing changes if
    NumPy uses another library than OpenBLAS.
    """
    global _users, _before
    functions = _functions()
    if functions is None:
        yield
        return
    get, set_to = functions
    with _lock:
        if _users == 0:
            _before = get()
            set_to(1)
        _users += 1
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if _users == 0:
                set_to(_before)


@cache
def _functions() -> tuple[Callable[[], int], Callable[[int], object]] | None:
    """Return the functions of the OpenBLAS that NumPy has loaded; None if it is another library."""
    from numpy.linalg import _umath_linalg

    try:
        # A symbol is looked up in the libraries that this one is linked with, too.
        library = ctypes.CDLL(str(_umath_linalg.__file__))
    except OSError:
        return None
    for get, set_to in _NAMES:
        if hasattr(library, get) and hasattr(library, set_to):
            return getattr(library, get), getattr(library, set_to)
    return None
