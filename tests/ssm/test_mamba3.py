import keras
import numpy as np
import pytest
from keras import ops

import keras_edifice
from keras_edifice.ssm.mamba3 import Mamba3Block
from tests.support.close import assert_close, difference, to_numpy
from tests.support.compiled import compiled
from tests.support.counting import count_weights
from tests.support.gradients import gradients
from tests.support.numerical import numerical_gradient
from tests.support.shaking import shake
from tests.support.streaming import stream

rng = np.random.default_rng(0)
HEADS, HEAD_DIM, STATE = 4, 2, 5
WIDTH = HEADS * HEAD_DIM
SMALL = dict(state_size=STATE, head_dim=HEAD_DIM, dt_min=0.1, dt_max=2.0)
"""Sizes, and steps so long that the state matters."""
FORMS = {
    "siso": {},
    "mimo": dict(mimo=True, rank=3, num_groups=2, rope_fraction=0.8),
    "mimo_norm": dict(mimo=True, rank=2, out_norm=True, a_activation="softplus"),
    "real": dict(complex=False, num_groups=HEADS, out_norm=True, a_floor=1.5),
}


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def rms_norm(x, gamma):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * gamma


def rate(a, activation, floor):
    """-A, of a loop over the numbers."""

    def heavy_tail(a):
        return 1 + a if a >= 0 else 1 / (1 - a)

    psi = dict(heavy_tail=heavy_tail, softplus=lambda a: np.log1p(np.exp(a)))
    return np.maximum(np.vectorize(psi[activation])(a), floor)


def turned(x, angle):
    """The first pairs of x (..., heads, N) as complex numbers times e^{iφ}."""
    pairs, x = angle.shape[-1], x.copy()
    numbers = x[..., 0 : 2 * pairs : 2] + 1j * x[..., 1 : 2 * pairs : 2]
    numbers = numbers * np.exp(1j * angle)
    x[..., 0 : 2 * pairs : 2], x[..., 1 : 2 * pairs : 2] = numbers.real, numbers.imag
    return x


