import keras
import numpy as np
import pytest
from keras import ops

import keras_edifice
from keras_edifice.recurrent.gru import GRULayer
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


def thirds(x):
    return np.split(x, 3, axis=-1)


def new_state(x_t, h, W, U, b):
    """The equation of the module; of the paper's if there is one bias alone."""
    after = b.ndim == 2
    b, c = b if after else (b, 0 * b)
    (x_z, x_r, x_n), (U_z, U_r, U_n) = thirds(x_t @ W + b), thirds(U)
    c_z, c_r, c_n = thirds(c)
    z = sigmoid(x_z + h @ U_z + c_z)
    r = sigmoid(x_r + h @ U_r + c_r)
    hidden = r * (h @ U_n + c_n) if after else (r * h) @ U_n
    return z * h + (1 - z) * np.tanh(x_n + hidden)


def recurrence(x, W, U, b):
    """All states, a loop in float64."""
    h, states = np.zeros((len(x), len(U))), []
    for t in range(x.shape[1]):
        h = new_state(x[:, t], h, W, U, b)
        states.append(h)
    return np.stack(states, axis=1)


def reference(x, weights):
    """The model with all norms on, from its weights in order."""
    weights = [np.asarray(w, "float64") for w in weights]
    x = layer_norm(np.asarray(x, "float64"), *weights[:2])
    for i in range(2, len(weights), 5):
        x = layer_norm(recurrence(x, *weights[i : i + 3]), *weights[i + 3 : i + 5])
    return x


def model(**options):
    options = {
        **dict(embed_size=3, hidden_size=4, num_layers=2, return_sequences=True),
        **options,
    }
    keras.utils.set_random_seed(0)
    return shake(keras_edifice.build("gru", **{"window_size": 7, **options}))


def normed_model(**options):
    return model(input_layer_norm=True, use_layer_norm=True, **options)


def predict(model, x):
    return model.predict(x, verbose=0)


def inputs(length=7, features=3):
    return rng.normal(size=(2, length, features)).astype("float32")


def layer(units=4, features=3, **options):
    keras.utils.set_random_seed(0)
    built = GRULayer(units, return_sequences=True, return_state=True, **options)
    built.build((None, 7, features))
    return shake(built)


@pytest.mark.parametrize("reset_after", [True, False])
def test_output_is_the_equation(reset_after):
    x = inputs()
    normed = normed_model(reset_after=reset_after)
    assert_close(predict(normed, x), reference(x, normed.get_weights()), 1e-4)
    plain = model(reset_after=reset_after)
    weights = [np.asarray(w, "float64") for w in plain.get_weights()]
    expected = recurrence(recurrence(x, *weights[:3]), *weights[3:])
    assert_close(predict(plain, x), expected, 1e-5)


@pytest.mark.parametrize("reset_after", [True, False])
def test_gradient_is_that_of_the_equation(reset_after):
    normed, x = normed_model(reset_after=reset_after), inputs()
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
    built = keras_edifice.build("gru", embed_size=3, hidden_size=5, window_size=7)
    kernel, recurrent, bias = built.get_weights()
    bound = np.sqrt(6 / (3 + 15))
    assert 0.9 * bound < np.abs(kernel).max() <= bound
    assert_close(recurrent @ recurrent.T, np.eye(5))
    assert_close(bias, np.zeros((2, 15)), 0)


def biased(cell, gate, value):
    """The cell with a value added to the bias of one gate, z of 0 or r of 1."""
    kernel, recurrent, bias = cell.get_weights()
    bias[..., 4 * gate : 4 * gate + 4] += value
    cell.set_weights([kernel, recurrent, bias])
    return cell


@pytest.mark.parametrize("reset_after", [True, False])
def test_open_update_gate_freezes_the_state(reset_after):
    state = rng.normal(size=(2, 4)).astype("float32")
    frozen = biased(layer(reset_after=reset_after), gate=0, value=60.0)
    y, last = frozen(inputs(), initial_state=state)
    assert_close(last, state, 1e-6)
    assert_close(y, state[:, None].repeat(7, 1), 1e-6)


