"""What every graph network begins and ends with: its inputs, its pooling, its head."""

import keras
from keras import Input, layers, ops

from keras_edifice.blocks.dense_stack import dense_stack
from keras_edifice.blocks.heads import class_scores
from keras_edifice.blocks.set_pooling import SetPooling


def graph_inputs(
    input_dim, sparse=False, use_mask=False, edge_weight=False, edge_mask=False
):
    """Symbolic inputs by name; the numbers of nodes and edges are open.

    Args:
        input_dim: features of each node.
        sparse: "edge_index" (b, e, 2) int32, sender and receiver, in place of
            "adjacency" (b, n, n), row = receiver.
        use_mask: add "node_mask" (b, n), 1 = real.
        edge_weight: add "edge_weight" (b, e) to the sparse form.
        edge_mask: add "edge_mask" (b, e), 1 = real, to the sparse form.

    Raises:
        ValueError: an input of the sparse form is asked of the dense one.
    """
    if not sparse and (edge_weight or edge_mask):
        raise ValueError(
            "edge weights and masks need sparse=True; the adjacency holds both already"
        )
    inputs = {"nodes": Input((None, input_dim), name="nodes")}
    if sparse:
        inputs["edge_index"] = Input((None, 2), dtype="int32", name="edge_index")
    else:
        inputs["adjacency"] = Input((None, None), name="adjacency")
    if edge_weight:
        inputs["edge_weight"] = Input((None,), name="edge_weight")
    if edge_mask:
        inputs["edge_mask"] = Input((None,), name="edge_mask")
    if use_mask:
        inputs["node_mask"] = Input((None,), name="node_mask")
    return inputs


@keras.saving.register_keras_serializable("keras_edifice")
class MaskNodes(layers.Layer):
    """(b, n, f), (b, n) -> (b, n, f): the rows of nodes that are not real are zero."""

    def call(self, nodes, node_mask):
        real = ops.expand_dims(ops.cast(node_mask, "bool"), -1)
        return ops.where(real, nodes, ops.zeros_like(nodes))

    def compute_output_shape(self, nodes_shape):
        return nodes_shape


def graph_readout(
    x,
    node_mask=None,
    *,
    pool=None,
    num_classes=None,
    classifier_dims=(),
    classifier_activation="softmax",
    activation="relu",
    dropout=0.0,
):
    """Features of nodes -> those of nodes or graphs, or their class scores; symbolic.

    Args:
        x: (b, n, f), the features of the trunk.
        node_mask: (b, n), 1 = real, or None.
        pool: "mean", "sum" or "max" over the nodes; None is one row for each node.
        num_classes: classes; None gives features.
        classifier_dims: widths of dense layers between pooling and the classes.
        classifier_activation: of the class scores; None gives logits.
        activation: after each of the dense layers.
        dropout: rate on the input of every layer that reads a hidden one.

    Returns:
        (b, f) or (b, num_classes) with `pool`, else (b, n, f) or (b, n, num_classes)
        with zeros for masked nodes.
    """
    if pool is not None:
        x = SetPooling(pool, name="pool")(x, set_mask=node_mask)
    if num_classes is not None:
        if pool is not None:
            x = dense_stack(x, classifier_dims, activation, dropout, name="classifier")
        elif dropout:
            x = layers.Dropout(dropout, name="dropout_head")(x)
        x = class_scores(x, num_classes, classifier_activation)
    if pool is None and node_mask is not None:
        # The class scores are float32 whatever the policy, and stay so.
        x = MaskNodes(dtype=x.dtype, name="mask_nodes")(x, node_mask)
    return x
