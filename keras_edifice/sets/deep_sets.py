"""Deep Sets: functions of a set, which do not depend on the order of its elements.

    y = ρ(pool_i φ(x_i))

φ and ρ are dense networks, φ the same for every element. `equivariant_layers` let the
elements see each other in φ and keep their order: with pool = max or mean,

    kind 1:  y_i = Γ (x_i - pool_j x_j) + b
    kind 2:  y_i = Γ x_i + b - Λ pool_j x_j
"""

from typing import Literal

from keras import Input, layers, ops

from keras_edifice.blocks.dense import Dense
from keras_edifice.blocks.set_pooling import SetPooling
from keras_edifice.model import EdificeModel
from keras_edifice.options import Activation, Count, Rate, Size
from keras_edifice.registry import architecture


@architecture(
    paper="Zaheer et al. 2017, Deep Sets, arXiv:1703.06114",
    kind="set",
    inputs={"elements": "(batch, elements, input_dim)"},
    outputs="(batch, output_dim)",
    tiny=dict(
        input_dim=3,
        hidden_dim=8,
        output_dim=4,
        phi_sizes=[6],
        rho_sizes=[6],
        activation="tanh",
        equivariant_layers=2,
    ),
    variants={
        "modelnet40": dict(
            input_dim=3,
            hidden_dim=256,
            output_dim=40,
            phi_sizes=[],
            rho_sizes=[256],
            activation="elu",
            dropout=0.5,
            pool="mean",
            equivariant_layers=3,
        ),
    },
)
def deep_sets(
    *,
    input_dim: Size,
    hidden_dim: Size = 64,
    output_dim: Size = 64,
    phi_sizes: list[Size] = [64, 64],
    rho_sizes: list[Size] = [64],
    activation: Activation = "relu",
    dropout: Rate = 0.0,
    pool: Literal["sum", "mean", "max"] = "sum",
    mode: Literal["invariant", "equivariant"] = "invariant",
    equivariant_layers: Count = 0,
    equivariant_kind: Literal[1, 2] = 2,
    equivariant_pool: Literal["max", "mean"] = "max",
    use_mask: bool = False,
) -> EdificeModel:
    """A dense network for each element, a pooling, and a dense network for the set.

    Args:
        input_dim: features of each element.
        hidden_dim: width of φ's result, which is pooled.
        output_dim: width of the result.
        phi_sizes: width of each dense layer at the start of φ.
        rho_sizes: width of each dense layer of ρ before the last.
        activation: after each dense and each equivariant layer but the last.
        dropout: rate before each dense layer of ρ, in training.
        pool: how φ of the elements becomes one vector. For large sets take the mean:
            a sum grows with their number.
        mode: "equivariant" gives a result for each element: ρ acts on each of them, and
            its last layer is equivariant instead of dense.
        equivariant_layers: layers of width hidden_dim at the end of φ that see the
            whole set, in place of its last dense layer.
        equivariant_kind: 2 has a map for the pooled elements of its own, 1 has not.
        equivariant_pool: what an equivariant layer sees of the whole set.
        use_mask: a second input `set_mask` (batch, elements): 1 for the elements, 0 for
            padding, which has no influence and gives zeros.
    """
    elements = Input((None, input_dim), name="elements")
    set_mask = Input((None,), name="set_mask") if use_mask else None

    def equivariant(x, units, name, **kwargs):
        pooling = SetPooling(equivariant_pool, keepdims=True, name=f"{name}_pool")
        gamma = Dense(units, name=f"{name}_gamma", **kwargs)
        pooled = pooling(x, set_mask=set_mask)  # (batch, 1, features)
        if equivariant_kind == 1:
            return gamma(x - pooled)
        own = Dense(units, use_bias=False, name=f"{name}_lambda", **kwargs)
        return gamma(x) - own(pooled)

    x = elements
    for i, size in enumerate(phi_sizes):
        x = Dense(size, activation=activation, name=f"phi_{i}")(x)
    for i in range(equivariant_layers):
        x = equivariant(x, hidden_dim, f"equivariant_{i}")
        x = layers.Activation(activation, name=f"equivariant_{i}_activation")(x)
    if not equivariant_layers:
        x = Dense(hidden_dim, name="phi")(x)
    if mode == "invariant":
        x = SetPooling(pool, name="pool")(x, set_mask=set_mask)

    for i, size in enumerate(rho_sizes):
        if dropout:
            x = layers.Dropout(dropout, name=f"dropout_{i}")(x)
        x = Dense(size, activation=activation, name=f"rho_{i}")(x)
    if dropout:
        x = layers.Dropout(dropout, name="dropout")(x)
    if mode == "invariant":
        x = Dense(output_dim, dtype="float32", name="rho")(x)
    else:
        x = equivariant(x, output_dim, "rho", dtype="float32")
        if use_mask:
            x = ops.where(ops.expand_dims(set_mask, -1) > 0.5, x, 0.0)
    inputs = dict(elements=elements, set_mask=set_mask) if use_mask else elements
    return EdificeModel(inputs, x, name="deep_sets")
