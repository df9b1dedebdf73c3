"""Tests of `convert` against the libraries themselves.

They are skipped where a library is not installed. `bash tools/nightly.sh frameworks` installs all
and runs them.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import grutrace
from tests.conversion import published
from tests.conversion.test_convert import states

INPUT, HIDDEN, BATCH, STEPS = 3, 4, 5, 200

#: Set in the nightly run, so that a missing library is an error and not a skipped test.
REQUIRED = "GRUTRACE_REQUIRE_PACKAGES"

#: By type, the largest difference of a state after up to 200 steps.
TYPES = [("float32", 1e-6), ("float64", 1e-12)]


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Warnings of the libraries are not tested here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def needs(name: str) -> Any:
    if os.environ.get(REQUIRED):
        return importlib.import_module(name)
    return pytest.importorskip(name, reason=f"{name} is not installed")


def draw(dtype: str, *shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, shape).astype(dtype)


def initial(dtype: str) -> np.ndarray:
    return draw(dtype, 1, BATCH, HIDDEN, seed=1)


def check(layer: torch.nn.GRU, expected: Any, dtype: str, allowed: float, h: Any = None) -> None:
    """Compare states (T, B, H), and as a control those of exchanged gates."""
    inputs = draw(dtype, STEPS, BATCH, INPUT)
    h = initial(dtype) if h is None else h
    assert layer.weight_ih_l0.dtype == getattr(torch, dtype)
    expected = np.asarray(expected, np.float64)
    assert expected.shape[:2] == (STEPS, BATCH)
    assert abs(states(layer, inputs, h) - expected).max() < allowed
    with torch.no_grad():
        layer.weight_hh_l0[: 2 * HIDDEN] = layer.weight_hh_l0[: 2 * HIDDEN].roll(HIDDEN, 0)
    assert abs(states(layer, inputs, h) - expected).max() > 1e-3


@pytest.fixture
def keras() -> Any:
    if os.environ.get("KERAS_BACKEND") is None:
        os.environ["KERAS_BACKEND"] = "torch"
    keras = needs("keras")
    keras.utils.set_random_seed(0)
    return keras


def with_biases(layer: Any) -> Any:
    """Biases are zero in a new Keras layer; draw them, as training would."""
    layer.set_weights(
        [
            w if w.ndim != 2 or w.shape[0] != 2 else draw(str(w.dtype), *w.shape, seed=number)
            for number, w in enumerate(layer.get_weights())
        ]
    )
    return layer


@pytest.mark.parametrize(("dtype", "allowed"), TYPES)
def test_keras(keras: Any, dtype: str, allowed: float) -> None:
    layer = keras.layers.GRU(HIDDEN, return_sequences=True, dtype=dtype)
    layer.build((None, STEPS, INPUT))
    with_biases(layer)
    inputs, h = draw(dtype, STEPS, BATCH, INPUT), initial(dtype)
    expected = keras.ops.convert_to_numpy(
        layer(inputs.transpose(1, 0, 2), initial_state=keras.ops.convert_to_tensor(h[0]))
    ).transpose(1, 0, 2)
    check(grutrace.convert(layer.get_weights(), "keras"), expected, dtype, allowed)


@pytest.mark.parametrize(("dtype", "allowed"), TYPES)
def test_keras_in_both_directions(keras: Any, dtype: str, allowed: float) -> None:
    inner = keras.layers.GRU(HIDDEN, return_sequences=True, dtype=dtype)
    layer = keras.layers.Bidirectional(inner, dtype=dtype)
    layer.build((None, STEPS, INPUT))
    with_biases(layer)
    inputs = draw(dtype, STEPS, BATCH, INPUT)
    expected = keras.ops.convert_to_numpy(layer(inputs.transpose(1, 0, 2))).transpose(1, 0, 2)
    zeros = np.zeros((2, BATCH, HIDDEN))
    check(grutrace.convert(layer.get_weights(), "keras"), expected, dtype, allowed, zeros)


def test_keras_with_reset_after_false_is_the_refused_equation(keras: Any) -> None:
    layer = keras.layers.GRU(HIDDEN, return_sequences=True, reset_after=False, dtype="float64")
    layer.build((None, STEPS, INPUT))
    inputs = draw("float64", STEPS, BATCH, INPUT)
    found = keras.ops.convert_to_numpy(layer(inputs.transpose(1, 0, 2))).transpose(1, 0, 2)
    weights, zeros = layer.get_weights(), np.zeros((BATCH, HIDDEN))
    expected = published.run(published.keras_reset_before, weights, inputs, zeros)
    assert abs(found - expected).max() < 1e-6
    # The control: the other equation.
    other = [*weights[:2], np.stack([weights[2], 0 * weights[2]])]
    assert abs(found - published.run(published.keras, other, inputs, zeros)).max() > 1e-2
    with pytest.raises(grutrace.UnsupportedError, match="keras: a GRU with reset_after=False"):
        grutrace.convert(weights, "keras")


def test_a_gru_of_keras_in_a_torch_model_is_named(keras: Any) -> None:
    if keras.backend.backend() != "torch":
        pytest.skip("Keras runs on another backend")

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = keras.layers.GRU(HIDDEN)
            self.cell = keras.layers.GRUCell(HIDDEN)

    message = r"; rnn is a Keras GRU, .*grutrace\.convert\(.*\); cell is a Keras GRU"
    with pytest.raises(grutrace.UnsupportedError, match=message) as caught:
        grutrace.trace(Model())
    assert "rnn.cell" not in str(caught.value)


def onnx_model(arrays: dict[str, np.ndarray], after: int) -> Any:
    onnx = needs("onnx")
    helper, kind = onnx.helper, onnx.helper.np_dtype_to_tensor_dtype(arrays["W"].dtype)
    directions = len(arrays["W"])
    node = helper.make_node(
        "GRU",
        ["x", "W", "R", "B", "", "h"],
        ["y"],
        hidden_size=HIDDEN,
        linear_before_reset=after,
        direction="bidirectional" if directions == 2 else "forward",
    )
    graph = helper.make_graph(
        [node],
        "gru",
        [
            helper.make_tensor_value_info("x", kind, [STEPS, BATCH, INPUT]),
            helper.make_tensor_value_info("h", kind, [directions, BATCH, HIDDEN]),
        ],
        [helper.make_tensor_value_info("y", kind, [STEPS, directions, BATCH, HIDDEN])],
        [onnx.numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    opset = helper.make_opsetid("", 14)
    return helper.make_model(graph, opset_imports=[opset], ir_version=8)


def onnx_arrays(dtype: str, directions: int = 1) -> dict[str, np.ndarray]:
    shapes = {"W": (3 * HIDDEN, INPUT), "R": (3 * HIDDEN, HIDDEN), "B": (6 * HIDDEN,)}
    return {
        name: 0.7 * draw(dtype, directions, *shape, seed=number)
        for number, (name, shape) in enumerate(shapes.items())
    }


@pytest.mark.parametrize("directions", [1, 2])
def test_onnx_runtime(directions: int, tmp_path: Path) -> None:
    """It has this operator for float32 only. It keeps files open, so it gets its own process."""
    if importlib.util.find_spec("onnxruntime") is None:
        needs("onnxruntime")
    arrays = onnx_arrays("float32", directions)
    h = draw("float32", directions, BATCH, HIDDEN, seed=1)
    (tmp_path / "gru.onnx").write_bytes(onnx_model(arrays, after=1).SerializeToString())
    np.savez(tmp_path / "in.npz", x=draw("float32", STEPS, BATCH, INPUT), h=h)
    code = """if True:
        import numpy as np, onnxruntime
        session = onnxruntime.InferenceSession("gru.onnx")
        np.save("out.npy", session.run(None, dict(np.load("in.npz")))[0])
    """
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True)
    expected = np.load(tmp_path / "out.npy").transpose(0, 2, 1, 3).reshape(STEPS, BATCH, -1)
    check(grutrace.convert(arrays, "onnx", reset_after=True), expected, "float32", 1e-6, h)


@pytest.mark.parametrize("after", [0, 1])
def test_onnx_reference(after: int) -> None:
    """ONNX's own evaluator, in float64."""
    onnx = needs("onnx")
    reference = importlib.import_module("onnx.reference")
    assert onnx is not None
    arrays = onnx_arrays("float64")
    x, h = draw("float64", STEPS, BATCH, INPUT), initial("float64")
    (y,) = reference.ReferenceEvaluator(onnx_model(arrays, after)).run(None, {"x": x, "h": h})
    if after:
        check(grutrace.convert(arrays, "onnx", reset_after=True), y[:, 0], "float64", 1e-12)
        return
    expected = published.run(published.onnx_reset_before, arrays, x, h[0])
    assert abs(y[:, 0] - expected).max() < 1e-12
    with pytest.raises(grutrace.UnsupportedError, match="onnx: a GRU with reset_after=False"):
        grutrace.convert(arrays, "onnx", reset_after=False)


