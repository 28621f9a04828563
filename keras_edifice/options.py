"""The options of an architecture: their types, their ranges and their errors.

A builder annotates each option with a plain type, a `Literal` of choices, or one of
the named types below; everything that `info` prints and `build` checks follows.
"""

import difflib
import inspect
import types
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import keras
import numpy as np


@dataclass(frozen=True)
class Range:
    """Bounds of a number: `low` (or above it, if `open_low`) to `high`."""

    low: float
    high: float = float("inf")
    open_low: bool = False
    open_high: bool = False

    def __contains__(self, value):
        above = value > self.low if self.open_low else value >= self.low
        below = value < self.high if self.open_high else value <= self.high
        return above and below

    def __str__(self):
        low = f"{'>' if self.open_low else '>='} {self.low:g}"
        if self.high == float("inf"):
            return low
        return f"{low} and {'<' if self.open_high else '<='} {self.high:g}"


class _ActivationName:
    """Marks a string that must name a Keras activation."""


Size = Annotated[int, Range(1)]
"""A width, a length or a number of parts: at least one."""
Count = Annotated[int, Range(0)]
"""A number of things that may be none."""
Rate = Annotated[float, Range(0.0, 1.0, open_high=True)]
"""A probability of dropping: 0 to below 1."""
Fraction = Annotated[float, Range(0.0, 1.0)]
"""A part of the whole: 0 to 1."""
Positive = Annotated[float, Range(0.0, open_low=True)]
"""A number above zero."""
NonNegative = Annotated[float, Range(0.0)]
"""A number that is zero or above."""
Activation = Annotated[str, _ActivationName]
"""The name of a Keras activation."""

# Words that other libraries use for one thing. An architecture takes one of them.
_SYNONYMS = [
    "embed_size embed_dim input_size input_dim input_channels num_channels in_channels "
    "in_features input_features num_features n_features d_input input_width",
    "hidden_size hidden_dim d_model model_dim units width n_embd dim embed_dim "
    "embed_size pattern_dim",
    "hidden_sizes hidden_dims hidden_units layer_sizes widths hidden_layers",
    "output_size output_dim out_features n_outputs num_outputs out_dim",
    "num_heads n_heads heads nhead n_head num_attention_heads",
    "num_layers n_layers n_layer depth num_blocks num_hidden_layers",
    "latent_size latent_dim z_dim z_size code_size",
    "state_size d_state state_dim ssm_state_size n_state",
    "conv_size d_conv conv_kernel kernel_size",
    "expand_factor expand expansion expansion_factor",
    "num_classes n_classes classes num_labels n_labels",
    "window_size seq_len seq_length sequence_length max_len timesteps length",
    "dropout dropout_rate drop_rate drop p_drop",
    "num_timesteps num_steps n_steps time_steps timesteps",
    "image_size img_size input_shape resolution",
    "aggregation pool pooling aggr reduce",
    "classifier_activation head_activation output_activation activation",
    "decoder_sizes decoder_dims decoder_units",
    "encoder_sizes encoder_dims encoder_units",
]


@dataclass(frozen=True)
class Option:
    """One option of an architecture, as `info` shows it and `build` checks it."""

    name: str
    annotation: Any
    default: Any
    meaning: str

    @property
    def required(self) -> bool:
        """Whether `build` must be given a value."""
        return self.default is inspect.Parameter.empty

    @property
    def type(self) -> str:
        """The type in words, such as `int` or `list of int or None`."""
        return describe_type(self.annotation)

    @property
    def allowed(self) -> str:
        """The allowed values in words; empty if any value of the type will do."""
        return describe_values(self.annotation)

    def check(self, value):
        """The value in plain Python types, or one line of TypeError or ValueError."""
        return check(self.annotation, self.name, value)


def _parts(annotation):
    """(plain type, metadata) of an annotation that may be `Annotated`."""
    if get_origin(annotation) is Annotated:
        plain, *metadata = get_args(annotation)
        return plain, metadata
    return annotation, []


