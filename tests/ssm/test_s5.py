import math

import keras
import numpy as np
import pytest
from keras import ops

import keras_edifice
from keras_edifice.ops.hippo import nplr
from keras_edifice.ops.state_space import modal_kernel
from keras_edifice.ssm.s5 import S5Layer
from tests.support.close import assert_close, difference, to_numpy
from tests.support.compiled import compiled
from tests.support.counting import count_weights
from tests.support.gradients import gradients
from tests.support.numerical import numerical_gradient
from tests.support.shaking import shake
from tests.support.streaming import stream

rng = np.random.default_rng(0)
SMALL = dict(state_size=6, dt_min=0.05, dt_max=0.5)
"""Sizes, and steps so long that the state changes within a few of them."""


def gelu(x):
    return x * (1 + np.vectorize(math.erf)(x / np.sqrt(2))) / 2


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def named_weights(layer):
    """The weights of a layer by their names below it, in float64."""
    return {v.path.removeprefix(f"{layer.path}/"): to_numpy(v) for v in layer.weights}


def system(w, method="zoh", clip_eigs=False):
    """Λ̄ and B̄ in complex128."""
    real = np.minimum(w["Lambda_real"], -1e-4) if clip_eigs else w["Lambda_real"]
    Lambda, dt = real + 1j * w["Lambda_imag"], np.exp(w["log_step"])
    B = w["B_real"] + 1j * w["B_imag"]
    if method == "zoh":
        return np.exp(Lambda * dt), (np.expm1(Lambda * dt) / Lambda)[:, None] * B
    scale = 1 / (1 - dt / 2 * Lambda)
    return scale * (1 + dt / 2 * Lambda), (scale * dt)[:, None] * B


def recurrence(u, decay, B):
    """The states of all steps, a loop in complex128."""
    x, states = np.zeros((len(u), len(decay)), "complex128"), []
    for t in range(u.shape[1]):
        x = decay * x + u[:, t] @ B.T
        states.append(x)
    return np.stack(states, axis=1)


def mixer(
    u,
    w,
    discretization="zoh",
    clip_eigs=False,
    conj_sym=True,
    activation="half_glu1",
    bidirectional=False,
):
    """The equations of the module in float64."""
    decay, B = system(w, discretization, clip_eigs)
    y = (recurrence(u, decay, B) @ (w["C_real"] + 1j * w["C_imag"]).T).real
    if bidirectional:
        later = recurrence(u[:, ::-1], decay, B)[:, ::-1]
        y = y + (later @ (w["C_ahead_real"] + 1j * w["C_ahead_imag"]).T).real
    y = (2 if conj_sym else 1) * y + w["D"] * u
    g = gelu(y)
    if activation == "gelu":
        return g
    gate = sigmoid(g @ w["gate/kernel"] + w["gate/bias"])
    if activation == "full_glu":
        return (g @ w["value/kernel"] + w["value/bias"]) * gate
    return (y if activation == "half_glu2" else g) * gate


def model(**options):
    sizes = dict(embed_size=3, hidden_size=4, num_layers=2, window_size=None, **SMALL)
    options = {**sizes, "return_sequences": True, **options}
    keras.utils.set_random_seed(0)
    return shake(keras_edifice.build("s5", **options))


def layer(features=4, **options):
    keras.utils.set_random_seed(0)
    built = S5Layer(**{**SMALL, **options})
    built.build((None, None, features))
    return shake(built)


def run(layer, x, **options):
    """The call of a layer with options that are no arrays to be traced."""
    return compiled(lambda x: layer(x, **options))(ops.convert_to_tensor(x))


def predict(model, x):
    return model.predict(x, verbose=0)


def inputs(length=11, features=4):
    return rng.normal(size=(2, length, features)).astype("float32")


