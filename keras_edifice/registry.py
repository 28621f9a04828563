"""Every architecture by name: registration, lookup, description and construction.

The decorator `architecture` on a builder is the only place where an architecture is
declared. Its options come from the builder's signature and docstring, its family from
the folder, its title from the module's first line.
"""

import ast
import difflib
import fnmatch
import functools
import importlib
import importlib.metadata
import inspect
import pkgutil
import re
import sys
import typing
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import keras

from keras_edifice.options import Option, check, unknown_option

_architectures: dict[str, "Architecture"] = {}

KINDS = ("vector", "sequence", "image", "graph", "set")
"""The kinds of input that data and architectures are matched by."""


@dataclass(frozen=True)
class Architecture:
    """What is known of an architecture. `print` it, or show it in a notebook.

    Attributes:
        name: what `build` is called with.
        family: the family of the learning path.
        title: the name in full.
        summary: one line on what the model is.
        paper: authors, year, title, and arXiv id or venue.
        kind: kind of input: vector, sequence, image, graph or set.
        inputs: name of each input -> its shape, in terms of the options.
        outputs: name of each output -> its shape; `a | b` is a, or b if a is None.
        options: the options in order.
        causal: whether outputs depend on the present and the past alone.
        streaming: whether it can run token by token.
        multiples: option -> the option that must divide it.
        variants: published size -> the options that make it.
        tiny: the smallest options that exercise everything.
        builder: the function that makes the model.
    """

    name: str
    family: str
    title: str
    summary: str
    paper: str
    kind: str
    inputs: Mapping[str, str]
    outputs: Mapping[str, str]
    options: Mapping[str, Option]
    causal: bool
    streaming: bool
    multiples: Mapping[str, str]
    variants: Mapping[str, dict]
    tiny: Mapping
    builder: Callable = field(repr=False)

    @property
    def input_size_option(self) -> str:
        """The option that holds the width of the input: the last axis of the first."""
        first = next(iter(self.inputs.values()))
        return first.strip("() ").split(",")[-1].strip()

    @property
    def other_words(self) -> dict[str, str]:
        """Word of Keras's applications -> the option of a classifier that it sets."""
        if "num_classes" not in self.options:
            return {}
        words = {"include_top": "num_classes", "pooling": "pool"}
        return {
            word: own
            for word, own in words.items()
            if own in self.options and word not in self.options
        }

    def resolve(self, options: Mapping) -> dict:
        """All options with defaults, checked, in plain Python types.

        Raises:
            TypeError: an option is unknown, missing or of the wrong type.
            ValueError: a value is out of range, no choice, or does not divide.
        """
        variant = self._variant(options.get("variant"))
        options = self._with_or_without_head(options, variant)
        options = self._pooled(options)
        for name in options:
            if name not in self.options:
                raise unknown_option(self.name, name, list(self.options))
        given = {**variant, **options}
        missing = [
            o for o in self.options.values() if o.required and o.name not in given
        ]
        if missing:
            names = ", ".join(f"{o.name} ({o.meaning})" for o in missing)
            raise TypeError(f"{self.name} needs {names}; pass it by name")
        resolved = {
            name: option.check(given.get(name, option.default))
            for name, option in self.options.items()
        }
        for whole, part in self.multiples.items():
            _check_multiple(whole, resolved[whole], part, resolved[part])
        return resolved

    def _with_or_without_head(self, options, variant):
        """`include_top`, as Keras's applications have it, in terms of `num_classes`."""
        name = "include_top"
        if name not in {*options} & {*self.other_words}:
            return options
        options = dict(options)
        top = check(bool, name, options.pop(name))
        usual = self.options["num_classes"].default
        default = variant.get("num_classes", usual) if top else None
        number = options.get("num_classes", default)
        if top and number is None:
            raise ValueError("include_top=True needs num_classes, received None")
        if not top and number is not None:
            raise ValueError(
                f"include_top=False has no classes, but num_classes is {number}; "
                "give one of the two"
            )
        return {**options, "num_classes": number}

    def _pooled(self, options):
        """`pooling`, as Keras's applications have it, in terms of `pool`."""
        name = "pooling"
        if name not in {*options} & {*self.other_words}:
            return options
        options = dict(options)
        if "pool" in options:
            raise ValueError(
                f"pool and pooling say the same, received pool={options['pool']!r} and "
                f"pooling={options[name]!r}; give one of the two"
            )
        pooling = options.pop(name)
        return {**options, "pool": "mean" if pooling == "avg" else pooling}

    def _variant(self, name):
        if name is None or "variant" not in self.options:
            return {}
        return self.variants[self.options["variant"].check(name)]

    def shape(self, spec: str, options: Mapping) -> tuple:
        """Evaluates a shape of `inputs` or `outputs`; a name that is no option is None.

        >>> info("mlp").shape("(batch, num_classes | hidden_sizes[-1])", options)
        (None, 32)
        """
        axes = ast.parse(spec, mode="eval").body.elts
        return tuple(_evaluate(axis, options) for axis in axes)

    def axes(self) -> dict[str, list[str]]:
        """Input -> the name of each axis; equal names mean equal sizes."""
        return {
            name: [
                axis.strip() for axis in shape.strip("() ").split(",") if axis.strip()
            ]
            for name, shape in self.inputs.items()
        }

    def __str__(self):
        lines = [
            f"{self.name}: {self.title}",
            f"  {self.summary}",
            f"  family    {self.family}",
            f"  paper     {self.paper}",
            f"  input     {_shapes(self.inputs)}",
            f"  output    {_shapes(self.outputs)}",
            f"  causal    {'yes' if self.causal else 'no'}"
            f", streams: {'yes' if self.streaming else 'no'}",
        ]
        if self.variants:
            lines.append(f"  variants  {', '.join(self.variants)}")
        lines.append("  options")
        width = max(len(name) for name in self.options)
        for option in self.options.values():
            default = "required" if option.required else f"= {option.default!r}"
            allowed = f" [{option.allowed}]" if option.allowed else ""
            lines.append(
                f"    {option.name:{width}}  {option.type}, {default}: "
                f"{option.meaning}{allowed}"
            )
        return "\n".join(lines)

    def _repr_html_(self):
        from html import escape

        rows = "".join(
            f"<tr><td><code>{o.name}</code></td><td>{escape(o.type)}</td>"
            f"<td>{'required' if o.required else escape(repr(o.default))}</td>"
            f"<td>{escape(o.meaning)}</td><td>{escape(o.allowed)}</td></tr>"
            for o in self.options.values()
        )
        variants = f"<br>variants: {escape(', '.join(self.variants))}"
        return (
            f"<b>{self.name}</b>: {escape(self.title)} ({self.family})"
            f"<br>{escape(self.summary)}<br>paper: {escape(self.paper)}"
            f"<br>input: <code>{escape(_shapes(self.inputs))}</code>, "
            f"output: <code>{escape(_shapes(self.outputs))}</code>"
            f"<br>causal: {self.causal}, streams: {self.streaming}"
            f"{variants if self.variants else ''}"
            "<table><tr><th>option</th><th>type</th><th>default</th><th>meaning</th>"
            f"<th>allowed</th></tr>{rows}</table>"
        )


