"""TabNet: attentive interpretable learning on tables.

    a_0 = FT_0(x)[n_d:],    P_1 = 1,    x normalised over the batch
    M_s = sparsemax(P_s ⊙ norm(W_s a_{s-1})),     P_{s+1} = P_s ⊙ (γ - M_s)
    d_s, a_s = FT_s(M_s ⊙ x),                     decision = Σ_s relu(d_s)

Each step s looks at the few features that its mask M_s lets through. A feature
transformer FT is a chain of gated layers; the first kernels of the chain are shared by
all steps, the norms are not. `ops/special.py` has sparsemax.

With `pretraining_ratio` a decoder restores features that were hidden from the encoder:
Σ_s FT'_s(relu(d_s)), then a dense layer.
"""

from functools import partial
from typing import Annotated, Literal

import keras
import numpy as np
from keras import Input, layers, ops

from keras_edifice.blocks.composite import Composite
from keras_edifice.blocks.dense import Dense
from keras_edifice.blocks.heads import class_scores
from keras_edifice.model import EdificeModel
from keras_edifice.ops.special import entmax15, sparsemax
from keras_edifice.options import (
    Activation,
    Count,
    NonNegative,
    Positive,
    Range,
    Rate,
    Size,
)
from keras_edifice.registry import architecture

Relaxation = Annotated[float, Range(1.0)]


@keras.saving.register_keras_serializable("keras_edifice")
class RootFanIn(keras.initializers.Initializer):
    """Normal kernels of variance scale / √inputs.

    Glorot's 2 / (n_in + n_out) times the squared gain of the released code:
    (n_in + n_out) / √n_in before a gate (scale 2), half of it elsewhere (scale 1).
    """

    def __init__(self, scale):
        self.scale = scale

    def __call__(self, shape, dtype=None):
        deviation = (self.scale / shape[0] ** 0.5) ** 0.5
        return keras.initializers.RandomNormal(0.0, deviation)(shape, dtype)

    def get_config(self):
        return {"scale": self.scale}


def _dense(units, scale, name, **kwargs):
    return Dense(
        units,
        use_bias=False,
        kernel_initializer=RootFanIn(scale),
        name=name,
        **kwargs,
    )


