"""PyTorch's private interfaces: those that several files need, and one error for what is missing.

Any version of PyTorch may rename or remove them. Each is used in one file (docs/design.md lists
them), and is looked up with `find`. Importing grutrace never fails for the lack of one.
"""

from __future__ import annotations

import pkgutil
from functools import partial
from typing import Any, NoReturn

import torch

from grutrace.errors import UnsupportedError

_REQUIRED = object()

#: Interfaces that this PyTorch lacks and nothing can stand in for.
_missing: list[str] = []


def find(path: str, stand_in: Any = _REQUIRED) -> Any:
    """Return a private object of PyTorch.

    Args:
        path: Its name with dots, as in ``torch._C.DispatchKey``.
        stand_in: Returned if this PyTorch lacks it. Without a stand-in, a function is returned that
            raises `UnsupportedError`, and `require_all` raises it, too.
    """
    try:
        return pkgutil.resolve_name(path)
    except (AttributeError, ImportError):
        if stand_in is not _REQUIRED:
            return stand_in
        _missing.append(path)
        return partial(_raise_missing, path)


def require_all() -> None:
    """Check that this PyTorch has what a recording cannot do without.

    Raises:
        UnsupportedError: It lacks an interface that nothing can stand in for.
    """
    if _missing:
        _raise_missing(", ".join(_missing))


def _raise_missing(path: str, *_: object, **__: object) -> NoReturn:
    raise UnsupportedError(
        f"grutrace needs {path}, which PyTorch {torch.__version__} does not have: use a version of "
        "PyTorch that grutrace was tested with (docs/support.md lists them), or a newer grutrace"
    )


#: The keys of PyTorch's dispatcher, an enumeration.
DispatchKey = find("torch._C.DispatchKey")

#: Context without `__torch_function__`, of subclasses and of modes.
without_torch_functions = find("torch._C.DisableTorchFunction")

#: Return the number of active `TorchDispatchMode`. Without it, one may always be active: then more
#: is done to leave it, and gates are recomputed instead of copied.
count_dispatch_modes = find("torch._C._len_torch_dispatch_stack", lambda: 1)

#: Return the innermost transform of torch.func; None without one.
innermost_transform = find("torch._C._functorch.peek_interpreter_stack")
