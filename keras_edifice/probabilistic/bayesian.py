"""Bayes by backprop: dense layers whose weights are distributions.

    w = μ + softplus(ρ) ⊙ ε,  ε ~ N(0, 1)
    loss = E_q[-log P(D | w)] + KL(q(w | μ, ρ) || P(w))

Blundell et al. 2015, eq. 1 to 9. Beside the mean loss of an example the divergence is
divided by the number of examples. Two estimators of less noise may take the place of
the first line: the local one draws the outputs, N(xμ, x²σ²) (Kingma et al. 2015,
arXiv:1506.02557), and flipout draws signs for each example, xμ + ((x ⊙ s)(σ ⊙ ε)) ⊙ r
(Wen et al. 2018, arXiv:1803.04386, eq. 4).
"""

import math
from typing import Annotated, Literal

import keras
from keras import Input, layers, ops

from keras_edifice.blocks.dense_stack import kernel_initializer
from keras_edifice.blocks.monte_carlo import MonteCarloModel
from keras_edifice.ops.tracing import exporting
from keras_edifice.options import Activation, Count, NonNegative, Positive, Range, Size
from keras_edifice.registry import architecture

OpenFraction = Annotated[float, Range(0.0, 1.0, open_low=True, open_high=True)]


def gaussian_kl(mu, sigma, prior_sigma):
    """KL(N(mu, sigma²) || N(0, prior_sigma²)), summed over all elements."""
    ratio = (ops.square(sigma) + ops.square(mu)) / (2.0 * prior_sigma**2)
    return ops.sum(math.log(prior_sigma) - ops.log(sigma) + ratio - 0.5)


def mixture_log_prob(w, pi, sigma1, sigma2):
    """log(π N(w; 0, σ₁²) + (1 - π) N(w; 0, σ₂²)) of each element; eq. 7."""

    def log_normal(weight, sigma):
        constant = math.log(weight) - math.log(sigma * math.sqrt(2.0 * math.pi))
        return constant - ops.square(w) / (2.0 * sigma**2)

    both = ops.stack([log_normal(pi, sigma1), log_normal(1.0 - pi, sigma2)])
    return ops.logsumexp(both, axis=0)


def _check_choice(name, value, *choices):
    if value not in choices:
        allowed = ", ".join(map(repr, choices))
        raise ValueError(f"{name} must be one of {allowed}, received {value!r}")


