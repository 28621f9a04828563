import functools

import keras
import numpy as np
import pytest
from keras import ops

from keras_edifice.exporting import export
from keras_edifice.model import EdificeModel
from keras_edifice.ops import attention as module
from keras_edifice.ops.attention import blockwise_sdpa, sdpa
from keras_edifice.ops.tracing import export_scope
from tests.support.applied import gradients_in_all
from tests.support.close import assert_close, to_numpy
from tests.support.compiled import compiled
from tests.support.numerical import numerical_gradient

rng = np.random.default_rng(0)


def reference(q, k, v, bias=None, mask=None, sinks=None, slopes=None, **options):
    """The equations of the module, a loop over examples, heads and queries."""
    q, k, v = (np.asarray(x, "float64") for x in (q, k, v))
    scale, cap = (
        options.get("scale", q.shape[-1] ** -0.5),
        options.get("logit_soft_cap"),
    )
    window, offset = options.get("window"), options.get("q_offset", 0)
    batch, length, heads, _ = q.shape
    full = (batch, heads, length, k.shape[1])
    bias = np.broadcast_to(np.zeros(()) if bias is None else bias, full)
    mask = np.broadcast_to(np.ones((), bool) if mask is None else mask, full)
    y = np.zeros((batch, length, heads, v.shape[-1]))
    for b, h, t in np.ndindex(batch, heads, length):
        group = h // (heads // k.shape[2])
        i = t + int(np.broadcast_to(offset, batch)[b])
        total, kept = 0.0 if sinks is None else np.exp(float(sinks[h])), 0.0
        for j in range(k.shape[1]):
            seen = mask[b, h, t, j] and (j <= i or not options.get("causal"))
            if not seen or (window is not None and abs(i - j) >= window):
                continue
            score = scale * q[b, t, h] @ k[b, j, group]
            score = score if cap is None else cap * np.tanh(score / cap)
            score = score + bias[b, h, t, j]
            score = score - (0.0 if slopes is None else slopes[h] * abs(i - j))
            total, kept = total + np.exp(score), kept + np.exp(score) * v[b, j, group]
        y[b, t, h] = kept / total if total else 0.0
    return y


def arguments(t=5, s=5, heads=4, kv_heads=4, size=3, value_size=3):
    q = rng.normal(size=(2, t, heads, size))
    k = rng.normal(size=(2, s, kv_heads, size))
    v = rng.normal(size=(2, s, kv_heads, value_size))
    return [x.astype("float32") for x in (q, k, v)]


def normal(*shape):
    return rng.normal(size=shape).astype("float32")


def random_mask(*shape):
    return rng.uniform(size=shape) < 0.6


SHAPES = {
    "one token": dict(t=1, s=1),
    "odd lengths": dict(t=7, s=10),
    "grouped": dict(kv_heads=2, value_size=7),
    "one key head": dict(kv_heads=1, value_size=2, t=6, s=9),
}
SLOPES = np.array([0.5, 0.2, 0.1, 1.0])
OPTIONS = {
    "nothing": lambda t, s: {},
    "causal": lambda t, s: dict(causal=True),
    "window to both sides": lambda t, s: dict(window=2, scale=1.0),
    "after a cache": lambda t, s: dict(causal=True, q_offset=s - t),
    "rows": lambda t, s: dict(causal=True, q_offset=np.array([0, 2]), window=3),
    "shared bias": lambda t, s: dict(bias=normal(1, 4, 1, s), causal=True),
    "mask": lambda t, s: dict(mask=random_mask(2, 1, t, s)),
    "masked queries": lambda t, s: dict(mask=random_mask(2, 4, t, 1)),
    "slopes": lambda t, s: dict(slopes=SLOPES, causal=True),
    "everything": lambda t, s: dict(
        bias=normal(2, 1, t, s),
        mask=random_mask(2, 4, t, s),
        window=4,
        q_offset=s - t,
        scale=0.3,
        logit_soft_cap=1.0,
        slopes=SLOPES,
        sinks=normal(4),
    ),
}
CASES = [
    *((shape, "causal") for shape in SHAPES),
    *(("odd lengths", name) for name in OPTIONS if name != "causal"),
    ("grouped", "nothing"),
    ("grouped", "everything"),
]


def tensors(arrays):
    return [ops.convert_to_tensor(x) for x in arrays]


