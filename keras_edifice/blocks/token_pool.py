"""The tokens of an image's patches, as a map and summarised for the head."""

from keras import layers

from keras_edifice.blocks.global_pool import global_pool


def patch_map(tokens, side):
    """(b, prefix + side², c) -> (b, side, side, c), symbolic, from the last tokens."""
    patches = tokens[:, -(side**2) :] if tokens.shape[1] > side**2 else tokens
    return layers.Reshape((side, side, tokens.shape[-1]), name="map")(patches)


def token_pool(tokens, side, pool, num_classes):
    """(b, prefix + side², c) -> (b, c), symbolic; the map of the patches if None.

    Args:
        tokens: a symbolic tensor, the class token first.
        side: patches along a side of the image.
        pool: "cls" for the class token, "mean" or "max" of the patches, or None.
        num_classes: classes of the head that follows, or None.

    Raises:
        ValueError: there are classes and `pool` is None.
    """
    if pool == "cls":
        return tokens[:, 0]
    pooling = "avg" if pool == "mean" else pool
    return global_pool(patch_map(tokens, side), pooling, num_classes)
