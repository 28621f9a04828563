import math

import keras
import numpy as np
import pytest
from keras import ops

import keras_edifice
from keras_edifice.recurrent.slstm import SLSTMLayer
from tests.support.close import assert_close, difference, to_numpy
from tests.support.compiled import compiled
from tests.support.counting import count_weights
from tests.support.gradients import gradients
from tests.support.numerical import numerical_gradient
from tests.support.shaking import shake
from tests.support.streaming import stream

rng = np.random.default_rng(0)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def silu(x):
    return x * sigmoid(x)


def gelu(x):
    return x * (1 + np.vectorize(math.erf)(x / np.sqrt(2))) / 2


def layer_norm(x, gamma):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * gamma


def convolved(x, w):
    kernel = w["conv/kernel"]
    padded = np.pad(x, [(0, 0), (len(kernel) - 1, 0), (0, 0)])
    taps = (tap * padded[:, j : j + x.shape[1]] for j, tap in enumerate(kernel))
    return sum(taps) + w["conv/bias"]


def mixer(x, w):
    """The memory without a stabiliser in float64: all h, the last c and n; the output.

    Every part has the axes (batch, heads, units).
    """
    heads, size = w["R"].shape[:2]
    x_c = silu(convolved(x, w)) if "conv/kernel" in w else x
    pairs = {"if": x_c, "zo": x}
    driven = [
        np.einsum("bthd,hdg->bthg", z.reshape(*z.shape[:2], heads, size), kernel)
        for z, kernel in ((z, w[f"{name}_proj/kernel"]) for name, z in pairs.items())
    ]
    driven = np.concatenate(driven, axis=-1) + w["bias"]
    h, c, n, outputs = np.zeros((len(x), heads, size)), 0.0, 0.0, []
    for t in range(x.shape[1]):
        gates = driven[:, t] + np.einsum("bhd,hdg->bhg", h, w["R"])
        i, f, z, o = np.split(gates, 4, axis=-1)
        c = sigmoid(f) * c + np.exp(i) * np.tanh(z)
        n = sigmoid(f) * n + np.exp(i)
        h = sigmoid(o) * c / n
        outputs.append(h)
    h = np.stack(outputs, axis=1)
    return layer_norm(h, w["norm/gamma"]).reshape(x.shape), h, c, n


def feed_forward(x, w):
    return (gelu(x @ w["gate/kernel"]) * (x @ w["up/kernel"])) @ w["down/kernel"]


def named_weights(layer):
    """The weights of a layer by their names below it, in float64."""
    named = {v.path.removeprefix(f"{layer.path}/"): v for v in layer.weights}
    return {k: to_numpy(v) for k, v in named.items() if "seed" not in k}


def reference(x, model):
    """The whole model on (batch, time, features), from its weights."""
    x = np.asarray(x, "float64") @ to_numpy(model.get_layer("embed").kernel)

    def branch(name, function):
        gamma = to_numpy(model.get_layer(f"{name}_norm").gamma)
        return function(layer_norm(x, gamma), named_weights(model.get_layer(name)))

    for i in range(2):
        x = x + branch(f"slstm_{i}", mixer)[0]
        x = x + branch(f"ffn_{i}", feed_forward)
    return layer_norm(x, to_numpy(model.get_layer("final_norm").gamma))


def model(**options):
    sizes = dict(embed_size=3, hidden_size=6, num_heads=2, num_layers=2, proj_round=4)
    options = {**sizes, "window_size": None, "return_sequences": True, **options}
    keras.utils.set_random_seed(0)
    return shake(keras_edifice.build("slstm", **options))


def layer(**options):
    keras.utils.set_random_seed(0)
    built = SLSTMLayer(**{"num_heads": 2, **options})
    built.build((None, None, 6))
    return shake(built)


def run(layer, x, **options):
    """The call of a layer with options that are no arrays to be traced."""
    return compiled(lambda x: layer(x, **options))(ops.convert_to_tensor(x))


def predict(model, x):
    return model.predict(x, verbose=0)


def inputs(length=11, features=3):
    return rng.normal(size=(2, length, features)).astype("float32")


