import math

import keras
import numpy as np
import pytest

import keras_edifice
from keras_edifice.blocks.layer_norm import LayerNorm
from tests.support.close import assert_close, to_numpy
from tests.support.counting import count_weights
from tests.support.shaking import shake

rng = np.random.default_rng(0)
SMALL = dict(
    num_channels=2,
    patch_size=2,
    depths=[1, 2],
    hidden_sizes=[4, 6],
    kernel_size=3,
    num_classes=3,
    classifier_activation=None,
)


def small(**options):
    return shake(keras_edifice.build("convnext", **{**SMALL, **options}))


def images(side=8, examples=2):
    return rng.normal(size=(examples, side, side, 2)).astype("float32")


def normalise(x, gamma, beta):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6) * gamma + beta


def patches(x, kernel, bias):
    side = kernel.shape[0]
    b, rows, columns = len(x), x.shape[1] // side, x.shape[2] // side
    x = x[:, : rows * side, : columns * side]
    x = x.reshape(b, rows, side, columns, side, -1)
    return np.einsum("bricjk,ijkd->brcd", x, kernel) + bias


def depthwise(x, kernel, bias):
    border = kernel.shape[0] // 2
    padded = np.pad(x, [(0, 0), (border, border), (border, border), (0, 0)])
    y = np.zeros_like(x) + bias
    for i, row in enumerate(kernel):
        for j, weights in enumerate(row):
            y += padded[:, i : i + x.shape[1], j : j + x.shape[2]] * weights[:, 0]
    return y


def reference(x, weights, depths=(1, 2)):
    """The blocks of figure 4 in float64."""
    w = iter(to_numpy(weight) for weight in weights)
    x = normalise(patches(x, next(w), next(w)), next(w), next(w))
    for stage, depth in enumerate(depths):
        if stage:
            x = normalise(x, next(w), next(w))
            x = patches(x, next(w), next(w))
        for _ in range(depth):
            y = normalise(depthwise(x, next(w), next(w)), next(w), next(w))
            y = y @ next(w) + next(w)
            y = y * (1 + np.vectorize(math.erf)(y / math.sqrt(2))) / 2
            x = x + (y @ next(w) + next(w)) * next(w)
    return normalise(x.mean((1, 2)), next(w), next(w)) @ next(w) + next(w)


def test_output_is_the_equations():
    model, x = small(), images(11)
    assert_close(model(x), reference(x.astype("float64"), model.weights), 1e-4)


@pytest.mark.parametrize(
    ("variant", "published"),
    [
        ("tiny", 28_589_128),
        ("small", 50_223_688),
        ("base", 88_591_464),
        ("large", 197_767_336),
        ("xlarge", 350_196_968),
    ],
)
def test_published_sizes(variant, published):
    assert count_weights("convnext", variant=variant) == (published, 0)


def test_size_does_not_depend_on_the_image():
    sizes = {count_weights("convnext", image_size=s) for s in (None, 32, 224)}
    assert len(sizes) == 1


def test_blocks_whose_factor_is_zero_are_the_identity():
    model = shake(keras_edifice.build("convnext", **SMALL, layer_scale=0.0))
    names = ["stage1_block1", "stage2_block1", "stage2_block2"]
    for name in names:
        gamma = model.get_layer(f"{name}_scale").gamma
        gamma.assign(np.zeros(gamma.shape))
    ends = [model.get_layer(f"{name}_add") for name in names]
    pairs = [(layer.input[0], layer.output) for layer in ends]
    for before, after in keras.Model(model.input, pairs)(images()):
        assert_close(after, before, 0)
        assert to_numpy(after).any()


def test_factors_start_where_they_were_asked_to():
    model = keras_edifice.build("convnext", **SMALL)
    for block in ("stage1_block1", "stage2_block2"):
        gamma = to_numpy(model.get_layer(f"{block}_scale").gamma)
        assert_close(gamma, np.full(len(gamma), 1e-6), 1e-9)
    without = keras_edifice.build("convnext", **SMALL, layer_scale=None)
    assert model.count_params() - without.count_params() == 4 + 2 * 6


