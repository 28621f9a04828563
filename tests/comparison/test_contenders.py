import numpy as np
import pytest

from keras_edifice.comparison.contenders import (
    COMPACT,
    DEFAULTS,
    ORIGINAL,
    contenders,
    fitting_options,
    parse_options,
    split_outside,
)
from keras_edifice.comparison.data import VIEWS, load_data
from keras_edifice.profiling import build_without_weights
from keras_edifice.registry import info, list_architectures

IMAGE_CLASSIFIERS = [
    name
    for name in list_architectures(kind="image")
    if "num_classes" in info(name).options
]


@pytest.fixture(scope="module")
def digits():
    return load_data("digits")


def test_text_is_split_outside_of_brackets_and_quotes():
    assert split_outside("a:b=[1,2],c:d='x,y'", ",") == ["a:b=[1,2]", "c:d='x,y'"]
    assert split_outside("a:b={'k': 1}:c=2", ":") == ["a", "b={'k': 1}", "c=2"]


def test_option_values_are_python_literals_or_text():
    texts = ["a=[8, 4]", "b=0.5", "c=None", "d=tanh", "e='x y'", "f=True", "g=x=y"]
    assert parse_options(texts) == {
        "a": [8, 4],
        "b": 0.5,
        "c": None,
        "d": "tanh",
        "e": "x y",
        "f": True,
        "g": "x=y",
    }


@pytest.mark.parametrize("text", ["dropout", "=3", "two words=3"])
def test_an_option_without_a_name_or_value_is_refused(text):
    with pytest.raises(ValueError, match="written option=value, received"):
        parse_options([text])


def test_contenders_come_as_text_list_or_mapping():
    text = contenders("mlp, mlp:hidden_sizes=[8,4]:dropout=0.5", "vector")
    assert [c.label for c in text] == ["mlp", "mlp:hidden_sizes=[8,4]:dropout=0.5"]
    assert text[1].options == {"hidden_sizes": [8, 4], "dropout": 0.5}
    assert contenders(["mlp", "mlp:hidden_sizes=[8,4]:dropout=0.5"], "vector") == text
    (mapped,) = contenders({"mlp": {"dropout": 0.5}}, "vector")
    assert (mapped.label, mapped.options) == ("mlp", {"dropout": 0.5})


def test_the_default_is_the_original_comparison():
    names = [c.name for c in contenders(None, "vector")]
    assert names == [
        "mlp",
        "tabnet",
        "bayesian",
        "mc_dropout",
        "ebm",
        "hopfield",
        "snn",
        "ann2snn",
    ]


@pytest.mark.parametrize("wrong", ["", " , ", []])
def test_nothing_to_compare_is_refused(wrong):
    with pytest.raises(ValueError, match="no architecture is named"):
        contenders(wrong, "vector")


def test_something_else_than_names_is_refused():
    with pytest.raises(TypeError, match="received int"):
        contenders(3, "vector")
    with pytest.raises(TypeError, match="must be a name, received 3"):
        contenders([3], "vector")


def test_the_given_options_win_over_the_defaults_of_the_comparison(digits):
    entry = info("mlp")
    assert fitting_options(entry, digits, {}) == {
        "hidden_sizes": [64, 32],
        "activation": "relu",
        "dropout": 0.0,
        "input_size": 64,
    }
    given = fitting_options(entry, digits, {"hidden_sizes": [8], "activation": "tanh"})
    assert (given["hidden_sizes"], given["activation"]) == ([8], "tanh")


def test_the_sizes_of_images_go_to_the_options_that_the_input_names(digits):
    vit = fitting_options(info("vit"), digits, {})
    assert (vit["image_size"], vit["num_channels"]) == (8, 1)
    resnet = fitting_options(info("resnet"), digits, {})
    assert (resnet["input_channels"], resnet["hidden_size"]) == (1, 16)


@pytest.mark.parametrize("name", IMAGE_CLASSIFIERS)
def test_an_image_classifier_fits_images_of_eight_pixels_and_is_small(digits, name):
    options = fitting_options(info(name), digits, {})
    model = build_without_weights(name, **{**options, "num_classes": 10})
    assert model.input_shape[-1] == 1
    assert model.output_shape == (None, 10)
    assert 10_000 < model.count_params() < 200_000


def test_every_size_of_the_comparison_is_an_option_of_its_architecture():
    for name, sizes in (*ORIGINAL.items(), *COMPACT.items()):
        assert set(sizes) <= set(info(name).options), name


def test_a_contender_can_be_given_one_of_its_sizes(digits):
    options = fitting_options(info("convnext"), digits, {"kernel_size": 5})
    assert (options["kernel_size"], options["depths"]) == (5, [1, 1])


def test_the_contenders_for_a_kind_of_data_can_take_it():
    for kind, names in DEFAULTS.items():
        assert {info(name).kind for name in names} <= set(VIEWS[kind])
    assert {"resnet", "convnext", "vit", "mlp_mixer"} < set(DEFAULTS["image"])


def test_a_published_size_is_not_made_smaller(digits):
    name, variant = next(
        (name, next(iter(info(name).variants)))
        for name in list_architectures(kind="image")
        if info(name).variants
    )
    options = fitting_options(info(name), digits, {"variant": variant})
    sizes = {"image_size", info(name).input_size_option}
    assert set(options) == {"variant", *(sizes & set(info(name).options))}


def test_images_that_are_not_square_are_refused():
    images = np.zeros((20, 4, 6, 1)), np.arange(20) % 2
    with pytest.raises(ValueError, match="vit takes square images, received 4x6"):
        fitting_options(info("vit"), load_data(images), {})
