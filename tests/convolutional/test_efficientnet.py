import keras
import numpy as np
import pytest

import keras_edifice
from keras_edifice.blocks.squeeze_excite import SqueezeExcite
from tests.support.close import assert_close, to_numpy
from tests.support.convolution import conv_unit, shake_statistics, values
from tests.support.counting import count_weights, symbolic
from tests.support.shaking import shake

rng = np.random.default_rng(0)
BLOCKS = [[1, 3, 1, 16, 1], [6, 5, 2, 16, 2]]  # expansion, kernel, strides, filters, n
STRIDES = {"stage1_block1": 1, "stage2_block1": 2, "stage2_block2": 1}
QUIET = dict(dropout=0.0, drop_path=0.0)


def small(**options):
    given = dict(
        input_channels=2,
        num_classes=3,
        classifier_activation=None,
        width_multiplier=0.5,
        blocks=BLOCKS,
    )
    model = keras_edifice.build("efficientnet", **{**given, **options})
    return shake_statistics(shake(model))


def images(side=11, examples=2):
    return rng.normal(size=(examples, side, side, 2)).astype("float32")


def silu(x):
    return x / (1 + np.exp(-x))


def unit(x, w, name, strides=1, activation=silu):
    return conv_unit(x, w, name, strides, activation, "same", 1e-3)


def excited(x, w, name):
    z = x.mean((1, 2)) @ w[f"{name}/reduce/kernel"] + w[f"{name}/reduce/bias"]
    z = silu(z) @ w[f"{name}/expand/kernel"] + w[f"{name}/expand/bias"]
    return x / (1 + np.exp(-z))[:, None, None]


def reference(x, model):
    """The network of the paper in float64."""
    w = values(model)
    x = unit(x, w, "stem", 2)
    for name, strides in STRIDES.items():
        y = x
        if name != "stage1_block1":
            y = unit(y, w, f"{name}_expand")
        y = unit(y, w, f"{name}_depthwise", strides)
        y = unit(excited(y, w, f"{name}_squeeze"), w, f"{name}_project", 1, None)
        x = x + y if name == "stage2_block2" else y
    x = unit(x, w, "last").mean((1, 2))
    return x @ w["predictions/kernel"] + w["predictions/bias"]


@pytest.mark.parametrize("side", [8, 11])
def test_output_is_the_equations(side):
    model, x = small(), images(side)
    assert_close(model(x), reference(x.astype("float64"), model), 1e-4)


@pytest.mark.parametrize(
    ("variant", "trainable", "statistics"),
    [
        ("b0", 5_288_548, 42_016),
        ("b1", 7_794_184, 62_048),
        ("b2", 9_109_994, 67_568),
        ("b3", 12_233_232, 87_296),
        ("b4", 19_341_616, 125_200),
        ("b5", 30_389_784, 172_736),
        ("b6", 43_040_704, 224_432),
        ("b7", 66_347_960, 310_720),
    ],
)
def test_published_sizes(variant, trainable, statistics):
    assert count_weights("efficientnet", variant=variant) == (trainable, statistics)


def test_size_does_not_depend_on_the_image():
    given = dict(variant="b0", num_classes=10)
    sizes = {count_weights("efficientnet", image_size=s, **given) for s in (None, 32)}
    assert len(sizes) == 1


