import functools

import keras
import numpy as np
import pytest
from keras import ops

import keras_edifice
from keras_edifice.ops.linear_scan import METHODS
from keras_edifice.ssm.mamba import MambaBlock
from tests.support.close import assert_close, difference, to_numpy
from tests.support.compiled import compiled
from tests.support.counting import count_weights
from tests.support.gradients import gradients
from tests.support.numerical import numerical_gradient
from tests.support.shaking import shake
from tests.support.streaming import stream

rng = np.random.default_rng(0)
SIZES = {  # layers, width -> weights without the embedding
    "130m": 90_520_320,
    "370m": 320_029_696,
    "790m": 715_974_144,
    "1.4b": 1_269_204_992,
    "2.8b": 2_639_628_800,
}
WITH_EMBEDDING = {
    "130m": 129_135_360,
    "370m": 371_516_416,
    "790m": 793_204_224,
    "1.4b": 1_372_178_432,
    "2.8b": 2_768_345_600,
}


def silu(x):
    return x / (1 + np.exp(-x))


def rms_norm(x, scale=1.0):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * scale


def convolved(x, kernel, bias):
    padded = np.pad(x, [(0, 0), (len(kernel) - 1, 0), (0, 0)])
    return bias + sum(w * padded[:, j : j + x.shape[1]] for j, w in enumerate(kernel))


def mixer(u, w, inner_norms=False, zoh=False):
    """The equations of the module, a loop in float64 over the steps."""
    x, z = np.split(u @ w["in_proj/kernel"], 2, axis=-1)
    x = silu(convolved(x, w["conv/kernel"], w["conv/bias"]))
    rank, size = w["dt_proj/kernel"].shape[0], w["A_log"].shape[1]
    parts = np.split(x @ w["x_proj/kernel"], [rank, rank + size], axis=-1)
    if inner_norms:
        names = ("dt_norm/gamma", "B_norm/gamma", "C_norm/gamma")
        parts = [rms_norm(p, w[name]) for p, name in zip(parts, names, strict=True)]
    delta, B, C = parts
    dt = np.log1p(np.exp(delta @ w["dt_proj/kernel"] + w["dt_bias"]))
    A, h, outputs = -np.exp(w["A_log"]), 0.0, []
    for t in range(u.shape[1]):
        step = dt[:, t, :, None]
        weight = np.expm1(step * A) / A if zoh else step
        h = np.exp(step * A) * h + weight * x[:, t, :, None] * B[:, t, None]
        outputs.append((h * C[:, t, None]).sum(-1) + w["D"] * x[:, t])
    return (np.stack(outputs, axis=1) * silu(z)) @ w["out_proj/kernel"]


def named_weights(layer):
    """The weights of a layer by their names below it, in float64."""
    return {v.path.removeprefix(f"{layer.path}/"): to_numpy(v) for v in layer.weights}


def reference(x, model, **options):
    """The whole model on (batch, time, features), from its weights."""
    x = np.asarray(x, "float64") @ to_numpy(model.get_layer("embed").kernel)
    for i in range(2):
        gamma = to_numpy(model.get_layer(f"mamba_{i}_norm").gamma)
        weights = named_weights(model.get_layer(f"mamba_{i}"))
        x = x + mixer(rms_norm(x, gamma), weights, **options)
    return rms_norm(x, to_numpy(model.get_layer("final_norm").gamma))


def model(**options):
    sizes = dict(embed_size=3, hidden_size=4, state_size=3, dt_rank=2, window_size=None)
    options = {**sizes, "return_sequences": True, **options}
    keras.utils.set_random_seed(0)
    return shake(keras_edifice.build("mamba", **options))


def block(features=4, **options):
    keras.utils.set_random_seed(0)
    built = MambaBlock(**{"state_size": 3, "dt_rank": 2, **options})
    built.build((None, None, features))
    return shake(built)


def run(layer, x, **options):
    """The call of a layer with options that are no arrays to be traced."""
    return compiled(lambda x: layer(x, **options))(ops.convert_to_tensor(x))


def predict(model, x):
    return model.predict(x, verbose=0)


