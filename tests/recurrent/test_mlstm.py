import keras
import numpy as np
import pytest
from keras import ops

import keras_edifice
from keras_edifice.recurrent.mlstm import (
    BlockDiagonalDense,
    MLSTM7BLayer,
    MLSTMLayer,
    SoftCap,
    XLSTMFeedForward,
)
from tests.support.close import assert_close, difference, to_numpy
from tests.support.compiled import compiled
from tests.support.counting import count_weights
from tests.support.gradients import gradients
from tests.support.numerical import numerical_gradient
from tests.support.shaking import shake
from tests.support.streaming import stream

rng = np.random.default_rng(0)
BOTH = pytest.mark.parametrize("kind", [MLSTMLayer, MLSTM7BLayer])


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def silu(x):
    return x * sigmoid(x)


def layer_norm(x, gamma, epsilon=1e-5):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + epsilon) * gamma


def rms_norm(x, gamma):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * gamma


def convolved(x, w):
    kernel = w["conv/kernel"]
    padded = np.pad(x, [(0, 0), (len(kernel) - 1, 0), (0, 0)])
    taps = (tap * padded[:, j : j + x.shape[1]] for j, tap in enumerate(kernel))
    return sum(taps) + w["conv/bias"]


def block_diagonal(x, kernel):
    parts = x.reshape(*x.shape[:-1], *kernel.shape[:2])
    return np.einsum("bthi,hio->btho", parts, kernel).reshape(*x.shape[:-1], -1)


def memory(q, k, v, gates):
    """C, n and h without a stabiliser: the gates as they are, (b, t, heads, ·)."""
    i, f = np.split(gates, 2, axis=-1)
    i, f = np.exp(i), sigmoid(f)
    C, n, outputs = 0.0, 0.0, []
    for t in range(q.shape[1]):
        k_t = k[:, t] / np.sqrt(k.shape[-1])
        C = f[:, t, :, None, None] * C + i[:, t, :, None, None] * (
            k_t[..., None] * v[:, t, :, None]
        )
        n = f[:, t, :, None] * n + i[:, t, :, None] * k_t
        sums = np.abs(np.einsum("bhk,bhk->bh", n, q[:, t]))
        read = np.einsum("bhkv,bhk->bhv", C, q[:, t])
        outputs.append(read / np.maximum(sums, 1)[..., None])
    return np.stack(outputs, axis=1), C, n


def by_heads(x, heads=2):
    return x.reshape(*x.shape[:2], heads, -1)


def mixer(x, w):
    """The equations of the module in float64, and the last C and n."""
    x_m, z = np.split(x @ w["up_proj/kernel"], 2, axis=-1)
    x_c = silu(convolved(x_m, w) if "conv/kernel" in w else x_m)
    q, k = (block_diagonal(x_c, w[f"{name}_proj/kernel"]) for name in "qk")
    v = block_diagonal(x_m, w["v_proj/kernel"])
    gates = np.concatenate([q, k, v], -1) @ w["gates/kernel"] + w["gates/bias"]
    h, C, n = memory(*(by_heads(part) for part in (q, k, v)), gates)
    h = layer_norm(h, w["norm/gamma"]).reshape(x_c.shape)
    return ((h + w["skip"] * x_c) * silu(z)) @ w["down_proj/kernel"], C, n


def mixer_7b(x, w):
    q, k, v = (by_heads(x @ w[f"{name}_proj/kernel"]) for name in "qkv")
    gates = 15 * np.tanh((x @ w["gates/kernel"] + w["gates/bias"]) / 15)
    h, C, n = memory(q, k, v, gates)
    h = layer_norm(h, w["norm/gamma"], 1e-6).reshape(x.shape)
    return (sigmoid(x @ w["o_proj/kernel"]) * h) @ w["out_proj/kernel"], C, n


def feed_forward(x, w):
    return (silu(x @ w["gate/kernel"]) * (x @ w["up/kernel"])) @ w["down/kernel"]


def named_weights(layer):
    """The weights of a layer by their names below it, in float64."""
    return {v.path.removeprefix(f"{layer.path}/"): to_numpy(v) for v in layer.weights}