def test_depthwise_convolution_keeps_channels_and_places_apart():
    layer = small().get_layer("stage1_block1_depthwise")
    x = rng.normal(size=(1, 7, 7, 4)).astype("float32")
    changed = x.copy()
    changed[0, 3, 3, 1] += 1
    moved = to_numpy(layer(changed)) != to_numpy(layer(x))
    assert moved[0, 2:5, 2:5, 1].all()
    assert moved.sum() == 9


def test_convolutions_have_biases_and_nothing_normalises_over_the_batch():
    found = {type(layer) for layer in small().layers}
    assert keras.layers.BatchNormalization not in found
    assert keras.layers.Activation not in found  # the one GELU is within the MLP
    assert small().get_layer("stage1_block1_depthwise").use_bias


def test_last_norm_comes_after_the_pooling():
    model = small()
    pool, norm = model.get_layer("pool"), model.get_layer("norm")
    assert isinstance(norm, LayerNorm)
    assert norm.input is pool.output
    assert pool.input is model.get_layer("stage2_block2_add").output


def test_pooling_is_the_mean_the_maximum_or_none():
    x, options = images(), dict(num_classes=None)
    model, maximum = small(**options), small(pooling="max", **options)
    whole = small(pooling=None, **options)
    maximum.set_weights(model.get_weights())
    whole.set_weights(model.get_weights()[:-2])  # without the last norm
    y, norm = to_numpy(whole(x)), [to_numpy(w) for w in model.get_layer("norm").weights]
    assert_close(model(x), normalise(y.mean((1, 2)), *norm), 1e-4)
    assert_close(maximum(x), normalise(y.max((1, 2)), *norm), 1e-4)
    with pytest.raises(ValueError, match="when there are classes, received None"):
        small(pooling=None)


def test_stage_maps_have_their_strides():
    model = small(features_only=True, patch_size=4)
    shapes = {name: tuple(y.shape) for name, y in model(images(16)).items()}
    assert shapes == {"stride_4": (2, 4, 4, 4), "stride_8": (2, 2, 2, 6)}


def test_branches_are_dropped_more_often_in_later_blocks():
    model = small(drop_path=0.2, depths=[2, 1])
    rates = {x.name: x.rate for x in model.layers if "drop_path" in x.name}
    assert rates == {"stage1_block2_drop_path": 0.1, "stage2_block1_drop_path": 0.2}


@pytest.mark.parametrize("option", ["drop_path", "dropout"])
def test_regularisers_act_in_training_alone(option):
    quiet = dict(drop_path=0.0, dropout=0.0)
    model, x = small(**{**quiet, option: 0.5}), images(examples=8)
    assert_close(model(x), model(x), 0)
    assert np.abs(to_numpy(model(x, training=True)) - to_numpy(model(x))).max() > 0.1


def test_weights_start_truncated():
    keras.utils.set_random_seed(0)
    model = keras_edifice.build("convnext", **{**SMALL, "hidden_sizes": [48, 64]})
    for weight in model.weights:
        if weight.name == "kernel":
            outside = np.mean(np.abs(to_numpy(weight)) > 0.04)
            assert outside < 1e-3, weight.path  # PyTorch lets one in a million pass
        elif weight.name == "bias":
            assert not to_numpy(weight).any()
    kernel = to_numpy(model.get_layer("stage2_block1_mlp").first.kernel)
    assert 0.0170 < kernel.std() < 0.0182  # 0.02, cut at two deviations: 0.0176


def test_stages_need_a_depth_and_a_width_each():
    with pytest.raises(ValueError, match="one number for each stage, received 3 and 2"):
        small(depths=[1, 1, 1])


def test_images_smaller_than_one_pixel_of_the_last_map_are_refused():
    with pytest.raises(ValueError, match="at least 16 for 3 stages .* received 15"):
        small(image_size=15, patch_size=4, depths=[1, 1, 1], hidden_sizes=[2, 2, 2])


def test_head_gives_probabilities_unless_logits_are_asked_for():
    model = small(classifier_activation="softmax")
    assert_close(keras.ops.sum(model(images()), -1), np.ones(2))
