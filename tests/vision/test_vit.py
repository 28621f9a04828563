import math

import keras
import numpy as np
import pytest

import keras_edifice
from keras_edifice.blocks.position_table import resize_position_table, sincos_2d
from tests.support.close import assert_close, to_numpy
from tests.support.counting import count_weights
from tests.support.shaking import shake

rng = np.random.default_rng(0)
SMALL = dict(
    image_size=8,
    patch_size=4,
    num_channels=2,
    embed_size=12,
    num_layers=2,
    num_heads=3,
    num_classes=5,
    classifier_activation=None,
)


def small(**options):
    return shake(keras_edifice.build("vit", **{**SMALL, **options}))


def images(side=8, examples=2):
    return rng.normal(size=(examples, side, side, 2)).astype("float32")


def normalise(x, gamma, beta):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6) * gamma + beta


def attend(x, qkv, b_qkv, out, b_out, num_heads):
    d, width = x.shape[-1], x.shape[-1] // num_heads
    y, q_k_v = np.zeros_like(x), x @ qkv + b_qkv
    for h in range(num_heads):
        part = slice(h * width, (h + 1) * width)
        q, k, v = (q_k_v[..., i * d : (i + 1) * d][..., part] for i in range(3))
        scores = np.exp(q @ k.swapaxes(1, 2) / np.sqrt(width))
        y[..., part] = scores / scores.sum(-1, keepdims=True) @ v
    return y @ out + b_out


def reference(x, weights, num_layers=2, num_heads=3, patch=4):
    """Equations 1 to 4 of the paper in float64."""
    w = iter(to_numpy(weight) for weight in weights)
    b, side = len(x), x.shape[1] // patch
    x = x.reshape(b, side, patch, side, patch, -1).transpose(0, 1, 3, 2, 4, 5)
    kernel, bias = next(w), next(w)
    z = x.reshape(b, side * side, -1) @ kernel.reshape(-1, kernel.shape[-1]) + bias
    z = np.concatenate([np.repeat(next(w), b, axis=0), z], axis=1) + next(w)
    for _ in range(num_layers):
        h = normalise(z, next(w), next(w))
        z = z + attend(h, next(w), next(w), next(w), next(w), num_heads)
        h = normalise(z, next(w), next(w)) @ next(w) + next(w)
        h = h * (1 + np.vectorize(math.erf)(h / math.sqrt(2))) / 2
        z = z + h @ next(w) + next(w)
    z = normalise(z, next(w), next(w))
    return z[:, 0] @ next(w) + next(w)


def test_output_is_the_equations():
    model, x = small(), images()
    assert_close(model(x), reference(x.astype("float64"), model.weights), 1e-4)


@pytest.mark.parametrize(
    ("variant", "published"),
    [
        ("ti16", 5_717_416),
        ("s32", 22_878_952),
        ("s16", 22_050_664),
        ("b32", 88_224_232),
        ("b16", 86_567_656),
        ("l32", 306_535_400),
        ("l16", 304_326_632),
        ("h14", 632_045_800),
        ("b16_384", 86_859_496),
        ("l16_384", 304_715_752),
    ],
)
def test_published_sizes(variant, published):
    assert count_weights("vit", variant=variant) == (published, 0)


def test_call_of_the_learning_path():
    model = keras_edifice.build(
        "vit",
        image_size=32,
        patch_size=8,
        num_channels=3,
        embed_size=256,
        num_heads=8,
        num_layers=6,
        num_classes=10,
    )
    assert model.count_params() == 4_795_658
    assert model.predict(np.ones((2, 32, 32, 3)), verbose=0).shape == (2, 10)


def permuted(x, order):
    """The images with their four patches in another order."""
    patches = [x[:, i : i + 4, j : j + 4] for i in (0, 4) for j in (0, 4)]
    a, b, c, d = (patches[i] for i in order)
    return np.concatenate(
        [np.concatenate([a, b], axis=2), np.concatenate([c, d], axis=2)], axis=1
    )


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_positions_alone_tell_the_patches_apart(pool):
    model, x = small(pool=pool), images()
    moved = permuted(x, [2, 0, 3, 1])
    assert np.abs(to_numpy(model(x)) - to_numpy(model(moved))).max() > 1e-2
    table = model.get_layer("positions").table
    table.assign(np.zeros(table.shape))
    assert_close(model(moved), model(x))


def test_positions_differ_from_the_start():
    table = to_numpy(keras_edifice.build("vit", **SMALL).get_layer("positions").table)
    assert len(np.unique(table[0], axis=0)) == 5


def test_attention_rows_sum_to_one():
    model, x = small(), images()
    layer = model.get_layer("block2_attention")
    tokens = keras.Model(model.input, layer.input)(x)
    weights = layer.attention_weights(tokens)
    assert tuple(weights.shape) == (2, 3, 5, 5)
    assert_close(keras.ops.sum(weights, -1), np.ones((2, 3, 5)), 1e-6)