def reference(x, model):
    """The whole model on (batch, time, features), from its weights."""
    x = np.asarray(x, "float64") @ to_numpy(model.get_layer("embed").kernel)
    names = {layer.name for layer in model.layers}
    is_7b = "ffn_0" in names
    norm = rms_norm if is_7b else layer_norm

    def branch(name, function):
        gamma = to_numpy(model.get_layer(f"{name}_norm").gamma)
        return function(norm(x, gamma), named_weights(model.get_layer(name)))

    for i in range(2):
        x = x + branch(f"mlstm_{i}", mixer_7b if is_7b else mixer)[0]
        if is_7b:
            x = x + branch(f"ffn_{i}", feed_forward)
    return norm(x, to_numpy(model.get_layer("final_norm").gamma))


def model(**options):
    sizes = dict(embed_size=3, hidden_size=4, num_heads=2, num_layers=2, chunk_size=4)
    sizes |= dict(qkv_block_size=2, proj_round=4, return_sequences=True)
    keras.utils.set_random_seed(0)
    options = {**sizes, "window_size": None, **options}
    return shake(keras_edifice.build("mlstm", **options))


def layer(kind=MLSTMLayer, **options):
    if kind is MLSTMLayer:
        options = {"proj_round": 4, "qkv_block_size": 2, **options}
    keras.utils.set_random_seed(0)
    built = kind(**{"num_heads": 2, "chunk_size": 4, **options})
    built.build((None, None, 4))
    return shake(built)


def run(layer, x, **options):
    """The call of a layer with options that are no arrays to be traced."""
    return compiled(lambda x: layer(x, **options))(ops.convert_to_tensor(x))


def predict(model, x):
    return model.predict(x, verbose=0)


def inputs(length=11, features=3):
    return rng.normal(size=(2, length, features)).astype("float32")


@pytest.mark.parametrize(
    "options", [{}, {"conv_size": 0}, {"block_style": "7b"}], ids=str
)
def test_output_is_that_of_the_equations_without_a_stabiliser(options):
    built, x = model(**options), inputs()
    assert_close(predict(built, x), reference(x, built), 1e-4)


@pytest.mark.parametrize("style", ["original", "7b"])
def test_gradient_is_that_of_the_equation(style):
    built, x = model(block_style=style), inputs(5)
    r = rng.normal(size=(2, 5, 4)).astype("float32")
    by_weight, by_input = gradients(
        built, x, lambda y: ops.sum(y * ops.convert_to_tensor(r))
    )
    expected = numerical_gradient(lambda z: (reference(z, built) * r).sum(), x)
    assert difference(by_input, expected) < 1e-4
    for variable, gradient in zip(built.trainable_variables, by_weight, strict=True):
        assert np.abs(gradient).max() > 0, f"{variable.path} does not learn"


def test_initial_weights_are_those_of_the_paper():
    keras.utils.set_random_seed(0)
    built = keras_edifice.build("mlstm", embed_size=64, hidden_size=64, num_layers=2)
    w = named_weights(built.get_layer("mlstm_1"))
    small = np.sqrt(2 / (5 * 64))
    for name in ("up", "q", "k", "v"):
        assert abs(w[f"{name}_proj/kernel"].std() / small - 1) < 0.1
    assert abs(w["down_proj/kernel"].std() / (2 / (2 * np.sqrt(64))) - 1) < 0.1
    assert not w["gates/kernel"].any()
    assert_close(w["gates/bias"][4:], [3, 4, 5, 6])
    assert 0 < np.abs(w["gates/bias"][:4]).max() < 0.5
    for name in ("skip", "norm/gamma"):
        assert_close(w[name], np.ones_like(w[name]), 0)
    assert w["norm/gamma"].shape == (4, 32)
    assert w["q_proj/kernel"].shape == (32, 4, 4)


def test_initial_weights_of_7b():
    keras.utils.set_random_seed(0)
    built = keras_edifice.build(
        "mlstm", embed_size=48, hidden_size=48, num_layers=2, block_style="7b"
    )
    w = named_weights(built.get_layer("mlstm_1"))
    assert w["q_proj/kernel"].shape == w["k_proj/kernel"].shape == (48, 24)
    assert not w["gates/kernel"].any()
    assert_close(w["gates/bias"], [-10, -10, -10, -10, 3, 4, 5, 6])
    assert abs(w["out_proj/kernel"].std() / (1 / np.sqrt(48)) - 1) < 0.1
    ffn = named_weights(built.get_layer("ffn_1"))
    assert ffn["gate/kernel"].shape == (48, 128)  # 8/3 of 48, a multiple of 64
    assert abs(ffn["down/kernel"].std() / (1 / np.sqrt(48)) - 1) < 0.1


