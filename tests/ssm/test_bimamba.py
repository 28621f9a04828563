import keras
import numpy as np
import pytest
from keras import ops

import keras_edifice
from keras_edifice.ssm.bimamba import BiMambaBlock
from keras_edifice.ssm.mamba import MambaBlock
from tests.ssm.test_mamba import mixer, named_weights, rms_norm
from tests.support.close import assert_close, difference, to_numpy
from tests.support.compiled import compiled
from tests.support.counting import count_weights
from tests.support.gradients import gradients
from tests.support.numerical import numerical_gradient
from tests.support.shaking import shake

rng = np.random.default_rng(0)
CORE = dict(state_size=3)
COMBINATIONS = ["add", "mean", "concat", "multiply"]


def block(features=4, **options):
    keras.utils.set_random_seed(0)
    built = BiMambaBlock(**{"dt_rank": 2, "core": CORE, **options})
    built.build((None, None, features))
    return shake(built)


def model(**options):
    sizes = dict(embed_size=3, hidden_size=4, state_size=3, dt_rank=2, num_layers=2)
    sizes |= dict(window_size=None, return_sequences=True, dropout=0.0)
    keras.utils.set_random_seed(0)
    return shake(keras_edifice.build("bimamba", **{**sizes, **options}))


def direction(u, w, core, end, **options):
    """One direction before W_out: the mixer of Mamba with the identity there."""
    own = {
        name.removeprefix(f"{core}/"): value
        for name, value in w.items()
        if name.startswith(f"{core}/")
    }
    own["in_proj/kernel"] = w.get(f"in_proj{end}/kernel", w["in_proj/kernel"])
    own["out_proj/kernel"] = np.eye(len(own["D"]))
    return mixer(u, own, **options)


def reference(u, w, combine="add", **options):
    """The equations of the module in float64."""
    ahead = direction(u, w, "ahead", "", **options)
    back = direction(u[:, ::-1], w, "back", "_back", **options)[:, ::-1]
    out = w["out_proj/kernel"]
    if combine == "concat":
        return np.concatenate([ahead, back], axis=-1) @ out
    ahead, back = ahead @ out, back @ w.get("out_proj_back/kernel", out)
    if combine == "multiply":
        return ahead * back
    return (ahead + back) / (2 if combine == "mean" else 1)


def run(layer, x, **options):
    """The call of a layer with options that are no arrays to be traced."""
    return compiled(lambda x: layer(x, **options))(ops.convert_to_tensor(x))


def predict(model, x):
    return model.predict(x, verbose=0)


def inputs(length=9, features=4):
    return rng.normal(size=(2, length, features)).astype("float32")


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("combine", COMBINATIONS)
def test_output_is_the_equation(combine, tie):
    built, x = block(combine=combine, tie_projections=tie), inputs()
    assert_close(run(built, x), reference(x, named_weights(built), combine), 2e-5)


def test_options_reach_both_directions():
    core = dict(CORE, inner_norms=True, discretization="zoh")
    built, x = block(core=core), inputs()
    options = dict(inner_norms=True, zoh=True)
    assert_close(run(built, x), reference(x, named_weights(built), **options), 2e-5)


def test_gradient_is_that_of_the_equation():
    built, x = block(), inputs(5)
    by_weight, by_input = gradients(built, x, lambda y: ops.sum(ops.square(y)))
    w, exact = named_weights(built), to_numpy(x)

    def value(name, z):
        return np.square(reference(exact, {**w, name: z})).sum()

    expected = numerical_gradient(lambda z: np.square(reference(z, w)).sum(), exact)
    assert difference(by_input, expected) < 1e-4
    for variable, gradient in zip(built.trainable_variables, by_weight, strict=True):
        name = variable.path.removeprefix(f"{built.path}/")
        if name.startswith("back/") or "proj" in name:
            expected = numerical_gradient(lambda z, name=name: value(name, z), w[name])
            assert difference(gradient, expected) < 1e-4, name


def test_model_is_a_pre_norm_stack_with_feed_forwards():
    built, x = model(mlp_ratio=1.5), inputs(features=3)
    y = to_numpy(x) @ to_numpy(built.get_layer("embed").kernel)
    for i in range(2):
        gamma = to_numpy(built.get_layer(f"bimamba_{i}_norm").gamma)
        weights = named_weights(built.get_layer(f"bimamba_{i}"))
        y = y + reference(rms_norm(y, gamma), weights)
        mlp = built.get_layer(f"mlp_{i}")
        assert mlp.width == 6
        normed = rms_norm(y, to_numpy(built.get_layer(f"mlp_{i}_norm").gamma))
        y = y + to_numpy(mlp(normed.astype("float32")))
    y = rms_norm(y, to_numpy(built.get_layer("final_norm").gamma))
    assert_close(predict(built, x), y, 1e-4)


@pytest.mark.parametrize("combine", ["add", "mean", "multiply"])
def test_equal_directions_commute_with_reversal(combine):
    built, x = block(combine=combine), inputs()
    reverse = x[:, ::-1].copy()
    assert difference(run(built, reverse), to_numpy(run(built, x))[:, ::-1]) > 1e-3
    built.back.set_weights(built.ahead.get_weights())
    assert_close(run(built, reverse), to_numpy(run(built, x))[:, ::-1], 1e-6)


