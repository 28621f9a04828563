import keras
import numpy as np
import pytest
from keras import ops

import keras_edifice
from keras_edifice.recurrent.mlstm import MLSTM7BLayer, MLSTMLayer
from keras_edifice.recurrent.slstm import SLSTMLayer
from tests.support.close import assert_close, difference
from tests.support.compiled import compiled
from tests.support.counting import count_weights
from tests.support.shaking import shake
from tests.support.streaming import stream

rng = np.random.default_rng(0)
SIZES = dict(embed_size=3, hidden_size=4, num_heads=2, num_layers=2, proj_round=4)


def model(name="xlstm", **options):
    sizes = dict(SIZES, window_size=None, return_sequences=True)
    if name != "slstm":
        sizes |= dict(qkv_block_size=2, chunk_size=4)
    keras.utils.set_random_seed(0)
    return shake(keras_edifice.build(name, **{**sizes, **options}))


def predict(model, x):
    return model.predict(x, verbose=0)


def inputs(length=11):
    return rng.normal(size=(2, length, 3)).astype("float32")


def cells(**options):
    """The kinds of the blocks of a model, from the first to the last."""
    built = keras_edifice.build("xlstm", **{**SIZES, "qkv_block_size": 2, **options})
    kinds = {MLSTMLayer: "m", MLSTM7BLayer: "7", SLSTMLayer: "s"}
    return "".join(kinds.get(type(layer), "") for layer in built.layers)


def test_blocks_are_where_the_paper_and_the_options_put_them():
    assert cells(num_layers=11) == "msmmmmmmmsm"  # seven to one
    assert cells(num_layers=3, slstm_at=[0, 2]) == "sms"
    assert cells(num_layers=2, slstm_at=[]) == "mm"
    assert cells(num_layers=2, slstm_at="all") == cells(cells="slstm") == "ss"
    assert cells(num_layers=2, cells="mlstm") == "mm"
    assert cells(num_layers=2, cells="mlstm", block_style="7b") == "77"


@pytest.mark.parametrize(
    ("name", "options"),
    [("mlstm", {}), ("mlstm", {"block_style": "7b"}), ("slstm", {})],
    ids=["mlstm", "7b", "slstm"],
)
def test_one_kind_of_cell_is_the_architecture_of_its_name(name, options):
    mine, x = model(cells=name, **options), inputs()
    alone = model(name, **options)
    assert [v.path for v in mine.weights] == [v.path for v in alone.weights]
    assert_close(predict(mine, x), predict(alone, x), 1e-6)


def test_a_mixed_stack_is_its_blocks_one_after_the_other():
    built, x = model(), inputs()
    matrix, scalar = model("mlstm", num_layers=1), model("slstm", num_layers=1)
    blocks = keras.Model(matrix.input, matrix.get_layer("mlstm_0_add").output)
    tail = keras.Model(scalar.get_layer("slstm_0_norm").input, scalar.output)
    names = {v.path.replace("_1", "_0"): v for v in built.weights if "_1" in v.path}
    for v in matrix.weights:
        v.assign(next(w.numpy() for w in built.weights if w.path == v.path))
    for v in scalar.weights:
        own = next((w for w in built.weights if w.path == v.path), None)
        v.assign(names.get(v.path, own).numpy())
    assert_close(predict(built, x), predict(tail, predict(blocks, x)))


def test_token_by_token_is_the_whole_sequence():
    built, x = model(), inputs()
    assert_close(stream(built, x), predict(built, x), 1e-4)


def test_future_tokens_do_not_change_the_past():
    built, x = model(), inputs(14)
    changed = x.copy()
    changed[:, 10:] += 1.0
    before, after = predict(built, x), predict(built, changed)
    assert_close(after[:, :10], before[:, :10], 1e-6)
    assert difference(after[:, 10:], before[:, 10:]) > 1e-3


def test_a_common_shift_of_all_stabilisers_cancels():
    built, x = model(), inputs(6)
    streaming = keras_edifice.streaming(built)
    _, state = streaming.prefill(x[:, :3])
    factor, shifted = float(np.exp(-2.0)), {}
    for name, part in state.items():
        # (conv, C, n, m) of a matrix memory, (conv, h, c, n, m) of a scalar one.
        scaled, stabiliser = {"m": ("12", "3"), "s": ("23", "4")}[name[0]]
        kind = name[-1]
        shifted[name] = part
        if kind in scaled:
            shifted[name] = part * factor
        elif kind == stabiliser:
            shifted[name] = part + 2.0
    expected, _ = streaming.prefill(x[:, 3:], state)
    assert_close(streaming.prefill(x[:, 3:], shifted)[0], expected)


def test_padding_changes_nothing():
    built, x = model(return_sequences=False), inputs()
    mask = ops.convert_to_tensor(np.arange(11)[None] >= np.array([[7], [7]]))
    y = compiled(lambda x: built(x, mask=mask))(ops.convert_to_tensor(x))
    assert_close(y, predict(built, x[:, 7:]))


@pytest.mark.parametrize(
    ("variant", "weights"), [("408m", 408_436_048), ("409m", 409_290_112)]
)
def test_published_sizes(variant, weights):
    found = count_weights("xlstm", variant=variant, vocab_size=50_304)
    assert found == (weights, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(cells="mlstm", slstm_at=[0]), "slstm_at places the blocks of cells='mix"),
        (dict(slstm_at=[2]), "slstm_at must be below num_layers=2, received .2."),
        (dict(block_style="7b"), "has mLSTM blocks only, received cells='mixed'; pass"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        model(**options)