@BOTH
def test_chunks_change_nothing(kind):
    x = inputs(21, 4)
    equations = mixer if kind is MLSTMLayer else mixer_7b
    expected, C, n = equations(x, named_weights(layer(kind)))
    for chunk_size in (1, 64):
        y, (_, state) = run(layer(kind, chunk_size=chunk_size), x, return_state=True)
        # Digits go where n·q, which divides, is small.
        assert_close(y, expected, 1e-4)
        scale = np.exp(to_numpy(state[2]))  # the state is kept times e^{-m}
        assert_close(to_numpy(state[0]) * scale[..., None, None], C, 1e-4)
        assert_close(to_numpy(state[1]) * scale[..., None], n, 1e-4)


@pytest.mark.parametrize("style", ["original", "7b"])
def test_token_by_token_is_the_whole_sequence(style):
    x, whole = inputs(), model(block_style=style)
    assert_close(stream(whole, x), predict(whole, x), 1e-4)


@BOTH
def test_segments_with_the_carried_state_are_one_pass(kind):
    mixed, x = layer(kind), inputs(11, 4)
    first, state = run(mixed, x[:, :2], return_state=True)
    second, state = run(mixed, x[:, 2:], initial_state=state, return_state=True)
    whole, expected = run(mixed, x, return_state=True)
    assert_close(ops.concatenate([first, second], axis=1), whole)
    parts = zip(keras.tree.flatten(state), keras.tree.flatten(expected), strict=True)
    for part, whole_part in parts:
        assert_close(part, whole_part)


def test_future_tokens_do_not_change_the_past():
    built, x = model(), inputs(20)
    changed = x.copy()
    changed[:, 10:] += 1.0
    before, after = predict(built, x), predict(built, changed)
    assert_close(after[:, :10], before[:, :10], 1e-6)
    assert difference(after[:, 10:], before[:, 10:]) > 1e-3


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(side):
    x = inputs()
    valid = slice(4) if side == "right" else slice(7, None)
    mask = np.zeros((2, 11), "bool")
    mask[:, valid] = True
    built = model(return_sequences=False, pool="last")
    y = run(built, x, mask=ops.convert_to_tensor(mask))
    assert_close(y, predict(built, x[:, valid]))


@BOTH
def test_masked_steps_leave_the_state(kind):
    mixed, x = layer(kind), inputs(11, 4)
    mask = np.arange(11)[None] < np.array([[5], [2]])
    _, state = run(mixed, x, mask=mask, return_state=True)
    for row, length in enumerate((5, 2)):
        _, expected = run(mixed, x[row : row + 1, :length], return_state=True)
        parts = keras.tree.flatten(state), keras.tree.flatten(expected)
        for part, short in zip(*parts, strict=True):
            assert_close(part[row : row + 1], short)


def test_a_shift_of_the_stabiliser_and_its_state_cancels():
    mixed, x = layer(), inputs(6, 4)
    _, (seen, (C, n, m)) = run(mixed, x[:, :3], return_state=True)
    expected = run(mixed, x[:, 3:], initial_state=(seen, (C, n, m)))
    factor = float(np.exp(-2.0))
    shifted = seen, (C * factor, n * factor, m + 2.0)
    assert_close(run(mixed, x[:, 3:], initial_state=shifted), expected)


def test_larger_input_gates_cancel_where_the_sum_of_the_weights_divides():
    mixed, x = layer(), inputs(7, 4)
    bias = to_numpy(mixed.gates.bias)
    outputs = []
    for shift in (12.0, 14.0):  # so large that |n·q| exceeds one everywhere
        mixed.gates.bias.assign(bias + shift * np.array([1, 1, 0, 0]))
        outputs.append(run(mixed, x))
    assert_close(*outputs, 1e-4)


def test_open_gates_make_it_normalised_linear_attention():
    mixed, x = layer(), inputs(7, 4)
    mixed.gates.kernel.assign(np.zeros((24, 4)))
    mixed.gates.bias.assign([0, 0, 1e3, 1e3])
    w = named_weights(mixed)
    x_m, z = np.split(x @ w["up_proj/kernel"], 2, axis=-1)
    x_c = silu(convolved(x_m, w))
    q, k = (by_heads(block_diagonal(x_c, w[f"{n}_proj/kernel"])) for n in "qk")
    v = by_heads(block_diagonal(x_m, w["v_proj/kernel"]))
    weights = np.tril(np.einsum("bthk,bshk->bhts", q, k) / np.sqrt(4))
    sums = np.maximum(np.abs(weights.sum(-1)), 1)
    h = np.einsum("bhts,bshv->bthv", weights / sums[..., None], v)
    h = layer_norm(h, w["norm/gamma"]).reshape(x_c.shape)
    expected = ((h + w["skip"] * x_c) * silu(z)) @ w["down_proj/kernel"]
    assert_close(run(mixed, x), expected, 1e-4)


