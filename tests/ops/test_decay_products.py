import numpy as np
import pytest
from keras import ops

from keras_edifice.ops import decay_products as module
from keras_edifice.ops.decay_products import causal, channel_products, head_products
from tests.support.close import assert_close

rng = np.random.default_rng(0)


def log_decays(steps, channels):
    """Weak, strong and none at all, one after the other."""
    g = -rng.uniform(0, 1, size=(2, steps, channels))
    g[:, ::3] *= 60.0
    g[:, 1::5] = 0.0
    return g.astype("float32")


def decay(g):
    """D of the module, sums in float64: (..., c, d) -> (..., c, c, d)."""
    g = g.astype("float64")
    steps = g.shape[-2]
    D = np.zeros((*g.shape[:-2], steps, steps, g.shape[-1]))
    for i in range(steps):
        for j in range(i + 1):
            D[..., i, j, :] = np.exp(g[..., j + 1 : i + 1, :].sum(-2))
    return D


@pytest.fixture(params=[False, True], ids=["blocks", "positions"])
def open_form(request, monkeypatch):
    """Whether the form for an unknown length is taken."""
    if request.param:
        monkeypatch.setattr(module, "by_positions", lambda x, axis: True)
    return request.param


@pytest.mark.parametrize("steps", [1, 2, 16])
def test_decays_of_a_head(steps, open_form):
    g = log_decays(steps, 1)
    products, D = head_products(ops.convert_to_tensor(g)), decay(g)[..., 0]
    assert_close(products.weights(), D)
    assert_close(products.before, np.exp(np.cumsum(g.astype("float64"), -2)))
    assert_close(products.after[..., 0], D[:, -1])


@pytest.mark.parametrize("steps", [1, 2, 16])
def test_scores_of_channels(steps, open_form):
    g = log_decays(steps, 3)
    q, k = rng.normal(size=(2, 2, steps, 3)).astype("float32")
    products = channel_products(ops.convert_to_tensor(g))
    expected = np.einsum("bid,bjd,bijd->bij", q, k, decay(g))
    assert_close(products.scores(*map(ops.convert_to_tensor, (q, k))), expected)
    assert_close(products.before, np.exp(np.cumsum(g.astype("float64"), -2)))
    assert_close(products.after, decay(g)[:, -1])


def test_gradients_of_the_scores():
    g = log_decays(8, 3)
    q, k = rng.normal(size=(2, 2, 8, 3)).astype("float32")
    by_scores = rng.normal(size=(2, 8, 8)).astype("float32")
    products = channel_products(ops.convert_to_tensor(g))
    by_q, by_k = products.scores_gradient(
        *map(ops.convert_to_tensor, (q, k, by_scores))
    )
    D = decay(g)
    assert_close(by_q, np.einsum("bij,bjd,bijd->bid", by_scores, k, D))
    assert_close(by_k, np.einsum("bij,bid,bijd->bjd", by_scores, q, D))


def test_no_decay_that_underflows_spoils_the_others(open_form):
    g = np.zeros((1, 8, 1), "float32")
    g[:, 3] = -1e4
    weights = head_products(ops.convert_to_tensor(g)).weights()
    assert_close(weights, decay(g)[..., 0], 1e-6)


def test_causal_is_the_lower_triangle():
    x = ops.zeros((1, 4, 2))
    assert_close(ops.cast(causal(x), "float32"), np.tril(np.ones((4, 4))), 0)