@pytest.mark.parametrize("conv_size", [0, 4])
def test_output_is_that_of_the_equations_without_a_stabiliser(conv_size):
    built, x = model(conv_size=conv_size), inputs()
    assert_close(predict(built, x), reference(x, built), 1e-4)


def test_gradient_is_that_of_the_equation():
    built, x = model(), inputs(5)
    r = rng.normal(size=(2, 5, 6)).astype("float32")
    by_weight, by_input = gradients(
        built, x, lambda y: ops.sum(y * ops.convert_to_tensor(r))
    )
    expected = numerical_gradient(lambda z: (reference(z, built) * r).sum(), x)
    assert difference(by_input, expected) < 1e-4
    for variable, gradient in zip(built.trainable_variables, by_weight, strict=True):
        assert np.abs(gradient).max() > 0, f"{variable.path} does not learn"


def test_the_state_is_that_of_the_equations():
    mixed, x = layer(), inputs(9, 6)
    _, (_, (h, c, n, m)) = run(mixed, x, return_state=True)
    _, all_h, expected_c, expected_n = mixer(x, named_weights(mixed))
    scale = np.exp(to_numpy(m))
    assert_close(h, all_h[:, -1].reshape(2, 6))
    assert_close(to_numpy(c) * scale, expected_c.reshape(2, 6))
    assert_close(to_numpy(n) * scale, expected_n.reshape(2, 6))


@pytest.mark.parametrize("kind", ["powerlaw", "linspace", "zeros"])
def test_initial_weights_are_those_of_the_paper(kind):
    keras.utils.set_random_seed(0)
    built = keras_edifice.build(
        "slstm", embed_size=64, hidden_size=64, num_layers=3, bias_init=kind
    )
    unit = np.arange(16) / 15
    for i in range(3):
        w = named_weights(built.get_layer(f"slstm_{i}"))
        forget = {
            "powerlaw": 5 - 12 * unit ** (0.3 + 1.3 * i / 2),
            "linspace": np.linspace(3, 6, 16),
            "zeros": np.zeros(16),
        }[kind]
        gates = w["bias"].reshape(4, 4, 16)  # heads; i, f, z, o
        assert_close(gates[:, 1], np.tile(forget, (4, 1)))
        assert not gates[:, [0, 2, 3]].any()
        assert not w["R"].any()
        assert w["R"].shape == (4, 16, 64)
        for name in ("if", "zo"):
            small = np.sqrt(2 / (5 * 64))
            assert abs(w[f"{name}_proj/kernel"].std() / small - 1) < 0.1
    ffn = named_weights(built.get_layer("ffn_2"))
    assert ffn["gate/kernel"].shape == (64, 128)  # 1.3 of 64, a multiple of 64
    assert abs(ffn["gate/kernel"].std() / small - 1) < 0.1
    assert abs(ffn["down/kernel"].std() / (2 / (3 * np.sqrt(64))) - 1) < 0.1


def test_the_normaliser_is_above_one_and_bounds_the_memory():
    mixed, x = layer(), 5 * inputs(12, 6)
    state, step = mixed.initial_state(2), compiled(mixed.step)
    for t in range(12):
        _, state = step(ops.convert_to_tensor(x[:, t]), state)
        h, _, n, _ = (to_numpy(part) for part in state[1])
        assert n.min() >= 1
        assert np.abs(h).max() <= 1


def test_heads_do_not_see_each_others_past():
    mixed, x = layer(), inputs(1, 6)[:, 0]
    memory = [0.5 * rng.random((2, 6)).astype("float32") for _ in range(3)]
    memory.append(np.zeros((2, 6), "float32"))
    changed = [memory[0] + np.float32([0, 0, 0, 1, 1, 1]), *memory[1:]]
    seen = mixed.initial_state(2)[0]

    def after(memory):
        memory = tuple(ops.convert_to_tensor(part) for part in memory)
        return to_numpy(mixed.step(ops.convert_to_tensor(x), (seen, memory))[1][1][0])

    moved = np.abs(after(changed) - after(memory))
    assert not moved[:, :3].any()
    assert moved[:, 3:].min() > 0


