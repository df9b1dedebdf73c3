"""The conventions of GRU weights: one entry a library.

Each convention says how one direction of one layer is stored, and in which order the blocks of the
gates are stacked: ``r`` reset, ``z`` update (z = 1 keeps the state), ``n`` candidate. Sources: the
documentation and code of each library, in the versions of docs/converting.md, whose table has the
equations.

I input size, H hidden size.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from grutrace.conversion.given_arrays import Given, Sizes
from grutrace.errors import OptionError, UnsupportedError, join_names

#: The order of PyTorch's blocks.
ORDER = "rzn"

_KINDS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
_NUMBERED_NAME = re.compile(r"(?:weight|bias)_[ih]h_l(\d+)(?:_reverse)?")
_PADDLE_ALIAS = re.compile(r"\d+\.cell")

#: The two candidates, of which no weights make one of the other.
RESET_AFTER = "n = tanh(W_in x + b_in + r * (W_hn h' + b_hn))"
RESET_BEFORE = "n = tanh(W_in x + W_hn (r * h') + b_n)"


@dataclass(frozen=True)
class Direction:
    """The weights of one direction of one layer, in PyTorch's layout.

    Attributes:
        weight_ih: (3H, I).
        weight_hh: (3H, H).
        bias_ih: (3H,) or None.
        bias_hh: (3H,) or None.
    """

    weight_ih: Tensor
    weight_hh: Tensor
    bias_ih: Tensor | None
    bias_hh: Tensor | None

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors that are there."""
        all_tensors = (self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh)
        return [tensor for tensor in all_tensors if tensor is not None]


@dataclass(frozen=True)
class Convention:
    """How a library stores the weights of a GRU.

    Attributes:
        library: The library, and the class or operator.
        read: Reads all layers, the directions of each, in PyTorch's layout. None if no GRU of the
            library can be converted.
        reset_after: Whether the reset gate is applied to the product with the state, as in
            nn.GRU. None if the library has both, and its arrays do not say which.
        has_choice: Whether the library has both.
    """

    library: str
    read: Callable[[Given], list[list[Direction]]] | None
    reset_after: bool | None = True
    has_choice: bool = False


def reset_before_error(convention: str, found: str) -> UnsupportedError:
    """Return the error for a reset gate inside the product."""
    return UnsupportedError(
        f"{convention}: {found} applies the reset gate inside the product, {RESET_BEFORE}; "
        f"nn.GRU applies it to the product, {RESET_AFTER}; no weights make the two equal"
    )


def _reorder(tensor: Tensor, order: str) -> Tensor:
    """Return the blocks of the gates along the first axis in PyTorch's order."""
    blocks = dict(zip(order, tensor.chunk(3), strict=True))
    return torch.cat([blocks[gate] for gate in ORDER])


def _update_first(ih: Tensor, hh: Tensor, biases: Sequence[Tensor] | None) -> Direction:
    """Return weights that are stacked as update, reset, candidate."""
    bias_ih, bias_hh = biases or (None, None)
    return Direction(
        _reorder(ih, "zrn"),
        _reorder(hh, "zrn"),
        None if bias_ih is None else _reorder(bias_ih, "zrn"),
        None if bias_hh is None else _reorder(bias_hh, "zrn"),
    )


def _numbered(given: Given, suffix: str) -> Direction:
    sizes = Sizes()
    weight_hh = given[f"weight_hh{suffix}"].tensor("3H, H", sizes)
    return Direction(
        given[f"weight_ih{suffix}"].tensor("3H, I", sizes),
        weight_hh,
        given.optional_tensor(f"bias_ih{suffix}", "3H", sizes),
        given.optional_tensor(f"bias_hh{suffix}", "3H", sizes),
    )


