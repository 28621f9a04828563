"""Graphs as tensors: dense matrices or lists of edges, with masks.

Dense: adjacency (b, n, n), row = receiver: A[b, i, j] weighs the edge from j to i.
Sparse: edge_index (b, e, 2) of (sender, receiver), an edge that is masked or has a
negative end does not exist. Nodes are (b, n, f); a mask has 1 where a node is real.

Edges are gathered and reduced by segments. While a model is exported, products with
one-hot matrices do the same: they suit every exporter, but cost e · n.
"""

from keras import ops

from keras_edifice.ops.positions import positions
from keras_edifice.ops.tracing import exporting

REDUCTIONS = ("sum", "mean", "max", "min")
_EMPTY = {"max": -1e30, "min": 1e30}


def one_hot_nodes(index, nodes):
    """Which node each index is: (b, e) -> (b, e, n), zeros for a negative index."""
    index = ops.expand_dims(ops.cast(index, "float32"), -1)
    return ops.cast(index == positions(nodes), "float32")


def gather_nodes(nodes, index):
    """Rows of the nodes: (b, n, f), (b, e) -> (b, e, f). A negative index gives any."""
    if exporting():
        chosen = ops.cast(one_hot_nodes(index, nodes), nodes.dtype)
        return ops.matmul(chosen, nodes)
    batch, length, width = ops.shape(nodes)
    flat = ops.reshape(nodes, (batch * length, width))
    return ops.take(flat, _flat_index(ops.maximum(index, 0), length), axis=0)


def _flat_index(index, length):
    """Index within each example -> index within the nodes of all examples."""
    example = ops.cumsum(ops.ones_like(index[:, :1]), axis=0) - 1
    return index + example * length


def segment_reduce(values, receivers, nodes, reduction="sum", mask=None):
    """Messages of edges, reduced at their receivers, in float32 inside.

    Args:
        values: (b, e, f), one row for each edge.
        receivers: (b, e), index of a node; negative for no edge.
        nodes: (b, n, ...), any tensor with the node axis.
        reduction: "sum", "mean", "max" or "min".
        mask: (b, e), 1 where an edge exists.

    Returns:
        (b, n, f); zeros at a node that no edge reaches.
    """
    dtype, values = values.dtype, ops.cast(values, "float32")
    real = receivers >= 0
    if mask is not None:
        real = ops.logical_and(real, ops.cast(mask, "bool"))
    reduce = _reduce_one_hot if exporting() else _reduce_segments
    return ops.cast(reduce(values, receivers, nodes, reduction, real), dtype)


def _reduce_segments(values, receivers, nodes, reduction, real):
    batch, length = ops.shape(nodes)[0], ops.shape(nodes)[1]
    width, segments = values.shape[-1], batch * length
    index = ops.where(real, _flat_index(receivers, length), -1)  # -1 is dropped
    index = ops.reshape(index, (-1,))
    flat = ops.reshape(values, (-1, width))
    if reduction == "sum":
        reduced = ops.segment_sum(flat, index, segments)
    else:
        ones = ops.ones_like(flat[:, :1])
        count = ops.segment_sum(ones, index, segments)
        if reduction == "mean":
            reduced = ops.segment_sum(flat, index, segments) / ops.maximum(count, 1.0)
        else:
            sign = 1.0 if reduction == "max" else -1.0
            reduced = sign * ops.segment_max(sign * flat, index, segments)
            reduced = ops.where(count > 0, reduced, 0.0)
    return ops.reshape(reduced, (batch, length, width))


def _reduce_one_hot(values, receivers, nodes, reduction, real):
    reached = one_hot_nodes(receivers, nodes)  # (b, e, n)
    reached = ops.swapaxes(
        reached * ops.expand_dims(ops.cast(real, "float32"), -1), 1, 2
    )
    if reduction in ("sum", "mean"):
        total = ops.matmul(reached, values)  # (b, n, f)
        count = ops.sum(reached, axis=-1, keepdims=True)
        return total if reduction == "sum" else total / ops.maximum(count, 1.0)
    return masked_reduce(ops.expand_dims(values, 1), reached, 2, reduction)


def segment_softmax(scores, receivers, nodes, mask=None):
    """Softmax over the edges that share a receiver, in float32.

    Args:
        scores: (b, e, h).
        receivers: (b, e), index of a node; negative for no edge.
        nodes: (b, n, ...), any tensor with the node axis.
        mask: (b, e), 1 where an edge exists.

    Returns:
        (b, e, h); zeros for edges that do not exist.
    """
    scores, real = ops.cast(scores, "float32"), receivers >= 0
    if mask is not None:
        real = ops.logical_and(real, ops.cast(mask, "bool"))
    scores = ops.where(ops.expand_dims(real, -1), scores, -1e30)
    top = segment_reduce(ops.stop_gradient(scores), receivers, nodes, "max", real)
    weights = ops.exp(scores - gather_nodes(top, receivers))
    weights = ops.where(ops.expand_dims(real, -1), weights, 0.0)
    total = segment_reduce(weights, receivers, nodes, "sum", real)
    return weights / (gather_nodes(total, receivers) + 1e-16)


