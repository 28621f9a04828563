import math

import keras
import numpy as np
import pytest
from keras import ops

import keras_edifice
from keras_edifice.ops.hippo import hippo
from keras_edifice.ops.state_space import dplr_system
from keras_edifice.ops.tracing import export_scope
from keras_edifice.ssm.s4 import S4Layer
from keras_edifice.ssm.s4d import S4DLayer
from tests.support.close import assert_close, difference, to_numpy
from tests.support.compiled import compiled
from tests.support.counting import count_weights
from tests.support.gradients import gradients
from tests.support.numerical import numerical_gradient
from tests.support.shaking import shake
from tests.support.streaming import stream

rng = np.random.default_rng(0)
LENGTH = 11
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


def dense(w, features, softplus=False):
    """Ā, B̄ of every feature with all conjugates, in complex128."""
    copies = features // len(w["A_log"])
    Lambda = np.tile(-np.exp(w["A_log"]) + 1j * w["A_imag"], (copies, 1))
    B = np.tile(w["B_real"] + 1j * w["B_imag"], (copies, 1))
    P = np.tile(w["P_real"] + 1j * w["P_imag"], (1, copies, 1))
    Lambda, B, P = (np.concatenate([z, z.conj()], axis=-1) for z in (Lambda, B, P))
    dt = np.log1p(np.exp(w["inv_dt"])) if softplus else np.exp(w["inv_dt"])
    dt, identity = dt[:, None, None], np.eye(Lambda.shape[-1])
    A = Lambda[..., None] * identity - np.einsum("rhn,rhm->hnm", P, P.conj())
    inverse = np.linalg.inv(identity - dt / 2 * A)
    return inverse @ (identity + dt / 2 * A), (dt * inverse @ B[..., None])[..., 0]


def outputs(w, A, taps, name="C"):
    """C from C̃ = C (I - Ā^taps), with all conjugates."""
    C = w[f"{name}_real"] + 1j * w[f"{name}_imag"]
    C = np.concatenate([C, C.conj()], axis=-1)[:, None]
    rest = np.eye(A.shape[-1]) - np.linalg.matrix_power(A, taps)
    return (C @ np.linalg.inv(rest))[:, 0]


def recurrence(u, A, B, C):
    """Re(C x) of every step, a loop in complex128, and the last x."""
    x, ys = np.zeros((len(u), *B.shape), "complex128"), []
    for t in range(u.shape[1]):
        x = (A @ x[..., None])[..., 0] + B * u[:, t, :, None]
        ys.append((C * x).sum(-1).real)
    return np.stack(ys, axis=1), x


def mixer(u, w, taps=LENGTH, softplus=False, bidirectional=False):
    """The equations of the module in float64."""
    A, B = dense(w, u.shape[-1], softplus)
    y = recurrence(u, A, B, outputs(w, A, taps))[0] + w["D"] * u
    if bidirectional:
        C = outputs(w, A, taps, "C_ahead")
        later = recurrence(u[:, ::-1], A, B, C)[0][:, ::-1]
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
        for name in [f"s4_{i}"] + [f"mlp_{i}"] * mlp:
            norm = model.get_layer(f"{name}_norm")
            w = named_weights(model.get_layer(name))
            u = layer_norm(x, norm) if prenorm else x
            x = x + (mixer(u, w, **options) if "s4" in name else feed_forward(u, w))
            x = x if prenorm else layer_norm(x, norm)
    return layer_norm(x, model.get_layer("final_norm")) if prenorm else x


def model(**options):
    sizes = dict(embed_size=3, hidden_size=4, num_layers=2, window_size=None, **SMALL)
    options = {"return_sequences": True, "max_length": LENGTH, **sizes, **options}
    keras.utils.set_random_seed(0)
    return shake(keras_edifice.build("s4", **options), 0.1)


def layer(features=4, max_length=LENGTH, **options):
    keras.utils.set_random_seed(0)
    built = S4Layer(max_length, **{**SMALL, **options})
    built.build((None, None, features))
    return shake(built, 0.1)


def run(layer, x, **options):
    """The call of a layer with options that are no arrays to be traced."""
    return compiled(lambda x: layer(x, **options))(ops.convert_to_tensor(x))


def predict(model, x):
    return model.predict(x, verbose=0)