def inputs(length=11, features=3):
    return rng.normal(size=(2, length, features)).astype("float32")


@pytest.mark.parametrize("inner_norms", [False, True])
@pytest.mark.parametrize("discretization", ["euler_b", "zoh"])
def test_output_is_the_equation(discretization, inner_norms):
    built = model(discretization=discretization, inner_norms=inner_norms)
    x = inputs()
    expected = reference(x, built, zoh=discretization == "zoh", inner_norms=inner_norms)
    assert_close(predict(built, x), expected, 1e-4)


def test_gradient_is_that_of_the_equation():
    built, x = model(), inputs(5)
    by_weight, by_input = gradients(built, x, lambda y: ops.sum(ops.square(y)))

    def value(z):
        return np.square(reference(z, built)).sum()

    assert_close(by_input, numerical_gradient(value, x), 1e-4)
    for variable, gradient in zip(built.trainable_variables, by_weight, strict=True):
        if variable.name in ("A_log", "D", "dt_bias"):
            assert np.all(np.abs(gradient) > 0), f"{variable.path} does not learn"


def test_initial_weights_are_those_of_the_paper():
    keras.utils.set_random_seed(0)
    built = MambaBlock(state_size=5, depth=9)
    built.build((None, None, 64))
    weights = named_weights(built)
    assert_close(weights["A_log"], np.log(np.arange(1.0, 6))[None].repeat(128, 0), 1e-6)
    assert_close(weights["D"], np.ones(128), 0)
    dt = np.log1p(np.exp(weights["dt_bias"]))
    assert 0.001 <= dt.min() < 0.002
    assert 0.05 < dt.max() <= 0.1 * (1 + 1e-5)
    assert abs(np.median(np.log(dt)) - np.log(0.01)) < 0.5  # uniform in the logarithm
    for name, bound in {
        "in_proj/kernel": 64**-0.5,
        "x_proj/kernel": 128**-0.5,
        "dt_proj/kernel": 4**-0.5,
        "out_proj/kernel": 128**-0.5 / 3,
    }.items():
        assert 0.95 * bound < np.abs(weights[name]).max() <= bound


def test_initial_step_sizes_follow_their_options():
    built = MambaBlock(dt_min=1e-6, dt_max=0.5, dt_init_floor=0.01, dt_scale=2.0)
    built.build((None, None, 64))
    weights = named_weights(built)
    dt = np.log1p(np.exp(weights["dt_bias"]))
    assert_close(dt.min(), 0.01)
    assert 0.1 < dt.max() <= 0.5 * (1 + 1e-5)
    assert np.abs(weights["dt_proj/kernel"]).max() > 4**-0.5


@functools.cache
def with_scan(scan):
    """Output of one model by a scan, and its gradients."""
    built = model(scan=scan, chunk_size=7)
    x = np.random.default_rng(1).normal(size=(2, 40, 3)).astype("float32")
    by_weight, _ = gradients(built, x, lambda y: ops.sum(ops.square(y)))
    return predict(built, x), by_weight


@pytest.mark.parametrize("scan", METHODS[1:])
def test_every_scan_is_the_same_function(scan):
    (y, by_weight), (expected, by_weight_expected) = with_scan(scan), with_scan("auto")
    assert_close(y, expected, 1e-4)
    for ours, theirs in zip(by_weight, by_weight_expected, strict=True):
        assert difference(ours, theirs) < 1e-4


@pytest.mark.parametrize("name", ["mamba_cumsum", "mamba_hillis_steele"])
def test_other_scans_by_name_have_the_values_and_gradients_of_mamba(name):
    # Strong decays, A = -16, with long steps, about 1: plain sums would overflow.
    x = np.random.default_rng(1).normal(size=(1, 1024, 2)).astype("float32")
    results = []
    for architecture in ("mamba", name):
        keras.utils.set_random_seed(0)
        built = keras_edifice.build(
            architecture,
            **dict(embed_size=2, hidden_size=2, state_size=16, dt_rank=1),
            **dict(num_layers=1, window_size=1024, return_sequences=True),
        )
        shake(built)
        block = built.get_layer("mamba_0")
        block.dt_bias.assign(np.full(4, 0.54))  # softplus⁻¹(1)
        block.A_log.assign(np.log(np.arange(1.0, 17.0))[None].repeat(4, 0))
        assert built.options["scan"] == {"mamba": "auto"}.get(
            architecture, architecture.removeprefix("mamba_")
        )
        by_weight, by_input = gradients(built, x, lambda y: ops.sum(ops.square(y)))
        results.append((predict(built, x), by_input, *by_weight))
    for expected, found in zip(*results, strict=True):
        assert difference(found, expected) < 1e-4


