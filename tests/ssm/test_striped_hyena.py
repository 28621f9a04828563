import math

import keras
import numpy as np
import pytest
from keras import ops

import keras_edifice
from keras_edifice.blocks.grouped_query_attention import GroupedQueryAttention
from keras_edifice.ops.state_space import modal_kernel
from keras_edifice.ssm.striped_hyena import LengthNorm, ModalHyena
from tests.support.close import assert_close, difference, to_numpy
from tests.support.compiled import compiled
from tests.support.counting import count_weights
from tests.support.gradients import gradients
from tests.support.numerical import numerical_gradient
from tests.support.shaking import shake
from tests.support.streaming import stream

rng = np.random.default_rng(0)


def named_weights(layer):
    """The weights of a layer by their names below it, in float64."""
    return {v.path.removeprefix(f"{layer.path}/"): to_numpy(v) for v in layer.weights}


def system(w):
    """Poles and residues."""
    poles = np.exp(-np.log1p(np.exp(w["decay"])) + 1j * w["phase"])
    return poles, w["R_real"] + 1j * w["R_imag"]


def gates(x, w, heads):
    """x_2, x_1 and v, each head's side by side."""
    x = x @ w["in_proj/kernel"] + w["in_proj/bias"]
    taps = len(w["conv/kernel"])
    padded = np.pad(x, [(0, 0), (taps - 1, 0), (0, 0)])
    x = sum(k * padded[:, j : j + x.shape[1]] for j, k in enumerate(w["conv/kernel"]))
    parts = np.split(x + w["conv/bias"], 3 * heads, axis=-1)
    return (np.concatenate(parts[i::3], axis=-1) for i in range(3))


def mixer(x, w, heads=1):
    """The equations of the module, a loop in complex128, and the last state."""
    x2, x1, v = gates(x, w, heads)
    (poles, residues), outputs = system(w), []
    s = np.zeros((len(x), *poles.shape), "complex128")
    for t in range(x.shape[1]):
        s = poles * s + (x1 * v)[:, t, :, None]
        outputs.append((residues * s).sum(-1).real)
    y = (np.stack(outputs, axis=1) + w["D"] * x1 * v) * x2
    return y @ w["out_proj/kernel"] + w["out_proj/bias"], s


def model(**options):
    sizes = dict(embed_size=3, hidden_size=4, num_layers=2, num_heads=2, mlp_size=5)
    options = {**sizes, "window_size": None, "return_sequences": True, **options}
    keras.utils.set_random_seed(0)
    return shake(keras_edifice.build("striped_hyena", **options))


def layer(features=4, **options):
    keras.utils.set_random_seed(0)
    built = ModalHyena(**options)
    built.build((None, None, features))
    return shake(built)


def run(layer, x, **options):
    """The call of a layer with options that are no arrays to be traced."""
    return compiled(lambda x: layer(x, **options))(ops.convert_to_tensor(x))


def predict(model, x):
    return model.predict(x, verbose=0)


def inputs(length=11, features=4):
    return rng.normal(size=(2, length, features)).astype("float32")


@pytest.mark.parametrize("heads", [1, 2])
def test_the_convolution_is_the_recurrence_of_the_equation(heads):
    built, x = layer(num_heads=heads), inputs()
    expected, s = mixer(to_numpy(x), named_weights(built), heads)
    y, (_, (re, im)) = run(built, x, return_state=True)
    assert_close(y, expected, 2e-5)  # the products multiply the rounding
    assert_close(re, s.real, 2e-5)
    assert_close(im, s.imag, 2e-5)


def test_model_is_the_stack_of_the_equations():
    built, x = model(attention_every=3), inputs(features=3)
    expected = to_numpy(x) @ to_numpy(built.get_layer("embed").kernel)

    def norm(x, name):
        (gamma,) = (to_numpy(v) for v in built.get_layer(name).weights)
        length = np.linalg.norm(x, axis=-1, keepdims=True) / math.sqrt(x.shape[-1])
        return x / (length + 1e-5) * gamma

    def feed_forward(x, w):
        gate = x @ w["gate/kernel"]
        return (gate / (1 + np.exp(-gate)) * (x @ w["up/kernel"])) @ w["down/kernel"]

    for name in ("hyena_0", "mlp_0", "hyena_1", "mlp_1"):
        u, w = norm(expected, f"{name}_norm"), named_weights(built.get_layer(name))
        expected = expected + (mixer(u, w, 2)[0] if "h" in name else feed_forward(u, w))
    assert_close(predict(built, x), norm(expected, "final_norm"), 1e-4)


def test_gradient_is_that_of_the_equation():
    built, x = layer(num_heads=2), inputs(5)
    by_weight, by_input = gradients(built, x, lambda y: ops.sum(ops.square(y)))
    w, exact = named_weights(built), to_numpy(x)

    def value(name, z):
        return np.square(mixer(exact, {**w, name: z}, 2)[0]).sum()

    expected = numerical_gradient(lambda z: np.square(mixer(z, w, 2)[0]).sum(), exact)
    assert difference(by_input, expected) < 1e-4
    for variable, gradient in zip(built.trainable_variables, by_weight, strict=True):
        name = variable.path.removeprefix(f"{built.path}/")
        expected = numerical_gradient(lambda z, name=name: value(name, z), w[name])
        assert difference(gradient, expected) < 1e-4, name


def test_the_norm_adds_its_epsilon_to_the_length():
    built, x = LengthNorm(0.5), inputs()
    built.build((None, None, 4))
    length = np.sqrt(np.square(to_numpy(x)).mean(-1, keepdims=True))
    assert_close(built(x), x / (length + 0.5))
    by_weight, by_input = gradients(built, np.zeros((1, 4), "float32"), ops.sum)
    assert_close(by_input, np.full((1, 4), 2.0))  # 1/ε


