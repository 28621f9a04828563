"""Variational autoencoder: a latent-variable model trained on a bound of log p(x).

log p(x) >= E_q(z|x) log p(x|z) - β KL(q(z|x) ‖ p(z))           ELBO, eq. 3
q(z|x) = N(μ, σ²),  z = μ + σ ε,  ε ~ N(0, I),  p(z) = N(0, I)  eq. 9, 10
KL = ½ Σ (μ² + σ² - 1 - log σ²)                                 appendix B
"""

import math
from typing import Literal

import keras
from keras import Input, layers, ops

from keras_edifice.blocks.dense import Dense
from keras_edifice.blocks.dense_stack import dense_stack, kernel_initializer
from keras_edifice.model import EdificeModel
from keras_edifice.options import Activation, Count, NonNegative, Positive, Size
from keras_edifice.registry import architecture


@keras.saving.register_keras_serializable("keras_edifice")
class GaussianSample(layers.Layer):
    """μ (b, d), log σ² (b, d) -> z (b, d): a draw in training, μ at inference.

    Args:
        warmup_steps: batches over which `warmup` rises from 0 to 1; 0 is none.
        seed: of the draws; None takes a new one.
    """

    def __init__(self, warmup_steps=0, seed=None, **kwargs):
        super().__init__(**kwargs)
        self.warmup_steps, self.seed = warmup_steps, seed
        self.noise = keras.random.SeedGenerator(seed)

    def build(self, mean_shape):
        if self.warmup_steps:
            self.step = self.add_weight(
                (), "zeros", trainable=False, autocast=False, name="step"
            )

    def call(self, mean, log_var, training=None):
        if not training:
            return mean
        if self.warmup_steps:
            self.step.assign(self.step + 1.0)
        return self.draw(mean, log_var)

    def draw(self, mean, log_var):
        """Reparameterised draw z = μ + σ ε."""
        noise = keras.random.normal(ops.shape(mean), dtype=mean.dtype, seed=self.noise)
        return mean + ops.exp(0.5 * log_var) * noise

    def warmup(self):
        """The factor of the KL: batches drawn so far / warmup_steps, at most 1."""
        if not self.warmup_steps:
            return 1.0
        step = ops.convert_to_tensor(self.step)
        return ops.minimum(step / self.warmup_steps, 1.0)

    def compute_output_shape(self, mean_shape):
        return mean_shape


