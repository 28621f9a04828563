import keras
import numpy as np
import pytest
from keras import ops

from keras_edifice.exporting import export
from keras_edifice.model import EdificeModel
from keras_edifice.ops.straight_through import (
    binary_codes,
    gumbel_noise,
    gumbel_softmax,
    hard_round,
    hard_sign,
    hard_softmax,
    int_codes,
    nearest_code,
    one_hot_indices,
    one_hot_max,
    one_hot_min,
    quantize_binary,
    quantize_int,
    quantize_ternary,
    straight_through,
    ternary_codes,
    with_identity_gradient,
)
from keras_edifice.ops.tracing import export_scope
from tests.support.close import assert_close, to_numpy
from tests.support.compiled import compiled
from tests.support.gradients import gradients
from tests.support.numerical import numerical_gradient

rng = np.random.default_rng(0)


def normal(*shape, scale=1.0):
    return (scale * rng.normal(size=shape)).astype("float32")


def value(function, *arrays):
    return to_numpy(compiled(function)(*map(ops.convert_to_tensor, arrays)))


def gradient(function, x, weights=None):
    """Of Σ weights * function(x) in x."""
    model = keras.layers.Activation(function)
    weights = ops.convert_to_tensor(np.ones_like(x) if weights is None else weights)
    return gradients(model, x, lambda y: ops.sum(y * weights))[1]


def test_value_is_exactly_the_hard_one_and_the_gradient_the_soft_one():
    x, hard = normal(50, scale=1e3), normal(50)

    def function(x):
        return straight_through(ops.convert_to_tensor(hard), ops.tanh(x / 1e3))

    assert (value(function, x) == hard).all()
    assert_close(gradient(function, x), (1 - np.tanh(x / 1e3) ** 2) / 1e3)


def test_identity_gradient_ends_at_the_bounds():
    x = np.array([-1.5, -1.0, -0.2, 0.0, 0.7, 2.0, 2.1], "float32")

    def function(x):
        return with_identity_gradient(ops.zeros_like(x), x, -1.0, 2.0)

    assert (value(function, x) == 0).all()
    assert_close(gradient(function, x), [0, 1, 1, 1, 1, 1, 0], 0)


def test_rounding_takes_halves_to_even_and_lets_the_gradient_pass():
    x = np.array([-2.5, -1.5, -0.6, -0.5, 0.0, 0.5, 1.5, 2.5, 3.7], "float32")
    assert_close(value(hard_round, x), [-2, -2, -1, 0, 0, 0, 2, 2, 4], 0)
    assert_close(gradient(hard_round, x, 2 * x), 2 * x, 0)


def test_bounded_rounding_stops_the_gradient_outside():
    x = np.array([-2.0, -1.2, -1.0, 0.6, 1.0, 1.4, 9.0], "float32")

    def function(x):
        return hard_round(x, -1, 1)

    assert_close(value(function, x), [-1, -1, -1, 1, 1, 1, 1], 0)
    assert_close(gradient(function, x), [0, 0, 1, 1, 1, 0, 0], 0)


def test_sign_is_never_zero():
    x = np.array([-2.0, -1.0, -0.0, 0.0, 1e-30, 1.0, 3.0], "float32")
    assert_close(value(hard_sign, x), [-1, -1, -1, -1, 1, 1, 1], 0)
    assert_close(gradient(hard_sign, x), np.ones(7), 0)
    assert_close(gradient(lambda x: hard_sign(x, 1.0), x), [0, 1, 1, 1, 1, 1, 0], 0)


def ternary_reference(w):
    w = w.astype("float64")
    scale = max(np.abs(w).mean(), 1e-5)
    return np.clip(np.round(w / scale), -1, 1), scale


def int_reference(x, bits):
    x, top = x.astype("float64"), 2 ** (bits - 1)
    factor = (top - 1) / np.maximum(np.abs(x).max(-1, keepdims=True), 1e-5)
    return np.clip(np.round(x * factor), -top, top - 1), 1 / factor


def test_ternary_weights_are_those_of_the_paper():
    w = normal(7, 5, scale=0.02)
    codes, scale = ternary_reference(w)
    found, found_scale = ternary_codes(ops.convert_to_tensor(w))
    assert_close(found, codes, 0)
    assert_close(found_scale, scale)
    assert set(np.unique(to_numpy(found))) == {-1, 0, 1}
    assert_close(value(quantize_ternary, w), codes * scale)
    assert_close(value(quantize_ternary, 3 * w), codes * 3 * scale)