def test_without_the_backward_direction_it_is_mamba():
    built, x = block(), inputs()
    built.back.conv.kernel.assign(np.zeros((4, 8)))  # x = SiLU(0) = 0, so y = 0
    built.back.conv.bias.assign(np.zeros(8))
    mamba = MambaBlock(dt_rank=2, **CORE)
    mamba.build((None, None, 4))
    ours = named_weights(built)
    for variable in mamba.weights:
        name = variable.path.removeprefix(f"{mamba.path}/")
        variable.assign(ours[name] if name in ours else ours[f"ahead/{name}"])
    assert_close(run(built, x), run(mamba, x), 1e-6)


def test_shared_projections_are_separate_ones_that_agree():
    tied, untied, x = block(), block(tie_projections=False), inputs()
    for end in ("", "_back"):
        for name in ("in_proj", "out_proj"):
            kernel = getattr(tied, name).kernel
            getattr(untied, f"{name}{end}").kernel.assign(kernel)
    for name in ("ahead", "back"):
        getattr(untied, name).set_weights(getattr(tied, name).get_weights())
    assert_close(run(tied, x), run(untied, x))


def test_each_step_sees_both_sides():
    built, x = block(), inputs()
    changed = x.copy()
    changed[:, 4] += 1.0
    moved = np.abs(to_numpy(run(built, changed)) - to_numpy(run(built, x)))
    assert (moved.max((0, 2)) > 1e-5).all()


@pytest.mark.parametrize("pool", ["last", "mean"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(side, pool):
    x, built = inputs(features=3), model(return_sequences=False, pool=pool)
    valid = slice(4) if side == "right" else slice(5, None)
    mask = np.zeros((2, 9), "bool")
    mask[:, valid] = True
    y = run(built, x, mask=ops.convert_to_tensor(mask))
    assert_close(y, predict(built, x[:, valid]), 2e-5)


def test_it_does_not_stream():
    with pytest.raises(ValueError, match="bimamba cannot run token by token") as error:
        keras_edifice.streaming(model())
    assert "\n" not in str(error.value)
    assert not keras_edifice.info("bimamba").causal


def test_each_direction_starts_as_mamba():
    keras.utils.set_random_seed(0)
    built = BiMambaBlock(depth=9)
    built.build((None, None, 64))
    for core in (built.ahead, built.back):
        rates = np.log(np.arange(1.0, 17))[None].repeat(128, 0)
        assert_close(core.A_log, rates, 1e-6)
        assert_close(core.D, np.ones(128), 0)
        dt = np.log1p(np.exp(to_numpy(core.dt_bias)))
        assert 0.001 <= dt.min() < 0.002 and 0.05 < dt.max() <= 0.1 * (1 + 1e-5)
        for name, bound in {"x_proj": 128**-0.5, "dt_proj": 4**-0.5}.items():
            largest = np.abs(to_numpy(getattr(core, name).kernel)).max()
            assert 0.95 * bound < largest <= bound
    for dense, bound in {built.in_proj: 1 / 8, built.out_proj: 128**-0.5 / 3}.items():
        assert 0.95 * bound < np.abs(to_numpy(dense.kernel)).max() <= bound
    assert difference(built.ahead.x_proj.kernel, built.back.x_proj.kernel) > 0.5


def test_long_sequences_stay_finite():
    built, x = block(features=2, dt_rank=1), inputs(4096, 2)
    for scale in (1.0, 1e3):
        assert np.isfinite(to_numpy(run(built, scale * x))).all()


def test_half_precision_keeps_the_recurrences_in_float32():
    half, full = (block(dtype=dtype) for dtype in ("mixed_bfloat16", "float32"))
    half.set_weights(full.get_weights())
    x = inputs()
    for core in (half.ahead, half.back):
        _, h = core.initial_state(2)
        for part in (core.A_log, core.dt_bias, h):
            assert keras.backend.standardize_dtype(part.dtype) == "float32"
    # bfloat16 keeps 8 bits, in the projections around the recurrences.
    assert difference(ops.cast(run(half, x), "float32"), run(full, x)) < 0.05


def test_number_of_weights():
    H, N, k = 16, 5, 3
    E, R = 2 * H, 1
    sizes = dict(embed_size=H, hidden_size=H, state_size=N, conv_size=k, num_layers=2)
    (one, _), (two, _) = (count_weights(m, **sizes) for m in ("mamba", "bimamba"))
    second = E * (k + 1) + E * (R + 2 * N) + R * E + E + E * N + E
    assert two - one == 2 * second


def test_config_keeps_the_arguments():
    options = dict(
        combine="concat",
        tie_projections=False,
        expand_factor=3,
        dt_rank=2,
        use_bias=True,
        depth=5,
        core=dict(state_size=4, scan="cumsum"),
    )
    config = BiMambaBlock(**options).get_config()
    assert {name: config[name] for name in options} == options


def test_unknown_combinations_are_refused():
    with pytest.raises(ValueError, match="combine must be one of .*, received 'x'"):
        BiMambaBlock(combine="x")