@keras.saving.register_keras_serializable("keras_edifice")
class BayesianDense(layers.Layer):
    """(..., features) -> (..., units), by weights that are drawn.

    Training draws anew in each call; inference uses the mean of the posterior, unless
    `sample_at_inference`. The divergence from the prior is added to the losses of the
    model, at inference too. It is exact for the Gaussian prior; for the mixture it is
    log q(w) - log P(w) at the drawn weights, and at inference, where nothing is drawn,
    its mean over w = μ ± σ.

    Args:
        units: number of outputs.
        activation: name of an activation, or None.
        mean_initializer: of the means of the kernel; those of the bias start at zero.
        prior: "gaussian", N(0, prior_sigma²), or "scale_mixture".
        prior_sigma: standard deviation of the Gaussian prior.
        prior_pi: weight of the first part of the mixture.
        prior_sigma1: standard deviation of the first part.
        prior_sigma2: standard deviation of the second part.
        posterior_rho_init: ρ at the start.
        estimator: "reparameterization", "local" or "flipout".
        kl_weight: factor of the divergence; None is 1 / the number of examples, which
            `set_num_examples` tells (the models of this package call it in `fit`).
        kl_weighting: "uniform" over the minibatches of an epoch; "exponential" gives
            minibatch i of M the weight 2^(M-i) / (2^M - 1), eq. 9.
        sample_at_inference: whether inference draws; such a layer has no ONNX form.
        seed: of the draws.

    Raises:
        ValueError: unknown prior, estimator or kl_weighting.
    """

    def __init__(
        self,
        units,
        activation=None,
        mean_initializer="glorot_uniform",
        prior="gaussian",
        prior_sigma=1.0,
        prior_pi=0.5,
        prior_sigma1=1.0,
        prior_sigma2=0.0025,
        posterior_rho_init=-3.0,
        estimator="reparameterization",
        kl_weight=None,
        kl_weighting="uniform",
        sample_at_inference=False,
        seed=None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        _check_choice("prior", prior, "gaussian", "scale_mixture")
        _check_choice("estimator", estimator, "reparameterization", "local", "flipout")
        _check_choice("kl_weighting", kl_weighting, "uniform", "exponential")
        self.units, self.activation = units, activation
        self.mean_initializer = mean_initializer
        self.prior, self.prior_sigma, self.prior_pi = prior, prior_sigma, prior_pi
        self.prior_sigma1, self.prior_sigma2 = prior_sigma1, prior_sigma2
        self.posterior_rho_init, self.estimator = posterior_rho_init, estimator
        self.kl_weight, self.kl_weighting = kl_weight, kl_weighting
        self.sample_at_inference, self.seed = sample_at_inference, seed
        self.activate = keras.activations.get(activation)
        self.seed_generator = keras.random.SeedGenerator(seed)
        self.supports_masking = True

    def build(self, input_shape):
        rho = keras.initializers.Constant(self.posterior_rho_init)
        kernel, bias = (input_shape[-1], self.units), (self.units,)

        # The divergence needs float32 under mixed precision too: no automatic cast.
        def weight(shape, initializer, name, trainable=True):
            return self.add_weight(
                shape, initializer, trainable=trainable, name=name, autocast=False
            )

        self.kernel_mu = weight(kernel, self.mean_initializer, "kernel_mu")
        self.kernel_rho = weight(kernel, rho, "kernel_rho")
        self.bias_mu = weight(bias, "zeros", "bias_mu")
        self.bias_rho = weight(bias, rho, "bias_rho")
        self.num_examples = weight((), "ones", "num_examples", False)
        self.examples_seen = weight((), "zeros", "examples_seen", False)
        self.batch_size = weight((), "ones", "batch_size", False)

    def set_num_examples(self, num_examples):
        """Tells how many examples an epoch has, which `kl_weight=None` needs."""
        self.num_examples.assign(float(num_examples))
        self.examples_seen.assign(0.0)

    def posterior(self):
        """[(μ, σ) of the kernel, (μ, σ) of the bias], float32."""
        weights = (
            (self.kernel_mu, self.kernel_rho),
            (self.bias_mu, self.bias_rho),
        )
        return [
            (ops.cast(mu, "float32"), ops.softplus(ops.cast(rho, "float32")))
            for mu, rho in weights
        ]

    def kl(self, noise=None):
        """KL(posterior || prior) over kernel and bias.

        Args:
            noise: [ε of the kernel, ε of the bias] of the drawn weights; the Gaussian
                prior needs none.
        """
        posterior = self.posterior()
        if self.prior == "gaussian":
            return sum(gaussian_kl(*q, self.prior_sigma) for q in posterior)
        if noise is not None:
            return sum(map(self._log_ratio, posterior, noise))
        above, below = (
            [sign * ops.ones_like(mu) for mu, _ in posterior] for sign in (1.0, -1.0)
        )
        return (self.kl(above) + self.kl(below)) / 2.0

    def _log_ratio(self, posterior, noise):
        """Log q(w) - log P(w), summed, at w = μ + σ ε."""
        mu, sigma = posterior
        log_q = -ops.log(sigma) - 0.5 * math.log(2.0 * math.pi) - 0.5 * noise**2
        mixture = self.prior_pi, self.prior_sigma1, self.prior_sigma2
        return ops.sum(log_q - mixture_log_prob(mu + sigma * noise, *mixture))

    def call(self, x, training=None):
        noise = None
        if training or self.sample_at_inference:
            noise = [self._normal(ops.shape(mu)) for mu, _ in self.posterior()]
            y = getattr(self, f"_{self.estimator}")(x, noise)
        else:
            (kernel, _), (bias, _) = self.posterior()
            y = self._affine(x, kernel, bias)
        if not exporting():
            self.add_loss(self._kl_factor(x, training) * self.kl(noise))
        return self.activate(y)

    def sample(self, x, seed=None):
        """(draws, batch, features) -> (draws, batch, units): new weights each draw."""
        drawn = []
        for mu, sigma in self.posterior():
            shape = (x.shape[0], *mu.shape)
            drawn.append(mu + sigma * self._normal(shape, seed))
        kernel, bias = drawn
        return self.activate(self._affine(x, kernel, ops.expand_dims(bias, 1)))

    def _affine(self, x, kernel, bias):
        x, kernel, bias = (ops.cast(t, self.compute_dtype) for t in (x, kernel, bias))
        return ops.matmul(x, kernel) + bias

    def _normal(self, shape, seed=None):
        return keras.random.normal(
            shape, dtype="float32", seed=seed or self.seed_generator
        )

    def _signs(self, shape):
        uniform = keras.random.uniform(shape, -1.0, 1.0, seed=self.seed_generator)
        return ops.cast(ops.where(uniform < 0.0, -1.0, 1.0), self.compute_dtype)

    def _reparameterization(self, x, noise):
        drawn = [
            mu + sigma * e
            for (mu, sigma), e in zip(self.posterior(), noise, strict=True)
        ]
        return self._affine(x, *drawn)

    def _flipout(self, x, noise):
        (kernel, kernel_sigma), (bias, bias_sigma) = self.posterior()
        mean = self._affine(x, kernel, bias)
        into, out = self._signs(ops.shape(x)), self._signs(ops.shape(mean))
        return mean + out * self._affine(
            x * into, kernel_sigma * noise[0], bias_sigma * noise[1]
        )

    def _local(self, x, noise):
        (kernel, kernel_sigma), (bias, bias_sigma) = self.posterior()
        mean = self._affine(x, kernel, bias)
        variance = self._affine(x**2, kernel_sigma**2, bias_sigma**2)
        # The floor keeps the slope of the root finite where σ vanishes.
        deviation = ops.sqrt(ops.maximum(ops.cast(variance, "float32"), 1e-24))
        drawn = deviation * self._normal(ops.shape(mean))
        return mean + ops.cast(drawn, self.compute_dtype)

    def _kl_factor(self, x, training):
        """The factor of the divergence in this minibatch."""
        num_examples = ops.cast(self.num_examples, "float32")
        factor = 1.0 / num_examples if self.kl_weight is None else self.kl_weight
        if self.kl_weighting == "uniform" or not training:
            return factor
        size = ops.cast(ops.shape(x)[0], "float32")
        seen = ops.cast(self.examples_seen, "float32")
        full = ops.cast(self.batch_size, "float32")
        full = ops.where(seen < 0.5, size, full)  # the last minibatch may be smaller
        number, place = ops.ceil(num_examples / full), seen / full + 1.0
        # 2^(M-i) / (2^M - 1) = 2^-i / (1 - 2^-M), and M times that has the mean one.
        share = ops.exp(-place * math.log(2.0))
        share = share / (1.0 - ops.exp(-number * math.log(2.0)))
        after = seen + size
        after = ops.where(after < num_examples, after, 0.0)
        self.batch_size.assign(full)
        self.examples_seen.assign(after)
        return factor * number * share

    def compute_output_shape(self, input_shape):
        return (*input_shape[:-1], self.units)


@keras.saving.register_keras_serializable("keras_edifice")
class BayesianModel(MonteCarloModel):
    """A chain of Bayesian layers.

    `fit` takes the number of examples from the data, which scales the divergence.
    Where the data does not say it (a generator, a data set), give `kl_weight`.
    """

    def predict_uncertainty(self, x, num_samples=30, seed=None):
        """Mean and variances over networks drawn from the posterior.

        Args:
            x: (batch, input_size).
            num_samples: number of networks; all of them run at once.
            seed: makes the result repeatable.

        Returns:
            Arrays (batch, outputs): `mean`; `epistemic`, the variance of the networks'
            predictions. Classifiers have probabilities p in place of predictions, and
            `aleatoric`, the mean of p (1 - p): the variance that would remain if the
            weights were known. The two add up to mean (1 - mean).
        """
        if not self.classifies:
            draws = self.draw(x, num_samples, seed)
            return dict(mean=draws.mean(0), epistemic=draws.var(0))
        p = self.draw_probabilities(x, num_samples, seed)
        return dict(mean=p.mean(0), epistemic=p.var(0), aleatoric=(p * (1 - p)).mean(0))


@architecture(
    paper="Blundell et al. 2015, Weight Uncertainty in Neural Networks, "
    "arXiv:1505.05424",
    kind="vector",
    inputs="(batch, input_size)",
    outputs="(batch, num_classes | output_size)",
    tiny=dict(input_size=5, hidden_sizes=[8, 6], output_size=3, prior="scale_mixture"),
)
def bayesian(
    *,
    input_size: Size,
    hidden_sizes: list[Size] = [256, 128],
    output_size: Size = 10,
    activation: Activation = "relu",
    prior: Literal["gaussian", "scale_mixture"] = "gaussian",
    prior_sigma: Positive = 1.0,
    prior_pi: OpenFraction = 0.5,
    prior_sigma1: Positive = 1.0,
    prior_sigma2: Positive = 0.0025,
    posterior_rho_init: float = -3.0,
    estimator: Literal["reparameterization", "local", "flipout"] = "reparameterization",
    kl_weight: NonNegative | None = None,
    kl_weighting: Literal["uniform", "exponential"] = "uniform",
    sample_at_inference: bool = False,
    seed: Count | None = None,
    num_classes: Size | None = None,
    classifier_activation: Activation | None = "softmax",
) -> BayesianModel:
    """Dense layers with a Gaussian posterior over every weight and bias.

    Args:
        input_size: features of each example.
        hidden_sizes: width of each hidden layer.
        output_size: width of the last layer, which is linear.
        activation: after each hidden layer.
        prior: of the weights, a Gaussian or a mixture of a wide and a narrow one.
        prior_sigma: standard deviation of the Gaussian prior.
        prior_pi: weight of the wide part of the mixture.
        prior_sigma1: standard deviation of the wide part.
        prior_sigma2: standard deviation of the narrow part.
        posterior_rho_init: ρ at the start; the standard deviation is softplus(ρ).
        estimator: how training draws: the weights, the outputs, or weights with a
            sign for each example.
        kl_weight: factor of the divergence from the prior beside the mean loss; None
            is 1 / the number of training examples, which arrays tell; needed where
            the data comes from a generator.
        kl_weighting: of the minibatches of an epoch, alike or 2^(M-i) / (2^M - 1).
        sample_at_inference: draw at inference too; such a model has no ONNX form.
        seed: of the draws.
        num_classes: classes of a further Bayesian layer; None gives the features.
        classifier_activation: of that layer; None gives logits.
    """
    shared = dict(
        prior=prior,
        prior_sigma=prior_sigma,
        prior_pi=prior_pi,
        prior_sigma1=prior_sigma1,
        prior_sigma2=prior_sigma2,
        posterior_rho_init=posterior_rho_init,
        estimator=estimator,
        kl_weight=kl_weight,
        kl_weighting=kl_weighting,
        sample_at_inference=sample_at_inference,
    )
    rows = [
        (size, activation, f"bayesian_{i}", None) for i, size in enumerate(hidden_sizes)
    ]
    rows.append((output_size, None, "outputs", None))
    if num_classes is not None:
        rows.append((num_classes, classifier_activation, "predictions", "float32"))
    x = inputs = Input((input_size,), name="inputs")
    for i, (units, activation, name, dtype) in enumerate(rows):
        x = BayesianDense(
            units,
            activation,
            mean_initializer=kernel_initializer(activation),
            seed=None if seed is None else seed + i,
            dtype=dtype,
            name=name,
            **shared,
        )(x)
    return BayesianModel(inputs, x, name="bayesian")
