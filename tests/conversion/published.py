"""The GRU of each library, in float64 NumPy, as its documentation writes it, on its own arrays.

Each step takes the arrays of one direction, the input (B, I) and the state (B, H), and returns the
state after it. `draw` makes the arrays. Nothing here is shared with the code that is tested: each
equation is written out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

Array = np.ndarray
Draw = Callable[..., Array]
Step = Callable[[Any, Array, Array], Array]


def sigmoid(x: Array) -> Array:
    return 0.5 * (1.0 + np.tanh(0.5 * x))


def pytorch(a: dict[str, Array], x: Array, h: Array, suffix: str = "_l0") -> Array:
    """torch.nn.GRU, and Paddle's: r, z, n stacked."""
    w_ir, w_iz, w_in = np.split(a[f"weight_ih{suffix}"], 3)
    w_hr, w_hz, w_hn = np.split(a[f"weight_hh{suffix}"], 3)
    b_ir, b_iz, b_in = np.split(a[f"bias_ih{suffix}"], 3)
    b_hr, b_hz, b_hn = np.split(a[f"bias_hh{suffix}"], 3)
    r = sigmoid(x @ w_ir.T + b_ir + h @ w_hr.T + b_hr)
    z = sigmoid(x @ w_iz.T + b_iz + h @ w_hz.T + b_hz)
    n = np.tanh(x @ w_in.T + b_in + r * (h @ w_hn.T + b_hn))
    return (1 - z) * n + z * h


def keras(a: list[Array], x: Array, h: Array) -> Array:
    """Keras with reset_after=True: z, r, h stacked along the last axis."""
    kernel, recurrent_kernel, bias = a
    x_z, x_r, x_h = np.split(x @ kernel + bias[0], 3, axis=1)
    h_z, h_r, h_h = np.split(h @ recurrent_kernel + bias[1], 3, axis=1)
    z, r = sigmoid(x_z + h_z), sigmoid(x_r + h_r)
    candidate = np.tanh(x_h + r * h_h)
    return z * h + (1 - z) * candidate


def keras_reset_before(a: list[Array], x: Array, h: Array) -> Array:
    """Keras with reset_after=False."""
    kernel, recurrent_kernel, bias = a
    x_z, x_r, x_h = np.split(x @ kernel + bias, 3, axis=1)
    u_z, u_r, u_h = np.split(recurrent_kernel, 3, axis=1)
    z, r = sigmoid(x_z + h @ u_z), sigmoid(x_r + h @ u_r)
    return z * h + (1 - z) * np.tanh(x_h + (r * h) @ u_h)


def onnx(a: dict[str, Array], x: Array, h: Array, direction: int = 0) -> Array:
    """ONNX's GRU with linear_before_reset=1: z, r, h stacked, Wb before Rb."""
    w_z, w_r, w_h = np.split(a["W"][direction], 3)
    r_z, r_r, r_h = np.split(a["R"][direction], 3)
    wb_z, wb_r, wb_h, rb_z, rb_r, rb_h = np.split(a["B"][direction], 6)
    z = sigmoid(x @ w_z.T + h @ r_z.T + wb_z + rb_z)
    r = sigmoid(x @ w_r.T + h @ r_r.T + wb_r + rb_r)
    candidate = np.tanh(x @ w_h.T + r * (h @ r_h.T + rb_h) + wb_h)
    return (1 - z) * candidate + z * h


def onnx_reset_before(a: dict[str, Array], x: Array, h: Array) -> Array:
    """ONNX's GRU with linear_before_reset=0, its default."""
    w_z, w_r, w_h = np.split(a["W"][0], 3)
    r_z, r_r, r_h = np.split(a["R"][0], 3)
    wb_z, wb_r, wb_h, rb_z, rb_r, rb_h = np.split(a["B"][0], 6)
    z = sigmoid(x @ w_z.T + h @ r_z.T + wb_z + rb_z)
    r = sigmoid(x @ w_r.T + h @ r_r.T + wb_r + rb_r)
    return (1 - z) * np.tanh(x @ w_h.T + (r * h) @ r_h.T + rb_h + wb_h) + z * h


def flax_linen(a: dict[str, dict[str, Array]], x: Array, h: Array) -> Array:
    """Flax's linen.GRUCell: six dense layers, those of the state without a bias but for n."""

    def dense(name: str, value: Array) -> Array:
        return value @ a[name]["kernel"] + a[name].get("bias", 0)

    r = sigmoid(dense("ir", x) + dense("hr", h))
    z = sigmoid(dense("iz", x) + dense("hz", h))
    n = np.tanh(dense("in", x) + r * dense("hn", h))
    return (1 - z) * n + z * h


def flax_nnx(a: dict[str, dict[str, Array]], x: Array, h: Array) -> Array:
    """Flax's nnx.GRUCell: two dense layers, r, z, n stacked, one bias."""
    x_r, x_z, x_n = np.split(x @ a["dense_i"]["kernel"] + a["dense_i"]["bias"], 3, axis=1)
    h_r, h_z, h_n = np.split(h @ a["dense_h"]["kernel"], 3, axis=1)
    r, z = sigmoid(x_r + h_r), sigmoid(x_z + h_z)
    return (1 - z) * np.tanh(x_n + r * h_n) + z * h