def inputs(length=LENGTH, features=4):
    return rng.normal(size=(2, length, features)).astype("float32")


@pytest.mark.parametrize(
    "options",
    [
        dict(num_ssm=2, rank=2),
        dict(dt_transform="softplus", max_length=16),
        dict(bidirectional=True),
    ],
    ids=str,
)
def test_output_is_the_equation(options):
    built, u = layer(**options), inputs()
    expected = mixer(
        to_numpy(u),
        named_weights(built),
        options.get("max_length", LENGTH),
        "dt_transform" in options,
        "bidirectional" in options,
    )
    assert_close(run(built, u), expected, 2e-5)  # the gate multiplies the rounding


@pytest.mark.parametrize("options", [dict(), dict(prenorm=False, mlp_ratio=1.5)])
def test_model_is_the_stack_of_the_equations(options):
    built, x = model(**options), inputs(features=3)
    mlp = "mlp_ratio" in options
    expected = reference(x, built, options.get("prenorm", True), mlp)
    assert_close(predict(built, x), expected, 1e-4)


def test_gradient_is_that_of_the_equation():
    built, u = layer(features=2, num_ssm=1, max_length=5), inputs(5, 2)
    by_weight, by_input = gradients(built, u, lambda y: ops.sum(ops.square(y)))
    w, u = named_weights(built), to_numpy(u)

    def value(name, z):
        return np.square(mixer(u, {**w, name: z}, 5)).sum()

    expected = numerical_gradient(lambda z: np.square(mixer(z, w, 5)).sum(), u)
    assert_close(by_input, expected, 1e-4)
    for variable, gradient in zip(built.trainable_variables, by_weight, strict=True):
        name = variable.path.removeprefix(f"{built.path}/")
        expected = numerical_gradient(lambda z, name=name: value(name, z), w[name])
        assert difference(gradient, expected) < 1e-4, name


def test_state_matrix_starts_as_hippo():
    built = S4Layer(LENGTH, state_size=8)
    built.build((None, None, 3))
    w = named_weights(built)
    frequencies = [-19.857, -5.354, -1.958, -0.428]
    assert_close(w["A_imag"], np.tile(frequencies, (3, 1)), 1e-3)
    assert_close(w["A_log"], np.full((3, 4), np.log(0.5)))
    Lambda = -np.exp(w["A_log"][0]) + 1j * w["A_imag"][0]
    P = w["P_real"][0, 0] + 1j * w["P_imag"][0, 0]
    Lambda, P = (np.concatenate([z, z.conj()]) for z in (Lambda, P))
    A, B = hippo("legs", 8)
    expected = np.linalg.eigvals(A)
    found = np.linalg.eigvals(np.diag(Lambda) - np.outer(P, P.conj()))
    # Their eigenvalues, -1 to -8, are those of a matrix that is far from normal.
    assert_close(np.sort(found.real), np.sort(expected.real), 3e-3)
    assert_close(np.linalg.norm([w["B_real"][0], w["B_imag"][0]]) ** 2, B @ B / 2)


def test_initial_weights_are_those_of_the_paper():
    keras.utils.set_random_seed(0)
    built = S4Layer(LENGTH, state_size=8, rank=2)
    built.build((None, None, 300))
    w = named_weights(built)
    dt = np.exp(w["inv_dt"])
    assert 0.001 * (1 - 1e-5) <= dt.min() < dt.max() <= 0.1 * (1 + 1e-5)
    assert abs(np.median(w["inv_dt"]) - np.log(0.01)) < 0.5
    assert abs(w["D"].std() - 1) < 0.2
    assert 0 < np.abs(w["P_real"][1]).max() < 0.1  # the second rank is small
    A, _ = dense(w, 300)
    C = outputs(w, A, LENGTH)[:, :4]
    # C̃ is rounded to float32, and I - Ā^L, which gives C back, is small.
    assert abs(C.real.std() / 0.5**0.5 - 1) < 0.1
    assert abs(C.imag.std() / 0.5**0.5 - 1) < 0.1
    keras.utils.set_random_seed(0)
    again = S4Layer(LENGTH, state_size=8, dt_transform="softplus")
    again.build((None, None, 300))
    dt = np.log1p(np.exp(to_numpy(again.inv_dt)))
    assert 0.001 * (1 - 1e-4) <= dt.min() < dt.max() <= 0.1 * (1 + 1e-4)


