import keras
import numpy as np
import pytest
from keras import ops

import keras_edifice
from keras_edifice.recurrent.lstm import LSTMLayer
from tests.support.close import assert_close, difference, to_numpy
from tests.support.counting import count_weights
from tests.support.gradients import gradients
from tests.support.numerical import numerical_gradient
from tests.support.shaking import shake
from tests.support.streaming import stream

rng = np.random.default_rng(0)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def layer_norm(x, scale, shift):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * scale + shift


def recurrence(x, W, U, b):
    """The equation of the module, a loop in float64. All h, and the last h and c."""
    h = c = np.zeros((len(x), len(U)))
    states = []
    for t in range(x.shape[1]):
        i, f, g, o = np.split(x[:, t] @ W + h @ U + b, 4, axis=-1)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(c)
        states.append(h)
    return np.stack(states, axis=1), h, c


def reference(x, weights):
    """The model with all norms on, from its weights in order."""
    weights = [np.asarray(w, "float64") for w in weights]
    x = layer_norm(np.asarray(x, "float64"), *weights[:2])
    for i in range(2, len(weights), 5):
        x = layer_norm(recurrence(x, *weights[i : i + 3])[0], *weights[i + 3 : i + 5])
    return x


def model(**options):
    options = {
        **dict(embed_size=3, hidden_size=4, num_layers=2, return_sequences=True),
        **options,
    }
    keras.utils.set_random_seed(0)
    return shake(keras_edifice.build("lstm", **{"window_size": 7, **options}))


def normed_model(**options):
    return model(input_layer_norm=True, use_layer_norm=True, **options)


def predict(model, x):
    return model.predict(x, verbose=0)


def inputs(length=7, features=3):
    return rng.normal(size=(2, length, features)).astype("float32")


def layer(units=4, features=3, **options):
    keras.utils.set_random_seed(0)
    built = LSTMLayer(units, return_sequences=True, return_state=True, **options)
    built.build((None, 7, features))
    return shake(built)


def test_output_is_the_equation():
    normed, x = normed_model(), inputs()
    assert_close(predict(normed, x), reference(x, normed.get_weights()), 1e-4)
    plain, weights = model(), None
    weights = [np.asarray(w, "float64") for w in plain.get_weights()]
    expected = recurrence(recurrence(x, *weights[:3])[0], *weights[3:])[0]
    assert_close(predict(plain, x), expected, 1e-5)


def test_gradient_is_that_of_the_equation():
    normed, x = normed_model(), inputs()
    by_weight, by_input = gradients(normed, x, lambda y: ops.sum(ops.square(y)))
    weights = [np.asarray(w, "float64") for w in normed.get_weights()]

    def value(z, i=None):
        if i is None:
            return np.square(reference(z, weights)).sum()
        return np.square(reference(x, [*weights[:i], z, *weights[i + 1 :]])).sum()

    # Sums over all steps: float32 rounds relative to the largest gradient.
    assert difference(by_input, numerical_gradient(value, x)) < 1e-4
    for i, gradient in enumerate(by_weight):
        expected = numerical_gradient(lambda z, i=i: value(z, i), weights[i])
        assert difference(gradient, expected) < 1e-4


def test_initial_weights_are_those_of_the_catalogue():
    built = keras_edifice.build("lstm", embed_size=3, hidden_size=5, window_size=7)
    kernel, recurrent, bias = built.get_weights()
    assert np.abs(kernel).max() <= np.sqrt(6 / (3 + 20))
    assert_close(recurrent @ recurrent.T, np.eye(5))
    assert_close(bias, [0.0] * 5 + [1.0] * 5 + [0.0] * 10, 0)


def test_closed_input_and_open_forget_gates_keep_the_cell():
    cell = layer()
    kernel, recurrent, bias = (np.zeros_like(w) for w in cell.get_weights())
    bias[:4], bias[4:8] = -50.0, 50.0
    cell.set_weights([kernel, recurrent, bias])
    state = rng.normal(size=(2, 2, 4)).astype("float32")
    _, _, c = cell(inputs(), initial_state=list(state))
    assert_close(c, state[1], 1e-6)


@pytest.mark.parametrize("pool", ["last", "mean"])
def test_token_by_token_is_the_whole_sequence(pool):
    x = inputs()
    whole = normed_model()
    assert_close(stream(whole, x), predict(whole, x))
    pooled = normed_model(return_sequences=False, pool=pool, window_size=None)
    outputs = stream(pooled, x)
    for t in (0, 3, 6):
        assert_close(outputs[:, t], predict(pooled, x[:, : t + 1]))


def test_segments_with_the_carried_state_are_one_pass():
    cell, x = layer(), inputs()
    first, *state = cell(x[:, :3])
    second, *last = cell(x[:, 3:], initial_state=state)
    whole, *expected = cell(x)
    assert_close(ops.concatenate([first, second], axis=1), whole, 1e-6)
    assert_close(ops.stack(last), ops.stack(expected), 1e-6)


def test_truncation_stops_the_gradient_exactly_and_changes_no_value():
    x = inputs(9)
    free = model(window_size=9, return_sequences=False)
    cut = model(window_size=9, return_sequences=False, truncate_bptt=4)
    cut.set_weights(free.get_weights())
    assert_close(predict(cut, x), predict(free, x), 1e-6)
    by_weight, by_input = gradients(cut, x, lambda y: ops.sum(ops.square(y)))
    assert np.all(by_input[:, :5] == 0.0)
    assert np.all(np.abs(by_input[:, 5:]).max(-1) > 1e-5)
    _, free_by_input = gradients(free, x, lambda y: ops.sum(ops.square(y)))
    assert np.all(np.abs(free_by_input[:, :5]).max(-1) > 1e-6)
    assert all(np.any(gradient != 0) for gradient in by_weight)


