import keras
import numpy as np
import pytest

from keras_edifice.blocks.patch_embed import PatchEmbed
from tests.support.close import assert_close, to_numpy
from tests.support.gradients import gradients
from tests.support.shaking import shake

rng = np.random.default_rng(0)


def embedding(**options):
    layer = PatchEmbed(5, 3, **options)
    layer.build((None, 6, 9, 2))
    return shake(layer)


def test_it_is_a_dense_layer_on_each_flattened_patch():
    layer, x = embedding(), rng.normal(size=(2, 6, 9, 2)).astype("float32")
    kernel, bias = (to_numpy(w) for w in layer.weights)
    patches = x.reshape(2, 2, 3, 3, 3, 2).transpose(0, 1, 3, 2, 4, 5)
    patches = patches.reshape(2, 6, 3 * 3 * 2).astype("float64")
    assert_close(layer(x), patches @ kernel.reshape(3 * 3 * 2, 5) + bias)


def test_moving_the_image_by_a_patch_moves_the_tokens():
    layer, x = embedding(), rng.normal(size=(1, 6, 9, 2)).astype("float32")
    tokens = to_numpy(layer(x)).reshape(2, 3, 5)
    moved = to_numpy(layer(np.roll(x, 3, axis=2))).reshape(2, 3, 5)
    assert_close(moved, np.roll(tokens, 1, axis=1), 1e-6)


def test_every_pixel_has_a_gradient():
    x = rng.normal(size=(1, 6, 9, 2)).astype("float32")
    inputs = keras.Input((6, 9, 2))
    model = shake(keras.Model(inputs, PatchEmbed(5, 3)(inputs)))
    _, by_input = gradients(model, x, lambda y: keras.ops.sum(keras.ops.square(y)))
    assert np.all(by_input != 0)


def test_grid_is_kept_on_request():
    flat, grid = embedding(), embedding(flatten=False)
    flat.set_weights(grid.get_weights())
    x = rng.normal(size=(2, 6, 9, 2)).astype("float32")
    assert tuple(grid(x).shape) == grid.compute_output_shape((2, 6, 9, 2))
    assert_close(to_numpy(grid(x)).reshape(2, 6, 5), flat(x), 0)


def test_open_sizes_stay_open():
    layer = PatchEmbed(5, 3, use_bias=False)
    assert layer.compute_output_shape((None, None, 9, 2)) == (None, None, 5)
    assert tuple(layer(np.zeros((1, 9, 3, 2), "float32")).shape) == (1, 3, 5)
    assert len(layer.weights) == 1


def test_sizes_that_the_patches_do_not_cover_are_refused():
    with pytest.raises(ValueError, match=r"received \(6, 8\) and 3") as caught:
        PatchEmbed(5, 3).build((None, 6, 8, 2))
    assert "\n" not in str(caught.value)


def test_config_keeps_the_arguments():
    layer = PatchEmbed(5, 3, False, "glorot_uniform", False)
    layer = PatchEmbed.from_config(layer.get_config())
    assert (layer.embed_size, layer.patch_size, layer.use_bias) == (5, 3, False)
    assert (layer.initializer, layer.flatten) == ("glorot_uniform", False)


def test_truncated_kernel_is_that_of_the_matrices():
    layer = PatchEmbed(50, 3, initializer="truncated")
    layer.build((None, 6, 9, 2))
    assert 0.03 < np.abs(to_numpy(layer.projection.kernel)).max() <= 0.0401


def test_zeros_fill_what_the_patches_do_not_cover():
    layer = PatchEmbed(5, 3, pad=True)
    layer.build((None, 6, 8, 2))
    x = rng.normal(size=(1, 6, 8, 2)).astype("float32")
    padded = np.pad(x, [(0, 0), (0, 0), (0, 1), (0, 0)])
    whole = embedding()
    whole.set_weights(layer.get_weights())
    assert_close(layer(x), whole(padded), 1e-6)
    assert layer.compute_output_shape((None, 6, 8, 2)) == (None, 6, 5)
    with pytest.raises(ValueError, match="known size"):
        PatchEmbed(5, 3, pad=True).build((None, None, 8, 2))


def test_patches_may_overlap_and_be_oblong():
    layer = PatchEmbed(5, [3, 2], stride=[1, 2], norm=True)
    x = rng.normal(size=(2, 5, 6, 2)).astype("float32")
    y = to_numpy(layer(x))
    assert y.shape == layer.compute_output_shape(x.shape) == (2, 3 * 3, 5)
    kernel, bias = (to_numpy(w) for w in layer.projection.weights)
    patch = np.einsum("bhwc,hwcd->bd", x[:, 1:4, 2:4].astype("float64"), kernel) + bias
    patch = patch - patch.mean(-1, keepdims=True)
    patch = patch / np.sqrt(np.square(patch).mean(-1, keepdims=True) + 1e-5)
    assert_close(y[:, 3 + 1], patch)  # the second of the second row


@pytest.mark.parametrize("sides", [(7,), (4, 3, 5)])
def test_sequences_and_videos_are_cut_alike(sides):
    layer = PatchEmbed(5, list(sides))
    x = rng.normal(size=(2, *sides, 2)).astype("float32")
    y = to_numpy(layer(x))
    assert y.shape == layer.compute_output_shape(x.shape) == (2, 1, 5)
    kernel, bias = (to_numpy(w) for w in layer.projection.weights)
    assert_close(y[:, 0], x.reshape(2, -1) @ kernel.reshape(-1, 5) + bias)


def test_sizes_for_other_axes_are_refused():
    with pytest.raises(ValueError, match="one for each of the 1 axes"):
        PatchEmbed(5, [3, 3]).build((None, 6, 2))
    with pytest.raises(ValueError, match="one to three axes"):
        PatchEmbed(5, 3).build((None, 6))