def test_binary_weights_are_those_of_the_paper():
    w = normal(7, 5) + 0.3
    codes = np.where(w - w.astype("float64").mean() > 0, 1, -1)
    assert_close(binary_codes(ops.convert_to_tensor(w))[0], codes, 0)
    assert_close(value(quantize_binary, w), codes * np.abs(w.astype("float64")).mean())


@pytest.mark.parametrize("bits", [4, 8])
def test_activations_have_a_scale_for_each_token(bits):
    x = normal(2, 3, 16, scale=5.0)
    codes, scale = int_reference(x, bits)
    found, found_scale = int_codes(ops.convert_to_tensor(x), bits)
    assert_close(found, codes, 0)
    assert_close(found_scale, scale)
    assert np.abs(to_numpy(found)).max(-1).min() == 2 ** (bits - 1) - 1
    assert_close(value(lambda x: quantize_int(x, bits), x), codes * scale)


def test_one_scale_for_all_activations():
    x = normal(3, 4)
    _, scale = int_codes(ops.convert_to_tensor(x), axis=None)
    assert_close(to_numpy(scale).ravel(), [np.abs(x).max() / 127])


@pytest.mark.parametrize("quantize", [quantize_ternary, quantize_binary, quantize_int])
def test_quantisers_pass_the_gradient_unchanged(quantize):
    x, weights = normal(4, 6), normal(4, 6)
    assert_close(gradient(quantize, x, weights), weights, 0)


@pytest.mark.parametrize("quantize", [quantize_ternary, quantize_binary, quantize_int])
def test_zeros_are_quantised_to_zeros(quantize):
    assert (value(quantize, np.zeros((2, 3), "float32")) == 0).all()


def test_gradient_of_a_quantised_product_is_that_at_the_quantised_operands():
    x, w, weights = normal(3, 6), normal(6, 4), normal(3, 4)
    xq = np.multiply(*int_reference(x, 8))

    class Product(keras.layers.Layer):
        def build(self, _):
            self.w = self.add_weight((6, 4))

        def call(self, x):
            return ops.matmul(quantize_int(x), quantize_ternary(self.w * 1.0))

    layer = Product()
    layer.build((3, 6))
    layer.w.assign(w)
    weights_ = ops.convert_to_tensor(weights)
    (by_w,), by_x = gradients(layer, x, lambda y: ops.sum(y * weights_))
    assert_close(by_w, xq.T @ weights, 1e-4)
    assert_close(by_x, weights @ np.multiply(*ternary_reference(w)).T, 1e-4)


@pytest.mark.parametrize("format", [None, "onnx"], ids=["argmax", "exported"])
def test_first_of_equal_entries_is_marked(format):
    x = np.array(
        [[1, 3, 3, 0], [2, 2, 2, 2], [0, 0, 0, 5], [-1, -9, -9, -1]], "float32"
    )
    with export_scope(format):
        largest = value(one_hot_max, x)
        smallest = value(one_hot_min, x)
    assert_close(largest, np.eye(4)[x.argmax(-1)], 0)
    assert_close(smallest, np.eye(4)[x.argmin(-1)], 0)
    assert_close(one_hot_indices(ops.convert_to_tensor(largest)), x.argmax(-1), 0)


def test_only_allowed_entries_are_marked():
    x = np.array([[1, 5, 3], [4, 4, 4], [7, 8, 9], [-np.inf, -np.inf, 0]], "float32")
    allowed = np.array([[1, 0, 1], [0, 1, 1], [0, 0, 0], [0, 1, 0]], bool)
    expected = [[0, 0, 1], [0, 1, 0], [0, 0, 0], [0, 1, 0]]
    assert_close(value(one_hot_max, x, allowed), expected, 0)


def test_nearest_code_is_the_first_at_the_smallest_distance():
    z, codebook = normal(2, 3, 5, 4), normal(6, 4)
    codebook[4] = codebook[1]
    distance = np.square(z[..., None, :].astype("float64") - codebook).sum(-1)
    one_hot = value(nearest_code, z, codebook)
    assert_close(one_hot, np.eye(6)[distance.argmin(-1)], 0)
    assert one_hot[..., 1].any()
    assert not one_hot[..., 4].any()


def test_quantised_vector_is_the_code_and_its_gradient_the_identity():
    z, codebook, weights = normal(5, 4), normal(6, 4), normal(5, 4)

    def quantized(z):
        codes = ops.convert_to_tensor(codebook)
        return with_identity_gradient(ops.matmul(nearest_code(z, codes), codes), z)

    nearest = np.square(z[:, None] - codebook).sum(-1).argmin(-1)
    assert_close(value(quantized, z), codebook[nearest], 1e-7)
    assert_close(gradient(quantized, z, weights), weights, 0)


