"""The last feature map of an image classifier, summarised for the head."""

from keras import layers

_POOLS = {"avg": layers.GlobalAveragePooling2D, "max": layers.GlobalMaxPooling2D}


def global_pool(x, pooling, num_classes):
    """(b, h, w, c) -> (b, c), symbolic; the map itself if `pooling` is None.

    Args:
        x: a symbolic tensor.
        pooling: "avg", "max" or None.
        num_classes: classes of the head that follows, or None.

    Raises:
        ValueError: there are classes and no pooling.
    """
    if pooling is not None:
        return _POOLS[pooling](name="pool")(x)
    if num_classes is not None:
        raise ValueError(
            "pooling must be 'avg' or 'max' when there are classes, received None; "
            "give num_classes=None for the last map"
        )
    return x
