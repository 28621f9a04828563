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
BLOCKS = {
    "v1": [[16, 2], [24, 1]],
    "v2": [[1, 16, 1, 1], [2, 16, 2, 2]],
    "v3_small": [[3, 16, 16, 1, 0, 1], [5, 32, 16, 0, 1, 1], [3, 40, 24, 1, 1, 2]],
}


def small(version="v2", **options):
    given = dict(
        input_channels=2,
        num_classes=3,
        classifier_activation=None,
        width_multiplier=0.5,
        blocks=BLOCKS.get(version),
    )
    model = keras_edifice.build("mobilenet", version=version, **{**given, **options})
    return shake_statistics(shake(model))


def images(side=11, examples=2):
    return rng.normal(size=(examples, side, side, 2)).astype("float32")


def relu6(x):
    return np.clip(x, 0, 6)


def hard_swish(x):
    return x * np.clip(x + 3, 0, 6) / 6


def v1(x, w):
    for i, strides in enumerate((2, 1), 1):
        x = conv_unit(x, w, f"block{i}_depthwise", strides, relu6)
        x = conv_unit(x, w, f"block{i}_pointwise", 1, relu6)
    return x


def v2(x, w):
    y = conv_unit(x, w, "stage1_block1_depthwise", 1, relu6)
    x = conv_unit(y, w, "stage1_block1_project")  # of 16 channels to 8: nothing added
    for block, strides in [(1, 2), (2, 1)]:
        name = f"stage2_block{block}"
        y = conv_unit(x, w, f"{name}_expand", 1, relu6)
        y = conv_unit(y, w, f"{name}_depthwise", strides, relu6)
        y = conv_unit(y, w, f"{name}_project")
        x = x + y if strides == 1 else y
    return conv_unit(x, w, "last", 1, relu6)


def excited(x, w, name):
    z = x.mean((1, 2)) @ w[f"{name}/reduce/kernel"] + w[f"{name}/reduce/bias"]
    z = np.maximum(z, 0) @ w[f"{name}/expand/kernel"] + w[f"{name}/expand/bias"]
    return x * (np.clip(z + 3, 0, 6) / 6)[:, None, None]


def v3(x, w):
    for i, row in enumerate(BLOCKS["v3_small"], 1):
        *_, squeeze, hard, strides = row
        act = hard_swish if hard else lambda z: np.maximum(z, 0)
        y, unit = x, dict(epsilon=1e-3)
        if f"block{i}_expand_conv/kernel" in w:
            y = conv_unit(y, w, f"block{i}_expand", 1, act, **unit)
        y = conv_unit(y, w, f"block{i}_depthwise", strides, act, **unit)
        y = excited(y, w, f"block{i}_squeeze") if squeeze else y
        y = conv_unit(y, w, f"block{i}_project", **unit)
        x = x + y if strides == 1 else y
    return conv_unit(x, w, "last", 1, hard_swish, epsilon=1e-3)


def reference(x, model, version):
    """The three papers' networks in float64."""
    w = values(model)
    if version == "v3_small":
        stem = conv_unit(x, w, "stem", 2, hard_swish, epsilon=1e-3)
    else:
        stem = conv_unit(x, w, "stem", 2, relu6)
    x = dict(v1=v1, v2=v2, v3_small=v3)[version](stem, w).mean((1, 2))
    if version == "v3_small":
        x = hard_swish(x @ w["last_hidden/kernel"] + w["last_hidden/bias"])
    return x @ w["predictions/kernel"] + w["predictions/bias"]


@pytest.mark.parametrize("version", ["v1", "v2", "v3_small"])
def test_output_is_the_equations(version):
    model, x = small(version), images()
    assert_close(model(x), reference(x.astype("float64"), model, version), 1e-4)


@pytest.mark.parametrize(
    ("variant", "trainable", "statistics"),
    [
        ("v1", 4_231_976, 21_888),
        ("v1_0.5", 1_331_592, 10_944),
        ("v1_1.25", 6_270_840, None),
        ("v2", 3_504_872, 34_112),
        ("v2_0.5", 1_968_680, None),
        ("v2_0.75", 2_636_424, None),
        ("v2_1.4", 6_108_776, None),
        ("v3_large", 5_483_032, 24_400),
        ("v3_large_0.75", 3_993_528, None),
        ("v3_small", 2_542_856, 12_112),
        ("v3_small_0.75", 2_041_872, None),
    ],
)
def test_published_sizes(variant, trainable, statistics):
    counts = count_weights("mobilenet", variant=variant)
    assert counts == (trainable, statistics or counts[1])


