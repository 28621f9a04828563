import keras
import numpy as np
import pytest

import keras_edifice
from tests.support.close import assert_close, to_numpy
from tests.support.compiled import compiled
from tests.support.counting import count_weights
from tests.support.shaking import shake

rng = np.random.default_rng(0)
SMALL = dict(
    input_channels=2,
    num_classes=3,
    classifier_activation=None,
    growth_rate=3,
    block_sizes=[1, 2],
    bn_size=2,
)


def small(**options):
    return keras_edifice.build("densenet", **{**SMALL, **options})


def shaken(**options):
    """With moving statistics that matter, too."""
    model = shake(small(**options))
    for weight in model.non_trainable_variables:
        if weight.name.startswith("moving_"):
            weight.assign(rng.uniform(0.5, 1.5, weight.shape))
    return model


def images(*sides, examples=2):
    sides = sides or (16, 16)
    return rng.normal(size=(examples, *sides, 2)).astype("float32")


def convolve(x, kernel, strides=1):
    """Zeros alike on both sides."""
    side = kernel.shape[0]
    border = (side // 2, side // 2)
    x = np.pad(x, [(0, 0), border, border, (0, 0)])
    rows, columns = ((n - side) // strides + 1 for n in x.shape[1:3])
    y = np.zeros((len(x), rows, columns, kernel.shape[3]))
    for i in range(rows):
        for j in range(columns):
            window = x[:, i * strides :, j * strides :][:, :side, :side]
            y[:, i, j] = np.einsum("bhwc,hwcd->bd", window, kernel)
    return y


def largest_of_3x3(x):
    x = np.pad(x, [(0, 0), (1, 1), (1, 1), (0, 0)], constant_values=-np.inf)
    rows, columns = ((n - 3) // 2 + 1 for n in x.shape[1:3])
    shifted = [
        x[:, i : i + 2 * rows - 1 : 2, j : j + 2 * columns - 1 : 2]
        for i in range(3)
        for j in range(3)
    ]
    return np.max(shifted, axis=0)


def mean_of_2x2(x):
    rows, columns = x.shape[1] // 2, x.shape[2] // 2
    x = x[:, : 2 * rows, : 2 * columns]
    return x.reshape(len(x), rows, 2, columns, 2, -1).mean((2, 4))


def reference(x, model, stem="imagenet", bn_size=2):
    """The paper's equations in float64, with the weights by name."""
    weights = {v.path: to_numpy(v) for v in model.variables}

    def convolution(x, name, strides=1):
        return convolve(x, weights[f"{name}_conv/kernel"], strides)

    def activated(x, name):
        gamma, beta, mean, variance = (
            weights[f"{name}_norm/{part}"]
            for part in ("gamma", "beta", "moving_mean", "moving_variance")
        )
        return np.maximum((x - mean) / np.sqrt(variance + 1e-5) * gamma + beta, 0)

    def unit(x, name):
        return convolution(activated(x, name), name)

    x = np.asarray(x, "float64")
    if stem == "cifar":
        x = convolution(x, "stem")
    else:
        x = largest_of_3x3(activated(convolution(x, "stem", 2), "stem"))
    for name in ("block1_layer1", "transition1", "block2_layer1", "block2_layer2"):
        if name == "transition1":
            x = mean_of_2x2(unit(x, name))
            continue
        y = x if bn_size is None else unit(x, f"{name}_1")
        x = np.concatenate([x, unit(y, f"{name}_2")], axis=-1)
    features = activated(x, "last").mean((1, 2))
    return features @ weights["predictions/kernel"] + weights["predictions/bias"]


@pytest.mark.parametrize(
    "options",
    [dict(stem="imagenet"), dict(stem="cifar"), dict(bn_size=None)],
    ids=["imagenet", "cifar", "plain"],
)
def test_output_is_the_equations(options):
    model, x = shaken(**options), images(13, 18)
    assert_close(compiled(model)(x), reference(x, model, **options), 1e-4)


@pytest.mark.parametrize(
    ("variant", "trainable", "statistics"),
    [
        ("121", 7_978_856, 83_648),
        ("161", 28_681_000, 219_936),
        ("169", 14_149_480, 158_400),
        ("201", 20_013_928, 229_056),
    ],
)
def test_published_sizes_for_imagenet(variant, trainable, statistics):
    assert count_weights("densenet", variant=variant) == (trainable, statistics)


@pytest.mark.parametrize(
    ("variant", "trainable"),
    [
        ("264", 33_337_704),
        ("cifar40", 1_019_722),
        ("cifar_bc100", 769_162),
        ("cifar_bc250", 15_324_406),
        ("cifar_bc190", 25_624_430),
    ],
)
def test_published_sizes(variant, trainable):
    assert count_weights("densenet", variant=variant)[0] == trainable


def test_size_does_not_depend_on_the_image():
    sizes = {count_weights("densenet", **SMALL, image_size=s) for s in (None, 32)}
    assert len(sizes) == 1


def test_each_layer_adds_the_growth_rate_and_each_transition_takes_its_part():
    model = small(block_sizes=[2, 3, 1], compression=0.6, initial_channels=5)
    channels = 5
    for block, size in enumerate([2, 3, 1], 1):
        if block > 1:
            channels = int(0.6 * channels)
            assert model.get_layer(f"transition{block - 1}_conv").filters == channels
        channels += size * 3
        last = model.get_layer(f"block{block}_layer{size}_join").output
        assert last.shape[-1] == channels


def test_channels_at_the_start_are_two_growth_rates():
    assert small().get_layer("stem_conv").filters == 6


def test_every_layer_of_a_block_is_given_what_the_block_was_given_unchanged():
    model, x = shaken(block_sizes=[3]), images()
    joined = [model.get_layer(f"block1_layer{i}_join").output for i in (1, 2, 3)]
    stem = model.get_layer("stem_pool").output
    first, *maps = map(to_numpy, compiled(keras.Model(model.input, [stem, *joined]))(x))
    earlier = first
    for y in maps:  # each begins with all of the one before
        assert y.shape[-1] == earlier.shape[-1] + 3
        assert_close(y[..., : earlier.shape[-1]], earlier, 0)
        assert_close(y[..., :6], first, 0)
        earlier = y


def test_no_convolution_has_a_bias_and_all_but_the_first_come_after_their_norm():
    model = small()
    convolutions = [x for x in model.layers if isinstance(x, keras.layers.Conv2D)]
    assert len(convolutions) == 1 + 3 * 2 + 1
    assert not any(layer.use_bias for layer in convolutions)
    for layer in convolutions[1:]:
        relu = layer.input._keras_history.operation
        norm = relu.input._keras_history.operation
        assert (relu.name, norm.name) == (
            layer.name.replace("conv", "relu"),
            layer.name.replace("conv", "norm"),
        )


def test_no_transition_follows_the_last_block():
    names = {x.name for x in small(block_sizes=[1, 1, 1]).layers}
    pools = {x for x in names if "transition" in x and x.endswith("pool")}
    assert pools == {"transition1_pool", "transition2_pool"}


def test_kernels_start_with_the_variance_of_he():
    model = keras_edifice.build("densenet", block_sizes=[1], growth_rate=24)
    for name, inputs in [("stem", 3 * 49), ("block1_layer1_2", 9 * 96)]:
        kernel = to_numpy(model.get_layer(f"{name}_conv").kernel)
        assert_close(kernel.std(), np.sqrt(2 / inputs), 4e-2)  # over 7000 draws
    assert_close(model.get_layer("predictions").bias, np.zeros(10), 0)


@pytest.mark.parametrize(("stem", "first"), [("imagenet", 4), ("cifar", 1)])
def test_stage_maps_have_their_strides(stem, first):
    maps = small(stem=stem, features_only=True, block_sizes=[1, 1, 1]).output
    sizes = keras.tree.map_structure(lambda y: y.shape[-1], maps)
    # Halved and three more each time: 6 + 3 = 9, 4 + 3 = 7, 3 + 3 = 6.
    assert sizes == {
        f"stride_{first}": 9,
        f"stride_{2 * first}": 7,
        f"stride_{4 * first}": 6,
    }
    model = small(stem=stem, features_only=True)
    maps = compiled(model)(images(32, 32))
    assert {k: tuple(y.shape[1:3]) for k, y in maps.items()} == {
        f"stride_{s}": (32 // s, 32 // s) for s in (first, 2 * first)
    }


def test_last_map_is_the_one_that_is_pooled():
    options, x = dict(num_classes=None), images(32, 32)
    whole = shaken(pooling=None, **options)
    maps, pooled = small(features_only=True, **options), small(**options)
    for model in (maps, pooled):
        model.set_weights(whole.get_weights())
    y = to_numpy(compiled(whole)(x))
    assert y.min() == 0  # after the last ReLU
    assert_close(compiled(maps)(x)["stride_8"], y, 1e-6)
    assert_close(compiled(pooled)(x), y.mean((1, 2)), 1e-6)


def test_classes_need_pooling():
    with pytest.raises(ValueError, match="when there are classes, received None"):
        small(pooling=None)


@pytest.mark.parametrize("stem", ["imagenet", "cifar"])
def test_any_size_is_taken_down_to_32(stem):
    model = small(stem=stem, block_sizes=[1, 1, 1, 1])
    for size in [(32, 32), (33, 47)]:
        assert tuple(compiled(model)(images(*size)).shape) == (2, 3)


def test_dropout_follows_every_convolution_but_the_first_in_training_alone():
    model, x = small(dropout=0.5, stem="cifar", block_sizes=[1, 1]), images(4, 4)
    drops = {z.name for z in model.layers if isinstance(z, keras.layers.Dropout)}
    convolutions = {z.name for z in model.layers if isinstance(z, keras.layers.Conv2D)}
    assert drops == {
        name.replace("conv", "dropout") for name in convolutions - {"stem_conv"}
    }
    y = to_numpy(model(x))
    assert_close(model(x), y, 0)
    assert np.any(to_numpy(model(x, training=True)) != y)


def test_maps_that_a_layer_adds_are_dropped_by_a_rate_that_grows_with_depth():
    model, x = shaken(drop_path=0.5), images(examples=16)
    rates = {x.name: x.rate for x in model.layers if "drop_path" in x.name}
    growing = np.linspace(0.0, 0.5, sum(SMALL["block_sizes"]))
    assert_close(list(rates.values()), growing[1:], 1e-6)
    layer = model.get_layer(list(rates)[-1])
    both = keras.Model(model.input, [layer.input, layer.output])
    before, after = map(to_numpy, both(x, training=True))
    dropped = np.abs(after).max((1, 2, 3)) == 0
    assert 0 < dropped.sum() < 16
    assert_close(after[~dropped], 2 * before[~dropped], 1e-5)
    before, after = map(to_numpy, both(x))
    assert_close(after, before, 0)


def test_config_keeps_the_arguments():
    options = dict(compression=0.7, bn_size=None, stem="cifar", dropout=0.2)
    model = small(**options)
    again = type(model).from_config(model.get_config())
    assert {name: again.options[name] for name in options} == options
    assert [w.path for w in again.weights] == [w.path for w in model.weights]
