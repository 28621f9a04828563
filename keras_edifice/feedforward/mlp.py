"""Multi-layer perceptron: a chain of dense layers.

    h_l = dropout(activation(norm(W_l h_{l-1} + b_l)))

With `residual`, h_{l-1} is added to the right side, through a linear map where the
widths differ (He et al. 2016, arXiv:1512.03385).
"""

from keras import Input

from keras_edifice.blocks.dense_stack import dense_stack
from keras_edifice.blocks.heads import class_scores
from keras_edifice.model import EdificeModel
from keras_edifice.options import Activation, Rate, Size
from keras_edifice.registry import architecture


@architecture(
    paper="Rumelhart et al. 1986, Learning representations by back-propagating errors, "
    "Nature 323",
    kind="vector",
    inputs="(batch, input_size)",
    outputs="(batch, num_classes | hidden_sizes[-1])",
    tiny=dict(input_size=5, hidden_sizes=[8, 6], layer_norm=True, residual=True),
)
def mlp(
    *,
    input_size: Size,
    hidden_sizes: list[Size] = [512, 512],
    activation: Activation = "relu",
    dropout: Rate = 0.1,
    layer_norm: bool = False,
    residual: bool = False,
    temporal: bool = False,
    window_size: Size | None = 60,
    num_classes: Size | None = None,
    classifier_activation: Activation | None = "softmax",
) -> EdificeModel:
    """Dense layers in sequence, optionally normalised and residual.

    Args:
        input_size: features of each example.
        hidden_sizes: width of each dense layer.
        activation: after each dense layer.
        dropout: rate after each activation, in training.
        layer_norm: normalise before each activation.
        residual: each layer adds its input, projected where the widths differ.
        temporal: take (batch, window_size, input_size) and look at the last frame.
        window_size: frames of a temporal input, None for any number.
        num_classes: classes of the head; None gives the features.
        classifier_activation: of the head; None gives logits.
    """
    if temporal:
        inputs = Input((window_size, input_size), name="inputs")
        x = inputs[:, -1]
    else:
        x = inputs = Input((input_size,), name="inputs")
    x = dense_stack(x, hidden_sizes, activation, dropout, layer_norm, residual)
    if num_classes is not None:
        x = class_scores(x, num_classes, classifier_activation)
    return EdificeModel(inputs, x, name="mlp")
