"""Monte-Carlo dropout: dropout at prediction time as approximate inference.

    y = W_L (z_L ⊙ φ(... W_2 (z_2 ⊙ φ(W_1 (z_1 ⊙ x) + b_1)) + b_2 ...)),  z ~ Bernoulli

Gal & Ghahramani 2016: the mean and the variance of predictions under new masks are
those of a network whose weights are uncertain. Masks are scaled by 1 / (1 - rate).
"""

import keras
import numpy as np
from keras import Input, layers, regularizers

from keras_edifice.blocks.dense import Dense
from keras_edifice.blocks.dense_stack import kernel_initializer
from keras_edifice.blocks.monte_carlo import MonteCarloModel
from keras_edifice.options import Activation, Count, Positive, Rate, Size
from keras_edifice.registry import architecture


@keras.saving.register_keras_serializable("keras_edifice")
class MCDropout(layers.Layer):
    """(..., features) -> the same. Dropout that can also be drawn at inference.

    Args:
        rate: probability of dropping an element; each has its own draw.
        always_on: whether inference draws as training does; such a layer has no ONNX
            form.
        seed: of the draws.
    """

    def __init__(self, rate, always_on=False, seed=None, **kwargs):
        super().__init__(**kwargs)
        self.rate, self.always_on, self.seed = rate, always_on, seed
        self.seed_generator = keras.random.SeedGenerator(seed)
        self.supports_masking = True

    def build(self, input_shape):
        """No weights."""

    def call(self, x, training=None):
        return self.sample(x) if training or self.always_on else x

    def sample(self, x, seed=None):
        """A new mask for each element of `x`, whatever the mode."""
        if not self.rate:
            return x
        return keras.random.dropout(x, self.rate, seed=seed or self.seed_generator)

    def compute_output_shape(self, input_shape):
        return input_shape


def entropy(probabilities):
    """-Σ p ln p over the last axis, in nats; 0 ln 0 = 0."""
    p = np.asarray(probabilities, "float64")
    return -(p * np.log(np.where(p > 0, p, 1.0))).sum(-1)


@keras.saving.register_keras_serializable("keras_edifice")
class MCDropoutModel(MonteCarloModel):
    """A chain of layers, some of them `MCDropout`."""

    @property
    def model_precision(self):
        """τ = (1 - rate) l² / (2 N λ), sec. 4; None unless l, λ and N are all given."""
        options = self.options
        length = options.get("length_scale")
        decay, examples = options.get("weight_decay"), options.get("num_train")
        if None in (length, decay, examples):
            return None
        return (1.0 - options["dropout_rate"]) * length**2 / (2.0 * examples * decay)

    def predict_uncertainty(self, x, num_samples=None, seed=None):
        """Moments of the predictions under new masks.

        Layers other than `MCDropout` run as at inference: a batch normalisation keeps
        its moving averages.

        Args:
            x: (batch, input_size).
            num_samples: number of draws; None takes the option of that name.
            seed: makes the result repeatable.

        Returns:
            Arrays `mean` and `variance` over the draws, (batch, outputs). Regression
            adds `predictive_variance`, which is `variance` + 1/τ, if `length_scale`,
            `weight_decay` and `num_train` are given. Classifiers add, each (batch,),
            `entropy` of the mean probabilities, `expected_entropy` of the draws, and
            `mutual_information`, their difference: what the weights leave open.
        """
        num_samples = num_samples or self.options.get("num_samples", 20)
        if self.classifies:
            p = self.draw_probabilities(x, num_samples, seed)
            total, expected = entropy(p.mean(0)), entropy(p).mean(0)
            return dict(
                mean=p.mean(0),
                variance=p.var(0),
                entropy=total,
                expected_entropy=expected,
                mutual_information=np.maximum(total - expected, 0.0),
            )
        draws = self.draw(x, num_samples, seed)
        result = dict(mean=draws.mean(0), variance=draws.var(0))
        if self.model_precision is not None:
            noise = 1.0 / self.model_precision
            result["predictive_variance"] = result["variance"] + noise
        return result


@architecture(
    paper="Gal & Ghahramani 2016, Dropout as a Bayesian Approximation, "
    "arXiv:1506.02142",
    kind="vector",
    inputs="(batch, input_size)",
    outputs="(batch, num_classes | output_size)",
    tiny=dict(
        input_size=5,
        hidden_sizes=[8, 6],
        output_size=3,
        input_dropout=0.1,
        weight_decay=1e-4,
    ),
)
def mc_dropout(
    *,
    input_size: Size,
    hidden_sizes: list[Size] = [256, 128],
    output_size: Size = 10,
    dropout_rate: Rate = 0.2,
    input_dropout: Rate = 0.0,
    activation: Activation = "relu",
    always_on: bool = False,
    num_samples: Size = 20,
    length_scale: Positive | None = None,
    weight_decay: Positive | None = None,
    num_train: Size | None = None,
    seed: Count | None = None,
    num_classes: Size | None = None,
    classifier_activation: Activation | None = "softmax",
) -> MCDropoutModel:
    """Dense layers with dropout before each, which predictions can draw again.

    Args:
        input_size: features of each example.
        hidden_sizes: width of each hidden layer.
        output_size: width of the last layer, which is linear.
        dropout_rate: before each layer but the first, in training and in draws.
        input_dropout: rate before the first layer.
        activation: after each hidden layer.
        always_on: draw in every call, at inference too; such a model has no ONNX form.
        num_samples: draws of `predict_uncertainty`.
        length_scale: l of the prior, which the precision τ of the noise needs.
        weight_decay: λ, factor of the squared weights and biases beside the loss
            ½ ‖y - ŷ‖² of an example; a mean squared error is 2 / output_size of that.
        num_train: N, number of training examples, which τ needs.
        seed: of the draws.
        num_classes: classes of a further dropout and layer; None gives the features.
        classifier_activation: of that layer; None gives logits.
    """
    rows = [
        (size, activation, f"dense_{i}", None) for i, size in enumerate(hidden_sizes)
    ]
    rows.append((output_size, None, "outputs", None))
    if num_classes is not None:
        rows.append((num_classes, classifier_activation, "predictions", "float32"))
    decay = regularizers.L2(weight_decay) if weight_decay else None
    x = inputs = Input((input_size,), name="inputs")
    for i, (units, activation, name, dtype) in enumerate(rows):
        x = MCDropout(
            dropout_rate if i else input_dropout,
            always_on,
            seed=None if seed is None else seed + i,
            name=f"dropout_{i}",
        )(x)
        x = Dense(
            units,
            activation,
            kernel_initializer=kernel_initializer(activation),
            kernel_regularizer=decay,
            bias_regularizer=decay,
            dtype=dtype,
            name=name,
        )(x)
    return MCDropoutModel(inputs, x, name="mc_dropout")
