import math

import keras
import numpy as np
import pytest

import keras_edifice
from keras_edifice.vision.focalnet import FocalModulation
from tests.support.close import assert_close, difference, to_numpy
from tests.support.compiled import compiled
from tests.support.counting import count_weights
from tests.support.initial import is_truncated
from tests.support.shaking import shake

rng = np.random.default_rng(0)
SMALL = dict(
    patch_size=2,
    num_channels=2,
    embed_size=4,
    depths=[1, 1],
    focal_levels=[2, 1],
    num_classes=3,
    classifier_activation=None,
)


def small(**options):
    return shake(keras_edifice.build("focalnet", **{**SMALL, **options}))


def images(side=12, channels=2, examples=2):
    return rng.normal(size=(examples, side, side, channels)).astype("float32")


def modulation(**options):
    layer = FocalModulation(**options)
    layer.build((None, None, None, 4))
    return shake(layer)


def gelu(x):
    return x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2


def normalise(x, gamma, beta):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * gamma + beta


def patches(x, kernel, bias, strides, padding):
    size = kernel.shape[0]
    x = np.pad(x, [(0, 0), *[(padding, padding)] * 2, (0, 0)])
    rows, columns = ((n - size) // strides + 1 for n in x.shape[1:3])
    y = np.zeros((len(x), rows, columns, kernel.shape[-1]))
    for i, j in np.ndindex(rows, columns):
        patch = x[:, i * strides :, j * strides :][:, :size, :size]
        y[:, i, j] = np.einsum("bijk,ijkd->bd", patch, kernel) + bias
    return y


def depthwise(x, kernel):
    border = kernel.shape[0] // 2
    padded = np.pad(x, [(0, 0), (border, border), (border, border), (0, 0)])
    y = np.zeros_like(x)
    for i, j in np.ndindex(*kernel.shape[:2]):
        part = padded[:, i : i + x.shape[1], j : j + x.shape[2]]
        y += part * kernel[i, j, :, 0]
    return y


class Reference:
    """Equations 4 to 6 and the stages of section 3.3, in float64."""

    def __init__(self, weights, **options):
        self.w = {weight.path: to_numpy(weight) for weight in weights}
        self.options = options

    def dense(self, x, name):
        return x @ self.w[f"{name}/kernel"] + self.w[f"{name}/bias"]

    def norm(self, x, name):
        return normalise(x, self.w[f"{name}/gamma"], self.w[f"{name}/beta"])

    def modulate(self, x, name):
        d, levels = x.shape[-1], 0
        y = self.dense(x, f"{name}/projection")
        q, z, gates = y[..., :d], y[..., d : 2 * d], y[..., 2 * d :]
        total = 0
        while (kernel := self.w.get(f"{name}/context{levels + 1}/kernel")) is not None:
            z = gelu(depthwise(z, kernel))
            total = total + z * gates[..., levels, None]
            levels += 1
        assert gates.shape[-1] == levels + 1
        total = total + gelu(z.mean((1, 2), keepdims=True)) * gates[..., levels, None]
        if self.options.get("normalize_modulator"):
            total = total / (levels + 1)
        y = q * self.dense(total, f"{name}/modulator")
        if self.options.get("post_norm_in_modulation"):
            y = self.norm(y, f"{name}/norm")
        return self.dense(y, f"{name}/out")

    def mlp(self, x, name):
        return self.dense(gelu(self.dense(x, f"{name}/first")), f"{name}/second")

    def residual(self, x, branch, name):
        if self.options.get("post_norm"):
            y = self.norm(branch(x, name), f"{name}_norm")
        else:
            y = branch(self.norm(x, f"{name}_norm"), name)
        return x + y * self.w.get(f"{name}_scale/gamma", 1.0)

    def __call__(self, x):
        overlap = self.options.get("overlap_down")
        for stage in (1, 2):
            name = f"stage{stage}_patches"
            kernel, bias = self.w[f"{name}/kernel"], self.w[f"{name}/bias"]
            assert kernel.shape[0] == (3 if overlap else 2)
            x = patches(x, kernel, bias, 2, 1 if overlap else 0)
            x = self.norm(x, f"{name}_norm")
            x = self.residual(x, self.modulate, f"stage{stage}_block1_modulation")
            x = self.residual(x, self.mlp, f"stage{stage}_block1_mlp")
        return self.dense(self.norm(x, "norm").mean((1, 2)), "predictions")


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(post_norm=True, overlap_down=True, layer_scale=0.5),
        dict(
            normalize_modulator=True,
            post_norm_in_modulation=True,
            focal_levels=1,
            focal_window=[5, 3],
        ),
    ],
)
def test_output_is_the_equations(options):
    model, x = small(**options), images()
    expected = Reference(model.weights, **options)(x.astype("float64"))
    assert_close(compiled(model)(x), expected, 1e-4)


