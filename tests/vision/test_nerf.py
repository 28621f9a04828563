import keras
import numpy as np
import pytest

import keras_edifice
from keras_edifice.vision.nerf import (
    FinerDepths,
    FrequencyEncoding,
    RayDepths,
    VolumeRendering,
    inverse_distribution,
    ray_weights,
)
from tests.support.close import assert_close, to_numpy
from tests.support.counting import count_weights
from tests.support.gradients import gradients
from tests.support.shaking import shake

rng = np.random.default_rng(0)
SMALL = dict(
    hidden_size=8,
    num_layers=3,
    skip_layer=1,
    num_frequencies=2,
    num_dir_frequencies=1,
    num_coarse=6,
    num_fine=5,
)


def small(**options):
    return shake(keras_edifice.build("nerf", **{**SMALL, **options}))


def rays(n=4):
    origins, directions = rng.normal(size=(2, n, 3)).astype("float32")
    return dict(origins=origins, directions=directions)


def encode(p, octaves):
    parts = [f(2.0**k * p) for k in range(octaves) for f in (np.sin, np.cos)]
    return np.concatenate([p, *parts], axis=-1)


def field(x, d, w, name):
    """Appendix A of the paper in float64, here with three layers."""

    def dense(h, part):
        return h @ w[f"{name}_{part}/kernel"] + w[f"{name}_{part}/bias"]

    h = x = encode(x, 2)
    for i in range(3):
        h = np.maximum(dense(h, f"layer{i}"), 0)
        h = np.concatenate([x, h], axis=-1) if i == 1 else h
    d = encode(d / np.linalg.norm(d, axis=-1, keepdims=True), 1)
    view = np.concatenate([dense(h, "feature"), d], axis=-1)
    view = np.maximum(dense(view, "view"), 0)
    colour = 1 / (1 + np.exp(-dense(view, "colour")))
    return colour, np.maximum(dense(h, "density"), 0)[..., 0]


def integrate(colour, density, depths, directions):
    """Equation 3 as a loop along each ray."""
    pixels, weights = np.zeros((len(depths), 3)), np.zeros_like(depths)
    for r, t in enumerate(depths):
        steps = np.append(np.diff(t), 1e10) * np.linalg.norm(directions[r])
        seen = 1.0
        for i, step in enumerate(steps):
            alpha = 1 - np.exp(-density[r, i] * step)
            weights[r, i] = seen * alpha
            pixels[r] += weights[r, i] * colour[r, i]
            seen *= 1 - alpha
    return pixels, weights


def inverse(edges, weights, u):
    """The inverse distribution function, interval by interval."""
    mass = weights / weights.sum()
    ends = np.append(0, np.cumsum(mass))
    i = min(np.searchsorted(ends, u, side="right"), len(mass)) - 1
    return edges[i] + (edges[i + 1] - edges[i]) * min((u - ends[i]) / mass[i], 1)


def reference(origins, directions, w):
    depths = np.tile(np.linspace(2, 6, 6), (len(origins), 1))

    def look(depths, name):
        points = origins[:, None] + depths[..., None] * directions[:, None]
        views = np.repeat(directions[:, None], depths.shape[1], axis=1)
        return integrate(*field(points, views, w, name), depths, directions)

    coarse, weights = look(depths, "coarse")
    middles = (depths[:, 1:] + depths[:, :-1]) / 2
    rows = zip(middles, weights[:, 1:-1] + 1e-5, strict=True)
    new = [[inverse(e, p, u) for u in np.linspace(0, 1, 5)] for e, p in rows]
    depths = np.sort(np.concatenate([depths, new], axis=1), axis=1)
    pixels, weights = look(depths, "fine")
    outputs = dict(rgb=pixels, rgb_coarse=coarse, acc=weights.sum(1))
    return {**outputs, "depth": (weights * depths).sum(1)}


def test_outputs_are_the_equations():
    model, x = small(), rays(16)
    w = {v.path: to_numpy(v) for v in model.weights}
    expected = reference(
        *(x[k].astype("float64") for k in ("origins", "directions")), w
    )
    outputs = model(x)
    assert set(outputs) == set(expected)
    for name, y in outputs.items():
        assert_close(y, expected[name], 1e-4)
    assert expected["acc"].max() > 0.1