def test_initial_poles_decay_over_2_to_1000_steps():
    keras.utils.set_random_seed(0)
    built = ModalHyena(state_size=4)
    built.build((None, None, 400))
    w = named_weights(built)
    poles, residues = system(w)
    steps = -np.log(np.abs(poles))
    assert 0.00099 < steps.min() < 0.0011
    assert 0.45 < steps.max() < 0.501
    assert abs(np.median(steps) / math.sqrt(0.001 * 0.5) - 1) < 0.2
    phase = np.angle(poles)
    assert 0 <= phase.min() < 0.01
    assert 0.77 < phase.max() <= math.pi / 4 + 1e-6
    for part in (residues.real, residues.imag):
        assert abs(part.std() / 0.5 - 1) < 0.1
    assert difference(residues.real, residues.imag) > 0.1
    assert not w["D"].any()


def test_poles_are_within_the_unit_circle_whatever_the_weights():
    built = layer()
    built.decay.assign(np.linspace(-15.0, 100.0, 8).reshape(4, 2))
    built.phase.assign(np.linspace(-10.0, 10.0, 8).reshape(4, 2))
    (rate, angle), _ = built.modes()
    assert (to_numpy(ops.exp(rate)) < 1).all()
    assert_close(angle, to_numpy(built.phase), 1e-6)
    assert np.isfinite(to_numpy(run(built, inputs(600)))).all()


@pytest.mark.parametrize("every", [1, 2, 3])
def test_the_last_of_every_few_blocks_is_attention(every):
    built = model(num_layers=4, attention_every=every, num_kv_heads=1)
    for i in range(4):
        kind = "attention" if (i + 1) % every == 0 else "hyena"
        cls = {"attention": GroupedQueryAttention, "hyena": ModalHyena}[kind]
        assert type(built.get_layer(f"{kind}_{i}")) is cls
        assert built.get_layer(f"mlp_{i}")


def test_one_real_pole_is_a_moving_average():
    built = layer(1, state_size=1, conv_size=1)
    w = {name: np.zeros_like(value) for name, value in named_weights(built).items()}
    w |= {"decay": [[0.0]], "R_real": [[0.5]], "out_proj/kernel": [[1.0]]}
    w |= {"in_proj/kernel": [[0.0, 0.0, 1.0]], "in_proj/bias": [1.0, 1.0, 0.0]}
    w["conv/kernel"] = [[1.0, 1.0, 1.0]]
    for variable in built.weights:
        variable.assign(w[variable.path.removeprefix(f"{built.path}/")])
    x, average, expected = inputs(features=1), 0.0, []
    for t in range(11):  # exp(-softplus(0)) is one half
        average = 0.5 * average + 0.5 * x[:, t]
        expected.append(average)
    assert_close(run(built, x), np.stack(expected, axis=1))


def test_a_closed_gate_leaves_the_bias():
    built = layer(num_heads=2)
    for weight in (*built.in_proj.weights, *built.conv.weights):
        value = to_numpy(weight).reshape(-1, 2, 3, 2)  # (.., heads, parts, features)
        value[:, :, 0] = 0.0
        weight.assign(value.reshape(weight.shape))
    expected = np.broadcast_to(to_numpy(built.out_proj.bias), (2, 11, 4))
    assert_close(run(built, inputs()), expected, 1e-6)


def test_the_filter_is_the_sum_of_powers_of_its_poles():
    built = layer()
    poles, residues = system(named_weights(built))
    expected = [(residues * poles**lag).sum(-1).real for lag in range(20)]
    assert_close(modal_kernel(*built.modes(), 20), np.stack(expected))


def test_token_by_token_is_the_whole_sequence():
    x, built = inputs(features=3), model(num_kv_heads=1)
    assert_close(stream(built, x), predict(built, x), 5e-5)  # FFT beside sums


@pytest.mark.parametrize("masked", [False, True])
def test_segments_with_the_carried_state_are_one_pass(masked):
    built, x = layer(num_heads=2), inputs()
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
        assert_close(part, whole_part, 2e-5)


def test_future_tokens_do_not_change_the_past():
    x, built = inputs(20, 3), model()
    changed = x.copy()
    changed[:, 10:] += 1.0
    before, after = predict(built, x), predict(built, changed)
    assert difference(after[:, :10], before[:, :10]) < 1e-5  # transforms round
    assert difference(after[:, 10:], before[:, 10:]) > 1e-3


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
    built, x = layer(2), inputs(4096, 2)
    for scale in (1.0, 1e3):
        assert np.isfinite(to_numpy(run(built, scale * x))).all()


def test_half_precision_keeps_the_state_in_float32():
    built, full = (layer(dtype=dtype) for dtype in ("mixed_bfloat16", "float32"))
    x = inputs()
    y, (_, state) = run(built, x, return_state=True)
    assert keras.backend.standardize_dtype(y.dtype) == "bfloat16"
    for part in (*state, *built.initial_state(2)[1], *built.modes()[0]):
        assert keras.backend.standardize_dtype(part.dtype) == "float32"
    # bfloat16 keeps 8 bits, in two projections, a convolution and two products.
    assert difference(ops.cast(y, "float32"), run(full, x)) < 0.03


def test_published_size():
    options = dict(vocab_size=32_000, variant="7b")
    assert count_weights("striped_hyena", **options) == (7_646_023_680, 0)


def test_config_keeps_the_arguments():
    options = dict(state_size=3, num_heads=2, conv_size=2)
    config = ModalHyena(**options).get_config()
    assert {name: config[name] for name in options} == options


def test_heads_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="multiple of num_heads, received 4 and 3"):
        layer(num_heads=3)
