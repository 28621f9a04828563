import math

import keras
import numpy as np
import pytest
from keras import ops

import keras_edifice
from keras_edifice.ops.hippo import s4d_init
from keras_edifice.ssm.h3 import H3Layer, ShiftSSM
from tests.support.close import assert_close, difference, to_numpy
from tests.support.compiled import compiled
from tests.support.counting import count_weights
from tests.support.gradients import gradients
from tests.support.numerical import numerical_gradient
from tests.support.shaking import shake
from tests.support.streaming import stream

rng = np.random.default_rng(0)
SMALL = dict(state_size=4, shift_size=3, dt_min=0.05, dt_max=0.5)
"""Sizes, and steps so long that the state changes within a few of them."""


def named_weights(layer):
    """The weights of a layer by their names below it, in float64."""
    return {v.path.removeprefix(f"{layer.path}/"): to_numpy(v) for v in layer.weights}


def shifted(k, w):
    """The shift register of the paper, place by place."""
    register, outputs = np.zeros((len(k), *w["shift/B"].shape)), []
    for t in range(k.shape[1]):
        register = np.concatenate([0 * register[:, :1], register[:, :-1]], axis=1)
        register += w["shift/B"] * k[:, t, None]
        outputs.append((w["shift/C"] * register).sum(1) + w["shift/D"] * k[:, t])
    return np.stack(outputs, axis=1)


def mixer(x, w, head_dim=1, discretization="bilinear"):
    """The equations of the module, a loop in complex128, and the last state."""
    q, k, v = (x @ w[f"{n}_proj/kernel"] + w[f"{n}_proj/bias"] for n in "qkv")
    q, k, v = (z.reshape(*z.shape[:2], -1, head_dim) for z in (q, shifted(k, w), v))
    Lambda, dt = -np.exp(w["A_log"]) + 1j * w["A_imag"], np.exp(w["log_dt"])[:, None]
    B, C = (w[f"{name}_real"] + 1j * w[f"{name}_imag"] for name in "BC")
    if discretization == "bilinear":
        A, B = (
            (1 + dt * Lambda / 2) / (1 - dt * Lambda / 2),
            dt * B / (1 - dt * Lambda / 2),
        )
    else:
        A, B = np.exp(dt * Lambda), B * np.expm1(dt * Lambda) / Lambda
    A, B, C = (z[:, None, None] for z in (A, B, C))  # (heads, 1, 1, states)
    h, outputs = 0.0, []
    for t in range(x.shape[1]):
        kv = k[:, t, :, :, None] * v[:, t, :, None, :]
        h = A * h + B * kv[..., None]
        y = 2 * (C * h).sum(-1).real + w["D"][:, None, None] * kv
        outputs.append(np.einsum("bhk,bhkv->bhv", q[:, t], y).reshape(len(x), -1))
    y = np.stack(outputs, axis=1)
    return y @ w["out_proj/kernel"] + w["out_proj/bias"], h / B


def model(**options):
    sizes = dict(embed_size=3, hidden_size=4, num_layers=2, window_size=None, **SMALL)
    options = {"return_sequences": True, "num_heads": 2, **sizes, **options}
    keras.utils.set_random_seed(0)
    return shake(keras_edifice.build("h3", **options))


def layer(features=4, **options):
    keras.utils.set_random_seed(0)
    built = H3Layer(**{**SMALL, **options})
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
    "options", [dict(), dict(head_dim=2), dict(discretization="zoh")], ids=str
)
def test_output_is_the_equation(options):
    built, x = layer(**options), inputs()
    expected, h = mixer(to_numpy(x), named_weights(built), **options)
    y, (_, state) = run(built, x, return_state=True)
    assert_close(y, expected, 2e-5)  # the products multiply the rounding
    h = h.reshape(*state[0].shape)
    assert_close(state[0], h.real, 2e-5)
    assert_close(state[1], h.imag, 2e-5)


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

    for name in ("h3_0", "mlp_0", "h3_1", "mlp_1"):
        u, w = norm(expected, f"{name}_norm"), named_weights(built.get_layer(name))
        expected = expected + (mixer(u, w)[0] if "h3" in name else feed_forward(u, w))
    assert_close(predict(built, x), norm(expected, "final_norm"), 1e-4)