@pytest.mark.parametrize(
    ("version", "width"),
    [("v1", 1024), ("v2", 1280), ("v3_large", 960), ("v3_small", 576)],
)
def test_width_of_the_features(version, width):
    model = symbolic("mobilenet", version=version, num_classes=None)
    assert model.output_shape == (None, width)


def test_depthwise_convolution_keeps_the_channels_apart():
    layer = small().get_layer("stage2_block2_depthwise_conv")
    x = rng.normal(size=(1, 5, 5, 16)).astype("float32")
    changed = x.copy()
    changed[..., 3] += rng.normal(size=(1, 5, 5))
    moved = to_numpy(layer(changed)) != to_numpy(layer(x))
    assert moved[..., 3].any()
    assert not np.delete(moved, 3, axis=-1).any()


@pytest.mark.parametrize("version", ["v2", "v3_small"])
def test_projection_of_zero_leaves_the_input_where_it_is_added(version):
    model = small(version)
    block = "stage2_block2" if version == "v2" else "block2"
    norm = model.get_layer(f"{block}_project_norm")
    for weight in (norm.gamma, norm.beta):
        weight.assign(np.zeros(weight.shape))
    add = model.get_layer(f"{block}_add")
    before, after = keras.Model(model.input, [add.input[0], add.output])(images())
    assert_close(after, before, 0)
    assert to_numpy(after).any()


def test_input_is_added_where_strides_and_width_keep_it_alone():
    added = {x.name for x in small().layers if x.name.endswith("_add")}
    assert added == {"stage2_block2_add"}
    added = {x.name for x in small("v3_small").layers if x.name.endswith("_add")}
    assert added == {"block1_add", "block2_add"}


@pytest.mark.parametrize("version", ["v2", "v3_small"])
def test_projection_has_no_activation(version):
    names = {x.name for x in small(version).layers}
    assert any(name.endswith("_project_norm") for name in names)
    assert not any("_project_" in n and n[-4:] not in ("conv", "norm") for n in names)


def test_squeezed_width_is_a_quarter_of_the_expanded():
    model = symbolic("mobilenet", version="v3_large")
    squeezed = [x.squeezed_size for x in model.layers if isinstance(x, SqueezeExcite)]
    assert squeezed == [24, 32, 32, 120, 168, 168, 240, 240]


def test_hard_swish_has_its_corners_at_three():
    y = keras.activations.get("hard_swish")(np.array([-4.0, -3.0, 0.0, 3.0, 4.0]))
    assert_close(y, [0, 0, 0, 3, 4], 1e-6)


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


def test_dropout_is_on_in_training_alone():
    model, x = small("v1", dropout=0.5, num_classes=None), images(examples=8)
    assert_close(model(x), model(x), 0)
    y = to_numpy(model(x, training=True))
    assert np.mean(y == 0) > np.mean(to_numpy(model(x)) == 0)


def test_branches_are_dropped_more_often_in_later_blocks():
    for version, rates in [
        ("v2", {"stage2_block2_drop_path": 0.2}),
        ("v3_small", {"block2_drop_path": 0.1}),
    ]:
        model = small(version, drop_path=0.2)
        found = {x.name: x.rate for x in model.layers if "drop_path" in x.name}
        assert found == rates
    with pytest.raises(ValueError, match="drop_path must be 0 for version 'v1'"):
        small("v1", drop_path=0.2)


def test_weights_start_as_the_references():
    keras.utils.set_random_seed(0)
    model = keras_edifice.build(
        "mobilenet", version="v3_small", blocks=[BLOCKS["v3_small"][0]]
    )
    kernel = to_numpy(model.get_layer("predictions").kernel)
    assert_close(kernel.std(), 0.01, 1e-4)
    assert not to_numpy(model.get_layer("predictions").bias).any()
    assert model.get_layer("stem_norm").momentum == 0.99


def test_rows_of_another_version_are_refused():
    with pytest.raises(
        ValueError, match="'v2' must have 4 numbers, received \\[16, 2\\]"
    ):
        small("v2", blocks=[[16, 2]])


def test_head_gives_probabilities_unless_logits_are_asked_for():
    model = small("v1", classifier_activation="softmax")
    assert_close(keras.ops.sum(model(images()), -1), np.ones(2))
