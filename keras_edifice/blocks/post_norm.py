"""The residual block of the first transformer: mix, add, normalise."""

from keras import layers

from keras_edifice.blocks.layer_norm import LayerNorm


def post_norm_residual(x, branch, norm=LayerNorm, epsilon=1e-5, dropout=0.0):
    """Gives norm(x + dropout(branch(x))), symbolic. Named after the branch.

    Args:
        x: a symbolic tensor.
        branch: a layer that keeps the shape.
        norm: class of the normalisation, whose first argument is its epsilon.
        epsilon: of the normalisation.
        dropout: rate on the branch's output.
    """
    y = branch(x)
    if dropout:
        y = layers.Dropout(dropout, name=f"{branch.name}_dropout")(y)
    y = layers.Add(name=f"{branch.name}_add")([x, y])
    return norm(epsilon, name=f"{branch.name}_norm")(y)
