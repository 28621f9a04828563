import keras
import numpy as np
import pytest
from keras import ops

import keras_edifice
from keras_edifice.ssm.gated_ssm import GatedSSMBlock
from keras_edifice.ssm.mamba import MambaBlock
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


def convolved(x, kernel, bias):
    padded = np.pad(x, [(0, 0), (len(kernel) - 1, 0), (0, 0)])
    return bias + sum(w * padded[:, j : j + x.shape[1]] for j, w in enumerate(kernel))


def mixer(u, w, unit_bc=False):
    """The gates of the module, a loop in float64 over the steps, and all h."""
    x, z = np.split(u @ w["in_proj/kernel"], 2, axis=-1)
    x = silu(convolved(x, w["conv/kernel"], w["conv/bias"]))
    rank, size = w["dt_proj/kernel"].shape[0], w["A_log"].shape[1]
    selected = x @ w["x_proj/kernel"]
    g = sigmoid(selected[..., :rank] @ w["dt_proj/kernel"] + w["dt_bias"])
    B = C = np.ones((*x.shape[:2], size))
    if not unit_bc:
        B, C = np.split(selected[..., rank:], 2, axis=-1)
    r, h, states = np.exp(w["A_log"]), 0.0, []
    for t in range(u.shape[1]):
        kept = (1 - g[:, t, :, None]) ** r
        h = kept * h + (1 - kept) / r * B[:, t, None] * x[:, t, :, None]
        states.append(h)
    states = np.stack(states, axis=1)
    y = (states * C[:, :, None]).sum(-1) + w["D"] * x
    return (y * silu(z)) @ w["out_proj/kernel"], states


def named_weights(layer):
    """The weights of a layer by their names below it, in float64."""
    return {v.path.removeprefix(f"{layer.path}/"): to_numpy(v) for v in layer.weights}


def model(**options):
    sizes = dict(embed_size=3, hidden_size=4, state_size=3, window_size=None)
    keras.utils.set_random_seed(0)
    options = {**sizes, "return_sequences": True, **options}
    return shake(keras_edifice.build("gated_ssm", **options))


def block(features=4, **options):
    keras.utils.set_random_seed(0)
    built = GatedSSMBlock(**{"state_size": 3, **options})
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
    "options", [dict(), dict(learn_rates=True), dict(unit_bc=True)], ids=str
)
def test_output_is_the_equation(options):
    built, x = block(**options), inputs()
    unit_bc = options.get("unit_bc", False)
    expected, states = mixer(to_numpy(x), named_weights(built), unit_bc)
    y, (_, h) = run(built, x, return_state=True)
    assert_close(y, expected)
    assert_close(h, states[:, -1])


def test_gradient_is_that_of_the_equation():
    built, x = block(learn_rates=True), inputs(5)
    by_weight, by_input = gradients(built, x, lambda y: ops.sum(ops.square(y)))
    w = named_weights(built)

    def value(name, z):
        return np.square(mixer(to_numpy(x), {**w, name: z})[0]).sum()

    expected = numerical_gradient(
        lambda z: np.square(mixer(z, w)[0]).sum(), to_numpy(x)
    )
    assert_close(by_input, expected, 1e-4)
    for variable, gradient in zip(built.trainable_variables, by_weight, strict=True):
        name = variable.path.removeprefix(f"{built.path}/")
        expected = numerical_gradient(lambda z, name=name: value(name, z), w[name])
        assert difference(gradient, expected) < 1e-4, name


def test_one_state_without_selection_is_the_gate_of_theorem_1():
    built, x = block(state_size=1, unit_bc=True), inputs()
    w = named_weights(built)
    u = silu(
        convolved(
            np.split(x @ w["in_proj/kernel"], 2, axis=-1)[0],
            w["conv/kernel"],
            w["conv/bias"],
        )
    )
    g = sigmoid(u @ w["x_proj/kernel"] @ w["dt_proj/kernel"] + w["dt_bias"])
    h = 0.0
    for t in range(11):
        h = (1 - g[:, t]) * h + g[:, t] * u[:, t]
    _, (_, found) = run(built, x, return_state=True)
    assert_close(found[..., 0], h)


