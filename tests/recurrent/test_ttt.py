import math

import keras
import numpy as np
import pytest
from keras import ops

import keras_edifice
from keras_edifice.recurrent.ttt import TTTLayer
from tests.support.close import assert_close, difference, to_numpy
from tests.support.compiled import compiled
from tests.support.counting import count_weights
from tests.support.gradients import gradients
from tests.support.numerical import numerical_gradient
from tests.support.shaking import shake
from tests.support.streaming import stream

rng = np.random.default_rng(0)
STEP = 1e-30


def silu(x):
    return x * sigmoid(x)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def gelu(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def rms_norm(x, scale, epsilon=1e-6):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon) * scale


def layer_norm(x, scale, shift):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * scale + shift


def convolved(x, w, name):
    kernel = w[f"{name}kernel"]
    padded = np.pad(x, [(0, 0), (len(kernel) - 1, 0), (0, 0)])
    taps = (k * padded[:, j : j + x.shape[1]] for j, k in enumerate(kernel))
    return sum(taps) + w[f"{name}bias"]


def turned(x, chunk_size, base):
    """Pairs (2i, 2i + 1) of x (b, t, h, d) as complex numbers, turned by t mod C."""
    place = np.arange(x.shape[1]) % chunk_size
    angles = place[:, None] * base ** (-np.arange(0, x.shape[-1], 2) / x.shape[-1])
    pairs = (x[..., ::2] + 1j * x[..., 1::2]) * np.exp(1j * angles)[:, None]
    return np.stack([pairs.real, pairs.imag], axis=-1).reshape(x.shape)


def inner(x, parameters, norm):
    """f(x; W) of one token of one head; parameters are W1, b1, W2, b2 as they come."""
    z = x
    for i in range(0, len(parameters), 2):
        z = (gelu(z) if i else z) @ parameters[i] + parameters[i + 1]
    return x + layer_norm(z, *norm)


def inner_gradient(k, v, parameters, norm):
    """Of the loss, by a step along the imaginary axis: nothing is derived by hand."""
    found = [np.zeros_like(p) for p in parameters]
    for i, p in enumerate(parameters):
        for index in np.ndindex(p.shape):
            moved = p.astype("complex128")
            moved[index] += 1j * STEP
            y = inner(k, [*parameters[:i], moved, *parameters[i + 1 :]], norm)
            found[i][index] = (0.5 * ((y - v) ** 2).sum()).imag / STEP
    return found


def head(q, k, v, rate, token_rate, parameters, norm):
    """One head of one example, a loop over its tokens."""
    outputs, start = [], parameters
    for t in range(len(q)):
        place = t % len(token_rate)
        if not place:
            total = [np.zeros_like(p) for p in start]
        found = inner_gradient(k[t], v[t], start, norm)
        total = [a + rate[t] * g for a, g in zip(total, found, strict=True)]
        now = [p - token_rate[place] * a for p, a in zip(start, total, strict=True)]
        outputs.append(inner(q[t], now, norm))
        start = now if place == len(token_rate) - 1 else start
    return np.stack(outputs)


def mixer(x, w, heads=2, base_lr=1.0, rope_base=10000.0):
    """The equations of the module in float64."""
    q, v = x @ w["q_proj/kernel"], x @ w["v_proj/kernel"]
    if "q_conv/kernel" in w:
        q, k = convolved(q, w, "q_conv/"), convolved(q, w, "k_conv/")
    else:
        k = x @ w["k_proj/kernel"]
    q, k, v = (z.reshape(*x.shape[:2], heads, -1) for z in (q, k, v))
    chunk_size = len(w["token_rate"])
    q, k = (turned(z, chunk_size, rope_base) for z in (q, k))
    rate = base_lr * sigmoid(x @ w["lr_kernel"] + w["lr_bias"]) / q.shape[-1]
    token_rate = np.maximum(1 / np.arange(1, chunk_size + 1) + w["token_rate"], 0)
    names = [n for n in ("W1", "b1", "W2", "b2") if n in w]
    y = np.zeros_like(q)
    for i, j in np.ndindex(len(x), heads):
        parameters, norm = [w[n][j] for n in names], (w["gamma"][j], w["beta"][j])
        sequences = (z[i, :, j] for z in (q, k, v, rate))
        y[i, :, j] = head(*sequences, token_rate, parameters, norm)
    y = layer_norm(y.reshape(x.shape), w["post_norm/gamma"], w["post_norm/beta"])
    if "g_proj/kernel" in w:
        y = gelu(x @ w["g_proj/kernel"]) * y
    return y @ w["o_proj/kernel"]


def feed_forward(x, w):
    return (silu(x @ w["gate/kernel"]) * (x @ w["up/kernel"])) @ w["down/kernel"]


def named_weights(layer):
    """The weights of a layer by their names below it, in float64."""
    return {v.path.removeprefix(f"{layer.path}/"): to_numpy(v) for v in layer.weights}