def test_field_is_the_equations():
    model, x = small(render=False), rays(16)
    w = {v.path: to_numpy(v) for v in model.weights}
    colour, density = field(x["origins"], x["directions"], w, "field")
    y = model(dict(coordinates=x["origins"], directions=x["directions"]))
    assert_close(y, np.concatenate([colour, density[:, None]], axis=-1), 1e-4)


@pytest.mark.parametrize(
    ("options", "published"),
    [
        (dict(), 1_191_688),
        (dict(render=False), 595_844),
        (dict(render=False, use_viewdir=False), 494_084),
    ],
)
def test_published_sizes(options, published):
    assert count_weights("nerf", **options)[0] == published


def test_encodings_have_63_and_27_numbers():
    for octaves, width in [(10, 63), (4, 27)]:
        layer = FrequencyEncoding(octaves)
        assert layer.compute_output_shape((None, 3)) == (None, width)
    x = rng.normal(size=(2, 3)).astype("float32")
    assert_close(FrequencyEncoding(2)(x), encode(x.astype("float64"), 2), 1e-5)
    without = FrequencyEncoding(1, include_input=False, scale=np.pi)(x)
    assert_close(without, encode(np.pi * x.astype("float64"), 1)[:, 3:], 1e-5)
    unit = to_numpy(FrequencyEncoding(0, normalize=True)(x))
    assert_close(np.linalg.norm(unit, axis=-1), np.ones(2))


def test_position_enters_again_after_the_skip_layer():
    with_skip = keras_edifice.build("nerf", render=False)
    assert with_skip.get_layer("field_layer5").kernel.shape == (256 + 63, 256)
    others = [f"field_layer{i}" for i in (1, 2, 3, 4, 6, 7)]
    assert all(with_skip.get_layer(n).kernel.shape == (256, 256) for n in others)


def rendered(colours, densities, depths, **options):
    """What one ray of direction (1, 0, 0) sees."""
    layer = VolumeRendering(**options)
    n = len(depths)
    given = [np.reshape(v, (1, n, -1)).astype("float32") for v in (colours, densities)]
    ray = np.array([[1, 0, 0]], "float32")
    outputs = layer(*given, np.asarray(depths, "float32")[None], ray)
    return [to_numpy(y)[0] for y in outputs]


def test_constant_density_has_the_closed_form():
    depths = np.linspace(1, 3, 9)
    densities = np.full(9, 0.7)
    densities[-1] = 0  # whose step has no end
    logits = np.tile([0.5, -1.0, 2.0], (9, 1))
    pixel, _, total, _ = rendered(logits, densities, depths)
    colour = 1 / (1 + np.exp(-logits[0]))
    assert_close(pixel, colour * (1 - np.exp(-0.7 * 2)))
    assert_close(total, 1 - np.exp(-0.7 * 2))


def test_length_of_the_direction_is_part_of_the_step():
    inputs = [rng.normal(size=(1, 5, n)).astype("float32") for n in (3, 1)]
    depths = np.linspace(1, 2, 5, dtype="float32")[None]
    ray = np.array([[0, 2, 0]], "float32")
    twice = VolumeRendering()(*inputs, depths, ray)
    far = VolumeRendering()(*inputs, 2 * depths, ray / 2)
    assert_close(twice[0], far[0])


def test_weights_are_positive_and_sum_to_at_most_one():
    densities = np.abs(rng.normal(size=(50, 20))).astype("float32")
    steps = np.full((50, 20), 0.1, "float32")
    weights = to_numpy(ray_weights(densities, steps))
    assert weights.min() >= 0
    assert weights.sum(1).max() <= 1 + 1e-6
    assert_close(weights.sum(1), 1 - np.exp(-0.1 * densities.sum(1)), 1e-5)


def test_depth_of_a_wall_is_its_front_and_nothing_behind_is_seen():
    depths, densities = np.linspace(2, 6, 9), np.zeros(9)
    densities[4:] = 1e4
    logits = rng.normal(size=(9, 3))
    pixel, depth, total, _ = rendered(logits, densities, depths)
    assert_close([depth, total], [depths[4], 1])
    logits[5:] += 3
    densities[5:] = rng.uniform(size=4)
    assert_close(rendered(logits, densities, depths)[0], pixel, 1e-6)


def test_white_is_what_is_behind_the_scene():
    given = np.zeros((4, 3)), np.full(4, -1.0), np.linspace(1, 2, 4)
    assert_close(rendered(*given)[0], np.zeros(3), 0)
    assert_close(rendered(*given, white_background=True)[0], np.ones(3), 0)