def test_stages_have_the_strides_of_table_1():
    model = symbolic("efficientnet", image_size=64)
    ends = ["stem_silu"] + [f"stage{i}_block1_project_norm" for i in range(1, 8)]
    sides = [model.get_layer(name).output.shape[1] for name in ends]
    assert [64 // side for side in sides] == [2, 2, 4, 8, 16, 16, 32, 32]


def test_only_the_first_block_of_a_stage_has_strides():
    model = symbolic("efficientnet", depth_multiplier=1.4)
    strided = [
        x.name
        for x in model.layers
        if isinstance(x, keras.layers.DepthwiseConv2D) and x.strides == (2, 2)
    ]
    assert strided == [f"stage{i}_block1_depthwise_conv" for i in (2, 3, 4, 6)]


def test_depth_is_rounded_up_and_every_width_is_scaled():
    model = small(depth_multiplier=1.1)
    names = {x.name for x in model.layers}
    assert "stage1_block2_project_conv" in names
    assert "stage2_block3_project_conv" in names
    assert "stage2_block4_project_conv" not in names
    widths = [model.get_layer(f"{n}_conv").filters for n in ("stem", "last")]
    assert widths == [16, 640]


def test_squeezed_width_is_a_quarter_of_the_input_of_the_block():
    squeezed = [
        x.squeezed_size
        for x in symbolic("efficientnet").layers
        if isinstance(x, SqueezeExcite)
    ]
    assert squeezed[:6] == [8, 4, 6, 6, 10, 10]
    assert squeezed[-2:] == [48, 48]
    tiny = small(se_ratio=0.01)
    assert tiny.get_layer("stage1_block1_squeeze").squeezed_size == 1


def test_scales_of_the_channels_lie_between_zero_and_one():
    model, x = small(), images(examples=8)
    layer = model.get_layer("stage2_block2_squeeze")
    scales = to_numpy(layer.scales(keras.Model(model.input, layer.input)(x)))
    assert scales.shape == (8, 1, 1, 48)
    assert 0 < scales.min() < scales.max() < 1


def test_no_expansion_at_ratio_one():
    expanded = {x.name for x in small().layers if x.name.endswith("_expand_conv")}
    assert expanded == {"stage2_block1_expand_conv", "stage2_block2_expand_conv"}


def test_branches_are_dropped_more_often_in_later_blocks():
    model = symbolic("efficientnet", drop_path=0.16)
    rates = {x.name: x.rate for x in model.layers if "drop_path" in x.name}
    assert list(rates)[0] == "stage2_block2_drop_path"
    assert_close(
        list(rates.values()), [0.01 * i for i in (2, 4, 6, 7, 9, 10, 12, 13, 14)], 1e-9
    )


def test_without_dropping_only_the_statistics_tell_training_apart():
    model, x = small(**QUIET), images(examples=8)
    assert not any("drop" in layer.name for layer in model.layers)
    for layer in model.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.trainable = False  # inference mode, for normalisations
    assert_close(model(x, training=True), model(x), 1e-6)


@pytest.mark.parametrize("option", ["dropout", "drop_path"])
def test_regularisers_act_in_training_alone(option):
    model, x = small(**{**QUIET, option: 0.5}), images(examples=16)
    for layer in model.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.trainable = False
    assert_close(model(x), model(x), 0)
    assert np.abs(to_numpy(model(x, training=True)) - to_numpy(model(x))).max() > 1e-2


def test_stage_maps_have_their_strides():
    maps = small(features_only=True)(images(16))
    shapes = {name: tuple(y.shape[1:]) for name, y in maps.items()}
    assert shapes == {"stride_2": (8, 8, 8), "stride_4": (4, 4, 8)}


def test_pooling_is_the_mean_the_maximum_or_none():
    x, options = images(), dict(num_classes=None)
    whole = small(pooling=None, **options)
    y = to_numpy(whole(x))
    for pooling, summary in [("avg", np.mean), ("max", np.max)]:
        model = small(pooling=pooling, **options)
        model.set_weights(whole.get_weights())
        assert_close(model(x), summary(y, axis=(1, 2)), 1e-5)
    with pytest.raises(ValueError, match="when there are classes, received None"):
        small(pooling=None)


def test_head_starts_uniform_within_one_over_the_root_of_the_classes():
    keras.utils.set_random_seed(0)
    model = keras_edifice.build("efficientnet", blocks=BLOCKS, num_classes=25)
    kernel = to_numpy(model.get_layer("predictions").kernel)
    assert 0.19 < np.abs(kernel).max() <= 0.2
    norm = model.get_layer("stem_norm")
    assert (norm.momentum, norm.epsilon) == (0.99, 1e-3)


def test_incomplete_rows_are_refused():
    with pytest.raises(
        ValueError, match="must have 5 numbers .* received \\[1, 3, 1\\]"
    ):
        small(blocks=[[1, 3, 1]])


def test_head_gives_probabilities_unless_logits_are_asked_for():
    model = small(classifier_activation="softmax")
    assert_close(keras.ops.sum(model(images()), -1), np.ones(2))
