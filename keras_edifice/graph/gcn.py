"""Graph convolutional network: features mixed by the normalised adjacency.

    H' = σ(Â H W + b),    Â = D̃^-½ Ã D̃^-½,    D̃_ii = Σ_j Ã_ij            eq. 2

Ã is the adjacency with ones on its diagonal. Nodes and graphs as in `ops/graph.py`.
"""

from typing import Literal

import keras
from keras import layers, ops

from keras_edifice.blocks.composite import Composite
from keras_edifice.blocks.dense import Dense
from keras_edifice.blocks.graph_readout import (
    MaskNodes,
    graph_inputs,
    graph_readout,
)
from keras_edifice.blocks.set_pooling import SetPooling
from keras_edifice.model import EdificeModel
from keras_edifice.ops.graph import (
    normalize_adjacency,
    normalize_edges,
    propagate,
    propagate_edges,
)
from keras_edifice.options import Activation, NonNegative, Rate, Size
from keras_edifice.registry import architecture


@keras.saving.register_keras_serializable("keras_edifice")
class NormalizeAdjacency(layers.Layer):
    """(b, n, n), mask (b, n) or None -> Â (b, n, n). Once for all convolutions.

    Args:
        normalize: "sym", "row" or None.
        add_self_loops: set the diagonal to one.
        improved: set it to two.
    """

    def __init__(self, normalize="sym", add_self_loops=True, improved=False, **kwargs):
        super().__init__(**kwargs)
        self.normalize, self.add_self_loops = normalize, add_self_loops
        self.improved = improved

    def call(self, adjacency, node_mask=None):
        options = self.normalize, self.add_self_loops, self.improved
        normal = normalize_adjacency(adjacency, *options, node_mask=node_mask)
        return ops.cast(normal, self.compute_dtype)

    def compute_output_shape(self, adjacency_shape):
        return adjacency_shape


@keras.saving.register_keras_serializable("keras_edifice")
class NormalizeEdges(layers.Layer):
    """Nodes (b, n, f), edges (b, e, 2) -> Â of the edges (b, e) and of loops (b, n).

    Args:
        normalize: "sym", "row" or None.
        add_self_loops: one loop at each node, in place of those in the list.
        improved: loops of weight two.
    """

    def __init__(self, normalize="sym", add_self_loops=True, improved=False, **kwargs):
        super().__init__(**kwargs)
        self.normalize, self.add_self_loops = normalize, add_self_loops
        self.improved = improved

    def call(self, nodes, edge_index, edge_weight=None, edge_mask=None, node_mask=None):
        normal = normalize_edges(
            nodes,
            edge_index,
            edge_weight,
            edge_mask,
            node_mask,
            self.normalize,
            self.add_self_loops,
            self.improved,
        )
        return tuple(ops.cast(weight, self.compute_dtype) for weight in normal)

    def compute_output_shape(
        self,
        nodes_shape,
        edge_index_shape,
        edge_weight_shape=None,
        edge_mask_shape=None,
        node_mask_shape=None,
    ):
        return edge_index_shape[:2], nodes_shape[:2]


@keras.saving.register_keras_serializable("keras_edifice")
class GraphConvolution(Composite):
    """Nodes (b, n, f) and Â -> (b, n, units). Equivariant to the order of the nodes.

    Â is either `adjacency` (b, n, n), or `edge_index` (b, e, 2) with `edge_weight`
    (b, e) and `loop_weight` (b, n).

    Args:
        units: features of each node afterwards.
        activation: after the bias, or None.
        use_bias: whether a bias is added, after the propagation.
        l2: λ of the penalty λ/2 ‖W‖².
    """

    def __init__(self, units, activation=None, use_bias=True, l2=0.0, **kwargs):
        super().__init__(**kwargs)
        self.units, self.activation = units, activation
        self.use_bias, self.l2 = use_bias, l2

    def build(self, nodes_shape):
        self.transform = Dense(
            self.units,
            use_bias=False,
            kernel_regularizer=keras.regularizers.L2(self.l2 / 2) if self.l2 else None,
            dtype=self.dtype_policy,
            name="transform",
        )
        self.transform.build(nodes_shape)
        if self.use_bias:
            self.bias = self.add_weight((self.units,), "zeros", name="bias")
        self.activate = keras.activations.get(self.activation)

    def call(
        self,
        nodes,
        adjacency=None,
        edge_index=None,
        edge_weight=None,
        loop_weight=None,
    ):
        def mix(x):
            if adjacency is not None:
                return propagate(x, adjacency)
            return propagate_edges(x, edge_index, edge_weight, loop_weight)

        # (Â H) W = Â (H W): propagate the narrower of the two.
        narrows = self.units < nodes.shape[-1]
        x = mix(self.transform(nodes)) if narrows else self.transform(mix(nodes))
        if self.use_bias:
            x = x + ops.cast(self.bias, x.dtype)
        return self.activate(x)

    def compute_output_shape(self, nodes_shape):
        return (*nodes_shape[:-1], self.units)