def test_gradient_is_that_of_the_equation():
    built, x = layer(features=2), inputs(5, 2)
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


def test_the_shift_delays_by_the_place_of_its_tap():
    built, x = ShiftSSM(4), inputs()
    built.build((None, None, 4))
    built.D.assign(np.zeros(4, "float32"))
    for place in range(4):
        taps = np.zeros((4, 4), "float32")
        taps[place] = 1.0
        built.C.assign(taps)
        expected = np.pad(x, [(0, 0), (place, 0), (0, 0)])[:, :11]
        assert_close(run(built, x), expected, 1e-6)


def test_initial_weights_are_those_of_the_paper():
    keras.utils.set_random_seed(0)
    built = H3Layer(state_size=8, shift_size=16, depth=4)
    built.build((None, None, 200))
    w = named_weights(built)
    Lambda, _ = s4d_init("lin", 8)
    assert_close(-np.exp(w["A_log"]), np.tile(Lambda.real, (200, 1)))
    assert_close(w["A_imag"], np.tile(Lambda.imag, (200, 1)))
    assert_close(w["B_real"] + w["B_imag"], np.ones((200, 4)), 1e-7)
    assert_close(w["shift/B"], np.eye(16)[:1].T * np.ones(200), 1e-7)
    assert 0.24 < np.abs(w["shift/C"]).max() <= 0.25  # U(±1/√taps)
    for name, deviation in {"C_real": 0.5**0.5, "D": 1.0, "shift/D": 1.0}.items():
        assert abs(w[name].std() / deviation - 1) < 0.2, name
    assert np.log(0.001) <= w["log_dt"].min() < w["log_dt"].max() <= np.log(0.1) + 1e-6
    assert abs(np.abs(w["q_proj/kernel"]).max() - 200**-0.5) < 1e-3
    assert abs(np.abs(w["out_proj/kernel"]).max() - (4 * 200) ** -0.5) < 1e-3


def test_branches_start_divided_by_the_root_of_their_number():
    keras.utils.set_random_seed(0)
    built = keras_edifice.build("h3", embed_size=9, hidden_size=64, num_layers=8)
    for name, inner in {"h3_3": "out_proj", "mlp_3": "down"}.items():
        kernel = to_numpy(getattr(built.get_layer(name), inner).kernel)
        assert abs(np.abs(kernel).max() * (16 * len(kernel)) ** 0.5 - 1) < 0.01


def test_the_state_space_of_products_does_not_depend_on_the_time():
    built, x = layer(head_dim=2), inputs()
    later = np.concatenate([np.zeros_like(x[:, :3]), x[:, :-3]], axis=1)
    mask = np.arange(11)[None].repeat(2, 0) >= 3
    found = run(built, later, mask=ops.convert_to_tensor(mask))
    assert_close(found[:, 3:], run(built, x)[:, :-3])


def test_nothing_asked_leaves_the_bias():
    built = layer()
    for weight in built.q_proj.weights:
        weight.assign(np.zeros(weight.shape, "float32"))
    expected = np.broadcast_to(to_numpy(built.out_proj.bias), (2, 11, 4))
    assert_close(run(built, inputs()), expected, 1e-6)


def test_fourier_transforms_and_the_direct_sum_agree():
    x = inputs()
    assert_close(run(layer(conv_mode="direct"), x), run(layer(), x))


@pytest.mark.parametrize("attention_layers", [[], [1]])
def test_token_by_token_is_the_whole_sequence(attention_layers):
    x = inputs(features=3)
    whole = model(attention_layers=attention_layers, head_dim=2, mlp_ratio=1.0)
    names = {z.name for z in whole.layers}
    assert ("attention_1" in names) == bool(attention_layers)
    assert ("h3_1" in names) != bool(attention_layers)
    assert_close(stream(whole, x), predict(whole, x), 5e-5)  # FFT beside sums


