import keras
import numpy as np
import pytest
from keras import ops

import keras_edifice
from keras_edifice.recurrent.min_lstm import MinLSTMLayer
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


def g(u):
    return np.where(u >= 0, u + 0.5, sigmoid(u))


def rms_norm(x, scale):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * scale


def mixer(x, w, log_space=True, forget_bias=0.0):
    """The equations of the module, a loop in float64, with the quotients as such."""
    f = sigmoid(x @ w["forget_gate/kernel"] + forget_bias)
    i = sigmoid(x @ w["input_gate/kernel"])
    candidate = x @ w["candidate/kernel"]
    if log_space:
        candidate = g(candidate)
    h, states = 0.0, []
    for t in range(x.shape[1]):
        total = f[:, t] + i[:, t]
        h = f[:, t] / total * h + i[:, t] / total * candidate[:, t]
        states.append(h)
    h = np.stack(states, axis=1)
    return h @ w["out/kernel"] if "out/kernel" in w else h


def named_weights(layer):
    """The weights of a layer by their names below it, in float64."""
    return {v.path.removeprefix(f"{layer.path}/"): to_numpy(v) for v in layer.weights}


def reference(x, model, **options):
    """The whole model, from its weights."""
    x = np.asarray(x, "float64") @ to_numpy(model.get_layer("embed").kernel)
    for i in range(2):
        gamma = to_numpy(model.get_layer(f"min_lstm_{i}_norm").gamma)
        weights = named_weights(model.get_layer(f"min_lstm_{i}"))
        x = x + mixer(rms_norm(x, gamma), weights, **options)
    return rms_norm(x, to_numpy(model.get_layer("final_norm").gamma))


def model(**options):
    sizes = dict(embed_size=3, hidden_size=4, num_layers=2, window_size=None)
    keras.utils.set_random_seed(0)
    options = {**sizes, "return_sequences": True, **options}
    return shake(keras_edifice.build("min_lstm", **options))


def layer(features=4, **options):
    keras.utils.set_random_seed(0)
    built = MinLSTMLayer(**options)
    built.build((None, None, features))
    return shake(built)


def run(layer, x, **options):
    """The call of a layer with options that are no arrays to be traced."""
    return compiled(lambda x: layer(x, **options))(ops.convert_to_tensor(x))


def predict(model, x):
    return model.predict(x, verbose=0)


def inputs(length=11, features=3):
    return rng.normal(size=(2, length, features)).astype("float32")


@pytest.mark.parametrize("log_space", [True, False])
@pytest.mark.parametrize("forget_bias", [0.0, 2.0])
def test_output_is_the_equation(forget_bias, log_space):
    options = dict(forget_bias=forget_bias, log_space=log_space)
    built, x = model(expand_factor=1.5, **options), inputs()
    assert_close(predict(built, x), reference(x, built, **options), 1e-4)


def test_a_long_sequence_is_the_equation():
    recurrent, x = layer(), inputs(300, 4)
    expected = mixer(x.astype("float64"), named_weights(recurrent))
    assert_close(run(recurrent, x), expected)


def test_gradient_is_that_of_the_equation():
    recurrent, x = layer(expand_factor=1.5, forget_bias=1.0), inputs(7, 4)
    by_weight, by_input = gradients(recurrent, x, lambda y: ops.sum(ops.square(y)))
    weights = named_weights(recurrent)

    def value(x, changed=None):
        y = mixer(np.asarray(x, "float64"), weights | (changed or {}), forget_bias=1.0)
        return np.square(y).sum()

    # Sums over all steps: float32 rounds relative to the largest gradient.
    assert difference(by_input, numerical_gradient(value, x)) < 1e-4
    for (name, weight), gradient in zip(weights.items(), by_weight, strict=True):
        expected = numerical_gradient(lambda z, name=name: value(x, {name: z}), weight)
        assert difference(gradient, expected) < 1e-4, name


