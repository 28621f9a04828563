"""MLP-Mixer: one MLP mixes the patches of an image, another the channels.

    U = X + [W_2 gelu(W_1 LN(X)ᵀ)]ᵀ        tokens, each channel alike
    Y = U + W_4 gelu(W_3 LN(U))            channels, each token alike   (eq. 1)

No positions are added: each patch has its own row of W_1.
"""

from typing import Literal

import keras
from keras import ops

from keras_edifice.blocks.channel_mlp import ChannelMLP
from keras_edifice.blocks.drop_path import drop_path_rates
from keras_edifice.blocks.global_pool import global_pool
from keras_edifice.blocks.heads import class_scores
from keras_edifice.blocks.images import image_input, stage_maps
from keras_edifice.blocks.layer_norm import LayerNorm
from keras_edifice.blocks.patch_embed import PatchEmbed
from keras_edifice.blocks.pre_norm import pre_norm_residual
from keras_edifice.blocks.token_pool import patch_map
from keras_edifice.model import EdificeModel
from keras_edifice.options import Activation, Rate, Size
from keras_edifice.registry import architecture


@keras.saving.register_keras_serializable("keras_edifice")
class TokenMLP(ChannelMLP):
    """(batch, tokens, features) -> the same. The MLP on the tokens of each channel.

    The number of tokens must be known; the channels share the weights. Arguments as
    `ChannelMLP`.
    """

    def build(self, input_shape):
        batch, tokens, features = input_shape
        super().build((batch, features, tokens))

    def call(self, x, training=False):
        y = super().call(ops.swapaxes(x, 1, 2), training=training)
        return ops.swapaxes(y, 1, 2)


def _size(embed_size, num_layers, patch_size):
    """The options of a published size, with ImageNet's classes."""
    return dict(
        embed_size=embed_size,
        num_layers=num_layers,
        patch_size=patch_size,
        token_mlp_dim=embed_size // 2,
        channel_mlp_dim=4 * embed_size,
        num_classes=1000,
    )


_VARIANTS = {  # table 1
    "s32": _size(512, 8, 32),
    "s16": _size(512, 8, 16),
    "b32": _size(768, 12, 32),
    "b16": _size(768, 12, 16),
    "l32": _size(1024, 24, 32),
    "l16": _size(1024, 24, 16),
    "h14": _size(1280, 32, 14),
}


@architecture(
    paper="Tolstikhin et al. 2021, MLP-Mixer: An all-MLP Architecture for Vision, "
    "arXiv:2105.01601",
    kind="image",
    inputs="(batch, image_size, image_size, num_channels)",
    outputs="(batch, num_classes | embed_size)",
    tiny=dict(
        image_size=6,
        patch_size=2,
        num_channels=2,
        embed_size=8,
        num_layers=2,
        token_mlp_dim=5,
        channel_mlp_dim=12,
        num_classes=3,
    ),
    multiples={"image_size": "patch_size"},
    variants=_VARIANTS,
)
def mlp_mixer(
    *,
    image_size: Size = 224,
    patch_size: Size = 16,
    num_channels: Size = 3,
    embed_size: Size = 512,
    num_layers: Size = 8,
    token_mlp_dim: Size = 256,
    channel_mlp_dim: Size = 2048,
    num_classes: Size | None = None,
    classifier_activation: Activation | None = "softmax",
    pooling: Literal["avg", "max"] | None = "avg",
    dropout: Rate = 0.0,
    drop_path: Rate = 0.0,
    features_only: bool = False,
) -> EdificeModel:
    """Layers of a token MLP and a channel MLP on patches, read out at their mean.

    Args:
        image_size: height and width of the image.
        patch_size: side of a patch.
        num_channels: channels of the image.
        embed_size: width of a token.
        num_layers: number of pairs of MLPs.
        token_mlp_dim: width of the token MLP's hidden layer.
        channel_mlp_dim: width of the channel MLP's hidden layer.
        num_classes: classes of the head, which starts at zero; None gives the
            features.
        classifier_activation: of the head; None gives logits.
        pooling: how the map of the tokens, (batch, rows, columns, embed_size), is
            summarised; None keeps it, without classes.
        dropout: rate after each branch and each MLP activation.
        drop_path: rate of dropped branches at the last layer, growing linearly.
        features_only: give the tokens as a map, {"stride_16": ...}, and no head.
    """
    inputs = image_input(image_size, num_channels)
    x = PatchEmbed(embed_size, patch_size, name="patches")(inputs)
    for i, rate in enumerate(drop_path_rates(drop_path, num_layers), 1):
        branches = [
            TokenMLP(token_mlp_dim, dropout, "lecun", name=f"block{i}_tokens"),
            ChannelMLP(channel_mlp_dim, dropout, "lecun", name=f"block{i}_channels"),
        ]
        for branch in branches:
            x = pre_norm_residual(x, branch, dropout=dropout, drop_path=rate)
    x = patch_map(LayerNorm(1e-6, name="norm")(x), image_size // patch_size)
    if features_only:
        return EdificeModel(inputs, stage_maps({patch_size: x}), name="mlp_mixer")
    x = global_pool(x, pooling, num_classes)
    if num_classes is not None:
        x = class_scores(
            x, num_classes, classifier_activation, kernel_initializer="zeros"
        )
    return EdificeModel(inputs, x, name="mlp_mixer")
