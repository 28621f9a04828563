import math

import keras
import numpy as np
import pytest

import keras_edifice
from keras_edifice.vision.swin import PatchMerging, WindowAttention
from tests.support.close import assert_close, to_numpy
from tests.support.compiled import compiled
from tests.support.counting import count_weights
from tests.support.initial import is_truncated
from tests.support.shaking import shake

rng = np.random.default_rng(0)
SMALL = dict(
    image_size=14,
    patch_size=2,
    num_channels=2,
    embed_size=4,
    depths=[2, 1],
    num_heads=[1, 2],
    window_size=3,
    num_classes=5,
    classifier_activation=None,
)


def small(**options):
    return shake(keras_edifice.build("swin", **{**SMALL, **options}))


def images(side=14, channels=2, examples=2):
    return rng.normal(size=(examples, side, side, channels)).astype("float32")


def attention(side, features=4, **options):
    layer = WindowAttention(**options)
    layer.build((None, side, side, features))
    return shake(layer)


def normalise(x, gamma, beta):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * gamma + beta


def visible(side, window, shift):
    """Which pixels of a map see each other, and their rows and columns apart."""
    places = np.stack(np.indices((side, side)), axis=-1).reshape(-1, 2)
    apart = places[:, None] - places[None]
    windows = (places - shift) % side // window
    together = (windows[:, None] == windows[None]).all(-1)
    return together & (np.abs(apart) < window).all(-1), apart


def attend(x, w, name, num_heads, window, shift):
    """Equation 4 for all pixels at once: those of other windows have no weight."""
    b, side, _, d = x.shape
    if side <= window:
        window, shift = side, 0
    more = -side % window
    x = np.pad(x, [(0, 0), (0, more), (0, more), (0, 0)])
    seen, apart = visible(side + more, window, shift)
    index = np.where(
        seen, (apart[..., 0] + window - 1) * (2 * window - 1) + apart[..., 1], 0
    )
    bias = w[f"{name}/bias_table"][index + seen * (window - 1)]
    x = x.reshape(b, -1, d)
    qkv, y = x @ w[f"{name}/qkv/kernel"] + w[f"{name}/qkv/bias"], np.zeros_like(x)
    width = d // num_heads
    for h in range(num_heads):
        part = slice(h * width, (h + 1) * width)
        q, k, v = (qkv[..., i * d : (i + 1) * d][..., part] for i in range(3))
        scores = q @ k.swapaxes(1, 2) / np.sqrt(width) + bias[..., h]
        scores = np.exp(scores) * seen
        y[..., part] = scores / scores.sum(-1, keepdims=True) @ v
    y = y @ w[f"{name}/out/kernel"] + w[f"{name}/out/bias"]
    return y.reshape(b, side + more, side + more, d)[:, :side, :side]


def merge(x, w, name):
    more = -x.shape[1] % 2
    x = np.pad(x, [(0, 0), (0, more), (0, more), (0, 0)])
    corners = [x[:, i::2, j::2] for i, j in [(0, 0), (1, 0), (0, 1), (1, 1)]]
    x = np.concatenate(corners, axis=-1)
    x = normalise(x, w[f"{name}/norm/gamma"], w[f"{name}/norm/beta"])
    return x @ w[f"{name}/reduction/kernel"]


