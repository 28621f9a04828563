import keras
import numpy as np
import pytest
from keras import ops

from keras_edifice.blocks.dense import Dense
from tests.support.close import assert_close, to_numpy
from tests.support.gradients import gradients

rng = np.random.default_rng(0)


def pair(units=4, features=3, **options):
    """Ours and the layer of Keras, with equal weights."""
    ours, theirs = Dense(units, **options), keras.layers.Dense(units, **options)
    for layer in (ours, theirs):
        layer.build((None, features))
    ours.set_weights([rng.normal(size=w.shape) for w in ours.weights])
    theirs.set_weights(ours.get_weights())
    return ours, theirs


@pytest.mark.parametrize("shape", [(5, 3), (2, 5, 3), (2, 1, 5, 3)], ids=str)
@pytest.mark.parametrize("options", [{}, {"activation": "tanh"}, {"use_bias": False}])
def test_equals_the_layer_of_keras_with_its_gradients(options, shape):
    ours, theirs = pair(**options)
    x = rng.normal(size=shape).astype("float32")
    assert_close(ours(x), theirs(x))

    def loss(y):
        return ops.sum(ops.square(y))

    (own, by_own), (other, by_other) = (gradients(m, x, loss) for m in (ours, theirs))
    for found, expected in zip([*own, by_own], [*other, by_other], strict=True):
        assert_close(found, expected, 1e-4)


def test_inputs_of_another_precision_are_promoted_as_by_keras():
    ours, theirs = pair(autocast=False)
    x = ops.cast(rng.normal(size=(2, 3)), "bfloat16")
    assert_close(ours(x), theirs(x))
    assert keras.backend.standardize_dtype(ours(x).dtype) == "float32"


def test_mixed_precision_gives_bfloat16():
    ours, theirs = pair(dtype="mixed_bfloat16")
    x = rng.normal(size=(2, 3)).astype("float32")
    assert keras.backend.standardize_dtype(ours(x).dtype) == "bfloat16"
    # one rounding to 8 bits instead of two, before and after the bias
    assert_close(ops.cast(ours(x), "float32"), ops.cast(theirs(x), "float32"), 2e-2)


def test_int8_weights_are_those_of_keras_int8():
    ours, theirs = pair()
    x = rng.normal(size=(2, 3)).astype("float32")
    for layer in (ours, theirs):
        layer.quantize("int8")
    assert "int8" in ours.dtype_policy.name
    assert_close(ours(x), theirs(x), 0)


def test_lora_weights_take_part():
    ours, _ = pair()
    x = rng.normal(size=(2, 3)).astype("float32")
    before = to_numpy(ours(x))
    ours.enable_lora(2)
    a, b = (rng.normal(size=w.shape) for w in (ours.lora_kernel_a, ours.lora_kernel_b))
    ours.lora_kernel_a.assign(a)
    ours.lora_kernel_b.assign(b)
    assert_close(ours(x), before + x @ a @ b, 1e-4)


def test_config_keeps_the_arguments():
    again = Dense.from_config(Dense(3, "relu", use_bias=False).get_config())
    assert (again.units, again.activation, again.use_bias) == (
        3,
        keras.activations.relu,
        False,
    )
