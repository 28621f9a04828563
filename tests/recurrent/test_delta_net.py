import keras
import numpy as np
import pytest
from keras import ops

import keras_edifice
from keras_edifice.recurrent.delta_net import DeltaNetLayer
from tests.support.close import assert_close, difference, to_numpy
from tests.support.compiled import compiled
from tests.support.counting import count_weights
from tests.support.gradients import gradients
from tests.support.numerical import numerical_gradient
from tests.support.shaking import shake
from tests.support.streaming import stream

rng = np.random.default_rng(0)
FEATURE_MAPS = {
    "silu": lambda x: silu(x),
    "relu": lambda x: np.maximum(x, 0),
    "elu": lambda x: np.where(x > 0, x + 1, np.exp(np.minimum(x, 0))),
    "identity": lambda x: x,
}


def silu(x):
    return x * sigmoid(x)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def rms_norm(x, scale=1.0, epsilon=1e-6):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon) * scale


def convolved(x, kernel):
    padded = np.pad(x, [(0, 0), (len(kernel) - 1, 0), (0, 0)])
    return sum(w * padded[:, j : j + x.shape[1]] for j, w in enumerate(kernel))


def normalised(x, norm):
    if norm == "sum":
        return x / (x.sum(-1, keepdims=True) + 1e-6)
    return x / np.sqrt((x**2).sum(-1, keepdims=True) + 1e-6)


def mixer(x, w, heads, activation="silu", norm="l2", largest_beta=1.0):
    """The equations of the module, a loop in float64 over the steps, and S."""
    streams = []
    for name in "qkv":
        z = x @ w[f"{name}_proj/kernel"]
        if f"{name}_conv/kernel" in w:
            z = convolved(z, w[f"{name}_conv/kernel"])
        phi = FEATURE_MAPS[activation] if name in "qk" else silu
        streams.append(phi(z.reshape(*x.shape[:2], heads, -1)))
    q, k, v = streams
    q, k = normalised(q, norm) * q.shape[-1] ** -0.5, normalised(k, norm)
    beta = largest_beta * sigmoid(x @ w["b_proj/kernel"])
    S, outputs = np.zeros((len(x), heads, k.shape[-1], v.shape[-1])), []
    for t in range(x.shape[1]):
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


def reference(x, model, **options):
    """The whole model on (batch, time, features), from its weights."""
    x = np.asarray(x, "float64") @ to_numpy(model.get_layer("embed").kernel)
    names = {layer.name for layer in model.layers}

    def branch(name, function):
        gamma = to_numpy(model.get_layer(f"{name}_norm").gamma)
        return function(rms_norm(x, gamma), named_weights(model.get_layer(name)))

    for i in range(2):
        x = x + branch(f"delta_net_{i}", lambda x, w: mixer(x, w, 2, **options)[0])
        if f"ffn_{i}" in names:
            x = x + branch(f"ffn_{i}", feed_forward)
    return rms_norm(x, to_numpy(model.get_layer("final_norm").gamma))


def model(**options):
    sizes = dict(embed_size=3, hidden_size=4, num_heads=2, num_layers=2, chunk_size=4)
    options = {**sizes, "window_size": None, "return_sequences": True, **options}
    keras.utils.set_random_seed(0)
    return shake(keras_edifice.build("delta_net", **options))


def layer(features=4, **options):
    keras.utils.set_random_seed(0)
    built = DeltaNetLayer(**{"num_heads": 2, "chunk_size": 4, **options})
    built.build((None, None, features))
    return shake(built)


def plain_layer(features=4, **options):
    """One head without convolution whose keys are its inputs, and β = 1.

    The large epsilon lets the output's norm keep the scale of what it is given.
    """
    options = {"conv_size": 0, "qk_activation": "identity", "norm_eps": 1.0, **options}
    built = layer(features, num_heads=1, **options)
    built.q_proj.kernel.assign(np.eye(features))
    built.k_proj.kernel.assign(np.eye(features))
    built.o_proj.kernel.assign(np.eye(features))
    built.b_proj.kernel.assign(np.full((features, 1), 100.0))
    return built


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
        ({"expand_k": 0.5, "expand_v": 1.5, "mlp_ratio": 0.0}, {}),
        ({"use_gate": True, "allow_neg_eigval": True}, {"largest_beta": 2.0}),
        (
            {"qk_activation": "elu", "qk_norm": "sum", "conv_size": 0},
            {"activation": "elu", "norm": "sum"},
        ),
        (
            {"qk_activation": "relu", "qk_norm": "sum"},
            {"activation": "relu", "norm": "sum"},
        ),
        ({"qk_activation": "identity"}, {"activation": "identity"}),
    ],
    ids=["default", "widths", "gate", "elu", "relu", "identity"],
)
def test_output_is_the_equation(options, in_reference):
    built, x = model(**options), inputs()
    assert_close(predict(built, x), reference(x, built, **in_reference), 1e-4)


