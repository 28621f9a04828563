"""What a model costs for one example: weights, multiply-accumulates, activations.

>>> print(profile(build("resnet", variant="imagenet50"), image_size=224))
"""

import json
import math
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field

import keras
from keras import tree

from keras_edifice.backends.products import multiply_accumulates
from keras_edifice.backends.signature import shapes
from keras_edifice.errors import one_line
from keras_edifice.registry import build


@dataclass(frozen=True)
class Row:
    """A use of a layer.

    Attributes:
        layer: its name, after those of the models that it is in.
        kind: name of its class.
        output_shape: for one example; several outputs have several shapes.
        parameters: of the layer, nothing at a later use of it.
        multiply_accumulates: of the layer with all that is in it.
        activation_bytes: of its outputs.
    """

    layer: str
    kind: str
    output_shape: list
    parameters: int
    multiply_accumulates: int
    activation_bytes: int


@dataclass(frozen=True)
class Profile:
    """What a model costs for one example. `print` it.

    Attributes:
        model: its name.
        input_shapes: name of each input -> its shape, with one example.
        rows: of the layers, in the order of computation.
        trainable_parameters: numbers that training changes.
        other_parameters: statistics and frozen weights; no seeds.
        multiply_accumulates: of matrix products and convolutions.
        activation_bytes: of the outputs of all layers.
        peak_activation_bytes: the most that inputs and outputs of layers take at a
            time, if each is kept until its last use.
    """

    model: str
    input_shapes: dict[str, list]
    rows: list[Row] = field(repr=False)
    trainable_parameters: int
    other_parameters: int
    multiply_accumulates: int
    activation_bytes: int
    peak_activation_bytes: int

    @property
    def parameters(self) -> int:
        """All of them, trainable or not."""
        return self.trainable_parameters + self.other_parameters

    def to_json(self) -> str:
        """The totals and the rows as JSON."""
        return json.dumps(asdict(self), indent=2)

    def chart(self, path):
        """Writes a chart of the layers as SVG, PNG or HTML, by the ending of `path`."""
        from keras_edifice.benchmark.charts import save_profile

        save_profile(self, path)

    def facts(self) -> dict[str, str]:
        """The totals, for people."""
        shapes = ", ".join(f"{k} {_readable(v)}" for k, v in self.input_shapes.items())
        return {
            "input": shapes,
            "parameters": f"{self.parameters:,}, "
            f"{self.trainable_parameters:,} of them trainable",
            "multiply-accumulates": f"{self.multiply_accumulates:,}",
            "activations": f"{self.activation_bytes:,} bytes, "
            f"at most {self.peak_activation_bytes:,} at a time",
        }

    def __str__(self):
        lines = [("layer", "class", "output", *FIGURES)]
        lines += [cells(row) for row in self.rows]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        text = [f"{self.model}, one example"]
        text += [f"  {name:20}  {fact}" for name, fact in self.facts().items()]
        for line in lines:
            padded = [
                part.ljust(width) if i < 3 else part.rjust(width)
                for i, (part, width) in enumerate(zip(line, widths, strict=True))
            ]
            text.append("  ".join(padded).rstrip())
        return "\n".join(text)


FIGURES = ("parameters", "multiply-accumulates", "bytes")
"""The figures of a row, as they are called in tables."""


def cells(row: Row) -> tuple[str, ...]:
    """A row as text: layer, class, output shape and the figures."""
    figures = row.parameters, row.multiply_accumulates, row.activation_bytes
    shape = _readable(row.output_shape)
    return (row.layer, row.kind, shape, *(f"{number:,}" for number in figures))


def profile(model: keras.Model, **sizes: int) -> Profile:
    """Weights, multiply-accumulates and activations of a model, for one example.

    The model is traced, layer by layer, and computes nothing; its weights need no
    values. The multiply-accumulates are those of matrix products and convolutions, as
    papers count them: no norms, activations, scans, element-wise products and Fourier
    transforms. Attention counts both of its products, QKᵀ and that with V. Where a
    backend has a form of its own for a layer, the products are those of that form.

    Args:
        model: functional, or built from layers in a row.
        **sizes: of the axes that the model leaves open, by their names, such as
            image_size=224 or window_size=100. `info` shows the names; those of other
            models are size_I_K: axis K of input I.

    Raises:
        TypeError: no functional model; an open size is missing, or a size is not that
            of an open axis.
        ValueError: the steps of a loop in a layer depend on the data.
    """
    if not isinstance(model, keras.Model) or not getattr(model, "inputs", None):
        raise TypeError(
            "profile takes a functional Keras model, received "
            f"{type(model).__name__}; build it with keras.Model(inputs, outputs)"
        )
    inputs = _inputs(model, sizes)
    trace = _Trace(inputs)
    outputs = trace.through(model, inputs)
    rows, trainable = trace.rows, _numbers(model.trainable_variables)
    return Profile(
        model=model.name,
        input_shapes={
            x.name: list(spec.shape)
            for x, spec in zip(model.inputs, inputs, strict=True)
        },
        rows=rows,
        trainable_parameters=trainable,
        other_parameters=_numbers(model.variables) - trainable,
        multiply_accumulates=sum(row.multiply_accumulates for row in rows),
        activation_bytes=sum(row.activation_bytes for row in rows),
        peak_activation_bytes=trace.peak(outputs),
    )


