"""The contenders: which architectures, with which options, for which data."""

import ast
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import keras

from keras_edifice.comparison.data import Data
from keras_edifice.registry import Architecture, info, with_head

ORIGINAL = {
    "mlp": dict(hidden_sizes=[64, 32], activation="relu", dropout=0.0),
    "tabnet": dict(hidden_size=32, num_steps=3),
    "bayesian": dict(output_size=16, hidden_sizes=[64, 32]),
    "mc_dropout": dict(output_size=16, hidden_sizes=[64, 32]),
    "ebm": dict(hidden_sizes=[64, 32]),
    "hopfield": dict(hidden_dim=64),
    "snn": dict(output_size=16, hidden_sizes=[64, 32]),
    "ann2snn": dict(output_size=16, hidden_sizes=[64, 32]),
}
"""The contenders of the original comparison and their options."""

DEFAULTS = {
    "vector": tuple(ORIGINAL),
    "image": (*ORIGINAL, "resnet", "convnext", "vit", "mlp_mixer"),
    "sequence": ("lstm", "mamba"),
}
"""Kind of the data -> the contenders if none are named."""

SMALL = {
    "sequence": dict(hidden_size=64, num_layers=2, num_heads=4),
    "set": dict(hidden_size=64, num_layers=2, num_heads=4),
    "image": dict(
        embed_size=64, num_layers=2, num_heads=4, patch_size=2, drop_path=0.0
    ),
}
"""Kind of the architecture -> sizes that train in seconds, for options it has."""

COMPACT = {
    "conv2d": dict(hidden_sizes=[32, 64], pooling="max"),
    "convnext": dict(
        depths=[1, 1], hidden_sizes=[32, 64], kernel_size=3, layer_scale=1.0
    ),
    "deit": dict(patch_size=4),
    "densenet": dict(growth_rate=8, block_sizes=[2, 2, 2], stem="cifar"),
    "efficientnet": dict(
        width_multiplier=0.5,
        blocks=[[1, 3, 1, 32, 1], [4, 3, 1, 48, 1], [4, 3, 2, 64, 1]],
    ),
    "focalnet": dict(embed_size=32, depths=[1, 1]),
    "mlp_mixer": dict(
        embed_size=96, patch_size=4, token_mlp_dim=32, channel_mlp_dim=256
    ),
    "mobilenet": dict(blocks=[[64, 1], [128, 2], [128, 1]]),
    "poolformer": dict(depths=[1, 1], hidden_sizes=[32, 64], layer_scale=1.0),
    "resnet": dict(block_sizes=[1, 1, 1], hidden_size=16, stem="cifar"),
    "swin": dict(embed_size=32, depths=[2, 2], num_heads=[2, 4], window_size=2),
    "vit": dict(patch_size=4, pool="mean"),
}
"""Architecture -> what it needs beside `SMALL` to train in seconds on small images."""


@dataclass(frozen=True)
class Contender:
    """An architecture and the options that were asked for.

    Attributes:
        label: how it is called in the comparison; unique.
        name: the architecture.
        options: the options given for it.
    """

    label: str
    name: str
    options: dict

    def classifier(self, data: Data) -> keras.Model:
        """The untrained classifier for `data`.

        Raises:
            ValueError: the architecture is unknown or does not fit the data.
            TypeError: an option is unknown or of the wrong type.
        """
        entry = info(self.name)
        options = fitting_options(entry, data, self.options)
        return with_head(self.name, len(data.classes), options)


def contenders(architectures, kind: str) -> list[Contender]:
    """The contenders that `architectures` names; the default ones if it is None.

    Args:
        architectures: "mlp,tabnet:num_steps=5", a list of such names, or a mapping
            of names to options.
        kind: the kind of the data.

    Raises:
        ValueError: the text cannot be read, or no contender is named.
    """
    if architectures is None:
        architectures = DEFAULTS[kind]
    if isinstance(architectures, str):
        architectures = split_outside(architectures, ",")
    if isinstance(architectures, Mapping):
        pairs = [
            (name, name, dict(options or {})) for name, options in architectures.items()
        ]
    elif isinstance(architectures, Iterable):
        pairs = [_parsed(text) for text in architectures if str(text).strip()]
    else:
        raise TypeError(
            "architectures must be a text, a list of names or a mapping of names to "
            f"options, received {type(architectures).__name__}"
        )
    if not pairs:
        raise ValueError("no architecture is named; write for example mlp,tabnet")
    unique = {label: Contender(label, name, given) for label, name, given in pairs}
    return list(unique.values())


def _parsed(text):
    if not isinstance(text, str):
        raise TypeError(f"an architecture must be a name, received {text!r}")
    name, *options = split_outside(text.strip(), ":")
    return text.strip(), name.strip(), parse_options(options)


def parse_options(texts: Iterable[str]) -> dict:
    """["hidden_sizes=[64, 32]", "pool=mean"] -> {"hidden_sizes": [64, 32], ...}.

    A value is a Python literal, otherwise text.

    Raises:
        ValueError: a text is not of the form option=value.
    """
    options = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name.strip().isidentifier():
            raise ValueError(
                f"an option must be written option=value, received {text!r}"
            )
        try:
            options[name.strip()] = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError):
            options[name.strip()] = value.strip()
    return options


def split_outside(text: str, separator: str) -> list[str]:
    """Splits `text` where `separator` stands outside brackets and quotes."""
    parts, depth, quote = [""], 0, ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        depth += (character in "([{") - (character in ")]}")
        if character == separator and depth == 0 and not quote:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def fitting_options(entry: Architecture, data: Data, given: Mapping) -> dict:
    """Options of an architecture for `data`: defaults, the input's sizes, the given.

    Raises:
        ValueError: the architecture does not fit the data.
    """
    if len(entry.inputs) > 1:
        raise ValueError(
            f"{entry.name} takes several inputs ({', '.join(entry.inputs)}), "
            f"{data.name} has one"
        )
    x, _ = data.view(entry.kind)
    defaults = {**SMALL.get(entry.kind, {}), **COMPACT.get(entry.name, {})}
    defaults = {} if "variant" in given else ORIGINAL.get(entry.name, defaults)
    sizes = _input_sizes(entry, x.shape[1:])
    known = {name: value for name, value in defaults.items() if name in entry.options}
    return {**known, **sizes, **given}


def _input_sizes(entry, shape):
    """The options that the input's axes name, from the shape of an example."""
    (axes,) = entry.axes().values()
    axes, sizes = axes[1:], {}
    if len(axes) != len(shape):
        raise ValueError(
            f"{entry.name} takes input {next(iter(entry.inputs.values()))}, "
            f"an example has shape {shape}"
        )
    for axis, size in zip(axes, shape, strict=True):
        if axis in entry.options and sizes.setdefault(axis, size) != size:
            raise ValueError(
                f"{entry.name} takes square images, received {shape[0]}x{shape[1]}"
            )
    return sizes
