import keras
import numpy as np
import pytest
from keras import ops

import keras_edifice
from keras_edifice.ops.linear_attention import linear_attention
from keras_edifice.recurrent.delta_net import DeltaNetLayer
from keras_edifice.recurrent.gated_delta_net import GatedDeltaNetLayer
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


def silu(x):
    return x * sigmoid(x)


def rms_norm(x, scale=1.0, epsilon=1e-5):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon) * scale


def convolved(x, kernel):
    padded = np.pad(x, [(0, 0), (len(kernel) - 1, 0), (0, 0)])
    return sum(w * padded[:, j : j + x.shape[1]] for j, w in enumerate(kernel))


def unit(x):
    return x / np.sqrt((x**2).sum(-1, keepdims=True) + 1e-6)


def mixer(x, w, heads, value_heads, largest_beta=1.0):
    """The equations of the module, a loop in float64 over the steps, and S."""
    streams = []
    for name, count in zip("qkv", (heads, heads, value_heads), strict=True):
        z = x @ w[f"{name}_proj/kernel"]
        if f"{name}_conv/kernel" in w:
            z = convolved(z, w[f"{name}_conv/kernel"])
        streams.append(silu(z).reshape(*x.shape[:2], count, -1))
    q, k, v = streams
    q, k = unit(q) * q.shape[-1] ** -0.5, unit(k)
    q, k = (z.repeat(value_heads // heads, axis=2) for z in (q, k))
    beta = largest_beta * sigmoid(x @ w["b_proj/kernel"])
    dt = np.log1p(np.exp(x @ w["a_proj/kernel"] + w["dt_bias"]))
    alpha = np.exp(-np.exp(w["A_log"]) * dt)
    S, outputs = np.zeros((len(x), value_heads, k.shape[-1], v.shape[-1])), []
    for t in range(x.shape[1]):
        S = alpha[:, t, :, None, None] * S
        error = v[:, t] - np.einsum("bhkv,bhk->bhv", S, k[:, t])
        S = S + np.einsum("bh,bhk,bhv->bhkv", beta[:, t], k[:, t], error)
        outputs.append(np.einsum("bhkv,bhk->bhv", S, q[:, t]))
    o = rms_norm(np.stack(outputs, axis=1), w["o_norm/gamma"])
    o = o.reshape(*x.shape[:2], -1)
    if "g_proj/kernel" in w:
        o = o * silu(x @ w["g_proj/kernel"])
    return o @ w["o_proj/kernel"], S


def feed_forward(x, w):
    return (silu(x @ w["gate/kernel"]) * (x @ w["up/kernel"])) @ w["down/kernel"]


def named_weights(layer):
    """The weights of a layer by their names below it, in float64."""
    return {v.path.removeprefix(f"{layer.path}/"): to_numpy(v) for v in layer.weights}


def reference(x, model, value_heads=2, **options):
    """The whole model on (batch, time, features), from its weights."""
    x = np.asarray(x, "float64") @ to_numpy(model.get_layer("embed").kernel)

    def branch(name, function):
        gamma = to_numpy(model.get_layer(f"{name}_norm").gamma)
        return function(rms_norm(x, gamma), named_weights(model.get_layer(name)))

    for i in range(2):
        x = x + branch(
            f"gated_delta_net_{i}",
            lambda x, w: mixer(x, w, 2, value_heads, **options)[0],
        )
        x = x + branch(f"ffn_{i}", feed_forward)
    return rms_norm(x, to_numpy(model.get_layer("final_norm").gamma))


def model(**options):
    sizes = dict(embed_size=3, hidden_size=4, num_heads=2, head_dim=3, expand_v=1.0)
    sizes |= dict(num_layers=2, chunk_size=4, window_size=None, return_sequences=True)
    keras.utils.set_random_seed(0)
    return shake(keras_edifice.build("gated_delta_net", **{**sizes, **options}))


def layer(features=4, **options):
    options = {"num_heads": 2, "head_dim": 3, "chunk_size": 4, **options}
    keras.utils.set_random_seed(0)
    built = GatedDeltaNetLayer(**options)
    built.build((None, None, features))
    return shake(built)


def set_decay(built, decay):
    """The same α at every step: softplus(dt_bias) is one."""
    kernel = built.a_proj.kernel
    kernel.assign(np.zeros(kernel.shape))
    built.dt_bias.assign(np.full(built.dt_bias.shape, np.log(np.e - 1)))
    with np.errstate(divide="ignore"):
        built.A_log.assign(np.full(built.A_log.shape, np.log(-np.log(decay))))


def run(layer, x, **options):
    """The call of a layer with options that are no arrays to be traced."""
    return compiled(lambda x: layer(x, **options))(ops.convert_to_tensor(x))


def predict(model, x):
    return model.predict(x, verbose=0)


def inputs(length=11, features=3):
    return rng.normal(size=(2, length, features)).astype("float32")


@pytest.mark.parametrize(
    ("options", "in_reference"),
    [
        ({}, {}),
        ({"num_v_heads": 4}, {"value_heads": 4}),
        ({"use_gate": False, "conv_size": 0}, {}),
        ({"allow_neg_eigval": True, "expand_v": 5 / 3}, {"largest_beta": 2.0}),
    ],
    ids=["default", "grouped", "bare", "negative"],
)
def test_output_is_the_equation(options, in_reference):
    built, x = model(**options), inputs()
    assert_close(predict(built, x), reference(x, built, **in_reference), 1e-4)


def test_gradient_is_that_of_the_equation():
    built, x = model(num_v_heads=4), inputs(5)
    by_weight, by_input = gradients(built, x, lambda y: ops.sum(ops.square(y)))

    def value(z):
        return np.square(reference(z, built, 4)).sum()

    assert_close(by_input, numerical_gradient(value, x), 1e-4)
    for variable, gradient in zip(built.trainable_variables, by_weight, strict=True):
        assert np.abs(gradient).max() > 0, f"{variable.path} does not learn"


def test_initial_weights_are_those_of_the_paper():
    keras.utils.set_random_seed(0)
    built = GatedDeltaNetLayer(num_heads=512, head_dim=1)
    built.build((None, None, 8))
    weights = named_weights(built)
    dt = np.log1p(np.exp(weights["dt_bias"]))
    assert 0.001 * (1 - 1e-4) <= dt.min() < 0.0015
    assert 0.07 < dt.max() <= 0.1 * (1 + 1e-4)
    assert abs(np.median(np.log(dt)) - np.log(0.01)) < 0.5  # uniform in the logarithm
    rate = np.exp(weights["A_log"])
    assert 0.01 * (1 - 1e-5) <= rate.min() < 0.5
    assert 15.5 < rate.max() <= 16 * (1 + 1e-5)
    assert abs(rate.mean() - 8) < 1
    for name, value in weights.items():
        if name.endswith("proj/kernel"):
            assert abs(value.std() - 0.02) < 0.002, name


def test_initial_decays_follow_their_options():
    options = dict(dt_min=1e-6, dt_max=0.5, dt_init_floor=0.01, a_init_range=[2, 3])
    built = GatedDeltaNetLayer(num_heads=64, head_dim=1, **options)
    built.build((None, None, 8))
    dt = np.log1p(np.exp(to_numpy(built.dt_bias)))
    assert_close(dt.min(), 0.01)
    assert 0.1 < dt.max() <= 0.5 * (1 + 1e-5)
    rate = np.exp(to_numpy(built.A_log))
    assert 2 * (1 - 1e-5) <= rate.min() < rate.max() <= 3 * (1 + 1e-5)
    fixed = GatedDeltaNetLayer(num_heads=2, head_dim=1, a_init_range=[0, 0])
    fixed.build((None, None, 8))
    assert_close(np.exp(to_numpy(fixed.A_log)), [0.01, 0.01])


def test_widths_of_keys_and_values():
    default = GatedDeltaNetLayer(num_heads=6)
    default.build((None, None, 16))
    assert (default.key_size, default.value_size) == (2, 4)
    weights = named_weights(layer(num_v_heads=4))
    assert weights["q_proj/kernel"].shape == weights["k_proj/kernel"].shape == (4, 6)
    assert weights["v_proj/kernel"].shape == (4, 24)
    assert weights["a_proj/kernel"].shape == weights["b_proj/kernel"].shape == (4, 4)
    assert weights["o_norm/gamma"].shape == (6,)


def test_without_decay_it_is_the_delta_net():
    x = inputs(11, 4)
    gated = layer(head_dim=2, expand_v=1.0, norm_eps=1e-6)
    set_decay(gated, 1.0)
    plain = DeltaNetLayer(2, use_gate=True, chunk_size=4)
    plain.build((None, None, 4))
    weights = named_weights(gated)
    for variable in plain.weights:
        variable.assign(weights[variable.path.removeprefix(f"{plain.path}/")])
    assert_close(run(gated, x), run(plain, x), 1e-6)


def test_without_writing_the_state_only_decays():
    gated, x = layer(conv_size=0), np.ones((2, 5, 4), "float32")
    set_decay(gated, 0.7)
    gated.b_proj.kernel.assign(np.full((4, 2), -100.0))
    S = rng.normal(size=(2, 2, 3, 6)).astype("float32")
    state = ((), ops.convert_to_tensor(S))
    _, (_, last) = run(gated, x, initial_state=state, return_state=True)
    assert_close(last, 0.7**5 * S)


def test_total_decay_leaves_the_present_token_alone():
    gated, x = layer(conv_size=0), inputs(6, 4)
    set_decay(gated, 1e-30)
    alone = run(gated, x.reshape(12, 1, 4))
    assert_close(run(gated, x), ops.reshape(alone, (2, 6, 4)))


def test_orthogonal_keys_make_it_linear_attention_with_decay():
    gated, x = layer(head_dim=4, num_heads=1, conv_size=0), np.eye(4)[None]
    gated.k_proj.kernel.assign(40 * np.eye(4))  # SiLU of it is the same
    x = ops.convert_to_tensor(x.astype("float32"))

    def without_subtraction(x):
        q, k, v = gated._heads(*gated._projected(x))
        beta, log_decay = gated._gates(x)
        v = v * ops.expand_dims(beta, -1)
        y, S = linear_attention(q, k, v, log_decay, return_state=True)
        return gated._output(y, x), S

    expected, expected_S = compiled(without_subtraction)(x)
    y, (_, S) = run(gated, x, return_state=True)
    assert_close(S, expected_S)
    assert_close(y, expected)


@pytest.mark.parametrize("chunk_size", [1, 2, 64])
def test_chunks_change_nothing(chunk_size):
    x = inputs(21, 4)
    y, (_, S) = run(layer(chunk_size=chunk_size), x, return_state=True)
    expected, expected_S = mixer(x, named_weights(layer()), 2, 2)
    assert_close(y, expected)
    assert_close(S, expected_S)


def test_token_by_token_is_the_whole_sequence():
    x, whole = inputs(), model(num_v_heads=4)
    assert_close(stream(whole, x), predict(whole, x))


def test_segments_with_the_carried_state_are_one_pass():
    mixed, x = layer(num_v_heads=4), inputs(11, 4)
    first, state = run(mixed, x[:, :2], return_state=True)
    second, state = run(mixed, x[:, 2:], initial_state=state, return_state=True)
    whole, expected = run(mixed, x, return_state=True)
    assert_close(ops.concatenate([first, second], axis=1), whole)
    parts = zip(keras.tree.flatten(state), keras.tree.flatten(expected), strict=True)
    for part, whole_part in parts:
        assert_close(part, whole_part)


def test_future_tokens_do_not_change_the_past():
    built, x = model(), inputs(20)
    changed = x.copy()
    changed[:, 10:] += 1.0
    before, after = predict(built, x), predict(built, changed)
    assert_close(after[:, :10], before[:, :10], 1e-6)
    assert difference(after[:, 10:], before[:, 10:]) > 1e-3


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(side):
    x = inputs()
    valid = slice(4) if side == "right" else slice(7, None)
    mask = np.zeros((2, 11), "bool")
    mask[:, valid] = True
    built = model(return_sequences=False, pool="last")
    y = run(built, x, mask=ops.convert_to_tensor(mask))
    assert_close(y, predict(built, x[:, valid]))


def test_masked_steps_leave_the_state():
    mixed, x = layer(), inputs(11, 4)
    mask = np.arange(11)[None] < np.array([[5], [2]])
    _, state = run(mixed, x, mask=mask, return_state=True)
    for row, length in enumerate((5, 2)):
        _, expected = run(mixed, x[row : row + 1, :length], return_state=True)
        parts = keras.tree.flatten(state), keras.tree.flatten(expected)
        for part, short in zip(*parts, strict=True):
            assert_close(part[row : row + 1], short)


def test_long_sequences_stay_finite():
    mixed, x = layer(allow_neg_eigval=True, chunk_size=64), inputs(4096, 4)
    for scale in (1.0, 1e3):
        assert np.isfinite(to_numpy(run(mixed, scale * x))).all()


def test_half_precision_streams_with_a_state_in_float32():
    mixed, x = layer(dtype="mixed_bfloat16"), inputs(5, 4)
    state = mixed.initial_state(2)
    assert keras.backend.standardize_dtype(state[1].dtype) == "float32"
    _, log_decay = mixed._gates(x)
    assert keras.backend.standardize_dtype(log_decay.dtype) == "float32"
    step, outputs = compiled(mixed.step), []
    for t in range(5):
        y, state = step(ops.convert_to_tensor(x[:, t]), state)
        outputs.append(ops.cast(y, "float32"))
    assert keras.backend.standardize_dtype(state[1].dtype) == "float32"
    # bfloat16 keeps 8 bits, in the projections around the recurrence.
    whole = ops.cast(run(mixed, x), "float32")
    assert difference(ops.stack(outputs, axis=1), whole) < 0.02


def test_published_size():
    weights = count_weights("gated_delta_net", variant="1.3b", vocab_size=32_000)
    assert weights == (1_387_348_732, 0)


def test_config_keeps_the_arguments():
    options = dict(
        num_heads=3,
        head_dim=5,
        expand_v=2.4,
        num_v_heads=6,
        conv_size=2,
        qk_activation="elu",
        qk_norm="sum",
        use_gate=False,
        allow_neg_eigval=True,
        dt_min=0.01,
        dt_max=0.2,
        dt_init_floor=1e-3,
        a_init_range=[1.0, 2.0],
        chunk_size=8,
        norm_eps=1e-3,
    )
    config = GatedDeltaNetLayer(**options).get_config()
    assert {name: config[name] for name in options} == options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_v_heads": 3}, "num_v_heads must be a multiple of num_heads, received 3"),
        ({"a_init_range": [2.0, 1.0]}, "a_init_range must be two numbers"),
        ({"a_init_range": [2.0]}, "a_init_range must be two numbers"),
        ({"head_dim": None}, r"head_dim = 3/4 \* 4 / 2 must be a whole number"),
        ({"expand_v": 1.5}, r"expand_v \* 3 must be a whole number .*, received 4.5"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        layer(**options)
