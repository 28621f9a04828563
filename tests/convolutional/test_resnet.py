import keras
import numpy as np
import pytest

import keras_edifice
from keras_edifice.convolutional.resnet import PadShortcut
from tests.support.close import assert_close, to_numpy
from tests.support.counting import count_weights
from tests.support.gradients import gradients
from tests.support.shaking import shake

rng = np.random.default_rng(0)


def small(**options):
    given = dict(input_channels=2, num_classes=3, hidden_size=4, block_sizes=[1, 2])
    return keras_edifice.build("resnet", **{**given, **options})


def images(side=16, examples=2):
    return rng.normal(size=(examples, side, side, 2)).astype("float32")


@pytest.mark.parametrize(
    ("depth", "trainable", "statistics"),
    [
        (18, 11_689_512, 9_600),
        (34, 21_797_672, 17_024),
        (50, 25_557_032, 53_120),
        (101, 44_549_160, 105_344),
        (152, 60_192_808, 151_424),
    ],
)
def test_published_sizes_for_imagenet(depth, trainable, statistics):
    counts = count_weights("resnet", variant=f"imagenet{depth}")
    assert counts == (trainable, statistics)


@pytest.mark.parametrize(
    ("depth", "trainable"),
    [(20, 269_722), (32, 464_154), (44, 658_586), (56, 853_018), (110, 1_727_962)],
)
def test_published_sizes_for_cifar(depth, trainable):
    assert count_weights("resnet", variant=f"cifar{depth}")[0] == trainable


def test_size_does_not_depend_on_the_image():
    sizes = {count_weights("resnet", image_size=s) for s in (None, 32, 224)}
    assert sizes == {(11_181_642, 9_600)}


def test_stride_of_a_bottleneck_does_not_change_the_size():
    sizes = {count_weights("resnet", depth=50, stride_on=s) for s in ("1x1", "3x3")}
    assert len(sizes) == 1


def test_call_of_the_learning_path():
    assert count_weights("resnet", depth=18, input_channels=3)[0] == 11_181_642
    options = dict(depth=18, input_channels=3, hidden_size=2)
    model = keras_edifice.classifier("resnet", 10, **options)
    scores = model.predict(np.ones((2, 32, 32, 3), "float32"), verbose=0)
    assert scores.shape == (2, 10)
    assert_close(scores.sum(-1), np.ones(2))


@pytest.mark.parametrize("block_type", ["basic", "bottleneck"])
@pytest.mark.parametrize("shortcut", ["projection", "pad"])
def test_blocks_of_zero_scale_are_relu_of_the_shortcut(block_type, shortcut):
    model = small(
        zero_init_residual=True, block_type=block_type, shortcut=shortcut, stem="cifar"
    )
    for stage, block in [(1, 1), (2, 1), (2, 2)]:
        name = f"stage{stage}_block{block}"
        before, branch = model.get_layer(f"{name}_add").input
        parts = keras.Model(
            model.input, [before, branch, model.get_layer(f"{name}_relu").output]
        )
        shortcut_value, branch_value, y = map(to_numpy, parts(images()))
        assert_close(branch_value, np.zeros_like(y), 0)
        assert_close(y, np.maximum(shortcut_value, 0), 0)
        assert y.max() > 0


def test_block_is_relu_of_the_sum():
    model = shake(small())
    layer = model.get_layer("stage2_block2_add")
    parts = keras.Model(
        model.input, [*layer.input, model.get_layer("stage2_block2_relu").output]
    )
    shortcut, branch, y = map(to_numpy, parts(images(64)))
    assert_close(y, np.maximum(shortcut + branch, 0), 1e-6)
    assert branch.min() < 0  # no activation before the sum


def test_shortcuts_are_projected_where_the_shape_changes_alone():
    def projected(**options):
        layers = small(**options).layers
        return {n for x in layers for n in [x.name] if n.endswith("shortcut_conv")}

    second = "stage2_block1_shortcut_conv"
    assert projected(block_type="basic") == {second}
    assert projected(block_type="bottleneck") == {
        "stage1_block1_shortcut_conv",
        second,
    }
    assert projected(shortcut="pad") == set()


def test_no_convolution_has_a_bias():
    convolutions = [x for x in small().layers if isinstance(x, keras.layers.Conv2D)]
    assert len(convolutions) == 1 + 2 * 3 + 1
    assert not any(layer.use_bias for layer in convolutions)


def test_pad_shortcut_takes_every_second_pixel_and_adds_zeros():
    x, layer = images(5), PadShortcut(6, 2)
    y = to_numpy(layer(x))
    assert y.shape == layer.compute_output_shape(x.shape) == (2, 3, 3, 6)
    assert_close(y[..., :2], x[:, ::2, ::2], 0)
    assert_close(y[..., 2:], np.zeros((2, 3, 3, 4)), 0)


