import json
import re
from pathlib import Path

import keras
import numpy as np
import pytest
from keras import layers, ops

import keras_edifice
from keras_edifice import profile
from keras_edifice.blocks.self_attention import SelfAttention
from keras_edifice.profiling import build_without_weights

GUIDES = Path(__file__).parent.parent / "guides"


def around(layer, *shape):
    """A model of one layer."""
    x = keras.Input(shape, name="x")
    return keras.Model(x, layer(x), name="around")


@pytest.mark.parametrize(
    ("layer", "shape", "expected"),
    [
        (layers.Dense(5), (7, 3), 7 * 3 * 5),
        (layers.EinsumDense("btd,dhk->bthk", (None, 2, 4)), (7, 3), 7 * 3 * 2 * 4),
        (layers.Conv1D(5, 3, dilation_rate=2, padding="causal"), (9, 4), 9 * 3 * 4 * 5),
        (layers.Conv2D(6, 3), (9, 9, 4), 7 * 7 * 9 * 4 * 6),
        (layers.Conv2D(6, 3, strides=2, padding="same"), (9, 9, 4), 25 * 9 * 4 * 6),
        (layers.Conv2D(6, (3, 1), groups=2), (9, 9, 4), 7 * 9 * 3 * 2 * 6),
        (layers.Conv2D(6, 3, dilation_rate=2), (9, 9, 4), 25 * 9 * 4 * 6),
        (layers.Conv2D(6, 3, dilation_rate=2, padding="same"), (8, 8, 4), 64 * 216),
        (layers.Conv3D(5, 3), (5, 5, 5, 2), 27 * 27 * 2 * 5),
        (layers.DepthwiseConv1D(3, dilation_rate=2), (9, 4), 5 * 3 * 4),
        (layers.DepthwiseConv2D(3, depth_multiplier=2), (9, 9, 4), 49 * 9 * 8),
        (layers.DepthwiseConv2D(5, strides=2, padding="same"), (9, 9, 4), 25 * 25 * 4),
        (layers.SeparableConv2D(5, 3), (9, 9, 4), 49 * 9 * 4 + 49 * 4 * 5),
        (layers.Conv2DTranspose(5, 3, strides=2), (6, 6, 4), 36 * 9 * 4 * 5),
        (layers.Conv1DTranspose(5, 4, strides=2, padding="same"), (6, 4), 6 * 4 * 20),
        (layers.LSTM(5), (11, 3), 11 * 4 * 5 * (3 + 5)),
        (layers.LSTM(5, unroll=True), (11, 3), 11 * 4 * 5 * (3 + 5)),
        (layers.GRU(5, return_sequences=True), (11, 3), 11 * 3 * 5 * (3 + 5)),
        (layers.Bidirectional(layers.LSTM(5)), (11, 3), 2 * 11 * 4 * 5 * (3 + 5)),
        # Q, K, V and the output; QKᵀ and its product with V.
        (SelfAttention(2), (7, 6), 4 * 7 * 6 * 6 + 2 * 7 * 7 * 6),
        (layers.BatchNormalization(), (7, 6), 0),
        (layers.Embedding(9, 4), (7,), 0),
    ],
    ids=lambda x: getattr(x, "name", None),
)
def test_a_layer_counts_as_worked_out_by_hand(layer, shape, expected):
    assert profile(around(layer, *shape)).multiply_accumulates == expected


def test_an_lstm_of_ours_counts_as_that_of_keras():
    options = dict(embed_size=3, hidden_size=5, num_layers=1, window_size=7)
    rows = profile(build_without_weights("lstm", **options)).rows
    counted = {row.kind: row.multiply_accumulates for row in rows}
    assert counted["LSTMLayer"] == 7 * 4 * 5 * (3 + 5)


def test_mamba_counts_its_projections():
    steps, embed, hidden, width, rank, state = 7, 3, 4, 8, 2, 3
    projections = [
        embed * hidden,
        hidden * 2 * width,
        width * (rank + 2 * state),
        rank * width,
        width * hidden,
    ]  # the filter and the scan are element-wise
    tiny = keras_edifice.info("mamba").tiny
    found = profile(build_without_weights("mamba", **tiny))
    assert found.multiply_accumulates == steps * sum(projections)