@pytest.fixture
def jax() -> Iterator[Any]:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    jax = needs("jax")
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    yield jax
    jax.config.update("jax_enable_x64", before)


def drawn_like(jax: Any, tree: Any, dtype: str) -> Any:
    """Biases are zero in a new layer; draw all arrays."""
    leaves, structure = jax.tree.flatten(tree)
    new = [0.7 * draw(dtype, *leaf.shape, seed=number) for number, leaf in enumerate(leaves)]
    return jax.tree.unflatten(structure, [jax.numpy.asarray(leaf, dtype) for leaf in new])


@pytest.mark.parametrize(("dtype", "allowed"), TYPES)
def test_flax_linen(jax: Any, dtype: str, allowed: float) -> None:
    needs("flax")
    linen = importlib.import_module("flax.linen")
    cell = linen.GRUCell(HIDDEN, param_dtype=dtype, dtype=dtype)
    h, inputs = initial(dtype)[0], draw(dtype, STEPS, BATCH, INPUT)
    variables = drawn_like(jax, cell.init(jax.random.key(0), h, inputs[0]), dtype)
    expected = loop(lambda h, x: cell.apply(variables, h, x)[0], h, inputs)
    check(grutrace.convert(variables["params"], "flax_linen"), expected, dtype, allowed)


