import math

import keras
import numpy as np
import pytest
from keras import ops

import keras_edifice
from keras_edifice.ops.hippo import s4d_init, truncated_output
from keras_edifice.ops.state_space import modal_kernel, ssm_kernel_dplr
from keras_edifice.ssm.s4d import S4DLayer
from tests.support.close import assert_close, difference, to_numpy
from tests.support.compiled import compiled
from tests.support.counting import count_weights
from tests.support.gradients import gradients
from tests.support.numerical import numerical_gradient
from tests.support.shaking import shake
from tests.support.streaming import stream

rng = np.random.default_rng(0)
SMALL = dict(state_size=4, dt_min=0.05, dt_max=0.5)
"""Sizes, and steps so long that the state changes within a few of them."""


def gelu(x):
    return x * (1 + np.vectorize(math.erf)(x / np.sqrt(2))) / 2


def layer_norm(x, layer):
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    return x * to_numpy(layer.gamma) + to_numpy(layer.beta)


def named_weights(layer):
    """The weights of a layer by their names below it, in float64."""
    return {v.path.removeprefix(f"{layer.path}/"): to_numpy(v) for v in layer.weights}


def system(w, features, method, softplus=False, ahead=False):
    """Ā, B̄ and C of every feature, in complex128."""
    copies = (features // len(w["A_log"]), 1)
    Lambda = np.tile(-np.exp(w["A_log"]) + 1j * w["A_imag"], copies)
    B = np.tile(w["B_real"] + 1j * w["B_imag"], copies)
    name = "C_ahead" if ahead else "C"
    C = w[f"{name}_real"] + 1j * w[f"{name}_imag"]
    dt = np.log1p(np.exp(w["inv_dt"])) if softplus else np.exp(w["inv_dt"])
    z = dt[:, None] * Lambda
    if method == "zoh":
        return np.exp(z), B * np.expm1(z) / Lambda, C
    return (1 + z / 2) / (1 - z / 2), dt[:, None] * B / (1 - z / 2), C


def recurrence(u, A, B, C):
    """2 Re(C h) of every step, a loop in complex128."""
    h, outputs = np.zeros((len(u), *A.shape), "complex128"), []
    for t in range(u.shape[1]):
        h = A * h + B * u[:, t, :, None]
        outputs.append(2 * (C * h).sum(-1).real)
    return np.stack(outputs, axis=1)


def mixer(u, w, method="zoh", softplus=False, bidirectional=False):
    """The equations of the module in float64."""
    features = u.shape[-1]
    y = recurrence(u, *system(w, features, method, softplus)) + w["D"] * u
    if bidirectional:
        ahead = system(w, features, method, softplus, ahead=True)
        later = recurrence(u[:, ::-1], *ahead)[:, ::-1]
        y[:, :-1] += later[:, 1:]
    y = gelu(y) @ w["out_proj/kernel"] + w["out_proj/bias"]
    y, gate = np.split(y, 2, axis=-1)
    return y / (1 + np.exp(-gate))


def reference(x, model, prenorm=True, mlp=False, **options):
    """The whole model on (batch, time, features), from its weights."""
    x = np.asarray(x, "float64") @ to_numpy(model.get_layer("embed").kernel)

    def feed_forward(x, w):
        x = gelu(x @ w["up/kernel"] + w["up/bias"])
        return x @ w["down/kernel"] + w["down/bias"]

    for i in range(2):
        for name in [f"s4d_{i}"] + [f"mlp_{i}"] * mlp:
            norm = model.get_layer(f"{name}_norm")
            w = named_weights(model.get_layer(name))
            u = layer_norm(x, norm) if prenorm else x
            x = x + (mixer(u, w, **options) if "s4d" in name else feed_forward(u, w))
            x = x if prenorm else layer_norm(x, norm)
    return layer_norm(x, model.get_layer("final_norm")) if prenorm else x


def model(**options):
    sizes = dict(embed_size=3, hidden_size=4, num_layers=2, window_size=None, **SMALL)
    options = {**sizes, "return_sequences": True, **options}
    keras.utils.set_random_seed(0)
    return shake(keras_edifice.build("s4d", **options))


def layer(features=4, **options):
    keras.utils.set_random_seed(0)
    built = S4DLayer(**{**SMALL, **options})
    built.build((None, None, features))
    return shake(built)


def run(layer, x, **options):
    """The call of a layer with options that are no arrays to be traced."""
    return compiled(lambda x: layer(x, **options))(ops.convert_to_tensor(x))


def predict(model, x):
    return model.predict(x, verbose=0)


def inputs(length=11, features=3):
    return rng.normal(size=(2, length, features)).astype("float32")


def taps(built, length, **options):
    """The kernel of a layer, (length, features)."""
    return compiled(lambda: modal_kernel(*built.modes(**options), length))()


@pytest.mark.parametrize("discretization", ["zoh", "bilinear"])
@pytest.mark.parametrize("init", ["lin", "inv", "legs", "real"])
def test_output_is_the_equation(init, discretization):
    built = layer(init=init, discretization=discretization, learn_b=True, num_ssm=2)
    u = inputs(11, 4)
    expected = mixer(to_numpy(u), named_weights(built), discretization)
    assert_close(run(built, u), expected, 2e-5)  # the gate multiplies the rounding


@pytest.mark.parametrize(
    "options",
    [dict(prenorm=True), dict(prenorm=False, mlp_ratio=1.5), dict(bidirectional=True)],
)
def test_model_is_the_stack_of_the_equations(options):
    built, x = model(**options), inputs()
    mlp = "mlp_ratio" in options
    options.pop("mlp_ratio", None)
    assert_close(predict(built, x), reference(x, built, mlp=mlp, **options), 1e-4)


def test_steps_may_come_from_a_softplus():
    built, u = layer(dt_transform="softplus"), inputs(11, 4)
    expected = mixer(to_numpy(u), named_weights(built), softplus=True)
    assert_close(run(built, u), expected, 2e-5)


@pytest.mark.parametrize("learn_b", [False, True])
def test_gradient_is_that_of_the_equation(learn_b):
    built, u = layer(features=2, learn_b=learn_b), inputs(5, 2)
    by_weight, by_input = gradients(built, u, lambda y: ops.sum(ops.square(y)))
    w, u = named_weights(built), to_numpy(u)

    def value(name, z):
        return np.square(mixer(u, {**w, name: z})).sum()

    expected = numerical_gradient(lambda z: np.square(mixer(z, w)).sum(), u)
    assert_close(by_input, expected, 1e-4)
    names = [v.path.removeprefix(f"{built.path}/") for v in built.trainable_variables]
    assert ("B_real" in names) == learn_b
    for name, gradient in zip(names, by_weight, strict=True):
        expected = numerical_gradient(lambda z, name=name: value(name, z), w[name])
        assert difference(gradient, expected) < 1e-4, name


@pytest.mark.parametrize("init", ["lin", "inv", "legs", "real"])
def test_initial_weights_are_those_of_the_paper(init):
    keras.utils.set_random_seed(0)
    built = S4DLayer(state_size=8, init=init)
    built.build((None, None, 300))
    w = named_weights(built)
    Lambda, B = s4d_init(init, 8)
    assert_close(-np.exp(w["A_log"]), np.tile(Lambda.real, (300, 1)), 1e-6)
    assert_close(w["A_imag"], np.tile(Lambda.imag, (300, 1)), 1e-6)
    assert_close(w["B_real"], np.tile(B.real, (300, 1)), 1e-6)
    assert_close(w["B_imag"], np.tile(B.imag, (300, 1)), 1e-6)
    for name, deviation in {"C_real": 0.5**0.5, "C_imag": 0.5**0.5, "D": 1.0}.items():
        assert abs(w[name].std() / deviation - 1) < 0.2
    assert abs(np.quantile(w["inv_dt"], 0.5) - np.log(0.01)) < 0.5
    assert np.log(0.001) <= w["inv_dt"].min() < w["inv_dt"].max() <= np.log(0.1) + 1e-6


def test_frequencies_start_at_multiples_of_pi_or_their_inverses():
    for init, expected in {
        "lin": np.pi * np.arange(4),
        "inv": 8 / np.pi * (8 / (2 * np.arange(4) + 1) - 1),
        "real": np.zeros(4),
    }.items():
        built = S4DLayer(state_size=8, init=init)
        built.build((None, None, 1))
        assert_close(built.A_imag.numpy()[0], expected)


def test_initial_steps_of_a_softplus_are_in_their_range():
    keras.utils.set_random_seed(0)
    built = S4DLayer(dt_transform="softplus", dt_min=0.01, dt_max=0.2)
    built.build((None, None, 300))
    dt = np.log1p(np.exp(to_numpy(built.inv_dt)))
    assert 0.01 * (1 - 1e-5) <= dt.min() < 0.011 < 0.18 < dt.max() <= 0.2 * (1 + 1e-5)


def test_without_low_rank_s4_has_the_same_kernel():
    built, length = layer(discretization="bilinear", init="legs"), 9
    w = named_weights(built)
    Lambda = -np.exp(w["A_log"]) + 1j * w["A_imag"]
    C, dt = w["C_real"] + 1j * w["C_imag"], np.exp(w["inv_dt"])
    P = np.zeros((1, *Lambda.shape))
    C = truncated_output(Lambda, P, C, dt, length)
    B = w["B_real"] + 1j * w["B_imag"]

    def pair(z):
        return tuple(
            ops.convert_to_tensor(part.astype("float32")) for part in (z.real, z.imag)
        )

    arguments = [pair(z) for z in (Lambda, P + 0j, B, C)]
    dt = ops.convert_to_tensor(dt.astype("float32"))
    expected = compiled(lambda: ssm_kernel_dplr(*arguments, dt, length))()
    assert_close(taps(built, length), expected)


def test_real_kernel_is_a_sum_of_decaying_exponentials():
    keras.utils.set_random_seed(0)
    built = S4DLayer(init="real", **SMALL)
    built.build((None, None, 2))
    w = named_weights(built)
    dt, rates = np.exp(w["inv_dt"])[:, None], -np.arange(1.0, 3)
    weight = 2 * w["C_real"] * np.expm1(dt * rates) / rates
    decays = np.exp(np.arange(20)[:, None, None] * dt * rates)
    assert_close(taps(built, 20), (weight * decays).sum(-1))


def test_twice_the_step_takes_every_second_tap_of_a_held_system():
    built = layer()
    weight = built.modes()[1]

    @compiled
    def kernel(rate):
        return modal_kernel(rate, weight, 20)

    slow = kernel(built.modes()[0])
    built.inv_dt.assign_add(np.full(4, np.log(2.0), "float32"))
    assert_close(kernel(built.modes()[0])[:10], slow[::2])


def test_a_shifted_input_gives_a_shifted_output():
    built, x = layer(), inputs(11, 4)
    shifted = np.concatenate([np.zeros_like(x[:, :3]), x[:, :-3]], axis=1)
    assert_close(run(built, shifted)[:, 3:], run(built, x)[:, :-3])


@pytest.mark.parametrize("bidirectional", [False, True])
def test_fourier_transforms_and_the_direct_sum_agree(bidirectional):
    options = dict(bidirectional=bidirectional)
    x, results = inputs(21), []
    for mode in ("fft", "direct"):
        built = model(conv_mode=mode, num_layers=1, **options)
        by_weight, _ = gradients(built, x, lambda y: ops.sum(ops.square(y)))
        results.append((predict(built, x), by_weight))
    (fft, by_weight), (direct, expected) = results
    assert_close(fft, direct)
    for ours, theirs in zip(by_weight, expected, strict=True):
        assert difference(ours, theirs) < 1e-4


@pytest.mark.parametrize("pool", ["last", "mean"])
def test_token_by_token_is_the_whole_sequence(pool):
    x = inputs()
    options = dict(num_ssm=2, init="legs", learn_b=True, mlp_ratio=1.0)
    whole = model(**options)
    assert_close(stream(whole, x), predict(whole, x), 2e-5)  # FFT beside sums
    pooled = model(return_sequences=False, pool=pool, **options)
    outputs = stream(pooled, x)
    for t in (0, 10):
        assert_close(outputs[:, t], predict(pooled, x[:, : t + 1]), 2e-5)


@pytest.mark.parametrize("masked", [False, True])
def test_segments_with_the_carried_state_are_one_pass(masked):
    s4d, x = layer(), inputs(11, 4)
    # Four steps of padding in the first segment, which starts in a state of its own.
    _, start = run(s4d, inputs(5, 4), return_state=True)
    mask = np.arange(6)[None] < np.array([[2], [2]])
    segment = x[:, :2]
    options = dict(initial_state=start, return_state=True)
    if masked:
        segment = np.concatenate([segment, inputs(4, 4)], axis=1)
        first, state = run(s4d, segment, mask=mask, **options)
    else:
        first, state = run(s4d, segment, **options)
    second, state = run(s4d, x[:, 2:], initial_state=state, return_state=True)
    whole, expected = run(s4d, x, **options)
    assert_close(ops.concatenate([first[:, :2], second], axis=1), whole)
    for part, whole_part in zip(state, expected, strict=True):
        assert_close(part, whole_part)


def test_future_tokens_do_not_change_the_past():
    x = inputs(40)
    changed = x.copy()
    changed[:, 20:] += 1.0
    for mode, tolerance in {"fft": 1e-5, "direct": 0.0}.items():  # transforms round
        built = model(conv_mode=mode)
        before, after = predict(built, x), predict(built, changed)
        assert_close(after[:, :20], before[:, :20], tolerance)
        assert difference(after[:, 20:], before[:, 20:]) > 1e-3


def test_both_directions_see_the_future_but_once_the_present():
    built, x = layer(bidirectional=True), inputs(1, 4)
    w = named_weights(built)
    assert_close(run(built, x), mixer(to_numpy(x), w), 2e-5)
    x = inputs(11, 4)
    changed = x.copy()
    changed[:, 10] += 1.0
    assert difference(run(built, changed)[:, 0], run(built, x)[:, 0]) > 1e-4


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(side, bidirectional):
    x = inputs()
    valid = slice(4) if side == "right" else slice(7, None)
    mask = np.zeros((2, 11), "bool")
    mask[:, valid] = True
    # Padded steps of a deeper layer are not zero: each layer has to leave them out.
    built = model(return_sequences=False, bidirectional=bidirectional)
    y = run(built, x, mask=ops.convert_to_tensor(mask))
    assert_close(y, predict(built, x[:, valid]), 2e-5)


def test_pool_follows_the_direction():
    for bidirectional, expected in ((False, "last"), (True, "mean")):
        built = model(bidirectional=bidirectional, return_sequences=False)
        assert built.get_layer("pool").pool == expected


def test_tokens_give_logits():
    keras.utils.set_random_seed(0)
    tokens = np.array([[3, 1, 4, 1, 5]])
    for tie in (True, False):
        built = keras_edifice.build(
            "s4d",
            vocab_size=7,
            tie_embeddings=tie,
            **dict(hidden_size=4, num_layers=1, window_size=None, **SMALL),
        )
        assert predict(shake(built), tokens).shape == (1, 5, 7)
        assert_close(stream(built, tokens), predict(built, tokens))


def test_long_sequences_stay_finite():
    built = layer(features=2, state_size=2)
    x = inputs(4096, 2)
    for shift in (0.0, 20.0):  # eigenvalues so fast that nothing stays
        built.A_log.assign_add(np.full((2, 1), shift, "float32"))
        y, state = run(built, 100.0 * x, return_state=True)
        assert all(np.isfinite(to_numpy(z)).all() for z in (y, *state))


def test_half_precision_streams_with_a_state_in_float32():
    built, x = layer(dtype="mixed_bfloat16"), inputs(5, 4)
    state, outputs = built.initial_state(2), []
    for t in range(5):
        y, state = built.step(x[:, t], state)
        assert keras.backend.standardize_dtype(y.dtype) == "bfloat16"
        outputs.append(ops.cast(y, "float32"))
    for part in (*state, *run(built, x, return_state=True)[1]):
        assert keras.backend.standardize_dtype(part.dtype) == "float32"
    # bfloat16 keeps 8 bits, in the projection after the recurrence.
    whole = ops.cast(run(built, x), "float32")
    assert difference(ops.stack(outputs, axis=1), whole) < 0.02


def test_half_precision_keeps_the_weights_and_states_of_the_recurrence():
    half, full = (layer(dtype=dtype) for dtype in ("mixed_bfloat16", "float32"))
    nothing = np.zeros((2, 20, 4), "float32")
    state = rng.normal(size=(2, 2, 4, 2)).astype("float32")
    found, expected = (
        run(built, nothing, initial_state=(state[0], state[1]), return_state=True)[1]
        for built in (half, full)
    )
    for part, full_part in zip(found, expected, strict=True):
        assert_close(part, full_part, 1e-6)


def test_published_size_of_a_layer():
    options = dict(embed_size=256, hidden_size=256, state_size=64)
    with_one, with_two = (
        count_weights("s4d", num_layers=n, **options)[0] for n in (1, 2)
    )
    assert with_two - with_one == 164_864 + 2 * 256  # the latter is its norm
    assert with_one == 164_864 + 4 * 256


def test_config_keeps_the_arguments():
    options = dict(
        state_size=6,
        num_ssm=2,
        init="inv",
        discretization="bilinear",
        learn_b=True,
        dt_min=0.01,
        dt_max=0.2,
        dt_transform="softplus",
        bidirectional=True,
        dropout=0.3,
        conv_mode="direct",
    )
    config = S4DLayer(**options).get_config()
    assert {name: config[name] for name in options} == options


@pytest.mark.parametrize(
    "option", ["init", "discretization", "dt_transform", "conv_mode"]
)
def test_unknown_choices_are_refused(option):
    with pytest.raises(ValueError, match=f"{option} must be one of .*, received 'x'"):
        S4DLayer(**{option: "x"})


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="state_size must be even, .* received 5"):
        S4DLayer(state_size=5)
    with pytest.raises(ValueError, match="multiple of num_ssm, received 4 and 3"):
        layer(num_ssm=3)
    both = layer(bidirectional=True)
    with pytest.raises(ValueError, match="bidirectional S4DLayer has no state"):
        both(inputs(3, 4), return_state=True)
    with pytest.raises(ValueError, match="cannot run step by step"):
        both.step(inputs(3, 4)[:, 0], both.initial_state(2))
    with pytest.raises(ValueError, match="which bidirectional=True sees"):
        keras_edifice.build("s4d", vocab_size=7, bidirectional=True)