@pytest.mark.parametrize(
    "options",
    [
        dict(discretization="bilinear", activation="full_glu"),
        dict(activation="half_glu2", clip_eigs=True),
        dict(activation="gelu", conj_sym=False),
        dict(bidirectional=True),
    ],
    ids=str,
)
def test_output_is_the_equation(options):
    built, u = layer(**options), inputs()
    if "clip_eigs" in options:
        built.Lambda_real.assign(np.array([0.3, -0.5, 0.1], "float32"))
        decay, _ = system(named_weights(built), clip_eigs=True)
        assert (np.abs(decay) < 1).all()
        assert_close(to_numpy(built.system()[0][0]), decay.real)
    expected = mixer(to_numpy(u), named_weights(built), **options)
    assert_close(run(built, u), expected, 2e-5)  # the gate multiplies the rounding


@pytest.mark.parametrize("prenorm", [True, False])
def test_model_is_the_stack_of_the_equations(prenorm):
    built, x = model(prenorm=prenorm, mlp_ratio=1.0), inputs(features=3)
    expected = to_numpy(x) @ to_numpy(built.get_layer("embed").kernel)

    def norm(x, name):
        gamma, beta = (to_numpy(v) for v in built.get_layer(name).weights)
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return x * gamma + beta

    def feed_forward(x, w):
        x = gelu(x @ w["up/kernel"] + w["up/bias"])
        return x @ w["down/kernel"] + w["down/bias"]

    for name in ("s5_0", "mlp_0", "s5_1", "mlp_1"):
        apply = mixer if "s5" in name else feed_forward
        u = norm(expected, f"{name}_norm") if prenorm else expected
        expected = expected + apply(u, named_weights(built.get_layer(name)))
        expected = expected if prenorm else norm(expected, f"{name}_norm")
    expected = norm(expected, "final_norm") if prenorm else expected
    assert_close(predict(built, x), expected, 1e-4)


def test_gradient_is_that_of_the_equation():
    built, u = layer(features=2), inputs(5, 2)
    by_weight, by_input = gradients(built, u, lambda y: ops.sum(ops.square(y)))
    w, u = named_weights(built), to_numpy(u)

    def value(name, z):
        return np.square(mixer(u, {**w, name: z})).sum()

    expected = numerical_gradient(lambda z: np.square(mixer(z, w)).sum(), u)
    assert_close(by_input, expected, 1e-4)
    for variable, gradient in zip(built.trainable_variables, by_weight, strict=True):
        name = variable.path.removeprefix(f"{built.path}/")
        expected = numerical_gradient(lambda z, name=name: value(name, z), w[name])
        assert difference(gradient, expected) < 1e-4, name


@pytest.mark.parametrize("conj_sym", [True, False])
def test_state_matrix_starts_as_blocks_of_the_normal_part_of_hippo(conj_sym):
    built = S5Layer(state_size=16, num_blocks=2, conj_sym=conj_sym)
    built.build((None, None, 4000))
    w = named_weights(built)
    Lambda, _, _, V = nplr("legs", 8)
    kept = 4 if conj_sym else 8
    assert_close(w["Lambda_real"], np.full(2 * kept, -0.5))
    assert_close(w["Lambda_imag"], np.tile(Lambda.imag[:kept], 2))
    dt = np.exp(w["log_step"])
    assert dt.shape == (2 * kept,)
    assert (dt >= 0.001 * (1 - 1e-5)).all() and (dt <= 0.1 * (1 + 1e-5)).all()
    assert abs(w["D"].std() - 1) < 0.05
    # V has orthonormal columns: B̃ = V* B and C̃ = C V are turned, and not scaled.
    B, C = (w[f"{name}_real"] + 1j * w[f"{name}_imag"] for name in "BC")
    V = np.kron(np.eye(2), V[:, :kept])
    for spread, variance in ((B @ B.conj().T, 1 / 16), (C.conj().T @ C, 2 / 16)):
        expected = variance * np.eye(2 * kept)
        assert np.abs(spread / 4000 - expected).max() < 0.02


def test_output_matrix_starts_in_three_ways():
    deviations = {"trunc_standard_normal": 8**-0.5, "lecun_normal": (8 * 300) ** -0.5}
    for c_init, expected in {**deviations, "complex_normal": 0.5**0.5}.items():
        built = S5Layer(state_size=8, c_init=c_init)
        built.build((None, None, 300))
        C = np.stack([to_numpy(built.C_real), to_numpy(built.C_imag)])
        assert abs(C.std() / expected - 1) < 0.1, c_init