@keras.saving.register_keras_serializable("keras_edifice")
class VAE(EdificeModel):
    """Trains on -ELBO with `compile(optimizer)` and `fit(x)`.

    The log holds the mean of -log p(x|z) as "reconstruction" and that of the KL as
    "kl". In `evaluate` z is the mean of q and β has its full weight. Keras hands
    a sample_weight on only beside targets: `fit(x, x, sample_weight=w)`.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.reconstruction_tracker = keras.metrics.Mean(name="reconstruction")
        self.kl_tracker = keras.metrics.Mean(name="kl")

    @property
    def encoder(self) -> keras.Model:
        """The model x -> {"mu", "log_var"}, (batch, latent_size) each."""
        return self.get_layer("encoder")

    @property
    def decoder(self) -> keras.Model:
        """The model z (batch, latent_size) -> mean of p(x|z), or its logits."""
        return self.get_layer("decoder")

    def log_likelihood(self, x, reconstruction):
        """Sum of log p(x|z) over features: (batch, ...) twice -> (batch,)."""
        x, mean = ops.cast(x, "float32"), ops.cast(reconstruction, "float32")
        if self.options["likelihood"] == "bernoulli":
            logs = x * mean - ops.softplus(mean)  # the mean is given as logits
        else:
            variance = self.options["decoder_std"] ** 2
            logs = -0.5 * (
                ops.square(x - mean) / variance + math.log(2 * math.pi * variance)
            )
        return ops.sum(logs, axis=tuple(range(1, len(logs.shape))))

    def kl_divergence(self, mean, log_var):
        """KL(q(z|x) ‖ N(0, I)), summed over the latents: (batch,)."""
        mean, log_var = ops.cast(mean, "float32"), ops.cast(log_var, "float32")
        terms = ops.square(mean) + ops.exp(log_var) - 1.0 - log_var
        return 0.5 * ops.sum(terms, axis=-1)

    def compute_loss(
        self, x=None, y=None, y_pred=None, sample_weight=None, training=True
    ):
        mean, log_var = y_pred["mu"], y_pred["log_var"]
        sampler = self.get_layer("sample")
        reconstruction = -self.log_likelihood(x, y_pred["reconstruction"])
        if training and self.options["num_samples"] > 1:
            others = self.options["num_samples"] - 1
            for _ in range(others):
                decoded = self.decoder(sampler.draw(mean, log_var), training=True)
                reconstruction = reconstruction - self.log_likelihood(x, decoded)
            reconstruction = reconstruction / (others + 1)
        kl = self.kl_divergence(mean, log_var)
        self.reconstruction_tracker.update_state(reconstruction, sample_weight)
        self.kl_tracker.update_state(kl, sample_weight)
        beta = self.options["beta"] * (sampler.warmup() if training else 1.0)
        loss = reconstruction + beta * kl
        if sample_weight is not None:
            loss = loss * ops.cast(sample_weight, "float32")
        return ops.mean(loss)

    def sample(self, n: int, seed: int | None = None):
        """Draws z ~ p(z) and decodes it.

        Args:
            n: number of examples.
            seed: of the draws.

        Returns:
            (n, ...) array, the means of p(x|z): probabilities if Bernoulli.
        """
        width = self.decoder.input_shape[-1]
        z = keras.random.normal((n, width), seed=keras.random.SeedGenerator(seed))
        x = self.decoder(z)
        if self.options["likelihood"] == "bernoulli":
            x = ops.sigmoid(x)
        return ops.convert_to_numpy(x)

    def elbo(self, x, num_samples: int = 1, seed: int | None = None):
        """The bound of eq. 3 with β = 1: E_q log p(x|z) by draws, KL exactly.

        Args:
            x: (batch, ...) data.
            num_samples: draws of z.
            seed: of the draws.

        Returns:
            (batch,) array.
        """
        encoded, draws = self._draws(x, num_samples, seed)
        fits = ops.stack([self.log_likelihood(x, self.decoder(z)) for z, _ in draws])
        bound = ops.mean(fits, axis=0) - self.kl_divergence(**_named(encoded))
        return ops.convert_to_numpy(bound)

    def importance_bound(self, x, num_samples: int = 50, seed: int | None = None):
        """Bound log mean_k p(x, z_k) / q(z_k|x), in expectation not below the ELBO.

        Burda et al. 2016, Importance Weighted Autoencoders, arXiv:1509.00519, eq. 8.

        Args:
            x: (batch, ...) data.
            num_samples: draws of z; the bound rises with them to log p(x).
            seed: of the draws.

        Returns:
            (batch,) array.
        """
        encoded, draws = self._draws(x, num_samples, seed)
        log_var = encoded["log_var"]
        weights = [
            self.log_likelihood(x, self.decoder(z))
            + 0.5 * ops.sum(ops.square(e) + log_var - ops.square(z), axis=-1)
            for z, e in draws
        ]
        bound = ops.logsumexp(ops.stack(weights), axis=0) - math.log(num_samples)
        return ops.convert_to_numpy(bound)

    def _draws(self, x, num_samples, seed):
        """q(z|x), and (z, ε) of each draw."""
        if num_samples < 1:
            raise ValueError(f"num_samples must be >= 1, received {num_samples!r}")
        encoded = self.encoder(x)
        mean, deviation = encoded["mu"], ops.exp(0.5 * encoded["log_var"])
        generator = keras.random.SeedGenerator(seed)
        draws = []
        for _ in range(num_samples):
            noise = keras.random.normal(ops.shape(mean), seed=generator)
            draws.append((mean + deviation * noise, noise))
        return encoded, draws


def _named(encoded):
    return {"mean": encoded["mu"], "log_var": encoded["log_var"]}


def _side(input_size, num_channels, encoder_sizes, decoder_sizes):
    """Side of the square image that the convolutions halve."""
    side = math.isqrt(input_size // num_channels)
    halvings = 2 ** max(len(encoder_sizes), len(decoder_sizes))
    if side * side * num_channels != input_size or side % halvings:
        raise ValueError(
            f"input_size must be side * side * num_channels with a side that "
            f"{halvings} divides, received {input_size} and {num_channels} channels; "
            "use other sizes or architecture='mlp'"
        )
    return side


def _convolution(kind, filters, activation, name):
    """Halves or doubles the side: 4x4, stride 2, as Higgins et al. 2017, table 1."""
    return kind(
        filters,
        4,
        strides=2,
        padding="same",
        activation=activation,
        kernel_initializer=kernel_initializer(activation),
        name=name,
    )


def _encoder(shape, sizes, latent_size, activation):
    x = inputs = Input(shape, name="x")
    if len(shape) == 1:
        x = dense_stack(x, sizes, activation, name="encoder")
    else:
        for i, size in enumerate(sizes):
            name = f"encoder_conv_{i}"
            x = _convolution(layers.Conv2D, size, activation, name)(x)
        x = layers.Flatten(name="encoder_flatten")(x)
    mean, log_var = (
        Dense(latent_size, dtype="float32", name=f"encoder_{name}")(x)
        for name in ("mu", "log_var")
    )
    outputs = {"mu": mean, "log_var": ops.clip(log_var, -30.0, 20.0)}
    return EdificeModel(inputs, outputs, name="encoder")


def _decoder(latent_size, sizes, shape, activation):
    x = inputs = Input((latent_size,), name="z")
    if len(shape) == 1:
        x = dense_stack(x, sizes, activation, name="decoder")
        x = Dense(shape[0], dtype="float32", name="decoder_output")(x)
        return EdificeModel(inputs, x, name="decoder")
    side = shape[0] // 2 ** len(sizes)
    first, *rest = [*sizes, shape[-1]]
    act = activation if rest else None
    x = Dense(
        side * side * first,
        activation=act,
        kernel_initializer=kernel_initializer(act),
        name="decoder_dense",
    )(x)
    x = layers.Reshape((side, side, first), name="decoder_reshape")(x)
    for i, size in enumerate(rest):
        act = activation if i < len(rest) - 1 else None
        name = f"decoder_conv_{i}"
        x = _convolution(layers.Conv2DTranspose, size, act, name)(x)
    x = layers.Activation("linear", dtype="float32", name="decoder_output")(x)
    return EdificeModel(inputs, x, name="decoder")


@architecture(
    paper="Kingma & Welling 2014, Auto-Encoding Variational Bayes, arXiv:1312.6114",
    kind="vector",
    inputs="(batch, input_size)",
    outputs={
        "reconstruction": "(batch, input_size)",
        "mu": "(batch, latent_size)",
        "log_var": "(batch, latent_size)",
    },
    tiny=dict(
        input_size=6,
        latent_size=3,
        encoder_sizes=[8],
        decoder_sizes=[7],
        kl_warmup_steps=3,
        num_samples=2,
    ),
)
def vae(
    *,
    input_size: Size,
    latent_size: Size = 32,
    encoder_sizes: list[Size] = [256, 128],
    decoder_sizes: list[Size] = [128, 256],
    activation: Activation = "relu",
    likelihood: Literal["gaussian", "bernoulli"] = "gaussian",
    decoder_std: Positive = 1.0,
    beta: NonNegative = 1.0,
    kl_warmup_steps: Count = 0,
    num_samples: Size = 1,
    architecture: Literal["mlp", "conv"] = "mlp",
    num_channels: Size = 1,
) -> VAE:
    """Encoder to a Gaussian over latents, a draw of it, decoder to a likelihood.

    Train with `compile(optimizer)` and `fit(x)`; then `sample`, `elbo`,
    `importance_bound`, and the parts `encoder` and `decoder`.

    Args:
        input_size: features of each example.
        latent_size: latent variables of each example.
        encoder_sizes: widths of the encoder's layers.
        decoder_sizes: widths of the decoder's layers.
        activation: after each hidden layer.
        likelihood: "gaussian", whose mean the decoder gives, or "bernoulli", whose
            logits it gives, for data in 0 to 1.
        decoder_std: standard deviation of the Gaussian likelihood.
        beta: weight of the KL (Higgins et al. 2017); one is the ELBO.
        kl_warmup_steps: batches over which the weight of the KL rises to beta.
        num_samples: draws of z for each example and training step.
        architecture: "mlp" takes (batch, input_size); "conv" takes square images
            (batch, side, side, num_channels) of input_size numbers, and each of its
            layers halves or doubles the side.
        num_channels: channels of the images.
    """
    shape = (input_size,)
    if architecture == "conv":
        side = _side(input_size, num_channels, encoder_sizes, decoder_sizes)
        shape = (side, side, num_channels)
    inputs = Input(shape, name="inputs")
    encoded = _encoder(shape, encoder_sizes, latent_size, activation)(inputs)
    z = GaussianSample(kl_warmup_steps, dtype="float32", name="sample")(
        encoded["mu"], encoded["log_var"]
    )
    decoder = _decoder(latent_size, decoder_sizes, shape, activation)
    return VAE(inputs, {"reconstruction": decoder(z), **encoded}, name="vae")
