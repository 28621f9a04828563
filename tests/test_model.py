import keras
import numpy as np
import pytest

import keras_edifice
from keras_edifice.model import EdificeModel
from tests.support.close import assert_close


def small(**options):
    return keras_edifice.build("mlp", input_size=3, hidden_sizes=[4], **options)


def test_model_remembers_where_it_came_from(tmp_path):
    model = small(dropout=0.25)
    assert model.architecture == "mlp"
    assert model.options["dropout"] == 0.25
    model.save(tmp_path / "m.keras")
    loaded = keras.saving.load_model(tmp_path / "m.keras")
    assert isinstance(loaded, EdificeModel)
    assert (loaded.architecture, loaded.options) == ("mlp", model.options)


def test_copies_keep_the_options():
    model = small()
    clone = keras.models.clone_model(model)
    clone.set_weights(model.get_weights())
    x = np.ones((2, 3), "float32")
    assert_close(clone(x), model(x), 0)
    again = EdificeModel.from_config(model.get_config())
    assert again.options == model.options


def test_wrong_shapes_are_refused_in_every_way_of_calling():
    model = small(num_classes=2)
    model.compile("sgd", "sparse_categorical_crossentropy")
    bad, labels = np.ones((4, 5), "float32"), np.zeros(4)
    message = r"mlp expected inputs of shape \(batch, 3\), received \(batch, 5\)"
    with pytest.raises(ValueError, match=message):
        model(bad)
    with pytest.raises(ValueError, match=message):
        model.predict(bad, verbose=0)
    with pytest.raises(ValueError, match=message):
        model.fit(bad, labels, verbose=0)


def test_open_sizes_take_any_size():
    model = keras_edifice.build("mlp", input_size=3, temporal=True, window_size=None)
    for length in (1, 5):
        assert model(np.ones((2, length, 3), "float32")).shape[0] == 2


@keras.saving.register_keras_serializable("keras_edifice_tests")
class Counting(keras.layers.Layer):
    def call(self, x):
        return x

    def compute_output_shape(self, input_shape):
        return input_shape

    def set_num_examples(self, count):
        self.count = count


@pytest.mark.parametrize(("split", "count"), [(0.0, 10), (0.2, 8)])
def test_fit_tells_layers_the_number_of_examples(split, count):
    inputs = keras.Input((3,))
    layer = Counting()
    inner = EdificeModel(inputs, keras.layers.Dense(2)(layer(inputs)))
    model = EdificeModel(inputs, inner(inputs))
    model.compile("sgd", "mse")
    x, y = np.ones((10, 3), "float32"), np.ones((10, 2), "float32")
    model.fit(x, y, validation_split=split, verbose=0)
    assert layer.count == count
