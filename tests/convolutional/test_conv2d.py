import keras
import numpy as np
import pytest

import keras_edifice
from keras_edifice.convolutional.conv2d import GroupedConv2D
from tests.support.close import assert_close, to_numpy
from tests.support.compiled import compiled
from tests.support.counting import count_weights
from tests.support.gradients import gradients
from tests.support.shaking import shake

rng = np.random.default_rng(0)


def model(**options):
    """With moving statistics that matter, too."""
    options = {**dict(input_channels=2, hidden_sizes=[4, 6]), **options}
    built = shake(keras_edifice.build("conv2d", **options))
    for weight in built.non_trainable_variables:
        if weight.name.startswith("moving_"):
            weight.assign(rng.uniform(0.5, 1.5, weight.shape))
    return built


def images(*sides, examples=2, channels=2):
    return rng.normal(size=(examples, *(sides or (9, 9)), channels)).astype("float32")


def convolve(x, kernel, padding="same", strides=1, dilation=1, groups=1):
    """One number at a time, in float64."""
    height, width, per_group, filters = kernel.shape
    rows, columns = ((n - 1) * dilation for n in (height, width))
    if padding == "same":
        borders = [(n // 2, n - n // 2) for n in (rows, columns)]
        x = np.pad(x, [(0, 0), *borders, (0, 0)])
    down = (x.shape[1] - rows - 1) // strides + 1
    right = (x.shape[2] - columns - 1) // strides + 1
    y = np.zeros((len(x), down, right, filters))
    for o in range(filters):
        first = o // (filters // groups) * per_group
        for u in range(down):
            for v in range(right):
                window = x[:, u * strides :, v * strides :]
                window = window[:, : rows + 1 : dilation, : columns + 1 : dilation]
                window = window[..., first : first + per_group]
                y[:, u, v, o] = (window * kernel[..., o]).sum((1, 2, 3))
    return y


def reference(x, model, norm="batch", pooling=None, **convolution):
    """The equation of the module in float64."""
    w, x = {v.path: to_numpy(v) for v in model.weights}, np.asarray(x, "float64")
    for i in range(2):
        name = f"block_{i}"
        x = convolve(x, w[f"{name}_conv/kernel"], **convolution)
        if norm is None:
            x = x + w[f"{name}_conv/bias"]
        elif norm == "layer":
            x = (x - x.mean(-1, keepdims=True)) / np.sqrt(
                x.var(-1, keepdims=True) + 1e-5
            )
        else:
            centred = x - w[f"{name}_norm/moving_mean"]
            x = centred / np.sqrt(w[f"{name}_norm/moving_variance"] + 1e-3)
        if norm is not None:
            x = x * w[f"{name}_norm/gamma"] + w[f"{name}_norm/beta"]
        x = np.maximum(x, 0)
        if pooling is not None:
            down, right = x.shape[1] // 2, x.shape[2] // 2
            tiles = x[:, : 2 * down, : 2 * right].reshape(len(x), down, 2, right, 2, -1)
            x = tiles.max((2, 4)) if pooling == "max" else tiles.mean((2, 4))
    return x


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(padding="valid", dilation=2),
        dict(strides=2, norm="layer"),
        dict(norm=None, pooling="max"),
        dict(groups=2, pooling="avg"),
    ],
    ids=str,
)
def test_output_is_the_equation(options):
    built, x = model(**options, kernel_size=[[3, 2], [1, 3]]), images(9, 10)
    assert_close(compiled(built)(x), reference(x, built, **options), 1e-4)


def test_published_sizes():
    assert count_weights("conv2d") == (93_472, 448)


def test_bias_is_there_without_a_norm_alone():
    def names(**options):
        return {w.path for w in model(**options).weights if "block_0" in w.path}

    conv, norm = {"block_0_conv/kernel"}, {"block_0_norm/gamma", "block_0_norm/beta"}
    moving = {"block_0_norm/moving_mean", "block_0_norm/moving_variance"}
    assert names() == conv | norm | moving
    assert names(norm="layer") == conv | norm
    assert names(norm=None) == conv | {"block_0_conv/bias"}


@pytest.mark.parametrize("kernel_size", [[3], [[3, 3]], [[3], [3]], [[1, 2, 3]] * 2])
def test_kernels_must_be_one_or_a_pair_for_each_block(kernel_size):
    with pytest.raises(ValueError, match="kernel_size must .* for each"):
        model(kernel_size=kernel_size)


def test_strides_and_dilation_exclude_each_other():
    with pytest.raises(ValueError, match="received strides=2 and dilation=3"):
        model(strides=2, dilation=3)


def test_groups_must_divide_all_sizes():
    for sizes in [dict(hidden_sizes=[4, 5]), dict(input_channels=3)]:
        with pytest.raises(ValueError, match="must be a multiple of groups, received"):
            model(groups=2, **sizes)