def test_kernel_is_the_impulse_response_of_the_step():
    built = layer()
    kernel = to_numpy(compiled(built.kernel)())
    A, B = dense(named_weights(built), 4)
    C = outputs(named_weights(built), A, LENGTH)
    impulse = np.zeros((1, LENGTH, 4))
    impulse[:, 0] = 1.0
    assert_close(kernel, recurrence(impulse, A, B, C)[0][0])
    assert_close(kernel[0], (C * B).sum(-1).real)  # K_0 = Re(C B̄)


def test_without_low_rank_it_is_s4d_by_the_bilinear_method():
    built = layer()
    for part in (built.P_real, built.P_imag):
        part.assign(np.zeros(part.shape, "float32"))
    other = S4DLayer(discretization="bilinear", learn_b=True, **SMALL)
    other.build((None, None, 4))
    w = named_weights(built)
    A, _ = dense(w, 4)
    C = outputs(w, A, LENGTH)[:, :2]
    w |= dict(C_real=C.real, C_imag=C.imag)
    for variable in other.weights:
        variable.assign(w[variable.path.removeprefix(f"{other.path}/")])
    u = inputs()
    assert_close(run(built, u), run(other, u), 2e-5)


def test_a_shifted_input_gives_a_shifted_output():
    built, x = layer(), inputs()
    shifted = np.concatenate([np.zeros_like(x[:, :3]), x[:, :-3]], axis=1)
    assert_close(run(built, shifted)[:, 3:], run(built, x)[:, :-3])


def test_the_step_is_stable_whatever_the_weights():
    built = shake(layer(rank=2), 3.0)
    A = to_numpy(compiled(lambda: dplr_system(*built.matrices(), LENGTH)[0])())
    assert np.abs(np.linalg.eigvals(A)).max() < 1 + 1e-6


def test_what_is_exported_steps_alike():
    built = layer(features=2, state_size=6)

    def system():
        return dplr_system(*built.matrices(), LENGTH)

    with export_scope("onnx"):
        exported = compiled(lambda: system())()
    for found, expected in zip(exported, compiled(system)(), strict=True):
        assert_close(found, expected, 1e-4)  # C comes from an inverse of I - Ā^L


def test_fourier_transforms_and_the_direct_sum_agree():
    x, results = inputs(), []
    for mode in ("fft", "direct"):
        built = layer(conv_mode=mode, bidirectional=True)
        by_weight, _ = gradients(built, x, lambda y: ops.sum(ops.square(y)))
        results.append((run(built, x), by_weight))
    (fft, by_weight), (direct, expected) = results
    assert_close(fft, direct, 2e-5)
    for ours, theirs in zip(by_weight, expected, strict=True):
        assert difference(ours, theirs) < 1e-4


@pytest.mark.parametrize("pool", ["last", "mean"])
def test_token_by_token_is_the_whole_sequence(pool):
    x = inputs(features=3)
    whole = model(num_ssm=2, mlp_ratio=1.0, num_layers=1)
    assert_close(stream(whole, x), predict(whole, x), 1e-4)  # FFT beside sums
    pooled = model(return_sequences=False, pool=pool, num_layers=1)
    assert_close(stream(pooled, x)[:, -1], predict(pooled, x), 1e-4)


@pytest.mark.parametrize("masked", [False, True])
def test_segments_with_the_carried_state_are_one_pass(masked):
    built, x = layer(), inputs()
    mask = None
    segment = x[:, :2]
    if masked:  # four steps of padding in the first segment
        segment = np.concatenate([segment, inputs(4)], axis=1)
        mask = ops.convert_to_tensor(np.arange(6)[None] < [[2], [2]])
    first, state = run(built, segment, mask=mask, return_state=True)
    second, state = run(built, x[:, 2:], initial_state=state, return_state=True)
    A, B = dense(named_weights(built), 4)
    _, last = recurrence(to_numpy(x), A, B, B)
    expected = np.concatenate([last[..., :2].real, last[..., :2].imag], axis=-1)
    assert_close(state, expected)
    whole = run(built, x)
    assert_close(ops.concatenate([first[:, :2], second], axis=1), whole, 5e-5)


