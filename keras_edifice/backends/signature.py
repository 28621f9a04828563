"""What an exporter must know of the inputs: shapes, types, and which sizes are open."""

import keras


def specs(model):
    """The inputs as `keras.InputSpec`, in the structure that the model takes."""
    return keras.tree.map_structure(
        lambda x: keras.InputSpec(shape=x.shape, dtype=x.dtype, name=x.name),
        model.input,
    )


def shapes(model):
    """Of each input, in flat order: its shape with a name for every open axis.

    Axes that the architecture declares equal have the same name, and so have the
    batch axes: [["batch", "nodes", 6], ["batch", "nodes", "nodes"]].
    """
    declared = _declared_axes(model)
    named = []
    for i, x in enumerate(model.inputs):
        axes = declared.get(x.name, [])
        if len(axes) != len(x.shape):
            axes = [""] * len(x.shape)
        named.append(
            [
                _name(axis, i, k) if size is None else size
                for k, (axis, size) in enumerate(zip(axes, x.shape, strict=True))
            ]
        )
    return named


def _declared_axes(model):
    """Input -> names of its axes, as its architecture declares them."""
    from keras_edifice.registry import info

    name = getattr(model, "architecture", None)
    try:
        axes = info(name).axes() if name else {}
    except ValueError:  # the model was loaded without its architecture
        return {}
    if len(axes) == len(model.inputs) == 1:
        return {model.inputs[0].name: next(iter(axes.values()))}
    return axes


def _name(declared, i, axis):
    if axis == 0:
        return "batch"
    return declared if declared.isidentifier() else f"size_{i}_{axis}"


def open_axes(model):
    """Whether a size besides the batch is open."""
    return any(None in x.shape[1:] for x in model.inputs)
