"""The residual block of image transformers and their kin: normalise, mix, add."""

from keras import layers

from keras_edifice.blocks.drop_path import DropPath
from keras_edifice.blocks.layer_norm import LayerNorm
from keras_edifice.blocks.layer_scale import LayerScale


def pre_norm_residual(
    x,
    branch,
    *,
    epsilon=1e-6,
    norm=None,
    dropout=0.0,
    layer_scale=None,
    drop_path=0.0,
):
    """Gives x + branch(LN(x)), symbolic; names of layers begin with the branch's.

    Args:
        x: a symbolic tensor.
        branch: a layer that keeps the shape.
        epsilon: of the normalisation.
        norm: a layer instead of the normalisation over the channels.
        dropout: rate on the branch's output.
        layer_scale: the factor of each channel of the branch at the start; None for
            no factor.
        drop_path: probability that an example's branch is dropped.
    """
    norm = norm or LayerNorm(epsilon, name=f"{branch.name}_norm")
    y = branch(norm(x))
    if dropout:
        y = layers.Dropout(dropout, name=f"{branch.name}_dropout")(y)
    if layer_scale is not None:
        y = LayerScale(layer_scale, name=f"{branch.name}_scale")(y)
    if drop_path:
        y = DropPath(drop_path, name=f"{branch.name}_drop_path")(y)
    return layers.Add(name=f"{branch.name}_add")([x, y])
