"""Energy-based model: a scalar that is low where data is and high elsewhere.

    p(x) ∝ exp(-E(x)),    loss = E(x⁺) - E(x⁻) + α (E(x⁺)² + E(x⁻)²)
    x⁻: k times  x ← x + s ε,  x ← x - η clip(∂E/∂x, ±c)

LeCun et al. 2006, A Tutorial on Energy-Based Learning; Du & Mordatch 2019, algorithm 1:
x⁺ is data, x⁻ the end of a Langevin chain that starts from earlier ends, kept in a
replay buffer, or from noise. With classes, E(x, y) is an energy of pairs: p(y | x) is
the softmax of -E(x, y), and E(x) = -log Σ_y exp(-E(x, y)).
"""

from typing import Literal

import keras
from keras import Input, layers, ops

from keras_edifice.blocks.convolution import Conv2D
from keras_edifice.blocks.dense import Dense
from keras_edifice.blocks.dense_stack import kernel_initializer
from keras_edifice.model import EdificeModel
from keras_edifice.ops.gradients import grad_sum
from keras_edifice.options import (
    Activation,
    Count,
    Fraction,
    NonNegative,
    Positive,
    Rate,
    Size,
)
from keras_edifice.registry import architecture


def free_energy(energies):
    """(batch, classes) -> (batch,): E(x) = -log Σ_y exp(-E(x, y)); one class is E."""
    return -ops.logsumexp(-energies, axis=-1)


def langevin(
    energy,
    x,
    noise,
    step_size,
    noise_scale=0.005,
    grad_clip=0.01,
    clamp=None,
    sampler="igebm",
):
    """The end of a Langevin chain; no gradient flows through it.

    Args:
        energy: function (batch, ...) -> (batch,), without trainable weights inside.
        x: (batch, ...), where the chain starts.
        noise: (steps, batch, ...), standard normal.
        step_size: η.
        noise_scale: s, of the released sampler alone.
        grad_clip: c, of the released sampler alone.
        clamp: [low, high] of the elements of x, or None.
        sampler: "igebm", the released one above, or "ula", the unadjusted Langevin
            algorithm x ← x - η/2 ∂E/∂x + √η ε.
    """

    def step(i, x):
        drawn = ops.take(noise, i, axis=0)
        if sampler == "ula":
            x = x - 0.5 * step_size * grad_sum(energy, x) + step_size**0.5 * drawn
        else:
            x = x + noise_scale * drawn
            x = x - step_size * ops.clip(grad_sum(energy, x), -grad_clip, grad_clip)
        return ops.stop_gradient(x if clamp is None else ops.clip(x, *clamp))

    return ops.fori_loop(0, noise.shape[0], step, ops.stop_gradient(x))


def _unit(x):
    return x * ops.rsqrt(ops.sum(ops.square(x)))


class _Spectral:
    """A layer whose kernel is divided by its largest singular value.

    Miyato et al. 2018, arXiv:1802.05957. The kernel is a matrix of (inputs, outputs).
    Each call makes one power iteration; training keeps its vector u.
    """

    def build(self, input_shape):
        super().build(input_shape)
        shape = (self.kernel.shape[-1],)
        self.u = self.add_weight(
            shape, "random_normal", trainable=False, name="u", autocast=False
        )

    def normalized_kernel(self, training, bound=False):
        """The divided kernel; `bound` leaves one with singular values below one."""
        kernel = ops.cast(self.kernel, "float32")
        matrix = ops.reshape(kernel, (-1, kernel.shape[-1]))
        fixed = ops.stop_gradient(matrix)
        v = _unit(ops.matmul(fixed, ops.cast(self.u, "float32")))
        u = _unit(ops.matmul(v, fixed))
        sigma = ops.sum(v * ops.matmul(matrix, u))
        if training:
            self.u.assign(u)
        if bound:
            return kernel / (sigma + 1e-6) * ops.minimum(sigma, 1.0)
        return kernel / sigma

    # Dense and Conv2D save their kernel and bias alone.
    def save_own_variables(self, store):
        layers.Layer.save_own_variables(self, store)

    def load_own_variables(self, store):
        layers.Layer.load_own_variables(self, store)