def with_tensors(options):
    """The arrays among the options as tensors."""
    return {
        name: ops.convert_to_tensor(x) if isinstance(x, np.ndarray) else x
        for name, x in options.items()
    }


def attended(arrays, options):
    """By both forms, compiled in one."""
    options = with_tensors(options)

    def both(q, k, v):
        return sdpa(q, k, v, **options), blockwise_sdpa(
            q, k, v, block_size=3, **options
        )

    return compiled(both)(*tensors(arrays))


@pytest.mark.parametrize(("shape", "name"), CASES)
def test_output_is_the_equation(shape, name):
    q, k, v = arguments(**SHAPES[shape])
    options = OPTIONS[name](q.shape[1], k.shape[1])
    expected = reference(q, k, v, **options)
    for y in attended([q, k, v], options):
        assert_close(y, expected)


@pytest.mark.parametrize(
    ("options", "learned"),
    [
        (dict(causal=True, q_offset=1), {}),
        (dict(causal=True), dict(bias=(1, 2, 1, 5))),
        (dict(window=3, logit_soft_cap=1.0), dict(bias=(2, 1, 4, 5), sinks=(2,))),
    ],
)
def test_gradients_are_those_of_the_equation(options, learned):
    arrays = arguments(t=4, s=5, heads=2, kv_heads=1, size=2, value_size=3)
    arrays += [normal(*shape) for shape in learned.values()]
    mask = random_mask(2, 1, 4, 5)
    mask[0, 0, 1] = False  # a query that sees nothing
    weights = normal(2, 4, 2, 3)

    def attend(q, k, v, *more):  # by both forms, with one gradient for the two
        more = dict(zip(learned, more, strict=True), **options)
        seen = ops.convert_to_tensor(mask)
        at_once = sdpa(q, k, v, mask=seen, **more)
        return at_once + 2.0 * sdpa(q, k, v, mask=seen, block_size=2, **more)

    found = gradients_in_all(attend, arrays, weights)
    names = ["q", "k", "v", *learned]
    for n, gradient in enumerate(found):

        def value(x, n=n):
            changed = dict(zip(names, [*arrays[:n], x, *arrays[n + 1 :]], strict=True))
            return 3.0 * (reference(**changed, mask=mask, **options) * weights).sum()

        assert_close(gradient, numerical_gradient(value, arrays[n]), 1e-4)


@pytest.mark.parametrize("options", [{}, dict(causal=True), dict(logit_soft_cap=5.0)])
def test_a_query_that_sees_nothing_gives_zero(options):
    arrays = arguments()
    mask = np.ones((2, 5), bool)
    mask[1] = False
    for y in attended(arrays, dict(mask=mask, **options)):
        assert (to_numpy(y)[1] == 0).all()
        assert np.abs(to_numpy(y)[0]).min() > 0


def test_weights_are_returned_and_their_rows_sum_to_one():
    q, k, v = arguments(kv_heads=2)
    mask = random_mask(2, 5)
    mask[:, 0] = True
    options = dict(causal=True, mask=ops.convert_to_tensor(mask))
    attend = functools.partial(sdpa, return_weights=True, **options)
    y, weights = compiled(attend)(*tensors([q, k, v]))
    assert weights.shape == (2, 4, 5, 5)
    assert_close(ops.sum(weights, axis=-1), np.ones((2, 4, 5)), 1e-6)
    assert (
        to_numpy(weights)[~np.broadcast_to(mask[:, None, None], weights.shape)] == 0
    ).all()
    assert_close(y, reference(q, k, v, causal=True, mask=mask[:, None, None]))
    assert_close(ops.einsum("bhts,bshd->bthd", weights, np.repeat(v, 2, 2)), y)


def test_a_sink_takes_weight_from_all_keys():
    q, k, v = tensors(arguments())
    sinks = ops.convert_to_tensor(normal(4))
    _, weights = sdpa(q, k, v, sinks=sinks, return_weights=True)
    assert to_numpy(ops.sum(weights, axis=-1)).max() < 1


def test_a_constant_added_to_a_row_of_scores_changes_nothing():
    arrays = arguments()
    shift = 30.0 * normal(2, 4, 5, 1)
    for shifted, y in zip(
        attended(arrays, dict(bias=shift)), attended(arrays, {}), strict=True
    ):
        assert_close(shifted, y)


