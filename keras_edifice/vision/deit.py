"""Data-efficient Image Transformer: a Vision Transformer with a teacher.

    z_0 = [class; distillation; E patch_1; ...; E patch_N] + positions
    hard:  (1 - α) CE(z_class, y) + α CE(z_distillation, argmax z_teacher)  (eq. 3)
    soft:  (1 - α) CE(z_class, y)
           + α τ² KL(softmax(z_teacher / τ) ‖ softmax(z_distillation / τ))  (eq. 2)

The class token answers to the labels, the distillation token to the teacher, each with
a head of its own (section 4). Read `vit.py` first.
"""

from typing import Literal

import keras
from keras import layers, ops

from keras_edifice.blocks.class_token import ClassToken
from keras_edifice.blocks.encoder import encoder
from keras_edifice.blocks.heads import class_scores
from keras_edifice.blocks.images import image_input, stage_maps
from keras_edifice.blocks.initializers import matrix_initializer
from keras_edifice.blocks.layer_norm import LayerNorm
from keras_edifice.blocks.patch_embed import PatchEmbed
from keras_edifice.blocks.position_table import PositionTable
from keras_edifice.blocks.token_pool import patch_map, token_pool
from keras_edifice.model import EdificeModel
from keras_edifice.options import Activation, Fraction, Positive, Rate, Size
from keras_edifice.registry import architecture


@keras.saving.register_keras_serializable("keras_edifice")
class TeacherLogits(layers.Layer):
    """(batch, classes) -> the same, as logits that pass no gradient on.

    Args:
        from_logits: whether the inputs are logits; else they are probabilities.
    """

    def __init__(self, from_logits=False, **kwargs):
        super().__init__(**kwargs)
        self.from_logits = from_logits

    def call(self, scores):
        scores = ops.stop_gradient(scores)
        return scores if self.from_logits else ops.log(ops.maximum(scores, 1e-30))

    def compute_output_shape(self, input_shape):
        return input_shape


def cross_entropy(target, logits, label_smoothing=0.0):
    """Of each example: labels (b,) or probabilities (b, c), logits (b, c) -> (b,)."""
    num_classes = logits.shape[-1]
    if len(target.shape) < 2 or target.shape[-1] != num_classes:
        target = ops.one_hot(ops.reshape(target, (-1,)), num_classes)
    target = ops.cast(target, logits.dtype)
    target = target * (1.0 - label_smoothing) + label_smoothing / num_classes
    return -ops.sum(target * ops.log_softmax(logits, axis=-1), axis=-1)


def soft_distillation(teacher, student, temperature):
    """τ² KL(teacher ‖ student) at temperature τ: logits (b, c) twice -> (b,)."""
    logs = [ops.log_softmax(z / temperature, axis=-1) for z in (teacher, student)]
    terms = ops.exp(logs[0]) * (logs[0] - logs[1])
    return temperature**2 * ops.sum(terms, axis=-1)