def test_gradient_is_that_of_the_equation():
    built, x = model(use_gate=True), inputs(5)
    by_weight, by_input = gradients(built, x, lambda y: ops.sum(ops.square(y)))

    def value(z):
        return np.square(reference(z, built)).sum()

    assert_close(by_input, numerical_gradient(value, x), 1e-4)
    for variable, gradient in zip(built.trainable_variables, by_weight, strict=True):
        assert np.abs(gradient).max() > 0, f"{variable.path} does not learn"


def test_initial_weights_are_those_of_the_paper():
    keras.utils.set_random_seed(0)
    built = keras_edifice.build(
        "delta_net", embed_size=64, hidden_size=64, num_layers=1, use_gate=True
    )
    for variable in built.weights:
        value = to_numpy(variable)
        if variable.name == "gamma":
            assert_close(value, np.ones_like(value), 0)
        elif "conv" in variable.path:
            assert 0.45 < np.abs(value).max() <= 0.5
        elif "seed_generator" not in variable.path:
            assert variable.name == "kernel", f"{variable.path} should not be"
            assert abs(value.std() - 0.02) < 0.002, variable.path


def test_heads_have_one_beta_each_and_share_the_scale_of_the_output():
    weights = named_weights(layer(expand_v=1.5))
    assert weights["b_proj/kernel"].shape == (4, 2)
    assert weights["o_norm/gamma"].shape == (3,)
    assert {name for name in weights if name.endswith("conv/kernel")} == {
        "q_conv/kernel",
        "k_conv/kernel",
        "v_conv/kernel",
    }
    assert not any("bias" in name for name in weights)


def test_width_of_the_feed_forward():
    for hidden, ratio, width in ((4, 4.0, 16), (256, 4.0, 768), (256, 3.0, 512)):
        built = keras_edifice.build(
            "delta_net",
            **dict(embed_size=2, hidden_size=hidden, mlp_ratio=ratio, num_layers=1),
        )
        assert built.get_layer("ffn_0").width == width


@pytest.mark.parametrize("chunk_size", [1, 2, 64])
def test_chunks_change_nothing(chunk_size):
    x = inputs(21, 4)
    y, (_, S) = run(layer(chunk_size=chunk_size), x, return_state=True)
    expected, expected_S = mixer(x, named_weights(layer()), 2)
    assert_close(y, expected)
    assert_close(S, expected_S)


@pytest.mark.parametrize("conv_size", [0, 4])
def test_token_by_token_is_the_whole_sequence(conv_size):
    x = inputs()
    whole = model(conv_size=conv_size, use_gate=True)
    assert_close(stream(whole, x), predict(whole, x))


@pytest.mark.parametrize("conv_size", [0, 4])
def test_segments_with_the_carried_state_are_one_pass(conv_size):
    mixed, x = layer(conv_size=conv_size), inputs(11, 4)
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


def test_a_written_value_is_read_and_replaced():
    mixed = plain_layer()
    x = np.array([[[1.0, 2, 3, 1], [3.0, 1, -1, 2], [1.0, 2, 3, 1]]]) / 2
    v = silu(x @ to_numpy(mixed.v_proj.kernel))
    gamma = to_numpy(mixed.o_norm.gamma)
    y = run(mixed, x.astype("float32"))
    for t in range(3):  # each token asks for what it has just written itself
        assert_close(y[:, t], rms_norm(v[:, t] * 4**-0.5, gamma, 1.0))
    first = x[:, :1].astype("float32")
    _, state = run(mixed, first, return_state=True)
    key = x[:, 0] / np.linalg.norm(x[:, 0])
    assert_close(np.einsum("bk,bhkv->bv", key, to_numpy(state[1])), v[:, 0])
    mixed.v_proj.kernel.assign(-2 * mixed.v_proj.kernel)
    v = silu(first @ to_numpy(mixed.v_proj.kernel))
    _, (_, S) = run(mixed, first, initial_state=state, return_state=True)
    assert_close(np.einsum("bk,bhkv->bv", key, to_numpy(S)), v[:, 0])