def read_numbered_layers(given: Given) -> list[list[Direction]]:
    """Read all layers of a mapping with PyTorch's names, such as ``weight_ih_l0_reverse``.

    Names like ``weight_ih`` are those of one cell. Paddle gives each array a second name, such as
    ``0.cell.weight_ih``, which is ignored.

    Raises:
        OptionError: A name is missing, or does not belong to a GRU.
    """
    if not given.is_mapping:
        raise OptionError(
            f"{given.name}: expected a mapping with PyTorch's names, such as a state_dict; "
            f"found {given.describe()}"
        )
    names = [str(name) for name in given.value]
    if "weight_hh" in names:
        suffixes = [[""]]
    else:
        numbers = [int(match[1]) for match in map(_NUMBERED_NAME.fullmatch, names) if match]
        directions = ["", "_reverse"] if "weight_hh_l0_reverse" in names else [""]
        layers = range(max(numbers, default=0) + 1)
        suffixes = [[f"_l{layer}{end}" for end in directions] for layer in layers]
    layers_read = [[_numbered(given, suffix) for suffix in layer] for layer in suffixes]
    known = {f"{kind}{suffix}" for kind in _KINDS for layer in suffixes for suffix in layer}
    unknown = [name for name in names if name not in known and not _PADDLE_ALIAS.match(name)]
    if unknown:
        raise OptionError(
            f"{given.name}: expected only the weights of one GRU; found also {join_names(unknown)}"
        )
    return layers_read


def _keras(given: Given) -> list[Direction]:
    if given.is_mapping:
        return [_keras_direction(given["kernel"], given["recurrent_kernel"], given.find("bias"))]
    arrays = list(given) if given.is_list else []
    if len(arrays) not in (2, 3, 4, 6):
        raise OptionError(
            f"{given.name}: expected layer.get_weights(), [kernel, recurrent_kernel, bias] of each "
            f"direction; found {given.describe()}"
        )
    directions = 2 if len(arrays) > 3 else 1
    size = len(arrays) // directions
    parts = [arrays[start : start + size] for start in range(0, len(arrays), size)]
    return [_keras_direction(part[0], part[1], part[2] if size == 3 else None) for part in parts]


def _keras_direction(kernel: Given, recurrent: Given, bias: Given | None) -> Direction:
    if bias is not None and bias.ndim == 1:
        raise reset_before_error(
            "keras", f"a GRU with reset_after=False ({bias.name} has one axis)"
        )
    sizes = Sizes()
    weight_hh = recurrent.tensor("H, 3H", sizes).T
    weight_ih = kernel.tensor("I, 3H", sizes).T
    biases = None if bias is None else bias.tensor("2, 3H", sizes).unbind()
    return _update_first(weight_ih, weight_hh, biases)


def _onnx(given: Given) -> list[Direction]:
    sizes = Sizes()
    weight_hh = given["R"].tensor("D, 3H, H", sizes)
    weight_ih = given["W"].tensor("D, 3H, I", sizes)
    bias = given.optional_tensor("B", "D, 6H", sizes)
    return [
        _update_first(
            weight_ih[number],
            weight_hh[number],
            None if bias is None else bias[number].chunk(2),
        )
        for number in range(len(weight_hh))
    ]


def _flax_linen(given: Given) -> list[Direction]:
    sizes = Sizes()
    weight_hh = [given[f"h{gate}"]["kernel"].tensor("H, H", sizes).T for gate in ORDER]
    weight_ih = [given[f"i{gate}"]["kernel"].tensor("I, H", sizes).T for gate in ORDER]

    def stack_biases(kind: str) -> Tensor | None:
        # Of the state's three dense layers only that of the candidate has a bias.
        found = [given[f"{kind}{gate}"].optional_tensor("bias", "H", sizes) for gate in ORDER]
        size = len(weight_hh[0])
        biases = [weight_hh[0].new_zeros(size) if bias is None else bias for bias in found]
        return None if all(bias is None for bias in found) else torch.cat(biases)

    return [
        Direction(torch.cat(weight_ih), torch.cat(weight_hh), stack_biases("i"), stack_biases("h"))
    ]