def test_initial_weights_are_the_default_of_a_linear_map():
    keras.utils.set_random_seed(0)
    built = MinLSTMLayer(expand_factor=2.0, forget_bias=1.0)
    built.build((None, None, 64))
    weights = named_weights(built)
    gates = {"forget_gate/kernel", "input_gate/kernel"}
    assert set(weights) == gates | {"candidate/kernel", "out/kernel"}
    for kernel in weights.values():  # no bias, nothing from state to state
        bound = len(kernel) ** -0.5
        assert 0.95 * bound < np.abs(kernel).max() <= bound


def with_gates(forget, write):
    """The shares of state and candidate in a step of these gates, (n,) each."""
    recurrent = layer(3, expand_factor=1 / 3, log_space=False)  # one number wide
    parts = (recurrent.forget_gate, recurrent.input_gate, recurrent.candidate)
    for dense, row in zip(parts, np.eye(3), strict=True):
        dense.kernel.assign(row[:, None])
    x = np.stack([forget, write, np.ones_like(write)], axis=-1).astype("float32")
    return (to_numpy(z)[:, 0] for z in recurrent._terms(ops.convert_to_tensor(x)))


def test_shares_of_state_and_candidate_have_the_sum_one():
    grid = np.meshgrid(np.linspace(-100, 100, 401), np.linspace(-100, 100, 401))
    forget, write = (z.ravel() for z in grid)
    kept, written = with_gates(forget, write)
    assert np.abs(kept + written - 1).max() <= 2**-24  # half a step of float32
    assert min(kept.min(), written.min()) >= 0
    f, i = sigmoid(forget), sigmoid(write)
    assert_close(kept, f / (f + i))
    assert_close(written, i / (f + i))


def test_equal_gates_average_exactly():
    for share in with_gates(*(np.linspace(-100, 100, 401),) * 2):
        assert_close(share, np.full(401, 0.5), 0)
    recurrent, x = layer(log_space=False), inputs(5, 4)
    recurrent.input_gate.kernel.assign(recurrent.forget_gate.kernel)
    candidate = x.astype("float64") @ named_weights(recurrent)["candidate/kernel"]
    h, expected = 0.0, []
    for t in range(5):
        h = (h + candidate[:, t]) / 2
        expected.append(h)
    assert_close(run(recurrent, x), np.stack(expected, axis=1), 1e-6)


def test_forget_bias_keeps_the_state():
    x, state = inputs(5, 4), np.abs(inputs(2, 4)[:, 0])
    kept = run(layer(forget_bias=60.0), x, initial_state=ops.convert_to_tensor(state))
    share = sigmoid(x.astype("float64") @ named_weights(layer())["input_gate/kernel"])
    h = state
    candidate = g(x.astype("float64") @ named_weights(layer())["candidate/kernel"])
    for t in range(5):  # f = 1
        h = (h + share[:, t] * candidate[:, t]) / (1 + share[:, t])
    assert_close(kept[:, -1], h)


@pytest.mark.parametrize("scale", [1.0, 8.0])  # at 30 float32 ends: e^-100
def test_states_are_positive_and_at_most_the_largest_candidate_so_far(scale):
    recurrent, x = layer(), scale * inputs(40, 4)
    h = to_numpy(run(recurrent, x))
    candidates = g(x.astype("float64") @ named_weights(recurrent)["candidate/kernel"])
    assert np.all(h > 0)
    assert np.all(h <= np.maximum.accumulate(candidates, axis=1) * (1 + 1e-5))
    plain = to_numpy(run(layer(log_space=False), x))
    assert np.any(plain < 0)


@pytest.mark.parametrize("pool", ["last", "mean"])
def test_token_by_token_is_the_whole_sequence(pool):
    x = inputs()
    whole = model(expand_factor=1.5, use_conv=True, use_mlp=True, forget_bias=1.0)
    assert_close(stream(whole, x), predict(whole, x))
    pooled = model(return_sequences=False, pool=pool, log_space=False)
    outputs = stream(pooled, x)
    for t in (0, 5, 10):
        assert_close(outputs[:, t], predict(pooled, x[:, : t + 1]))