def test_future_tokens_do_not_change_the_past():
    x = inputs(features=3)
    changed = x.copy()
    changed[:, 6:] += 1.0
    for mode, tolerance in {"fft": 1e-5, "direct": 0.0}.items():  # transforms round
        built = model(conv_mode=mode)
        before, after = predict(built, x), predict(built, changed)
        assert_close(after[:, :6], before[:, :6], tolerance)
        assert difference(after[:, 6:], before[:, 6:]) > 1e-3


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(side, bidirectional):
    x = inputs(features=3)
    valid = slice(4) if side == "right" else slice(7, None)
    mask = np.zeros((2, LENGTH), "bool")
    mask[:, valid] = True
    # Padded steps of a deeper layer are not zero: each layer has to leave them out.
    built = model(return_sequences=False, bidirectional=bidirectional)
    assert built.get_layer("pool").pool == ("mean" if bidirectional else "last")
    y = run(built, x, mask=ops.convert_to_tensor(mask))
    assert_close(y, predict(built, x[:, valid]), 2e-5)


def test_tokens_give_logits():
    tokens = np.array([[3, 1, 4, 1, 5]])
    built = model(embed_size=None, vocab_size=7, num_layers=1)
    assert predict(built, tokens).shape == (1, 5, 7)


def test_long_sequences_stay_finite():
    built = layer(features=2, state_size=2, max_length=4096)
    x = inputs(4096, 2)
    for shift in (0.0, 20.0):  # eigenvalues so fast that nothing stays
        built.A_log.assign_add(np.full((2, 1), shift, "float32"))
        assert np.isfinite(to_numpy(run(built, 100.0 * x))).all()


def test_half_precision_keeps_the_weights_and_states_of_the_recurrence():
    half, full = (layer(dtype=dtype) for dtype in ("mixed_bfloat16", "float32"))
    x = inputs()
    (y, found), (z, expected) = (run(m, x, return_state=True) for m in (half, full))
    assert keras.backend.standardize_dtype(y.dtype) == "bfloat16"
    assert keras.backend.standardize_dtype(found.dtype) == "float32"
    assert_close(found, expected, 1e-6)
    # bfloat16 keeps 8 bits, in the projection after the recurrence.
    assert difference(ops.cast(y, "float32"), z) < 0.02


def test_published_size_of_a_layer():
    options = dict(embed_size=256, hidden_size=256, state_size=64)
    with_one, with_two = (
        count_weights("s4", num_layers=n, **options)[0] for n in (1, 2)
    )
    assert with_two - with_one == 197_632 + 2 * 256  # the latter is its norm


def test_config_keeps_the_arguments():
    options = dict(
        max_length=9,
        state_size=6,
        rank=2,
        num_ssm=2,
        dt_min=0.01,
        dt_max=0.2,
        dt_transform="softplus",
        bidirectional=True,
        dropout=0.3,
        conv_mode="direct",
    )
    config = S4Layer(**options).get_config()
    assert {name: config[name] for name in options} == options


def test_what_does_not_fit_is_refused():
    for option in ("dt_transform", "conv_mode"):
        with pytest.raises(ValueError, match=f"{option} must be one of .* 'x'"):
            S4Layer(LENGTH, **{option: "x"})
    with pytest.raises(ValueError, match="state_size must be even, .* received 5"):
        S4Layer(LENGTH, state_size=5)
    with pytest.raises(ValueError, match="multiple of num_ssm, received 4 and 3"):
        layer(num_ssm=3)
    with pytest.raises(ValueError, match="max_length=11 taps, received 12 steps"):
        layer()(inputs(12))
    both = layer(bidirectional=True)
    with pytest.raises(ValueError, match="bidirectional S4Layer has no state"):
        both(inputs(3), return_state=True)
    with pytest.raises(ValueError, match="cannot run step by step"):
        both.step(inputs(3)[:, 0], both.initial_state(2))
    with pytest.raises(ValueError, match="which bidirectional=True sees"):
        keras_edifice.build("s4", vocab_size=7, bidirectional=True)
    for options in (dict(window_size=None), dict(max_length=9, window_size=10)):
        with pytest.raises(ValueError, match="max_length must be given and no small"):
            keras_edifice.build("s4", embed_size=3, **options)