def softmax(x):
    weights = np.exp(x - x.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def test_choice_has_the_gradient_of_the_softmax():
    x, weights = normal(4, 5), normal(4, 5)

    def function(x):
        return hard_softmax(x, 0.7)

    assert_close(value(function, x), np.eye(5)[x.argmax(-1)], 0)
    expected = numerical_gradient(lambda x: (softmax(x / 0.7) * weights).sum(), x)
    assert_close(gradient(function, x, weights), expected, 1e-4)


@pytest.mark.parametrize("hard", [True, False])
def test_gumbel_softmax_is_the_equation_with_the_given_noise(hard):
    x, noise, weights = normal(4, 5), normal(4, 5), normal(4, 5)

    def function(x):
        return gumbel_softmax(x, 0.5, noise=ops.convert_to_tensor(noise), hard=hard)

    soft = softmax((x.astype("float64") + noise) / 0.5)
    chosen = np.eye(5)[(x + noise).argmax(-1)]
    assert_close(value(function, x), chosen if hard else soft)
    expected = numerical_gradient(
        lambda x: (softmax((x + noise) / 0.5) * weights).sum(), x
    )
    assert_close(gradient(function, x, weights), expected, 1e-4)


def test_gumbel_choices_are_as_frequent_as_their_probabilities():
    logits = np.log(np.array([0.5, 0.3, 0.2], "float32")) + 4.0
    seed = keras.random.SeedGenerator(0)
    many = ops.convert_to_tensor(np.tile(logits, (20000, 1)))
    frequency = to_numpy(ops.mean(gumbel_softmax(many, seed=seed), axis=0))
    assert_close(frequency, [0.5, 0.3, 0.2], 0.02)  # three standard errors: 0.011


def test_gumbel_noise_is_finite_with_the_mean_of_its_distribution():
    noise = to_numpy(gumbel_noise((200, 200), keras.random.SeedGenerator(0)))
    assert np.isfinite(noise).all()
    assert_close(noise.mean(), np.euler_gamma, 0.03)  # standard error: 0.006


def test_without_noise_the_most_probable_entry_is_chosen():
    x = normal(6, 4)
    assert_close(value(gumbel_softmax, x), np.eye(4)[x.argmax(-1)], 0)


@pytest.mark.parametrize("quantize", [quantize_ternary, quantize_binary, quantize_int])
def test_half_precision_is_quantised_in_float32(quantize):
    x = ops.cast(ops.convert_to_tensor(normal(64, 64)), "bfloat16")
    found = quantize(x)
    assert keras.backend.standardize_dtype(found.dtype) == "bfloat16"
    expected = quantize(ops.cast(x, "float32"))
    # bfloat16 keeps 8 bits.
    assert_close(ops.cast(found, "float32"), expected, 4e-3)


@keras.saving.register_keras_serializable("test_straight_through")
class Quantized(keras.layers.Layer):
    """A product of quantised numbers, its nearest codes and a hard choice."""

    def build(self, input_shape):
        self.w = self.add_weight((input_shape[-1], 4), "glorot_normal", name="w")
        self.codebook = self.add_weight((6, 4), "normal", trainable=False)

    def call(self, x):
        product = ops.matmul(quantize_int(x), quantize_ternary(self.w * 1.0))
        y = ops.matmul(x, self.w)  # without the ties of quantised numbers
        one_hot = nearest_code(y, self.codebook * 1.0)
        code = with_identity_gradient(ops.matmul(one_hot, self.codebook * 1.0), y)
        chosen = [hard_softmax(y), hard_sign(y, 1.0)]
        return ops.concatenate([product, code, *chosen], axis=-1)

    def compute_output_shape(self, input_shape):
        return (*input_shape[:-1], 16)


def model():
    inputs = keras.Input((None, 5), name="inputs")
    return EdificeModel(inputs, Quantized()(inputs), name="quantized")


@pytest.mark.parametrize("format", ["onnx", "saved_model"])
def test_hard_values_are_exported(format, tmp_path):
    name = "model.onnx" if format == "onnx" else "model"
    assert export(model(), tmp_path / name, format) <= 1e-4


def test_hard_values_train():
    trained = model()
    before = trained.get_weights()[0]
    jit = keras.backend.backend() != "torch"
    trained.compile("sgd", "mse", jit_compile=jit)
    trained.fit(normal(4, 7, 5), normal(4, 7, 16), verbose=0)
    assert np.abs(trained.get_weights()[0] - before).max() > 0


def test_exported_form_holds_no_soft_value():
    x = ops.convert_to_tensor(normal(3))
    with export_scope("onnx"):
        assert straight_through(x, None) is x
