import keras
import numpy as np
import pytest
from keras import ops

from keras_edifice.ops import decay_products as module
from keras_edifice.ops.decay_products import (
    by_positions,
    causal,
    channel_products,
    head_products,
)
from keras_edifice.ops.tracing import export_scope
from tests.support.close import assert_close, to_numpy
from tests.support.compiled import compiled

rng = np.random.default_rng(0)


def log_decays(channels):
    """Of 16 steps: weak ones after strong ones, none at all and total ones."""
    decays = -rng.exponential(size=(2, 3, 16, channels))
    decays[:, :, 2], decays[:, :, 5], decays[:, :, 9] = 0.0, -1e4, -np.inf
    return decays.astype("float32")


def between(log_decay):
    """D_ij for every channel, (..., c, c, d), by sums in float64."""
    decay = np.asarray(log_decay, "float64")
    products = np.zeros((*decay.shape[:-1], decay.shape[-2], decay.shape[-1]))
    for i in range(decay.shape[-2]):
        for j in range(i + 1):
            total = decay[..., j + 1 : i + 1, :].sum(-2)
            products[..., i, j, :] = np.exp(total)
    return products


@pytest.fixture(params=["known", "open"])
def length(request, monkeypatch):
    """The length is known, or an exporter does not know it."""
    if request.param == "open":
        monkeypatch.setattr(module, "static_length", lambda x, axis: None)
        monkeypatch.setattr(module, "LONGEST", 16)
    return request.param


def test_weights_are_the_decays_between_two_steps(length):
    log_decay = log_decays(1)

    def products(log_decay):
        found = head_products(log_decay)
        return found.before, found.after, found.weights()

    before, after, weights = compiled(products)(ops.convert_to_tensor(log_decay))
    expected = between(log_decay)[..., 0]
    assert_close(weights, expected, 2e-6)
    assert_close(after[..., 0], expected[..., -1, :], 2e-6)
    first = np.exp(log_decay[..., :1, 0].astype("float64"))
    assert_close(before[..., 0], first * expected[..., 0], 2e-6)


def test_scores_weigh_every_channel(length):
    log_decay = log_decays(4)
    q, k = rng.normal(size=(2, *log_decay.shape)).astype("float32")

    def products(log_decay, q, k):
        found = channel_products(log_decay)
        return found.before, found.after, found.scores(q, k)

    tensors = [ops.convert_to_tensor(x) for x in (log_decay, q, k)]
    before, after, scores = compiled(products)(*tensors)
    expected = between(log_decay)
    assert_close(scores, np.einsum("...id,...jd,...ijd->...ij", q, k, expected))
    assert_close(after, expected[..., -1, :, :], 2e-6)
    first = np.exp(log_decay[..., :1, :].astype("float64"))
    assert_close(before, first * expected[..., 0, :], 2e-6)


def test_causal_pairs_look_back(length):
    found = causal(ops.zeros((2, 5, 3)))
    assert (to_numpy(found) == np.tril(np.ones((5, 5)))).all()


def test_known_lengths_are_split_unless_an_exporter_refuses():
    x = ops.zeros((2, 4, 3))
    assert not by_positions(x, 1)
    with export_scope("saved_model"):
        assert not by_positions(x, 1)
    with export_scope("onnx"):
        assert by_positions(x, 1) == (keras.backend.backend() != "tensorflow")
