import math

import keras
import numpy as np
import pytest
from keras import ops

import keras_edifice
from keras_edifice.recurrent.min_gru import MinGRULayer, positive
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


def convolution(x, w):
    kernel, length = w["kernel"], x.shape[1]
    padded = np.pad(x, [(0, 0), (len(kernel) - 1, 0), (0, 0)])
    return w["bias"] + sum(k * padded[:, j : j + length] for j, k in enumerate(kernel))


def feed_forward(x, w):
    u = x @ w["up/kernel"]
    gelu = u * (1 + np.vectorize(math.erf)(u / np.sqrt(2))) / 2
    return gelu @ w["down/kernel"]


def mixer(x, w, log_space=True):
    """The equations of the module, a loop in float64."""
    z, candidate = sigmoid(x @ w["update_gate/kernel"]), x @ w["candidate/kernel"]
    if log_space:
        candidate = g(candidate)
    h, states = 0.0, []
    for t in range(x.shape[1]):
        h = (1 - z[:, t]) * h + z[:, t] * candidate[:, t]
        states.append(h)
    h = np.stack(states, axis=1)
    return h @ w["out/kernel"] if "out/kernel" in w else h


def named_weights(layer):
    """The weights of a layer by their names below it, in float64."""
    return {v.path.removeprefix(f"{layer.path}/"): to_numpy(v) for v in layer.weights}


def reference(x, model, changed=None, **options):
    """The whole model from its weights, `changed` of which are given by their path."""
    weights = {v.path: to_numpy(v) for v in model.weights} | (changed or {})
    branches = {
        "conv": convolution,
        "min_gru": lambda x, w: mixer(x, w, **options),
        "mlp": feed_forward,
    }
    x = np.asarray(x, "float64") @ weights["embed/kernel"]
    for i in range(2):
        for kind, function in branches.items():
            prefix = f"{kind}_{i}/"
            own = {k.removeprefix(prefix): weights[k] for k in weights if prefix in k}
            if own:
                normed = rms_norm(x, weights[f"{kind}_{i}_norm/gamma"])
                x = x + function(normed, own)
    return rms_norm(x, weights["final_norm/gamma"])


FULL = dict(use_conv=True, conv_size=3, use_mlp=True, mlp_ratio=2.0, expand_factor=1.5)


def model(**options):
    sizes = dict(embed_size=3, hidden_size=4, num_layers=2, window_size=None)
    keras.utils.set_random_seed(0)
    options = {**sizes, "return_sequences": True, **options}
    return shake(keras_edifice.build("min_gru", **options))


def layer(features=4, **options):
    keras.utils.set_random_seed(0)
    built = MinGRULayer(**options)
    built.build((None, None, features))
    return shake(built)


def run(layer, x, **options):
    """The call of a layer with options that are no arrays to be traced."""
    return compiled(lambda x: layer(x, **options))(ops.convert_to_tensor(x))


def predict(model, x):
    return model.predict(x, verbose=0)


def inputs(length=11, features=3):
    return rng.normal(size=(2, length, features)).astype("float32")


def test_candidates_are_those_of_the_paper():
    u = np.array([-200.0, -20.0, -1.0, 0.0, 1e-3, 3.0], "float32")
    assert_close(positive(ops.convert_to_tensor(u)), g(u.astype("float64")), 1e-6)


@pytest.mark.parametrize("log_space", [True, False])
@pytest.mark.parametrize("options", [{}, FULL], ids=["plain", "full"])
def test_output_is_the_equation(options, log_space):
    built, x = model(log_space=log_space, **options), inputs()
    assert_close(predict(built, x), reference(x, built, log_space=log_space), 1e-4)


def test_a_long_sequence_is_the_equation():
    recurrent, x = layer(expand_factor=1.5), inputs(300, 4)
    expected = mixer(x.astype("float64"), named_weights(recurrent))
    assert_close(run(recurrent, x), expected)


def test_gradient_is_that_of_the_equation():
    built, x = model(**FULL), inputs(7)
    by_weight, by_input = gradients(built, x, lambda y: ops.sum(ops.square(y)))

    def value(x, changed=None):
        return np.square(reference(x, built, changed)).sum()

    # Sums over all steps: float32 rounds relative to the largest gradient.
    assert difference(by_input, numerical_gradient(value, x)) < 1e-4
    for variable, gradient in zip(built.trainable_variables, by_weight, strict=True):
        expected = numerical_gradient(
            lambda z, path=variable.path: value(x, {path: z}), to_numpy(variable)
        )
        assert difference(gradient, expected) < 1e-4, variable.path


