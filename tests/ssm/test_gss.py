import math

import keras
import numpy as np
import pytest
from keras import ops

import keras_edifice
from keras_edifice.ops.state_space import modal_kernel
from keras_edifice.ssm.gss import GSSLayer
from tests.support.close import assert_close, difference, to_numpy
from tests.support.compiled import compiled
from tests.support.counting import count_weights
from tests.support.gradients import gradients
from tests.support.numerical import numerical_gradient
from tests.support.shaking import shake
from tests.support.streaming import stream

rng = np.random.default_rng(0)


def gelu(x):
    return x * (1 + np.vectorize(math.erf)(x / np.sqrt(2))) / 2


def layer_norm(x, gamma, beta):
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    return x * gamma + beta


def poles(w, exp_imag=True):
    imag = np.exp(w["Lambda_imag"]) if exp_imag else w["Lambda_imag"]
    return -np.exp(w["Lambda_real"]) + 1j * imag


def mixer(x, w, exp_imag=True, inner_norm=True):
    """The equations of the module, a loop in complex128, and the last h."""
    Lambda, C = poles(w, exp_imag), w["C_real"] + 1j * w["C_imag"]
    u, v = gelu(x @ w["u_proj/kernel"]), gelu(x @ w["v_proj/kernel"])
    if inner_norm:
        v = layer_norm(v, w["norm/gamma"], w["norm/beta"])
    h, outputs = np.zeros((len(x), *C.shape), "complex128"), []
    for t in range(x.shape[1]):
        h = np.exp(Lambda) * h + v[:, t, :, None]
        outputs.append((C * np.expm1(Lambda) / Lambda * h).sum(-1).real)
    y = np.stack(outputs, axis=1) + w["D"] * v
    y = (y @ w["y_proj/kernel"] * u) @ w["out_proj/kernel"] + w["out_proj/bias"]
    return y, h


def named_weights(layer):
    """The weights of a layer by their names below it, in float64."""
    return {v.path.removeprefix(f"{layer.path}/"): to_numpy(v) for v in layer.weights}


def model(**options):
    sizes = dict(embed_size=3, hidden_size=4, ssm_size=2, state_size=3, num_layers=2)
    options = {**sizes, "window_size": None, "return_sequences": True, **options}
    keras.utils.set_random_seed(0)
    return shake(keras_edifice.build("gss", **options))


def layer(features=4, **options):
    keras.utils.set_random_seed(0)
    built = GSSLayer(**{"ssm_size": 2, "state_size": 3, "expand_factor": 2, **options})
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
    "options", [dict(), dict(exp_imag=False), dict(inner_norm=False)], ids=str
)
def test_output_is_the_equation(options):
    built, x = layer(**options), inputs()
    expected, state = mixer(to_numpy(x), named_weights(built), **options)
    y, (re, im) = run(built, x, return_state=True)
    assert_close(y, expected, 2e-5)  # the products multiply the rounding
    assert_close(re, state.real)
    assert_close(im, state.imag)


def test_gradient_is_that_of_the_equation():
    built, x = layer(), inputs(5)
    by_weight, by_input = gradients(built, x, lambda y: ops.sum(ops.square(y)))
    w, exact = named_weights(built), to_numpy(x)

    def value(name, z):
        return np.square(mixer(exact, {**w, name: z})[0]).sum()

    expected = numerical_gradient(lambda z: np.square(mixer(z, w)[0]).sum(), exact)
    assert difference(by_input, expected) < 1e-4
    for variable, gradient in zip(built.trainable_variables, by_weight, strict=True):
        name = variable.path.removeprefix(f"{built.path}/")
        expected = numerical_gradient(lambda z, name=name: value(name, z), w[name])
        assert difference(gradient, expected) < 1e-4, name


def test_kernel_is_that_of_the_diagonal_state_space():
    built = layer()
    w = named_weights(built)
    Lambda, C = poles(w), w["C_real"] + 1j * w["C_imag"]
    powers = np.exp(np.arange(9)[:, None, None] * Lambda)
    expected = (C * (np.exp(Lambda) - 1) / Lambda * powers).sum(-1).real
    assert_close(compiled(lambda: modal_kernel(*built.modes(), 9))(), expected)


def test_poles_are_stable_whatever_the_weights():
    built = layer()
    for scale in (-5.0, 3.0):
        built.Lambda_real.assign(np.full(3, scale, "float32"))
        assert (to_numpy(built.modes()[0][0]) < 0).all()
        assert np.isfinite(to_numpy(run(built, inputs(300)))).all()


def test_initial_weights_are_standard_normal():
    keras.utils.set_random_seed(0)
    built = GSSLayer(ssm_size=64, state_size=500)
    built.build((None, None, 8))
    for name in ("Lambda_real", "Lambda_imag", "C_real", "C_imag"):
        values = to_numpy(getattr(built, name))
        assert abs(values.mean()) < 0.15 and abs(values.std() - 1) < 0.1, name


