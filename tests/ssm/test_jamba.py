import keras
import numpy as np
import pytest
from keras import ops

import keras_edifice
from tests.ssm.test_mamba import mixer, named_weights, rms_norm, silu
from tests.support.close import assert_close, difference, to_numpy
from tests.support.compiled import compiled
from tests.support.counting import count_weights
from tests.support.gradients import gradients
from tests.support.numerical import numerical_gradient
from tests.support.shaking import shake
from tests.support.streaming import stream

rng = np.random.default_rng(0)
WIDTH = 18
"""Features of the stream: enough for δ to have two, which its norm needs."""


def model(**options):
    keras.utils.set_random_seed(0)
    sizes = dict(embed_size=3, hidden_size=WIDTH, num_layers=2, attention_every=2)
    sizes |= dict(num_heads=3, num_kv_heads=1, head_dim=4, state_size=3, mlp_size=5)
    sizes |= dict(num_experts=3, dropout=0.0, norm_eps=1e-5)
    options = {**sizes, "window_size": None, "return_sequences": True, **options}
    return shake(keras_edifice.build("jamba", **options), 0.2)


def attention(x, w, heads=3):
    """All queries on one key and value head, no positions."""
    q, k, v = (x @ w[f"{name}/kernel"] for name in ("q", "k", "v"))
    outputs = []
    for query in np.split(q, heads, axis=-1):
        scores = query @ k.swapaxes(1, 2) / np.sqrt(k.shape[-1])
        scores = np.exp(np.where(np.tri(x.shape[1]), scores, -np.inf))
        outputs.append(scores / scores.sum(-1, keepdims=True) @ v)
    return np.concatenate(outputs, axis=-1) @ w["out/kernel"]


def swiglu(x, gate, up, down):
    return (silu(x @ gate) * (x @ up)) @ down


def feed_forward(x, w):
    return swiglu(x, *(w[f"{name}/kernel"] for name in ("gate", "up", "down")))


def experts(x, w):
    """The two most probable ones, with their probabilities as weights."""
    p = np.exp(x @ w["router/kernel"])
    p = p / p.sum(-1, keepdims=True)
    rank = np.argsort(np.argsort(-p))
    parts = zip(w["gate"], w["up"], w["down"], strict=True)
    return sum(
        np.where(rank[..., e] < 2, p[..., e], 0.0)[..., None] * swiglu(x, *part)
        for e, part in enumerate(parts)
    )


def reference(x, model):
    """The equations of the module for the sizes above, in float64."""
    x = x @ to_numpy(model.get_layer("embed").kernel)
    branches = {
        "mamba_0": lambda x, w: mixer(x, w, inner_norms=True),
        "ffn_0": feed_forward,
        "attention_1": attention,
        "experts_1": experts,
    }
    for name, branch in branches.items():
        gamma = to_numpy(model.get_layer(f"{name}_norm").gamma)
        x = x + branch(rms_norm(x, gamma), named_weights(model.get_layer(name)))
    return rms_norm(x, to_numpy(model.get_layer("final_norm").gamma))


def predict(model, x):
    return model.predict(x, verbose=0)


def inputs(length=9, features=3):
    return rng.normal(size=(2, length, features)).astype("float32")


def test_output_and_gradient_are_those_of_the_equation():
    built, x = model(), inputs(6)
    assert_close(predict(built, x), reference(to_numpy(x), built), 1e-4)
    _, by_input = gradients(built, x, lambda y: ops.sum(ops.square(y)))

    def value(z):
        return np.square(reference(z, built)).sum()

    assert difference(by_input, numerical_gradient(value, x)) < 1e-4


def kinds(**options):
    """The mixers and the feed-forwards of the layers in order, by their first letter.

    m is Mamba, a attention; f is the dense one, e that of experts.
    """
    sizes = dict(embed_size=4, hidden_size=4, num_heads=2, state_size=2, mlp_size=3)
    built = keras_edifice.build("jamba", **sizes, **options)
    own = {"mamba", "attention", "ffn", "experts"}
    names = [z.name.rpartition("_") for z in built.layers]
    return "".join(kind[0] for kind, _, number in names if kind in own and number)