@pytest.mark.parametrize("tie", [True, False])
def test_tokens_give_logits_of_their_embedding(tie):
    tokens = np.array([[3, 1, 4, 1, 5]])
    built = model(embed_size=None, vocab_size=7, tie_embeddings=tie)
    table = built.get_layer("embed").embeddings
    stack = model(embed_size=4)
    kept = [w for w in built.weights if not w.path.startswith("embed/")]
    stack.set_weights([w.numpy() for w in kept])
    features = predict(stack, to_numpy(table)[tokens].astype("float32"))
    out = to_numpy(table).T
    if not tie:
        out = to_numpy(built.get_layer("embed").reverse_embeddings)
    assert_close(predict(built, tokens), features @ out)
    assert_close(stream(built, tokens), predict(built, tokens))


@pytest.mark.parametrize("pool", ["last", "mean"])
def test_token_by_token_is_the_whole_sequence(pool):
    x = inputs()
    whole = model(inner_norms=True, discretization="zoh")
    assert_close(stream(whole, x), predict(whole, x))
    pooled = model(return_sequences=False, pool=pool)
    outputs = stream(pooled, x)
    for t in (0, 5, 10):
        assert_close(outputs[:, t], predict(pooled, x[:, : t + 1]))


@pytest.mark.parametrize("scan", METHODS)
def test_segments_with_the_carried_state_are_one_pass(scan):
    mamba, x = block(scan=scan), inputs(11, 4)
    first, state = run(mamba, x[:, :2], return_state=True)
    second, state = run(mamba, x[:, 2:], initial_state=state, return_state=True)
    whole, expected = run(mamba, x, return_state=True)
    assert_close(ops.concatenate([first, second], axis=1), whole)
    for part, whole_part in zip(state, expected, strict=True):
        assert_close(part, whole_part)


def test_future_tokens_do_not_change_the_past():
    built, x = model(), inputs(40)
    changed = x.copy()
    changed[:, 20:] += 1.0
    before, after = predict(built, x), predict(built, changed)
    assert_close(after[:, :20], before[:, :20], 1e-6)
    assert difference(after[:, 20:], before[:, 20:]) > 1e-3


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(side):
    x = inputs()
    valid = slice(4) if side == "right" else slice(7, None)
    mask = np.zeros((2, 11), "bool")
    mask[:, valid] = True
    for pool in ("last", "mean"):
        built = model(return_sequences=False, pool=pool)
        y = run(built, x, mask=ops.convert_to_tensor(mask))
        assert_close(y, predict(built, x[:, valid]))


def test_masked_steps_leave_the_state():
    mamba, x = block(), inputs(11, 4)
    mask = np.arange(11)[None] < np.array([[5], [2]])
    _, state = run(mamba, x, mask=mask, return_state=True)
    for row, length in enumerate((5, 2)):
        _, expected = run(mamba, x[row : row + 1, :length], return_state=True)
        for part, short in zip(state, expected, strict=True):
            assert_close(part[row : row + 1], short)


def test_short_steps_freeze_and_long_steps_reset_the_state():
    mamba, x = block(), inputs(11, 4)
    _, start = run(mamba, inputs(11, 4), return_state=True)
    for bias, kept in ((-60.0, 1.0), (60.0, 0.0)):
        mamba.dt_proj.kernel.assign(np.zeros((2, 8)))
        mamba.dt_bias.assign(np.full(8, bias))
        _, (_, h) = run(mamba, x, initial_state=start, return_state=True)
        _, (_, fresh) = run(
            mamba, x, initial_state=(start[0], 0 * start[1]), return_state=True
        )
        assert_close(h - fresh, kept * start[1])