def build_without_weights(name: str, **options) -> keras.Model:
    """`build` for a model whose weights have shapes and no values, to be profiled.

    A thread of its own keeps the valueless variables away from the other models, for
    Keras initialises what it finds there later on.
    """

    def make():
        with keras.StatelessScope(initialize_variables=False):
            return build(name, **options)

    with ThreadPoolExecutor(max_workers=1) as thread:
        return thread.submit(make).result()


class _Trace:
    """The layers of a model in the order of computation."""

    def __init__(self, inputs):
        self.rows, self.counted = [], set()
        self.steps = [([], inputs)]  # what is used and what is made

    def through(self, model, inputs, prefix=""):
        """The outputs of a model for inputs without values; notes its layers."""
        uses = {}

        def call(layer, *args, **kwargs):
            uses[layer.name] = uses.get(layer.name, 0) + 1
            name = prefix + layer.name
            if uses[layer.name] > 1:
                name = f"{name} (use {uses[layer.name]})"
            if isinstance(layer, keras.Model) and getattr(layer, "inputs", None):
                return self.through(layer, tree.flatten(args), f"{name}/")
            return self._note(name, layer, args, kwargs)

        graph = keras.Function(model.inputs, model.outputs)
        outputs = graph._run_through_graph(inputs, call_fn=call)
        structure = getattr(model, "output", model.outputs)
        return tree.pack_sequence_as(structure, tree.flatten(outputs))

    def _note(self, name, layer, args, kwargs):
        given = [x for x in tree.flatten((args, kwargs)) if _is_spec(x)]
        variables = getattr(layer, "variables", [])
        weights = [keras.KerasTensor(v.shape, v.dtype) for v in variables]
        places = tree.map_structure(_is_spec, (args, kwargs))

        def run(tensors):
            values = zip(variables, tensors[len(given) :], strict=True)
            rest = iter(tensors[: len(given)])
            with keras.StatelessScope(values, initialize_variables=False):
                filled = tree.map_structure(
                    lambda x, there: next(rest) if there else x, (args, kwargs), places
                )
                return layer(*filled[0], **filled[1])

        try:
            count, outputs = multiply_accumulates(run, given + weights)
        except ValueError as error:
            kind = type(layer).__name__
            raise ValueError(f"{name} ({kind}): {one_line(error)}") from error
        made = [x for x in tree.flatten(outputs) if _is_spec(x)]
        new = [v for v in variables if id(v) not in self.counted]
        self.counted |= {id(v) for v in new}
        shapes = [list(x.shape) for x in made]
        self.rows.append(
            Row(
                layer=name,
                kind=type(layer).__name__,
                output_shape=shapes[0] if len(shapes) == 1 else shapes,
                parameters=_numbers(new),
                multiply_accumulates=count,
                activation_bytes=sum(map(_bytes, made)),
            )
        )
        self.steps.append((given, made))
        return outputs

    def peak(self, outputs):
        """The most bytes at a time; what the model gives is kept to the end."""
        last = {}
        for i, (used, _) in enumerate([*self.steps, (tree.flatten(outputs), [])]):
            last |= {id(x): i for x in used}
        kept, peak = {}, 0
        for i, (_, made) in enumerate(self.steps):
            kept |= {id(x): _bytes(x) for x in made}
            peak = max(peak, sum(kept.values()))
            kept = {x: size for x, size in kept.items() if last.get(x, 0) > i}
        return peak


def _inputs(model, sizes):
    """The inputs without values and with one example."""
    named = shapes(model)
    opened = {axis for shape in named for axis in shape if isinstance(axis, str)}
    opened = sorted(opened - {"batch"})
    for name, size in sizes.items():
        if name not in opened:
            raise TypeError(
                f"{model.name} leaves {', '.join(opened) or 'no size'} open, "
                f"received {name}={size}"
            )
        if type(size) is not int or size < 1:
            raise TypeError(f"{name} must be a positive int, received {size!r}")
    missing = [name for name in opened if name not in sizes]
    if missing:
        raise TypeError(
            f"{model.name} leaves {', '.join(missing)} open; pass its size, such as "
            f"profile(model, {missing[0]}=32), in the command --size {missing[0]}=32"
        )
    known = {"batch": 1, **sizes}
    return [
        keras.KerasTensor([known.get(axis, axis) for axis in shape], x.dtype)
        for shape, x in zip(named, model.inputs, strict=True)
    ]


def _is_spec(x):
    return isinstance(x, keras.KerasTensor)


def _numbers(variables):
    """How many; the seeds of random layers are no weights."""
    weights = [v for v in variables if "seed_generator" not in v.path]
    return sum(math.prod(v.shape) for v in weights)


def _bytes(x):
    bits = re.search(r"\d+", x.dtype)  # of a truth value: a byte
    return math.prod(x.shape) * (int(bits[0]) if bits else 8) // 8


def _readable(shape):
    if shape and isinstance(shape[0], list):
        return ", ".join(map(_readable, shape))
    return " x ".join(map(str, shape)) or "1"