def test_it_is_mamba_by_the_zero_order_hold_with_fixed_rates():
    built, x = block(), inputs()
    mamba = MambaBlock(state_size=3, discretization="zoh")
    mamba.build((None, None, 4))
    ours = named_weights(built)
    for variable in mamba.weights:
        variable.assign(ours[variable.path.removeprefix(f"{mamba.path}/")])
    assert_close(built.A_log.numpy(), np.log([[1.0, 2.0, 3.0]] * 8), 1e-6)
    assert_close(run(built, x), run(mamba, x), 1e-6)


def test_states_stay_below_their_largest_input():
    built = block(unit_bc=True)
    x = 10.0 * inputs(40)
    w = named_weights(built)
    _, states = mixer(to_numpy(x), w, unit_bc=True)
    u = np.split(x @ w["in_proj/kernel"], 2, axis=-1)[0]
    u = silu(convolved(u, w["conv/kernel"], w["conv/bias"]))
    bound = np.abs(u).max(axis=1)[..., None] / np.arange(1.0, 4.0)
    _, (_, h) = run(built, x, return_state=True)
    assert_close(h, states[:, -1], 1e-4)
    assert (np.abs(to_numpy(h)) <= bound + 1e-4).all()


def test_open_gates_forget_and_closed_gates_hold():
    built, x = block(), inputs()
    _, start = run(built, inputs(), return_state=True)
    for bias, kept in ((-60.0, 1.0), (60.0, 0.0)):
        built.dt_proj.kernel.assign(np.zeros((1, 8)))
        built.dt_bias.assign(np.full(8, bias))
        _, (_, h) = run(built, x, initial_state=start, return_state=True)
        _, (_, fresh) = run(
            built, x, initial_state=(start[0], 0 * start[1]), return_state=True
        )
        assert_close(h - fresh, kept * start[1])


def test_gates_start_where_the_step_sizes_of_mamba_do():
    keras.utils.set_random_seed(0)
    built = GatedSSMBlock()
    built.build((None, None, 64))
    gates = sigmoid(to_numpy(built.dt_bias))
    assert 0.0009 < gates.min() < 0.002 and 0.05 < gates.max() < 0.1


def test_rates_are_learned_if_asked():
    for learn_rates in (False, True):
        built = block(learn_rates=learn_rates)
        names = {v.name for v in built.trainable_variables}
        assert ("A_log" in names) == learn_rates


def test_token_by_token_is_the_whole_sequence():
    whole, x = model(), inputs(features=3)
    assert_close(stream(whole, x), predict(whole, x))


def test_segments_with_the_carried_state_are_one_pass():
    built, x = block(unit_bc=True), inputs()
    first, state = run(built, x[:, :2], return_state=True)
    second, state = run(built, x[:, 2:], initial_state=state, return_state=True)
    whole, expected = run(built, x, return_state=True)
    assert_close(ops.concatenate([first, second], axis=1), whole)
    for part, whole_part in zip(state, expected, strict=True):
        assert_close(part, whole_part)


def test_future_tokens_do_not_change_the_past():
    built, x = model(), inputs(40, 3)
    changed = x.copy()
    changed[:, 20:] += 1.0
    before, after = predict(built, x), predict(built, changed)
    assert_close(after[:, :20], before[:, :20], 1e-6)
    assert difference(after[:, 20:], before[:, 20:]) > 1e-3


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(side):
    x = inputs(features=3)
    valid = slice(4) if side == "right" else slice(7, None)
    mask = np.zeros((2, 11), "bool")
    mask[:, valid] = True
    built = model(return_sequences=False)
    y = run(built, x, mask=ops.convert_to_tensor(mask))
    assert_close(y, predict(built, x[:, valid]))


def test_long_sequences_stay_finite():
    built, x = block(features=2, state_size=2), inputs(4096, 2)
    for scale in (1.0, 1e3):
        assert np.isfinite(to_numpy(run(built, scale * x))).all()


def test_size_is_that_of_mamba_without_its_rates():
    options = dict(embed_size=32, hidden_size=32, state_size=8, num_layers=3)
    ours, fixed = count_weights("gated_ssm", **options)
    mamba, _ = count_weights("mamba", **options)
    assert ours == mamba - 3 * 64 * 8 and fixed == 3 * 64 * 8
    assert count_weights("gated_ssm", learn_rates=True, **options) == (mamba, 0)


def test_config_keeps_the_arguments():
    options = dict(
        state_size=5,
        expand_factor=3,
        conv_size=2,
        learn_rates=True,
        unit_bc=True,
        depth=3,
    )
    config = GatedSSMBlock(**options).get_config()
    assert {name: config[name] for name in options} == options
