"""The arrays that a user passes, by name, with their shapes checked.

An array may come from NumPy, torch, or any library whose arrays NumPy can read: JAX, Flax, Keras,
MLX, Paddle, ONNX.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from grutrace.errors import OptionError, join_names, short_repr, suggest_name

#: An axis of a shape: a multiple of a size, such as ``3H``.
_AXIS = re.compile(r"(\d*)([A-Z]?)")


class Sizes:
    """The sizes I and H of one layer, known from the first array that has them."""

    def __init__(self) -> None:
        self._known: dict[str, int] = {}

    def fit(self, shape: tuple[int, ...], expected: str) -> bool:
        """Whether a shape is the expected one, such as ``3H, I``; note the sizes that it tells."""
        axes = expected.split(", ")
        if len(axes) != len(shape):
            return False
        for length, axis in zip(shape, axes, strict=True):
            match = _AXIS.fullmatch(axis)
            assert match is not None, axis
            factor, size = int(match[1] or 1), match[2]
            if not size and length != factor:
                return False
            if size and (
                length % factor or self._known.setdefault(size, length // factor) * factor != length
            ):
                return False
        return True

    def __str__(self) -> str:
        return " and ".join(f"{size} = {length}" for size, length in self._known.items())


class Given:
    """A value that the user passed: an array, or a mapping or list of such values.

    Args:
        value: The value.
        name: Its name in messages, such as ``arrays['kernel']``.
    """

    def __init__(self, value: Any, name: str = "arrays") -> None:
        self.value = value
        self.name = name

    @property
    def is_mapping(self) -> bool:
        """Whether it has names."""
        return isinstance(self.value, Mapping)

    @property
    def is_list(self) -> bool:
        """Whether it is a list or a tuple."""
        return isinstance(self.value, (list, tuple))

    def __iter__(self) -> Iterator[Given]:
        for index, value in enumerate(self.value):
            yield Given(value, f"{self.name}[{index}]")

    def __len__(self) -> int:
        return len(self.value)

    def items(self, count: int) -> list[Given]:
        """Return the elements of a list of this length."""
        if not self.is_list or len(self) != count:
            found = f"{len(self)}" if self.is_list else self.describe()
            raise OptionError(f"{self.name}: expected a list of {count} arrays; found {found}")
        return list(self)

    def find(self, key: str) -> Given | None:
        """Return the value of this name; None if it is missing or None."""
        value = self.value.get(key) if self.is_mapping else None
        return None if value is None else Given(value, f"{self.name}[{key!r}]")

    def __getitem__(self, key: str) -> Given:
        found = self.find(key)
        if found is None:
            raise OptionError(f"{self.name}: expected {key!r} in it; found {self.describe(key)}")
        return found

    def describe(self, key: str = "") -> str:
        """Return a text for a message: the names of a mapping, or the value."""
        if not self.is_mapping:
            return short_repr(self.value)
        names = [str(name) for name in self.value]
        return join_names(names) + (suggest_name(key, names) if key else "")

    def tensor(self, expected: str, sizes: Sizes) -> Tensor:
        """Return a copy as a tensor of the expected shape.

        Args:
            expected: The shape, such as ``3H, I``.
            sizes: The sizes known so far.

        Raises:
            OptionError: It is not an array of floating-point numbers, or has another shape.
        """
        tensor = self._as_tensor()
        known = str(sizes)
        if not sizes.fit(tuple(tensor.shape), expected):
            where = f" with {known}" if known else ""
            raise OptionError(
                f"{self.name}: expected shape ({expected}){where}; found {tuple(tensor.shape)}"
            )
        return tensor

    def optional_tensor(self, key: str, expected: str, sizes: Sizes) -> Tensor | None:
        """Return the array of this name as `tensor` does; None if it is missing or None."""
        found = self.find(key)
        return None if found is None else found.tensor(expected, sizes)

    @property
    def ndim(self) -> int:
        """The number of axes of an array."""
        return self._as_tensor().ndim

    def _as_tensor(self) -> Tensor:
        if isinstance(self.value, Tensor):
            tensor = self.value.detach()
            tensor = (tensor.dequantize() if tensor.is_quantized else tensor).cpu().clone()
        else:
            try:
                array = np.asarray(self.value)
                is_bfloat16 = array.dtype.name == "bfloat16"
                tensor = torch.tensor(array.astype(np.float32) if is_bfloat16 else array)
            except (TypeError, ValueError, RuntimeError):
                raise OptionError(
                    f"{self.name}: expected an array; found {self.describe()}"
                ) from None
            if is_bfloat16:
                tensor = tensor.bfloat16()
        if not tensor.is_floating_point():
            raise OptionError(
                f"{self.name}: expected an array of floating-point numbers; found {self.describe()}"
            )
        return tensor