def architecture(
    *,
    paper: str,
    kind: str,
    inputs: str | dict[str, str],
    outputs: str | dict[str, str],
    tiny: dict,
    causal: bool = False,
    streaming: bool = False,
    multiples: dict[str, str] | None = None,
    variants: dict[str, dict] | None = None,
    family: str | None = None,
    title: str | None = None,
):
    """Registers a builder under its function's name.

    Args:
        paper: "Authors year, Title, arXiv:number" or the venue.
        kind: kind of input: vector, sequence, image, graph or set.
        inputs: shape in terms of the options, as "(batch, input_size)"; several
            inputs as a dict of them. Equal names of axes are equal sizes.
        outputs: the same for the outputs; "num_classes | hidden_size" means
            num_classes, or hidden_size where that is None.
        tiny: the smallest options that exercise everything; tests run on them.
        causal: outputs depend on the present and the past alone.
        streaming: it can run token by token.
        multiples: {"hidden_size": "num_heads"}: the second must divide the first.
        variants: published size -> its options; the builder then has the option
            `variant` with these choices.
        family: the folder that holds the module, unless it is given.
        title: the name in full; the module's first line, unless it is given.

    Raises:
        ValueError: the name is taken, or the declaration and the builder differ.
    """

    def register(builder):
        entry = _describe(
            builder,
            paper=paper,
            kind=kind,
            inputs=inputs if isinstance(inputs, dict) else {"inputs": inputs},
            outputs=outputs if isinstance(outputs, dict) else {"outputs": outputs},
            tiny=tiny,
            causal=causal,
            streaming=streaming,
            multiples=multiples or {},
            variants=variants or {},
            family=family or builder.__module__.split(".")[-2:][0],
            title=title,
        )
        known = _architectures.get(entry.name)
        if known and known.builder.__module__ != builder.__module__:
            raise ValueError(
                f"the name {entry.name!r} is taken by {known.builder.__module__}; "
                f"{builder.__module__} must use another one"
            )
        _architectures[entry.name] = entry

        @functools.wraps(builder)
        def build_checked(**options):
            return build(entry.name, **options)

        return build_checked

    return register