@keras.saving.register_keras_serializable("keras_edifice")
class SpectralDense(_Spectral, layers.Dense):
    """(..., features) -> (..., units). The kernel has spectral norm one."""

    def call(self, x, training=None):
        x = ops.matmul(x, ops.cast(self.normalized_kernel(training), x.dtype))
        return self.activation(x + self.bias if self.use_bias else x)


@keras.saving.register_keras_serializable("keras_edifice")
class SpectralConv2D(_Spectral, layers.Conv2D):
    """(batch, height, width, channels) -> the same with `filters` channels.

    The kernel, as a matrix of (inputs, filters), has spectral norm one, or at most
    about one with `bound`.

    Args:
        filters: output channels.
        kernel_size: of the convolution.
        bound: divide only where the norm is above one.
    """

    def __init__(self, filters, kernel_size, bound=False, **kwargs):
        super().__init__(filters, kernel_size, **kwargs)
        self.bound = bound

    def call(self, x, training=None):
        kernel = self.normalized_kernel(training, self.bound)
        x = self.convolution_op(x, ops.cast(kernel, x.dtype))
        return self.activation(x + self.bias if self.use_bias else x)

    def get_config(self):
        return {**super().get_config(), "bound": self.bound}


@keras.saving.register_keras_serializable("keras_edifice")
class ClassAffine(layers.Layer):
    """(batch · classes, ..., channels) -> the same: scale and shift of each class.

    The rows are those of one example for each class in turn.
    """

    def __init__(self, num_classes, **kwargs):
        super().__init__(**kwargs)
        self.num_classes = num_classes

    def build(self, input_shape):
        shape = (self.num_classes, *[1] * (len(input_shape) - 2), input_shape[-1])
        self.scale = self.add_weight(shape, "ones", name="scale")
        self.shift = self.add_weight(shape, "zeros", name="shift")

    def call(self, x):
        by_class = ops.reshape(x, (-1, self.num_classes, *x.shape[1:]))
        return ops.reshape(by_class * self.scale + self.shift, (-1, *x.shape[1:]))

    def compute_output_shape(self, input_shape):
        return input_shape


@keras.saving.register_keras_serializable("keras_edifice")
class ReplayBuffer(layers.Layer):
    """(batch, ...) -> the same, passed on. Keeps the ends of Langevin chains.

    Args:
        size: number of samples; the oldest give way.
        low: least value of the noise that chains start from.
        high: greatest value of it.
        seed: of all draws.
    """

    def __init__(self, size, low=0.0, high=1.0, seed=None, **kwargs):
        super().__init__(**kwargs)
        self.size, self.low, self.high, self.seed = size, low, high, seed
        self.seed_generator = keras.random.SeedGenerator(seed)

    def build(self, input_shape):
        def state(shape, dtype, name):
            return self.add_weight(
                shape, "zeros", dtype, trainable=False, autocast=False, name=name
            )

        self.samples = state((self.size, *input_shape[1:]), "float32", "samples")
        self.pointer = state((), "int32", "pointer")
        self.count = state((), "int32", "count")

    def call(self, x):
        return x

    def compute_output_shape(self, input_shape):
        return input_shape

    def noise(self, n, seed=None):
        """(n, ...), uniform."""
        shape, seed = (n, *self.samples.shape[1:]), seed or self.seed_generator
        return keras.random.uniform(shape, self.low, self.high, "float32", seed)

    def draw(self, n, replay_prob):
        """(n, ...): kept samples with `replay_prob`, if there are any, else noise."""
        count = ops.convert_to_tensor(self.count)
        chosen = keras.random.uniform((n,), seed=self.seed_generator)
        chosen = ops.cast(chosen * ops.cast(count, "float32"), "int32")
        chosen = ops.clip(chosen, 0, ops.maximum(count - 1, 0))
        kept = ops.take(ops.convert_to_tensor(self.samples), chosen, axis=0)
        replay = keras.random.uniform((n,), seed=self.seed_generator) < replay_prob
        replay = ops.logical_and(replay, count > 0)
        replay = ops.reshape(replay, (-1, *[1] * (len(kept.shape) - 1)))
        return ops.where(replay, kept, self.noise(n))

    def push(self, samples):
        """Keeps (n, ...) in place of the oldest."""
        samples = ops.cast(samples, "float32")[-self.size :]
        n = ops.shape(samples)[0]
        pointer = ops.convert_to_tensor(self.pointer)
        places = ops.mod(pointer + ops.arange(0, n, dtype="int32"), self.size)
        kept = ops.convert_to_tensor(self.samples)
        kept = ops.scatter_update(kept, ops.expand_dims(places, -1), samples)
        self.samples.assign(kept)
        self.pointer.assign(ops.mod(pointer + n, self.size))
        self.count.assign(ops.minimum(ops.convert_to_tensor(self.count) + n, self.size))


