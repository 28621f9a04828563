import subprocess
import sys
import textwrap

import keras
import numpy as np
import pytest

import keras_edifice
from keras_edifice.registry import (
    _architectures,
    architecture,
    with_defaults,
    with_head,
)


@pytest.fixture
def registered():
    """Removes what a test registers."""
    before = dict(_architectures)
    yield
    _architectures.clear()
    _architectures.update(before)


def declare(**changes):
    def sample_net(*, input_size: int, hidden_size: int = 4) -> keras.Model:
        """Does little.

        Args:
            input_size: features of each example.
            hidden_size: width of the one layer.
        """
        inputs = keras.Input((input_size,), name="inputs")
        return keras_edifice.EdificeModel(
            inputs, keras.layers.Dense(hidden_size)(inputs)
        )

    arguments = dict(
        paper="Nobody 2000, Nothing",
        kind="vector",
        inputs="(batch, input_size)",
        outputs="(batch, hidden_size)",
        tiny=dict(input_size=2),
        family="feedforward",
    )
    return architecture(**{**arguments, **changes})(sample_net)


def test_listing_is_by_family_pattern_and_facet():
    everything = keras_edifice.list_architectures()
    assert "mlp" in everything
    assert len(set(everything)) == len(everything)
    by_family = [
        name
        for family in keras_edifice.list_families()
        for name in keras_edifice.list_architectures(family)
    ]
    assert by_family == everything
    assert keras_edifice.list_architectures(pattern="ml?") == ["mlp"]
    assert keras_edifice.list_architectures(pattern="*lp") == ["mlp"]
    causal = keras_edifice.list_architectures(causal=True)
    assert causal == [n for n in everything if keras_edifice.info(n).causal]
    images = keras_edifice.list_architectures(kind="image")
    assert all(keras_edifice.info(n).kind == "image" for n in images)


def test_listing_refuses_what_it_does_not_know():
    with pytest.raises(ValueError, match="unknown family 'nothing'; the families are"):
        keras_edifice.list_architectures("nothing")
    with pytest.raises(TypeError, match="unknown facet 'colour'; facets are"):
        keras_edifice.list_architectures(colour="red")


def test_search_takes_all_words_in_any_text():
    assert keras_edifice.search("rumelhart 1986") == ["mlp"]
    assert keras_edifice.search("Multi-layer PERCEPTRON") == ["mlp"]
    assert keras_edifice.search("no such words anywhere") == []


@pytest.mark.parametrize("name", keras_edifice.list_architectures())
def test_info_is_complete(name):
    entry = keras_edifice.info(name)
    assert entry.family in keras_edifice.list_families()
    assert entry.title and entry.summary.endswith(".")
    assert any(character.isdigit() for character in entry.paper), "no year in paper"
    assert entry.input_size_option in entry.options
    for option in entry.options.values():
        assert option.meaning, option.name
        assert option.type
    text, html = str(entry), entry._repr_html_()
    for word in (name, entry.title, *entry.options, *entry.variants):
        assert word in text
    assert html.count("<tr>") == len(entry.options) + 1


@pytest.mark.parametrize("name", keras_edifice.list_architectures())
def test_defaults_pass_their_own_check(name):
    for option in keras_edifice.info(name).options.values():
        if not option.required:
            assert option.check(option.default) == option.default


@pytest.mark.parametrize("name", keras_edifice.list_architectures())
def test_classifier_gives_probabilities_or_says_why_not(name):
    entry = keras_edifice.info(name)
    options = {k: v for k, v in entry.tiny.items() if k != "num_classes"}
    if len(entry.outputs) > 1:
        with pytest.raises(
            ValueError, match=f"{name} cannot be a classifier: it gives"
        ):
            with_head(name, 3, options)
        return
    model = with_head(name, 3, options)
    assert model.output_shape[-1] == 3
    assert model.architecture == name
    x = keras_edifice.samples.sample_inputs(model, 4)
    probabilities = model.predict(x, verbose=0)
    np.testing.assert_allclose(probabilities.sum(-1), 1.0, rtol=1e-5)


def test_classifier_refuses_a_wrong_number_of_classes():
    with pytest.raises(ValueError, match="num_classes must be >= 1, received 0"):
        keras_edifice.classifier("mlp", 0, input_size=2)
    with pytest.raises(TypeError, match="num_classes must be int, received str"):
        keras_edifice.classifier("mlp", "3", input_size=2)


