import math

import keras
import numpy as np
import pytest
from keras import ops

import keras_edifice
from keras_edifice.ssm.hyena import HyenaFilter, HyenaOperator
from tests.support.close import assert_close, difference, to_numpy
from tests.support.compiled import compiled
from tests.support.counting import count_weights
from tests.support.gradients import gradients
from tests.support.numerical import numerical_gradient
from tests.support.shaking import shake
from tests.support.streaming import stream

rng = np.random.default_rng(0)
FILTER = dict(filter_size=5, filter_emb=5, filter_layers=1, filter_freq=2.0)
TAPS = 11


def named_weights(layer):
    """The weights of a layer by their names below it, in float64."""
    return {v.path.removeprefix(f"{layer.path}/"): to_numpy(v) for v in layer.weights}


def filters(w, modulate=True, shift=0.0):
    """The taps of all filters, (taps, features), by the equations of the module."""
    h = w["filter/z"]
    for i in range(sum("kernel_" in name for name in w)):
        h = h @ w[f"filter/kernel_{i}"] + w[f"filter/bias_{i}"]
        h = np.sin(w["filter/freq"] * h)
    h = h @ w["filter/out_kernel"]
    delta = np.linspace(-math.log(0.01) / 1.5, -math.log(0.01) / 0.3, h.shape[1])
    window = np.exp(-np.linspace(0, 1, len(h))[:, None] * delta) + shift
    return h * window if modulate else h


def toeplitz(taps, time):
    """The matrices of the convolutions, (features, time, time)."""
    matrices = np.zeros((taps.shape[1], time, time))
    for t in range(time):
        for s in range(max(0, t - len(taps) + 1), t + 1):
            matrices[:, t, s] = taps[t - s]
    return matrices


def mixer(x, w, order=2, **options):
    """The operator with its convolutions as matrices."""
    time = x.shape[1]
    p = x @ w["in_proj/kernel"] + w["in_proj/bias"]
    p = np.einsum("fts,bsf->btf", toeplitz(w["conv/kernel"][::-1], time), p)
    *x, v = np.split(p + w["conv/bias"], order + 1, axis=-1)
    taps = np.split(filters(w, **options), order - 1, axis=-1)
    for o in range(order - 1):
        v = v * x[order - 1 - o]
        v = np.einsum("fts,bsf->btf", toeplitz(taps[o], time), v) + w["bias"][o] * v
    return (v * x[0]) @ w["out_proj/kernel"] + w["out_proj/bias"]


def model(**options):
    sizes = dict(embed_size=3, hidden_size=4, num_layers=2, max_length=TAPS, **FILTER)
    options = {"return_sequences": True, "window_size": None, **sizes, **options}
    keras.utils.set_random_seed(0)
    return shake(keras_edifice.build("hyena", **options))


def layer(features=4, filter_options=None, **options):
    keras.utils.set_random_seed(0)
    filter_options = {**FILTER, **(filter_options or {})}
    options = {"max_length": TAPS, "filter_options": filter_options, **options}
    built = HyenaOperator(**options)
    built.build((None, None, features))
    return shake(built)


def run(layer, x, **options):
    """The call of a layer with options that are no arrays to be traced."""
    return compiled(lambda x: layer(x, **options))(ops.convert_to_tensor(x))


def predict(model, x):
    return model.predict(x, verbose=0)


def inputs(length=11, features=4):
    return rng.normal(size=(2, length, features)).astype("float32")


@pytest.mark.parametrize("order", [2, 3])
def test_output_is_the_product_with_toeplitz_matrices(order):
    built, x = layer(order=order), inputs()
    w = named_weights(built)
    assert w["bias"].shape == (order - 1, 4)
    assert w["filter/out_kernel"].shape == (5, (order - 1) * 4)
    assert_close(run(built, x), mixer(to_numpy(x), w, order), 2e-5)


@pytest.mark.parametrize(
    ("given", "expected"),
    [({"modulate": False},) * 2, ({"decay_shift": 0.5}, {"shift": 0.5})],
)
def test_filter_options_are_those_of_the_equation(given, expected):
    built, x = layer(filter_options=given), inputs()
    expected = mixer(to_numpy(x), named_weights(built), **expected)
    assert_close(run(built, x), expected, 2e-5)


