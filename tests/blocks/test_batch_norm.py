import keras
import numpy as np
from keras import ops

from keras_edifice.blocks.batch_norm import BatchNorm
from tests.support.close import assert_close, to_numpy

rng = np.random.default_rng(0)


def built(**options):
    layer = BatchNorm(**options)
    layer.build((None, None, 3))
    layer.set_weights(rng.uniform(0.5, 1.5, (4, 3)))
    return layer


def inputs(length=6):
    return rng.normal(size=(4, length, 3)).astype("float32")


def test_equals_the_layer_of_keras():
    ours, x = built(momentum=0.9, epsilon=1e-2), inputs()
    theirs = keras.layers.BatchNormalization(momentum=0.9, epsilon=1e-2)
    theirs.build(x.shape)
    theirs.set_weights(ours.get_weights())
    for training in (False, True):
        assert_close(ours(x, training=training), theirs(x, training=training), 0)
    for own, other in zip(ours.get_weights(), theirs.get_weights(), strict=True):
        assert_close(own, other, 0)


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