def test_token_by_token_is_the_whole_sequence():
    x, whole = inputs(), model()
    assert_close(stream(whole, x), predict(whole, x))


def test_segments_with_the_carried_state_are_one_pass():
    mixed, x = layer(), inputs(11, 6)
    first, state = run(mixed, x[:, :2], return_state=True)
    second, state = run(mixed, x[:, 2:], initial_state=state, return_state=True)
    whole, expected = run(mixed, x, return_state=True)
    assert_close(ops.concatenate([first, second], axis=1), whole)
    parts = zip(keras.tree.flatten(state), keras.tree.flatten(expected), strict=True)
    for part, whole_part in parts:
        assert_close(part, whole_part)


def test_future_tokens_do_not_change_the_past():
    built, x = model(), inputs(14)
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


def test_masked_steps_leave_the_state():
    mixed, x = layer(), inputs(11, 6)
    mask = np.arange(11)[None] < np.array([[5], [2]])
    _, state = run(mixed, x, mask=mask, return_state=True)
    for row, length in enumerate((5, 2)):
        _, expected = run(mixed, x[row : row + 1, :length], return_state=True)
        parts = keras.tree.flatten(state), keras.tree.flatten(expected)
        for part, short in zip(*parts, strict=True):
            assert_close(part[row : row + 1], short)


def test_a_shift_of_the_stabiliser_and_its_state_cancels():
    mixed, x = layer(), inputs(6, 6)
    _, (seen, (h, c, n, m)) = run(mixed, x[:, :3], return_state=True)
    factor = float(np.exp(-2.0))
    expected = run(mixed, x[:, 3:], initial_state=(seen, (h, c, n, m)))
    shifted = seen, (h, c * factor, n * factor, m + 2.0)
    assert_close(run(mixed, x[:, 3:], initial_state=shifted), expected)


def test_long_sequences_and_saturated_gates_stay_finite():
    x = inputs(4096, 6) * np.geomspace(1, 1e6, 4096)[:, None]
    signal = keras.Input((4096, 6))
    y = predict(keras.Model(signal, layer()(signal)), x[:1].astype("float32"))
    assert np.isfinite(y).all()


def test_dropout_hides_the_output_and_spares_the_memory():
    mixed, x = layer(dropout=0.5), inputs(40, 6)
    dropped, (_, state) = mixed(x, return_state=True, training=True)
    kept, (_, expected) = mixed(x, return_state=True)
    assert difference(dropped, kept) > 0.1
    for part, whole in zip(state, expected, strict=True):
        assert_close(part, whole, 1e-6)


def test_half_precision_keeps_the_state_in_float32():
    mixed, x = layer(dtype="mixed_bfloat16"), inputs(5, 6)
    state = mixed.initial_state(2)
    step, outputs = compiled(mixed.step), []
    for t in range(5):
        y, state = step(ops.convert_to_tensor(x[:, t]), state)
        outputs.append(ops.cast(y, "float32"))
    for part in state[1]:
        assert keras.backend.standardize_dtype(part.dtype) == "float32"
    # bfloat16 keeps 8 bits, in the projections and in the norm's output.
    whole = ops.cast(run(mixed, x), "float32")
    assert difference(ops.stack(outputs, axis=1), whole) < 0.03


def test_size_of_a_block():
    sizes = dict(embed_size=1024, hidden_size=1024)
    one, two = (count_weights("slstm", num_layers=n, **sizes)[0] for n in (1, 2))
    assert two - one == 6_238_208


def test_config_keeps_the_arguments():
    options = dict(
        num_heads=3, conv_size=2, bias_init="zeros", position=0.5, dropout=0.25
    )
    config = SLSTMLayer(**options).get_config()
    assert {name: config[name] for name in options} == options


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="multiple of num_heads, received 6 and num_"):
        layer(num_heads=4)
    with pytest.raises(ValueError, match="bias_init must be one of .*, received 'x'"):
        SLSTMLayer(bias_init="x")