@keras.saving.register_keras_serializable("keras_edifice")
class Distillation(EdificeModel):
    """A student and its teacher, trained by `compile(optimizer)` and `fit(x, y)`.

    Made by `DeiT.distill`. The labels y are integers, or probabilities of the classes.
    The log holds the means of the two terms of the loss as "classification" and
    "distillation".
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.classification_tracker = keras.metrics.Mean(name="classification")
        self.distillation_tracker = keras.metrics.Mean(name="distillation")

    def compute_loss(
        self, x=None, y=None, y_pred=None, sample_weight=None, training=True
    ):
        options, student = self.options, y_pred["dist"]
        teacher = ops.stop_gradient(y_pred["teacher"])
        by_label = cross_entropy(y, y_pred["cls"], options["label_smoothing"])
        if options["distillation"] == "hard":
            by_teacher = cross_entropy(ops.argmax(teacher, axis=-1), student)
        else:
            by_teacher = soft_distillation(teacher, student, options["temperature"])
        self.classification_tracker.update_state(by_label, sample_weight)
        self.distillation_tracker.update_state(by_teacher, sample_weight)
        alpha = options["alpha"]
        loss = (1.0 - alpha) * by_label + alpha * by_teacher
        if sample_weight is not None:
            loss = loss * ops.cast(sample_weight, "float32")
        return ops.mean(loss)


@keras.saving.register_keras_serializable("keras_edifice")
class DeiT(EdificeModel):
    """A classifier with two heads, which `distill` trains beside a teacher."""

    def distill(self, teacher: keras.Model, from_logits: bool = False) -> Distillation:
        """The model to fit: this one, its teacher and the objective between them.

        Fitting it trains this model, with which it shares the weights; metrics belong
        to this one. The teacher is frozen and runs as at inference.

        Args:
            teacher: a classifier of the same images.
            from_logits: whether the teacher gives logits; else it gives
                probabilities.

        Raises:
            ValueError: this model has no distillation head, or the teacher's classes
                are not those of the head.
        """
        if "teacher_predictions" not in {layer.name for layer in self.layers}:
            raise ValueError(
                "distill needs a model with two heads, received one without; build it "
                "with num_classes and distillation, for scores and not for features"
            )
        heads = {
            "cls": self.get_layer("predictions").output,
            "dist": self.get_layer("teacher_predictions").output,
        }
        scores = teacher(self.input, training=False)
        shape = getattr(scores, "shape", None)
        if shape != heads["dist"].shape:
            raise ValueError(
                f"the teacher must give {heads['dist'].shape[-1]} classes for each "
                f"image, received outputs of shape {shape}; set teacher_num_classes"
            )
        teacher.trainable = False
        logits = TeacherLogits(from_logits, dtype="float32", name="teacher_logits")
        outputs = {**heads, "teacher": logits(scores)}
        model = Distillation(self.input, outputs, name="distillation")
        return model.describe(self.architecture, self.options)


def _heads(summary, teacher_token, num_classes, teacher_num_classes, activation):
    """Scores of the summary, or of both: their mean, or each by itself."""

    def head(token, classes, name):
        start = matrix_initializer("truncated")
        return class_scores(token, classes, None, kernel_initializer=start, name=name)

    def activated(logits, name):
        return layers.Activation(activation, dtype="float32", name=name)(logits)

    if teacher_num_classes is not None and teacher_token is None:
        raise ValueError(
            "teacher_num_classes needs distillation 'hard' or 'soft', received None; "
            "set one or leave the other out"
        )
    by_label = head(summary, num_classes, "predictions")
    if teacher_token is None:
        return activated(by_label, "scores")
    classes = teacher_num_classes or num_classes
    by_teacher = head(teacher_token, classes, "teacher_predictions")
    if teacher_num_classes is not None:
        return {
            "cls": activated(by_label, "scores"),
            "dist": activated(by_teacher, "teacher_scores"),
        }
    mean = layers.Average(dtype="float32", name="mean")([by_label, by_teacher])
    return activated(mean, "scores")


def _size(embed_size, num_heads, image_size=224):
    """The options of a published size, with ImageNet's classes."""
    return {**locals(), "drop_path": 0.1, "num_classes": 1000}