def reference(x, model, depths=(2, 1), num_heads=(1, 2), window=3, patch=2):
    """The stages of section 3.1 in float64."""
    w = {weight.path: to_numpy(weight) for weight in model.weights}

    def norm(z, name):
        return normalise(z, w[f"{name}/gamma"], w[f"{name}/beta"])

    def dense(z, name):
        return z @ w[f"{name}/kernel"] + w[f"{name}/bias"]

    b, side = len(x), x.shape[1] // patch
    x = x.reshape(b, side, patch, side, patch, -1)
    x = np.einsum("bricjk,ijkd->brcd", x, w["patches/projection/kernel"])
    x = norm(x + w["patches/projection/bias"], "patches/layer_norm")
    for stage, (depth, heads) in enumerate(zip(depths, num_heads, strict=True), 1):
        if stage > 1:
            x = merge(x, w, f"stage{stage}_merging")
        for i in range(depth):
            name = f"stage{stage}_block{i + 1}"
            shift = i % 2 * (window // 2)
            y = norm(x, f"{name}_attention_norm")
            x = x + attend(y, w, f"{name}_attention", heads, window, shift)
            y = dense(norm(x, f"{name}_mlp_norm"), f"{name}_mlp/first")
            y = y * (1 + np.vectorize(math.erf)(y / math.sqrt(2))) / 2
            x = x + dense(y, f"{name}_mlp/second")
    return dense(norm(x, "norm").mean((1, 2)), "predictions")


@pytest.mark.parametrize(("side", "window"), [(14, 3), (12, 2), (8, 4)])
def test_output_is_the_equations(side, window):
    options = dict(image_size=side, window_size=window)
    if window == 2:  # the second stage is shifted too
        options["depths"] = [2, 2]
    model, x = small(**options), images(side)
    depths = options.get("depths", [2, 1])
    expected = reference(x.astype("float64"), model, depths, window=window)
    assert_close(compiled(model)(x), expected, 1e-4)


@pytest.mark.parametrize(
    ("variant", "published"),
    [
        ("tiny", 28_288_354),
        ("small", 49_606_258),
        ("base", 87_768_224),
        ("base_384", 87_903_584),
        ("large", 196_532_476),
        ("large_384", 196_735_516),
    ],
)
def test_published_sizes(variant, published):
    # No weight that is not trained: the masks and the index are not saved.
    assert count_weights("swin", variant=variant) == (published, 0)


def test_features_have_the_width_of_the_last_stage():
    model = small(num_classes=None)
    assert model.output_shape == (None, 8)
    assert tuple(compiled(model)(images()).shape) == (2, 8)


def test_no_token_looks_across_the_edge_of_a_shifted_map():
    layer, x = attention(8, num_heads=2, window_size=4, shift=2), images(8, 4)
    changed = x.copy()
    changed[:, 0, 0] += 1
    moved = np.abs(to_numpy(layer(changed)) - to_numpy(layer(x))).max((0, 3)) > 1e-6
    assert moved[:2, :2].all()
    assert moved.sum() == 4  # the other three corners share its window


def test_windows_without_a_shift_are_apart():
    layer, x = attention(8, num_heads=2, window_size=4), images(8, 4)
    changed = x.copy()
    changed[:, 3, 3] += 1
    moved = np.abs(to_numpy(layer(changed)) - to_numpy(layer(x))).max((0, 3)) > 1e-6
    assert moved[:4, :4].all()
    assert moved.sum() == 16


@pytest.mark.parametrize("shift", [0, 1])
def test_attention_rows_sum_to_one(shift):
    layer = attention(7, num_heads=2, window_size=3, shift=shift)
    weights = to_numpy(layer.attention_weights(images(7, 4)))
    assert weights.shape == (2 * 9, 2, 9, 9)
    assert_close(weights.sum(-1), np.ones((18, 2, 9)), 1e-6)
    assert (weights == 0).any() == bool(shift)


def test_bias_is_learned_for_each_distance():
    layer = attention(3, num_heads=2, window_size=3)
    table = np.zeros((25, 2), "float32")
    above, left = (1 + 2) * 5 + 0 + 2, (0 + 2) * 5 + 1 + 2
    table[above, 0] = table[left, 1] = 100.0
    layer.bias_table.assign(table)
    assert layer.bias_table.trainable
    weights = to_numpy(layer.attention_weights(images(3, 4))).reshape(2, 2, *[3] * 4)
    for i, j in np.ndindex(3, 3):
        if i:
            assert_close(weights[:, 0, i, j, i - 1, j], np.ones(2), 1e-6)
        if j:
            assert_close(weights[:, 1, i, j, i, j - 1], np.ones(2), 1e-6)


def test_window_is_the_map_where_that_is_not_larger():
    layer = attention(3, num_heads=1, window_size=7, shift=3)
    assert (layer.window, layer.shifts, layer.mask) == ((3, 3), (0, 0), None)
    assert tuple(layer.bias_table.shape) == (25, 1)


def test_moving_the_image_by_a_window_moves_what_is_inside():
    options = dict(image_size=16, window_size=2, depths=[2], num_heads=[2])
    model, x = small(features_only=True, **options), images(16)
    run = compiled(model)
    y = to_numpy(run(x)["stride_2"])
    moved = to_numpy(run(np.roll(x, 4, axis=(1, 2)))["stride_2"])
    assert_close(moved[:, 3:7, 3:7], y[:, 1:5, 1:5], 1e-4)
    assert np.abs(moved[:, 2, 2] - y[:, 0, 0]).max() > 1e-2  # it was at the edge


def test_merging_has_no_bias_and_halves_odd_maps():
    layer = PatchMerging()
    assert layer.compute_output_shape((None, 7, 8, 3)) == (None, 4, 4, 6)
    assert tuple(layer(np.ones((1, 7, 8, 3), "float32")).shape) == (1, 4, 4, 6)
    assert not layer.reduction.use_bias


def test_norms_follow_the_patches_and_precede_the_pooling():
    model = small()
    assert model.get_layer("patches").norm
    assert model.get_layer("pool").input is model.get_layer("norm").output


def test_every_second_block_is_shifted():
    model = small(depths=[3, 2])
    shifts = {x.name: x.shift for x in model.layers if isinstance(x, WindowAttention)}
    assert shifts == {
        "stage1_block1_attention": 0,
        "stage1_block2_attention": 1,
        "stage1_block3_attention": 0,
        "stage2_block1_attention": 0,
        "stage2_block2_attention": 1,
    }


def test_stage_maps_have_their_strides():
    maps = small(features_only=True)(images())
    shapes = {name: tuple(y.shape) for name, y in maps.items()}
    assert shapes == {"stride_2": (2, 7, 7, 4), "stride_4": (2, 4, 4, 8)}


def test_weights_fit_another_image_size():
    model, large = small(), small(image_size=22)
    large.set_weights(model.get_weights())
    x = images(22)
    assert_close(compiled(large)(x), reference(x.astype("float64"), large), 1e-4)


def test_pooling_is_the_mean_the_maximum_or_none():
    x, options = images(), dict(num_classes=None)
    whole = small(pooling=None, **options)
    y = to_numpy(whole(x))
    for pooling, summary in [("avg", np.mean), ("max", np.max)]:
        model = small(pooling=pooling, **options)
        model.set_weights(whole.get_weights())
        assert_close(model(x), summary(y, axis=(1, 2)), 1e-6)


@pytest.mark.parametrize("option", ["drop_path", "dropout"])
def test_regularisers_act_in_training_alone(option):
    quiet = dict(drop_path=0.0, dropout=0.0)
    model, x = small(**{**quiet, option: 0.5}), images()
    assert_close(model(x), model(x), 0)
    assert np.abs(to_numpy(model(x, training=True)) - to_numpy(model(x))).max() > 0.1


def test_branches_are_dropped_more_often_in_later_blocks():
    rates = {x.name: x.rate for x in small().layers if "drop_path" in x.name}
    assert rates == {
        "stage1_block2_attention_drop_path": 0.1,
        "stage1_block2_mlp_drop_path": 0.1,
        "stage2_block1_attention_drop_path": 0.2,
        "stage2_block1_mlp_drop_path": 0.2,
    }


def test_weights_start_truncated():
    keras.utils.set_random_seed(0)
    model = keras_edifice.build("swin", **{**SMALL, "embed_size": 32})
    for weight in model.weights:
        if weight.name in ("kernel", "bias_table"):
            assert is_truncated(to_numpy(weight)), weight.path
        elif weight.name == "bias":
            assert not to_numpy(weight).any()


def test_config_keeps_the_arguments():
    layer = WindowAttention(2, 5, 2, "xavier", name="a")
    layer = WindowAttention.from_config(layer.get_config())
    assert (layer.num_heads, layer.window_size, layer.shift) == (2, 5, 2)
    assert (layer.initializer, layer.name) == ("xavier", "a")


def test_stages_need_a_depth_and_heads_each():
    with pytest.raises(ValueError, match="one number for each stage, received 3 and 2"):
        small(depths=[1, 1, 1])


def test_head_gives_probabilities_unless_logits_are_asked_for():
    model = small(classifier_activation="softmax")
    assert_close(keras.ops.sum(model(images()), -1), np.ones(2))