@keras.saving.register_keras_serializable("keras_edifice")
class EBMModel(EdificeModel):
    """An energy, or a classifier made of energies.

    `compile(optimizer)` and `fit(x)` train by contrastive divergence; a compiled loss
    and labels, `fit(x, y)`, train as any other model.
    """

    def energy(self, x):
        """E(x), array (batch,): high for inputs that are unlike the data."""
        energies = self.get_layer("network").predict(x, verbose=0)
        return ops.convert_to_numpy(free_energy(ops.convert_to_tensor(energies)))

    def sample(self, n, steps=None, seed=None):
        """The ends of chains from noise, array (n, ...).

        Args:
            n: number of samples.
            steps: length of the chains; None is that of training.
            seed: makes the result repeatable; None goes on with the draws of training.
        """
        generator = None if seed is None else keras.random.SeedGenerator(seed)
        start = self.get_layer("replay_buffer").noise(n, generator)
        return ops.convert_to_numpy(self.chain(start, steps, generator))

    def chain(self, start, steps=None, seed=None):
        """(batch, ...) -> the same: where Langevin chains from `start` end."""
        options = self.options
        shape = (steps or options["langevin_steps"], *ops.shape(start))
        seed = seed or self.get_layer("replay_buffer").seed_generator
        settings = ("step_size", "noise_scale", "grad_clip", "clamp", "sampler")
        return langevin(
            self._frozen_energy(),
            start,
            keras.random.normal(shape, dtype="float32", seed=seed),
            **{name: options[name] for name in settings},
        )

    def _frozen_energy(self):
        """E as a function of x alone: no training and no gradient of weights."""
        network = self.get_layer("network")
        weights = [
            ops.stop_gradient(ops.convert_to_tensor(w))
            for w in network.trainable_variables
        ]
        state = [ops.convert_to_tensor(w) for w in network.non_trainable_variables]

        def energy(x):
            energies, _ = network.stateless_call(weights, state, x, training=False)
            return free_energy(energies)

        return energy

    def compute_loss(
        self, x=None, y=None, y_pred=None, sample_weight=None, training=True
    ):
        if y is not None and self.loss is None:
            raise ValueError(
                f"{self.name} received y and has no loss for it; "
                "compile it with a loss, or pass x alone"
            )
        if y is not None:
            return super().compute_loss(x, y, y_pred, sample_weight, training)
        if sample_weight is not None:
            raise ValueError(
                f"{self.name} received sample_weight, which contrastive divergence "
                "does not take; pass x alone"
            )
        return self.contrastive_divergence(ops.cast(x, "float32"), y_pred, training)

    def contrastive_divergence(self, x, y_pred, training):
        """The loss of the module's docstring, for one batch."""
        options, network = self.options, self.get_layer("network")
        buffer = self.get_layer("replay_buffer")
        start = x
        if options["init"] == "buffer":
            start = buffer.draw(ops.shape(x)[0], options["replay_prob"])
        negatives = self.chain(start)
        if training:
            buffer.push(negatives)
        if options["num_classes"] is not None:
            y_pred = network(x, training=training)  # the output is their softmax
        real = free_energy(y_pred)
        unreal = free_energy(network(negatives, training=training))
        squares = ops.mean(ops.square(real) + ops.square(unreal))
        return ops.mean(real) - ops.mean(unreal) + options["reg_alpha"] * squares


