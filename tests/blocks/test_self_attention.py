import keras
import numpy as np
import pytest

from keras_edifice.blocks.self_attention import SelfAttention
from tests.support.close import assert_close, to_numpy
from tests.support.gradients import gradients
from tests.support.numerical import numerical_gradient
from tests.support.shaking import shake

rng = np.random.default_rng(0)


def attention(features=6, num_heads=3, **options):
    layer = SelfAttention(num_heads, name="attention", **options)
    layer.build((None, None, features))
    return shake(layer)


def reference(x, layer, mask=None):
    """A loop over examples and heads in float64."""
    weights = {w.path: to_numpy(w) for w in layer.weights}
    x = np.asarray(x, "float64")
    qkv = x @ weights["attention/qkv/kernel"] + weights.get("attention/qkv/bias", 0)
    d, width = x.shape[-1], x.shape[-1] // layer.num_heads
    y, attended = np.zeros_like(x), []
    for b in range(len(x)):
        for h in range(layer.num_heads):
            part = slice(h * width, (h + 1) * width)
            q, k, v = (qkv[b, :, i * d : (i + 1) * d][:, part] for i in range(3))
            scores = np.exp(q @ k.T / np.sqrt(width))
            if mask is not None:
                scores = scores * mask[b]
            rows = scores / scores.sum(-1, keepdims=True)
            y[b, :, part] = rows @ v
            attended.append(rows)
    out = y @ weights["attention/out/kernel"] + weights["attention/out/bias"]
    return out, np.reshape(attended, (len(x), layer.num_heads, *rows.shape))


@pytest.mark.parametrize(("num_heads", "use_bias"), [(1, True), (3, True), (3, False)])
def test_output_is_the_equation(num_heads, use_bias):
    layer = attention(num_heads=num_heads, use_bias=use_bias)
    x = rng.normal(size=(2, 5, 6)).astype("float32")
    assert_close(layer(x), reference(x, layer)[0])


def test_gradient_is_that_of_the_equation():
    layer = attention()
    x = rng.normal(size=(1, 4, 6)).astype("float32")
    _, by_input = gradients(layer, x, lambda y: keras.ops.sum(keras.ops.square(y)))
    expected = numerical_gradient(lambda x: np.square(reference(x, layer)[0]).sum(), x)
    assert_close(by_input, expected, 1e-4)


def test_attention_weights_are_those_of_the_equation_and_rows_sum_to_one():
    layer = attention()
    x = rng.normal(size=(2, 5, 6)).astype("float32")
    weights = layer.attention_weights(x)
    assert_close(weights, reference(x, layer)[1])
    assert_close(keras.ops.sum(weights, -1), np.ones((2, 3, 5)), 1e-6)


def test_order_of_the_tokens_goes_through():
    layer, order = attention(), rng.permutation(5)
    x = rng.normal(size=(2, 5, 6)).astype("float32")
    assert_close(layer(x[:, order]), to_numpy(layer(x))[:, order])


def test_masked_tokens_are_not_looked_at():
    layer, x = attention(), rng.normal(size=(2, 5, 6)).astype("float32")
    mask = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], "bool")
    y = to_numpy(layer(x, mask=keras.ops.convert_to_tensor(mask)))
    assert_close(y, reference(x, layer, mask)[0])
    changed = x.copy()
    changed[0, 3:] += 1
    z = to_numpy(layer(changed, mask=keras.ops.convert_to_tensor(mask)))
    assert_close(z[0, :3], y[0, :3], 1e-6)


def test_heads_change_the_output_and_not_the_count():
    x = rng.normal(size=(2, 5, 6)).astype("float32")
    one, two = attention(num_heads=1), attention(num_heads=2)
    two.set_weights(one.get_weights())
    assert one.count_params() == two.count_params() == 6 * 18 + 18 + 6 * 6 + 6
    assert np.abs(to_numpy(one(x)) - to_numpy(two(x))).max() > 1e-3


def test_dropout_is_on_the_attention_weights_in_training_alone():
    layer, x = attention(dropout=0.5), rng.normal(size=(2, 5, 6)).astype("float32")
    assert_close(layer(x), reference(x, layer)[0])
    assert np.abs(to_numpy(layer(x, training=True)) - to_numpy(layer(x))).max() > 1e-3


def test_large_scores_are_finite_in_half_precision():
    layer = attention(dtype="mixed_bfloat16")
    y = layer(1e3 * rng.normal(size=(2, 5, 6)).astype("float32"))
    assert keras.backend.standardize_dtype(y.dtype) == "bfloat16"
    assert np.isfinite(to_numpy(keras.ops.cast(y, "float32"))).all()


def test_heads_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="multiple of num_heads, received 6 and 4"):
        SelfAttention(4).build((None, 3, 6))


def test_config_keeps_the_arguments():
    layer = SelfAttention(2, use_bias=False, dropout=0.3, initializer="truncated")
    layer = SelfAttention.from_config(layer.get_config())
    assert (layer.num_heads, layer.use_bias) == (2, False)
    assert (layer.dropout, layer.initializer) == (0.3, "truncated")