def all_weights(model):
    return {layer.name: named_weights(layer) for layer in model.layers}


def reference(x, weights, **options):
    """The whole model on (batch, time, features), from its weights."""
    x = np.asarray(x, "float64") @ weights["embed"]["kernel"]

    def branch(name, function):
        return function(rms_norm(x, weights[f"{name}_norm"]["gamma"]), weights[name])

    for i in range(2):
        if f"conv_{i}" in weights:
            x = x + branch(f"conv_{i}", lambda x, w: convolved(x, w, ""))
        x = x + branch(f"ttt_{i}", lambda x, w: mixer(x, w, **options))
        x = x + branch(f"ffn_{i}", feed_forward)
    return rms_norm(x, weights["final_norm"]["gamma"])


def model(**options):
    sizes = dict(embed_size=3, hidden_size=8, num_heads=2, num_layers=2, chunk_size=4)
    options = {**sizes, "window_size": None, "return_sequences": True, **options}
    keras.utils.set_random_seed(0)
    return shake(keras_edifice.build("ttt", **options))


def layer(**options):
    keras.utils.set_random_seed(0)
    built = TTTLayer(**{"num_heads": 2, "chunk_size": 4, **options})
    built.build((None, None, 8))
    return shake(built)


def run(layer, x, **options):
    """The call of a layer with options that are no arrays to be traced."""
    return compiled(lambda x: layer(x, **options))(ops.convert_to_tensor(x))


def predict(model, x):
    return model.predict(x, verbose=0)


def inputs(length=11, features=3, batch=2):
    return rng.normal(size=(batch, length, features)).astype("float32")


MAMBA = dict(inner_model="mlp", backbone="mamba", pre_conv=True)


@pytest.mark.parametrize(
    ("options", "in_reference"),
    [
        ({}, {}),
        (MAMBA, {"base_lr": 0.1}),
        (
            dict(chunk_size=1, base_lr=0.5, rope_base=7.0, mlp_ratio=1.5),
            {"base_lr": 0.5, "rope_base": 7.0},
        ),
    ],
    ids=["linear", "mlp in mamba", "token by token"],
)
def test_output_is_the_equation(options, in_reference):
    built, x = model(**options), inputs(7)
    expected = reference(x, all_weights(built), **in_reference)
    assert_close(predict(built, x), expected, 1e-4)


def test_gradient_is_that_of_the_equation():
    built, x = model(**MAMBA), inputs(5, batch=1)
    r = rng.normal(size=(1, 5, 8)).astype("float32")
    by_weight, by_input = gradients(
        built, x, lambda y: ops.sum(ops.multiply(y, ops.convert_to_tensor(r)))
    )
    for variable, gradient in zip(built.trainable_variables, by_weight, strict=True):
        assert np.abs(gradient).max() > 0, f"{variable.path} does not learn"
    weights = all_weights(built)
    for name in ("W1", "token_rate", "lr_kernel", None):
        kept = x if name is None else weights["ttt_0"][name]
        direction = rng.normal(size=kept.shape)

        def value(s, name=name, kept=kept, direction=direction):
            moved = kept + s * direction
            if name is None:
                return (reference(moved, weights, base_lr=0.1) * r).sum()
            changed = {**weights["ttt_0"], name: moved}
            return (reference(x, {**weights, "ttt_0": changed}, base_lr=0.1) * r).sum()

        paths = [v.path for v in built.trainable_variables]
        found = by_input if name is None else by_weight[paths.index(f"ttt_0/{name}")]
        size = max(np.linalg.norm(found), 1e-2)
        expected = numerical_gradient(value, np.zeros(())) / size
        assert_close((found * direction).sum() / size, expected, 1e-4)


def test_initial_weights_are_those_of_the_paper():
    keras.utils.set_random_seed(0)
    built = TTTLayer(2, "mlp", use_gate=True)
    built.build((None, None, 64))
    for name, value in named_weights(built).items():
        if name.endswith(("gamma", "beta", "bias", "b1", "b2", "token_rate")):
            assert_close(value, np.full_like(value, float(name.endswith("gamma"))), 0)
        else:
            assert abs(value.std() - 0.02) < 0.003, name
    assert named_weights(built)["W2"].shape == (2, 128, 32)


@pytest.mark.parametrize("options", [{}, MAMBA], ids=["linear", "mlp in mamba"])
def test_token_by_token_is_the_whole_sequence(options):
    x, whole = inputs(), model(**options)
    assert_close(stream(whole, x), predict(whole, x), 1e-4)


def test_segments_with_the_carried_state_are_one_pass():
    mixed, x = layer(share_qk=True), inputs(11, 8)
    first, state = run(mixed, x[:, :6], return_state=True)  # within a mini-batch
    second, state = run(mixed, x[:, 6:], initial_state=state, return_state=True)
    whole, expected = run(mixed, x, return_state=True)
    assert_close(ops.concatenate([first, second], axis=1), whole)
    parts = zip(keras.tree.flatten(state), keras.tree.flatten(expected), strict=True)
    for part, whole_part in parts:
        assert_close(part, whole_part)


