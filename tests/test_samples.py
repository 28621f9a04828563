import keras
import numpy as np

from keras_edifice.samples import sample_inputs


def test_samples_have_the_shapes_and_kinds_of_the_inputs():
    inputs = {
        "nodes": keras.Input((None, 3), name="nodes"),
        "adjacency": keras.Input((None, None), name="adjacency"),
        "tokens": keras.Input((None,), dtype="int32", name="tokens"),
        "node_mask": keras.Input((None,), dtype="bool", name="node_mask"),
    }
    model = keras.Model(inputs, keras.layers.Dense(2)(inputs["nodes"]))
    x = sample_inputs(model, batch_size=2, length=5)
    assert x["nodes"].shape == (2, 5, 3) and x["nodes"].dtype == "float32"
    assert x["adjacency"].shape == (2, 5, 5)
    assert np.array_equal(x["adjacency"], np.swapaxes(x["adjacency"], 1, 2))
    assert set(np.unique(x["adjacency"])) == {0.0, 1.0}
    assert not np.diagonal(x["adjacency"], axis1=1, axis2=2).any()
    assert x["tokens"].dtype == "int32" and set(np.unique(x["tokens"])) <= {0, 1}
    assert x["node_mask"].dtype == bool and x["node_mask"].all()


def test_samples_are_seeded():
    inputs = keras.Input((3,))
    model = keras.Model(inputs, keras.layers.Dense(2)(inputs))
    a, b, c = (sample_inputs(model, seed=seed) for seed in (1, 1, 2))
    assert np.array_equal(a, b) and not np.array_equal(a, c)