def test_conjugate_pairs_are_the_full_state_space():
    half, full = layer(), layer(conj_sym=False)
    w, both = named_weights(half), {}
    for name, value in w.items():
        axis = 1 if name.startswith("C") else 0
        sign = -1 if name.endswith("imag") else 1
        paired = name.startswith(("Lambda", "B_", "C_", "log"))
        both[name] = np.concatenate([value, sign * value], axis) if paired else value
    for variable in full.weights:
        variable.assign(both[variable.path.removeprefix(f"{full.path}/")])
    x = inputs()
    assert_close(run(full, x), run(half, x))


def test_the_order_of_the_states_does_not_matter():
    built, x = layer(), inputs()
    before = run(built, x)
    for name in ("Lambda_real", "Lambda_imag", "log_step", "B_real", "B_imag"):
        weight = getattr(built, name)
        weight.assign(to_numpy(weight)[[2, 0, 1]])
    for weight in (built.C_real, built.C_imag):
        weight.assign(to_numpy(weight)[:, [2, 0, 1]])
    assert_close(run(built, x), before)


def test_scan_is_the_convolution_with_the_modes():
    built, x = layer(activation="gelu"), inputs()
    w = named_weights(built)
    decay, B = system(w)
    C = w["C_real"] + 1j * w["C_imag"]
    rate = np.log(decay).astype("complex64")
    rate = [
        ops.convert_to_tensor(np.broadcast_to(z, (4, 4, 3)).copy())
        for z in (rate.real, rate.imag)
    ]
    weight = (2 * C[:, None] * B.T[None]).astype("complex64")  # (out, in, states)
    weight = [ops.convert_to_tensor(z.copy()) for z in (weight.real, weight.imag)]
    kernel = to_numpy(compiled(lambda: modal_kernel(rate, weight, 11))())
    y = w["D"] * to_numpy(x)
    for lag in range(11):
        y[:, lag:] += to_numpy(x)[:, : 11 - lag] @ kernel[lag].T
    assert_close(run(built, x), gelu(y), 2e-5)


def test_a_shifted_input_gives_a_shifted_output():
    built, x = layer(), inputs()
    shifted = np.concatenate([np.zeros_like(x[:, :3]), x[:, :-3]], axis=1)
    assert_close(run(built, shifted)[:, 3:], run(built, x)[:, :-3])


@pytest.mark.parametrize("norm", ["layer", "batch"])
def test_token_by_token_is_the_whole_sequence(norm):
    x = inputs(features=3)
    whole = model(norm=norm, activation="full_glu", mlp_ratio=1.0, num_layers=1)
    if norm == "batch":
        moved = whole.get_layer("s5_0_norm").moving_mean
        moved.assign(np.full(4, 0.3, "float32"))
    assert_close(stream(whole, x), predict(whole, x), 2e-5)


def test_batch_norm_is_over_examples_and_steps():
    built, x = model(norm="batch", num_layers=1), inputs(40, 3)
    y = to_numpy(built(x, training=True))
    gamma, beta = (to_numpy(v) for v in built.get_layer("final_norm").weights[:2])
    assert_close(y.mean((0, 1)), beta, 1e-4)
    assert_close(y.std((0, 1)), np.abs(gamma), 1e-3)  # epsilon


@pytest.mark.parametrize("masked", [False, True])
def test_segments_with_the_carried_state_are_one_pass(masked):
    built, x = layer(), inputs()
    segment, options = x[:, :4], {}
    if masked:
        segment = np.concatenate([segment, inputs(2)], axis=1)
        options["mask"] = ops.convert_to_tensor(np.arange(6)[None] < [[4], [4]])
    first, state = run(built, segment, return_state=True, **options)
    second, state = run(built, x[:, 4:], initial_state=state, return_state=True)
    last = recurrence(to_numpy(x), *system(named_weights(built)))[:, -1]
    assert_close(state[0], last.real)
    assert_close(state[1], last.imag)
    whole = run(built, x)
    assert_close(ops.concatenate([first[:, :4], second], axis=1), whole, 2e-5)