def _flax_nnx(given: Given) -> list[Direction]:
    sizes = Sizes()
    input, hidden = given["dense_i"], given["dense_h"]
    weight_hh = hidden["kernel"].tensor("H, 3H", sizes).T
    return [
        Direction(
            input["kernel"].tensor("I, 3H", sizes).T,
            weight_hh,
            input.optional_tensor("bias", "3H", sizes),
            hidden.optional_tensor("bias", "3H", sizes),
        )
    ]


def _equinox(given: Given) -> list[Direction]:
    return _two_candidate_biases(given, ("weight_ih", "weight_hh", "bias", "bias_n"))


def _mlx(given: Given) -> list[Direction]:
    return _two_candidate_biases(given, ("Wx", "Wh", "b", "bhn"))


def _two_candidate_biases(given: Given, names: tuple[str, str, str, str]) -> list[Direction]:
    """Read weights with one bias per gate, and a second one of the candidate."""
    sizes = Sizes()
    ih, hh, bias, candidate = names
    weight_hh = given[hh].tensor("3H, H", sizes)
    weight_ih = given[ih].tensor("3H, I", sizes)
    bias_ih = given.optional_tensor(bias, "3H", sizes)
    bias_hh = given.optional_tensor(candidate, "H", sizes)
    if bias_hh is not None:
        bias_hh = torch.cat([bias_hh.new_zeros(2 * len(bias_hh)), bias_hh])
    return [Direction(weight_ih, weight_hh, bias_ih, bias_hh)]


def _cudnn(given: Given) -> list[Direction]:
    sizes = Sizes()
    matrices = given["matrices"].items(6)
    biases = given.find("biases")
    weight_hh = torch.cat([matrix.tensor("H, H", sizes) for matrix in matrices[3:]])
    weight_ih = torch.cat([matrix.tensor("H, I", sizes) for matrix in matrices[:3]])
    if biases is None:
        return [Direction(weight_ih, weight_hh, None, None)]
    stacked = torch.stack([bias.tensor("H", sizes) for bias in biases.items(6)])
    return [Direction(weight_ih, weight_hh, stacked[:3].flatten(), stacked[3:].flatten())]


def _one_layer(
    read: Callable[[Given], list[Direction]],
) -> Callable[[Given], list[list[Direction]]]:
    """Return a reader of a layer, of several, or of the two directions of each."""

    def read_directions(given: Given) -> list[Direction]:
        forward, backward = given.find("forward"), given.find("backward")
        if forward is None or backward is None:
            return read(given)
        return [*read(forward), *read(backward)]

    def read_layers(given: Given) -> list[list[Direction]]:
        is_stack = (
            given.is_list and len(given) and all(part.is_mapping or part.is_list for part in given)
        )
        return [read_directions(layer) for layer in (given if is_stack else [given])]

    return read_layers


#: By the name of the convention.
CONVENTIONS = {
    "pytorch": Convention("PyTorch, torchrl, TorchScript: GRU, GRUCell", read_numbered_layers),
    "keras": Convention("Keras: layers.GRU", _one_layer(_keras), has_choice=True),
    "onnx": Convention("ONNX: GRU", _one_layer(_onnx), reset_after=None, has_choice=True),
    "flax_linen": Convention("Flax: linen.GRUCell", _one_layer(_flax_linen)),
    "flax_nnx": Convention("Flax: nnx.GRUCell", _one_layer(_flax_nnx)),
    "haiku": Convention("Haiku: hk.GRU", None, reset_after=False),
    "equinox": Convention("Equinox: nn.GRUCell", _one_layer(_equinox)),
    "paddle": Convention("Paddle: nn.GRU", read_numbered_layers),
    "mlx": Convention("MLX: nn.GRU", _one_layer(_mlx)),
    "cudnn": Convention("cuDNN: CUDNN_GRU", _one_layer(_cudnn)),
}