def _normalized(inputs, *options):
    """The arguments of a convolution: Â in the form of the inputs."""
    if "adjacency" in inputs:
        layer = NormalizeAdjacency(*options, name="normalize")
        mask = inputs.get("node_mask")
        return dict(adjacency=layer(inputs["adjacency"], node_mask=mask))
    layer = NormalizeEdges(*options, name="normalize")
    weight, loops = layer(**inputs)
    edges = inputs["edge_index"]
    return dict(edge_index=edges, edge_weight=weight, loop_weight=loops)


@architecture(
    paper="Kipf & Welling 2017, Semi-Supervised Classification with Graph "
    "Convolutional Networks, arXiv:1609.02907",
    kind="graph",
    inputs={
        "nodes": "(batch, nodes, input_dim)",
        "adjacency": "(batch, nodes, nodes)",
    },
    outputs="(batch, nodes, num_classes | hidden_dims[-1])",
    tiny=dict(input_dim=4, hidden_dims=[6, 3], num_classes=3, dropout=0.1),
)
def gcn(
    *,
    input_dim: Size,
    hidden_dims: list[Size] = [64, 64],
    num_classes: Size | None = None,
    classifier_activation: Activation | None = "softmax",
    head: Literal["dense", "conv"] = "dense",
    classifier_dims: list[Size] = [64],
    pool: Literal["mean", "sum", "max"] | None = None,
    activation: Activation = "relu",
    dropout: Rate = 0.0,
    use_bias: bool = True,
    l2: NonNegative = 0.0,
    add_self_loops: bool = True,
    normalize: Literal["sym", "row"] | None = "sym",
    improved: bool = False,
    sparse: bool = False,
    use_edge_weight: bool = False,
    use_edge_mask: bool = False,
    use_mask: bool = False,
) -> EdificeModel:
    """Graph convolutions in sequence, for nodes or, with `pool`, for graphs.

    The paper's net has head="conv", hidden_dims=[16], dropout=0.5, l2=5e-4 and
    use_bias=False. To train on a part of the nodes, pass `fit` a sample_weight
    (batch, nodes) of ones and zeros.

    Args:
        input_dim: features of each node.
        hidden_dims: width of each graph convolution.
        num_classes: classes of nodes or graphs; None gives the features.
        classifier_activation: of the class scores; None gives logits.
        head: "conv" is the paper's: a last graph convolution gives the classes.
        classifier_dims: dense layers between `pool` and the classes of head "dense".
        pool: how the nodes of a graph become one row; None is one for each node.
        activation: after each hidden layer.
        dropout: rate on the input of each layer, in training.
        use_bias: whether the convolutions have biases.
        l2: weight of the penalty l2/2 ‖W‖² on the first convolution.
        add_self_loops: give each node a loop of weight one, whatever it had.
        normalize: "sym" by the roots of both degrees, "row" by the receiver's, or None.
        improved: loops of weight two.
        sparse: take "edge_index" (batch, edges, 2) int32, sender and receiver, in
            place of "adjacency" (batch, nodes, nodes), row = receiver.
        use_edge_weight: the sparse form takes "edge_weight" (batch, edges).
        use_edge_mask: the sparse form takes "edge_mask" (batch, edges), 1 = real.
        use_mask: take "node_mask" (batch, nodes), 1 = real.
    """
    inputs = graph_inputs(input_dim, sparse, use_mask, use_edge_weight, use_edge_mask)
    x, node_mask = inputs["nodes"], inputs.get("node_mask")
    graph = _normalized(inputs, normalize, add_self_loops, improved)
    sizes = [(size, activation) for size in hidden_dims]
    conv_head = head == "conv" and num_classes is not None
    if conv_head:
        sizes.append((num_classes, None))
    for i, (size, act) in enumerate(sizes):
        if dropout:
            x = layers.Dropout(dropout, name=f"dropout_{i}")(x)
        convolution = GraphConvolution(
            size, act, use_bias, l2 if i == 0 else 0.0, name=f"conv_{i}"
        )
        x = convolution(x, **graph)
    if conv_head:
        x = SetPooling(pool, name="pool")(x, set_mask=node_mask) if pool else x
        scores = layers.Activation(
            classifier_activation, dtype="float32", name="predictions"
        )
        x = scores(x)
        if node_mask is not None and not pool:
            x = MaskNodes(dtype="float32", name="mask_nodes")(x, node_mask)
    else:
        x = graph_readout(
            x,
            node_mask,
            pool=pool,
            num_classes=num_classes,
            classifier_dims=classifier_dims,
            classifier_activation=classifier_activation,
            activation=activation,
            dropout=dropout,
        )
    return EdificeModel(inputs, x, name="gcn")