def test_future_tokens_do_not_change_the_past():
    built, x = model(**MAMBA), inputs(12)
    changed = x.copy()
    changed[:, 6:] += 1.0
    before, after = predict(built, x), predict(built, changed)
    assert_close(after[:, :6], before[:, :6], 1e-6)
    assert difference(after[:, 6:], before[:, 6:]) > 1e-3


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(side):
    x = inputs()
    valid = slice(6) if side == "right" else slice(5, None)
    mask = np.zeros((2, 11), "bool")
    mask[:, valid] = True
    built = model(**MAMBA, return_sequences=False)
    y = run(built, x, mask=ops.convert_to_tensor(mask))
    assert_close(y, predict(built, x[:, valid]))


def test_masked_steps_leave_the_state():
    mixed, x = layer(share_qk=True), inputs(7, 8)
    mask = np.array([[1, 1, 0, 1, 1, 1, 0], [0, 0, 0, 0, 1, 1, 0]], "bool")
    y, state = run(mixed, x, mask=ops.convert_to_tensor(mask), return_state=True)
    without_state = run(mixed, x, mask=ops.convert_to_tensor(mask))
    for row in range(2):
        short = x[row : row + 1, mask[row]]
        expected_y, expected = run(mixed, short, return_state=True)
        assert_close(to_numpy(y)[row : row + 1, mask[row]], expected_y)
        assert_close(to_numpy(without_state)[row : row + 1, mask[row]], expected_y)
        parts = keras.tree.flatten(state), keras.tree.flatten(expected)
        for part, whole in zip(*parts, strict=True):
            assert_close(part[row : row + 1], whole)


def test_without_step_size_it_is_a_fixed_model_of_the_queries():
    mixed, x = layer(base_lr=0.0), inputs(5, 8)
    w = named_weights(mixed)
    q = turned((x @ w["q_proj/kernel"]).reshape(2, 5, 2, 4), 4, 10000.0)
    z = np.einsum("bthi,hio->btho", q, w["W1"]) + w["b1"]
    y = (q + layer_norm(z, w["gamma"], w["beta"])).reshape(2, 5, 8)
    y = layer_norm(y, w["post_norm/gamma"], w["post_norm/beta"])
    assert_close(run(mixed, x), y @ w["o_proj/kernel"])


def test_long_sequences_stay_finite():
    mixed, x = layer(inner_model="mlp", chunk_size=64), inputs(4096, 8, batch=1)
    for scale in (1.0, 1e3):  # which saturates the step sizes
        assert np.isfinite(to_numpy(run(mixed, scale * x))).all()


def test_half_precision_streams_with_a_state_in_float32():
    mixed, x = layer(dtype="mixed_bfloat16", use_gate=True), inputs(5, 8)
    state = mixed.initial_state(2)
    step, outputs = compiled(mixed.step), []
    for t in range(5):
        y, state = step(ops.convert_to_tensor(x[:, t]), state)
        assert keras.backend.standardize_dtype(y.dtype) == "bfloat16"
        outputs.append(ops.cast(y, "float32"))
    kept = {keras.backend.standardize_dtype(z.dtype) for z in keras.tree.flatten(state)}
    assert kept == {"float32"}
    # bfloat16 keeps 8 bits, in the projections around the recurrence.
    whole = ops.cast(run(mixed, x), "float32")
    assert difference(ops.stack(outputs, axis=1), whole) < 0.05


@pytest.mark.parametrize(
    ("variant", "inner_model", "weights"),
    [
        ("125m", "linear", 110_276_688),
        ("125m", "mlp", 114_442_320),
        ("350m", "mlp", 348_399_360),
        ("760m", "linear", 733_018_368),
        ("1.3b", "linear", 1_284_852_864),
    ],
)
def test_published_sizes(variant, inner_model, weights):
    options = dict(variant=variant, inner_model=inner_model, vocab_size=32_000)
    assert count_weights("ttt", **options) == (weights, 0)


def test_config_keeps_the_arguments():
    options = dict(
        num_heads=3,
        inner_model="mlp",
        base_lr=0.3,
        chunk_size=5,
        use_gate=True,
        share_qk=True,
        conv_size=2,
        rope_base=100.0,
    )
    config = TTTLayer(**options).get_config()
    assert {name: config[name] for name in options} == options


def test_unknown_inner_models_are_refused():
    with pytest.raises(ValueError, match="inner_model must be one of .* received 'x'"):
        TTTLayer(inner_model="x")


def test_heads_of_an_odd_width_are_refused():
    message = "multiple of 2 \\* num_heads, received 6 and num_heads=2; change one"
    with pytest.raises(ValueError, match=message):
        TTTLayer(num_heads=2).build((None, None, 6))