def _members(annotation):
    """The alternatives of a union; a single type is its own only alternative."""
    if get_origin(annotation) in (Union, types.UnionType):
        return get_args(annotation)
    return (annotation,)


def describe_type(annotation) -> str:
    """An annotation in words."""
    words = []
    for member in _members(annotation):
        plain, _ = _parts(member)
        if plain is type(None):
            words.append("None")
        elif get_origin(plain) is Literal:
            words.append("str" if isinstance(get_args(plain)[0], str) else "int")
        elif get_origin(plain) is list:
            words.append(f"list of {describe_type(get_args(plain)[0])}")
        elif get_origin(plain) is dict:
            words.append("dict")
        else:
            words.append(plain.__name__)
    return " or ".join(dict.fromkeys(words))


def describe_values(annotation) -> str:
    """The values that an annotation allows, in words."""
    words = []
    for member in _members(annotation):
        plain, metadata = _parts(member)
        if get_origin(plain) is Literal:
            words.append(", ".join(map(repr, get_args(plain))))
        elif get_origin(plain) is list:
            inner = describe_values(get_args(plain)[0])
            words += [f"each {inner}"] if inner else []
        elif _ActivationName in metadata:
            words.append("the name of a Keras activation")
        else:
            words += [str(bound) for bound in metadata]
    return "; or ".join(words)


def check(annotation, name, value):
    """Converts `value` to the plain form of `annotation`, or raises one line.

    Raises:
        TypeError: if the value is of another type.
        ValueError: if it is of the type but not an allowed value.
    """
    errors = []
    for member in _members(annotation):
        try:
            return _check_member(member, name, value)
        except (TypeError, ValueError) as error:
            errors.append(error)
    values = [error for error in errors if isinstance(error, ValueError)]
    if values:
        raise values[0]
    raise TypeError(
        f"{name} must be {describe_type(annotation)}, received "
        f"{type(value).__name__} {value!r}"
    )


def _check_member(member, name, value):
    plain, metadata = _parts(member)
    if plain is type(None):
        if value is not None:
            raise TypeError
        return None
    if get_origin(plain) is Literal:
        choices = get_args(plain)
        if type(value) not in {type(choice) for choice in choices}:
            raise TypeError
        if value not in choices:
            raise ValueError(
                f"{name} must be one of {', '.join(map(repr, choices))}, "
                f"received {value!r}"
            )
        return value
    if get_origin(plain) is list:
        if not isinstance(value, list | tuple):
            raise TypeError
        inner = get_args(plain)[0]
        return [check(inner, f"{name}[{i}]", item) for i, item in enumerate(value)]
    value = _plain(plain, value)
    for rule in metadata:
        if isinstance(rule, Range) and value not in rule:
            raise ValueError(f"{name} must be {rule}, received {value!r}")
        if rule is _ActivationName:
            _check_activation(name, value)
    return value


def _plain(kind, value):
    """`value` as `kind`; NumPy numbers become Python's, a bool is not a number."""
    if kind is bool and type(value) in (bool, np.bool_):
        return bool(value)
    if kind in (int, float) and not isinstance(value, bool):
        if kind is int and isinstance(value, Integral):
            return int(value)
        if kind is float and isinstance(value, Real):
            return float(value)
    if kind is str and isinstance(value, str):
        return value
    if get_origin(kind) is dict and isinstance(value, Mapping):
        return dict(value)
    raise TypeError


def _check_activation(name, value):
    try:
        keras.activations.get(value)
    except ValueError:
        raise ValueError(
            f"{name} must be the name of a Keras activation such as 'relu', "
            f"received {value!r}"
        ) from None


def unknown_option(architecture: str, name: str, valid: list[str]) -> TypeError:
    """The error for an option that an architecture does not have."""
    words = [group.split() for group in _SYNONYMS]
    same = [o for o in valid for group in words if name in group and o in group]
    near = same or difflib.get_close_matches(name, valid, n=1)
    hint = f"use {near[0]!r}; " if near else ""
    return TypeError(
        f"{architecture} has no option {name!r}; {hint}"
        f"its options are: {', '.join(valid)}"
    )