def test_a_closed_gate_leaves_the_bias():
    built = layer()
    built.u_proj.kernel.assign(np.zeros((4, 8), "float32"))
    y = run(built, inputs())
    assert_close(y, np.broadcast_to(to_numpy(built.out_proj.bias), (2, 11, 4)), 1e-6)


def test_the_state_space_does_not_depend_on_the_time():
    built, x = layer(), inputs()
    later = np.concatenate([np.zeros_like(x[:, :3]), x[:, :-3]], axis=1)
    mask = np.arange(11)[None].repeat(2, 0) >= 3
    found = run(built, later, mask=ops.convert_to_tensor(mask))
    assert_close(found[:, 3:], run(built, x)[:, :-3])


@pytest.mark.parametrize("attention_every", [0, 1])
def test_token_by_token_is_the_whole_sequence(attention_every):
    x = inputs(features=3)
    options = dict(num_heads=2, attention_window=4, attention_every=attention_every)
    whole = model(**options)
    names = [z.name for z in whole.layers if z.name.startswith("attention")]
    assert len([n for n in names if n in ("attention_0", "attention_1")]) == (
        2 if attention_every else 0
    )
    assert_close(stream(whole, x), predict(whole, x), 2e-5)


@pytest.mark.parametrize("masked", [False, True])
def test_segments_with_the_carried_state_are_one_pass(masked):
    built, x = layer(), inputs()
    segment, options = x[:, :4], {}
    if masked:
        segment = np.concatenate([segment, inputs(2)], axis=1)
        options["mask"] = ops.convert_to_tensor(np.arange(6)[None] < [[4], [4]])
    first, state = run(built, segment, return_state=True, **options)
    second, state = run(built, x[:, 4:], initial_state=state, return_state=True)
    whole, expected = run(built, x, return_state=True)
    assert_close(ops.concatenate([first[:, :4], second], axis=1), whole, 2e-5)
    for part, whole_part in zip(state, expected, strict=True):
        assert_close(part, whole_part)


def test_future_tokens_do_not_change_the_past():
    built, x = model(), inputs(40, 3)
    changed = x.copy()
    changed[:, 20:] += 1.0
    before, after = predict(built, x), predict(built, changed)
    # Fourier transforms round relative to the whole sequence, twice before a norm.
    assert difference(after[:, :20], before[:, :20]) < 1e-4
    assert difference(after[:, 20:], before[:, 20:]) > 1e-3


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(side):
    x = inputs(features=3)
    valid = slice(4) if side == "right" else slice(7, None)
    mask = np.zeros((2, 11), "bool")
    mask[:, valid] = True
    built = model(return_sequences=False)
    y = run(built, x, mask=ops.convert_to_tensor(mask))
    assert_close(y, predict(built, x[:, valid]), 2e-5)


def test_long_sequences_stay_finite():
    built, x = layer(features=2), inputs(4096, 2)
    for scale in (1.0, 1e3):
        assert np.isfinite(to_numpy(run(built, scale * x))).all()


def test_half_precision_keeps_the_state_in_float32():
    half, full = (layer(dtype=dtype) for dtype in ("mixed_bfloat16", "float32"))
    nothing = np.zeros((2, 20, 4), "float32")
    state = rng.normal(size=(2, 2, 2, 3)).astype("float32")
    found, expected = (
        run(built, nothing, initial_state=(state[0], state[1]), return_state=True)[1]
        for built in (half, full)
    )
    # The input of the state space is zero, so that the poles alone act.
    for built in (half, full):
        assert keras.backend.standardize_dtype(built.Lambda_real.dtype) == "float32"
    for part, full_part in zip(found, expected, strict=True):
        assert keras.backend.standardize_dtype(part.dtype) == "float32"
        assert difference(part, full_part) < 0.02  # the norm's shift is in bfloat16


def test_number_of_weights():
    H, S, N = 16, 8, 5
    trainable, fixed = count_weights(
        "gss",
        **dict(embed_size=H, hidden_size=H, ssm_size=S, state_size=N, num_layers=3),
    )
    layer = 4 * H * H + H * S + S * 4 * H + 4 * H * H + H + 2 * N + 2 * S * N + S
    norms = 2 * H + 2 * S
    assert (trainable, fixed) == (3 * (layer + norms) + 2 * H, 0)


def test_config_keeps_the_arguments():
    options = dict(
        ssm_size=3,
        state_size=5,
        expand_factor=2,
        exp_imag=False,
        inner_norm=False,
        norm_eps=1e-3,
    )
    config = GSSLayer(**options).get_config()
    assert {name: config[name] for name in options} == options
