"""Bad input: each kind of it, for every registered architecture, is one clear line."""

import typing

import keras
import numpy as np
import pytest

import keras_edifice
from keras_edifice.options import _SYNONYMS, Range, _members, _parts
from keras_edifice.samples import sample_inputs

NAMES = keras_edifice.list_architectures()
OPTIONS = [(n, o) for n in NAMES for o in keras_edifice.info(n).options.values()]


def refused(error, name, *words, **options):
    """`build` of the smallest example with other options must be one clear line."""
    tiny = keras_edifice.info(name).tiny
    with pytest.raises(error) as caught:
        keras_edifice.build(name, **{**tiny, **options})
    assert_one_line(caught.value, *words)


def assert_one_line(error, *words):
    text = str(error)
    assert "\n" not in text
    for word in words:
        assert word in text, f"{word!r} is not in: {text}"


def below_range(annotation):
    """A value of the type just outside of its range, or None."""
    for member in _members(annotation):
        plain, metadata = _parts(member)
        if typing.get_origin(plain) is list:
            inner = below_range(typing.get_args(plain)[0])
            return None if inner is None else [inner]
        for rule in metadata:
            if isinstance(rule, Range):
                return plain(rule.low - (0 if rule.open_low else 1))
    return None


def choices(annotation):
    for member in _members(annotation):
        plain, _ = _parts(member)
        if typing.get_origin(plain) is typing.Literal:
            return typing.get_args(plain)
    return ()


@pytest.mark.parametrize("name", NAMES)
def test_unknown_option_names_the_valid_ones(name):
    entry = keras_edifice.info(name)
    refused(TypeError, name, "no_such_thing", *entry.options, no_such_thing=1)


@pytest.mark.parametrize("name", NAMES)
def test_known_synonym_names_the_right_word(name):
    entry, tried = keras_edifice.info(name), 0
    for group in (line.split() for line in _SYNONYMS):
        right = [word for word in group if word in entry.options]
        others = set(group) - set(entry.options) - set(entry.other_words)
        for other in others if len(right) == 1 else ():
            near = [
                o
                for g in _SYNONYMS
                if other in g.split()
                for o in g.split()
                if o in entry.options
            ]  # a word may stand for two things; the message then names the first
            refused(
                TypeError,
                name,
                f"use {next(o for o in entry.options if o in near)!r}",
                **{other: 1},
            )
            tried += 1
    assert tried


def needs_its_width(name):
    entry = keras_edifice.info(name)
    return entry.options[entry.input_size_option].required


@pytest.mark.parametrize("name", filter(needs_its_width, NAMES))
def test_missing_option_is_named(name):
    width = keras_edifice.info(name).input_size_option
    tiny = dict(keras_edifice.info(name).tiny)
    del tiny[width]
    with pytest.raises(TypeError) as caught:
        keras_edifice.build(name, **tiny)
    assert_one_line(caught.value, name, width)


@pytest.mark.parametrize(
    ("name", "option"), OPTIONS, ids=[f"{n}-{o.name}" for n, o in OPTIONS]
)
def test_wrong_type_is_refused(name, option):
    refused(TypeError, name, option.name, "must be", **{option.name: object()})


RANGED = [(n, o) for n, o in OPTIONS if below_range(o.annotation) is not None]


@pytest.mark.parametrize(
    ("name", "option"), RANGED, ids=[f"{n}-{o.name}" for n, o in RANGED]
)
def test_out_of_range_is_refused(name, option):
    bad = below_range(option.annotation)
    refused(ValueError, name, option.name, "must be", **{option.name: bad})


CHOSEN = [(n, o) for n, o in OPTIONS if choices(o.annotation)]


@pytest.mark.parametrize(
    ("name", "option"), CHOSEN, ids=[f"{n}-{o.name}" for n, o in CHOSEN]
)
def test_unknown_choice_is_refused(name, option):
    allowed = choices(option.annotation)
    bad = "no such choice" if isinstance(allowed[0], str) else -1
    refused(ValueError, name, option.name, *map(repr, allowed), **{option.name: bad})


DIVIDED = [
    (n, *pair) for n in NAMES for pair in keras_edifice.info(n).multiples.items()
]


@pytest.mark.parametrize(("name", "whole", "part"), DIVIDED)
def test_sizes_that_do_not_divide_are_refused(name, whole, part):
    refused(ValueError, name, whole, part, "multiple", **{whole: 7, part: 2})


@pytest.mark.parametrize("name", NAMES)
def test_inputs_of_wrong_shape_are_refused(name):
    entry = keras_edifice.info(name)
    model = keras_edifice.build(name, **entry.tiny)
    good = sample_inputs(model)
    first = next(iter(entry.inputs)) if isinstance(good, dict) else None

    def call_with(x):
        model({**good, first: x} if first else x)

    x = good[first] if first else good
    wider = np.concatenate([x, x], -1)
    deeper = np.stack([x, x], -1)
    for bad in (wider, deeper):
        with pytest.raises(ValueError) as caught:
            call_with(bad)
        assert_one_line(caught.value, "expected", "received", str(bad.shape[-1]))


def test_unknown_architecture_names_the_nearest():
    with pytest.raises(ValueError) as caught:
        keras_edifice.build("mpl", input_size=2)
    assert_one_line(caught.value, "'mpl'", "mlp")


def test_architecture_must_be_a_name():
    with pytest.raises(TypeError) as caught:
        keras_edifice.build(keras.layers.Dense(2))
    assert_one_line(caught.value, "must be a name", "Dense")