def test_model_is_the_stack_of_the_equations():
    built, x = model(mlp_ratio=1.5), inputs(features=3)
    expected = to_numpy(x) @ to_numpy(built.get_layer("embed").kernel)

    def norm(x, name):
        gamma, beta = (to_numpy(v) for v in built.get_layer(name).weights)
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return x * gamma + beta

    def feed_forward(x, w):
        x = x @ w["up/kernel"] + w["up/bias"]
        x = x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2
        return x @ w["down/kernel"] + w["down/bias"]

    for name in ("hyena_0", "mlp_0", "hyena_1", "mlp_1"):
        u, w = norm(expected, f"{name}_norm"), named_weights(built.get_layer(name))
        expected = expected + (mixer(u, w) if "hyena" in name else feed_forward(u, w))
    assert_close(predict(built, x), norm(expected, "final_norm"), 1e-4)


def test_gradient_is_that_of_the_equation():
    built, x = layer(2, order=3, max_length=5), inputs(5, 2)
    by_weight, by_input = gradients(built, x, lambda y: ops.sum(ops.square(y)))
    w, exact = named_weights(built), to_numpy(x)

    def value(name, z):
        return np.square(mixer(exact, {**w, name: z}, 3)).sum()

    expected = numerical_gradient(lambda z: np.square(mixer(z, w, 3)).sum(), exact)
    assert difference(by_input, expected) < 1e-4
    for variable, gradient in zip(built.trainable_variables, by_weight, strict=True):
        name = variable.path.removeprefix(f"{built.path}/")
        expected = numerical_gradient(lambda z, name=name: value(name, z), w[name])
        assert difference(gradient, expected) < 1e-4, name


def test_initial_filter_is_that_of_the_paper():
    keras.utils.set_random_seed(0)
    built = HyenaFilter(200, 40, filter_emb=7)
    built.build()
    z, n = to_numpy(built.z), np.arange(40)
    assert_close(z[:, 0], np.linspace(0, 1, 40))
    for k, f in enumerate((1e-4, 1 + 5e-5, 2)):
        assert_close(z[:, 1 + k], np.cos(f * 2 * np.pi * n / 40))
        assert_close(z[:, 4 + k], -np.sin(f * 2 * np.pi * n / 40))
    assert_close(built.freq, np.full(64, 14.0))
    assert len(built.kernels) == 3
    for kernel, bias in zip(built.kernels, built.biases, strict=True):
        bound = kernel.shape[0] ** -0.5
        assert 0.9 < np.abs(to_numpy(kernel)).max() / bound <= 1 + 1e-6
        assert 0.8 < np.abs(to_numpy(bias)).max() / bound <= 1 + 1e-6
    # e^{-δ} at the end, for the slowest and the fastest.
    assert_close(built.window()[-1, [0, -1]], [0.01 ** (1 / 1.5), 0.01 ** (1 / 0.3)])
    operator = HyenaOperator(max_length=3)
    operator.build((None, None, 400))
    assert abs(to_numpy(operator.bias).std() - 1) < 0.1
    assert operator.filter.out_kernel.shape == (64, 400)  # and there is no bias


def test_a_filter_of_one_tap_leaves_the_gates():
    built, x = layer(conv_size=1), inputs()
    delta = np.zeros((TAPS, 4), "float32")
    delta[0] = 1.0
    built.filter.taps = lambda length=None: ops.convert_to_tensor(delta[:length])
    built.bias.assign(np.zeros((1, 4), "float32"))
    w = named_weights(built)
    p = to_numpy(x) @ w["in_proj/kernel"] + w["in_proj/bias"]
    first, second, v = np.split(p * w["conv/kernel"] + w["conv/bias"], 3, axis=-1)
    y = first * second * v
    expected = y @ w["out_proj/kernel"] + w["out_proj/bias"]
    assert_close(run(built, x), expected, 2e-5)


def test_short_sequences_use_the_first_taps_and_long_ones_all():
    built = layer()
    taps = to_numpy(built.filter.taps())
    assert_close(taps, filters(named_weights(built)))
    assert_close(built.filter.taps(4), taps[:4], 1e-6)
    for length in (4, 2 * TAPS):
        x = inputs(length)
        assert_close(run(built, x), mixer(to_numpy(x), named_weights(built)), 2e-5)


def test_fourier_transforms_and_the_direct_sum_agree():
    x = inputs()
    assert_close(run(layer(conv_mode="direct"), x), run(layer(), x))


