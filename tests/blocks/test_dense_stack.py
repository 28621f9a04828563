import keras
import numpy as np

from keras_edifice.blocks.dense_stack import dense_stack, kernel_initializer


def names(**options):
    inputs = keras.Input((4,))
    model = keras.Model(inputs, dense_stack(inputs, [4, 6], **options))
    return [layer.name for layer in model.layers[1:]]


def test_layers_are_named_in_order():
    assert names() == ["dense_0", "activation_0", "dense_1", "activation_1"]
    assert names(name="phi")[0] == "phi_dense_0"


def test_shortcut_is_projected_only_where_widths_differ():
    made = names(residual=True)
    assert "add_0" in made and "shortcut_0" not in made
    assert "add_1" in made and "shortcut_1" in made


def test_kernels_before_rectifiers_are_wider():
    keras.utils.set_random_seed(0)
    inputs = keras.Input((400,))
    for activation, variance in (("relu", 2 / 400), ("tanh", 2 / 800)):
        model = keras.Model(inputs, dense_stack(inputs, [400], activation))
        assert abs(model.get_weights()[0].var() / variance - 1) < 0.05
    assert kernel_initializer("relu") == "he_normal"
    assert np.all(model.get_weights()[1] == 0)