@pytest.mark.parametrize("masked", [False, True])
def test_segments_with_the_carried_state_are_one_pass(masked):
    built, x = layer(head_dim=2), inputs()
    segment, options = x[:, :4], {}
    if masked:
        segment = np.concatenate([segment, inputs(2)], axis=1)
        options["mask"] = ops.convert_to_tensor(np.arange(6)[None] < [[4], [4]])
    first, state = run(built, segment, return_state=True, **options)
    second, state = run(built, x[:, 4:], initial_state=state, return_state=True)
    whole, expected = run(built, x, return_state=True)
    assert_close(ops.concatenate([first[:, :4], second], axis=1), whole, 2e-5)
    flat = [keras.tree.flatten(z) for z in (state, expected)]
    for part, whole_part in zip(*flat, strict=True):
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
    built = model(return_sequences=False, attention_layers=[1])
    y = run(built, x, mask=ops.convert_to_tensor(mask))
    assert_close(y, predict(built, x[:, valid]), 2e-5)


def test_long_sequences_stay_finite():
    built, x = layer(features=2), inputs(4096, 2)
    for scale in (1.0, 1e3):
        assert np.isfinite(to_numpy(run(built, scale * x))).all()


def test_half_precision_keeps_the_state_in_float32():
    built, full = (layer(dtype=dtype) for dtype in ("mixed_bfloat16", "float32"))
    x = inputs()
    y, state = run(built, x, return_state=True)
    assert keras.backend.standardize_dtype(y.dtype) == "bfloat16"
    for part in keras.tree.flatten((state, built.initial_state(2))):
        assert keras.backend.standardize_dtype(part.dtype) == "float32"
    # bfloat16 keeps 8 bits, in four projections and three products.
    assert difference(ops.cast(y, "float32"), run(full, x)) < 0.03


def test_associative_recall_is_learned():
    def task(count):
        """Pairs of a letter and a digit, then a letter; and its digit."""
        letters = rng.permuted(np.tile(np.arange(3), (count, 1)), axis=1)
        digits, asked = rng.integers(3, 6, (count, 3)), rng.integers(0, 3, (count, 1))
        pairs = np.stack([letters, digits], axis=-1).reshape(count, -1)
        letter, digit = (np.take_along_axis(z, asked, 1) for z in (letters, digits))
        return np.concatenate([pairs, letter], axis=1), digit[:, 0]

    keras.utils.set_random_seed(0)
    built = keras_edifice.build(
        "h3",
        **dict(vocab_size=6, hidden_size=32, state_size=4, num_layers=2),
        **dict(mlp_ratio=0.0, dropout=0.0, dt_min=0.01, window_size=7),
    )
    built = keras.Model(built.inputs, built.output[:, -1])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    built.compile(keras.optimizers.Adam(0.02), loss)
    built.fit(*task(6400), batch_size=128, epochs=3, verbose=0)
    tokens, digits = task(500)
    assert (predict(built, tokens).argmax(-1) == digits).mean() > 0.95


def test_published_sizes():
    tokens = count_weights("h3", vocab_size=50_264, variant="125m")
    assert tokens == (126_139_392, 0)
    info = keras_edifice.info("h3").variants["355m"]
    assert (info["hidden_size"], info["num_layers"]) == (1024, 24)
    assert info["attention_layers"] == [1, 13]


def test_config_keeps_the_arguments():
    options = dict(
        state_size=6,
        shift_size=3,
        head_dim=2,
        init="inv",
        discretization="zoh",
        dt_min=0.01,
        dt_max=0.2,
        conv_mode="direct",
        depth=3,
    )
    config = H3Layer(**options).get_config()
    assert {name: config[name] for name in options} == options


def test_what_does_not_fit_is_refused():
    for option in ("init", "discretization", "conv_mode"):
        with pytest.raises(ValueError, match=f"{option} must be one of .* 'x'"):
            H3Layer(**{option: "x"})
    with pytest.raises(ValueError, match="state_size must be even, .* received 5"):
        H3Layer(state_size=5)
    with pytest.raises(ValueError, match="multiple of head_dim, received 4 and 3"):
        layer(head_dim=3)
    with pytest.raises(ValueError, match="must be below num_layers=4, received .4."):
        keras_edifice.build("h3", embed_size=3, attention_layers=[4])