def test_closed_gate_kills_the_block():
    mamba = block()
    kernel = mamba.in_proj.kernel.numpy()
    kernel[:, 8:] = 0.0  # the half that makes z
    mamba.in_proj.kernel.assign(kernel)
    assert_close(run(mamba, inputs(11, 4)), np.zeros((2, 11, 4)), 0)


def test_without_state_and_skip_nothing_passes():
    mamba, x = block(), inputs(11, 4)
    mamba.D.assign(np.zeros(8))
    mamba.dt_bias.assign(np.full(8, -60.0))
    mamba.dt_proj.kernel.assign(np.zeros((2, 8)))
    assert_close(run(mamba, x), np.zeros((2, 11, 4)), 1e-6)


def test_biases_are_where_the_options_put_them():
    def names(**options):
        return set(named_weights(block(**options)))

    plain = names()
    assert "conv/bias" in plain
    assert plain - names(conv_bias=False) == {"conv/bias"}
    assert names(use_bias=True) - plain == {"in_proj/bias", "out_proj/bias"}


def test_long_sequences_stay_finite():
    mamba = block(features=2, state_size=2, dt_rank=1)
    x = inputs(4096, 2)
    for scale in (1.0, 1e3):
        assert np.isfinite(to_numpy(run(mamba, scale * x))).all()


def test_half_precision_streams_with_a_state_in_float32():
    mamba, x = block(dtype="mixed_bfloat16"), inputs(5, 4)
    state = mamba.initial_state(2)
    assert keras.backend.standardize_dtype(state[1].dtype) == "float32"
    outputs = []
    for t in range(5):
        y, state = mamba.step(x[:, t], state)
        outputs.append(ops.cast(y, "float32"))
    assert keras.backend.standardize_dtype(state[1].dtype) == "float32"
    # bfloat16 keeps 8 bits, in the projections around the recurrence.
    whole = ops.cast(run(mamba, x), "float32")
    assert difference(ops.stack(outputs, axis=1), whole) < 0.02


def test_half_precision_keeps_the_weights_and_states_of_the_recurrence():
    half, full = (
        block(dtype=dtype, conv_bias=False) for dtype in ("mixed_bfloat16", "float32")
    )
    nothing = np.zeros((2, 5, 4), "float32")
    h = rng.normal(size=(2, 8, 3)).astype("float32")
    (_, (_, found)), (_, (_, expected)) = (
        run(
            built,
            nothing,
            initial_state=(built.conv.initial_state(2), h),
            return_state=True,
        )
        for built in (half, full)
    )
    assert np.abs(to_numpy(expected)).max() > 0.1
    assert difference(found, expected) < 1e-5


@pytest.mark.parametrize("variant", SIZES)
def test_published_sizes(variant):
    width = keras_edifice.info("mamba").variants[variant]["hidden_size"]
    trainable, fixed = count_weights("mamba", embed_size=width, variant=variant)
    assert (trainable, fixed) == (SIZES[variant], 0)
    tokens = count_weights("mamba", vocab_size=50_280, variant=variant)
    assert tokens == (WITH_EMBEDDING[variant], 0)


def test_config_keeps_the_arguments():
    options = dict(
        state_size=5,
        expand_factor=3,
        conv_size=2,
        dt_rank=7,
        scan="cumsum",
        chunk_size=9,
        discretization="zoh",
        dt_min=0.01,
        dt_max=0.2,
        dt_init_floor=1e-3,
        dt_scale=0.5,
        conv_bias=False,
        use_bias=True,
        inner_norms=True,
        norm_eps=1e-6,
        depth=3,
    )
    config = MambaBlock(**options).get_config()
    assert {name: config[name] for name in options} == options


@pytest.mark.parametrize("option", ["scan", "discretization"])
def test_unknown_choices_are_refused(option):
    with pytest.raises(ValueError, match=f"{option} must be one of .*, received 'x'"):
        MambaBlock(**{option: "x"})
