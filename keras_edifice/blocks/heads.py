"""The head of a classifier."""

from keras_edifice.blocks.dense import Dense


def class_scores(
    features,
    num_classes,
    activation="softmax",
    use_bias=True,
    kernel_initializer="glorot_uniform",
    name="predictions",
):
    """(batch, ..., features) -> (batch, ..., num_classes), in float32.

    The scores stay float32 under mixed precision, where half precision costs accuracy.
    """
    return Dense(
        num_classes,
        activation=activation,
        use_bias=use_bias,
        kernel_initializer=kernel_initializer,
        dtype="float32",
        name=name,
    )(features)