def test_truncated_gradient_is_that_of_a_fixed_state_before():
    cell, x = layer(truncate_bptt=3), inputs()
    _, by_input = gradients(cell, x, lambda y: ops.sum(ops.square(y[0][:, -3:])))
    W, U, b = (np.asarray(w, "float64") for w in cell.get_weights())
    _, h, c = recurrence(x[:, :4], W, U, b)

    def value(late):
        h_t, c_t, total = h, c, 0.0
        for t in range(3):
            i, f, g, o = np.split(late[:, t] @ W + h_t @ U + b, 4, axis=-1)
            c_t = sigmoid(f) * c_t + sigmoid(i) * np.tanh(g)
            h_t = sigmoid(o) * np.tanh(c_t)
            total += np.square(h_t).sum()
        return total

    assert_close(by_input[:, 4:], numerical_gradient(value, x[:, 4:]), 1e-4)


def test_both_directions_mirror_each_other_on_a_palindrome():
    both = model(bidirectional=True, num_layers=1)
    weights = both.get_weights()
    both.set_weights([*weights[:3], *weights[:3]])  # the directions share weights
    half = inputs(4)
    y = predict(both, np.concatenate([half, half[:, -2::-1]], axis=1))
    assert_close(y[:, :, :4], y[:, ::-1, 4:], 1e-6)


def test_second_direction_is_the_first_of_the_reversed_sequence():
    both, x = model(bidirectional=True, num_layers=1), inputs()
    weights = [np.asarray(w, "float64") for w in both.get_weights()]
    expected = [
        recurrence(x, *weights[:3])[0],
        recurrence(x[:, ::-1], *weights[3:])[0][:, ::-1],
    ]
    assert_close(predict(both, x), np.concatenate(expected, axis=-1))


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("pool", ["last", "mean"])
def test_padding_changes_nothing(pool, bidirectional):
    padded = normed_model(
        bidirectional=bidirectional,
        pool=pool,
        return_sequences=False,
        window_size=None,
    )
    x = inputs()
    mask = ops.convert_to_tensor(np.arange(7)[None].repeat(2, 0) < 4)
    y = padded(ops.convert_to_tensor(x), mask=mask)
    assert_close(y, predict(padded, x[:, :4]))


def test_masked_steps_leave_the_state():
    cell, x = layer(), inputs()
    mask = ops.convert_to_tensor(np.arange(7)[None].repeat(2, 0) < 4)
    _, *state = cell(ops.convert_to_tensor(x), mask=mask)
    _, *expected = cell(x[:, :4])
    assert_close(ops.stack(state), ops.stack(expected), 1e-6)


def test_pool_is_the_mean_of_both_directions_unless_asked():
    x = inputs()
    for bidirectional, pool in ((False, "last"), (True, "mean")):
        built = model(bidirectional=bidirectional, return_sequences=False)
        assert built.layers[-1].pool == pool
        every = model(bidirectional=bidirectional)
        every.set_weights(built.get_weights())
        y = predict(every, x)
        assert_close(predict(built, x), y.mean(1) if bidirectional else y[:, -1], 1e-6)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_states_are_those_of_each_layer(bidirectional):
    built, x = model(return_state=True, bidirectional=bidirectional), inputs()
    y, *states = predict(built, x)
    assert len(states) == (8 if bidirectional else 4)
    assert all(state.shape == (2, 4) for state in states)
    weights = [np.asarray(w, "float64") for w in built.get_weights()]
    _, h, c = recurrence(x, *weights[:3])
    assert_close(ops.stack(states[:2]), np.stack([h, c]))
    last = y[:, -1, :4]
    assert_close(states[4 if bidirectional else 2], last, 1e-6)


def test_dropout_is_between_layers_and_in_training_alone():
    one = model(num_layers=1, dropout=0.9)
    assert not [z for z in one.layers if isinstance(z, keras.layers.Dropout)]
    for option in ("dropout", "recurrent_dropout"):
        two, x = model(**{option: 0.5}), inputs()
        assert_close(predict(two, x), predict(two, x), 0)
        assert np.any(to_numpy(two(x, training=True)) != predict(two, x))


def test_long_sequences_and_saturated_gates_stay_finite():
    built = model(embed_size=1, hidden_size=2, window_size=None)
    for scale in (1.0, 1e4):
        y = predict(built, scale * inputs(4096, 1))
        assert np.isfinite(y).all()


def test_tokens_give_the_logits_of_the_next_one():
    built = keras_edifice.build(
        "lstm", vocab_size=7, hidden_size=4, tie_embeddings=True, window_size=5
    )
    tokens = rng.integers(0, 7, (2, 5))
    table, *weights = (to_numpy(w) for w in shake(built).weights)
    expected = recurrence(table[tokens], *weights)[0] @ table.T
    assert_close(predict(built, tokens), expected)
    with pytest.raises(ValueError, match="pass embed_size or bidirectional=False"):
        keras_edifice.build("lstm", vocab_size=7, bidirectional=True)


def test_published_sizes():
    options = dict(embed_size=64, hidden_size=128)
    assert count_weights("lstm", num_layers=2, **options)[0] == 98_816 + 131_584
    assert count_weights("lstm", num_layers=1, **options)[0] == 98_816