@architecture(
    paper="Touvron et al. 2020, Training data-efficient image transformers & "
    "distillation through attention, arXiv:2012.12877",
    kind="image",
    inputs="(batch, image_size, image_size, num_channels)",
    outputs="(batch, num_classes | embed_size)",
    tiny=dict(
        image_size=6,
        patch_size=2,
        num_channels=2,
        embed_size=8,
        num_layers=2,
        num_heads=2,
        num_classes=3,
    ),
    multiples={"image_size": "patch_size", "embed_size": "num_heads"},
    variants={  # table 1; one without distillation has distillation=None beside it
        "ti16": _size(192, 3),
        "s16": _size(384, 6),
        "b16": _size(768, 12),
        "b16_384": _size(768, 12, 384),
    },
)
def deit(
    *,
    image_size: Size = 224,
    patch_size: Size = 16,
    num_channels: Size = 3,
    embed_size: Size = 768,
    num_layers: Size = 12,
    num_heads: Size = 12,
    mlp_ratio: Positive = 4.0,
    num_classes: Size | None = None,
    classifier_activation: Activation | None = "softmax",
    distillation: Literal["hard", "soft"] | None = "hard",
    teacher_num_classes: Size | None = None,
    alpha: Fraction = 0.5,
    temperature: Positive = 1.0,
    label_smoothing: Fraction = 0.1,
    pool: Literal["cls", "mean", "max"] | None = "cls",
    pos_embed: Literal["learned", "sincos"] = "learned",
    qkv_bias: bool = True,
    dropout: Rate = 0.0,
    attention_dropout: Rate = 0.0,
    drop_path: Rate = 0.0,
    return_sequences: bool = False,
    features_only: bool = False,
) -> DeiT:
    """Vision Transformer with a token and a head for the answers of a teacher.

    The scores are those of the mean of both heads' logits, as in the authors' code.
    `model.distill(teacher)` gives the model to fit, which trains this one; or fit this
    one as any classifier.

    Args:
        image_size: height and width of the image.
        patch_size: side of a patch.
        num_channels: channels of the image.
        embed_size: width of a token.
        num_layers: number of encoder blocks.
        num_heads: heads of the self-attention.
        mlp_ratio: width of the MLP's hidden layer, in token widths.
        num_classes: classes of the heads; None gives the features.
        classifier_activation: of the scores; None gives logits.
        distillation: learn the teacher's class ("hard") or its probabilities ("soft");
            None for no distillation token.
        teacher_num_classes: classes of the teacher, if they are others; the outputs
            are then {"cls": scores, "dist": scores} of the two heads.
        alpha: weight of the teacher in the loss of `distill`; the paper has 0.5 for
            hard and 0.1 for soft distillation.
        temperature: τ of soft distillation; the paper has 3.
        label_smoothing: of the labels in the loss of `distill`, not of the teacher's.
        pool: what answers to the labels, the class token, or the mean or the largest of
            the patches' tokens; `pooling="avg"` or "max" says the same. None gives
            their map, (batch, rows, columns, embed_size), without classes.
        pos_embed: a learned table of positions, or fixed sines and cosines.
        qkv_bias: whether queries, keys and values have biases.
        dropout: rate after the positions, each branch and each MLP activation.
        attention_dropout: rate on the attention weights.
        drop_path: rate of dropped branches at the last block, growing linearly.
        return_sequences: give all tokens after the last norm, and no head.
        features_only: give the patches' tokens as a map, {"stride_16": ...}, and no
            head.
    """
    inputs = image_input(image_size, num_channels)
    side, distilled = image_size // patch_size, distillation is not None
    x = PatchEmbed(embed_size, patch_size, initializer="truncated", name="patches")(
        inputs
    )
    if distilled:
        x = ClassToken(stddev=0.02, name="distillation_token")(x)
    x = ClassToken(stddev=0.02, name="class_token")(x)
    prefix, learned = 1 + distilled, pos_embed == "learned"
    x = PositionTable([side, side], prefix, learned, name="positions")(x)
    if dropout:
        x = layers.Dropout(dropout, name="positions_dropout")(x)
    x = encoder(
        x,
        num_layers,
        num_heads,
        mlp_ratio=mlp_ratio,
        qkv_bias=qkv_bias,
        initializer="truncated",
        dropout=dropout,
        attention_dropout=attention_dropout,
        drop_path=drop_path,
    )
    x = LayerNorm(1e-6, name="norm")(x)
    if features_only:
        x = stage_maps({patch_size: patch_map(x, side)})
    elif not return_sequences:
        teacher_token = x[:, 1] if distilled else None
        x = token_pool(x, side, pool, num_classes)
        if num_classes is not None:
            numbers = num_classes, teacher_num_classes
            x = _heads(x, teacher_token, *numbers, classifier_activation)
    return DeiT(inputs, x, name="deit")