def test_new_depths_gather_where_the_weights_are():
    depths = np.linspace(2, 6, 41, dtype="float32")[None]
    weights = np.zeros((1, 41), "float32")
    weights[0, 20] = 1  # between the middles around depth 4
    merged = to_numpy(FinerDepths(100)(depths, weights))[0]
    assert len(merged) == 141
    assert np.all(np.diff(merged) >= 0)
    assert np.sum(np.abs(merged - 4) <= 0.0501) >= 98


@pytest.mark.parametrize("u", [0.0, 0.2, 0.5, 0.9999, 1.0])
def test_inverse_distribution_is_that_interval_by_interval(u):
    edges = np.sort(rng.normal(size=(3, 6))).astype("float32")
    weights = rng.uniform(0.01, 1, size=(3, 5)).astype("float32")
    given = edges, weights, np.array([[u]], "float32")
    found = inverse_distribution(*map(keras.ops.convert_to_tensor, given))
    expected = [[inverse(e, p, u)] for e, p in zip(edges, weights, strict=True)]
    assert_close(found, expected)


def test_depths_are_even_or_random_within_their_intervals():
    origins = np.zeros((100, 3), "float32")
    layer = RayDepths(2.0, 6.0, 5)
    assert_close(layer(origins), np.tile([2, 3, 4, 5, 6], (100, 1)), 1e-6)
    drawn = to_numpy(layer(origins, training=True))
    lower, upper = np.array([2, 2.5, 3.5, 4.5, 5.5]), np.array([2.5, 3.5, 4.5, 5.5, 6])
    assert np.all((drawn >= lower - 1e-6) & (drawn <= upper + 1e-6))
    assert np.all(drawn.std(0) > 0.1)
    quiet = RayDepths(2.0, 6.0, 5, perturb=False)
    assert_close(quiet(origins, training=True), layer(origins), 0)
    inverse_depths = 1 / to_numpy(RayDepths(2.0, 6.0, 5, lindisp=True)(origins[:1]))
    assert_close(np.diff(inverse_depths[0]), np.full(4, -1 / 12), 1e-6)


def test_nothing_is_learned_through_the_depths():
    model, x = small(), rays()
    by_weight, _ = gradients(model, x, lambda y: keras.ops.sum(y["rgb"]))
    for weight, gradient in zip(model.trainable_variables, by_weight, strict=True):
        if weight.path.startswith("coarse_"):
            assert gradient is None or not np.any(gradient)
    fine = [w.path.startswith("fine_") for w in model.trainable_variables]
    assert any(np.any(by_weight[i]) for i, is_fine in enumerate(fine) if is_fine)


def test_view_changes_the_colour_and_never_the_density():
    model, x = small(render=False), rays()
    first = dict(coordinates=x["origins"], directions=x["directions"])
    second = {**first, "directions": -x["directions"]}
    a, b = to_numpy(model(first)), to_numpy(model(second))
    assert_close(a[:, 3], b[:, 3], 0)
    assert np.abs(a[:, :3] - b[:, :3]).max() > 1e-3
    blind = small(render=False, use_viewdir=False)
    assert_close(blind(first), blind(second), 0)


def test_density_noise_is_on_in_training_alone():
    model, x = small(density_noise=1.0, perturb=False), rays()
    assert_close(model(x)["rgb"], model(x)["rgb"], 0)
    noisy = to_numpy(model(x, training=True)["rgb"])
    assert np.abs(noisy - to_numpy(model(x)["rgb"])).max() > 1e-3


def test_both_networks_learn_from_the_pixels():
    model, x = small(), rays(8)
    model.compile("adam", loss={"rgb": "mse", "rgb_coarse": "mse"})
    pixels = np.full((8, 3), 0.3, "float32")
    history = model.fit(x, dict(rgb=pixels, rgb_coarse=pixels), verbose=0).history
    assert np.isfinite(history["loss"]).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(near=3.0, far=3.0), "near must be below far"),
        (dict(near=0.0, lindisp=True), "above zero with lindisp"),
        (dict(num_coarse=2), "num_coarse must be at least 3, received 2"),
        (dict(dir_dim=2), "coord_dim and dir_dim alike, received 3 and 2"),
    ],
)
def test_options_that_make_no_ray_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        small(**options)
