"""Vision Transformer: an image as a sequence of patches.

    z_0 = [class; E patch_1; ...; E patch_N] + positions            (eq. 1)
    z'  = z + MSA(LN(z)),    z = z' + MLP(LN(z'))                   (eq. 2, 3)
    y   = LN(z_L)[class]                                            (eq. 4)

The blocks of eq. 2 and 3 are in `blocks/encoder.py`.
"""

from typing import Literal

from keras import layers

from keras_edifice.blocks.class_token import ClassToken
from keras_edifice.blocks.dense import Dense
from keras_edifice.blocks.encoder import encoder
from keras_edifice.blocks.heads import class_scores
from keras_edifice.blocks.images import image_input, stage_maps
from keras_edifice.blocks.initializers import matrix_initializer
from keras_edifice.blocks.layer_norm import LayerNorm
from keras_edifice.blocks.patch_embed import PatchEmbed
from keras_edifice.blocks.position_table import PositionTable
from keras_edifice.blocks.token_pool import patch_map, token_pool
from keras_edifice.model import EdificeModel
from keras_edifice.options import Activation, Positive, Rate, Size
from keras_edifice.registry import architecture


def _size(embed_size, num_layers, num_heads, patch_size, image_size=224):
    """The options of a published size, with ImageNet's classes."""
    return {**locals(), "num_classes": 1000}


_VARIANTS = {  # table 1; Ti and S as Touvron et al. 2020 (arXiv:2012.12877) name them
    "ti16": _size(192, 12, 3, 16),
    "s32": _size(384, 12, 6, 32),
    "s16": _size(384, 12, 6, 16),
    "b32": _size(768, 12, 12, 32),
    "b16": _size(768, 12, 12, 16),
    "l32": _size(1024, 24, 16, 32),
    "l16": _size(1024, 24, 16, 16),
    "h14": _size(1280, 32, 16, 14),
    "b16_384": _size(768, 12, 12, 16, 384),
    "l16_384": _size(1024, 24, 16, 16, 384),
}


def _scores(features, num_classes, activation, initializer):
    """The head; with "xavier" it starts at zero, as in the authors' code."""
    start = "zeros" if initializer == "xavier" else matrix_initializer(initializer)
    return class_scores(features, num_classes, activation, kernel_initializer=start)


@architecture(
    paper="Dosovitskiy et al. 2020, An Image is Worth 16x16 Words: Transformers for "
    "Image Recognition at Scale, arXiv:2010.11929",
    kind="image",
    inputs="(batch, image_size, image_size, num_channels)",
    outputs="(batch, num_classes | representation_size | embed_size)",
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
    variants=_VARIANTS,
)
def vit(
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
    pool: Literal["cls", "mean", "max"] | None = "cls",
    pos_embed: Literal["learned", "sincos"] = "learned",
    qkv_bias: bool = True,
    representation_size: Size | None = None,
    initializer: Literal["xavier", "truncated"] = "xavier",
    dropout: Rate = 0.0,
    attention_dropout: Rate = 0.0,
    drop_path: Rate = 0.0,
    return_sequences: bool = False,
    features_only: bool = False,
) -> EdificeModel:
    """Pre-norm transformer encoder on patches, read out at a learned class token.

    Args:
        image_size: height and width of the image.
        patch_size: side of a patch.
        num_channels: channels of the image.
        embed_size: width of a token.
        num_layers: number of encoder blocks.
        num_heads: heads of the self-attention.
        mlp_ratio: width of the MLP's hidden layer, in token widths.
        num_classes: classes of the head; None gives the features.
        classifier_activation: of the head; None gives logits.
        pool: read out the class token, or the mean or the largest of the patches'
            tokens; `pooling="avg"` or "max" says the same. None gives their map,
            (batch, rows, columns, embed_size), without classes.
        pos_embed: a learned table of positions, or fixed sines and cosines.
        qkv_bias: whether queries, keys and values have biases.
        representation_size: width of a tanh layer before the head, as in the paper's
            pre-training; None for no such layer.
        initializer: of the matrices, "xavier" as the authors' code, whose head starts
            at zero, or "truncated" normal as Touvron et al. 2020.
        dropout: rate after the positions, each branch and each MLP activation.
        attention_dropout: rate on the attention weights.
        drop_path: rate of dropped branches at the last block, growing linearly.
        return_sequences: give all tokens after the last norm, and no head.
        features_only: give the patches' tokens as a map, {"stride_16": ...}, and no
            head.
    """
    inputs = image_input(image_size, num_channels)
    side = image_size // patch_size
    x = PatchEmbed(embed_size, patch_size, name="patches")(inputs)
    x = ClassToken(name="class_token")(x)
    x = PositionTable([side, side], learned=pos_embed == "learned", name="positions")(x)
    if dropout:
        x = layers.Dropout(dropout, name="positions_dropout")(x)
    x = encoder(
        x,
        num_layers,
        num_heads,
        mlp_ratio=mlp_ratio,
        qkv_bias=qkv_bias,
        initializer=initializer,
        dropout=dropout,
        attention_dropout=attention_dropout,
        drop_path=drop_path,
    )
    x = LayerNorm(1e-6, name="norm")(x)
    if features_only:
        x = stage_maps({patch_size: patch_map(x, side)})
    elif not return_sequences:
        x = token_pool(x, side, pool, num_classes)
        if representation_size is not None:
            x = Dense(representation_size, activation="tanh", name="pre_logits")(x)
        if num_classes is not None:
            x = _scores(x, num_classes, classifier_activation, initializer)
    return EdificeModel(inputs, x, name="vit")