def test_heads_change_the_output_and_not_the_count():
    three, two, x = small(), small(num_heads=2), images()
    two.set_weights(three.get_weights())
    assert three.count_params() == two.count_params()
    assert np.abs(to_numpy(three(x)) - to_numpy(two(x))).max() > 1e-3


def test_all_tokens_and_the_map_are_those_that_are_read_out():
    model, x = small(num_classes=None), images()
    tokens, maps = small(return_sequences=True), small(features_only=True)
    mean, largest, every = (
        small(num_classes=None, pool=pool) for pool in ("mean", "max", None)
    )
    for other in (tokens, maps, mean, largest, every):
        other.set_weights(model.get_weights())
    y = to_numpy(tokens(x))
    assert y.shape == (2, 5, 12)
    assert_close(model(x), y[:, 0], 1e-6)
    assert_close(mean(x), y[:, 1:].mean(1), 1e-5)
    assert_close(largest(x), y[:, 1:].max(1), 1e-6)
    assert_close(every(x), y[:, 1:].reshape(2, 2, 2, 12), 1e-6)
    (name, grid), *others = maps(x).items()
    assert (name, others) == ("stride_4", [])
    assert_close(grid, y[:, 1:].reshape(2, 2, 2, 12), 1e-6)


def test_fixed_positions_are_not_learned():
    model = small(pos_embed="sincos")
    layer = model.get_layer("positions")
    assert not layer.trainable_variables
    assert_close(layer.table[0, 1:], sincos_2d(12, (2, 2)), 1e-6)
    assert_close(layer.table[0, 0], np.zeros(12), 0)


def test_queries_keys_and_values_without_bias():
    with_bias, without = small(), small(qkv_bias=False)
    assert with_bias.count_params() - without.count_params() == 2 * 3 * 12


def test_pre_training_head_is_a_tanh():
    model, x = small(num_classes=None, representation_size=7), images()
    assert model.output_shape == (None, 7)
    before = keras.Model(model.input, model.get_layer("pre_logits").input)(x)
    kernel, bias = (to_numpy(w) for w in model.get_layer("pre_logits").weights)
    assert_close(model(x), np.tanh(to_numpy(before) @ kernel + bias))


def test_weights_move_to_another_image_size(tmp_path):
    path = tmp_path / "small.weights.h5"
    model, large = small(), small(image_size=16)
    model.save_weights(path)
    large.load_weights(path)
    for weight, old in zip(large.weights, model.get_weights(), strict=True):
        if weight.path == "positions/table":
            assert weight.shape == (1, 17, 12)
            old = resize_position_table(old, (4, 4))
        assert_close(weight, old, 1e-6)
    assert np.isfinite(to_numpy(large(images(16)))).all()


def test_weights_start_as_in_the_authors_code():
    keras.utils.set_random_seed(0)
    model = keras_edifice.build("vit", **{**SMALL, "embed_size": 48})
    values = {w.path: to_numpy(w) for w in model.weights}
    limit = np.sqrt(6 / (48 + 48))
    for path in ("block1_attention/qkv/kernel", "block1_attention/out/kernel"):
        assert 0.99 * limit < np.abs(values[path]).max() <= limit
    limit = np.sqrt(6 / (48 + 4 * 48))
    assert 0.99 * limit < np.abs(values["block1_mlp/first/kernel"]).max() <= limit
    assert 0 < np.abs(values["block1_mlp/first/bias"]).max() < 1e-5
    assert_close(values["positions/table"].std(), 0.02, 2e-3)
    for path in ("predictions/kernel", "class_token/token", "patches/projection/bias"):
        assert not values[path].any()


def test_truncated_normal_reaches_every_matrix():
    model = keras_edifice.build("vit", **SMALL, initializer="truncated")
    for weight in model.weights:
        if weight.name == "kernel" and "patches" not in weight.path:
            assert 0 < np.abs(to_numpy(weight)).max() <= 0.04
        if weight.name == "bias":
            assert not to_numpy(weight).any()


def test_regularisers_act_in_training_alone():
    x = images(examples=16)
    for option in ("dropout", "attention_dropout", "drop_path"):
        model = small(**{option: 0.5})
        assert_close(model(x), model(x), 0)
        assert (
            np.abs(to_numpy(model(x, training=True)) - to_numpy(model(x))).max() > 0.1
        )


def test_branches_are_dropped_more_often_in_later_blocks():
    model = small(drop_path=0.2, num_layers=3)
    rates = {x.name: x.rate for x in model.layers if "drop_path" in x.name}
    assert rates == {
        "block2_attention_drop_path": 0.1,
        "block2_mlp_drop_path": 0.1,
        "block3_attention_drop_path": 0.2,
        "block3_mlp_drop_path": 0.2,
    }


def test_head_gives_probabilities_unless_logits_are_asked_for():
    model = small(classifier_activation="softmax")
    assert_close(keras.ops.sum(model(images()), -1), np.ones(2))


def test_channels_first_is_refused():
    keras.config.set_image_data_format("channels_first")
    try:
        with pytest.raises(ValueError, match="must be channels last"):
            small()
    finally:
        keras.config.set_image_data_format("channels_last")