def test_segments_with_the_carried_state_are_one_pass():
    recurrent, x = layer(expand_factor=1.5), inputs(40, 4)
    first, state = run(recurrent, x[:, :13], return_state=True)
    second, state = run(recurrent, x[:, 13:], initial_state=state, return_state=True)
    whole, expected = run(recurrent, x, return_state=True)
    assert_close(ops.concatenate([first, second], axis=1), whole)
    assert_close(state, expected)


def test_future_tokens_do_not_change_the_past():
    built, x = model(), inputs(40)
    changed = x.copy()
    changed[:, 20:] += 1.0
    before, after = predict(built, x), predict(built, changed)
    assert_close(after[:, :20], before[:, :20], 1e-6)
    assert difference(after[:, 20:], before[:, 20:]) > 1e-3


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(side):
    x = inputs()
    valid = slice(4) if side == "right" else slice(7, None)
    mask = np.zeros((2, 11), "bool")
    mask[:, valid] = True
    for pool in ("last", "mean"):
        built = model(return_sequences=False, pool=pool, use_conv=True)
        y = run(built, x, mask=ops.convert_to_tensor(mask))
        assert_close(y, predict(built, x[:, valid]))


def test_masked_steps_leave_the_state():
    recurrent, x = layer(), inputs(11, 4)
    mask = ops.convert_to_tensor(np.arange(11)[None] < np.array([[5], [2]]))
    _, state = run(recurrent, x, mask=mask, return_state=True)
    for row, length in enumerate((5, 2)):
        _, expected = run(recurrent, x[row : row + 1, :length], return_state=True)
        assert_close(state[row : row + 1], expected)


def test_long_sequences_and_saturated_gates_stay_finite():
    recurrent, x = layer(features=2), inputs(4096, 2)
    for scale in (1.0, 1e4):
        assert np.isfinite(to_numpy(run(recurrent, scale * x))).all()
    by_weight, by_input = gradients(recurrent, 1e4 * x, ops.sum)
    assert all(np.isfinite(z).all() for z in (*by_weight, by_input))


def test_half_precision_streams_with_a_state_in_float32():
    recurrent, x = layer(dtype="mixed_bfloat16", expand_factor=1.5), inputs(5, 4)
    state, outputs = recurrent.initial_state(2), []
    for t in range(5):
        y, state = recurrent.step(ops.convert_to_tensor(x[:, t]), state)
        assert keras.backend.standardize_dtype(y.dtype) == "bfloat16"
        assert keras.backend.standardize_dtype(state.dtype) == "float32"
        outputs.append(ops.cast(y, "float32"))
    whole, last = run(recurrent, x, return_state=True)
    assert keras.backend.standardize_dtype(last.dtype) == "float32"
    # bfloat16 keeps 8 bits, in the projections around the recurrence.
    whole = ops.cast(whole, "float32")
    assert difference(ops.stack(outputs, axis=1), whole) < 0.02
    assert difference(whole, run(layer(expand_factor=1.5), x)) < 0.05


def test_published_sizes():
    for factor in (1.0, 1.5):
        options = dict(embed_size=64, hidden_size=64, expand_factor=factor)
        width = int(64 * factor)
        recurrence = 3 * 64 * width + (width * 64 if factor != 1.0 else 0)
        norms = 64
        expected = 4 * (recurrence + norms) + norms
        assert count_weights("min_lstm", **options) == (expected, 0)


def test_config_keeps_the_arguments():
    options = dict(expand_factor=2.0, log_space=False, forget_bias=1.5)
    config = MinLSTMLayer(**options).get_config()
    assert {name: config[name] for name in options} == options
