import keras
import numpy as np
import pytest

from keras_edifice.backends.timing import forward_and_backward
from keras_edifice.blocks.causal_conv import CausalConv
from keras_edifice.blocks.feed_forward import FeedForward, GatedFFN
from keras_edifice.blocks.transformer_block import LAYOUTS, TransformerBlock, stack
from tests.support.close import assert_close, to_numpy
from tests.support.shaking import shake

rng = np.random.default_rng(0)


def block(layout, **options):
    mixer = CausalConv(3, name="conv")
    return TransformerBlock(mixer, GatedFFN(5, name="gated"), layout, **options)


def inputs():
    return rng.normal(size=(2, 6, 4)).astype("float32")


def normalised(x, epsilon=1e-5):
    """LayerNorm without weights, in float64."""
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon)


def expected(layer, layout, x):
    """The formulas of the module, the branches as functions."""

    def mixer(h):
        return to_numpy(layer.mixer(h.astype("float32")))

    def ffn(h):
        return to_numpy(layer.ffn(h.astype("float32")))

    n, x = normalised, x.astype("float64")
    if layout == "pre":
        x = x + mixer(n(x))
        return x + ffn(n(x))
    if layout == "post":
        x = n(x + mixer(x))
        return n(x + ffn(x))
    if layout == "parallel":
        return x + mixer(n(x)) + ffn(n(x))
    x = x + n(mixer(n(x)))
    return x + n(ffn(n(x)))


@pytest.mark.parametrize("layout", ["pre", "post", "parallel", "sandwich"])
def test_each_layout_is_its_formula(layout):
    layer, x = block(layout), inputs()
    layer.build(x.shape)
    for branch in (layer.mixer, layer.ffn):
        shake(branch)
    assert_close(layer(x), expected(layer, layout, x))


def test_adaptive_block_starts_as_the_identity_and_then_does_not():
    layer = TransformerBlock(CausalConv(3), FeedForward(5), "adaptive", epsilon=1e-6)
    x, condition = inputs(), rng.normal(size=(2, 3)).astype("float32")
    assert_close(layer(x, condition), x, 0)
    shake(layer)
    assert np.abs(to_numpy(layer(x, condition)) - x).max() > 1e-2


def test_layer_scale_weighs_the_branches():
    layer, x = block("pre", layer_scale=0.0), inputs()
    assert_close(layer(x), x, 0)
    layer.mixer_scale.gamma.assign(np.ones(4))
    bare = TransformerBlock(layer.mixer)
    assert_close(layer(x), bare(x), 1e-6)


def test_branches_are_dropped_in_training_alone():
    layer, x = block("pre", drop_path=0.9, dropout=0.5), inputs()
    assert_close(layer(x), layer(x, training=False), 0)
    many = np.repeat(x[:1], 64, axis=0)
    y = to_numpy(layer(many, training=True))
    kept = np.abs(y - many).max(axis=(1, 2)) > 0
    assert 0 < kept.sum() < 40  # both branches are dropped with probability 0.81


@pytest.mark.parametrize("layout", [n for n in LAYOUTS if n != "adaptive"])
def test_step_by_step_is_the_call(layout):
    layer, x = block(layout, norm="rms"), inputs()
    y, last = layer(x, return_state=True)
    state, outputs = layer.initial_state(2), []
    for t in range(6):
        y_t, state = layer.step(x[:, t], state)
        outputs.append(y_t)
    assert_close(keras.ops.stack(outputs, axis=1), y)
    assert_close(state[0], last[0], 1e-6)
    first, carried = layer(x[:, :2], return_state=True)
    second = layer(x[:, 2:], initial_state=carried)
    assert_close(keras.ops.concatenate([first, second], axis=1), y)


def test_mixer_without_a_step_says_so():
    layer = TransformerBlock(keras.layers.Dense(4, name="dense"))
    layer.build((None, 6, 4))
    with pytest.raises(TypeError, match=r"dense \(Dense\) has no step$"):
        layer.step(inputs()[:, 0], layer.initial_state(2))


def test_masked_steps_reach_the_mixer():
    layer, x = block("pre"), inputs()
    mask = np.array([[True] * 6, [True] * 3 + [False] * 3])
    changed = x.copy()
    changed[1, 3:] += 1.0
    before, after = (to_numpy(layer(z, mask=mask)) for z in (x, changed))
    assert_close(before[1, :3], after[1, :3], 0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nested_layers_survive_saving_and_int8(layout, tmp_path):
    inside = [keras.Input((6, 4))]
    inside += [keras.Input((3,))] if layout == "adaptive" else []
    model = shake(keras.Model(inside, block(layout, name="block")(*inside)))
    x = [inputs(), rng.normal(size=(2, 3)).astype("float32")][: len(inside)]
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert_close(loaded(x), model(x), 1e-6)
    model.quantize("int8")
    model.save(tmp_path / "int8.keras")
    loaded = keras.saving.load_model(tmp_path / "int8.keras")
    assert loaded.get_layer("block").ffn.gate.quantization_mode == "int8"
    assert_close(loaded(x), model(x), 1e-6)


def test_stack_drops_later_blocks_more_often_and_trains():
    inside = keras.Input((6, 4))
    rates = []

    def make(i, rate):
        rates.append(rate)
        return block("pre", drop_path=rate, name=f"block_{i}")

    model = keras.Model(inside, stack(inside, make, 3, drop_path=0.2))
    assert_close(rates, [0.0, 0.1, 0.2], 1e-12)
    model.compile("adam", "mse")
    x = inputs()
    before = model.evaluate(x, 0.5 * x, verbose=0)  # without dropped branches
    model.fit(x, 0.5 * x, epochs=10, verbose=0)
    assert model.evaluate(x, 0.5 * x, verbose=0) < before


def trained(remat):
    """Weights after two steps of a stack, and memory of its gradient."""
    keras.utils.set_random_seed(0)
    x = keras.Input((6, 4))
    layers = []

    def make(i, rate):
        mixer = CausalConv(3, name=f"conv_{i}")
        ffn = GatedFFN(512, name=f"ffn_{i}")
        layers.append(TransformerBlock(mixer, ffn, remat=remat, name=f"block_{i}"))
        return layers[-1]

    model = keras.Model(x, stack(x, make, 4))
    model.compile("sgd", "mse")
    data = np.random.default_rng(0).normal(size=(8, 6, 4)).astype("float32")
    model.fit(data, 2.0 * data, batch_size=4, epochs=1, shuffle=False, verbose=0)

    def run(x):
        for layer in layers:
            x = layer(x, training=True)
        return x

    long = np.ones((8, 128, 4), "float32")
    return model.get_weights(), forward_and_backward(run, [long]).peak_bytes()


def test_rematerialisation_trains_the_same_weights_with_less_memory():
    (kept, memory), (again, less) = trained(False), trained(True)
    for a, b in zip(kept, again, strict=True):
        assert_close(b, a, 1e-6)
    if memory is None:
        pytest.skip("this build of the backend does not count its memory")
    assert less < 0.9 * memory  # one block of four is computed at a time


def test_rematerialisation_refuses_random_branches():
    layer = block("pre", dropout=0.1, remat=True, name="block")
    with pytest.raises(ValueError, match="received one that drops; pass rates of 0"):
        layer.build((None, 6, 4))


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="layout must be one of 'pre'.*'other'"):
        block("other")
    with pytest.raises(ValueError, match="norm must be one of 'layer', 'rms'"):
        block("pre", norm="batch")
