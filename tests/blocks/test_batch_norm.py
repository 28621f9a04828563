import keras
import numpy as np
import pytest
from keras import ops

from keras_edifice.blocks.batch_norm import BatchNorm
from tests.support.close import assert_close, to_numpy
from tests.support.gradients import gradients
from tests.support.numerical import numerical_gradient

rng = np.random.default_rng(0)


def built(shape=(None, None, 3), **options):
    layer = BatchNorm(**options)
    layer.build(shape)
    layer.set_weights(rng.uniform(0.5, 1.5, (4, 3)))
    return layer


def inputs(length=6):
    return rng.normal(size=(4, length, 3)).astype("float32")


@pytest.mark.parametrize(
    "shape, epsilon",
    [((4, 6, 3), 1e-5), ((4, 5, 2, 3), 1e-5), ((8, 3), 1e-5), ((1, 3), 1e-2)],
)
def test_equals_the_layer_of_keras(shape, epsilon):
    ours = built(shape, momentum=0.9, epsilon=epsilon)
    x = rng.normal(2.0, 3.0, size=shape).astype("float32")
    theirs = keras.layers.BatchNormalization(momentum=0.9, epsilon=epsilon)
    theirs.build(x.shape)
    theirs.set_weights(ours.get_weights())
    for training in (False, True):
        assert_close(ours(x, training=training), theirs(x, training=training))
    for own, other in zip(ours.get_weights(), theirs.get_weights(), strict=True):
        assert_close(own, other)


@pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="a kernel of TensorFlow"
)
def test_training_calls_the_kernel_of_tensorflow(monkeypatch):
    import tensorflow as tf

    kernel, calls = tf.raw_ops.FusedBatchNormV3, []

    def counted(**arguments):
        calls.append(arguments["x"].shape)
        return kernel(**arguments)

    monkeypatch.setattr(tf.raw_ops, "FusedBatchNormV3", counted)
    layer, x = built(), inputs()
    layer(x, training=True)
    layer(x, training=False)
    layer(x, training=True, mask=np.ones(x.shape[:2], "bool"))
    assert calls == [(1, 1, 24, 3)]


@pytest.mark.parametrize("options", [{}, {"scale": False}, {"center": False}], ids=str)
def test_images_are_normalised_by_the_equation_with_its_gradient(options):
    layer = BatchNorm(epsilon=1e-2, **options)
    layer.build((None, None, None, 3))
    scales = rng.uniform(0.5, 1.5, (len(layer.trainable_weights), 3))
    layer.set_weights([*scales, np.zeros(3), np.ones(3)])
    x = rng.normal(2.0, 3.0, size=(4, 3, 2, 3))
    gamma = scales[0] if options.get("scale", True) else 1.0
    beta = scales[-1] if options.get("center", True) else 0.0

    def normalised(x):
        mean, variance = x.mean((0, 1, 2)), x.var((0, 1, 2))
        return (x - mean) / np.sqrt(variance + 1e-2) * gamma + beta

    single = x.astype("float32")
    assert_close(layer(single, training=True), normalised(x))
    weight = rng.normal(size=x.shape)
    _, found = gradients(
        layer,
        single,
        lambda y: ops.sum(ops.square(y) * ops.cast(weight, "float32")),
        training=True,
    )
    expected = numerical_gradient(lambda x: (normalised(x) ** 2 * weight).sum(), x)
    assert_close(found, expected, 1e-4)


def test_a_frozen_layer_keeps_its_averages():
    layer = built()
    layer.trainable = False
    before = layer.get_weights()
    x = inputs()
    assert_close(layer(x, training=True), layer(x, training=False), 0)
    for old, new in zip(before, layer.get_weights(), strict=True):
        assert_close(old, new, 0)


def test_one_step_by_itself_is_that_of_the_sequence():
    layer, x = built(), inputs()
    assert_close(layer(x[:, 2]), to_numpy(layer(x))[:, 2], 0)


def test_masked_steps_do_not_enter_the_statistics():
    layer, x = built(), inputs()
    valid = np.arange(6) < 4
    mask = ops.convert_to_tensor(np.repeat(valid[None], 4, axis=0))
    gamma, beta, *_ = layer.get_weights()
    y = layer(x, training=True, mask=mask)
    short = x[:, :4].astype("float64")
    mean, variance = short.mean((0, 1)), short.var((0, 1))
    expected = (short - mean) / np.sqrt(variance + 1e-3) * gamma + beta
    assert_close(to_numpy(y)[:, :4], expected)


def test_config_keeps_the_arguments():
    again = BatchNorm.from_config(BatchNorm(momentum=0.5, epsilon=0.1).get_config())
    assert (again.momentum, again.epsilon) == (0.5, 0.1)
