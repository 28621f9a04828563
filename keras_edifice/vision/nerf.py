"""Neural Radiance Field: a scene as a network, seen along rays.

    σ, c = F(γ(x), γ(d)),    γ(p) = [p, sin(2^k s p), cos(2^k s p)] for k < L  (eq. 4)
    C(r) = Σ_i T_i α_i c_i,  α_i = 1 - exp(-σ_i δ_i),  T_i = Π_{j<i} (1 - α_j)  (eq. 3)

The ray is r(t) = o + t d. A coarse network is asked at even depths t; where its weights
T_i α_i are large a fine network is asked more often (section 5.2). In the paper s = π
and γ leaves out p itself; the authors' code has s = 1 and keeps it.
"""

from functools import partial

import keras
import numpy as np
from keras import layers, ops

from keras_edifice.blocks.dense import Dense
from keras_edifice.model import EdificeModel
from keras_edifice.options import Count, NonNegative, Positive, Size
from keras_edifice.registry import architecture

_FAR_AWAY = 1e10  # length of the last step of a ray


@keras.saving.register_keras_serializable("keras_edifice")
class FrequencyEncoding(layers.Layer):
    """(..., d) -> (..., d (2 num_frequencies + 1)), or without 1. Equation 4.

    Args:
        num_frequencies: number L of octaves.
        include_input: whether the input itself comes first.
        normalize: whether the vectors are scaled to length one before.
        scale: factor s of all frequencies.
    """

    def __init__(
        self,
        num_frequencies,
        include_input=True,
        normalize=False,
        scale=1.0,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.num_frequencies, self.scale = num_frequencies, scale
        self.include_input, self.normalize = include_input, normalize

    def call(self, x):
        if self.normalize:
            x = x / _length(x)
        parts = [x] if self.include_input else []
        for k in range(self.num_frequencies):
            angles = 2.0**k * self.scale * x
            parts += [ops.sin(angles), ops.cos(angles)]
        return ops.concatenate(parts, axis=-1)

    def compute_output_shape(self, input_shape):
        parts = 2 * self.num_frequencies + self.include_input
        return (*input_shape[:-1], parts * input_shape[-1])


def _length(x):
    """Of the vectors on the last axis, kept; away from zero for its gradient."""
    squares = ops.sum(ops.square(x), axis=-1, keepdims=True)
    return ops.sqrt(ops.maximum(squares, 1e-12))


@keras.saving.register_keras_serializable("keras_edifice")
class RayDepths(layers.Layer):
    """(rays, d) -> (rays, num_samples): depths in ascending order. Equation 2.

    They are even from near to far; in training each is drawn from its own interval
    between the middles, if `perturb` is set.

    Args:
        near: the first depth.
        far: the last depth.
        num_samples: number of depths.
        lindisp: even steps of 1 / depth instead of the depth.
        perturb: whether they are random in training.
        seed: of the random numbers.
    """

    def __init__(
        self, near, far, num_samples, lindisp=False, perturb=True, seed=None, **kwargs
    ):
        super().__init__(**kwargs)
        self.near, self.far, self.num_samples = near, far, num_samples
        self.lindisp, self.perturb, self.seed = lindisp, perturb, seed
        self.seed_generator = keras.random.SeedGenerator(seed)

    def call(self, origins, training=False):
        s = np.linspace(0, 1, self.num_samples)
        if self.lindisp:
            depths = 1 / ((1 - s) / self.near + s / self.far)
        else:
            depths = self.near * (1 - s) + self.far * s
        middles = (depths[1:] + depths[:-1]) / 2
        lower = np.concatenate([depths[:1], middles])
        upper = np.concatenate([middles, depths[-1:]])
        if not (training and self.perturb):
            constant = ops.convert_to_tensor(depths, origins.dtype)
            return ops.zeros_like(origins[:, :1]) + constant
        shape = (ops.shape(origins)[0], self.num_samples)
        draw = keras.random.uniform(
            shape, dtype=origins.dtype, seed=self.seed_generator
        )
        step = ops.convert_to_tensor(upper - lower, origins.dtype)
        return ops.convert_to_tensor(lower, origins.dtype) + step * draw

    def compute_output_shape(self, input_shape):
        return (input_shape[0], self.num_samples)


@keras.saving.register_keras_serializable("keras_edifice")
class FinerDepths(layers.Layer):
    """(rays, n), (rays, n) -> (rays, n + num_samples): more depths where weights are.

    The weights make a density, constant between the middles of the depths; new depths
    are drawn by its inverse distribution function, or even in it at inference. Nothing
    is learned through them.

    Args:
        num_samples: number of new depths.
        perturb: whether they are random in training.
        seed: of the random numbers.
    """

    def __init__(self, num_samples, perturb=True, seed=None, **kwargs):
        super().__init__(**kwargs)
        self.num_samples, self.perturb, self.seed = num_samples, perturb, seed
        self.seed_generator = keras.random.SeedGenerator(seed)

    def call(self, depths, weights, training=False):
        if training and self.perturb:
            shape = (ops.shape(depths)[0], self.num_samples)
            u = keras.random.uniform(
                shape, dtype=depths.dtype, seed=self.seed_generator
            )
        else:
            even = np.linspace(0, 1, self.num_samples)[None]
            u = ops.convert_to_tensor(even, depths.dtype)
        middles = (depths[:, 1:] + depths[:, :-1]) / 2
        new = inverse_distribution(middles, weights[:, 1:-1] + 1e-5, u)
        depths = ops.sort(ops.concatenate([depths, new], axis=-1), axis=-1)
        return ops.stop_gradient(depths)

    def compute_output_shape(self, depths_shape, weights_shape):
        return (depths_shape[0], depths_shape[1] + self.num_samples)


def inverse_distribution(edges, weights, u):
    """Where a piecewise constant density has the part u of its mass below.

    t(u) = e_0 + Σ_i (e_{i+1} - e_i) clip((u - P_i) / p_i, 0, 1): every interval with
    mass below u counts in full, the one that holds u by its part.

    Args:
        edges: (rays, n + 1), ascending.
        weights: (rays, n), positive: mass of each interval, up to a factor.
        u: (rays or 1, m), from 0 to 1.

    Returns:
        (rays, m).
    """
    mass = weights / ops.sum(weights, axis=-1, keepdims=True)
    below = ops.cumsum(mass, axis=-1) - mass
    widths = edges[:, 1:] - edges[:, :-1]
    parts = (u[:, :, None] - below[:, None]) / mass[:, None]  # (rays, m, n)
    parts = ops.clip(parts, 0.0, 1.0)
    return edges[:, :1] + ops.sum(parts * widths[:, None], axis=-1)


@keras.saving.register_keras_serializable("keras_edifice")
class RayPoints(layers.Layer):
    """(rays, d), (rays, d), (rays, n) -> (rays, n, d): the points o + t d."""

    def call(self, origins, directions, depths):
        return origins[:, None] + depths[:, :, None] * directions[:, None]

    def compute_output_shape(self, origins_shape, directions_shape, depths_shape):
        return (*depths_shape, origins_shape[-1])


@keras.saving.register_keras_serializable("keras_edifice")
class VolumeRendering(layers.Layer):
    """(rays, n, 3), (rays, n, 1), (rays, n), (rays, d) -> what is seen along the rays.

    By equation 3, in float32: from the colours, the densities, the depths and the
    directions, the pixels (rays, 3), their depths (rays,), the sums of the weights
    (rays,) and the weights (rays, n).

    Args:
        white_background: add white where the weights do not sum to one.
        density_noise: deviation of the noise on the densities, in training.
        seed: of the random numbers.
    """

    def __init__(self, white_background=False, density_noise=0.0, seed=None, **kwargs):
        super().__init__(**kwargs)
        self.white_background, self.density_noise = white_background, density_noise
        self.seed = seed
        self.seed_generator = keras.random.SeedGenerator(seed)

    def call(self, colours, densities, depths, directions, training=False):
        densities = densities[..., 0]
        if training and self.density_noise:
            noise = keras.random.normal(
                ops.shape(densities), dtype=densities.dtype, seed=self.seed_generator
            )
            densities = densities + self.density_noise * noise
        steps = depths[:, 1:] - depths[:, :-1]
        last = ops.full_like(depths[:, :1], _FAR_AWAY)
        steps = ops.concatenate([steps, last], axis=-1) * _length(directions)
        weights = ray_weights(ops.relu(densities), steps)
        pixels = ops.sum(weights[..., None] * ops.sigmoid(colours), axis=1)
        total = ops.sum(weights, axis=-1)
        if self.white_background:
            pixels = pixels + 1.0 - total[:, None]
        return pixels, ops.sum(weights * depths, axis=-1), total, weights

    def compute_output_shape(
        self, colours_shape, densities_shape, depths_shape, directions_shape
    ):
        rays = depths_shape[0]
        return (rays, 3), (rays,), (rays,), depths_shape


def ray_weights(densities, steps):
    """T_i α_i of equation 3: (rays, n), (rays, n) -> (rays, n).

    T_i is the exponential of a sum, which keeps more digits than the product.
    """
    thickness = densities * steps
    before = ops.cumsum(thickness[:, :-1], axis=-1)
    before = ops.concatenate([ops.zeros_like(thickness[:, :1]), before], axis=-1)
    return ops.exp(-before) * (1.0 - ops.exp(-thickness))


def _field(x, views, hidden_size, num_layers, skip_layer, name):
    """F of the module's equation: (..., γ(x)), (..., γ(d)) -> (..., 3), (..., 1).

    Colours before their sigmoid and densities before their ReLU; the densities do not
    depend on the view. Without views the colours do not either.
    """
    h = x
    for i in range(num_layers):
        h = Dense(hidden_size, activation="relu", name=f"{name}_layer{i}")(h)
        if i == skip_layer:
            h = layers.Concatenate(name=f"{name}_skip")([x, h])
    density = Dense(1, name=f"{name}_density")(h)
    if views is not None:
        h = Dense(hidden_size, name=f"{name}_feature")(h)
        h = layers.Concatenate(name=f"{name}_with_view")([h, views])
        h = Dense((hidden_size + 1) // 2, activation="relu", name=f"{name}_view")(h)
    return Dense(3, name=f"{name}_colour")(h), density


def _activated(colours, densities):
    """(..., 4): red, green, blue between 0 and 1, and a density above zero."""
    colours = layers.Activation("sigmoid", dtype="float32", name="colours")(colours)
    densities = layers.Activation("relu", dtype="float32", name="densities")(densities)
    return layers.Concatenate(dtype="float32", name="field")([colours, densities])


def _look(rays, views, depths, encode, field, rendering, name):
    """Pixels, depths, sums of weights and weights, by a network of this name."""
    points = RayPoints(dtype="float32", name=f"{name}_points")(*rays, depths)
    if views is not None:
        views = layers.RepeatVector(depths.shape[1], name=f"{name}_views")(views)
    colours, densities = field(encode(points), views, name=name)
    render = VolumeRendering(**rendering, dtype="float32", name=f"{name}_rendering")
    return render(colours, densities, depths, rays[1])


def _check(near, far, lindisp, num_coarse, coord_dim, dir_dim):
    """The options that rendering needs, together."""
    if near >= far or (lindisp and near == 0):
        raise ValueError(
            f"near must be below far, and above zero with lindisp, received {near} and "
            f"{far}; depths run from near to far"
        )
    if num_coarse < 3:
        raise ValueError(
            f"num_coarse must be at least 3, received {num_coarse}; fine depths lie "
            "between the middles of coarse ones"
        )
    if coord_dim != dir_dim:
        raise ValueError(
            f"rays need coord_dim and dir_dim alike, received {coord_dim} and "
            f"{dir_dim}; render=False takes any"
        )


@architecture(
    paper="Mildenhall et al. 2020, NeRF: Representing Scenes as Neural Radiance Fields "
    "for View Synthesis, arXiv:2003.08934",
    kind="vector",
    inputs={"origins": "(batch, coord_dim)", "directions": "(batch, dir_dim)"},
    outputs={
        "rgb": "(batch, 3)",
        "depth": "(batch,)",
        "acc": "(batch,)",
        "rgb_coarse": "(batch, 3)",
    },
    tiny=dict(
        hidden_size=16,
        num_layers=3,
        skip_layer=1,
        num_frequencies=2,
        num_dir_frequencies=1,
        near=0.5,
        num_coarse=5,
        num_fine=4,
        density_noise=1.0,
        white_background=True,
    ),
)
def nerf(
    *,
    coord_dim: Size = 3,
    dir_dim: Size = 3,
    hidden_size: Size = 256,
    num_layers: Size = 8,
    skip_layer: Count = 4,
    num_frequencies: Count = 10,
    num_dir_frequencies: Count = 4,
    include_input: bool = True,
    frequency_scale: Positive = 1.0,
    use_viewdir: bool = True,
    render: bool = True,
    near: NonNegative = 2.0,
    far: Positive = 6.0,
    num_coarse: Size = 64,
    num_fine: Size = 128,
    perturb: bool = True,
    density_noise: NonNegative = 0.0,
    white_background: bool = False,
    lindisp: bool = False,
) -> EdificeModel:
    """Two MLPs of position and view, and the integral of what they give along rays.

    Train it with compile(loss={"rgb": "mse", "rgb_coarse": "mse"}), both against the
    pixels of the rays.

    Args:
        coord_dim: size of a position.
        dir_dim: size of a direction.
        hidden_size: width of the layers.
        num_layers: layers before the density.
        skip_layer: layer, counted from 0, to whose output the position is joined.
        num_frequencies: octaves of the position's encoding.
        num_dir_frequencies: octaves of the direction's encoding.
        include_input: whether the encodings hold what they encode.
        frequency_scale: factor of the encodings' frequencies, π in the paper's text.
        use_viewdir: whether the colours depend on the direction.
        render: give the pixels of rays; False gives the field itself, (batch, 4) with
            red, green, blue and density for "coordinates" and "directions".
        near: depth at which rays begin.
        far: depth at which rays end.
        num_coarse: points of a ray for the coarse network.
        num_fine: points that the fine network has more.
        perturb: whether the points are random in training.
        density_noise: deviation of noise on the densities, in training.
        white_background: whether there is white behind the scene.
        lindisp: coarse points at even steps of 1 / depth.
    """
    first = "origins" if render else "coordinates"
    inputs = {
        first: keras.Input((coord_dim,), name=first),
        "directions": keras.Input((dir_dim,), name="directions"),
    }
    given = dict(include_input=include_input, scale=frequency_scale, dtype="float32")
    encode = FrequencyEncoding(num_frequencies, name="encoding", **given)
    view = FrequencyEncoding(
        num_dir_frequencies, normalize=True, name="view_encoding", **given
    )
    views = view(inputs["directions"]) if use_viewdir else None
    sizes = dict(hidden_size=hidden_size, num_layers=num_layers, skip_layer=skip_layer)
    field = partial(_field, **sizes)
    if not render:
        colours, densities = field(encode(inputs[first]), views, name="field")
        return EdificeModel(inputs, _activated(colours, densities), name="nerf")
    _check(near, far, lindisp, num_coarse, coord_dim, dir_dim)
    rays = inputs["origins"], inputs["directions"]
    rendering = dict(white_background=white_background, density_noise=density_noise)
    look = partial(_look, rays, views, encode=encode, field=field, rendering=rendering)
    even = RayDepths(
        near, far, num_coarse, lindisp, perturb, dtype="float32", name="depths"
    )
    finer = FinerDepths(num_fine, perturb, dtype="float32", name="finer_depths")
    depths = even(rays[0])
    coarse, _, _, weights = look(depths, name="coarse")
    pixels, depth, total, _ = look(finer(depths, weights), name="fine")
    outputs = dict(rgb=pixels, depth=depth, acc=total, rgb_coarse=coarse)
    return EdificeModel(inputs, outputs, name="nerf")