def _mlp(x, sizes, activation, dropout, spectral_norm):
    for i, size in enumerate(sizes):
        x = (SpectralDense if spectral_norm else layers.Dense)(
            size,
            activation,
            kernel_initializer=kernel_initializer(activation),
            name=f"dense_{i}",
        )(x)
        if dropout:
            x = layers.Dropout(dropout, name=f"dropout_{i}")(x)
    return x


def _conv(filters, size, spectral_norm, bound=False, **options):
    """A convolution as released: normal kernel, near zero where the norm is bounded."""
    if not spectral_norm:
        return Conv2D(filters, size, padding="same", **options)
    return SpectralConv2D(
        filters,
        size,
        bound,
        padding="same",
        kernel_initializer=keras.initializers.RandomNormal(
            stddev=1e-10 if bound else 1.0
        ),
        **options,
    )


def _block(x, filters, downsample, activation, spectral_norm, num_classes, name):
    """Residual block; with classes, each convolution has their scale and shift."""
    bias = num_classes is None
    shortcut, h = x, x
    for i in range(2):
        h = _conv(
            filters,
            3,
            spectral_norm,
            bound=i == 1,
            use_bias=bias,
            name=f"{name}_conv_{i}",
        )(h)
        if num_classes is not None:
            h = ClassAffine(num_classes, name=f"{name}_affine_{i}")(h)
        if i == 0:
            h = layers.Activation(activation, name=f"{name}_activation_0")(h)
    if downsample or x.shape[-1] != filters:
        shortcut = _conv(
            filters, 1, spectral_norm, use_bias=False, name=f"{name}_shortcut"
        )(x)
    h = layers.Add(name=f"{name}_add")([h, shortcut])
    if downsample:
        h = layers.AveragePooling2D(2, name=f"{name}_pool")(h)
    return layers.Activation(activation, name=f"{name}_activation_1")(h)


def _residual_network(x, sizes, activation, dropout, spectral_norm, num_classes):
    """The released network: two blocks for each size, the first halves the image."""
    x = _conv(sizes[0], 3, spectral_norm, name="stem")(x)
    x = layers.Activation(activation, name="stem_activation")(x)
    if num_classes is not None:
        x = ops.repeat(x, num_classes, axis=0)  # (batch · classes, ...)
    for i, filters in enumerate(sizes):
        for j in range(2):
            x = _block(
                x,
                filters,
                j == 0,
                activation,
                spectral_norm,
                num_classes,
                f"stage_{i}_block_{j}",
            )
        if dropout:
            x = layers.Dropout(dropout, name=f"dropout_{i}")(x)
    return ops.sum(layers.ReLU(name="relu")(x), axis=(1, 2))


def _check(input_size, backbone, image_size, hidden_sizes, clamp):
    if backbone == "mlp" and input_size is None:
        raise TypeError(
            "ebm needs input_size (features of each example) for backbone='mlp'; "
            "pass it by name"
        )
    if backbone == "conv" and image_size < 2 ** len(hidden_sizes):
        raise ValueError(
            f"image_size must be >= 2 ** len(hidden_sizes) = {2 ** len(hidden_sizes)}, "
            f"received {image_size}; each stage halves the image"
        )
    if clamp is not None and (len(clamp) != 2 or clamp[0] >= clamp[1]):
        raise ValueError(
            f"clamp must be [low, high] with low < high, received {clamp}; "
            "None leaves the chain free"
        )


