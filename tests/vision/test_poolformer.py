import math

import keras
import numpy as np
import pytest

import keras_edifice
from keras_edifice.vision.poolformer import PoolMixer
from tests.support.close import assert_close, difference, to_numpy
from tests.support.compiled import compiled
from tests.support.counting import count_weights
from tests.support.initial import is_truncated
from tests.support.shaking import shake

rng = np.random.default_rng(0)
SMALL = dict(
    num_channels=2,
    depths=[1, 2],
    hidden_sizes=[4, 6],
    layer_scale=0.5,
    num_classes=3,
    classifier_activation=None,
)


def small(**options):
    return shake(keras_edifice.build("poolformer", **{**SMALL, **options}))


def images(side=15, channels=2, examples=2):
    return rng.normal(size=(examples, side, side, channels)).astype("float32")


def normalise(x, gamma, beta):
    centred = x - x.mean((1, 2, 3), keepdims=True)
    variance = (centred**2).mean((1, 2, 3), keepdims=True)
    return centred / np.sqrt(variance + 1e-5) * gamma + beta


def patches(x, kernel, bias, strides, padding):
    size = kernel.shape[0]
    x = np.pad(x, [(0, 0), *[(padding, padding)] * 2, (0, 0)])
    rows, columns = ((n - size) // strides + 1 for n in x.shape[1:3])
    y = np.zeros((len(x), rows, columns, kernel.shape[-1]))
    for i, j in np.ndindex(rows, columns):
        patch = x[:, i * strides :, j * strides :][:, :size, :size]
        y[:, i, j] = np.einsum("bijk,ijkd->bd", patch, kernel) + bias
    return y


def mix(x, size=3):
    """The mean of the neighbours that exist, less the pixel."""
    y, border = np.zeros_like(x), size // 2
    for i, j in np.ndindex(x.shape[1:3]):
        rows, columns = (slice(max(n - border, 0), n + border + 1) for n in (i, j))
        y[:, i, j] = x[:, rows, columns].mean((1, 2)) - x[:, i, j]
    return y


def reference(x, weights, depths=(1, 2), pool_size=3):
    """Algorithm 1 and equations 2 to 4 in float64."""
    w = iter(to_numpy(weight) for weight in weights)
    for stage, depth in enumerate(depths):
        strides, padding = (2, 1) if stage else (4, 2)
        x = patches(x, next(w), next(w), strides, padding)
        for _ in range(depth):
            x = x + mix(normalise(x, next(w), next(w)), pool_size) * next(w)
            y = normalise(x, next(w), next(w)) @ next(w) + next(w)
            y = y * (1 + np.vectorize(math.erf)(y / math.sqrt(2))) / 2
            x = x + (y @ next(w) + next(w)) * next(w)
    return normalise(x, next(w), next(w)).mean((1, 2)) @ next(w) + next(w)


@pytest.mark.parametrize(("side", "pool_size"), [(15, 3), (24, 5)])
def test_output_is_the_equations(side, pool_size):
    model, x = small(pool_size=pool_size), images(side)
    expected = reference(x.astype("float64"), model.weights, pool_size=pool_size)
    assert_close(compiled(model)(x), expected, 1e-4)


@pytest.mark.parametrize(
    ("variant", "published"),
    [
        ("s12", 11_915_176),
        ("s24", 21_388_968),
        ("s36", 30_862_760),
        ("m36", 56_172_520),
        ("m48", 73_473_448),
    ],
)
def test_published_sizes(variant, published):
    assert count_weights("poolformer", variant=variant) == (published, 0)


@pytest.mark.parametrize("pool_size", [1, 3, 5])
def test_mixer_of_a_constant_map_is_zero_at_the_border_too(pool_size):
    x = np.broadcast_to(rng.normal(size=(2, 1, 1, 3)), (2, 4, 6, 3)).astype("float32")
    assert_close(PoolMixer(pool_size)(x), np.zeros_like(x), 1e-6)


def test_mixer_takes_the_pixel_from_the_mean_of_its_neighbours():
    x = images(5, 3)
    assert_close(PoolMixer(3)(x), mix(x.astype("float64")))
    changed = x.copy()
    changed[:, 0, 4] += 1  # the end of a row is no neighbour of the next row's start
    moved = to_numpy(PoolMixer(3)(changed)) != to_numpy(PoolMixer(3)(x))
    assert moved[:, :2, 3:].all()
    assert moved.sum() == 2 * 2 * 2 * 3


def test_mixer_has_no_weights():
    layer = PoolMixer()
    layer.build((None, 4, 4, 3))
    assert not layer.weights


def test_window_without_a_middle_is_refused():
    with pytest.raises(ValueError, match="pool_size must be odd, .* received 2"):
        small(pool_size=2)


def test_statistics_are_those_of_the_whole_map():
    layer = small().get_layer("stage1_block1_mixer_norm")
    x = images(4, 4) * 3 + 5
    gamma, beta = (to_numpy(w) for w in layer.weights)
    assert layer.groups == 1
    assert_close(layer(x), normalise(x.astype("float64"), gamma, beta))


def test_blocks_whose_factor_is_zero_are_the_identity():
    model = small()
    for weight in model.weights:
        if "_scale/" in weight.path:
            weight.assign(np.zeros(weight.shape))
    names = [
        f"stage{s}_block{b}_{k}" for s, b in [(1, 1), (2, 2)] for k in ("mixer", "mlp")
    ]
    ends = [model.get_layer(f"{name}_add") for name in names]
    pairs = [(layer.input[0], layer.output) for layer in ends]
    for before, after in keras.Model(model.input, pairs)(images()):
        assert_close(after, before, 0)
        assert to_numpy(after).any()


def test_factors_start_where_they_were_asked_to():
    model = keras_edifice.build("poolformer", **{**SMALL, "layer_scale": 1e-5})
    for name in ("stage1_block1_mixer", "stage2_block2_mlp"):
        gamma = to_numpy(model.get_layer(f"{name}_scale").gamma)
        assert_close(gamma, np.full(len(gamma), 1e-5), 1e-9)
    without = keras_edifice.build("poolformer", **{**SMALL, "layer_scale": None})
    assert model.count_params() - without.count_params() == 2 * (4 + 2 * 6)


def test_last_norm_comes_before_the_pooling():
    model = small()
    assert isinstance(model.get_layer("norm"), keras.layers.GroupNormalization)
    assert model.get_layer("pool").input is model.get_layer("norm").output


def test_size_does_not_depend_on_the_image():
    sizes = {count_weights("poolformer", image_size=s) for s in (None, 32, 224)}
    assert len(sizes) == 1


def test_stage_maps_have_their_strides():
    maps = compiled(small(features_only=True))(images(32))
    shapes = {name: tuple(y.shape) for name, y in maps.items()}
    assert shapes == {"stride_4": (2, 8, 8, 4), "stride_8": (2, 4, 4, 6)}


def test_pooling_is_the_mean_the_maximum_or_none():
    x, options = images(), dict(num_classes=None)
    whole = small(pooling=None, **options)
    y = to_numpy(whole(x))
    for pooling, summary in [("avg", np.mean), ("max", np.max)]:
        model = small(pooling=pooling, **options)
        model.set_weights(whole.get_weights())
        assert_close(model(x), summary(y, axis=(1, 2)), 1e-6)


def test_branches_are_dropped_in_training_and_more_often_in_later_blocks():
    model, x = small(drop_path=0.5), images()
    assert_close(model(x), model(x), 0)
    assert np.abs(to_numpy(model(x, training=True)) - to_numpy(model(x))).max() > 0.1
    rates = {x.name: x.rate for x in model.layers if "drop_path" in x.name}
    assert rates == {
        "stage2_block1_mixer_drop_path": 0.25,
        "stage2_block1_mlp_drop_path": 0.25,
        "stage2_block2_mixer_drop_path": 0.5,
        "stage2_block2_mlp_drop_path": 0.5,
    }


def test_dropout_is_on_in_training_alone():
    model, x = small(dropout=0.5, drop_path=0.0), images()
    assert_close(model(x), model(x), 0)
    assert difference(model(x, training=True), model(x)) > 1e-3


def test_weights_start_truncated():
    keras.utils.set_random_seed(0)
    model = keras_edifice.build("poolformer", **{**SMALL, "hidden_sizes": [32, 48]})
    for weight in model.weights:
        if weight.name == "kernel":
            assert is_truncated(to_numpy(weight)), weight.path
        elif weight.name == "bias":
            assert not to_numpy(weight).any()


def test_config_keeps_the_arguments():
    layer = PoolMixer.from_config(PoolMixer(5, name="a").get_config())
    assert (layer.pool_size, layer.name) == (5, "a")


def test_stages_need_a_depth_and_a_width_each():
    with pytest.raises(ValueError, match="one number for each stage, received 3 and 2"):
        small(depths=[1, 1, 1])


def test_head_gives_probabilities_unless_logits_are_asked_for():
    model = small(classifier_activation="softmax")
    assert_close(keras.ops.sum(model(images()), -1), np.ones(2))