def test_dropout_drops_and_rescales_the_weights():
    q, k, _ = arguments(t=40, s=40)
    v = np.broadcast_to(np.eye(40, dtype="float32")[:, None], (2, 40, 4, 40))
    seed = keras.random.SeedGenerator(0)
    q, k, v = tensors([q, k, v])
    dropped, weights = sdpa(q, k, v, dropout=0.25, seed=seed, return_weights=True)
    dropped = to_numpy(ops.transpose(dropped, (0, 2, 1, 3)))
    assert 0.2 < (dropped == 0).mean() < 0.3
    assert_close(dropped, np.where(dropped == 0, 0, to_numpy(weights) / 0.75))


@pytest.mark.parametrize(
    ("dtype", "options"),
    [("float16", dict(causal=True)), ("bfloat16", dict(window=9))],
)
def test_half_precision_accumulates_in_float32(dtype, options):
    arrays = [ops.cast(x, dtype) for x in arguments(t=12, s=12, size=8, value_size=8)]
    expected = reference(*(ops.cast(x, "float32") for x in arrays), **options)
    # The rounding of the result and, in a kernel, of the weights: 8 bits or 11.
    tolerance = 2e-2 if dtype == "bfloat16" else 2e-3
    for y in attended(arrays, options):
        assert keras.backend.standardize_dtype(y.dtype) == dtype
        assert_close(ops.cast(y, "float32"), expected, tolerance)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_large_scores_are_finite(dtype):
    q, k, v = arguments(size=4)
    arrays = [ops.cast(x, dtype) for x in (70.0 * q, 70.0 * k, v)]
    mask = np.ones((2, 5), bool)
    mask[1] = False
    for y in attended(arrays, dict(causal=True, mask=mask)):
        assert np.isfinite(to_numpy(ops.cast(y, "float32"))).all()


def test_4096_tokens_in_blocks_are_those_at_once():
    q, k, v = arguments(t=4096, s=4096, heads=2, kv_heads=1, size=4, value_size=4)
    q, k, v = (x[:1] for x in (q, k, v))
    mask = np.ones((1, 4096), bool)
    mask[:, 4000:] = False
    seen = ops.convert_to_tensor(mask)
    attend = functools.partial(sdpa, mask=seen, causal=True, window=3000)
    blocks = functools.partial(attend, block_size=512)
    both = compiled(lambda *x: (attend(*x), blocks(*x)))
    expected, y = both(*tensors([q, k, v]))
    assert_close(y, expected)


def test_no_more_scores_than_those_of_a_block_exist(monkeypatch):
    sizes, product = [], module._grouped_product
    monkeypatch.setattr(module, "_has_kernel", lambda *args, **options: False)
    monkeypatch.setattr(
        module,
        "_grouped_product",
        lambda x, y: sizes.append(x.shape[2] * y.shape[3]) or product(x, y),
    )
    arrays = arguments(t=12, s=12, size=2, value_size=2)
    blocks = functools.partial(blockwise_sdpa, causal=True, block_size=4)
    gradients_in_all(blocks, arrays, arrays[0])
    assert max(sizes) == 4 * 4


def test_blocks_that_are_all_hidden_are_left_out():
    q, k, _ = (ops.swapaxes(x, 1, 2) for x in tensors(arguments(t=8, s=8)))

    def pairs(causal, window, q_offset=0):
        blocks = module._Blocks(q, k, 2, None, None, None, causal, window, q_offset)
        return set(zip(*(x.tolist() for x in blocks._visible_pairs()), strict=True))

    every = {(i, j) for i in range(4) for j in range(4)}
    assert pairs(False, None) == every
    assert pairs(True, None) == {(i, j) for i, j in every if j <= i}
    assert pairs(True, 2) == {(i, j) for i, j in every if i - 1 <= j <= i}
    assert pairs(True, 1) == {(i, i) for i in range(4)}
    assert pairs(False, 2) == {(i, j) for i, j in every if abs(i - j) <= 1}
    assert pairs(True, None, q_offset=2) == {(i, j) for i, j in every if j <= i + 1}