@pytest.mark.parametrize("groups", [2, 3, 6])
@pytest.mark.parametrize("padding", ["same", "valid"])
def test_groups_see_their_own_channels_alone(groups, padding):
    layer, x = (
        GroupedConv2D(12, (3, 2), padding=padding, groups=groups),
        images(5, 6, channels=6),
    )
    layer.build(x.shape)
    shake(layer)
    kernel, bias = map(to_numpy, layer.weights)
    assert kernel.shape == (3, 2, 6 // groups, 12)
    expected = convolve(x, kernel, padding, groups=groups) + bias
    assert_close(layer(x), expected)
    assert layer.compute_output_shape(x.shape) == expected.shape


def test_a_channel_per_group_is_a_depthwise_convolution():
    x = images(5, 6, channels=3)
    ours = GroupedConv2D(6, 3, padding="same", groups=3, use_bias=False)
    theirs = keras.layers.DepthwiseConv2D(
        3, padding="same", depth_multiplier=2, use_bias=False
    )
    ours.build(x.shape)
    theirs.build(x.shape)
    theirs.set_weights([ours.get_weights()[0].reshape(3, 3, 3, 2)])
    assert_close(ours(x), theirs(x))


def test_groups_get_gradients_on_every_backend():
    built, x = model(groups=2), images(5, 5)
    by_weight, by_input = gradients(
        built, x, lambda y: keras.ops.sum(keras.ops.square(y))
    )
    for gradient in (*by_weight, by_input):
        assert np.isfinite(gradient).all()
        assert np.any(gradient != 0)


def test_plain_convolutions_are_those_of_keras():
    kinds = {type(z) for z in model().layers if "conv" in z.name}
    assert all(issubclass(kind, keras.layers.Conv2D) for kind in kinds)


def test_shifted_image_gives_the_shifted_map_away_from_the_borders():
    built, x = model(), images(12, 12)
    y = to_numpy(built(x))
    shifted = to_numpy(built(np.roll(x, (2, 1), axis=(1, 2))))
    assert_close(shifted[:, 4:-2, 3:-2], y[:, 2:-4, 2:-3], 1e-5)


def test_turned_image_and_kernels_give_the_turned_map():
    built, turned, x = model(), model(), images(7, 9)
    turned.set_weights([np.rot90(w) if w.ndim == 4 else w for w in built.get_weights()])
    y = np.rot90(to_numpy(built(x)), axes=(1, 2))
    assert_close(turned(np.rot90(x, axes=(1, 2)).copy()), y, 1e-5)


def test_images_of_any_size_are_classified():
    built = model(num_classes=3, pooling="max")
    for sides in [(8, 8), (9, 13)]:
        scores = to_numpy(compiled(built)(images(*sides)))
        assert scores.shape == (2, 3)
        assert_close(scores.sum(-1), np.ones(2))


def test_classes_are_scored_on_the_mean_of_the_map():
    x, whole = images(), model()
    built = model(num_classes=3, classifier_activation=None)
    *backbone, kernel, bias = built.get_weights()
    assert len(backbone) == len(whole.get_weights())
    by_path = {w.path: w for w in built.weights}
    for weight in whole.weights:
        weight.assign(by_path[weight.path].numpy())
    head = built.get_layer("predictions")
    expected = to_numpy(whole(x)).mean((1, 2)) @ to_numpy(head.kernel)
    assert_close(built(x), expected + to_numpy(head.bias))


@pytest.mark.parametrize(
    ("options", "strides"),
    [
        (dict(), (1,)),
        (dict(pooling="avg"), (2, 4)),
        (dict(strides=2), (2, 4)),
        (dict(strides=2, pooling="max"), (4, 16)),
    ],
)
def test_maps_have_their_strides(options, strides):
    maps = model(features_only=True, **options)(images(16, 16))
    assert {k: tuple(y.shape[1:]) for k, y in maps.items()} == {
        f"stride_{s}": (16 // s, 16 // s, [4, 6][i - len(strides)])
        for i, s in enumerate(strides)
    }


@pytest.mark.parametrize(("activation", "variance"), [("relu", 2), ("tanh", 1)])
@pytest.mark.parametrize("groups", [1, 32])
def test_kernels_start_as_the_activation_wants_it(activation, variance, groups):
    built = keras_edifice.build(
        "conv2d",
        input_channels=32,
        hidden_sizes=[32],
        activation=activation,
        groups=groups,
    )
    kernel = to_numpy(built.get_layer("block_0_conv").kernel)
    inputs, outputs = 9 * 32 // groups, 9 * 32
    # He: 2 / inputs. Glorot: 2 / (inputs + outputs).
    expected = 2 / inputs if variance == 2 else 2 / (inputs + outputs)
    # 288 draws at the least, whose deviation is known to 4 %.
    assert_close(kernel.std(), np.sqrt(expected), 0.2 if groups > 1 else 2e-2)


@pytest.mark.parametrize("spatial", [False, True])
def test_dropout_takes_single_numbers_or_whole_channels_in_training_alone(spatial):
    built = model(
        dropout=0.5, spatial_dropout=spatial, hidden_sizes=[64], activation="softplus"
    )
    y = to_numpy(built(images()))
    assert y.min() > 0
    z = to_numpy(built(images(), training=True))
    lost = (z == 0).mean((1, 2))
    assert 0.3 < lost.mean() < 0.7
    assert np.isin(lost, (0, 1)).all() == spatial


def test_config_keeps_the_arguments():
    options = dict(kernel_size=[[3, 2], [1, 3]], groups=2, spatial_dropout=True)
    built = model(**options)
    again = type(built).from_config(built.get_config())
    assert {name: again.options[name] for name in options} == options
    assert [w.path for w in again.weights] == [w.path for w in built.weights]