def test_keys_see_the_convolution_and_values_what_is_before_it():
    mixed, x = layer(), inputs(2, 4)
    mixed.gates.kernel.assign(np.zeros((24, 4)))
    mixed.conv.kernel.assign(np.zeros((4, 8)))
    mixed.conv.bias.assign(np.ones(8))
    _, (_, (C, n, _)) = run(mixed, x, return_state=True)
    _, (_, (negated, same, _)) = run(mixed, -x, return_state=True)
    assert np.abs(to_numpy(C)).min() > 0
    assert_close(same, n)
    assert_close(negated, -C)


@BOTH
def test_long_sequences_and_saturated_gates_stay_finite(kind):
    x = inputs(4096, 4) * np.geomspace(1, 1e6, 4096)[:, None]
    y = run(layer(kind, chunk_size=64), x[:1].astype("float32"))
    assert np.isfinite(to_numpy(y)).all()


def test_half_precision_streams_with_a_state_in_float32():
    mixed, x = layer(dtype="mixed_bfloat16"), inputs(5, 4)
    state = mixed.initial_state(2)
    step, outputs = compiled(mixed.step), []
    for t in range(5):
        y, state = step(ops.convert_to_tensor(x[:, t]), state)
        outputs.append(ops.cast(y, "float32"))
    for part in state[1]:
        assert keras.backend.standardize_dtype(part.dtype) == "float32"
    # bfloat16 keeps 8 bits, in the projections around the memory.
    whole = ops.cast(run(mixed, x), "float32")
    assert difference(ops.stack(outputs, axis=1), whole) < 0.03


def test_logits_of_7b_are_capped():
    built = model(block_style="7b", embed_size=None, vocab_size=5)
    embed = built.get_layer("embed")
    embed.reverse_embeddings.assign(40.0 * embed.reverse_embeddings)
    tokens = rng.integers(0, 5, (2, 7))
    normed = keras.Model(built.input, built.get_layer("final_norm").output)
    logits = predict(normed, tokens) @ to_numpy(embed.reverse_embeddings)
    assert np.abs(logits).max() > 20
    assert_close(predict(built, tokens), 30 * np.tanh(logits / 30), 1e-4)


@pytest.mark.parametrize(
    ("variant", "weights"),
    [("164m", 163_806_144), ("7b", 6_865_424_896)],
)
def test_published_sizes(variant, weights):
    found = count_weights("mlstm", variant=variant, vocab_size=50_304)
    assert found == (weights, 0)


def test_size_of_a_block():
    sizes = dict(embed_size=1024, hidden_size=1024)
    one, two = (count_weights("mlstm", num_layers=n, **sizes)[0] for n in (1, 2))
    assert two - one == 6_380_552


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (
            MLSTMLayer,
            dict(
                num_heads=3,
                proj_factor=1.5,
                proj_round=6,
                conv_size=2,
                qkv_block_size=3,
                chunk_size=8,
                depth=5,
            ),
        ),
        (MLSTM7BLayer, dict(num_heads=3, chunk_size=8, depth=5)),
        (XLSTMFeedForward, dict(hidden_size=3, activation="gelu", depth=5)),
        (BlockDiagonalDense, dict(num_blocks=3, units=2, stddev=0.5)),
        (SoftCap, dict(cap=2.0)),
    ],
)
def test_config_keeps_the_arguments(kind, options):
    config = kind(**options).get_config()
    assert {name: config[name] for name in options} == options


def test_sizes_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="width 8 must be a multiple of num_heads"):
        layer(num_heads=3)
    with pytest.raises(ValueError, match="must be a multiple of qkv_block_size, re"):
        layer(qkv_block_size=3)
    with pytest.raises(ValueError, match="a multiple of 2 \\* num_heads, received 4"):
        layer(MLSTM7BLayer, num_heads=4)
    with pytest.raises(ValueError, match="multiple of num_blocks, received 4 and 3"):
        BlockDiagonalDense(3).build((None, 4))
