"""The products of a computation on TensorFlow: the operations of its graph."""

import math
import operator

import tensorflow as tf

from keras_edifice.backends.products import unknown_steps


def count(function, inputs):
    """The adapter of `products.py`."""
    specs = [tf.TensorSpec(x.shape, x.dtype) for x in inputs]
    traced = tf.function(function, autograph=False).get_concrete_function(specs)
    return _in_graph(traced.graph, {}), traced.structured_outputs


def _in_graph(graph, known):
    """`known`: names of its arguments -> their values, where they do not vary."""
    return sum(_in_operation(x, known) for x in _needed(graph))


def _needed(graph):
    """The operations that the outputs follow from; TensorFlow runs no others."""
    found, waiting = {}, [x.op for x in graph.outputs]
    while waiting:
        operation = waiting.pop()
        if operation.name not in found:
            found[operation.name] = operation
            waiting += [x.op for x in operation.inputs]
    return found.values()


def _in_operation(operation, known):
    if operation.type in _FORMULAS:
        return _FORMULAS[operation.type](operation)
    if operation.type in ("While", "StatelessWhile"):
        return _in_loop(operation, known)
    if operation.type in ("If", "StatelessIf"):
        branches = [_called(operation, x) for x in ("then_branch", "else_branch")]
        return max(_in_graph(x, {}) for x in branches)
    if operation.type in ("PartitionedCall", "StatefulPartitionedCall"):
        graph = _called(operation, "f")
        return _in_graph(graph, _arguments(graph, operation, known))
    return 0


def _in_loop(operation, known):
    """The steps of a loop, which its counters tell, times what a step has."""
    condition, body = _called(operation, "cond"), _called(operation, "body")
    names = [x.name for x in body.inputs]
    start = _arguments(body, operation, known)
    after = _step(body, names, start)
    inner = _in_graph(body, {k: v for k, v in start.items() if after.get(k) == v})
    if not inner:
        return 0
    steps, state = 0, start
    tested = [x.name for x in condition.inputs]
    while True:
        values = {t: state.get(n) for t, n in zip(tested, names, strict=True)}
        goes_on = _value(condition.outputs[0], values)
        if goes_on is None:
            raise unknown_steps()
        if not goes_on:
            return steps * inner
        steps, state = steps + 1, _step(body, names, state)


def _step(body, names, state):
    """The known arguments after a step, as far as they are known then."""
    pairs = zip(names, body.outputs, strict=True)
    return {name: _value(x, state) for name, x in pairs if state.get(name) is not None}


def _called(operation, name):
    """The graph of a function that the operation calls."""
    return operation.graph._get_function(operation.get_attr(name).name).graph


def _arguments(graph, operation, known):
    pairs = zip(graph.inputs, operation.inputs, strict=True)
    return {inner.name: _value(x, known) for inner, x in pairs}


def _value(tensor, known):
    """The whole number or truth that a tensor holds; None if it cannot be told."""
    if tensor.name in known:
        return known[tensor.name]
    if tensor.shape.rank != 0 or not (tensor.dtype.is_integer or tensor.dtype.is_bool):
        return None
    operation = tensor.op
    if operation.type in ("Identity", "Cast", "Max"):  # of one number
        return _value(operation.inputs[0], known)
    if operation.type in _SCALARS:
        values = [_value(x, known) for x in operation.inputs]
        return None if None in values else _SCALARS[operation.type](*values)
    if operation.type == "StridedSlice":  # the size of an axis
        whole, first, *_ = (tf.get_static_value(x) for x in operation.inputs)
        return None if whole is None else int(whole[first[0]])
    value = tf.get_static_value(tensor)
    return None if value is None else value.item()


_SCALARS = {
    "AddV2": operator.add,
    "Sub": operator.sub,
    "Mul": operator.mul,
    "FloorDiv": operator.floordiv,
    "Less": operator.lt,
    "LessEqual": operator.le,
    "Greater": operator.gt,
    "GreaterEqual": operator.ge,
    "LogicalAnd": lambda a, b: a and b,
}


def _size(tensor):
    return math.prod(tensor.shape)


def _of_product(operation):
    left = operation.inputs[0]
    names = ("transpose_a", "adj_x")
    known = operation.node_def.attr
    turned = any(known[name].b for name in names if name in known)
    return _size(operation.outputs[0]) * left.shape[-2 if turned else -1]


def _of_einsum(operation):
    terms, _, result = operation.get_attr("equation").decode().partition("->")
    left, *right = terms.split(",")
    contracted = [x for x in left if right and x in right[0] and x not in result]
    if not contracted:
        return 0  # each element is a product, and nothing is accumulated
    shape = operation.inputs[0].shape
    before, _, after = left.partition("...")
    sizes = {x: shape[i] for i, x in enumerate(before)}
    sizes |= {x: shape[i - len(after)] for i, x in enumerate(after)}
    return _size(operation.outputs[0]) * math.prod(sizes[x] for x in contracted)


def _of_convolution(operation):
    """The kernel is (taps ..., input channels of a group, output channels)."""
    kernel = operation.inputs[1].shape
    return _convolved(operation) * math.prod(kernel[:-1])


def _of_depthwise(operation):
    """The kernel is (taps ..., channels, multiplier)."""
    kernel = operation.inputs[1].shape
    return _convolved(operation) * math.prod(kernel[:-2])


def _convolved(operation):
    """The outputs; of a dilated convolution those that are kept."""
    output = operation.outputs[0]
    after = output.consumers()
    while after and after[0].type in ("Squeeze", "BatchToSpaceND"):
        if after[0].type == "BatchToSpaceND":
            return _size(after[0].outputs[0])
        after = after[0].outputs[0].consumers()
    return _size(output)


def _of_transposed(operation):
    """The kernel is (taps ..., output channels, input channels)."""
    _, kernel, inputs = operation.inputs
    return _size(inputs) * math.prod(kernel.shape[:-1])


_FORMULAS = {
    "MatMul": _of_product,
    "BatchMatMul": _of_product,
    "BatchMatMulV2": _of_product,
    "BatchMatMulV3": _of_product,
    "Einsum": _of_einsum,
    "Conv2D": _of_convolution,
    "Conv3D": _of_convolution,
    "DepthwiseConv2dNative": _of_depthwise,
    "Conv2DBackpropInput": _of_transposed,
    "Conv3DBackpropInputV2": _of_transposed,
}