def mixer(u, w, num_groups=1, a_activation="heavy_tail", a_floor=1e-4, **options):
    """The equations in float64, in a loop over the steps and the inputs of each."""
    heads, R, N = w["B_bias"].shape
    (batch, time, _), width = u.shape, len(w["out_proj/kernel"])
    widths = [width, width] + [N * num_groups * R] * 2 + [heads] * 3
    parts = np.split(u @ w["in_proj/kernel"], np.cumsum(widths), axis=-1)
    z, x = (v.reshape(batch, time, heads, -1) for v in parts[:2])
    B, C = (
        rms_norm(v.reshape(batch, time, R, num_groups, N), w[f"{name}_norm/gamma"])
        .repeat(heads // num_groups, axis=3)
        .__add__(w[f"{name}_bias"].swapaxes(0, 1))
        for v, name in zip(parts[2:4], "BC", strict=True)
    )
    dt, lam = np.log1p(np.exp(parts[4] + w["dt_bias"])), sigmoid(parts[6])
    A, turn = -rate(parts[5], a_activation, a_floor), np.tanh(parts[7])
    m_x, m_z, m_o = (w.get(f"mimo_{v}", np.ones((heads, 1, 1))) for v in "xzo")
    angle, S, before, outputs = 0.0, 0.0, 0.0, []
    for t in range(time):
        angle = angle + np.pi * dt[:, t, :, None] * turn[:, t, None]
        reads, keys, now = [], [], 0.0
        for r in range(R):
            reads.append(turned(C[:, t, r], angle)[..., None])
            keys.append(turned(B[:, t, r], angle)[..., None])
            now = now + keys[r] * (m_x[:, r] * x[:, t])[..., None, :]
        step, share = (v[:, t, :, None, None] for v in (dt, lam))
        alpha = np.exp(step * A[:, t, :, None, None])
        S = alpha * S + (1 - share) * step * alpha * before + share * step * now
        before, y = now, 0.0
        for r in range(R):
            out = (S * reads[r]).sum(-2) + w["D"][:, None] * m_x[:, r] * x[:, t]
            if "norm/gamma" in w:
                out = rms_norm(out, w["norm/gamma"].reshape(heads, -1))
            gate = m_z[:, r] * z[:, t]
            y = y + m_o[:, r] * out * gate * sigmoid(gate)
        outputs.append(y.reshape(batch, width))
    return np.stack(outputs, axis=1) @ w["out_proj/kernel"]


def named_weights(layer):
    """The weights of a layer by their names below it, in float64."""
    return {v.path.removeprefix(f"{layer.path}/"): to_numpy(v) for v in layer.weights}


def reference(x, model, **options):
    """The whole model on (batch, time, features), from its weights."""
    x = np.asarray(x, "float64") @ to_numpy(model.get_layer("embed").kernel)
    for i in range(2):
        gammas = (f"mamba_{i}_norm", f"ffn_{i}_norm")
        gammas = [to_numpy(model.get_layer(name).gamma) for name in gammas]
        weights = named_weights(model.get_layer(f"mamba_{i}"))
        x = x + mixer(rms_norm(x, gammas[0]), weights, **options)
        weights = named_weights(model.get_layer(f"ffn_{i}"))
        y = rms_norm(x, gammas[1])
        gate = y @ weights["gate/kernel"]
        hidden = gate * sigmoid(gate) * (y @ weights["up/kernel"])
        x = x + hidden @ weights["down/kernel"]
    return rms_norm(x, to_numpy(model.get_layer("final_norm").gamma))


def model(**options):
    sizes = dict(embed_size=3, hidden_size=4, window_size=None, **SMALL)
    options = {**sizes, "return_sequences": True, **options}
    keras.utils.set_random_seed(0)
    return shake(keras_edifice.build("mamba3", **options))


def block(features=4, **options):
    keras.utils.set_random_seed(0)
    built = Mamba3Block(**{**SMALL, **options})
    built.build((None, None, features))
    return shake(built)


def by_hand(features, matrices, **options):
    """A block of one head without D and norms, B = C = (1, 0), Δ = 1, gate 1.

    Its output is the state of x = u. The first feature of u is to be 1; `matrices` is
    what leads from u to a, λ̃ and θ̃, zero where nothing is said.
    """
    built = Mamba3Block(2, features, 1, **{"rope_fraction": 1.0, **options})
    built.build((None, None, features))
    names = ("z", "x", "B", "C", "dt", "a", "lambda", "theta")
    parts = [np.zeros((features, size)) for size in built.parts]
    columns = dict(zip(names, parts, strict=True))
    columns["z"][0] = 50.0  # SiLU(50) = 50
    columns["x"][:] = np.eye(features)
    for name, matrix in matrices.items():
        columns[name][:] = matrix
    built.in_proj.kernel.assign(np.concatenate(parts, axis=1))
    built.out_proj.kernel.assign(np.eye(features) / 50)
    for weight in (built.B_norm.gamma, built.C_norm.gamma, built.D):
        weight.assign(np.zeros(weight.shape))
    for weight in (built.B_bias, built.C_bias):
        weight.assign([[[1.0, 0.0]]])
    built.dt_bias.assign([np.log(np.expm1(1.0))])
    return built


def run(layer, x, **options):
    """The call of a layer with options that are no arrays to be traced."""
    return compiled(lambda x: layer(x, **options))(ops.convert_to_tensor(x))


def predict(model, x):
    return model.predict(x, verbose=0)


def inputs(length=11, features=3):
    return rng.normal(size=(2, length, features)).astype("float32")


@pytest.mark.parametrize("form", FORMS)
def test_output_is_the_equation(form):
    built, x = model(chunk_size=4, **FORMS[form]), inputs()
    assert_close(predict(built, x), reference(x, built, **FORMS[form]), 1e-4)


def test_gradient_is_that_of_the_equation():
    built, x = model(chunk_size=2, **FORMS["mimo"]), inputs(5)
    by_weight, by_input = gradients(built, x, lambda y: ops.sum(ops.square(y)))

    def value(z):
        return np.square(reference(z, built, **FORMS["mimo"])).sum()

    assert_close(by_input, numerical_gradient(value, x), 1e-4)
    for variable, gradient in zip(built.trainable_variables, by_weight, strict=True):
        assert np.abs(gradient).max() > 1e-6, f"{variable.path} does not learn"


def test_at_the_right_end_without_turning_and_biases_it_is_mamba_2():
    mamba, u = block(), inputs(11, 4)
    u[..., 0] = 1.0
    kernel, places = mamba.in_proj.kernel.numpy(), np.cumsum(mamba.parts)
    kernel[:, places[5] :] = 0.0
    kernel[0, places[5] : places[6]] = 50.0  # λ = 1
    mamba.in_proj.kernel.assign(kernel)
    for bias in (mamba.B_bias, mamba.C_bias):
        bias.assign(np.zeros(bias.shape))
    w, S, outputs = named_weights(mamba), 0.0, []
    z, x, B, C, dt, a = np.split(to_numpy(u) @ w["in_proj/kernel"], places, -1)[:6]
    B, C = rms_norm(B, w["B_norm/gamma"]), rms_norm(C, w["C_norm/gamma"])
    dt = np.log1p(np.exp(dt + w["dt_bias"]))[..., None, None]
    decay = np.exp(-dt * rate(a, "heavy_tail", 0.0)[..., None, None])
    x = x.reshape(2, 11, HEADS, 1, HEAD_DIM)
    for t in range(11):
        S = decay[:, t] * S + dt[:, t] * B[:, t, None, :, None] * x[:, t]
        y = (S * C[:, t, None, :, None]).sum(-2) + w["D"][:, None] * x[:, t, :, 0]
        outputs.append(y.reshape(2, WIDTH))
    y = np.stack(outputs, axis=1) * z * sigmoid(z)
    assert_close(run(mamba, u), y @ w["out_proj/kernel"])


def test_one_input_with_unit_mixing_is_siso():
    several, one = block(mimo=True, rank=1), block()
    for name, value in named_weights(one).items():
        target = next(v for v in several.weights if v.path.endswith(f"/{name}"))
        target.assign(value)
    for weight in (several.mimo_x, several.mimo_z, several.mimo_o):
        weight.assign(np.ones(weight.shape))
    u = inputs(11, 4)
    assert_close(run(several, u), run(one, u))


def test_a_common_angle_changes_nothing():
    mamba, u = block(**FORMS["mimo"]), inputs(11, 4)
    S, B, x, angle = mamba.initial_state(2)
    y = run(mamba, u, initial_state=(S, B, x, angle + 1.0))
    assert_close(y, run(mamba, u))
    y, (S, _, _, turned_by) = run(mamba, u, return_state=True)
    assert 0 <= to_numpy(turned_by).min() < 2 < to_numpy(turned_by).max() < 2 * np.pi
    assert difference(run(mamba, u, initial_state=(S, B, x, angle)), y) > 1e-3


def bits_and_parity(bits):
    """Steps (1, whether it is the first, bit) and ±1 for the bits so far, no first."""
    bits = np.pad(bits, [(0, 0), (1, 0)])
    first = np.eye(1, bits.shape[1]).repeat(len(bits), axis=0)
    u = np.stack([np.ones(bits.shape), first, bits], axis=-1).astype("float32")
    return u, 1.0 - 2.0 * (np.cumsum(bits, axis=1) % 2)


SLOW = {"a": [[-1e6], [0], [0]], "lambda": [[50.0], [0], [0]]}
"""Hardly any decay, and nothing of the step before."""


def test_the_state_turns_by_the_parity_of_the_bits():
    u, parity = bits_and_parity(rng.integers(0, 2, (2, 63)))
    turning = by_hand(3, dict(theta=[[0.0], [0], [50]], **SLOW), a_floor=1e-6)
    y = run(turning, u)[..., 1]
    assert_close(y, parity, 1e-3)  # 1e-6 is forgotten at each step
    real = by_hand(3, SLOW, a_floor=1e-6, complex=False)
    assert_close(run(real, u)[..., 1], np.ones((2, 64)), 1e-3)


@pytest.mark.parametrize("turns", [True, False])
def test_parity_is_learned_by_a_state_that_turns_alone(turns):
    start = {"lambda": SLOW["lambda"], "a": [[-20.0], [0], [0]]}
    if turns:
        start["theta"] = [[0.0], [0], [1.0]]  # each bit turns by 0.76 π
    mamba, readout = by_hand(3, start, complex=turns), keras.layers.Dense(1)
    learner = keras.Sequential([keras.Input((None, 3)), mamba, readout])
    readout.kernel.assign([[0.0], [1], [0]])
    learner.compile(keras.optimizers.Adam(0.01), "mse")
    strings = np.unpackbits(np.arange(64, dtype="uint8")[:, None], axis=1)[:, 2:]
    u, parity = bits_and_parity(strings[:16, 2:])
    learner.fit(u, parity[..., None], epochs=30, shuffle=False, verbose=0)
    u, parity = bits_and_parity(strings)
    right = np.mean((predict(learner, u)[..., 0] > 0) == (parity > 0))
    assert right == 1 if turns else right < 0.75, right


@pytest.mark.parametrize(("right", "order"), [(0.0, 2), (50.0, 1)])
def test_the_error_on_a_smooth_equation_falls_as_the_rule_promises(right, order):
    # h' = -h + sin t from h(0) = 0; λ = 1/2 is the trapezoid, λ = 1 its right end.
    errors = []
    for steps in (10, 20):
        t = np.linspace(0, 2, steps + 1)[1:]
        u = np.stack([np.ones(steps), np.sin(t)], axis=-1)[None].astype("float32")
        mamba = by_hand(2, {"lambda": [[right], [0]]})
        mamba.dt_bias.assign([np.log(np.expm1(2 / steps))])
        exact = (np.sin(t) - np.cos(t) + np.exp(-t)) / 2
        errors.append(np.abs(to_numpy(run(mamba, u))[0, :, 1] - exact).max())
    assert abs(np.log2(errors[0] / errors[1]) - order) < 0.15


def test_initial_weights_are_those_of_the_paper():
    keras.utils.set_random_seed(0)
    built = Mamba3Block(head_dim=1, depth=9, mimo=True, out_norm=True)
    built.build((None, None, 64))
    weights = named_weights(built)
    ones = ("B_bias", "C_bias", "B_norm/gamma", "C_norm/gamma", "norm/gamma")
    for name in (*ones, "D", "mimo_z"):
        assert np.all(weights[name] == 1), name
    assert np.all(weights["mimo_x"] == 0.25) and np.all(weights["mimo_o"] == 0.25)
    dt = np.log1p(np.exp(weights["dt_bias"]))
    assert 0.001 * (1 - 1e-5) <= dt.min() < 0.002
    assert 0.05 < dt.max() <= 0.1 * (1 + 1e-5)
    bounds = {"in_proj/kernel": 64**-0.5, "out_proj/kernel": 128**-0.5 / 3}
    for name, bound in bounds.items():
        assert 0.95 * bound < np.abs(weights[name]).max() <= bound
    floored = Mamba3Block(head_dim=1, dt_min=1e-6, dt_max=0.5, dt_init_floor=0.01)
    floored.build((None, None, 64))
    dt = np.log1p(np.exp(to_numpy(floored.dt_bias)))
    assert_close(dt.min(), 0.01)
    assert 0.1 < dt.max() <= 0.5 * (1 + 1e-5)


def test_every_chunk_size_is_the_same_function():
    x, results = inputs(21, 4), []
    for chunk_size in (64, 4):
        built = block(chunk_size=chunk_size, **FORMS["mimo"])
        by_weight, _ = gradients(built, x, lambda y: ops.sum(ops.square(y)))
        results.append((run(built, x), by_weight))
    (y, by_weight), (expected, by_same_weight) = results
    assert_close(y, expected)
    for ours, expected in zip(by_weight, by_same_weight, strict=True):
        # That of a decay is a difference of sums far larger than itself.
        assert difference(ours, expected) < 1e-3


@pytest.mark.parametrize("form", ["siso", "mimo_norm", "real"])
def test_token_by_token_is_the_whole_sequence(form):
    x = inputs()
    whole = model(chunk_size=4, **FORMS[form])
    assert_close(stream(whole, x), predict(whole, x))


def test_a_mean_streams():
    x, pooled = inputs(6), model(return_sequences=False, pool="mean")
    outputs = stream(pooled, x)
    assert_close(outputs[:, 3], predict(pooled, x[:, :4]))


@pytest.mark.parametrize("form", ["mimo", "real"])
def test_segments_with_the_carried_state_are_one_pass(form):
    mamba, x = block(chunk_size=4, **FORMS[form]), inputs(11, 4)
    first, state = run(mamba, x[:, :1], return_state=True)
    second, state = run(mamba, x[:, 1:], initial_state=state, return_state=True)
    whole, expected = run(mamba, x, return_state=True)
    assert_close(ops.concatenate([first, second], axis=1), whole)
    for part, whole_part in zip(state, expected, strict=True):
        assert_close(part, whole_part)
    assert len(state) == (3 if form == "real" else 4)


def test_future_tokens_do_not_change_the_past():
    built, x = model(chunk_size=8, **FORMS["mimo"]), inputs(20)
    changed = x.copy()
    changed[:, 10:] += 1.0
    before, after = predict(built, x), predict(built, changed)
    assert_close(after[:, :9], before[:, :9], 1e-6)
    # Step 9 takes back its share in step 10 (`total * seen`), which leaves rounding.
    assert_close(after[:, 9], before[:, 9])
    assert difference(after[:, 10:], before[:, 10:]) > 1e-3


def test_padding_changes_nothing():
    x, built = inputs(), model(return_sequences=False, pool="mean")
    mask = np.array([[True] * 4 + [False] * 7, [False] * 7 + [True] * 4])
    y = run(built, x, mask=ops.convert_to_tensor(mask))
    valid = np.stack([x[0, :4], x[1, 7:]])
    assert_close(y, predict(built, valid))


def test_masked_steps_are_as_if_they_were_not_there():
    mamba, x = block(chunk_size=4, **FORMS["mimo"]), inputs(11, 4)
    _, carried = run(mamba, inputs(3, 4), return_state=True)
    mask = rng.random((2, 11)) < 0.5
    mask[1] = False
    options = dict(initial_state=carried, return_state=True)
    y, state = run(mamba, x, mask=mask, **options)
    row = [part[:1] for part in carried]
    expected, last = run(mamba, x[:1, mask[0]], initial_state=row, return_state=True)
    assert_close(to_numpy(y)[:1, mask[0]], expected)
    for part, first, second in zip(state, last, carried, strict=True):
        assert_close(part[:1], first)
        assert_close(part[1:], second[1:])


def test_tokens_give_logits():
    keras.utils.set_random_seed(0)
    sizes = dict(hidden_size=4, window_size=None, **SMALL)
    tokens = np.array([[3, 1, 4, 1, 5]])
    built = shake(keras_edifice.build("mamba3", vocab_size=7, **sizes))
    assert predict(built, tokens).shape == (1, 5, 7)
    assert_close(stream(built, tokens), predict(built, tokens))


def test_weights_are_where_the_options_put_them():
    def names(**options):
        return set(named_weights(block(**options)))

    mixing = {"mimo_x", "mimo_z", "mimo_o"}
    assert names(mimo=True) - names() == mixing
    assert names(out_norm=True) - names() == {"norm/gamma"}
    assert not any("proj/bias" in name for name in names())
    fractions = (0.4, 0.5, 1.0)
    pairs = [block(rope_fraction=fraction).parts[-1] for fraction in fractions]
    assert pairs == [1, 1, 2]
    assert block(complex=False).parts[-1] == 0


@pytest.mark.parametrize("a_activation", ["heavy_tail", "softplus"])
def test_long_sequences_and_open_gates_stay_finite(a_activation):
    sizes = dict(features=2, state_size=2, rope_fraction=1.0, mimo=True, rank=2)
    mamba, x = block(a_activation=a_activation, **sizes), inputs(4096, 2)
    x[1] *= 1e3
    assert np.isfinite(to_numpy(run(mamba, x))).all()


def test_half_precision_keeps_the_weights_and_states_of_the_recurrence():
    mamba, x = block(dtype="mixed_bfloat16", mimo=True, rank=2), inputs(5, 4)
    state, outputs, step = mamba.initial_state(2), [], compiled(mamba.step)
    for t in range(5):
        y, state = step(ops.convert_to_tensor(x[:, t]), state)
        outputs.append(ops.cast(y, "float32"))
    y, last = run(mamba, x, return_state=True)
    for part in (*state, *last):
        assert keras.backend.standardize_dtype(part.dtype) == "float32"
    for part, expected in zip(state, last, strict=True):
        assert_close(part, expected)
    # bfloat16 keeps 8 bits, in the projections around the recurrence.
    assert difference(ops.stack(outputs, axis=1), ops.cast(y, "float32")) < 0.02


def test_published_size_of_the_mixer():
    sizes = dict(embed_size=768, hidden_size=768, state_size=128, num_layers=1)
    norms, ffn = 3 * 768, 3 * 768 * 2048
    trainable, _ = count_weights("mamba3", **sizes)
    assert trainable - norms - ffn == 3_821_872


def test_config_keeps_the_arguments():
    options = dict(
        state_size=6,
        head_dim=3,
        expand_factor=3,
        num_groups=2,
        rope_fraction=1.0,
        complex=False,
        mimo=True,
        rank=2,
        out_norm=True,
        a_activation="softplus",
        a_floor=0.1,
        dt_min=0.01,
        dt_max=0.2,
        dt_init_floor=1e-3,
        chunk_size=9,
        depth=3,
    )
    config = Mamba3Block(**options).get_config()
    assert {name: config[name] for name in options} == options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(head_dim=3), "must be a multiple of head_dim, received 8 and 3"),
        (dict(num_groups=3), "must be a multiple of num_groups, received 4 and 3"),
        (dict(state_size=3), "must be at least 2, received 0.5 of 3"),
        (dict(a_activation="relu"), "a_activation must be one of .* received 'relu'"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        block(**options)