def test_initial_weights_are_the_default_of_a_linear_map():
    keras.utils.set_random_seed(0)
    built = MinGRULayer(expand_factor=2.0)
    built.build((None, None, 64))
    weights = named_weights(built)
    assert set(weights) == {"update_gate/kernel", "candidate/kernel", "out/kernel"}
    for kernel in weights.values():  # no bias, nothing from state to state
        bound = len(kernel) ** -0.5
        assert 0.95 * bound < np.abs(kernel).max() <= bound


@pytest.mark.parametrize("pool", ["last", "mean"])
def test_token_by_token_is_the_whole_sequence(pool):
    x = inputs()
    whole = model(**FULL)
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
    built, x = model(**FULL), inputs(40)
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
        built = model(return_sequences=False, pool=pool, **FULL)
        y = run(built, x, mask=ops.convert_to_tensor(mask))
        assert_close(y, predict(built, x[:, valid]))


def test_masked_steps_leave_the_state():
    recurrent, x = layer(), inputs(11, 4)
    mask = np.arange(11)[None] < np.array([[5], [2]])
    mask = ops.convert_to_tensor(mask)
    _, state = run(recurrent, x, mask=mask, return_state=True)
    for row, length in enumerate((5, 2)):
        _, expected = run(recurrent, x[row : row + 1, :length], return_state=True)
        assert_close(state[row : row + 1], expected)


@pytest.mark.parametrize("scale", [1.0, 8.0])  # at 30 float32 ends: e^-100
def test_states_are_positive_and_at_most_the_largest_candidate_so_far(scale):
    recurrent, x = layer(), scale * inputs(40, 4)
    h = to_numpy(run(recurrent, x))
    candidates = g(x.astype("float64") @ named_weights(recurrent)["candidate/kernel"])
    assert np.all(h > 0)
    assert np.all(h <= np.maximum.accumulate(candidates, axis=1) * (1 + 1e-5))
    plain = to_numpy(run(layer(log_space=False), x))
    assert np.any(plain < 0)


@pytest.mark.parametrize("log_space", [True, False])
def test_an_open_gate_writes_the_candidate_and_a_closed_one_keeps_the_state(log_space):
    recurrent, x = layer(log_space=log_space), np.abs(inputs(11, 4)) + 1.0
    start = np.abs(inputs(2, 4)[:, 0])
    candidate = x.astype("float64") @ named_weights(recurrent)["candidate/kernel"]
    recurrent.update_gate.kernel.assign(np.full((4, 4), 1e3))
    expected = g(candidate) if log_space else candidate
    state = ops.convert_to_tensor(start)
    assert_close(run(recurrent, x, initial_state=state), expected)
    recurrent.update_gate.kernel.assign(np.full((4, 4), -1e3))
    y = run(recurrent, x, initial_state=state)
    assert_close(y, start[:, None].repeat(11, 1), 1e-6)


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
    exact = layer(expand_factor=1.5)
    assert difference(whole, run(exact, x)) < 0.05


def test_branches_are_where_the_options_put_them():
    def names(**options):
        weights = model(**options).weights
        return {v.path for v in weights if "_0" in v.path}

    plain = names()
    conv = {"conv_0_norm/gamma", "conv_0/kernel", "conv_0/bias"}
    mlp = {"mlp_0_norm/gamma", "mlp_0/up/kernel", "mlp_0/down/kernel"}
    assert names(use_conv=True) - plain == conv
    assert names(use_mlp=True) - plain == mlp
    assert names(expand_factor=2.0) - plain == {"min_gru_0/out/kernel"}


def test_dropout_is_on_every_branch_and_in_training_alone():
    built, x = model(dropout=0.5, **FULL), inputs()
    drops = [z for z in built.layers if isinstance(z, keras.layers.Dropout)]
    assert len(drops) == 6
    assert_close(predict(built, x), predict(built, x), 0)
    assert np.any(to_numpy(built(x, training=True)) != predict(built, x))


def test_published_sizes():
    for factor in (1.0, 1.5):
        options = dict(embed_size=64, hidden_size=64, expand_factor=factor)
        width = int(64 * factor)
        recurrence = 2 * 64 * width + (width * 64 if factor != 1.0 else 0)
        norms = 64
        expected = 4 * (recurrence + norms) + norms
        assert count_weights("min_gru", **options) == (expected, 0)


def test_config_keeps_the_arguments():
    options = dict(expand_factor=2.0, log_space=False)
    config = MinGRULayer(**options).get_config()
    assert {name: config[name] for name in options} == options