def test_layers_follow_periods_and_offsets():
    assert kinds() == "mf ae mf me af me".replace(" ", "")
    eight = dict(num_layers=9, attention_every=8)
    assert kinds(**eight) == "mf me mf me af me mf me mf".replace(" ", "")
    ratio = dict(num_layers=4, attention_ratio=0.33, attention_offset=0)
    assert kinds(**ratio) == "af me mf ae".replace(" ", "")
    other = dict(num_layers=4, expert_every=3, expert_offset=0)
    assert kinds(**other) == "me af mf me".replace(" ", "")
    assert kinds(num_layers=2, num_experts=1) == "mfaf"


def test_attention_alone_does_not_know_the_order():
    built = model(num_layers=1, attention_every=1)
    assert [z.name for z in built.layers if "mamba" in z.name] == []
    x = inputs()
    shuffled = np.concatenate([x[:, [4, 0, 2, 1, 3, 6, 5, 7]], x[:, 8:]], axis=1)
    assert_close(predict(built, shuffled)[:, -1], predict(built, x)[:, -1])
    with_mamba = model()
    before, after = predict(with_mamba, x)[:, -1], predict(with_mamba, shuffled)[:, -1]
    assert difference(after, before) > 1e-3


@pytest.mark.parametrize("window", [None, 3])
def test_token_by_token_is_the_whole_sequence(window):
    built, x = model(attention_window=window), inputs()
    assert_close(stream(built, x), predict(built, x), 2e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(side):
    x, built = inputs(), model(return_sequences=False)
    valid = slice(4) if side == "right" else slice(5, None)
    mask = np.zeros((2, 9), "bool")
    mask[:, valid] = True
    mask = ops.convert_to_tensor(mask)
    y = compiled(lambda x: built(x, mask=mask))(ops.convert_to_tensor(x))
    assert_close(y, predict(built, x[:, valid]), 2e-5)


def test_the_routers_loss_is_part_of_training():
    experts_alone = dict(attention_every=1, expert_every=1, expert_offset=0)
    built, x = model(num_layers=1, router_aux_weight=0.5, **experts_alone), inputs()
    built.compile("sgd", "mean_squared_error")
    # The output is the target: what is left is the loss of the router.
    data = dict(x=x, y=predict(built, x), batch_size=2, verbose=0)
    layer = built.get_layer("experts_0")
    _, chosen, p = layer.route(predict(keras.Model(built.input, layer.input), x))
    share, mean = (to_numpy(z).mean((0, 1)) for z in (chosen, p))
    (found,) = built.fit(**data).history["loss"]
    assert_close(found, 0.5 * 3 * (share * mean).sum())


def test_initial_weights_are_normal():
    keras.utils.set_random_seed(0)
    built = keras_edifice.build(
        "jamba", embed_size=64, hidden_size=64, num_layers=1, attention_every=1
    )
    attends, ffn = built.get_layer("attention_0"), built.get_layer("ffn_0")
    for dense in (attends.q, attends.out, ffn.gate, ffn.down):
        assert abs(to_numpy(dense.kernel).std() - 0.02) < 0.002
    assert difference(attends.q.kernel, attends.k.kernel) > 1.0  # not one seed for all


def test_published_size():
    expected = 51_570_323_328
    counted = count_weights("jamba", vocab_size=65_536, variant="v0.1")
    assert counted == (expected, 0)
    idle = 16 * (16 - 2) * 3 * 4096 * 14_336  # layers, experts not taken, matrices
    assert round((expected - idle) / 1e9, 2) == 12.11


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(attention_offset=3), "attention_offset must be below attention_every"),
        (dict(expert_offset=2), "expert_offset must be below .*, received 2 and 2"),
        (dict(attention_ratio=0.0), "attention_ratio must be above 0"),
        (dict(num_experts=2, num_experts_per_token=3), "received 3 and 2"),
        (dict(num_heads=4, num_kv_heads=3), "multiple of num_kv_heads"),
    ],
)
def test_options_that_disagree_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        keras_edifice.build("jamba", embed_size=4, hidden_size=4, **options)
