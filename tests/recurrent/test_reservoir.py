import keras
import numpy as np
import pytest
from keras import ops

import keras_edifice
from keras_edifice.recurrent.reservoir import ReservoirLayer
from tests.support.close import assert_close, difference, to_numpy
from tests.support.compiled import compiled
from tests.support.counting import count_weights
from tests.support.streaming import stream

rng = np.random.default_rng(0)


def layer(units=6, features=3, **options):
    options = {"sparsity": 0.3, "bias_scaling": 0.5, "leak_rate": 0.4, **options}
    built = ReservoirLayer(units, **options)
    built.build((None, None, features))
    return built


def model(**options):
    keras.utils.set_random_seed(0)
    sizes = dict(input_size=3, reservoir_size=6, output_size=2, sparsity=0.3)
    return keras_edifice.build("reservoir", **{**sizes, **options})


def run(layer, x, **options):
    """The call of a layer with options that are no arrays to be traced."""
    return compiled(lambda x: layer(x, **options))(ops.convert_to_tensor(x))


def predict(model, x):
    return model.predict(x, verbose=0)


def inputs(length=11, features=3, batch=2):
    return rng.normal(size=(batch, length, features)).astype("float32")


def recurrence(u, built):
    """The equation of the module, a loop in float64."""
    state = np.zeros((len(u), built.units))
    W, W_in, b = (to_numpy(w) for w in built.weights)
    a, states = built.leak_rate, []
    for t in range(u.shape[1]):
        state = (1 - a) * state + a * np.tanh(u[:, t] @ W_in + state @ W + b)
        states.append(state)
    return np.stack(states, axis=1)


@pytest.mark.parametrize("concat_input", [False, True])
def test_output_is_the_equation(concat_input):
    built, u = layer(concat_input=concat_input), inputs()
    expected = recurrence(to_numpy(u), built)
    if concat_input:
        expected = np.concatenate([expected, u], axis=-1)
    assert_close(run(built, u), expected)


@pytest.mark.parametrize(("radius", "sparsity"), [(0.9, 0.9), (1.3, 0.0), (0.0, 0.5)])
def test_largest_eigenvalue_is_the_one_asked_for(radius, sparsity):
    built = layer(100, spectral_radius=radius, sparsity=sparsity)
    W = to_numpy(built.W)
    assert abs(np.abs(np.linalg.eigvals(W)).max() - radius) < 1e-6
    if radius:
        assert abs((W == 0).mean() - sparsity) < 0.02


def test_two_builds_with_one_seed_are_identical_and_others_differ():
    first, second, other = layer(), layer(), layer(seed=1)
    for a, b in zip(first.weights, second.weights, strict=True):
        assert_close(a, b, 0)
    assert difference(first.W, other.W) > 0.1


def test_weights_follow_their_options():
    built = layer(
        400, 5, input_scaling=0.2, input_sparsity=0.5, bias_scaling=0.0, sparsity=0.9
    )
    W_in = to_numpy(built.W_in)
    assert abs((W_in == 0).mean() - 0.5) < 0.05
    assert abs(W_in[W_in != 0].std() - 0.2) < 0.02
    assert not to_numpy(built.b).any()


def test_states_forget_where_they_started():
    built, u = layer(30, spectral_radius=0.9, leak_rate=1.0), inputs(200)
    starts = rng.normal(size=(2, 2, 30)).astype("float32")
    first, second = (to_numpy(run(built, u, initial_state=x)) for x in starts)
    apart = np.abs(first - second).max(axis=(0, 2))
    assert apart[0] > 0.1
    assert apart[-1] < 1e-6


def test_without_a_leak_the_state_stays():
    built = layer(leak_rate=0.0)
    start = rng.normal(size=(2, 6)).astype("float32")
    _, state = run(built, inputs(), initial_state=start, return_state=True)
    assert_close(state, start, 0)


def test_the_readout_alone_learns():
    trainable, fixed = count_weights(
        "reservoir", input_size=3, reservoir_size=50, output_size=4
    )
    assert (trainable, fixed) == (51 * 4, 50 * 50 + 3 * 50 + 50)
    built, x = model(), inputs(batch=16)
    before = [to_numpy(w) for w in built.get_layer("reservoir").weights]
    built.compile("adam", "mse")
    losses = built.fit(x, x[:, -1, :2], epochs=5, verbose=0).history["loss"]
    assert losses[-1] < losses[0]
    for a, b in zip(built.get_layer("reservoir").weights, before, strict=True):
        assert_close(a, b, 0)