def test_onnx_takes_all_scores_at_once(monkeypatch):
    arrays = tensors(arguments(t=7, s=7, kv_heads=2))
    options = dict(causal=True, window=3, logit_soft_cap=1.0, block_size=3)
    expected = compiled(functools.partial(blockwise_sdpa, **options))(*arrays)
    monkeypatch.setattr(module, "_in_blocks", None)
    with export_scope("onnx"):
        y = compiled(functools.partial(blockwise_sdpa, **options))(*arrays)
    assert_close(y, expected)


@pytest.mark.parametrize(
    ("q_heads", "options", "message"),
    [
        (3, {}, "multiple of those of k, received 3 and 2"),
        (4, dict(block_size=2, dropout=0.5), "no weights to drop or to return"),
        (4, dict(block_size=2, return_weights=True), "pass block_size=None"),
        (4, dict(mask=np.ones(5, bool)), "mask must be"),
    ],
)
def test_what_does_not_fit_is_refused(q_heads, options, message):
    arrays = tensors(arguments(heads=q_heads, kv_heads=2))
    with pytest.raises(ValueError, match=message):
        sdpa(*arrays, **with_tensors(options))


@keras.saving.register_keras_serializable("tests")
class Attend(keras.layers.Layer):
    """Grouped causal attention in one layer; the first feature says what is padding."""

    def __init__(self, block_size=None, window=None, **kwargs):
        super().__init__(**kwargs)
        self.block_size, self.window = block_size, window
        self.qkv = keras.layers.Dense(24, name="qkv")

    def build(self, input_shape):
        self.qkv.build(input_shape)
        self.bias = self.add_weight((1, 4, 1, 1), "ones", name="bias")
        self.sinks = self.add_weight((4,), "ones", name="sinks")

    def call(self, x):
        q, k, v = ops.split(self.qkv(x), [12, 18], axis=-1)
        batch, time = ops.shape(x)[:2]
        q = ops.reshape(q, (batch, time, 4, 3))
        k, v = (ops.reshape(z, (batch, time, 2, 3)) for z in (k, v))
        y = sdpa(
            q,
            k,
            v,
            bias=self.bias,
            mask=x[:, :, 0] > -1.0,
            sinks=self.sinks,
            causal=True,
            window=self.window,
            block_size=self.block_size,
        )
        return ops.reshape(y, (batch, time, 12))

    def compute_output_shape(self, input_shape):
        return (*input_shape[:-1], 12)


def model_of(length, **options):
    """The sum of two layers of equal weights, one of each form."""
    inputs = keras.Input((length, 5), name="inputs")
    one, other = (Attend(size, **options) for size in (None, 4))
    outputs = keras.layers.Add()([one(inputs), other(inputs)])
    other.set_weights(one.get_weights())
    return EdificeModel(inputs, outputs, name="attend"), one, other


def assert_learned_the_same(one, other, before):
    """As each form adds to the output, both have the same gradient."""
    assert np.abs(to_numpy(one.qkv.kernel) - before).max() > 1e-3
    for weight, expected in zip(other.get_weights(), one.get_weights(), strict=True):
        assert_close(weight, expected)


def test_an_open_length_trains_and_predicts():
    model, one, other = model_of(None, window=5)
    model.compile("sgd", "mse")
    before = to_numpy(one.qkv.kernel)
    for length in (5, 12):  # TensorFlow forgets the length after the second
        x = normal(2, length, 5)
        model.fit(x, np.ones((2, length, 12)), verbose=0)
    assert_learned_the_same(one, other, before)
    assert_close(model.predict(x, verbose=0), 2.0 * to_numpy(one(x)))


def test_compiled_training_is_the_same_in_both_forms():
    model, one, other = model_of(9)
    on_tensorflow = keras.backend.backend() == "tensorflow"
    model.compile("sgd", "mse", jit_compile=on_tensorflow or "auto")
    before = to_numpy(one.qkv.kernel)
    model.fit(normal(2, 9, 5), np.ones((2, 9, 12)), verbose=0)
    assert_learned_the_same(one, other, before)


@pytest.mark.parametrize("format", ["onnx", "saved_model"])
def test_export_at_an_open_length(format, tmp_path):
    path = tmp_path / ("model.onnx" if format == "onnx" else "model")
    inputs = keras.Input((None, 5), name="inputs")
    outputs = Attend(block_size=4, window=6)(inputs)
    model = EdificeModel(inputs, outputs, name="attend")
    assert export(model, path, format) <= 1e-5
