import keras
import numpy as np
import pytest
from keras import layers, ops

from keras_edifice.blocks.convolution import Conv2D, DepthwiseConv2D
from tests.support.close import assert_close
from tests.support.gradients import gradients

rng = np.random.default_rng(0)
OPTIONS = [
    dict(kernel_size=3, padding="same"),
    dict(kernel_size=3, padding="valid", use_bias=False),
    dict(kernel_size=3, padding="same", strides=2, activation="relu"),
    dict(kernel_size=1, strides=2),
    dict(kernel_size=4, strides=4),
]
OBLONG = [
    dict(kernel_size=(2, 5), padding="same"),
    dict(kernel_size=2, padding="same", dilation_rate=3),
]


def with_equal_weights(ours, theirs):
    for layer in (ours, theirs):
        layer.build((None, None, None, 4))
    ours.set_weights([rng.normal(size=w.shape) for w in ours.weights])
    theirs.set_weights(ours.get_weights())
    return ours, theirs


def check(ours, theirs):
    """Values and gradients in the weights and the image are those of Keras."""
    x = rng.normal(size=(2, 7, 8, 4)).astype("float32")
    assert_close(ours(x), theirs(x), 1e-4)  # sums of up to 100 products
    assert tuple(ours(x).shape) == ours.compute_output_shape(x.shape)

    def loss(y):
        return ops.sum(ops.square(y))

    (own, by_own), (other, by_other) = (gradients(m, x, loss) for m in (ours, theirs))
    for found, expected in zip([*own, by_own], [*other, by_other], strict=True):
        scale = np.abs(expected).max()
        assert_close(found / scale, expected / scale)


@pytest.mark.parametrize("options", [*OPTIONS, *OBLONG], ids=str)
def test_convolution_is_that_of_keras_with_its_gradients(options):
    check(*with_equal_weights(Conv2D(6, **options), layers.Conv2D(6, **options)))


def test_groups_keep_their_channels_apart():
    options = dict(filters=6, kernel_size=3, groups=2, padding="same")
    check(*with_equal_weights(Conv2D(**options), layers.Conv2D(**options)))


@pytest.mark.parametrize("multiplier", [1, 2])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_depthwise_convolution_is_that_of_keras_with_its_gradients(options, multiplier):
    options = dict(options, depth_multiplier=multiplier)
    ours, theirs = DepthwiseConv2D(**options), layers.DepthwiseConv2D(**options)
    check(*with_equal_weights(ours, theirs))


def test_changed_weights_count_in_the_next_prediction():
    layer, theirs = with_equal_weights(Conv2D(3, 2), layers.Conv2D(3, 2))
    x = rng.normal(size=(1, 5, 5, 4)).astype("float32")
    for _ in range(2):
        for own in (layer, theirs):
            own.set_weights([w * 2 for w in own.get_weights()])
        expected = keras.Sequential([theirs]).predict(x, verbose=0)
        model = keras.Sequential([layer])
        for _ in range(2):
            assert_close(model.predict(x, verbose=0), expected, 1e-4)


def test_a_trained_layer_predicts_with_its_new_weights():
    layer = Conv2D(1, 3, padding="same", name="conv")
    model = keras.Sequential([keras.Input((6, 6, 2)), layer])
    x = rng.normal(size=(8, 6, 6, 2)).astype("float32")
    before = model.predict(x, verbose=0)
    model.compile("sgd", "mse")
    model.fit(x, before + 1.0, epochs=1, verbose=0)
    after = model.predict(x, verbose=0)
    assert np.abs(after - before).max() > 1e-3
    again = layers.Conv2D(1, 3, padding="same")
    again.build((None, 6, 6, 2))
    again.set_weights(layer.get_weights())
    assert_close(after, again(x), 1e-4)


def test_channels_first_is_left_to_keras():
    if keras.backend.backend() == "tensorflow":
        pytest.skip("TensorFlow has no channels-first convolution on CPUs")
    options = dict(filters=3, kernel_size=3, data_format="channels_first")
    ours, theirs = Conv2D(**options), layers.Conv2D(**options)
    for layer in (ours, theirs):
        layer.build((None, 4, 7, 7))
    theirs.set_weights(ours.get_weights())
    x = rng.normal(size=(2, 4, 7, 7)).astype("float32")
    assert_close(ours(x), theirs(x))


def test_config_keeps_the_arguments():
    again = Conv2D.from_config(Conv2D(3, (2, 1), strides=2).get_config())
    assert (again.filters, again.kernel_size, again.strides) == (3, (2, 1), (2, 2))
