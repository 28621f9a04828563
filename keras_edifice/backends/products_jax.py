"""The products of a computation on JAX: the equations that its outputs follow from."""

import math

import jax
from jax.interpreters import partial_eval

from keras_edifice.backends.products import unknown_steps


def count(function, inputs):
    """The adapter of `products.py`."""
    specs = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in inputs]
    closed, outputs = jax.make_jaxpr(function, return_shape=True)(specs)
    needed = [True] * len(closed.jaxpr.outvars)
    return _in_jaxpr(partial_eval.dce_jaxpr(closed.jaxpr, needed)[0]), outputs


def _in_jaxpr(jaxpr):
    return sum(map(_in_equation, jaxpr.eqns))


def _in_equation(equation):
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        return _of_product(equation)
    if name == "conv_general_dilated":
        return _of_convolution(equation)
    if name == "cond":
        return max(_in_jaxpr(branch.jaxpr) for branch in params["branches"])
    inner = sum(map(_in_jaxpr, _jaxprs(params)))
    if name == "while" and inner:
        raise unknown_steps()
    return params["length"] * inner if name == "scan" else inner


def _jaxprs(params):
    """The functions that an equation calls."""
    for value in params.values():
        for part in value if isinstance(value, (tuple, list)) else [value]:
            part = getattr(part, "jaxpr", part)
            if hasattr(part, "eqns"):
                yield part


def _of_product(equation):
    (contracted, _), _ = equation.params["dimension_numbers"]
    if not contracted:
        return 0  # each element is a product, and nothing is accumulated
    shape = equation.invars[0].aval.shape
    size = math.prod(equation.outvars[0].aval.shape)
    return size * math.prod(shape[axis] for axis in contracted)


def _of_convolution(equation):
    params = equation.params
    axes = params["dimension_numbers"]
    inputs, kernel = (x.aval.shape for x in equation.invars)
    outputs = equation.outvars[0].aval.shape
    taps = math.prod(kernel[axis] for axis in axes.rhs_spec[2:])
    if math.prod(params["lhs_dilation"]) == 1:
        return math.prod(outputs) * taps * kernel[axes.rhs_spec[1]]
    # Transposed: the zeros between the inputs are not multiplied.
    groups = params["feature_group_count"]
    return math.prod(inputs) * taps * kernel[axes.rhs_spec[0]] // groups
