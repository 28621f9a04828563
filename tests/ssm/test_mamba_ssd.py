import keras
import numpy as np
import pytest
from keras import ops

import keras_edifice
from keras_edifice.ssm.mamba_ssd import Mamba2Block
from tests.support.close import assert_close, difference, to_numpy
from tests.support.compiled import compiled
from tests.support.counting import count_weights
from tests.support.gradients import gradients
from tests.support.numerical import numerical_gradient
from tests.support.shaking import shake
from tests.support.streaming import stream

rng = np.random.default_rng(0)
SIZES = {  # weights without the embedding
    "130m": 90_368_448,
    "370m": 316_851_712,
    "780m": 702_918_912,
    "1.3b": 1_240_767_488,
    "2.7b": 2_573_862_400,
}
HEADS, HEAD_DIM, STATE = 4, 2, 3
WIDTH = HEADS * HEAD_DIM
SMALL = dict(state_size=STATE, head_dim=HEAD_DIM, dt_min=0.1, dt_max=2.0)
"""Sizes, and steps so long that the state matters."""


def silu(x):
    return x / (1 + np.exp(-x))


def rms_norm(x, scale, groups=1):
    parts = x.reshape(*x.shape[:-1], groups, -1)
    parts = parts / np.sqrt((parts**2).mean(-1, keepdims=True) + 1e-5)
    return parts.reshape(x.shape) * scale


def convolved(x, kernel, bias):
    padded = np.pad(x, [(0, 0), (len(kernel) - 1, 0), (0, 0)])
    return bias + sum(w * padded[:, j : j + x.shape[1]] for j, w in enumerate(kernel))


