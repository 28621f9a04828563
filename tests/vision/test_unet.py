import keras
import numpy as np
import pytest

import keras_edifice
from keras_edifice.vision.unet import PixelAttention
from tests.support.close import assert_close, to_numpy
from tests.support.convolution import (
    batch_norm,
    convolve,
    shake_statistics,
    values,
)
from tests.support.counting import count_weights, symbolic
from tests.support.gradients import gradients
from tests.support.shaking import shake

rng = np.random.default_rng(0)


def small(**options):
    given = dict(
        image_size=8, num_channels=2, out_channels=3, base_features=4, num_levels=2
    )
    model = keras_edifice.build("unet", **{**given, **options})
    return shake_statistics(shake(model, 0.1))


def images(side=8, examples=2):
    return rng.normal(size=(examples, side, side, 2)).astype("float32")


def convolutions(x, w, name, padding):
    for i in (1, 2):
        x = convolve(x, w[f"{name}_conv{i}/kernel"], 1, padding)
        x = x + w.get(f"{name}_conv{i}/bias", 0.0)
        if f"{name}_norm{i}/gamma" in w:
            x = batch_norm(x, w, f"{name}_norm{i}")
        x = np.maximum(x, 0)
    return x


def pooled(x):
    b, rows, columns, c = x.shape
    return x.reshape(b, rows // 2, 2, columns // 2, 2, c).max((2, 4))


def doubled(x, w, name, up):
    kernel, bias = w[f"{name}_up/kernel"], w[f"{name}_up/bias"]
    if up == "nearest":
        x = x.repeat(2, axis=1).repeat(2, axis=2)
        return convolve(x, kernel, 1, "same") + bias
    b, rows, columns, _ = x.shape
    y = np.einsum("brci,klfi->brkclf", x, kernel)
    return y.reshape(b, 2 * rows, 2 * columns, -1) + bias


def reference(x, model, padding="same", up="transpose", levels=2):
    """Figure 1 of the paper in float64."""
    w, skips = values(model), []
    for level in range(1, levels + 1):
        x = convolutions(x, w, f"down{level}", padding)
        skips.append(x)
        x = pooled(x)
    x = convolutions(x, w, "middle", padding)
    for level in range(levels, 0, -1):
        x, skip = doubled(x, w, f"up{level}", up), skips[level - 1]
        lost = (skip.shape[1] - x.shape[1]) // 2
        skip = skip[:, lost : lost + x.shape[1], lost : lost + x.shape[2]]
        x = np.concatenate([skip, x], axis=-1)
        x = convolutions(x, w, f"up{level}", padding)
    return convolve(x, w["logits/kernel"]) + w["logits/bias"]


@pytest.mark.parametrize("norm", ["batch", None])
@pytest.mark.parametrize("up", ["transpose", "nearest"])
def test_output_is_the_equations(norm, up):
    model, x = small(norm=norm, up=up), images()
    y = reference(x.astype("float64"), model, "same", up)
    assert y.shape == (2, 8, 8, 3)
    assert_close(model(x), y, 1e-4)


def test_output_without_padding_is_the_equations():
    model, x = small(padding="valid", image_size=None), images(44, examples=1)
    y = reference(x.astype("float64"), model, "valid")
    assert y.shape == (1, 4, 4, 3)
    assert_close(model(x), y, 1e-4)


@pytest.mark.parametrize(
    ("options", "published"),
    [
        (dict(variant="original"), 31_030_658),
        (dict(norm=None), 31_031_745),
        (dict(), 31_037_633),
    ],
)
def test_published_sizes(options, published):
    assert count_weights("unet", **options)[0] == published


def test_original_gives_388_pixels_of_572_and_crops_the_skips():
    model = symbolic("unet", variant="original")
    assert model.output_shape == (None, 388, 388, 2)
    crops = [model.get_layer(f"up{i}_crop").cropping[0][0] for i in (1, 2, 3, 4)]
    assert crops == [88, 40, 16, 4]
    assert model.get_layer("middle_conv2").output.shape[1] == 28


def test_zeroed_kernels_that_read_a_skip_remove_that_path_alone():
    model = small(norm=None)
    joined = model.get_layer("up1_concatenate").input  # [skip, upsampled]
    above = keras.Model(joined, model.output)
    skip, upsampled = map(to_numpy, keras.Model(model.input, joined)(images()))

    def effect(*changed):
        y = to_numpy(above([skip, upsampled]))
        return np.abs(to_numpy(above(list(changed))) - y).max()

    assert effect(skip + 1, upsampled) > 1e-2
    kernel = model.get_layer("up1_conv1").kernel
    values = to_numpy(kernel)
    values[:, :, : skip.shape[-1]] = 0
    kernel.assign(values)
    assert effect(skip + 1, upsampled) == 0
    assert effect(skip, upsampled + 1) > 1e-2


def test_moving_the_image_by_the_pooled_pixels_moves_the_output():
    model = small(image_size=None, norm=None)
    x = images(64, examples=1)
    y, moved = to_numpy(model(x)), to_numpy(model(np.roll(x, 4, axis=1)))
    # 22 pixels at the border see the padding
    assert_close(moved[:, 28:36, 24:40], y[:, 24:32, 24:40], 1e-4)
    assert np.abs(moved[:, 28:36, 24:40] - y[:, 28:36, 24:40]).max() > 1e-2


def test_finest_skip_gets_a_gradient_of_its_own():
    model, x = small(), images()
    for name in ("down2_conv1", "middle_conv2"):  # cut the way through the middle
        kernel = model.get_layer(name).kernel
        kernel.assign(np.zeros(kernel.shape))
    paths = [w.path for w in model.trainable_variables]
    by_weight, _ = gradients(model, x, lambda y: keras.ops.sum(keras.ops.square(y)))
    assert np.any(by_weight[paths.index("down1_conv1/kernel")] != 0)


def test_skips_are_concatenated_before_what_comes_from_below():
    model = small()
    for level in (1, 2):
        layer = model.get_layer(f"up{level}_concatenate")
        assert isinstance(layer, keras.layers.Concatenate)
        assert layer.input[0] is model.get_layer(f"down{level}_relu2").output
        assert layer.input[1] is model.get_layer(f"up{level}_up").output


def test_attention_lets_every_pixel_see_every_other():
    layer, x = PixelAttention(), rng.normal(size=(1, 3, 5, 4)).astype("float32")
    layer(x)
    shake(layer)
    changed = x.copy()
    changed[0, 2, 4, 1] += 1
    moved = np.abs(to_numpy(layer(changed)) - to_numpy(layer(x))).max(-1)
    assert moved.min() > 1e-5
    flipped = to_numpy(layer(x[:, ::-1, ::-1]))
    assert_close(flipped, to_numpy(layer(x))[:, ::-1, ::-1], 1e-5)


def test_attention_is_on_the_narrowest_map():
    model = small(use_attention=True)
    layer = model.get_layer("middle_attention")
    assert layer.input is model.get_layer("middle_relu2").output
    assert layer.output.shape == (None, 2, 2, 16)
    assert model(images()).shape == (2, 8, 8, 3)


def test_any_size_that_halves_evenly_is_taken():
    model = small(image_size=None)
    x = rng.normal(size=(1, 8, 12, 2)).astype("float32")
    assert tuple(model(x).shape) == (1, 8, 12, 3)


def test_sizes_that_do_not_halve_are_refused():
    with pytest.raises(ValueError, match="leaves 9 on level 2"):
        small(image_size=18)
    with pytest.raises(ValueError, match="leaves no pixels after 2 levels"):
        small(image_size=36, padding="valid")


def test_dropout_is_on_in_training_alone_and_at_the_narrowest_map():
    model, x = small(dropout=0.5, norm=None), images()
    assert model.get_layer("middle_dropout").output.shape[1] == 2
    assert_close(model(x), model(x), 0)
    assert np.abs(to_numpy(model(x, training=True)) - to_numpy(model(x))).max() > 0.01


def test_kernels_start_with_the_variance_of_the_incoming_nodes():
    keras.utils.set_random_seed(0)
    model = keras_edifice.build("unet", base_features=24, num_levels=1)
    for name, incoming in [
        ("down1_conv2", 9 * 24),
        ("up1_up", 48),
        ("middle_conv1", 216),
    ]:
        kernel = to_numpy(model.get_layer(name).kernel)
        assert abs(kernel.std() / np.sqrt(2 / incoming) - 1) < 0.06  # over 4000 draws