PUBLISHED = json.loads((GUIDES / "profiles.json").read_text())


@pytest.mark.parametrize(
    "row", PUBLISHED, ids=lambda x: f"{x['architecture']}-{x['options']['variant']}"
)
def test_published_figures_are_reached(row):
    text, unit = row["published"].split()
    digits = len(text.partition(".")[2])
    published, scale = float(text), {"M": 1e6, "G": 1e9}[unit]
    model = build_without_weights(row["architecture"], **row["options"])
    counted = profile(model).multiply_accumulates / scale
    rounding = 0.5 * 10.0**-digits
    assert abs(counted - published) <= max(0.01 * published, rounding)


def test_resnet_costs_less_with_the_stride_on_the_first_convolution():
    options = dict(variant="imagenet50", image_size=224)
    first, second = (
        profile(build_without_weights("resnet", stride_on=s, **options))
        for s in ("1x1", "3x3")
    )
    # Three stages begin with a stride: a 1x1 and a 3x3 of a quarter of the places.
    at_full_size = [(56, 256, 128), (28, 512, 256), (14, 1024, 512)]
    saved = sum(0.75 * side**2 * x * y for side, x, y in at_full_size)
    assert second.multiply_accumulates - first.multiply_accumulates == saved


def small():
    x = keras.Input((4,), name="x")
    y = layers.Dense(3, name="first")(x)
    y = layers.BatchNormalization(name="norm")(y)
    y = layers.Dropout(0.5, name="dropout")(y)
    return keras.Model(x, layers.Dense(2, name="last")(y), name="small")


def test_rows_name_the_layers_with_their_shapes_and_weights():
    rows = [
        (r.layer, r.kind, r.output_shape, r.parameters, r.activation_bytes)
        for r in profile(small()).rows
    ]
    assert rows == [
        ("first", "Dense", [1, 3], 15, 12),
        ("norm", "BatchNormalization", [1, 3], 12, 12),
        ("dropout", "Dropout", [1, 3], 0, 12),
        ("last", "Dense", [1, 2], 8, 8),
    ]


def test_totals():
    found = profile(small())
    assert (found.trainable_parameters, found.other_parameters) == (29, 6)
    assert found.parameters == 35
    assert found.multiply_accumulates == 4 * 3 + 3 * 2
    assert found.activation_bytes == 44
    assert found.peak_activation_bytes == 16 + 12  # the input and the first output


def test_an_output_that_is_used_later_is_kept():
    x = keras.Input((4,))
    y = layers.Dense(8, name="wide")(x)
    z = layers.Dense(2, name="narrow")(y)
    model = keras.Model(x, layers.Concatenate(name="both")([y, z]))
    assert profile(model).peak_activation_bytes == 4 * (8 + 2 + 10)


def test_frozen_weights_are_not_trainable():
    model = small()
    model.get_layer("first").trainable = False
    found = profile(model)
    assert (found.trainable_parameters, found.parameters) == (14, 35)


def test_a_model_inside_is_shown_by_its_layers_and_a_shared_layer_once():
    shared = layers.Dense(5, name="shared")
    x = keras.Input((5,))
    inner = keras.Model(x, {"a": shared(shared(x)), "b": x * 2.0}, name="inner")
    y = keras.Input((5,))
    model = keras.Model(y, layers.Add(name="sum")(list(inner(y).values())))
    found = profile(model)
    rows = {row.layer: row.parameters for row in found.rows}
    assert rows["inner/shared"] == 30 and rows["inner/shared (use 2)"] == 0
    assert "sum" in rows and len(rows) == 4
    assert found.multiply_accumulates == 2 * 25 and found.parameters == 30


def test_a_row_of_layers():
    model = keras.Sequential([keras.Input((6,)), layers.Dense(8), layers.Dense(4)])
    assert profile(model).multiply_accumulates == 6 * 8 + 8 * 4