def recurrence(x, dt, A, B, C):
    """The states in a loop over the steps; all tensors have all heads."""
    S, outputs = 0.0, []
    for t in range(x.shape[1]):
        written = (dt[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None]
        S = np.exp(dt[:, t] * A)[..., None, None] * S + written  # (b, h, p, n)
        outputs.append((S @ C[:, t, ..., None])[..., 0])
    return np.stack(outputs, axis=1)


def masked_attention(x, dt, A, B, C):
    """The dual form: (L ⊙ C Bᵀ) Δ x with L_ts = exp(Σ_{s<r<=t} Δ_r A)."""
    sums = np.cumsum(dt * A, axis=1)
    L = np.tril(np.exp(np.moveaxis(sums[:, :, None] - sums[:, None], 3, 1)))
    scores = np.einsum("bthn,bshn->bhts", C, B) * L
    return np.einsum("bhts,bshp->bthp", scores, dt[..., None] * x)


def linear_attention(x, dt, A, B, C):
    """Neither decay nor step sizes nor a sum of weights."""
    scores = np.tril(np.einsum("bthn,bshn->bhts", C, B))
    return np.einsum("bhts,bshp->bthp", scores, x)


def own_token(x, dt, A, B, C):
    """Nothing of the steps before."""
    return (B * C).sum(-1, keepdims=True) * dt[..., None] * x


def mixer(u, w, groups=1, form=recurrence, limit=(0.0, np.inf)):
    """The equations of the module in float64."""
    width, heads = len(w["norm/gamma"]), len(w["D"])
    projected = u @ w["in_proj/kernel"]
    z, x, dt = np.split(projected, [width, projected.shape[-1] - heads], axis=-1)
    x = silu(convolved(x, w["conv/kernel"], w.get("conv/bias", 0.0)))
    size = (x.shape[-1] - width) // 2
    x, B, C = np.split(x, [width, width + size], axis=-1)
    dt = np.clip(np.log1p(np.exp(dt + w["dt_bias"])), *limit)
    x = x.reshape(*x.shape[:2], heads, -1)
    B, C = (
        m.reshape(*m.shape[:2], groups, -1).repeat(heads // groups, axis=2)
        for m in (B, C)
    )
    y = form(x, dt, -np.exp(w["A_log"]), B, C) + w["D"][:, None] * x
    y = y.reshape(*y.shape[:2], width) * silu(z)
    return rms_norm(y, w["norm/gamma"], groups) @ w["out_proj/kernel"]


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
    sizes = dict(embed_size=3, hidden_size=4, window_size=None, **SMALL)
    options = {**sizes, "return_sequences": True, **options}
    keras.utils.set_random_seed(0)
    return shake(keras_edifice.build("mamba_ssd", **options))


def block(features=4, **options):
    keras.utils.set_random_seed(0)
    built = Mamba2Block(**{**SMALL, **options})
    built.build((None, None, features))
    return shake(built)


def run(layer, x, **options):
    """The call of a layer with options that are no arrays to be traced."""
    return compiled(lambda x: layer(x, **options))(ops.convert_to_tensor(x))


def predict(model, x):
    return model.predict(x, verbose=0)


def inputs(length=11, features=3):
    return rng.normal(size=(2, length, features)).astype("float32")


@pytest.mark.parametrize("form", [recurrence, masked_attention])
@pytest.mark.parametrize("num_groups", [1, 2, HEADS])
def test_output_is_the_equation_and_its_dual(num_groups, form):
    built, x = model(num_groups=num_groups, chunk_size=4), inputs()
    assert_close(
        predict(built, x), reference(x, built, groups=num_groups, form=form), 1e-4
    )


def test_gradient_is_that_of_the_equation():
    built, x = model(num_groups=2, chunk_size=2), inputs(5)
    by_weight, by_input = gradients(built, x, lambda y: ops.sum(ops.square(y)))

    def value(z):
        return np.square(reference(z, built, groups=2)).sum()

    assert_close(by_input, numerical_gradient(value, x), 1e-4)
    for variable, gradient in zip(built.trainable_variables, by_weight, strict=True):
        if variable.name in ("A_log", "D", "dt_bias"):
            assert np.all(np.abs(gradient) > 0), f"{variable.path} does not learn"


def test_a_single_chunk_is_masked_attention():
    mamba, u = block(num_groups=2, chunk_size=16), inputs(11, 4)
    expected = mixer(to_numpy(u), named_weights(mamba), 2, masked_attention)
    assert_close(run(mamba, u), expected)


def test_without_decay_and_step_sizes_it_is_linear_attention():
    mamba, u = block(dt_limit=[1.0, 1.0]), inputs(11, 4)
    mamba.A_log.assign(np.full(HEADS, -200.0))
    expected = mixer(to_numpy(u), named_weights(mamba), form=linear_attention)
    assert_close(run(mamba, u), expected)


def test_with_total_decay_each_token_sees_itself_alone():
    mamba, u = block(), inputs(11, 4)
    mamba.A_log.assign(np.full(HEADS, 20.0))
    expected = mixer(to_numpy(u), named_weights(mamba), form=own_token)
    assert_close(run(mamba, u), expected)


def test_one_group_is_as_many_groups_as_heads_with_equal_weights():
    one, all_heads = block(num_groups=1), block(num_groups=HEADS)
    for variable, source in zip(all_heads.weights, one.weights, strict=True):
        value = source.numpy()
        if variable.shape != source.shape:
            start = 2 * WIDTH if variable.name == "kernel" else WIDTH
            start = WIDTH if variable.path.split("/")[-2] == "conv" else start
            parts = [start, start + STATE, start + 2 * STATE]
            x, B, C, rest = np.split(value, parts, axis=-1)
            B, C = (np.concatenate([m] * HEADS, axis=-1) for m in (B, C))
            value = np.concatenate([x, B, C, rest], axis=-1)
        variable.assign(value)
    u = inputs(11, 4)
    (_, (_, S)), (_, (_, expected)) = (
        run(mamba, u, return_state=True) for mamba in (all_heads, one)
    )
    assert_close(S, expected)
    # Only the gated norm takes the groups apart.
    expected = mixer(to_numpy(u), named_weights(all_heads), HEADS)
    assert_close(run(all_heads, u), expected)


@pytest.mark.parametrize("limit", [[0.0, 0.3], [0.9, 5.0]])
def test_step_sizes_stay_within_their_limit(limit):
    mamba, u = block(dt_limit=limit), inputs(11, 4)
    weights = named_weights(mamba)
    expected = mixer(to_numpy(u), weights, limit=limit)
    assert_close(run(mamba, u), expected)
    assert difference(mixer(to_numpy(u), weights), expected) > 1e-3


def test_initial_weights_are_those_of_the_paper():
    keras.utils.set_random_seed(0)
    built = Mamba2Block(head_dim=1, depth=9)
    built.build((None, None, 64))
    weights = named_weights(built)
    rates = np.exp(weights["A_log"])
    assert 1.0 <= rates.min() < 2 < 15 < rates.max() <= 16.0
    assert abs(np.median(rates) - 8.5) < 3  # uniform; log-uniform would give 4
    assert_close(weights["D"], np.ones(128), 0)
    dt = np.log1p(np.exp(weights["dt_bias"]))
    assert 0.001 * (1 - 1e-5) <= dt.min() < 0.002
    assert 0.05 < dt.max() <= 0.1 * (1 + 1e-5)
    assert abs(np.median(np.log(dt)) - np.log(0.01)) < 0.5  # uniform in the logarithm
    bounds = {"in_proj/kernel": 64**-0.5, "out_proj/kernel": 128**-0.5 / 3}
    for name, bound in bounds.items():
        assert 0.95 * bound < np.abs(weights[name]).max() <= bound


def test_initial_weights_follow_their_options():
    built = Mamba2Block(
        head_dim=1, dt_min=1e-6, dt_max=0.5, dt_init_floor=0.01, a_init_range=[2, 3]
    )
    built.build((None, None, 64))
    weights = named_weights(built)
    dt, rates = np.log1p(np.exp(weights["dt_bias"])), np.exp(weights["A_log"])
    assert_close(dt.min(), 0.01)
    assert 0.1 < dt.max() <= 0.5 * (1 + 1e-5)
    assert 2 - 1e-5 <= rates.min() < 2.2 < 2.8 < rates.max() <= 3 + 1e-5


def test_every_chunk_size_is_the_same_function():
    x, results = inputs(21, 4), []
    for chunk_size in (32, 1, 8):
        built = block(chunk_size=chunk_size)
        by_weight, _ = gradients(built, x, lambda y: ops.sum(ops.square(y)))
        results.append((run(built, x), by_weight))
    for y, by_weight in results[1:]:
        assert_close(y, results[0][0])
        for ours, expected in zip(by_weight, results[0][1], strict=True):
            # That of a decay is a difference of sums far larger than itself.
            assert difference(ours, expected) < 1e-3


@pytest.mark.parametrize("pool", ["last", "mean"])
def test_token_by_token_is_the_whole_sequence(pool):
    x = inputs()
    options = dict(num_groups=2, dt_limit=[0.1, 2.0])
    whole = model(**options)
    assert_close(stream(whole, x), predict(whole, x))
    pooled = model(return_sequences=False, pool=pool, **options)
    outputs = stream(pooled, x)
    for t in (0, 5, 10):
        assert_close(outputs[:, t], predict(pooled, x[:, : t + 1]))


def test_segments_with_the_carried_state_are_one_pass():
    mamba, x = block(num_groups=2, chunk_size=4), inputs(11, 4)
    first, state = run(mamba, x[:, :2], return_state=True)
    second, state = run(mamba, x[:, 2:], initial_state=state, return_state=True)
    whole, expected = run(mamba, x, return_state=True)
    assert_close(ops.concatenate([first, second], axis=1), whole)
    for part, whole_part in zip(state, expected, strict=True):
        assert_close(part, whole_part)


def test_future_tokens_do_not_change_the_past():
    built, x = model(chunk_size=8), inputs(40)
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
        built = model(return_sequences=False, pool=pool, dt_limit=[0.1, 2.0])
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


def test_the_convolution_runs_over_keys_and_queries_too():
    mamba, x = block(), inputs(11, 4)
    assert mamba.conv.kernel.shape == (4, WIDTH + 2 * STATE)
    before = run(mamba, x)
    for part in (slice(WIDTH, WIDTH + STATE), slice(WIDTH + STATE, None)):
        kernel = mamba.conv.kernel.numpy()
        kernel[:3, part] = 0.0
        mamba.conv.kernel.assign(kernel)
        after = run(mamba, x)
        assert difference(after, before) > 1e-3
        before = after


def test_tokens_give_logits():
    keras.utils.set_random_seed(0)
    sizes = dict(hidden_size=4, window_size=None, **SMALL)
    tokens = np.array([[3, 1, 4, 1, 5]])
    for tie in (True, False):
        built = keras_edifice.build(
            "mamba_ssd", vocab_size=7, tie_embeddings=tie, **sizes
        )
        assert predict(shake(built), tokens).shape == (1, 5, 7)
        assert_close(stream(built, tokens), predict(built, tokens))


def test_biases_are_where_the_options_put_them():
    def names(**options):
        return set(named_weights(block(**options)))

    assert names() - names(conv_bias=False) == {"conv/bias"}
    assert not any("proj/bias" in name for name in names())


def test_long_sequences_stay_finite():
    mamba = block(features=2, state_size=2)
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
    options = dict(conv_bias=False, dt_min=0.001, dt_max=0.05)
    half, full = (
        block(dtype=dtype, **options) for dtype in ("mixed_bfloat16", "float32")
    )
    nothing = np.zeros((2, 5, 4), "float32")
    S = rng.normal(size=(2, HEADS, STATE, HEAD_DIM)).astype("float32")
    (_, (_, found)), (_, (_, expected)) = (
        run(
            built,
            nothing,
            initial_state=(built.conv.initial_state(2), S),
            return_state=True,
        )
        for built in (half, full)
    )
    assert np.abs(to_numpy(expected)).max() > 0.1
    assert difference(found, expected) < 1e-5


@pytest.mark.parametrize("variant", SIZES)
def test_published_sizes(variant):
    width = keras_edifice.info("mamba_ssd").variants[variant]["hidden_size"]
    features = count_weights("mamba_ssd", embed_size=width, variant=variant)
    assert features == (SIZES[variant], 0)
    tokens = count_weights("mamba_ssd", vocab_size=50_288, variant=variant)
    assert tokens == (SIZES[variant] + 50_288 * width, 0)


def test_config_keeps_the_arguments():
    options = dict(
        state_size=5,
        head_dim=3,
        expand_factor=3,
        num_groups=2,
        conv_size=2,
        chunk_size=9,
        a_init_range=[2.0, 4.0],
        dt_min=0.01,
        dt_max=0.2,
        dt_init_floor=1e-3,
        dt_limit=[0.1, 7.0],
        conv_bias=False,
        norm_eps=1e-6,
        depth=3,
    )
    config = Mamba2Block(**options).get_config()
    assert {name: config[name] for name in options} == options


def test_an_open_limit_survives_saving(tmp_path):
    built, x = model(num_layers=1), inputs()
    built.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.get_layer("mamba_0").dt_limit == [0.0, float("inf")]
    assert_close(predict(loaded, x), predict(built, x), 1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(head_dim=3), "must be a multiple of head_dim, received 8 and 3"),
        (dict(num_groups=3), "must be a multiple of num_groups, received 4 and 3"),
        (dict(dt_limit=[1.0, 0.5]), r"dt_limit must be two .* received \[1.0, 0.5\]"),
        (dict(a_init_range=[1.0]), r"a_init_range must be two .* received \[1.0\]"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        block(**options)
