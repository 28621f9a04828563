import keras
import numpy as np
import pytest
from keras import ops

from keras_edifice.blocks.feed_forward import GatedFFN
from keras_edifice.blocks.mixture_of_experts import MixtureOfExperts
from tests.support.close import assert_close, difference, to_numpy
from tests.support.compiled import compiled
from tests.support.gradients import gradients
from tests.support.numerical import numerical_gradient
from tests.support.shaking import shake

rng = np.random.default_rng(0)
NAMES = ("router", "gate", "up", "down")


def layer(experts=4, features=4, **options):
    keras.utils.set_random_seed(0)
    built = MixtureOfExperts(experts, **{"hidden_size": 5, **options})
    built.build((None, None, features))
    return shake(built, 1.0)


def weights(built):
    kernels = (built.router.kernel, built.gate, built.up, built.down)
    return dict(zip(NAMES, map(to_numpy, kernels), strict=True))


def inputs(features=4):
    return rng.normal(size=(2, 5, features)).astype("float32")


def probabilities(x, w):
    logits = np.exp(x @ w["router"])
    return logits / logits.sum(-1, keepdims=True)


def reference(x, w, k=2, normalize=False):
    """The equations of the module, token by token in float64."""
    y, p = np.zeros(x.shape), probabilities(x, w)
    for place in np.ndindex(x.shape[:-1]):
        best = np.argsort(-p[place])[:k]
        for e in best:
            gate, up = x[place] @ w["gate"][e], x[place] @ w["up"][e]
            expert = (gate / (1 + np.exp(-gate)) * up) @ w["down"][e]
            total = p[place][best].sum() if normalize else 1.0
            y[place] += p[place][e] / total * expert
    return y


@pytest.mark.parametrize("options", [dict(), dict(k=1), dict(k=3, normalize=True)])
def test_output_is_the_equation(options):
    built, x = layer(**options), inputs()
    assert_close(built(x), reference(to_numpy(x), weights(built), **options))
    assert_close(built(x[:, 0]), built(x)[:, 0], 1e-6)  # a token of a stream


def test_gradient_is_that_of_the_equation():
    built, x = layer(), inputs()
    by_weight, by_input = gradients(built, x, lambda y: ops.sum(ops.square(y)))
    found = {
        v.path.removeprefix(f"{built.path}/").partition("/")[0]: g
        for v, g in zip(built.trainable_variables, by_weight, strict=True)
    }
    w, exact = weights(built), to_numpy(x)
    expected = numerical_gradient(lambda z: np.square(reference(z, w)).sum(), exact)
    assert difference(by_input, expected) < 1e-4
    for name in NAMES:

        def value(z, name=name):
            return np.square(reference(exact, {**w, name: z})).sum()

        assert difference(found[name], numerical_gradient(value, w[name])) < 1e-4, name


def test_exactly_k_experts_share_at_most_the_whole_weight_of_a_token():
    for normalize in (False, True):
        built = layer(experts=6, k=3, normalize=normalize)
        gates, chosen, p = (to_numpy(z) for z in built.route(inputs()))
        assert (((gates > 0) == (chosen > 0)).sum(-1) == 6).all()
        assert ((gates > 0).sum(-1) == 3).all()
        if normalize:
            assert_close(gates.sum(-1), np.ones((2, 5)), 1e-6)
        else:
            assert (gates.sum(-1) < 1).all()
            assert_close(gates, p * chosen, 1e-6)


def test_the_order_of_the_experts_does_not_matter():
    built, x, order = layer(), inputs(), [2, 0, 3, 1]
    before = to_numpy(built(x))
    built.router.kernel.assign(ops.take(built.router.kernel, order, axis=1))
    for kernel in (built.gate, built.up, built.down):
        kernel.assign(ops.take(kernel, order, axis=0))
    assert_close(built(x), before, 1e-6)


def test_experts_that_agree_are_one_gated_feed_forward():
    built, x = layer(normalize=True), inputs()
    dense = GatedFFN(5)
    dense.build((None, None, 4))
    kernels = [to_numpy(w)[0] for w in (built.gate, built.up, built.down)]
    dense.set_weights(kernels)
    for weight, kernel in zip((built.gate, built.up, built.down), kernels, strict=True):
        weight.assign(np.stack([kernel] * 4))
    assert_close(built(x), dense(x))


def balance(built, x, **options):
    built(x, training=True, **options)
    (loss,) = built.losses
    return float(ops.convert_to_numpy(loss))


def test_the_loss_is_smallest_for_equal_probabilities():
    built, x = layer(balance_weight=0.5), inputs()
    uneven = balance(built, x)
    w = weights(built)
    p = probabilities(to_numpy(x), w).reshape(-1, 4)
    chosen = np.argsort(np.argsort(-p)) < 2
    assert_close(uneven, 0.5 * 4 * (chosen.mean(0) * p.mean(0)).sum())
    built.router.kernel.assign(np.zeros((4, 4), "float32"))
    assert_close(balance(built, x), 0.5 * 2)
    assert uneven > 1.0
    built.router.kernel.assign(np.eye(4, dtype="float32") * [50, 40, 0, 0])
    assert_close(balance(built, np.ones_like(x)), 0.5 * 4)  # all to one pair


def test_the_loss_is_of_training_and_of_tokens_that_count():
    built, x = layer(balance_weight=0.5), inputs()
    mask = np.arange(5)[None].repeat(2, 0) < 3
    masked = balance(built, x, mask=ops.convert_to_tensor(mask))
    assert_close(masked, balance(built, x[:, :3]))
    built(x)
    assert not built.losses
    unweighted = layer()
    unweighted(x, training=True)
    assert not unweighted.losses


def test_initial_weights_are_normal():
    built = MixtureOfExperts(8, hidden_size=32, stddev=0.1)
    built.build((None, None, 32))
    for name, kernel in weights(built).items():
        assert abs(kernel.std() - 0.1) < 0.02, name


def test_half_precision_stays_near():
    half, full = (layer(dtype=d) for d in ("mixed_bfloat16", "float32"))
    half.set_weights(full.get_weights())
    x = inputs() * 0.5
    y = compiled(half)(ops.convert_to_tensor(x))
    assert keras.backend.standardize_dtype(y.dtype) == "bfloat16"
    # bfloat16 keeps 8 bits, in three matrices after each other.
    assert difference(ops.cast(y, "float32"), full(x)) < 0.05


def test_config_keeps_the_arguments():
    options = dict(
        num_experts=3,
        k=1,
        hidden_size=5,
        activation="gelu",
        normalize=True,
        balance_weight=0.1,
        stddev=0.3,
    )
    config = MixtureOfExperts(**options).get_config()
    assert {name: config[name] for name in options} == options


@pytest.mark.parametrize("k", [0, 4])
def test_more_choices_than_experts_are_refused(k):
    with pytest.raises(ValueError, match=f"from 1 to num_experts, received {k} and 3"):
        MixtureOfExperts(3, k)