@pytest.mark.parametrize(
    ("variant", "published"),
    [
        ("tiny_srf", 28_427_116),
        ("tiny_lrf", 28_647_928),
        ("small_srf", 49_891_216),
        ("small_lrf", 50_342_440),
        ("base_srf", 88_148_144),
        ("base_lrf", 88_749_768),
        ("large_fl3", 207_100_744),
        ("large_fl4", 207_281_248),
        ("xlarge_fl3", 366_082_120),
        ("xlarge_fl4", 366_322_784),
        ("huge_fl3", 686_564_424),
        ("huge_fl4", 689_277_664),
    ],
)
def test_published_sizes(variant, published):
    assert count_weights("focalnet", variant=variant) == (published, 0)


def only_gate(layer, open_level):
    """Leaves one gate open for every pixel; q becomes one."""
    kernel, bias = (to_numpy(w).copy() for w in layer.projection.weights)
    kernel[:, :4] = kernel[:, 8:] = bias[8:] = 0
    bias[:4] = 1
    if open_level is not None:
        bias[8 + open_level] = 1
    layer.projection.set_weights([kernel, bias])
    return layer


@pytest.mark.parametrize(("level", "side"), [(0, 3), (1, 7), (2, 13)])
def test_receptive_field_grows_with_each_level(level, side):
    # 1 + (3 - 1) + (5 - 1) + (7 - 1)
    layer = only_gate(modulation(focal_levels=3), level)
    assert layer.kernel_sizes == [3, 5, 7]
    x = images(17, 4, 1)
    changed = x.copy()
    changed[:, 8, 8] += 1
    moved = np.abs(to_numpy(layer(changed)) - to_numpy(layer(x))).max((0, 3)) > 0
    rows, columns = np.nonzero(moved)
    assert (rows.max() - rows.min() + 1, columns.max() - columns.min() + 1) == (
        side,
        side,
    )


def test_global_level_reaches_every_pixel():
    layer, x = only_gate(modulation(focal_levels=1), 1), images(9, 4, 1)
    changed = x.copy()
    changed[:, 0, 0] += 1
    moved = np.abs(to_numpy(layer(changed)) - to_numpy(layer(x))).max((0, 3)) > 0
    assert moved.all()


def test_closed_gates_leave_the_biases():
    layer, x = modulation(), images(6, 4)
    kernel, bias = (to_numpy(w).copy() for w in layer.projection.weights)
    kernel[:, 8:] = bias[8:] = 0
    layer.projection.set_weights([kernel, bias])
    q = x.astype("float64") @ kernel[:, :4] + bias[:4]
    out, shift = (to_numpy(w) for w in layer.out.weights)
    expected = q * to_numpy(layer.modulator.bias) @ out + shift
    assert_close(layer(x), expected)


def test_gates_are_one_number_for_all_channels_and_without_a_bound():
    layer, x = only_gate(modulation(focal_levels=1), 0), images(6, 4)
    assert tuple(layer.projection.kernel.shape) == (4, 2 * 4 + 2)
    shift = to_numpy(layer.modulator.bias)
    layer.modulator.bias.assign(np.zeros(4))
    layer.out.bias.assign(np.zeros(4))
    y = to_numpy(layer(x))
    kernel, bias = (to_numpy(w).copy() for w in layer.projection.weights)
    bias[8] = -30
    layer.projection.set_weights([kernel, bias])
    assert_close(layer(x), -30 * y, 1e-4)
    assert shift.any()


def test_moving_the_map_moves_what_the_levels_give():
    layer, x = modulation(focal_levels=2), images(12, 4)
    kernel, bias = (to_numpy(w).copy() for w in layer.projection.weights)
    kernel[:, -1] = bias[-1] = 0  # no global level
    layer.projection.set_weights([kernel, bias])
    y = to_numpy(layer(x))
    moved = to_numpy(layer(np.roll(x, 2, axis=(1, 2))))
    assert_close(moved[:, 5:9, 5:9], y[:, 3:7, 3:7])
    assert np.abs(moved[:, 2:4, 2:4] - y[:, :2, :2]).max() > 1e-2  # was at the edge