@pytest.mark.parametrize(("stem", "first"), [("imagenet", 4), ("cifar", 1)])
def test_stage_maps_have_their_strides(stem, first):
    model = small(stem=stem, features_only=True, block_sizes=[1, 1, 1])
    maps = model.predict(images(32), verbose=0)
    assert {k: v.shape[1:] for k, v in maps.items()} == {
        f"stride_{s}": (32 // s, 32 // s, 4 * s // first)
        for s in (first, 2 * first, 4 * first)
    }


@pytest.mark.parametrize("stem", ["imagenet", "cifar"])
def test_any_size_is_taken_down_to_32(stem):
    model = small(stem=stem, block_sizes=[1, 1, 1, 1])
    for size in [(32, 32), (33, 47)]:
        x = rng.normal(size=(2, *size, 2)).astype("float32")
        assert model.predict(x, verbose=0).shape == (2, 3)


@pytest.mark.skipif(
    keras.backend.backend() == "jax",
    reason="XLA compiles 152 layers for over ten seconds; the other backends show it",
)
def test_stem_of_the_deepest_gets_a_gradient():
    model = keras_edifice.build(
        "resnet",
        depth=152,
        hidden_size=1,
        num_classes=2,
        classifier_activation=None,
        image_size=32,
    )
    x = rng.normal(size=(1, 32, 32, 3)).astype("float32")
    by_weight, _ = gradients(model, x, lambda y: keras.ops.sum(keras.ops.square(y)))
    paths = [w.path for w in model.trainable_variables]
    stem = by_weight[paths.index("stem_conv/kernel")]
    assert np.isfinite(stem).all()
    assert np.any(stem != 0)


def test_stride_is_on_the_convolution_that_was_asked_for():
    for stride_on, strided in [("1x1", 1), ("3x3", 2)]:
        model = small(block_type="bottleneck", stride_on=stride_on)
        strides = [model.get_layer(f"stage2_block1_{i}_conv").strides for i in (1, 2)]
        assert strides[strided - 1] == (2, 2)
        assert strides[2 - strided] == (1, 1)


def test_pooling_is_the_mean_the_maximum_or_none():
    x, options = images(), dict(num_classes=None)
    whole = small(pooling=None, **options)
    y = to_numpy(whole(x))
    for pooling, summary in [("avg", np.mean), ("max", np.max)]:
        model = small(pooling=pooling, **options)
        model.set_weights(whole.get_weights())
        assert_close(model(x), summary(y, axis=(1, 2)), 1e-6)


def test_classes_need_pooling():
    with pytest.raises(ValueError, match="when there are classes, received None"):
        small(pooling=None)


def test_dropout_is_on_in_training_alone():
    model, x = small(dropout=0.5, num_classes=None), images(examples=8)
    assert_close(model(x), model(x), 0)
    y = to_numpy(model(x, training=True))
    assert np.mean(y == 0) > np.mean(to_numpy(model(x)) == 0)


def test_a_branch_is_dropped_or_doubled_by_a_rate_that_grows_with_depth():
    model, x = shake(small(drop_path=0.5)), images(examples=16)
    rates = {x.name: x.rate for x in model.layers if "drop_path" in x.name}
    assert rates == {"stage2_block1_drop_path": 0.25, "stage2_block2_drop_path": 0.5}
    names = "stage2_block1_relu", "stage2_block2_2_norm", "stage2_block2_relu"
    parts = keras.Model(model.inputs, [model.get_layer(n).output for n in names])
    before, branch, after = map(to_numpy, parts(x, training=True))
    dropped = np.abs(after - before).max((1, 2, 3)) == 0
    assert 0 < dropped.sum() < 16
    kept = ~dropped
    assert_close(after[kept], np.maximum(before[kept] + 2 * branch[kept], 0), 1e-5)
    assert_close(model(x), model(x), 0)


def test_mirrored_image_and_kernels_give_the_mirrored_map():
    model = shake(small(features_only=True, stem="cifar", block_sizes=[2]))
    mirrored = small(features_only=True, stem="cifar", block_sizes=[2])
    mirrored.set_weights(
        [w[:, ::-1] if w.ndim == 4 else w for w in model.get_weights()]
    )
    x = images(7)
    y = to_numpy(model(x)["stride_1"])
    assert_close(mirrored(x[:, :, ::-1])["stride_1"], y[:, :, ::-1], 1e-4)


def test_channels_first_is_refused():
    keras.config.set_image_data_format("channels_first")
    try:
        with pytest.raises(ValueError, match="must be channels last"):
            small()
    finally:
        keras.config.set_image_data_format("channels_last")


def test_step_by_step_training_survives_strided_shortcuts():
    model = small(
        hidden_size=8, block_type="basic", block_sizes=[1, 1, 1], stem="cifar"
    )
    model.compile("sgd", "sparse_categorical_crossentropy", jit_compile=False)
    x, y = images(48, 96), rng.integers(3, size=96)
    losses = model.fit(x, y, epochs=2, verbose=0).history["loss"]
    assert np.isfinite(losses).all()