def masked_reduce(values, mask, axis, reduction):
    """Reduces `axis` of (..., f) over the entries that the mask keeps.

    Dense messages (b, i, j, f) with the mask (b, i, j) and axis 2, or nodes (b, n, f)
    with (b, n) and axis 1.

    Args:
        values: (..., f), may broadcast against the mask.
        mask: (...) without the last axis, 1 where an entry counts; None is all.
        axis: the axis that goes.
        reduction: "sum", "mean", "max" or "min".

    Returns:
        (..., f) without `axis`; zeros where nothing counts.
    """
    dtype, values = values.dtype, ops.cast(values, "float32")
    if mask is None:
        mask = ops.ones_like(values[..., 0])
    real = ops.expand_dims(ops.cast(mask, "bool"), -1)
    count = ops.sum(ops.cast(real, "float32"), axis=axis)
    if reduction in ("sum", "mean"):
        reduced = ops.sum(ops.where(real, values, 0.0), axis=axis)
        if reduction == "mean":
            reduced = reduced / ops.maximum(count, 1.0)
    else:
        pick = ops.max if reduction == "max" else ops.min
        reduced = pick(ops.where(real, values, _EMPTY[reduction]), axis=axis)
        reduced = ops.where(count > 0, reduced, 0.0)
    return ops.cast(reduced, dtype)


def masked_softmax(scores, mask, axis=-1):
    """Softmax over the entries that the mask keeps; zeros where it keeps none."""
    scores, real = ops.cast(scores, "float32"), ops.cast(mask, "bool")
    weights = ops.softmax(ops.where(real, scores, -1e9), axis=axis)
    return ops.where(real, weights, 0.0)


def normalize_adjacency(
    adjacency, normalize="sym", add_self_loops=True, improved=False, node_mask=None
):
    """Â of Kipf & Welling: D^-½ Ã D^-½, or D^-1 Ã, in float32.

    Args:
        adjacency: (b, n, n), row = receiver.
        normalize: "sym", "row" or None; degrees are sums of weights over a row.
        add_self_loops: set the diagonal to one, whatever it was.
        improved: set it to two.
        node_mask: (b, n), 1 where a node is real; others lose all edges.

    Returns:
        (b, n, n).
    """
    adjacency = ops.cast(adjacency, "float32")
    if add_self_loops:
        at = positions(adjacency)
        diagonal = ops.expand_dims(at, 1) == ops.expand_dims(at, 0)
        adjacency = ops.where(diagonal, 2.0 if improved else 1.0, adjacency)
    if node_mask is not None:
        real = ops.cast(node_mask, "float32")
        adjacency = adjacency * ops.expand_dims(real, 1) * ops.expand_dims(real, 2)
    degree = ops.sum(adjacency, axis=-1)
    left, right = _degree_factors(degree, normalize)
    return adjacency * ops.expand_dims(left, 2) * ops.expand_dims(right, 1)


def _degree_factors(degree, normalize):
    """What a weight is multiplied by at its receiver and at its sender."""
    safe = ops.where(degree > 0, degree, 1.0)
    if normalize == "sym":
        root = ops.where(degree > 0, ops.rsqrt(safe), 0.0)
        return root, root
    ones = ops.ones_like(degree)
    return (
        ops.where(degree > 0, 1.0 / safe, 0.0) if normalize == "row" else ones
    ), ones


def normalize_edges(
    nodes,
    edge_index,
    edge_weight=None,
    edge_mask=None,
    node_mask=None,
    normalize="sym",
    add_self_loops=True,
    improved=False,
):
    """The same Â for a list of edges, in float32.

    Args:
        nodes: (b, n, ...), any tensor with the node axis.
        edge_index: (b, e, 2), sender and receiver; negative for no edge.
        edge_weight: (b, e), ones if None.
        edge_mask: (b, e), 1 where an edge exists.
        node_mask: (b, n), 1 where a node is real; others lose all edges.
        normalize: "sym", "row" or None.
        add_self_loops: one loop at each node, in place of those in the list.
        improved: loops of weight two.

    Returns:
        (b, e), the entry of Â of each edge, 0 where there is none; (b, n), that of
        the loops that were added.
    """
    senders, receivers = edge_index[..., 0], edge_index[..., 1]
    real = ops.logical_and(senders >= 0, receivers >= 0)
    present = ops.ones_like(ops.cast(nodes[..., 0], "float32"))  # (b, n)
    if node_mask is not None:
        present = ops.cast(node_mask, "float32")
    if edge_mask is not None:
        real = ops.logical_and(real, ops.cast(edge_mask, "bool"))
    if add_self_loops:
        real = ops.logical_and(real, senders != receivers)
    weight = ops.cast(real, "float32")
    if edge_weight is not None:
        weight = weight * ops.cast(edge_weight, "float32")
    weight = weight * _at(present, senders) * _at(present, receivers)
    loops = present * ((2.0 if improved else 1.0) if add_self_loops else 0.0)
    reached = segment_reduce(ops.expand_dims(weight, -1), receivers, nodes, mask=real)
    left, right = _degree_factors(ops.squeeze(reached, -1) + loops, normalize)
    weight = weight * _at(left, receivers) * _at(right, senders)
    return weight, loops * left * right


def _at(values, index):
    """(b, n), (b, e) -> (b, e)."""
    return ops.squeeze(gather_nodes(ops.expand_dims(values, -1), index), -1)


def propagate(nodes, adjacency):
    """Σ_j A_ij h_j: (b, n, f), (b, n, n) -> (b, n, f)."""
    return ops.matmul(ops.cast(adjacency, nodes.dtype), nodes)


def propagate_edges(nodes, edge_index, edge_weight, loop_weight=None):
    """Σ_j A_ij h_j for a list of edges: (b, n, f) -> (b, n, f).

    Args:
        nodes: (b, n, f).
        edge_index: (b, e, 2), sender and receiver.
        edge_weight: (b, e), zero where there is no edge.
        loop_weight: (b, n), weight of each node's own features.
    """
    weight = ops.cast(ops.expand_dims(edge_weight, -1), nodes.dtype)
    messages = gather_nodes(nodes, edge_index[..., 0]) * weight
    total = segment_reduce(messages, edge_index[..., 1], nodes)
    if loop_weight is None:
        return total
    return total + nodes * ops.cast(ops.expand_dims(loop_weight, -1), nodes.dtype)