@pytest.mark.parametrize(("dtype", "allowed"), TYPES)
def test_flax_nnx(jax: Any, dtype: str, allowed: float) -> None:
    needs("flax")
    nnx = importlib.import_module("flax.nnx")
    cell = nnx.GRUCell(INPUT, HIDDEN, param_dtype=dtype, dtype=dtype, rngs=nnx.Rngs(0))
    nnx.update(cell, drawn_like(jax, nnx.state(cell), dtype))
    h, inputs = initial(dtype)[0], draw(dtype, STEPS, BATCH, INPUT)
    expected = loop(lambda h, x: cell(h, x)[0], h, inputs)
    check(grutrace.convert(nnx.state(cell), "flax_nnx"), expected, dtype, allowed)


@pytest.mark.parametrize(("dtype", "allowed"), TYPES)
def test_equinox(jax: Any, dtype: str, allowed: float) -> None:
    equinox = needs("equinox")
    cell = equinox.nn.GRUCell(INPUT, HIDDEN, dtype=dtype, key=jax.random.key(0))
    step = jax.vmap(lambda h, x: cell(x, h))
    expected = loop(step, initial(dtype)[0], draw(dtype, STEPS, BATCH, INPUT))
    check(grutrace.convert(vars(cell), "equinox"), expected, dtype, allowed)


def test_haikus_gru_is_the_refused_equation(jax: Any) -> None:
    haiku = needs("haiku")
    transformed = haiku.without_apply_rng(haiku.transform(lambda x, h: haiku.GRU(HIDDEN)(x, h)[0]))
    h, inputs = initial("float64")[0], draw("float64", STEPS, BATCH, INPUT)
    parameters = drawn_like(jax, transformed.init(jax.random.key(0), inputs[0], h), "float64")
    found = loop(lambda h, x: transformed.apply(parameters, x, h), h, inputs)
    arrays = {name: np.asarray(value) for name, value in parameters["gru"].items()}
    expected = published.run(published.haiku, arrays, inputs, h)
    assert abs(found - expected).max() < 1e-12
    with pytest.raises(grutrace.UnsupportedError, match=r"haiku: this library's GRU"):
        grutrace.convert(parameters["gru"], "haiku")


def loop(step: Any, h: Any, inputs: np.ndarray) -> np.ndarray:
    """States (T, B, H) of a step, which takes a state and an input."""
    states = []
    for x in inputs:
        h = step(h, x)
        states.append(np.asarray(h))
    return np.array(states)


@pytest.mark.parametrize(("dtype", "allowed"), TYPES)
def test_paddle(dtype: str, allowed: float) -> None:
    paddle = needs("paddle")
    paddle.set_default_dtype(dtype)
    try:
        layer = paddle.nn.GRU(INPUT, HIDDEN, num_layers=2, direction="bidirect", time_major=True)
    finally:
        paddle.set_default_dtype("float32")
    h = draw(dtype, 4, BATCH, HIDDEN, seed=1)
    inputs = draw(dtype, STEPS, BATCH, INPUT)
    expected = layer(paddle.to_tensor(inputs), paddle.to_tensor(h))[0].numpy()
    check(grutrace.convert(layer.state_dict(), "paddle"), expected, dtype, allowed, h)


@pytest.mark.parametrize(("dtype", "allowed"), [("float32", 1e-6), ("float64", 1e-7)])
def test_mlx(dtype: str, allowed: float) -> None:
    """MLX's sigmoid of a float64 has the digits of float32 (0.32.4, on a CPU)."""
    core = needs("mlx.core")
    layers, kind = importlib.import_module("mlx.nn"), getattr(core, dtype)
    with core.stream(core.cpu):
        layer = layers.GRU(INPUT, HIDDEN)
        layer.set_dtype(kind)
        inputs = core.array(draw(dtype, STEPS, BATCH, INPUT).transpose(1, 0, 2), dtype=kind)
        expected = np.asarray(layer(inputs, core.array(initial(dtype)[0], dtype=kind)))
        arrays = layer.parameters()
        check(grutrace.convert(arrays, "mlx"), expected.transpose(1, 0, 2), dtype, allowed)


@pytest.mark.parametrize(("dtype", "allowed"), TYPES)
def test_torchrl(dtype: str, allowed: float) -> None:
    """Its layers are batch-first."""
    needs("torchrl")
    rnn = importlib.import_module("torchrl.modules")
    layer = rnn.GRU(INPUT, HIDDEN, dtype=getattr(torch, dtype))
    inputs = torch.from_numpy(draw(dtype, STEPS, BATCH, INPUT))
    with torch.no_grad():
        output, _ = layer(inputs.transpose(0, 1), torch.from_numpy(initial(dtype)))
    expected = output.transpose(0, 1)
    check(grutrace.convert(layer.state_dict(), "pytorch"), expected, dtype, allowed)
