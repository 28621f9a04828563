"""Image inputs, and the names of their feature maps."""

import keras


def image_input(image_size, channels):
    """The input (batch, image_size, image_size, channels); None leaves the size open.

    Raises:
        ValueError: Keras is set to channels first.
    """
    if keras.config.image_data_format() != "channels_last":
        raise ValueError(
            "images must be channels last, but Keras is set to channels_first; call "
            "keras.config.set_image_data_format('channels_last') before building"
        )
    return keras.Input((image_size, image_size, channels), name="inputs")


def stage_maps(maps):
    """{stride: feature map} -> {"stride_4": map, ...}, the outputs by name."""
    return {f"stride_{stride}": x for stride, x in maps.items()}