def with_defaults(builder: Callable, name: str, summary: str, **defaults) -> Callable:
    """A builder under another name, of the same options with other defaults.

    For a name that stands for a known architecture with one of its options; register
    it with `architecture`.

    Args:
        builder: a registered builder.
        name: the new name.
        summary: the first line of its docstring; the rest is that of the other.
        **defaults: option -> its new default.
    """
    builder = inspect.unwrap(builder)
    signature = inspect.signature(builder)

    @functools.wraps(builder)
    def renamed(**options):
        model = builder(**{**defaults, **options})
        model.name = name
        return model

    parameters = [
        p.replace(default=defaults.get(p.name, p.default))
        for p in signature.parameters.values()
    ]
    renamed.__signature__ = signature.replace(parameters=parameters)
    renamed.__name__ = renamed.__qualname__ = name
    renamed.__doc__ = "\n".join([summary, *inspect.getdoc(builder).split("\n")[1:]])
    return renamed


def build(name: str, **options) -> keras.Model:
    """Builds an architecture.

    Args:
        name: a name of `list_architectures()`.
        **options: those of `info(name)`, by keyword. Where they have `num_classes`,
            `include_top=False` stands for None, as in Keras's applications, and
            `pooling="avg"` for `pool="mean"` where an architecture has that word.

    Returns:
        A functional Keras model, ready for `compile` and `fit`.

    Raises:
        ValueError: unknown architecture; a value out of range or not a choice.
        TypeError: an option that is unknown, missing or of the wrong type.
    """
    entry = info(name)
    resolved = entry.resolve(options)
    arguments = {k: v for k, v in resolved.items() if k in _parameters(entry.builder)}
    model = entry.builder(**arguments)
    return model.describe(name, resolved) if hasattr(model, "describe") else model


def classifier(
    name: str, num_classes: int, activation: str | None = "softmax", **options
) -> keras.Model:
    """An architecture with a classification head, ready for `compile` and `fit`.

    Here `activation` is that of the head. An architecture's own option of this name
    is set by `build`, or in the mapping that `with_head` takes.

    Args:
        name: a name of `list_architectures()`.
        num_classes: number of classes.
        activation: of the head; None gives logits.
        **options: those of `info(name)`.

    Returns:
        A model whose output is (batch, num_classes).

    Raises:
        ValueError: the architecture has no single output that could be classified.
        TypeError: as `build`.
    """
    return with_head(name, num_classes, options, activation)


def with_head(
    name: str, num_classes: int, options: Mapping, activation: str | None = "softmax"
) -> keras.Model:
    """`classifier` with the options of the architecture as a mapping."""
    from keras_edifice.blocks.heads import class_scores
    from keras_edifice.model import EdificeModel
    from keras_edifice.options import Size

    entry = info(name)
    head = dict(
        num_classes=check(Size, "num_classes", num_classes),
        classifier_activation=activation,
    )
    if "num_classes" in entry.options:
        return build(name, **{**options, **head})
    if len(entry.outputs) > 1:
        raise ValueError(
            f"{name} cannot be a classifier: it gives {', '.join(entry.outputs)}; "
            "build it and put a model of your own on one of them"
        )
    backbone = build(name, **options)
    scores = class_scores(backbone.output, num_classes, activation)
    model = EdificeModel(backbone.input, scores, name=f"{name}_classifier")
    return model.describe(name, backbone.options)


def info(name: str) -> Architecture:
    """What is known of an architecture: paper, options, shapes, variants.

    Raises:
        ValueError: no architecture has this name; the message names the nearest.
    """
    if not isinstance(name, str):
        raise TypeError(
            f"the architecture must be a name, received {type(name).__name__} {name!r}"
        )
    if name not in _architectures:
        near = difflib.get_close_matches(name, _architectures, n=3, cutoff=0.4)
        hint = f"the nearest are {', '.join(near)}; " if near else ""
        raise ValueError(
            f"unknown architecture {name!r}; {hint}list_architectures() names them all"
        )
    return _architectures[name]


def list_architectures(
    family: str | None = None, *, pattern: str | None = None, **facets
) -> list[str]:
    """Names of the architectures, in the order of families and names.

    Args:
        family: only this family.
        pattern: only names that match, with the wildcards `*` and `?`.
        **facets: attributes of `info(name)` with the value they must have, such as
            causal=True, streaming=True, kind="image".

    Raises:
        ValueError: unknown family.
        TypeError: unknown facet.
    """
    if family is not None and family not in list_families():
        raise ValueError(
            f"unknown family {family!r}; the families are {', '.join(list_families())}"
        )
    known = ("causal", "streaming", "kind")
    for facet in facets:
        if facet not in known:
            raise TypeError(f"unknown facet {facet!r}; facets are {', '.join(known)}")
    entries = sorted(_architectures.values(), key=lambda e: (e.family, e.name))
    return [
        entry.name
        for entry in entries
        if family in (None, entry.family)
        and (pattern is None or fnmatch.fnmatchcase(entry.name, pattern))
        and all(getattr(entry, facet) == value for facet, value in facets.items())
    ]


