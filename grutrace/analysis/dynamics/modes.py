"""The modes of a GRU near a state: eigenvectors, time constants, and the inputs that move them.

Near a fixed point h* at the input x*, a deviation d = h - h* and a change u of the input obey

    d(t + 1) = J d(t) + B u(t),   J = dF/dh,   B = dF/dx

With the right eigenvectors of J as columns of R, its left eigenvectors are the rows of L = R^-1,
and the amplitudes a = L d of the modes obey a_i(t + 1) = lambda_i a_i(t) + (L B)_i u(t). Row i of
L B says which inputs move the state along mode i, also where the left eigenvector points elsewhere
than the right one (Maheswaranathan et al. 2019, "Reverse engineering recurrent networks for
sentiment classification reveals line attractor dynamics").

H units, I input size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from grutrace.analysis.dynamics.gru_map import GRUMap
from grutrace.analysis.engine.result import Result
from grutrace.analysis.engine.site_data import SiteLike, as_site_data
from grutrace.errors import OptionError, short_repr
from grutrace.records import Array
from grutrace.storage.read.sequence_index import Integers


@dataclass(frozen=True, eq=False)
class Modes(Result):
    """The modes of one step at a state, the slowest to decay first.

    Attributes:
        state: (H,)
        input: (I,)
        modes: (H,) numbers of the modes.
        eigenvalues: (H,) complex, by decreasing magnitude.
        timescale: (H,) number of steps in which a deviation changes by a factor e, 1 / |log
            |eigenvalue||.
        rotation: (H,) number of steps of a full turn; infinite where the eigenvalue is positive.
        input_gain: (H,) length of the row of `input_directions`: largest change of the amplitude by
            an input of length 1.
        right: (H, H) complex; column i is the direction of mode i, of length 1.
        left: (H, H) complex; row i gives the amplitude of mode i in a deviation. ``left @ right``
            is the identity. Not finite where the eigenvectors do not span all directions.
        input_directions: (H, I) complex; row i gives the change of the amplitude of mode i by an
            input.
    """

    index_field: ClassVar[str] = "modes"
    array_only_fields: ClassVar[tuple[str, ...]] = ("right", "left", "input_directions")
    excluded_columns: ClassVar[tuple[str, ...]] = ("state", "input")

    state: Array
    input: Array
    modes: Integers
    eigenvalues: Array
    timescale: Array
    rotation: Array
    input_gain: Array
    right: Array
    left: Array
    input_directions: Array


def modes(site: SiteLike, state: Array, input: Array | None = None, *, version: int = -1) -> Modes:
    """Compute the modes of one step at a state, such as a fixed point.

    Args:
        site: A site with weights.
        state: (H,) the state.
        input: (I,) the constant input; None for zeros.
        version: Version of the weights; -1 for the last.

    Returns:
        The modes, by decreasing magnitude of the eigenvalue.

    Raises:
        NotRecordedError: The weights were not recorded.
        OptionError: The state or the input has another shape, or a value is not finite.

    Examples:
        Without weights each unit is a mode, which halves at every step.

        >>> import torch, grutrace
        >>> from grutrace.analysis import fixed_points, modes
        >>> layer = torch.nn.GRU(2, 3)
        >>> for parameter in layer.parameters():
        ...     _ = torch.nn.init.zeros_(parameter)
        >>> with torch.no_grad(), grutrace.trace(layer) as trace:
        ...     _ = layer(torch.zeros(5, 1, 2), torch.rand(1, 1, 3))
        >>> points = fixed_points(trace["l0"])
        >>> result = modes(trace["l0"], points.states[0], points.input)
        >>> result.timescale.round(2), result.input_directions.shape
        (array([1.44, 1.44, 1.44]), (3, 2))
    """
    data = as_site_data(site)
    weights = data.weights(version)
    width, size = weights["weight_hh"].shape[1], weights["weight_ih"].shape[1]
    at = _finite("state", state, width)
    constant = np.zeros(size) if input is None else _finite("input", input, size)
    step = GRUMap(weights, constant)
    eigenvalues, right = np.linalg.eig(step.jacobian(at[np.newaxis])[0])
    order = np.argsort(-np.abs(eigenvalues), kind="stable")
    eigenvalues = eigenvalues[order].astype(np.complex128)
    right = right[:, order].astype(np.complex128)
    try:
        left = np.linalg.inv(right)
    except np.linalg.LinAlgError:
        left = np.full_like(right, np.nan)
    input_directions = left @ step.input_jacobian(at)
    with np.errstate(divide="ignore"):
        timescale = 1 / np.abs(np.log(np.abs(eigenvalues)))
        rotation = 2 * np.pi / np.abs(np.angle(eigenvalues))
    return Modes(
        site=data.name,
        state=at,
        input=constant,
        modes=np.arange(width),
        eigenvalues=eigenvalues,
        timescale=timescale,
        rotation=rotation,
        input_gain=np.linalg.norm(input_directions, axis=1),
        right=right,
        left=left,
        input_directions=input_directions,
    )


def _finite(name: str, values: Array, size: int) -> Array:
    array = np.asarray(values, np.float64)
    if array.shape != (size,):
        raise OptionError(f"{name}: expected shape ({size},), found {array.shape}")
    if not np.isfinite(array).all():
        raise OptionError(f"{name}: expected finite numbers, found {short_repr(values)}")
    return array