def test_include_top_is_a_word_for_the_number_of_classes():
    headless = keras_edifice.info("resnet").resolve
    assert headless(dict(include_top=False)) == headless(dict(num_classes=None))
    assert headless(dict(include_top=True)) == headless({})
    published = dict(variant="imagenet18")
    assert headless({**published, "include_top": False})["num_classes"] is None
    assert headless({**published, "include_top": True})["num_classes"] == 1000
    with pytest.raises(ValueError, match="include_top=False has no classes, but"):
        headless(dict(include_top=False, num_classes=3))
    with pytest.raises(ValueError, match="include_top=True needs num_classes"):
        headless(dict(include_top=True, num_classes=None))
    with pytest.raises(TypeError, match="include_top must be bool, received int 0"):
        headless(dict(include_top=0))
    with pytest.raises(TypeError, match="vae has no option 'include_top'"):
        keras_edifice.build("vae", include_top=False)


def test_pooling_is_another_word_for_pool_of_classifiers():
    given = keras_edifice.info("vit").resolve
    assert given(dict(pooling="avg")) == given(dict(pool="mean"))
    assert given(dict(pooling="max")) == given(dict(pool="max"))
    assert given(dict(pooling=None)) == given(dict(pool=None))
    with pytest.raises(ValueError, match="say the same, received pool='cls' and"):
        given(dict(pool="cls", pooling="avg"))
    with pytest.raises(ValueError, match="pool must be one of 'cls'"):
        given(dict(pooling="min"))
    with pytest.raises(TypeError, match="lstm has no option 'pooling'"):
        keras_edifice.build("lstm", embed_size=2, pooling="avg")


IMAGE_CLASSIFIERS = [
    name
    for name in keras_edifice.list_architectures()
    if keras_edifice.info(name).kind == "image"
    and "num_classes" in keras_edifice.info(name).options
]


@pytest.mark.parametrize("name", IMAGE_CLASSIFIERS)
def test_image_classifiers_have_the_words_of_keras_applications(name):
    entry = keras_edifice.info(name)
    assert entry.resolve(dict(include_top=False))["num_classes"] is None
    if name != "conv2d":  # there it is the learning path's word for 2x2 pixels
        tiny = {**entry.tiny, "num_classes": None}
        shapes = [
            keras_edifice.build(name, **{**tiny, "pooling": pooling}).output_shape
            for pooling in ("avg", "max", None)
        ]
        assert [len(shape) for shape in shapes] == [2, 2, 4]
    assert entry.options["classifier_activation"].default == "softmax"
    assert {"dropout", "features_only"} <= entry.options.keys()
    assert ("drop_path" in entry.options) == (name != "conv2d")  # it has no branches


def test_one_declaration_is_enough(registered):
    declare()
    assert "sample_net" in keras_edifice.list_architectures("feedforward")
    assert keras_edifice.build("sample_net", input_size=3).output_shape == (None, 4)
    assert keras_edifice.info("sample_net").options["hidden_size"].default == 4


def test_declaration_must_agree_with_the_builder(registered):
    with pytest.raises(ValueError, match="declares 'depth', which is not an option"):
        declare(tiny=dict(input_size=2, depth=1))
    with pytest.raises(ValueError, match="kind must be one of"):
        declare(kind="video")


def test_another_name_has_other_defaults_and_a_title_of_its_own(registered):
    wide = with_defaults(declare(), "wide_net", "Does more.", hidden_size=6)
    architecture(
        paper="Nobody 2001, Nothing more",
        title="A wide net",
        kind="vector",
        inputs="(batch, input_size)",
        outputs="(batch, hidden_size)",
        tiny=dict(input_size=2),
        family="feedforward",
    )(wide)
    entry = keras_edifice.info("wide_net")
    assert (entry.title, entry.summary) == ("A wide net", "Does more.")
    assert entry.options["hidden_size"].meaning == "width of the one layer"
    model = keras_edifice.build("wide_net", input_size=3)
    assert (model.name, model.output_shape) == ("wide_net", (None, 6))
    assert keras_edifice.build(
        "wide_net", input_size=3, hidden_size=2
    ).output.shape == (
        None,
        2,
    )
    assert keras_edifice.build("sample_net", input_size=3).output_shape == (None, 4)