def test_future_tokens_do_not_change_the_past():
    built, x = model(), inputs(40, 3)
    changed = x.copy()
    changed[:, 20:] += 1.0
    before, after = predict(built, x), predict(built, changed)
    assert_close(after[:, :20], before[:, :20], 1e-6)
    assert difference(after[:, 20:], before[:, 20:]) > 1e-3


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(side, bidirectional):
    x = inputs(features=3)
    valid = slice(4) if side == "right" else slice(7, None)
    mask = np.zeros((2, 11), "bool")
    mask[:, valid] = True
    built = model(return_sequences=False, bidirectional=bidirectional)
    assert built.get_layer("pool").pool == ("mean" if bidirectional else "last")
    y = run(built, x, mask=ops.convert_to_tensor(mask))
    assert_close(y, predict(built, x[:, valid]), 2e-5)


def test_tokens_give_logits():
    tokens = np.array([[3, 1, 4, 1, 5]])
    built = model(embed_size=None, vocab_size=7, num_layers=1)
    assert predict(built, tokens).shape == (1, 5, 7)


def test_long_sequences_stay_finite():
    built, x = layer(features=2), inputs(4096, 2)
    for real in (-1e-3, -1e4):  # it keeps everything, or nothing
        built.Lambda_real.assign(np.full(3, real, "float32"))
        assert np.isfinite(to_numpy(run(built, 100.0 * x))).all()


def test_half_precision_keeps_the_weights_and_states_of_the_recurrence():
    half, full = (layer(dtype=dtype) for dtype in ("mixed_bfloat16", "float32"))
    x = inputs()
    (y, found), (z, expected) = (run(m, x, return_state=True) for m in (half, full))
    assert keras.backend.standardize_dtype(y.dtype) == "bfloat16"
    for part, other in zip(found, expected, strict=True):
        assert keras.backend.standardize_dtype(part.dtype) == "float32"
        assert_close(part, other, 1e-6)
    # bfloat16 keeps 8 bits, in the projection after the recurrence.
    assert difference(ops.cast(y, "float32"), z) < 0.02


def test_published_size_of_a_layer():
    def size(**options):
        options = {**dict(embed_size=256, hidden_size=256), **options}
        one, two = (count_weights("s5", num_layers=n, **options)[0] for n in (1, 2))
        return two - one - 2 * 256  # without its norm

    assert size(state_size=64) == 33_120 + 65_792
    assert size(state_size=64, activation="gelu") == 33_120
    # The state is as large for any number of features.
    assert S5Layer(state_size=64).state_size == 64
    built = layer(features=2, state_size=8)
    assert [z.shape for z in built.initial_state(3)] == [(3, 4)] * 2


def test_config_keeps_the_arguments():
    options = dict(
        state_size=8,
        num_blocks=2,
        conj_sym=False,
        discretization="bilinear",
        c_init="lecun_normal",
        clip_eigs=True,
        activation="half_glu2",
        bidirectional=True,
        dt_min=0.01,
        dt_max=0.2,
        dropout=0.3,
    )
    config = S5Layer(**options).get_config()
    assert {name: config[name] for name in options} == options


def test_what_does_not_fit_is_refused():
    for option in ("discretization", "c_init", "activation"):
        with pytest.raises(ValueError, match=f"{option} must be one of .* 'x'"):
            S5Layer(**{option: "x"})
    with pytest.raises(ValueError, match="even multiple of .* received 6 and 2"):
        S5Layer(state_size=6, num_blocks=2)
    both = layer(bidirectional=True)
    with pytest.raises(ValueError, match="bidirectional S5Layer has no state"):
        both(inputs(3), return_state=True)
    with pytest.raises(ValueError, match="cannot run step by step"):
        both.step(inputs(3)[:, 0], both.initial_state(2))
    with pytest.raises(ValueError, match="which bidirectional=True sees"):
        keras_edifice.build("s5", vocab_size=7, bidirectional=True)