@architecture(
    paper="Du & Mordatch 2019, Implicit Generation and Modeling with Energy-Based "
    "Models, arXiv:1903.08689",
    kind="vector",
    inputs="(batch, input_size)",
    outputs="(batch, num_classes | 1)",
    tiny=dict(
        input_size=5,
        hidden_sizes=[8, 6],
        spectral_norm=True,
        langevin_steps=3,
        buffer_size=16,
    ),
    variants=dict(
        igebm_cifar10=dict(
            backbone="conv",
            image_size=32,
            num_channels=3,
            hidden_sizes=[128, 256, 256],
            activation="leaky_relu",
            spectral_norm=True,
        )
    ),
)
def ebm(
    *,
    input_size: Size | None = None,
    hidden_sizes: list[Size] = [256, 128],
    activation: Activation = "silu",
    dropout: Rate = 0.0,
    spectral_norm: bool = False,
    backbone: Literal["mlp", "conv"] = "mlp",
    image_size: Size = 32,
    num_channels: Size = 3,
    sampler: Literal["igebm", "ula"] = "igebm",
    init: Literal["buffer", "data"] = "buffer",
    langevin_steps: Size = 60,
    step_size: Positive = 10.0,
    noise_scale: NonNegative = 0.005,
    grad_clip: Positive = 0.01,
    clamp: list[float] | None = [0.0, 1.0],
    buffer_size: Size = 10000,
    replay_prob: Fraction = 0.95,
    reg_alpha: NonNegative = 1.0,
    seed: Count | None = None,
    num_classes: Size | None = None,
    classifier_activation: Activation | None = "softmax",
) -> EBMModel:
    """Energy network that contrastive divergence trains on data without labels.

    Args:
        input_size: features of each example; needed for backbone "mlp".
        hidden_sizes: width of each dense layer; with backbone "conv" channels of each
            stage of two residual blocks, which halves the image.
        activation: after each dense layer or convolution.
        dropout: rate after each dense layer or stage, in training.
        spectral_norm: divide each hidden kernel by its largest singular value.
        backbone: "mlp", or "conv" for images (image_size, image_size, num_channels).
        image_size: height and width of the images of backbone "conv".
        num_channels: channels of these images.
        sampler: of the chains, the released one (noise, then a clipped step) or the
            unadjusted Langevin algorithm, which has no noise_scale and no grad_clip.
        init: chains start from the replay buffer and noise, or from the data (CD-k).
        langevin_steps: length of the chains.
        step_size: η, of each step along the gradient.
        noise_scale: of the noise added before each step.
        grad_clip: bound of each element of the gradient.
        clamp: [low, high] of the data, kept by the chains; None leaves them free and
            starts them in [-1, 1].
        buffer_size: number of kept samples.
        replay_prob: probability that a chain starts from a kept sample, not from noise.
        reg_alpha: factor of the squared energies in the loss.
        seed: of the chains and of the buffer.
        num_classes: energies E(x, y) of each class; None gives one energy E(x).
        classifier_activation: of -E(x, y); None gives these as logits.
    """
    _check(input_size, backbone, image_size, hidden_sizes, clamp)
    shape = (input_size,)
    if backbone == "conv":
        shape = (image_size, image_size, num_channels)
    x = features = Input(shape, name="features")
    if backbone == "conv":
        x = _residual_network(
            x, hidden_sizes, activation, dropout, spectral_norm, num_classes
        )
        energies = Dense(1, dtype="float32", name="energies")(x)
        if num_classes is not None:
            energies = ops.reshape(energies, (-1, num_classes))
    else:
        x = _mlp(x, hidden_sizes, activation, dropout, spectral_norm)
        energies = Dense(num_classes or 1, dtype="float32", name="energies")(x)
    network = keras.Model(features, energies, name="network")

    inputs = Input(shape, name="inputs")
    low, high = clamp or (-1.0, 1.0)
    buffer = ReplayBuffer(
        buffer_size, low, high, seed, dtype="float32", name="replay_buffer"
    )
    outputs = network(buffer(inputs))
    if num_classes is not None:
        outputs = layers.Activation(
            classifier_activation, dtype="float32", name="predictions"
        )(-outputs)
    return EBMModel(inputs, outputs, name="ebm")
