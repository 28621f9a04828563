import keras
import pytest

from keras_edifice.blocks.images import image_input, stage_maps


def test_input_is_channels_last_and_may_be_open():
    assert image_input(8, 3).shape == (None, 8, 8, 3)
    assert image_input(None, 1).shape == (None, None, None, 1)


def test_channels_first_is_refused_in_one_line():
    keras.config.set_image_data_format("channels_first")
    try:
        with pytest.raises(ValueError, match="must be channels last") as caught:
            image_input(8, 3)
    finally:
        keras.config.set_image_data_format("channels_last")
    assert "\n" not in str(caught.value)


def test_maps_are_named_by_their_stride():
    assert stage_maps({4: "a", 8: "b"}) == {"stride_4": "a", "stride_8": "b"}