def test_orthonormal_keys_make_it_linear_attention():
    mixed, x = plain_layer(), np.eye(4)[None, [2, 0, 3, 1]]
    _, (_, S) = run(mixed, x.astype("float32"), return_state=True)
    v = silu(x @ to_numpy(mixed.v_proj.kernel))
    assert_close(S[:, 0], np.einsum("btk,btv->bkv", x, v))


@pytest.mark.parametrize("allow_neg_eigval", [False, True])
def test_a_step_shrinks_its_key_alone(allow_neg_eigval):
    mixed = plain_layer(allow_neg_eigval=allow_neg_eigval)
    mixed.b_proj.kernel.assign(np.full((4, 1), 0.5))
    x = inputs(1, 4)[:1, 0]
    zero = np.zeros((1, 1, 4, 4), "float32")
    _, (_, moved) = mixed.step(x, ((), ops.convert_to_tensor(zero + np.eye(4))))
    _, (_, written) = mixed.step(x, ((), ops.convert_to_tensor(zero)))
    transition = to_numpy(moved - written)[0, 0]
    beta = sigmoid(0.5 * x.sum()) * (1 + allow_neg_eigval)
    found = np.linalg.eigvalsh(transition)
    assert_close(np.sort(found), np.sort([1 - beta, 1, 1, 1]))


def test_long_sequences_stay_finite():
    mixed, x = layer(allow_neg_eigval=True, chunk_size=64), inputs(4096, 4)
    for scale in (1.0, 1e3):
        assert np.isfinite(to_numpy(run(mixed, scale * x))).all()


def test_half_precision_streams_with_a_state_in_float32():
    mixed, x = layer(dtype="mixed_bfloat16", use_gate=True), inputs(5, 4)
    state = mixed.initial_state(2)
    assert keras.backend.standardize_dtype(state[1].dtype) == "float32"
    step, outputs = compiled(mixed.step), []
    for t in range(5):
        y, state = step(ops.convert_to_tensor(x[:, t]), state)
        outputs.append(ops.cast(y, "float32"))
    assert keras.backend.standardize_dtype(state[1].dtype) == "float32"
    # bfloat16 keeps 8 bits, in the projections around the recurrence.
    whole = ops.cast(run(mixed, x), "float32")
    assert difference(ops.stack(outputs, axis=1), whole) < 0.02


def test_published_size():
    weights = count_weights("delta_net", variant="1.3b", vocab_size=32_000)
    assert weights == (1_365_677_056, 0)


def test_config_keeps_the_arguments():
    options = dict(
        num_heads=3,
        expand_k=0.5,
        expand_v=2.0,
        conv_size=2,
        qk_activation="elu",
        qk_norm="sum",
        use_gate=True,
        allow_neg_eigval=True,
        chunk_size=8,
        norm_eps=1e-3,
    )
    config = DeltaNetLayer(**options).get_config()
    assert {name: config[name] for name in options} == options


@pytest.mark.parametrize("option", ["qk_activation", "qk_norm"])
def test_unknown_choices_are_refused(option):
    with pytest.raises(ValueError, match=f"{option} must be one of .*, received 'x'"):
        DeltaNetLayer(**{option: "x"})


@pytest.mark.parametrize("activation", ["silu", "identity"])
def test_sums_of_features_that_may_be_negative_are_refused(activation):
    with pytest.raises(ValueError, match="qk_norm='sum' needs features that are not"):
        DeltaNetLayer(qk_norm="sum", qk_activation=activation)


@pytest.mark.parametrize("option", ["expand_k", "expand_v"])
def test_widths_that_the_heads_do_not_divide_are_refused(option):
    message = f"{option} \\* 4 / 2 must be a whole number .*, received 1.5; change"
    with pytest.raises(ValueError, match=message):
        layer(**{option: 0.75})