@pytest.mark.parametrize("return_sequences", [False, True])
def test_ridge_regression_recovers_a_linear_readout(return_sequences):
    x = inputs(20, batch=40)
    truth = model(return_sequences=return_sequences, washout=5)
    fitted = model(return_sequences=return_sequences, washout=5, ridge=0.0)
    y = predict(truth, x)
    assert y.shape == ((40, 15, 2) if return_sequences else (40, 2))
    assert fitted.fit_readout(x, y, batch_size=16) is fitted
    for found, expected in zip(
        fitted.layers[-1].get_weights(), truth.layers[-1].get_weights(), strict=True
    ):
        assert_close(found, expected, 1e-3)  # the states are known to float32
    with pytest.raises(
        ValueError, match=r"y must have the shape .* received \(40, 3\)"
    ):
        fitted.fit_readout(x, np.zeros((40, 3)))


def test_ridge_is_the_solution_of_its_equation():
    x, y = inputs(batch=30), rng.normal(size=(30, 2))
    built = model(ridge=0.5).fit_readout(x, y)
    readout = built.layers[-1]
    X = predict(keras.Model(built.input, readout.input), x).astype("float64")
    kernel, bias = (to_numpy(w) for w in readout.weights)
    rest = X @ kernel + bias - y
    assert_close(X.T @ rest + 0.5 * kernel, 0 * kernel, 1e-4)
    assert_close(rest.mean(axis=0), np.zeros(2), 1e-6)
    less = to_numpy(built.fit_readout(x, y, ridge=50.0).layers[-1].kernel)
    assert np.abs(less).sum() < np.abs(kernel).sum()


def narma(u):
    """The tenth-order nonlinear benchmark of Atiya & Parlos 2000."""
    y = np.zeros(len(u))
    for t in range(10, len(u) - 1):
        y[t + 1] = (
            0.3 * y[t]
            + 0.05 * y[t] * y[t - 9 : t + 1].sum()
            + 1.5 * u[t - 9] * u[t]
            + 0.1
        )
    return y


def test_narma_is_predicted_better_than_from_the_inputs_alone():
    u = np.random.default_rng(0).uniform(0.0, 0.5, size=1500)
    y = narma(u)
    built = model(
        **dict(input_size=1, reservoir_size=200, output_size=1, spectral_radius=0.95),
        **dict(sparsity=0.9, input_scaling=0.1, bias_scaling=0.3, ridge=1e-8),
        **dict(washout=50, return_sequences=True),
    )
    data = u[None, :, None].astype("float32")
    built.fit_readout(data[:, :1000], y[None, 50:1000, None])
    found = predict(built, data)[0, 950:, 0]
    past = np.stack([np.roll(u, lag) for lag in range(12)] + [np.ones(1500)], axis=1)
    linear = np.linalg.lstsq(past[50:1000], y[50:1000], rcond=None)[0]
    variance = y[1000:].var()
    error = np.mean((found - y[1000:]) ** 2) / variance
    baseline = np.mean((past[1000:] @ linear - y[1000:]) ** 2) / variance
    assert error < 0.6 * baseline


def test_token_by_token_is_the_whole_sequence():
    whole, x = model(return_sequences=True, concat_input=True, leak_rate=0.5), inputs()
    assert_close(stream(whole, x), predict(whole, x))


def test_segments_with_the_carried_state_are_one_pass():
    built, x = layer(), inputs()
    first, state = run(built, x[:, :4], return_state=True)
    second, state = run(built, x[:, 4:], initial_state=state, return_state=True)
    whole, expected = run(built, x, return_state=True)
    assert_close(ops.concatenate([first, second], axis=1), whole, 1e-6)
    assert_close(state, expected, 1e-6)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(side):
    x, built = inputs(), model(leak_rate=0.5, bias_scaling=0.4)
    valid = slice(4) if side == "right" else slice(7, None)
    mask = np.zeros((2, 11), "bool")
    mask[:, valid] = True
    y = run(built, x, mask=ops.convert_to_tensor(mask))
    assert_close(y, predict(built, x[:, valid]))


def test_saved_weights_are_those_that_were_drawn(tmp_path):
    built, x = model(seed=7), inputs()
    built.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert_close(predict(loaded, x), predict(built, x), 1e-6)
    y = rng.normal(size=(2, 2))
    assert_close(loaded.fit_readout(x, y, ridge=1.0).layers[-1].kernel.shape, (6, 2), 0)


def test_long_sequences_and_large_inputs_stay_finite():
    y = run(layer(2, 1), 1e4 * inputs(4096, 1))
    assert np.isfinite(to_numpy(y)).all()


def test_a_washout_of_everything_is_refused():
    with pytest.raises(ValueError, match="washout must be below window_size"):
        model(washout=7, window_size=7)


def test_a_matrix_without_cycles_is_refused():
    with pytest.raises(ValueError, match="all eigenvalues of W are zero"):
        layer(2, sparsity=1.0)


def test_config_keeps_the_arguments():
    options = dict(
        units=4,
        spectral_radius=0.5,
        sparsity=0.2,
        input_scaling=0.3,
        input_sparsity=0.1,
        bias_scaling=0.2,
        leak_rate=0.7,
        concat_input=True,
        seed=3,
    )
    config = ReservoirLayer(**options).get_config()
    assert {name: config[name] for name in options} == options