def list_families() -> list[str]:
    """Names of the families that have architectures, sorted."""
    return sorted({entry.family for entry in _architectures.values()})


def search(text: str) -> list[str]:
    """Architectures whose name, title, summary, paper or family has all the words."""
    words = text.lower().split()

    def haystack(e):
        return f"{e.name} {e.family} {e.title} {e.summary} {e.paper}".lower()

    return [
        name
        for name in list_architectures()
        if all(word in haystack(_architectures[name]) for word in words)
    ]


def load_all():
    """Imports every module of this package's folders; being there is enough."""
    package = importlib.import_module(__package__)
    for folder in pkgutil.iter_modules(package.__path__, f"{__package__}."):
        if folder.ispkg and not folder.name.endswith(".backends"):
            parent = importlib.import_module(folder.name)
            for module in pkgutil.iter_modules(parent.__path__, f"{folder.name}."):
                importlib.import_module(module.name)


def load_plugins():
    """Imports the modules that other packages name in their entry points.

    The group is `keras_edifice.architectures`. A module that fails is a warning: the
    fault of another package must not stop this one.
    """
    for plugin in importlib.metadata.entry_points(group="keras_edifice.architectures"):
        try:
            plugin.load()
        except Exception as error:
            warnings.warn(
                f"the architectures of {plugin.value} could not be loaded: {error}",
                stacklevel=2,
            )


def _describe(builder, *, tiny, multiples, variants, title, **facts):
    """The entry of a builder; the declaration must agree with its signature."""
    name = builder.__name__
    module = inspect.getdoc(sys.modules[builder.__module__]) or ""
    title = title or module.partition("\n")[0].split(":")[0].rstrip(".")
    doc = inspect.getdoc(builder) or ""
    options = _options(builder, doc)
    if variants:
        choices = typing.Literal[tuple(variants)] | None
        options["variant"] = Option(
            "variant", choices, None, "published size; options given beside it win"
        )
    if facts["kind"] not in KINDS:
        raise ValueError(f"{name}: kind must be one of {', '.join(KINDS)}")
    named = [
        *tiny,
        *multiples,
        *multiples.values(),
        *(o for v in variants.values() for o in v),
    ]
    for option in named:
        if option not in options:
            raise ValueError(
                f"{name} declares {option!r}, which is not an option of it"
            )
    undocumented = [o.name for o in options.values() if not o.meaning]
    if undocumented:
        raise ValueError(f"{name}: no line in Args for {', '.join(undocumented)}")
    return Architecture(
        name=name,
        title=title,
        summary=doc.partition("\n")[0],
        options=options,
        multiples=multiples,
        variants=variants,
        tiny=tiny,
        builder=builder,
        **facts,
    )


def _parameters(builder):
    return inspect.signature(builder).parameters


def _options(builder, doc):
    hints = typing.get_type_hints(builder, include_extras=True)
    meanings = _argument_lines(doc)
    return {
        name: Option(name, hints[name], parameter.default, meanings.get(name, ""))
        for name, parameter in _parameters(builder).items()
    }


def _argument_lines(doc):
    """Option -> its text in the `Args:` section of a Google docstring."""
    section = re.search(r"^Args:\n((?:[ ]{4}.*\n?|\n)+)", doc, re.MULTILINE)
    if not section:
        return {}
    entries = re.split(r"^ {4}(?=\w+: )", section.group(1), flags=re.MULTILINE)
    pairs = (entry.split(": ", 1) for entry in entries if ": " in entry)
    return {name: " ".join(text.split()).rstrip(".") for name, text in pairs}


def _evaluate(node, options):
    """An axis of a shape: option, option[i], number, + - * //, or `a | b`."""
    match node:
        case ast.Constant(value=value):
            return value
        case ast.Name(id=name):
            return options.get(name)
        case ast.Subscript(value=ast.Name(id=name), slice=index):
            return options[name][ast.literal_eval(index)]
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            value = _evaluate(left, options)
            return _evaluate(right, options) if value is None else value
        case ast.BinOp(left=left, op=op, right=right):
            a, b = _evaluate(left, options), _evaluate(right, options)
            if a is None or b is None:
                return None
            match op:
                case ast.Add():
                    return a + b
                case ast.Sub():
                    return a - b
                case ast.Mult():
                    return a * b
                case ast.FloorDiv():
                    return a // b
    raise ValueError(f"a shape cannot hold {ast.unparse(node)!r}")


def _check_multiple(whole, size, part, divisor):
    if size is not None and divisor is not None and size % divisor:
        raise ValueError(
            f"{whole} must be a multiple of {part}, received {size} and {divisor}"
        )


def _shapes(shapes):
    if len(shapes) == 1:
        return next(iter(shapes.values()))
    return ", ".join(f"{name} {shape}" for name, shape in shapes.items())
