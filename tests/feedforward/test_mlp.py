import keras
import numpy as np

import keras_edifice
from tests.support.close import assert_close
from tests.support.gradients import gradients
from tests.support.numerical import numerical_gradient
from tests.support.shaking import shake

rng = np.random.default_rng(0)


def reference(x, weights, sizes, epsilon=1e-5):
    """The equation of the module, a loop in float64: norm and residual on."""
    weights = iter(np.asarray(w, "float64") for w in weights)
    for size in sizes:
        h = x @ next(weights) + next(weights)
        mean, var = h.mean(-1, keepdims=True), h.var(-1, keepdims=True)
        h = (h - mean) / np.sqrt(var + epsilon) * next(weights) + next(weights)
        h = np.tanh(h)
        if x.shape[-1] != size:
            x = x @ next(weights) + next(weights)
        x = x + h
    return x


def small_model():
    return shake(
        keras_edifice.build(
            "mlp",
            input_size=5,
            hidden_sizes=[7, 4, 4],
            activation="tanh",
            layer_norm=True,
            residual=True,
        )
    )


def test_output_is_the_equation():
    model, x = small_model(), rng.normal(size=(3, 5)).astype("float32")
    assert_close(model(x), reference(x, model.get_weights(), [7, 4, 4]))


def test_gradient_is_that_of_the_equation():
    model, x = small_model(), rng.normal(size=(2, 5)).astype("float32")
    _, by_input = gradients(model, x, lambda y: keras.ops.sum(keras.ops.square(y)))
    weights = model.get_weights()
    expected = numerical_gradient(
        lambda x: np.square(reference(x, weights, [7, 4, 4])).sum(), x
    )
    assert_close(by_input, expected, 1e-4)


def test_zero_kernels_leave_the_identity_and_the_bias():
    model = keras_edifice.build(
        "mlp", input_size=4, hidden_sizes=[4, 4], residual=True, dropout=0.0
    )
    for weight in model.weights:
        value = 0.5 if weight.name == "bias" else 0.0
        weight.assign(np.full(weight.shape, value, "float32"))
    x = rng.normal(size=(3, 4)).astype("float32")
    assert_close(model(x), x + 0.5 + 0.5)


def test_dropout_is_off_at_inference():
    model = keras_edifice.build("mlp", input_size=4, hidden_sizes=[8], dropout=0.9)
    x = rng.normal(size=(3, 4)).astype("float32")
    assert_close(model(x), model(x), 0)


def test_rows_do_not_see_each_other():
    model, x = small_model(), rng.normal(size=(4, 5)).astype("float32")
    assert_close(model(x)[1:2], model(x[1:2]), 1e-6)


def test_temporal_form_looks_at_the_last_frame():
    options = dict(input_size=3, hidden_sizes=[6], dropout=0.0)
    flat = keras_edifice.build("mlp", **options)
    temporal = keras_edifice.build("mlp", temporal=True, window_size=5, **options)
    temporal.set_weights(flat.get_weights())
    x = rng.normal(size=(2, 5, 3)).astype("float32")
    assert_close(temporal(x), flat(x[:, -1]), 1e-6)


def test_published_sizes():
    mnist = keras_edifice.build("mlp", input_size=784)
    assert mnist.count_params() == 664_576
    assert keras_edifice.classifier("mlp", 10, input_size=784).count_params() == 669_706
    path = keras_edifice.build("mlp", input_size=32, hidden_sizes=[128, 64, 16])
    assert path.count_params() == 13_520


def test_head_gives_probabilities_or_logits():
    x = rng.normal(size=(3, 4)).astype("float32")
    probabilities = keras_edifice.build("mlp", input_size=4, num_classes=3)(x)
    assert_close(keras.ops.sum(probabilities, -1), np.ones(3))
    logits = keras_edifice.build(
        "mlp", input_size=4, num_classes=3, classifier_activation=None
    )
    assert logits.layers[-1].activation is keras.activations.linear