def haiku(a: dict[str, Array], x: Array, h: Array) -> Array:
    """Haiku's GRU: z, r, a stacked; z = 1 overwrites."""
    x_z, x_r, x_a = np.split(x @ a["w_i"] + a["b"], 3, axis=1)
    w_z, w_r, w_a = np.split(a["w_h"], 3, axis=1)
    z, r = sigmoid(x_z + h @ w_z), sigmoid(x_r + h @ w_r)
    return (1 - z) * h + z * np.tanh(x_a + (r * h) @ w_a)


def equinox(a: dict[str, Array], x: Array, h: Array) -> Array:
    """Equinox's GRUCell: reset, input, new stacked; a bias of the state for new only."""
    i_r, i_z, i_n = np.split(x @ a["weight_ih"].T + a["bias"], 3, axis=1)
    h_r, h_z, h_n = np.split(h @ a["weight_hh"].T, 3, axis=1)
    reset, input = sigmoid(i_r + h_r), sigmoid(i_z + h_z)
    new = np.tanh(i_n + reset * (h_n + a["bias_n"]))
    return new + input * (h - new)


def mlx(a: dict[str, Array], x: Array, h: Array) -> Array:
    """MLX's GRU: r, z, n stacked; b for all, bhn for the state's part of n."""
    w_xr, w_xz, w_xn = np.split(a["Wx"], 3)
    w_hr, w_hz, w_hn = np.split(a["Wh"], 3)
    b_r, b_z, b_n = np.split(a["b"], 3)
    r = sigmoid(x @ w_xr.T + h @ w_hr.T + b_r)
    z = sigmoid(x @ w_xz.T + h @ w_hz.T + b_z)
    n = np.tanh(x @ w_xn.T + b_n + r * (h @ w_hn.T + a["bhn"]))
    return (1 - z) * n + z * h


def cudnn(a: dict[str, list[Array]], x: Array, h: Array) -> Array:
    """cuDNN's CUDNN_GRU: linLayerID 0 to 5 are r, i, h' of the input, then of the state."""
    w_r, w_i, w_h, r_r, r_i, r_h = a["matrices"]
    bw_r, bw_i, bw_h, br_r, br_i, br_h = a["biases"]
    i = sigmoid(x @ w_i.T + h @ r_i.T + bw_i + br_i)
    r = sigmoid(x @ w_r.T + h @ r_r.T + bw_r + br_r)
    new = np.tanh(x @ w_h.T + r * (h @ r_h.T + br_h) + bw_h)
    return (1 - i) * new + i * h


#: By convention, a step and its arrays for an input size and a number of units.
LIBRARIES: dict[str, tuple[Step, Callable[[Draw, int, int], Any]]] = {
    "pytorch": (
        pytorch,
        lambda draw, size, units: {
            "weight_ih_l0": draw(3 * units, size),
            "weight_hh_l0": draw(3 * units, units),
            "bias_ih_l0": draw(3 * units),
            "bias_hh_l0": draw(3 * units),
        },
    ),
    "keras": (
        keras,
        lambda draw, size, units: [
            draw(size, 3 * units),
            draw(units, 3 * units),
            draw(2, 3 * units),
        ],
    ),
    "onnx": (
        onnx,
        lambda draw, size, units: {
            "W": draw(1, 3 * units, size),
            "R": draw(1, 3 * units, units),
            "B": draw(1, 6 * units),
        },
    ),
    "flax_linen": (
        flax_linen,
        lambda draw, size, units: {
            **{f"i{gate}": {"kernel": draw(size, units), "bias": draw(units)} for gate in "rzn"},
            **{f"h{gate}": {"kernel": draw(units, units)} for gate in "rz"},
            "hn": {"kernel": draw(units, units), "bias": draw(units)},
        },
    ),
    "flax_nnx": (
        flax_nnx,
        lambda draw, size, units: {
            "dense_i": {"kernel": draw(size, 3 * units), "bias": draw(3 * units)},
            "dense_h": {"kernel": draw(units, 3 * units)},
        },
    ),
    "equinox": (
        equinox,
        lambda draw, size, units: {
            "weight_ih": draw(3 * units, size),
            "weight_hh": draw(3 * units, units),
            "bias": draw(3 * units),
            "bias_n": draw(units),
            "input_size": size,
            "hidden_size": units,
            "use_bias": True,
        },
    ),
    "mlx": (
        mlx,
        lambda draw, size, units: {
            "Wx": draw(3 * units, size),
            "Wh": draw(3 * units, units),
            "b": draw(3 * units),
            "bhn": draw(units),
        },
    ),
    "cudnn": (
        cudnn,
        lambda draw, size, units: {
            "matrices": [
                *(draw(units, size) for _ in range(3)),
                *(draw(units, units) for _ in range(3)),
            ],
            "biases": [draw(units) for _ in range(6)],
        },
    ),
}
LIBRARIES["paddle"] = LIBRARIES["pytorch"]


def run(step: Step, arrays: Any, inputs: Array, state: Array) -> Array:
    """States (T, B, H) of inputs (T, B, I), in float64."""
    states = []
    for x in inputs.astype(np.float64):
        state = step(arrays, x, state)
        states.append(state)
    return np.array(states)
