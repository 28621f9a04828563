import math

import keras
import numpy as np
import pytest

import keras_edifice
from keras_edifice.vision.mlp_mixer import TokenMLP
from tests.support.close import assert_close, to_numpy
from tests.support.counting import count_weights
from tests.support.shaking import shake

rng = np.random.default_rng(0)
SMALL = dict(
    image_size=6,
    patch_size=2,
    num_channels=2,
    embed_size=8,
    num_layers=2,
    token_mlp_dim=5,
    channel_mlp_dim=12,
    num_classes=3,
    classifier_activation=None,
)


def small(**options):
    return shake(keras_edifice.build("mlp_mixer", **{**SMALL, **options}))


def images(examples=2):
    return rng.normal(size=(examples, 6, 6, 2)).astype("float32")


def normalise(x, gamma, beta):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6) * gamma + beta


def reference(x, weights, num_layers=2, patch=2):
    """Equation 1 of the paper in float64."""
    w = iter(to_numpy(weight) for weight in weights)

    def mlp(z):
        z = z @ next(w) + next(w)
        z = z * (1 + np.vectorize(math.erf)(z / math.sqrt(2))) / 2
        return z @ next(w) + next(w)

    b, side = len(x), x.shape[1] // patch
    x = x.reshape(b, side, patch, side, patch, -1)
    x = np.einsum("bricjk,ijkd->brcd", x, next(w)) + next(w)
    x = x.reshape(b, side * side, -1)
    for _ in range(num_layers):
        x = x + mlp(normalise(x, next(w), next(w)).swapaxes(1, 2)).swapaxes(1, 2)
        x = x + mlp(normalise(x, next(w), next(w)))
    return normalise(x, next(w), next(w)).mean(1) @ next(w) + next(w)


def test_output_is_the_equations():
    model, x = small(), images()
    assert_close(model(x), reference(x.astype("float64"), model.weights), 1e-4)


@pytest.mark.parametrize(
    ("variant", "published"),
    [
        ("s32", 19_104_624),
        ("s16", 18_528_264),
        ("b32", 60_293_428),
        ("b16", 59_880_472),
        ("l32", 206_939_264),
        ("l16", 208_196_168),
        ("h14", 432_350_952),
    ],
)
def test_published_sizes(variant, published):
    assert count_weights("mlp_mixer", variant=variant) == (published, 0)


def permuted(x, order):
    """The images with their patches in another order."""
    patches = x.reshape(-1, 3, 2, 3, 2, 2).transpose(0, 1, 3, 2, 4, 5)
    patches = patches.reshape(-1, 9, 2, 2, 2)[:, order].reshape(-1, 3, 3, 2, 2, 2)
    return patches.transpose(0, 1, 3, 2, 4, 5).reshape(x.shape)


def test_token_mlp_alone_tells_the_patches_apart():
    model, x = small(), images()
    moved = permuted(x, rng.permutation(9))
    assert np.abs(to_numpy(model(x)) - to_numpy(model(moved))).max() > 1e-2
    for weight in model.weights:
        if "_tokens/" in weight.path:
            weight.assign(np.zeros(weight.shape))
    assert_close(model(moved), model(x))


def test_token_mlp_is_the_same_for_every_channel():
    x = rng.normal(size=(2, 9, 4)).astype("float32")
    layer = TokenMLP(5)
    layer.build(x.shape)
    shake(layer)
    y = to_numpy(layer(x))
    order = [2, 0, 3, 1]
    assert_close(layer(x[..., order]), y[..., order], 1e-6)
    changed = x.copy()
    changed[..., 1] += 1
    moved = np.abs(to_numpy(layer(changed)) - y).max((0, 1)) > 1e-4
    assert moved.tolist() == [False, True, False, False]
    shapes = [tuple(weight.shape) for weight in layer.weights]
    assert shapes == [(9, 5), (5,), (5, 9), (9,)]  # none of them by channel


def test_no_positions_are_added():
    assert not [w.path for w in small().weights if "position" in w.path]


def test_another_number_of_patches_is_refused():
    with pytest.raises(ValueError, match="expected .* received"):
        small()(np.zeros((1, 8, 8, 2), "float32"))


def test_features_are_the_mean_of_the_map():
    model, maps = small(num_classes=None), small(features_only=True)
    maps.set_weights(model.get_weights())
    x = images()
    (name, grid), *others = maps(x).items()
    assert (name, others) == ("stride_2", [])
    assert tuple(grid.shape) == (2, 3, 3, 8)
    assert_close(model(x), to_numpy(grid).mean((1, 2)), 1e-6)


@pytest.mark.parametrize("option", ["drop_path", "dropout"])
def test_regularisers_act_in_training_alone(option):
    model, x = small(**{option: 0.5}), images()
    assert_close(model(x), model(x), 0)
    assert np.abs(to_numpy(model(x, training=True)) - to_numpy(model(x))).max() > 0.1


def test_branches_are_dropped_more_often_in_later_layers():
    model = small(drop_path=0.2, num_layers=3)
    rates = {x.name: x.rate for x in model.layers if "drop_path" in x.name}
    assert rates == {
        "block2_tokens_drop_path": 0.1,
        "block2_channels_drop_path": 0.1,
        "block3_tokens_drop_path": 0.2,
        "block3_channels_drop_path": 0.2,
    }


def test_weights_start_as_in_the_authors_code():
    keras.utils.set_random_seed(0)
    options = {**SMALL, "embed_size": 64, "token_mlp_dim": 64, "channel_mlp_dim": 64}
    model = keras_edifice.build("mlp_mixer", **options)
    for weight in model.weights:
        values = to_numpy(weight)
        if weight.name == "bias" or weight.path == "predictions/kernel":
            assert not values.any()
        elif weight.name == "kernel":
            fan_in = np.prod(weight.shape[:-1])
            assert_close(values.std() * np.sqrt(fan_in), 1.0, 0.1)


def test_config_keeps_the_arguments():
    layer = TokenMLP.from_config(TokenMLP(5, 0.1, "lecun", name="a").get_config())
    assert (layer.hidden_size, layer.dropout) == (5, 0.1)
    assert (layer.initializer, layer.name) == ("lecun", "a")


def test_head_gives_probabilities_unless_logits_are_asked_for():
    model = small(classifier_activation="softmax")
    assert_close(keras.ops.sum(model(images()), -1), np.ones(2))


def test_the_map_is_what_is_pooled():
    whole, x = small(num_classes=None, pooling=None), images()
    maps = small(features_only=True)
    maps.set_weights(whole.get_weights())
    y = to_numpy(whole(x))
    assert y.shape == (2, 3, 3, 8)
    assert_close(maps(x)["stride_2"], y, 0)
    for pooling, summary in (("avg", np.mean), ("max", np.max)):
        pooled = small(num_classes=None, pooling=pooling)
        pooled.set_weights(whole.get_weights())
        assert_close(pooled(x), summary(y, axis=(1, 2)), 1e-6)
