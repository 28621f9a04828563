import keras
import numpy as np
import pytest

from keras_edifice.blocks.inverted_residual import inverted_residual, rounded_width
from keras_edifice.blocks.squeeze_excite import SqueezeExcite
from tests.support.close import assert_close, to_numpy
from tests.support.convolution import conv_unit, shake_statistics, values
from tests.support.shaking import shake

rng = np.random.default_rng(0)


def block(*args, **options):
    inputs = keras.Input((None, None, 3))
    outputs = inverted_residual(inputs, *args, name="block", **options)
    return shake_statistics(shake(keras.Model(inputs, outputs)))


def images(side=6):
    return rng.normal(size=(2, side, side, 3)).astype("float32")


def relu6(x):
    return np.clip(x, 0, 6)


@pytest.mark.parametrize(("filters", "strides"), [(3, 1), (3, 2), (5, 1)])
def test_output_is_the_equation(filters, strides):
    model, x = block(filters, 7, 5, strides), images()
    w = values(model)
    y = conv_unit(x.astype("float64"), w, "block_expand", 1, relu6)
    y = conv_unit(y, w, "block_depthwise", strides, relu6)
    y = conv_unit(y, w, "block_project")
    added = filters == 3 and strides == 1
    assert_close(model(x), y + x if added else y)
    assert y.min() < 0  # the projection has no activation


def test_branch_that_is_zero_leaves_the_input():
    model, x = block(3, 7), images()
    norm = model.get_layer("block_project_norm")
    for weight in (norm.gamma, norm.beta):
        weight.assign(np.zeros(3))
    assert_close(model(x), x, 0)


def test_no_expansion_where_it_would_keep_the_width():
    names = {layer.name for layer in block(3, 3).layers}
    assert "block_depthwise_conv" in names
    assert not any("expand" in name for name in names)


def test_squeeze_comes_after_the_depthwise_activation():
    excite = SqueezeExcite(2, name="squeeze")
    model = block(3, 7, squeeze=excite)
    assert model.get_layer("block_depthwise_relu6").output is excite.input
    assert model.get_layer("block_project_conv").input is excite.output


def test_branch_is_dropped_in_training_alone_and_only_where_it_is_added():
    model, x = block(3, 7, drop_path=0.5), images()
    drop = model.get_layer("block_drop_path")
    assert drop.rate == 0.5
    assert_close(model(x), model(x), 0)
    strided = block(3, 7, strides=2, drop_path=0.5)
    assert not any("drop" in layer.name for layer in strided.layers)


@pytest.mark.parametrize(
    ("channels", "width"),
    [(1, 8), (8, 8), (11, 16), (12, 16), (18, 24), (19, 24), (35, 32), (36, 40)],
)
def test_widths_are_multiples_of_eight_and_not_much_below(channels, width):
    assert rounded_width(channels) == width


def test_output_of_several_examples_is_that_of_each():
    model, x = block(3, 7, squeeze=SqueezeExcite(2, name="squeeze")), images()
    assert_close(model(x)[1:], to_numpy(model(x[1:])), 1e-6)