@pytest.mark.parametrize("reset_after", [True, False])
def test_closed_update_gate_forgets_the_state_but_for_its_candidate(reset_after):
    cell, x = biased(layer(reset_after=reset_after), gate=0, value=-60.0), inputs(1)
    h = rng.normal(size=(2, 4)).astype("float32")
    W, U, b = (np.asarray(w, "float64") for w in cell.get_weights())
    _, last = cell(x, initial_state=h)
    r = sigmoid(thirds(x[:, 0] @ W + h @ U + np.atleast_2d(b).sum(0))[1])
    W, U = thirds(W)[2], thirds(U)[2]
    b, c = (thirds(z)[2] for z in (b if reset_after else (b, 0 * b)))
    hidden = r * (h @ U + c) if reset_after else (r * h) @ U
    assert_close(last, np.tanh(x[:, 0] @ W + b + hidden))


@pytest.mark.parametrize("reset_after", [True, False])
def test_closed_reset_gate_hides_the_state_from_the_candidate(reset_after):
    cell = biased(layer(reset_after=reset_after), gate=1, value=-60.0)
    biased(cell, gate=0, value=-60.0)  # all of the candidate is written
    h = rng.normal(size=(2, 2, 4)).astype("float32")
    x = inputs()
    first, second = (cell(x, initial_state=state)[0] for state in h)
    assert_close(first, second, 1e-6)
    free = biased(layer(reset_after=reset_after), gate=0, value=-60.0)
    first, second = (free(x, initial_state=state)[0] for state in h)
    assert difference(first[:, 0], second[:, 0]) > 1e-2


@pytest.mark.parametrize("pool", ["last", "mean"])
def test_token_by_token_is_the_whole_sequence(pool):
    x = inputs()
    whole = normed_model()
    assert_close(stream(whole, x), predict(whole, x))
    pooled = normed_model(return_sequences=False, pool=pool, window_size=None)
    outputs = stream(pooled, x)
    for t in (0, 3, 6):
        assert_close(outputs[:, t], predict(pooled, x[:, : t + 1]))


@pytest.mark.parametrize("reset_after", [True, False])
def test_segments_with_the_carried_state_are_one_pass(reset_after):
    cell, x = layer(reset_after=reset_after), inputs()
    first, state = cell(x[:, :3])
    second, last = cell(x[:, 3:], initial_state=state)
    whole, expected = cell(x)
    assert_close(ops.concatenate([first, second], axis=1), whole, 1e-6)
    assert_close(last, expected, 1e-6)


def test_future_steps_do_not_change_the_past():
    built, x = normed_model(), inputs()
    changed = x.copy()
    changed[:, 4:] *= -1.0  # the norm of the input takes no notice of a shift
    before, after = predict(built, x), predict(built, changed)
    assert_close(after[:, :4], before[:, :4], 1e-6)
    assert difference(after[:, 4:], before[:, 4:]) > 1e-3


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
    weights = [np.asarray(w, "float64") for w in cell.get_weights()]
    start = recurrence(x[:, :4], *weights)[:, -1]

    def value(late):
        h, total = start, 0.0
        for t in range(3):
            h = new_state(late[:, t], h, *weights)
            total += np.square(h).sum()
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
        recurrence(x, *weights[:3]),
        recurrence(x[:, ::-1], *weights[3:])[:, ::-1],
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
    _, state = cell(ops.convert_to_tensor(x), mask=mask)
    _, expected = cell(x[:, :4])
    assert_close(state, expected, 1e-6)


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
    assert len(states) == (4 if bidirectional else 2)
    assert all(state.shape == (2, 4) for state in states)
    weights = [np.asarray(w, "float64") for w in built.get_weights()]
    assert_close(states[0], recurrence(x, *weights[:3])[:, -1])
    assert_close(states[2 if bidirectional else 1], y[:, -1, :4], 1e-6)


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
        "gru", vocab_size=7, hidden_size=4, tie_embeddings=True, window_size=5
    )
    tokens = rng.integers(0, 7, (2, 5))
    table, *weights = (to_numpy(w) for w in shake(built).weights)
    expected = recurrence(table[tokens], *weights) @ table.T
    assert_close(predict(built, tokens), expected)
    with pytest.raises(ValueError, match="pass embed_size or bidirectional=False"):
        keras_edifice.build("gru", vocab_size=7, bidirectional=True)


def test_published_sizes():
    options = dict(embed_size=64, hidden_size=128)
    assert count_weights("gru", num_layers=2, **options)[0] == 74_496 + 99_072
    assert count_weights("gru", num_layers=1, **options)[0] == 74_496
    one_bias = count_weights("gru", num_layers=1, reset_after=False, **options)
    assert one_bias[0] == 74_496 - 3 * 128
