"""The transformer encoder of images: attention and MLP, block after block.

    z' = z + MSA(LN(z)),    z = z' + MLP(LN(z'))

Dosovitskiy et al. 2020, arXiv:2010.11929, eq. 2 and 3.
"""

from keras_edifice.blocks.channel_mlp import ChannelMLP
from keras_edifice.blocks.drop_path import drop_path_rates
from keras_edifice.blocks.pre_norm import pre_norm_residual
from keras_edifice.blocks.self_attention import SelfAttention


def encoder(
    x,
    num_layers,
    num_heads,
    *,
    mlp_ratio=4.0,
    qkv_bias=True,
    initializer="xavier",
    dropout=0.0,
    attention_dropout=0.0,
    drop_path=0.0,
    epsilon=1e-6,
    name="block",
):
    """(batch, tokens, features) -> the same, symbolic. No norm after the last block.

    Args:
        x: a symbolic tensor.
        num_layers: number of blocks.
        num_heads: heads of the attention.
        mlp_ratio: width of the MLP's hidden layer, in features.
        qkv_bias: whether queries, keys and values have biases.
        initializer: "xavier" or "truncated", of the matrices.
        dropout: rate after each branch and each MLP activation.
        attention_dropout: rate on the attention weights.
        drop_path: rate of dropped branches at the last block, growing linearly.
        epsilon: of the normalisations.
        name: prefix of the layers' names.
    """
    mlp_size = int(mlp_ratio * x.shape[-1])
    for i, rate in enumerate(drop_path_rates(drop_path, num_layers), 1):
        attention = SelfAttention(
            num_heads,
            qkv_bias,
            attention_dropout,
            initializer,
            name=f"{name}{i}_attention",
        )
        mlp = ChannelMLP(mlp_size, dropout, initializer, name=f"{name}{i}_mlp")
        for branch in (attention, mlp):
            x = pre_norm_residual(
                x, branch, epsilon=epsilon, dropout=dropout, drop_path=rate
            )
    return x
