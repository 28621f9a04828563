import keras
import numpy as np
import pytest
from keras import ops

from keras_edifice.blocks.cross_attention import CrossAttention
from keras_edifice.blocks.grouped_query_attention import GroupedQueryAttention
from tests.support.close import assert_close, to_numpy
from tests.support.compiled import compiled
from tests.support.gradients import gradients
from tests.support.numerical import numerical_gradient
from tests.support.shaking import shake

rng = np.random.default_rng(0)


def attention(num_heads=4, features=8, others=6, **options):
    layer = CrossAttention(num_heads, name="cross", **options)
    layer.build((None, None, features), (None, None, others))
    return shake(layer)


def inputs(queries=5, tokens=7, features=8, others=6):
    query = rng.normal(size=(2, queries, features))
    return query.astype("float32"), rng.normal(size=(2, tokens, others)).astype(
        "float32"
    )


def reference(query, context, layer, mask=None):
    """The equations of the module, a loop over examples and heads in float64."""
    weights = {w.path.removeprefix("cross/"): to_numpy(w) for w in layer.weights}
    query, context = np.asarray(query, "float64"), np.asarray(context, "float64")
    heads = layer.num_heads
    groups = heads // (layer.num_kv_heads or heads)
    size = layer.head_dim or query.shape[-1] // heads

    def head(x, name, h):
        z = x @ weights[f"{name}/kernel"] + weights.get(f"{name}/bias", 0.0)
        z = z[:, h * size : (h + 1) * size]
        if layer.qk_norm and name != "v":
            z = z / np.sqrt((z**2).mean(-1, keepdims=True) + layer.norm_epsilon)
            z = z * weights[f"{name}_norm/gamma"]
        return z

    rows = []
    for b in range(len(query)):
        parts = []
        for h in range(heads):
            k, v = (head(context[b], name, h // groups) for name in ("k", "v"))
            p = np.exp(head(query[b], "q", h) @ k.T / np.sqrt(size))
            p = p if mask is None else p * mask[b]
            parts.append(p / np.maximum(p.sum(-1, keepdims=True), 1e-30) @ v)
        rows.append(np.concatenate(parts, axis=-1))
    y = np.stack(rows) @ weights["out/kernel"] + weights.get("out/bias", 0.0)
    return y * np.tanh(weights["gate"]) if layer.gated else y


VARIANTS = {
    "plain": {},
    "grouped": dict(num_kv_heads=2, use_bias=True, output_size=3),
    "normalised": dict(num_kv_heads=1, head_dim=5, qk_norm=True, use_output_bias=True),
    "gated blocks": dict(gated=True, block_size=3),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_output_is_the_equation(name):
    layer, (query, context) = attention(**VARIANTS[name]), inputs()
    mask = np.array([[1, 1, 0, 1, 1, 0, 1], [0] * 7], bool)
    both = compiled(lambda *x: (layer(*x), layer(*x, ops.convert_to_tensor(mask))))
    unmasked, y = both(query, context)
    assert_close(unmasked, reference(query, context, layer))
    assert_close(y, reference(query, context, layer, mask))
    assert y.shape == layer.compute_output_shape(query.shape, context.shape)


def test_gradient_is_that_of_the_equation():
    layer, (query, context) = attention(qk_norm=True, gated=True), inputs(3, 4)
    query, context = query[:1], context[:1]

    class ByContext(keras.layers.Layer):
        def call(self, x, training=False):
            return layer(ops.convert_to_tensor(query), x)

    _, found = gradients(ByContext(), context, lambda y: ops.sum(ops.square(y)))
    expected = numerical_gradient(
        lambda x: np.square(reference(query, x, layer)).sum(), context
    )
    assert_close(found, expected, 1e-4)


def test_order_of_the_context_does_not_matter():
    layer, (query, context) = attention(), inputs()
    order, mask = rng.permutation(7), rng.uniform(size=(2, 7)) < 0.7
    y = layer(query, context, context_mask=ops.convert_to_tensor(mask))
    shuffled = ops.convert_to_tensor(mask[:, order])
    assert_close(layer(query, context[:, order], context_mask=shuffled), y)


def test_attention_to_itself_is_self_attention():
    cross = attention(others=8, num_kv_heads=2)
    own = GroupedQueryAttention(4, 2, causal=False)
    own.build((None, None, 8))
    own.set_weights(cross.get_weights())
    x, _ = inputs()
    assert_close(cross(x, x), own(x), 1e-6)


def test_masks_come_along_with_the_tensors():
    layer, (query, context) = attention(), inputs()
    padded = context.copy()
    padded[:, 4:] = 0.0
    masking = keras.layers.Masking()
    y = layer(ops.convert_to_tensor(query), masking(padded))
    assert_close(y, layer(query, context[:, :4]))


def test_mask_of_the_output_is_that_of_the_queries():
    layer, (query, context) = attention(), inputs()
    query[0, 3:] = 0.0
    out = layer(keras.layers.Masking()(query), ops.convert_to_tensor(context))
    mean = keras.layers.GlobalAveragePooling1D()(out)
    assert_close(mean[0], ops.mean(out[0, :3], axis=0), 1e-6)


def test_a_closed_gate_lets_nothing_through():
    layer = CrossAttention(2, gated=True)
    query, context = inputs()
    assert (to_numpy(layer(query, context)) == 0).all()


def test_queries_one_by_one_use_the_keys_once_made():
    layer, (query, context) = attention(qk_norm=True), inputs()
    keys_values = layer.project(ops.convert_to_tensor(context))
    rows = [layer.attend(query[:, t : t + 1], *keys_values) for t in range(5)]
    assert_close(ops.concatenate(rows, axis=1), layer(query, context), 1e-6)


def test_dropout_is_on_the_attention_weights_in_training_alone():
    layer, (query, context) = attention(dropout=0.5), inputs()
    y = layer(query, context)
    assert_close(y, reference(query, context, layer))
    assert np.abs(to_numpy(layer(query, context, training=True) - y)).max() > 1e-3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(num_heads=4, num_kv_heads=3), "num_kv_heads, received 4 and 3"),
        (dict(num_heads=3), "multiple of num_heads, received 8 and 3"),
        (dict(num_heads=4, dropout=0.1, block_size=8), "no weights to drop"),
    ],
)
def test_what_does_not_fit_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        CrossAttention(**options).build((None, None, 8), (None, None, 6))


def test_model_of_two_inputs_trains_and_is_saved(tmp_path):
    query, context = keras.Input((None, 8)), keras.Input((None, 6))
    options = dict(num_kv_heads=2, qk_norm=True, dtype="float32")
    model = keras.Model([query, context], CrossAttention(4, **options)(query, context))
    model.compile("sgd", "mse")
    arrays = inputs()
    model.fit(arrays, arrays[0], verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert_close(loaded.predict(arrays, verbose=0), model.predict(arrays, verbose=0), 0)
