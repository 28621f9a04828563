import keras
import numpy as np
import pytest
from keras import ops

from keras_edifice.blocks.alibi import alibi_slopes
from keras_edifice.blocks.grouped_query_attention import GroupedQueryAttention
from keras_edifice.exporting import export
from keras_edifice.model import EdificeModel
from tests.support.close import assert_close, to_numpy
from tests.support.compiled import compiled
from tests.support.gradients import gradients
from tests.support.numerical import numerical_gradient
from tests.support.shaking import shake

rng = np.random.default_rng(0)


def attention(features=8, num_heads=4, **options):
    layer = GroupedQueryAttention(num_heads, name="attention", **options)
    layer.build((None, None, features))
    return shake(layer)


def inputs(time=7, features=8):
    return rng.normal(size=(2, time, features)).astype("float32")


def turned(x, base=10000.0):
    """Rotary embedding of (time, size) in halves."""
    half = x.shape[-1] // 2
    angle = np.arange(len(x))[:, None] * base ** (-np.arange(half) / half)
    z = (x[:, :half] + 1j * x[:, half:]) * np.exp(1j * angle)
    return np.concatenate([z.real, z.imag], axis=-1)


def reference(x, layer, mask=None):
    """The equations of the module, a loop over examples and heads in float64."""
    weights = {w.path.removeprefix("attention/"): to_numpy(w) for w in layer.weights}
    x, heads = np.asarray(x, "float64"), layer.num_heads
    groups = heads // (layer.num_kv_heads or heads)
    size = layer.head_dim or x.shape[-1] // heads

    def head(name, b, h):
        z = x[b] @ weights[f"{name}/kernel"] + weights.get(f"{name}/bias", 0.0)
        z = z[:, h * size : (h + 1) * size]
        if layer.qk_norm and name != "v":
            z = z / np.sqrt((z**2).mean(-1, keepdims=True) + layer.norm_epsilon)
            z = z * weights[f"{name}_norm/gamma"]
        return turned(z) if layer.rotary is not None and name != "v" else z

    i, j = np.indices((x.shape[1],) * 2)
    seen = j <= i if layer.causal else j == j
    if layer.attention_window:
        seen = seen & (np.abs(i - j) < layer.attention_window)
    rows = []
    for b in range(len(x)):
        parts = []
        for h in range(heads):
            q, k, v = (
                head("q", b, h),
                head("k", b, h // groups),
                head("v", b, h // groups),
            )
            scores = q @ k.T * (layer.scale or size**-0.5)
            if layer.logit_soft_cap:
                scores = layer.logit_soft_cap * np.tanh(scores / layer.logit_soft_cap)
            if layer.alibi:
                scores = scores - alibi_slopes(heads)[h] * np.abs(i - j)
            visible = seen if mask is None else seen & mask[b]
            p = np.exp(scores) * visible
            parts.append(p / np.maximum(p.sum(-1, keepdims=True), 1e-30) @ v)
        rows.append(np.concatenate(parts, axis=-1))
    return np.stack(rows) @ weights["out/kernel"] + weights.get("out/bias", 0.0)


VARIANTS = {
    "multi-head": {},
    "grouped": dict(num_kv_heads=2, use_bias=True),
    "multi-query": dict(num_kv_heads=1, head_dim=6, use_output_bias=True),
    "both ways": dict(causal=False, attention_window=3),
    "window": dict(attention_window=3, rotary={}, num_kv_heads=2),
    "blocks": dict(attention_window=4, alibi=True, block_size=3),
    "everything": dict(
        num_kv_heads=2,
        head_dim=4,
        rotary={},
        qk_norm=True,
        alibi=True,
        logit_soft_cap=2.0,
        scale=0.7,
        attention_window=5,
        use_bias=True,
    ),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_output_is_the_equation(name):
    layer, x = attention(**VARIANTS[name]), inputs()
    mask = np.arange(7) < np.array([[7], [5]])
    y = compiled(lambda x: (layer(x), layer(x, mask=ops.convert_to_tensor(mask))))(x)
    assert_close(y[0], reference(x, layer))
    assert_close(y[1], reference(x, layer, mask))


def test_gradient_is_that_of_the_equation():
    layer, x = attention(**VARIANTS["everything"]), inputs(4)[:1]
    _, by_input = gradients(layer, x, lambda y: ops.sum(ops.square(y)))
    expected = numerical_gradient(lambda x: np.square(reference(x, layer)).sum(), x)
    assert_close(by_input, expected, 1e-4)


def test_grouped_heads_are_repeated_heads():
    grouped, full = attention(num_kv_heads=2), attention()
    weights = {w.path: to_numpy(w) for w in grouped.weights}
    for w in full.weights:
        value = weights[w.path]
        if "/k/" in w.path or "/v/" in w.path:
            value = np.repeat(value.reshape(8, 2, 2), 2, axis=1).reshape(8, 8)
        w.assign(value)
    x = inputs()
    assert_close(*compiled(lambda x: (grouped(x), full(x)))(x))
    assert grouped.count_params() == full.count_params() - 2 * 8 * 4


def test_keras_attention_of_equal_weights_gives_the_same():
    layer, x = attention(num_kv_heads=2, use_bias=True), inputs()
    peer = keras.layers.GroupQueryAttention(2, 4, 2)
    peer.build(x.shape, x.shape)
    q, k, v, out = (
        getattr(layer, name).get_weights() for name in ("q", "k", "v", "out")
    )
    arrays = []
    for (kernel, bias), heads in ((q, 4), (k, 2), (v, 2)):
        arrays += [kernel.reshape(8, heads, 2), bias.reshape(heads, 2)]
    peer.set_weights([*arrays, out[0].reshape(4, 2, 8), out[1]])
    both = compiled(lambda x: (layer(x), peer(x, x, use_causal_mask=True)))
    assert_close(*both(ops.convert_to_tensor(x)))


def test_future_tokens_do_not_change_the_past():
    layer, x = attention(rotary={}, num_kv_heads=2), inputs()
    changed = x.copy()
    changed[:, 4:] += 1.0
    call = compiled(layer)
    assert_close(call(changed)[:, :4], call(x)[:, :4], 1e-6)


def test_a_window_of_one_makes_tokens_independent():
    layer, x = attention(attention_window=1), inputs()
    assert_close(layer(x)[:, 3], layer(x[:, 3:4])[:, 0], 1e-6)


def test_tokens_that_do_not_see_each_other_are_alone():
    layer, x = attention(), inputs()
    segments = np.array([0, 0, 0, 1, 1, 1, 1])
    together = ops.convert_to_tensor(np.tile(segments[:, None] == segments, (2, 1, 1)))
    y = to_numpy(compiled(lambda x: layer(x, attention_mask=together))(x))
    assert_close(y[:, :3], reference(x[:, :3], layer))
    assert_close(y[:, 3:], reference(x[:, 3:], layer))


CACHED = ["grouped", "everything"]


@pytest.mark.parametrize("name", CACHED)
def test_step_by_step_is_the_call(name):
    layer, x = attention(max_length=9, **VARIANTS[name]), inputs()
    step, state, outputs = compiled(layer.step), layer.initial_state(2), []
    for t in range(7):
        y, state = step(x[:, t], state)
        outputs.append(y)
    assert_close(ops.stack(outputs, axis=1), compiled(layer)(x))


@pytest.mark.parametrize("name", CACHED)
@pytest.mark.parametrize("cuts", [(1, 6), (4, 5)])
def test_segments_with_the_carried_state_are_one_pass(name, cuts):
    layer, x = attention(max_length=9, **VARIANTS[name]), inputs()

    def segments(x):
        y, state = layer(x[:, : cuts[0]], return_state=True)
        outputs = [y]
        for begin, end in ((cuts[0], cuts[1]), (cuts[1], 7)):
            y, state = layer(x[:, begin:end], initial_state=state, return_state=True)
            outputs.append(y)
        return ops.concatenate(outputs, axis=1), state["length"], layer(x)

    y, length, expected = compiled(segments)(x)
    assert_close(y, expected)
    assert (to_numpy(length) == 7).all()


@pytest.mark.parametrize("name", CACHED)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_continue_as_if_alone(name, side):
    layer, x = attention(max_length=9, **VARIANTS[name]), inputs(6)
    valid = np.array([[0, 0, 1, 1], [1, 1, 1, 1]], bool)
    valid = valid if side == "left" else valid[:, ::-1]

    def continued(x):
        mask = ops.convert_to_tensor(np.ascontiguousarray(valid))
        _, state = layer(x[:, :4], mask=mask, return_state=True)
        return layer(x[:, 4:], initial_state=state)

    y = compiled(continued)(x)
    for b in range(2):
        alone = np.concatenate([x[b, :4][valid[b]], x[b, 4:]])[None]
        assert_close(y[b], reference(alone, layer)[0, -2:])


def test_a_cache_is_as_small_as_the_key_heads_and_the_window():
    state = attention(num_kv_heads=2).initial_state(3, max_length=11)
    assert state["k"].shape == state["v"].shape == (3, 11, 2, 2)
    assert attention(attention_window=4).initial_state(3)["k"].shape == (3, 4, 4, 2)
    assert attention().initial_state(1)["k"].shape == (1, 2048, 4, 2)


def test_positions_count_from_anywhere():
    layer, x = attention(rotary={}, max_length=20), inputs()

    def later(x):  # by nine tokens
        q, k, v = layer._projected(x, ops.arange(9, 16, dtype="float32"))
        return layer._attended(q, k, v, causal=True)

    assert_close(compiled(later)(x), compiled(layer)(x))


def test_dropout_is_on_the_attention_weights_in_training_alone():
    layer, x = attention(dropout=0.5), inputs()
    y, expected = layer(x, training=True), reference(x, layer)
    assert_close(layer(x), expected)
    assert np.abs(to_numpy(y) - expected).max() > 1e-3


def test_half_precision_streams():
    layer = attention(dtype="mixed_bfloat16", rotary={}, qk_norm=True)
    y, state = compiled(layer.step)(inputs(1)[:, 0], layer.initial_state(2))
    for tensor in (y, state["k"], compiled(layer)(inputs())):
        assert keras.backend.standardize_dtype(tensor.dtype) == "bfloat16"


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
        GroupedQueryAttention(**options).build((None, None, 8))


def test_attention_both_ways_has_no_state():
    with pytest.raises(ValueError, match="causal=False"):
        attention(causal=False)(inputs(), return_state=True)


def test_saved_layer_is_the_layer(tmp_path):
    x = keras.Input((None, 8), name="inputs")
    options = dict(VARIANTS["everything"], rotary={"base": 500.0}, dtype="float32")
    model = EdificeModel(x, GroupedQueryAttention(4, name="a", **options)(x), name="m")
    model.save(tmp_path / "m.keras")
    loaded, x = keras.saving.load_model(tmp_path / "m.keras"), inputs()
    assert_close(loaded.predict(x, verbose=0), model.predict(x, verbose=0), 0)
    assert loaded.get_layer("a").rotary == {"base": 500.0}


@pytest.mark.parametrize("format", ["onnx", "saved_model"])
def test_export_at_an_open_length(format, tmp_path):
    x = keras.Input((None, 8), name="inputs")
    model = EdificeModel(x, attention(**VARIANTS["everything"])(x), name="model")
    path = tmp_path / ("model.onnx" if format == "onnx" else "model")
    assert export(model, path, format) <= 1e-5
