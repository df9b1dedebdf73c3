"""`convert`: an nn.GRU from the weights of another library."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from grutrace.conversion.conventions import (
    CONVENTIONS,
    Convention,
    Direction,
    reset_before_error,
)
from grutrace.conversion.given_arrays import Given
from grutrace.errors import OptionError, reject_unknown_options, require_one_of


@reject_unknown_options
def convert(
    arrays: Any,
    convention: str,
    *,
    reset_after: bool | None = None,
    batch_first: bool = False,
) -> nn.GRU:
    """Return an nn.GRU that computes the same as the GRU of another library, from its weights.

    States agree to rounding, from the same initial state and the same input. (Run for many steps, a
    chaotic GRU leaves any other computation of itself, whatever the rounding.) The activations are
    sigmoid and tanh; the arrays do not tell if yours are others.

    Args:
        arrays: The weights of one layer, as the library gives them (docs/converting.md has each):

            - ``"pytorch"``, ``"paddle"``: ``layer.state_dict()``, of all layers and directions.
            - ``"keras"``: ``layer.get_weights()``, also of a Bidirectional.
            - ``"onnx"``: ``{"W": (D, 3H, I), "R": (D, 3H, H), "B": (D, 6H)}`` of the operator GRU,
              for D directions.
            - ``"flax_linen"``: ``variables["params"]`` of a GRUCell.
            - ``"flax_nnx"``: ``nnx.state(cell)``.
            - ``"equinox"``: ``vars(cell)``.
            - ``"mlx"``: ``layer.parameters()``.
            - ``"cudnn"``: ``{"matrices": six, "biases": six}``, by linLayerID.

            A list of these is a stack of layers. ``{"forward": ..., "backward": ...}`` are the two
            directions of a layer. An array is one of NumPy or torch, or one that NumPy reads.
        convention: The library: ``"pytorch"``, ``"keras"``, ``"onnx"``, ``"flax_linen"``,
            ``"flax_nnx"``, ``"haiku"``, ``"equinox"``, ``"paddle"``, ``"mlx"`` or ``"cudnn"``.
        reset_after: For Keras (default True) and ONNX (where it is called linear_before_reset, and
            has to be given): whether the reset gate is applied to the product of weights and state.
        batch_first: As in nn.GRU: of its input and output only.

    Returns:
        The layer, on the CPU, in training mode, in the type of the arrays.

    Raises:
        UnsupportedError: The GRU applies the reset gate inside the product, as Keras does with
            reset_after=False, ONNX by default, and Haiku. No nn.GRU computes that.
        OptionError: The convention is unknown, an array is missing or has another shape, or
            ``reset_after`` is missing.

    Examples:
        >>> import numpy as np
        >>> rng = np.random.default_rng(0)
        >>> weights = [rng.normal(size=shape) for shape in ((2, 9), (3, 9), (2, 9))]
        >>> layer = convert(weights, "keras", batch_first=True)
        >>> layer
        GRU(2, 3, batch_first=True)
        >>> bool((layer.weight_hh_l0[:3].detach().numpy() == weights[1][:, 3:6].T).all())
        True

        The first block of Keras is the update gate, that of PyTorch the reset gate.
    """
    require_one_of("convention", convention, list(CONVENTIONS))
    entry = CONVENTIONS[convention]
    read = entry.read
    is_after = _is_reset_after(convention, entry, reset_after)
    if read is None:
        raise reset_before_error(convention, f"this library's GRU ({entry.library})")
    if not is_after:
        raise reset_before_error(convention, "a GRU with reset_after=False")
    return _make_layer(read(Given(arrays)), batch_first)


def _is_reset_after(name: str, convention: Convention, given: bool | None) -> bool:
    """Whether the reset gate is applied after the product.

    Raises:
        OptionError: It has to be given, or it cannot be what was given.
    """
    if given is not None and not isinstance(given, bool):
        raise OptionError(f"reset_after: expected True, False or None; found {given!r}")
    known = convention.reset_after
    if given is None:
        if known is None:
            raise OptionError(
                "reset_after: expected True for a GRU with linear_before_reset=1, False for the "
                f"default of {name}, 0, since the arrays do not tell; found None"
            )
        return known
    if not convention.has_choice and given != known:
        raise OptionError(
            f"reset_after: it is always {known} in {convention.library}; found {given}"
        )
    return given


def _make_layer(layers: Sequence[Sequence[Direction]], batch_first: bool) -> nn.GRU:
    _require_alike(layers)
    first = layers[0][0]
    tensors = [tensor for layer in layers for direction in layer for tensor in direction.tensors]
    # Without the initialization, which would draw from the RNG.
    gru = nn.GRU(
        first.weight_ih.shape[1],
        first.weight_hh.shape[1],
        num_layers=len(layers),
        bias=any(len(direction.tensors) > 2 for layer in layers for direction in layer),
        batch_first=batch_first,
        bidirectional=len(layers[0]) == 2,
        dtype=tensors[0].dtype,
        device="meta",
    ).to_empty(device="cpu")
    with torch.no_grad():
        for number, layer in enumerate(layers):
            for direction, suffix in zip(layer, ("", "_reverse"), strict=False):
                _fill(gru, direction, f"l{number}{suffix}")
    return gru


def _fill(gru: nn.GRU, direction: Direction, suffix: str) -> None:
    """Copy the weights of one direction; a bias that it does not have is zero."""
    values: dict[str, Tensor | None] = vars(direction)
    for name, value in values.items():
        parameter = getattr(gru, f"{name}_{suffix}", None)
        if parameter is not None:
            parameter.zero_() if value is None else parameter.copy_(value)


def _require_alike(layers: Sequence[Sequence[Direction]]) -> None:
    """Require layers and directions that one nn.GRU can have.

    Raises:
        OptionError: Sizes or types differ.
    """
    hidden_size, directions = layers[0][0].weight_hh.shape[1], len(layers[0])
    if directions > 2:
        raise OptionError(f"arrays: expected 1 or 2 directions; found {directions}")
    input_size = layers[0][0].weight_ih.shape[1]
    for number, layer in enumerate(layers):
        if len(layer) != directions:
            raise OptionError(
                f"arrays: expected {directions} directions in every layer, as in the first; "
                f"found {len(layer)} in layer {number}"
            )
        for direction in layer:
            found = direction.weight_ih.shape[1], direction.weight_hh.shape[1]
            if found != (input_size, hidden_size):
                raise OptionError(
                    f"arrays: expected I = {input_size} and H = {hidden_size} in layer {number}, "
                    f"as the layers before it have; found I = {found[0]} and H = {found[1]}"
                )
        input_size = directions * hidden_size
    tensors = [tensor for layer in layers for direction in layer for tensor in direction.tensors]
    types = {str(tensor.dtype).removeprefix("torch.") for tensor in tensors}
    if len(types) > 1:
        raise OptionError(f"arrays: expected one type of numbers; found {', '.join(sorted(types))}")