def test_even_kernels_are_refused():
    with pytest.raises(ValueError, match="must be odd at each level, received 3, 4"):
        FocalModulation(2, 3, 1)


def test_levels_and_windows_may_differ_by_stage():
    model = small(focal_levels=[1, 2], focal_window=[5, 3], focal_factor=4)
    sizes = [
        model.get_layer(f"stage{s}_block1_modulation").kernel_sizes for s in (1, 2)
    ]
    assert sizes == [[5], [3, 7]]


def test_factors_start_where_they_were_asked_to():
    model = keras_edifice.build("focalnet", **SMALL, layer_scale=1e-4)
    gamma = to_numpy(model.get_layer("stage2_block1_mlp_scale").gamma)
    assert_close(gamma, np.full(8, 1e-4), 1e-9)
    without = keras_edifice.build("focalnet", **SMALL)
    assert model.count_params() - without.count_params() == 2 * (4 + 8)


def test_last_norm_comes_before_the_pooling():
    model = small()
    assert model.get_layer("pool").input is model.get_layer("norm").output


def test_features_have_the_width_of_the_last_stage():
    assert small(num_classes=None).output_shape == (None, 8)


def test_size_does_not_depend_on_the_image():
    sizes = {count_weights("focalnet", image_size=s) for s in (None, 32, 224)}
    assert len(sizes) == 1


@pytest.mark.parametrize("overlap_down", [False, True])
def test_stage_maps_have_their_strides(overlap_down):
    model = small(features_only=True, patch_size=4, overlap_down=overlap_down)
    shapes = {name: tuple(y.shape) for name, y in compiled(model)(images(32)).items()}
    assert shapes == {"stride_4": (2, 8, 8, 4), "stride_8": (2, 4, 4, 8)}
    side = 7 if overlap_down else 4
    assert model.get_layer("stage1_patches").kernel_size == (side, side)


def test_pooling_is_the_mean_the_maximum_or_none():
    x, options = images(), dict(num_classes=None)
    whole = small(pooling=None, **options)
    y = to_numpy(whole(x))
    for pooling, summary in [("avg", np.mean), ("max", np.max)]:
        model = small(pooling=pooling, **options)
        model.set_weights(whole.get_weights())
        assert_close(model(x), summary(y, axis=(1, 2)), 1e-6)


def test_branches_are_dropped_in_training_and_more_often_in_later_blocks():
    model, x = small(drop_path=0.5), images()
    assert_close(model(x), model(x), 0)
    assert np.abs(to_numpy(model(x, training=True)) - to_numpy(model(x))).max() > 0.1
    rates = {x.name: x.rate for x in model.layers if "drop_path" in x.name}
    assert rates == {
        "stage2_block1_modulation_drop_path": 0.5,
        "stage2_block1_mlp_drop_path": 0.5,
    }


def test_dropout_is_on_in_training_alone():
    model, x = small(dropout=0.5, drop_path=0.0), images()
    assert_close(model(x), model(x), 0)
    assert difference(model(x, training=True), model(x)) > 1e-3


def test_weights_start_truncated():
    keras.utils.set_random_seed(0)
    model = keras_edifice.build("focalnet", **{**SMALL, "embed_size": 32})
    for weight in model.weights:
        if weight.name == "kernel":
            assert is_truncated(to_numpy(weight)), weight.path
        elif weight.name == "bias":
            assert not to_numpy(weight).any()


def test_config_keeps_the_arguments():
    layer = FocalModulation(1, 5, 4, True, True, name="a")
    layer = FocalModulation.from_config(layer.get_config())
    assert (layer.focal_levels, layer.focal_window, layer.focal_factor) == (1, 5, 4)
    assert layer.normalize_modulator
    assert layer.post_norm_in_modulation
    assert layer.name == "a"


def test_stages_need_a_depth_and_levels_each():
    with pytest.raises(ValueError, match="for each stage, received 2 and 3 and 2"):
        small(focal_levels=[1, 1, 1])


def test_head_gives_probabilities_unless_logits_are_asked_for():
    model = small(classifier_activation="softmax")
    assert_close(keras.ops.sum(model(images()), -1), np.ones(2))