def test_lower_precision_takes_fewer_bytes():
    bytes_of = {
        dtype: profile(around(layers.Dense(5, dtype=dtype), 3)).activation_bytes
        for dtype in ("float32", "mixed_bfloat16")
    }
    assert bytes_of == {"float32": 20, "mixed_bfloat16": 10}


@pytest.mark.filterwarnings("ignore:Layer .* does not have a `quantize`")
def test_a_quantised_model_counts_the_same():
    model = small()
    before = profile(model).multiply_accumulates
    model.quantize("int8")
    assert profile(model).multiply_accumulates == before


def test_a_model_works_after_it_was_profiled():
    model, x = (
        keras_edifice.build("lstm", embed_size=3, hidden_size=5),
        np.ones((2, 60, 3)),
    )
    before = ops.convert_to_numpy(model(x))
    profile(model)
    np.testing.assert_array_equal(ops.convert_to_numpy(model(x)), before)
    assert not model.losses


def test_open_sizes_are_given_by_name():
    model = build_without_weights("resnet", hidden_size=4, block_sizes=[1, 1])
    small, large = (
        profile(model, image_size=side).multiply_accumulates for side in (16, 32)
    )
    head = 4 * 2 * model.options["num_classes"]
    assert large - head == 4 * (small - head)


def test_wrong_sizes_are_one_line():
    model = build_without_weights("resnet", hidden_size=4, block_sizes=[1, 1])
    for sizes, words in [
        ({}, "resnet leaves image_size open; pass its size"),
        ({"image_size": 0}, "image_size must be a positive int, received 0"),
        ({"side": 8}, "resnet leaves image_size open, received side=8"),
    ]:
        with pytest.raises(TypeError, match=words) as error:
            profile(model, **sizes)
        assert "\n" not in str(error.value)


def test_what_is_no_functional_model_is_refused():
    with pytest.raises(TypeError, match="profile takes a functional Keras model"):
        profile(layers.Dense(3))


@keras.saving.register_keras_serializable("tests")
class UntilLarge(layers.Layer):
    def call(self, x):
        def body(x):
            return (x @ x,)

        return ops.while_loop(lambda x: ops.max(x) < 5.0, body, (x,))[0]

    def compute_output_shape(self, input_shape):
        return input_shape


def test_a_loop_over_data_is_refused_by_the_name_of_its_layer():
    with pytest.raises(ValueError, match=r"^loop \(UntilLarge\): the steps of a loop"):
        profile(around(UntilLarge(name="loop"), 4, 4))


def test_json_holds_totals_and_rows():
    held = json.loads(profile(small()).to_json())
    assert held["model"] == "small" and held["input_shapes"] == {"x": [1, 4]}
    assert held["multiply_accumulates"] == 18
    assert held["rows"][3]["layer"] == "last" and held["rows"][3]["parameters"] == 8


def test_text_has_a_line_for_each_layer():
    lines = str(profile(small())).splitlines()
    assert lines[0] == "small, one example"
    assert lines[-1].split() == ["last", "Dense", "1", "x", "2", "8", "6", "8"]
    assert any("35, 29 of them trainable" in line for line in lines)


@pytest.mark.parametrize("ending", ["svg", "html"])
def test_chart_shows_the_layers_that_multiply(ending, tmp_path):
    path = tmp_path / f"chart.{ending}"
    profile(small()).chart(path)
    text = path.read_text()
    assert "first" in text and "last" in text and "dropout" not in text


def test_a_chart_of_nothing_or_of_another_kind_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"must end in .svg, .png or .html"):
        profile(small()).chart(tmp_path / "chart.gif")
    with pytest.raises(ValueError, match="no layer of around multiplies"):
        profile(around(layers.ReLU(), 3)).chart(tmp_path / "chart.svg")


def test_a_model_without_weights_reports_wrong_options():
    with pytest.raises(TypeError, match="mlp needs input_size"):
        build_without_weights("mlp")
    model = build_without_weights("mlp", input_size=4, hidden_sizes=[3])
    assert profile(model).parameters == 15


def test_the_code_of_the_guide_runs(capsys):
    text = (GUIDES / "profiling.md").read_text()
    exec(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1], {})
    assert "multiply-accumulates" in capsys.readouterr().out
