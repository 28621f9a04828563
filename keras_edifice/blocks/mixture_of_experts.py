"""A gated feed-forward network of many experts, of which each token takes a few.

    p = softmax(W_r x),    E_e(x) = W_d,e (φ(W_g,e x) ⊙ W_u,e x)
    y = Σ_{e in the k largest of p} p_e E_e(x)

Shazeer et al. 2017, arXiv:1701.06538, with the gates of Fedus et al. 2021, Switch
Transformers, arXiv:2101.03961: they are the router's probabilities, which need not sum
to one. No token is dropped: every expert computes every token, so the result is exact
for any length, at num_experts / k times the work.
"""

import keras
from keras import initializers, ops

from keras_edifice.blocks.composite import Composite
from keras_edifice.blocks.dense import Dense
from keras_edifice.blocks.feed_forward import activation as activation_of
from keras_edifice.ops.routing import (
    expert_dense,
    expert_outputs,
    load_balance_loss,
    top_k_mask,
)


@keras.saving.register_keras_serializable("keras_edifice")
class MixtureOfExperts(Composite):
    """(batch, [time,] features) -> the same. Each position by itself.

    In training, the load-balancing loss of `ops.routing`, times `balance_weight`, is
    one of the model's losses. It leaves out the tokens that a mask hides. The softmax
    and the sum of the experts are computed in float32.

    Args:
        num_experts: networks.
        k: experts that each token takes.
        hidden_size: width of each expert; None for four times the features.
        activation: φ, a name of Keras or of `blocks.feed_forward`.
        normalize: whether the gates of a token are divided by their sum.
        balance_weight: factor of the loss; none at 0.
        stddev: of the normal distribution that the matrices start from.

    Raises:
        ValueError: k is not from 1 to `num_experts`.
    """

    per_step = True

    def __init__(
        self,
        num_experts,
        k=2,
        hidden_size=None,
        activation="silu",
        normalize=False,
        balance_weight=0.0,
        stddev=0.02,
        **kwargs,
    ):
        super().__init__(**kwargs)
        if not 1 <= k <= num_experts:
            raise ValueError(
                f"k must be from 1 to num_experts, received {k} and {num_experts}; "
                "change one of them"
            )
        self.num_experts, self.k, self.hidden_size = num_experts, k, hidden_size
        self.activation, self.normalize = activation, normalize
        self.balance_weight, self.stddev = balance_weight, stddev
        self.supports_masking = True

    def build(self, input_shape):
        features, experts = input_shape[-1], self.num_experts
        width = self.hidden_size or 4 * features
        self.router = Dense(
            experts,
            use_bias=False,
            kernel_initializer=self._start(),
            dtype=self.dtype_policy,
            name="router",
        )
        self.router.build((None, features))
        wide, narrow = (experts, features, width), (experts, width, features)
        self.gate = self.add_weight(wide, self._start(), name="gate")
        self.up = self.add_weight(wide, self._start(), name="up")
        self.down = self.add_weight(narrow, self._start(), name="down")

    def _start(self):
        return initializers.RandomNormal(stddev=self.stddev)

    def call(self, x, mask=None, training=False):
        if len(x.shape) == 2:
            return self.call(ops.expand_dims(x, 1), training=training)[:, 0]
        gates, chosen, probabilities = self.route(x)
        if training and self.balance_weight:
            loss = load_balance_loss(probabilities, chosen, mask)
            self.add_loss(self.balance_weight * loss)
        x = ops.expand_dims(x, 1)  # (b, 1, t, d): every expert gets every token
        hidden = activation_of(self.activation)(expert_dense(x, self.gate))
        y = expert_dense(hidden * expert_dense(x, self.up), self.down)
        return expert_outputs(y, gates, slots=None)

    def route(self, x):
        """The router's decision for (batch, time, features).

        Returns:
            Gates, marks of the chosen experts and probabilities, each (batch, time,
            num_experts) in float32; the gates of the others are zero.
        """
        p = ops.softmax(ops.cast(self.router(x), "float32"), axis=-1)
        chosen = top_k_mask(p, self.k)
        gates = p * chosen
        if self.normalize:
            gates = gates / ops.sum(gates, axis=-1, keepdims=True)
        return gates, chosen, p

    def compute_output_shape(self, input_shape):
        return input_shape