def test_token_by_token_is_the_whole_sequence_also_beyond_the_taps():
    x, built = inputs(15, 3), model(order=3)
    assert_close(stream(built, x), predict(built, x), 5e-5)  # FFT beside sums


@pytest.mark.parametrize("valid", [[0, 1, 2, 3], [2, 3, 4, 5], [0, 2, 3, 5]])
def test_segments_with_the_carried_state_are_one_pass(valid):
    built, x = layer(order=3), inputs(15)
    segment = inputs(6)
    segment[:, valid] = x[:, 5:9]
    mask = ops.convert_to_tensor(np.isin(np.arange(6), valid)[None].repeat(2, 0))
    first, state = run(built, x[:, :5], return_state=True)
    second, state = run(
        built, segment, mask=mask, initial_state=state, return_state=True
    )
    third, state = run(built, x[:, 9:], initial_state=state, return_state=True)
    whole, expected = run(built, x, return_state=True)
    parts = [first, to_numpy(second)[:, valid], third]
    assert_close(np.concatenate([to_numpy(z) for z in parts], axis=1), whole, 2e-5)
    for part, whole_part in zip(state, expected, strict=True):
        assert_close(part, whole_part)


def test_future_tokens_do_not_change_the_past():
    x = inputs(20, 3)
    changed = x.copy()
    changed[:, 10:] += 1.0
    for mode, tolerance in {"fft": 1e-5, "direct": 0.0}.items():  # transforms round
        built = model(conv_mode=mode)
        before, after = predict(built, x), predict(built, changed)
        assert difference(after[:, :10], before[:, :10]) <= tolerance
        assert difference(after[:, 10:], before[:, 10:]) > 1e-3


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(side):
    x = inputs(features=3)
    valid = slice(4) if side == "right" else slice(7, None)
    mask = np.zeros((2, 11), "bool")
    mask[:, valid] = True
    built = model(return_sequences=False, order=3)
    y = run(built, x, mask=ops.convert_to_tensor(mask))
    assert_close(y, predict(built, x[:, valid]), 2e-5)


def test_long_sequences_stay_finite():
    built, x = layer(2, max_length=4096), inputs(4096, 2)
    for scale in (1.0, 1e3):
        assert np.isfinite(to_numpy(run(built, scale * x))).all()


def test_half_precision_keeps_filter_and_state_in_float32():
    built, full = (layer(dtype=dtype) for dtype in ("mixed_bfloat16", "float32"))
    x = inputs()
    y, (_, past) = run(built, x, return_state=True)
    assert keras.backend.standardize_dtype(y.dtype) == "bfloat16"
    for part in (past, built.initial_state(2)[1], built.filter.taps()):
        assert keras.backend.standardize_dtype(part.dtype) == "float32"
    assert_close(built.filter.taps(), full.filter.taps(), 1e-6)
    # bfloat16 keeps 8 bits, in two projections, a convolution and two products.
    assert difference(ops.cast(y, "float32"), run(full, x)) < 0.03


def test_published_sizes():
    small = count_weights("hyena", vocab_size=50_264, variant="small")
    assert small == (153_700_416, 0)
    layer = HyenaOperator(max_length=2048)
    layer.build((None, None, 864))
    assert layer.count_params() == 3_134_112


def test_config_keeps_the_arguments():
    options = dict(
        max_length=7,
        order=3,
        conv_size=2,
        conv_mode="direct",
        filter_options=dict(FILTER, modulate=False),
    )
    config = HyenaOperator(**options).get_config()
    assert {name: config[name] for name in options} == options
    options = dict(
        **dict(features=2, max_length=7, filter_size=3, filter_emb=5),
        **dict(filter_layers=1, filter_freq=2.0, modulate=False, fast_decay_pct=0.4),
        **dict(slow_decay_pct=1.0, decay_target=0.1, decay_shift=0.2),
    )
    config = HyenaFilter(**options).get_config()
    assert {name: config[name] for name in options} == options


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="conv_mode must be one of .* 'x'"):
        HyenaOperator(3, conv_mode="x")
    with pytest.raises(ValueError, match="order must be >= 2, received 1"):
        HyenaOperator(3, order=1)
    with pytest.raises(ValueError, match="filter_emb must be odd .* received 4"):
        keras_edifice.build("hyena", embed_size=3, filter_emb=4)
    with pytest.raises(ValueError, match="give max_length where window_size is None"):
        keras_edifice.build("hyena", embed_size=3, window_size=None)