@keras.saving.register_keras_serializable("keras_edifice")
class GhostBatchNorm(layers.Layer):
    """(batch, features) -> the same. In training each chunk has its own statistics.

    Hoffer et al. 2017, Train longer, generalize better, arXiv:1705.08741, algorithm 1:
    the moving statistics take in one chunk after the other. Computes in float32.

    Args:
        virtual_batch_size: rows of a chunk. A batch that it does not divide is one
            chunk, and so is every batch if it is None.
        momentum: of the moving statistics, for each chunk.
        epsilon: added to the variance.
    """

    def __init__(self, virtual_batch_size=None, momentum=0.98, epsilon=1e-5, **kwargs):
        super().__init__(**kwargs)
        self.virtual_batch_size = virtual_batch_size
        self.momentum, self.epsilon = momentum, epsilon

    def build(self, input_shape):
        features = (input_shape[-1],)
        self.gamma = self.add_weight(features, "ones", name="gamma")
        self.beta = self.add_weight(features, "zeros", name="beta")
        self.moving_mean = self.add_weight(
            features, "zeros", trainable=False, name="moving_mean"
        )
        self.moving_variance = self.add_weight(
            features, "ones", trainable=False, name="moving_variance"
        )

    def call(self, x, training=None):
        dtype, x = x.dtype, ops.cast(x, "float32")
        if training and self.trainable:  # a frozen layer infers, as in Keras
            features = x.shape[-1]
            chunks = ops.reshape(x, (self._num_chunks(x), -1, features))
            mean = ops.mean(chunks, axis=1, keepdims=True)  # (chunks, 1, features)
            variance = ops.mean(ops.square(chunks - mean), axis=1, keepdims=True)
            self._track(mean[:, 0], variance[:, 0])
            y = (chunks - mean) * ops.rsqrt(variance + self.epsilon)
            y = ops.reshape(y, (-1, features))
        else:
            scale = ops.rsqrt(ops.cast(self.moving_variance, "float32") + self.epsilon)
            y = (x - ops.cast(self.moving_mean, "float32")) * scale
        y = y * ops.cast(self.gamma, "float32") + ops.cast(self.beta, "float32")
        return ops.cast(y, dtype)

    def _num_chunks(self, x):
        rows, size = ops.shape(x)[0], self.virtual_batch_size
        if size is None:
            return 1
        if type(rows) is int:
            return rows // size if rows and rows % size == 0 else 1
        divides = ops.cast(ops.equal(rows % size, 0), rows.dtype)
        return 1 + divides * (rows // size - 1)

    def _track(self, mean, variance):
        """Moving <- momentum · moving + (1 - momentum) · new, chunk by chunk."""
        ones = ops.ones_like(mean[:, :1])
        later = ops.sum(ones) - ops.cumsum(ones, axis=0)  # chunks that still follow
        weights = (1.0 - self.momentum) * ops.power(self.momentum, later)
        moving = ((self.moving_mean, mean), (self.moving_variance, variance))
        for weight, new in moving:
            change = new - ops.cast(weight, "float32")
            weight.assign_add(ops.sum(weights * change, axis=0))

    def compute_output_shape(self, input_shape):
        return input_shape


@keras.saving.register_keras_serializable("keras_edifice")
class GhostGate(GhostBatchNorm):
    """(batch, 2 units) -> (batch, units): u ⊙ σ(v) of the normalised halves."""

    def call(self, x, training=None):
        u, v = ops.split(super().call(x, training), 2, axis=-1)
        return u * ops.sigmoid(v)

    def compute_output_shape(self, input_shape):
        return (*input_shape[:-1], input_shape[-1] // 2)


@keras.saving.register_keras_serializable("keras_edifice")
class AttentiveTransformer(Composite):
    """(batch, n_a), prior (batch, features) -> mask whose rows sum to one.

    Adds the loss -sparsity · Σ M log(M + ε), as a mean over the batch.

    Args:
        features: how many the mask chooses from.
        mask_type: "sparsemax" or "entmax15".
        sparsity: weight of the entropy.
        epsilon: inside the logarithm.
        virtual_batch_size: of the normalisation.
        momentum: of the normalisation.
    """

    def __init__(
        self,
        features,
        mask_type="sparsemax",
        sparsity=0.0,
        epsilon=1e-15,
        virtual_batch_size=None,
        momentum=0.98,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.features, self.mask_type = features, mask_type
        self.sparsity, self.epsilon = sparsity, epsilon
        self.virtual_batch_size, self.momentum = virtual_batch_size, momentum
        self.select = {"sparsemax": sparsemax, "entmax15": entmax15}[mask_type]
        self.dense = _dense(features, 1.0, "dense", dtype=self.dtype_policy)
        self.norm = GhostBatchNorm(
            virtual_batch_size, momentum, dtype=self.dtype_policy, name="norm"
        )

    def build(self, a_shape, prior_shape):
        self.dense.build(a_shape)
        self.norm.build(prior_shape)

    def call(self, a, prior, training=None):
        mask = self.select(prior * self.norm(self.dense(a), training=training))
        if self.sparsity:
            entropy = -ops.sum(mask * ops.log(mask + self.epsilon), axis=-1)
            self.add_loss(self.sparsity * ops.mean(entropy))
        return mask

    def compute_output_shape(self, a_shape, prior_shape):
        return prior_shape


@keras.saving.register_keras_serializable("keras_edifice")
class Spread(layers.Layer):
    """(batch, features) -> (batch, columns): a value for each column of a feature.

    Args:
        widths: columns of each feature.
        share: whether the columns divide the value of their feature.
    """

    def __init__(self, widths, share=False, **kwargs):
        super().__init__(**kwargs)
        self.widths, self.share = widths, share

    def call(self, x):
        parts = np.array(self.widths) if self.share else np.ones(len(self.widths))
        matrix = np.repeat(np.diag(1.0 / parts), self.widths, axis=1)
        return ops.matmul(x, ops.convert_to_tensor(matrix, dtype=x.dtype))

    def compute_output_shape(self, input_shape):
        return (*input_shape[:-1], sum(self.widths))


@keras.saving.register_keras_serializable("keras_edifice")
class HideFeatures(layers.Layer):
    """(batch, features) -> 1 where a feature is visible, 0 where it is hidden.

    In training each is hidden with probability `rate`, at inference none is.
    """

    def __init__(self, rate, seed=None, **kwargs):
        super().__init__(**kwargs)
        self.rate, self.seed = rate, seed
        self.seed_generator = keras.random.SeedGenerator(seed)

    def call(self, x, training=None):
        if not training:
            return ops.ones_like(x)
        noise = keras.random.uniform(ops.shape(x), seed=self.seed_generator)
        return ops.cast(noise >= self.rate, x.dtype)

    def compute_output_shape(self, input_shape):
        return input_shape


def _feature_transformer(x, shared, num_own, units, norm, name):
    """(batch, features) -> (batch, units): gated layers, each added to its input."""
    own = [_dense(2 * units, 2.0, f"{name}_dense_{i}") for i in range(num_own)]
    for i, dense in enumerate([*shared, *own]):
        gated = GhostGate(**norm, name=f"{name}_gate_{i}")(dense(x))
        x = gated if i == 0 else (x + gated) * 0.5**0.5  # keeps the variance
    return x


def _encoder(
    widths,
    categories,
    norm,
    transform,
    attend,
    num_steps,
    relaxation_factor,
    hidden_size,
):
    """Features, and which of them are visible -> decisions and masks of the steps."""
    inputs = [Input((len(widths),), name=n) for n in ("features", "visible")]
    features, prior = inputs  # what is hidden has no score in the first mask
    columns, visible = _embed(features, widths, categories), _spread(prior, widths)
    x = norm(columns * visible)
    _, a = ops.split(transform(x, name="initial"), [hidden_size], axis=-1)
    decisions, masks = [], []
    for s in range(num_steps):
        mask = attend(name=f"attention_{s}")(a, prior)
        prior = prior * (relaxation_factor - mask)
        seen = _spread(mask, widths, share=True) * x
        d, a = ops.split(transform(seen, name=f"step_{s}"), [hidden_size], axis=-1)
        decisions.append(ops.relu(d))
        masks.append(mask)
    outputs = dict(
        decisions=ops.stack(decisions, axis=1),  # (batch, steps, hidden_size)
        masks=ops.stack(masks, axis=1),  # (batch, steps, features)
        columns=columns,
        visible=visible,
    )
    return keras.Model(inputs, outputs, name="encoder")


def _embed(features, widths, categories):
    """Each category becomes an embedding, in the place of its column."""
    if not categories:
        return features
    parts, done = [], 0
    for i in sorted(categories):
        parts.append(features[:, done:i])
        embedding = layers.Embedding(
            categories[i],
            widths[i],
            embeddings_initializer=keras.initializers.RandomNormal(stddev=1.0),
            dtype="float32",
            name=f"embedding_{i}",
        )
        codes = ops.cast(features[:, i], "int32")
        parts.append(embedding(ops.clip(codes, 0, categories[i] - 1)))
        done = i + 1
    parts.append(features[:, done:])
    filled = [part for part in parts if part.shape[-1]]
    return ops.concatenate(filled, axis=-1)


def _spread(x, widths, share=False):
    """A value for each column; nothing to do where every feature is one column."""
    return Spread(widths, share, dtype="float32")(x) if max(widths) > 1 else x


def _importance(encoded):
    """(batch, features): Σ_s M_s · Σ relu(d_s), how much each feature decided."""
    size = ops.sum(encoded["decisions"], axis=-1, keepdims=True)  # (batch, steps, 1)
    return ops.sum(encoded["masks"] * size, axis=1)


def _pretraining(inputs, encoder, ratio, norm):
    """The encoder sees what is left of the features; the decoder restores them."""
    visible = HideFeatures(ratio, dtype="float32", name="hide")(inputs)
    encoded = encoder([inputs, visible])
    hidden_size = encoded["decisions"].shape[-1]
    shared = [_dense(2 * hidden_size, 2.0, "decoder_shared")]
    x = sum(
        _feature_transformer(
            encoded["decisions"][:, s], shared, 1, hidden_size, norm, f"decoder_{s}"
        )
        for s in range(encoded["decisions"].shape[1])
    )
    width = encoded["columns"].shape[-1]
    outputs = dict(
        reconstruction=_dense(width, 1.0, "reconstruction", dtype="float32")(x),
        features=encoded["columns"],
        visible=encoded["visible"],
    )
    return TabNetPretraining(inputs, outputs, name="tabnet")


def _widths(input_size, cat_idxs, cat_dims, cat_emb_dim):
    """Columns of each feature: one, or those of its embedding."""
    if isinstance(cat_emb_dim, int):
        cat_emb_dim = [cat_emb_dim] * len(cat_idxs)
    if not len(cat_idxs) == len(cat_dims) == len(cat_emb_dim):
        raise ValueError(
            "cat_idxs, cat_dims and cat_emb_dim must be of one length, received "
            f"{len(cat_idxs)}, {len(cat_dims)} and {len(cat_emb_dim)}"
        )
    if len(set(cat_idxs)) < len(cat_idxs) or max(cat_idxs, default=0) >= input_size:
        raise ValueError(
            f"cat_idxs must be different columns below input_size {input_size}, "
            f"received {cat_idxs}"
        )
    widths = dict(zip(cat_idxs, cat_emb_dim, strict=True))
    return [widths.get(i, 1) for i in range(input_size)]


def _check_conflicts(num_layers, pretraining_ratio, with_task):
    if not num_layers:
        raise ValueError(
            "num_shared and num_independent are both 0; at least one must be above 0"
        )
    if pretraining_ratio is not None and with_task:
        raise ValueError(
            "pretraining_ratio must be None with num_classes or return_masks, "
            f"received {pretraining_ratio}; build a second model for the task"
        )


@keras.saving.register_keras_serializable("keras_edifice")
class TabNetPretraining(EdificeModel):
    """Restores hidden features; `fit(x)` trains it, without targets.

    Outputs, (batch, columns) each: the `reconstruction`, the `features` that it should
    be, and what was `visible`. `get_layer("encoder")` has the weights to keep.
    """

    def compute_loss(
        self, x=None, y=None, y_pred=None, sample_weight=None, training=True
    ):
        """Squared error of the hidden columns, relative to the variance of each.

        The sum over a row, the mean over the batch: the objective of the paper. Nothing
        is hidden in `evaluate`, so there every column counts.
        """
        # Without the stop, an embedding could learn to be easy to predict.
        features = ops.stop_gradient(y_pred["features"])
        variance = ops.var(features, axis=0)
        # A constant column varies by rounding alone, and is taken as it is.
        rounding = 1e-10 * ops.mean(ops.square(features), axis=0)
        variance = ops.where(variance > rounding, variance, 1.0)
        errors = ops.square(y_pred["reconstruction"] - features) / variance
        if training:
            errors = errors * (1.0 - y_pred["visible"])
        errors = ops.sum(errors, axis=-1)
        if sample_weight is not None:
            errors = errors * ops.cast(sample_weight, errors.dtype)
        return ops.mean(errors)


@architecture(
    paper="Arik & Pfister 2019, TabNet: Attentive Interpretable Tabular Learning, "
    "arXiv:1908.07442",
    kind="vector",
    inputs="(batch, input_size)",
    outputs="(batch, num_classes | hidden_size)",
    tiny=dict(
        input_size=5,
        hidden_size=6,
        attention_size=4,
        num_steps=2,
        virtual_batch_size=4,
        bn_momentum=0.5,
    ),
)
def tabnet(
    *,
    input_size: Size,
    hidden_size: Size = 64,
    attention_size: Size | None = None,
    num_steps: Size = 3,
    relaxation_factor: Relaxation = 1.3,
    num_shared: Count = 2,
    num_independent: Count = 2,
    virtual_batch_size: Size | None = 128,
    bn_momentum: Rate = 0.98,
    lambda_sparse: NonNegative = 1e-3,
    mask_type: Literal["sparsemax", "entmax15"] = "sparsemax",
    epsilon: Positive = 1e-15,
    cat_idxs: list[Count] = [],
    cat_dims: list[Size] = [],
    cat_emb_dim: Size | list[Size] = 1,
    dropout: Rate = 0.0,
    return_masks: bool = False,
    pretraining_ratio: Rate | None = None,
    num_classes: Size | None = None,
    classifier_activation: Activation | None = "softmax",
) -> EdificeModel:
    """Decision steps that each look at a few features of a table.

    Args:
        input_size: columns of the table.
        hidden_size: width of the decisions, n_d in the paper.
        attention_size: width of what chooses the next features, n_a; None for n_d.
        num_steps: number of decision steps.
        relaxation_factor: γ; at 1 a feature that was used in full loses its score.
        num_shared: gated layers whose kernels all steps share.
        num_independent: gated layers of each step alone.
        virtual_batch_size: rows that are normalised together; None for the batch.
        bn_momentum: of the moving statistics.
        lambda_sparse: weight of the entropy of the masks, averaged over the steps.
        mask_type: what turns scores into a mask.
        epsilon: inside the logarithm of the entropy.
        cat_idxs: columns that hold categories, as whole numbers from 0; a number
            outside of its range counts as the nearest one.
        cat_dims: number of categories of each of these columns.
        cat_emb_dim: width of their embeddings, one for all or one for each.
        dropout: rate on the sum of the decisions, in training.
        return_masks: a dict of `outputs`, `masks` (batch, num_steps, input_size) and
            `importance` (batch, input_size).
        pretraining_ratio: part of the features that is hidden, for a model that learns
            to restore them; None for no pretraining.
        num_classes: classes of the head; None gives the sum of the decisions.
        classifier_activation: of the head; None gives logits.

    Raises:
        ValueError: the options of the categories do not match, there is no gated
            layer, or pretraining is asked for together with classes or masks.
    """
    widths = _widths(input_size, cat_idxs, cat_dims, cat_emb_dim)
    _check_conflicts(
        num_shared + num_independent,
        pretraining_ratio,
        num_classes is not None or return_masks,
    )
    norm = dict(virtual_batch_size=virtual_batch_size, momentum=bn_momentum)
    units = hidden_size + (attention_size or hidden_size)
    encoder = _encoder(
        widths,
        dict(zip(cat_idxs, cat_dims, strict=True)),
        GhostBatchNorm(momentum=bn_momentum, dtype="float32", name="norm"),
        transform=partial(
            _feature_transformer,
            shared=[_dense(2 * units, 2.0, f"shared_{i}") for i in range(num_shared)],
            num_own=num_independent,
            units=units,
            norm=norm,
        ),
        attend=partial(
            AttentiveTransformer,
            input_size,
            mask_type,
            0.0 if pretraining_ratio is not None else lambda_sparse / num_steps,
            epsilon,
            dtype="float32",  # masks and priors stay exact under mixed precision
            **norm,
        ),
        num_steps=num_steps,
        relaxation_factor=relaxation_factor,
        hidden_size=hidden_size,
    )
    inputs = Input((input_size,), name="inputs")
    if pretraining_ratio is not None:
        return _pretraining(inputs, encoder, pretraining_ratio, norm)
    encoded = encoder([inputs, ops.ones_like(inputs)])
    x = ops.sum(encoded["decisions"], axis=1)
    if dropout:
        x = layers.Dropout(dropout, name="dropout")(x)
    if num_classes is not None:
        head = dict(use_bias=False, kernel_initializer=RootFanIn(1.0))
        x = class_scores(x, num_classes, classifier_activation, **head)
    if return_masks:
        x = dict(outputs=x, masks=encoded["masks"], importance=_importance(encoded))
    return EdificeModel(inputs, x, name="tabnet")