def test_a_taken_name_is_refused(registered):
    def mlp(*, input_size: int):
        """Another one.

        Args:
            input_size: features.
        """

    with pytest.raises(ValueError, match="the name 'mlp' is taken by keras_edifice"):
        architecture(
            paper="Nobody 2000",
            kind="vector",
            inputs="(batch, input_size)",
            outputs="(batch, input_size)",
            tiny=dict(input_size=2),
        )(mlp)


def test_variants_fill_options_and_explicit_ones_win(registered):
    declare(variants={"wide": dict(input_size=5, hidden_size=9)})
    wide = keras_edifice.build("sample_net", variant="wide")
    assert (wide.input_shape, wide.output_shape) == ((None, 5), (None, 9))
    mine = keras_edifice.build("sample_net", variant="wide", hidden_size=2)
    assert mine.output_shape == (None, 2)
    with pytest.raises(ValueError, match="variant must be one of 'wide'"):
        keras_edifice.build("sample_net", variant="wider")


def test_shapes_are_evaluated_in_terms_of_the_options():
    entry = keras_edifice.info("mlp")
    options = dict(a=3, b=None, c=[4, 5])
    spec = "(batch, b | a, c[-1], a * 2 + 1, a - 1, 7 // a)"
    assert entry.shape(spec, options) == (None, 3, 5, 7, 2, 2)
    with pytest.raises(ValueError, match="a shape cannot hold"):
        entry.shape("(batch, print(1))", options)


def test_packages_of_others_register_by_entry_point(tmp_path):
    package = tmp_path / "other_package"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "nets.py").write_text(
        textwrap.dedent(
            '''
            """Other net: from elsewhere."""
            import keras
            from keras_edifice import EdificeModel, architecture

            @architecture(
                paper="Other 2020", kind="vector", inputs="(batch, input_size)",
                outputs="(batch, input_size)", tiny=dict(input_size=2), family="other",
            )
            def other_net(*, input_size: int) -> keras.Model:
                """Leaves its input as it is.

                Args:
                    input_size: features.
                """
                x = keras.Input((input_size,), name="inputs")
                return EdificeModel(x, keras.layers.Identity()(x))
            '''
        )
    )
    metadata = tmp_path / "other_package-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Name: other-package\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(
        "[keras_edifice.architectures]\n"
        "nets = other_package.nets\n"
        "broken = other_package.missing\n"
    )
    code = (
        "import warnings; warnings.simplefilter('error', DeprecationWarning)\n"
        "import keras_edifice as k\n"
        "print(k.list_architectures('other'), k.build('other_net', input_size=3).name)"
    )
    done = run_python(code, PYTHONPATH=f"{tmp_path}:.")
    assert done.returncode == 0, done.stderr
    assert "['other_net']" in done.stdout
    assert (
        "the architectures of other_package.missing could not be loaded" in done.stderr
    )


def run_python(code, **environment):
    import os

    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


def test_missing_backend_is_one_line_with_the_install_command():
    code = (
        "import sys, importlib.util as u\n"
        "find = u.find_spec\n"
        "hidden = ('jax', 'torch', 'tensorflow')\n"
        "u.find_spec = lambda n, *a: None if n in hidden else find(n, *a)\n"
        "import keras_edifice\n"
        "assert 'keras' not in sys.modules\n"
        "try:\n"
        "    keras_edifice.build\n"
        "except ImportError as error:\n"
        "    print(error)\n"
    )
    none = run_python(code, KERAS_BACKEND="")
    assert none.stdout.count("\n") == 1, none.stderr
    assert 'found none; run: pip install "keras_edifice[jax]"' in none.stdout
    chosen = run_python(code, KERAS_BACKEND="torch")
    assert "KERAS_BACKEND is 'torch', but" in chosen.stdout, chosen.stderr
    assert 'pip install "keras_edifice[torch]"' in chosen.stdout


def test_activation_of_a_classifier_is_that_of_its_head():
    logits = keras_edifice.classifier("mlp", 3, activation=None, input_size=2)
    assert logits.options["classifier_activation"] is None
    assert logits.options["activation"] == "relu"
    options = dict(input_size=2, activation="tanh")
    both = with_head("mlp", 3, options, activation="sigmoid")
    assert both.options["activation"] == "tanh"
    assert both.options["classifier_activation"] == "sigmoid"
