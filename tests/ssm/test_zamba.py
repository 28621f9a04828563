import math

import keras
import numpy as np
import pytest
from keras import ops

import keras_edifice
from keras_edifice.ssm.zamba import MultiHeadMamba, ProjectedAttention
from tests.ssm.test_mamba import mixer, named_weights, rms_norm
from tests.ssm.test_mamba_ssd import mixer as mixer_2
from tests.support.close import assert_close, difference, to_numpy
from tests.support.compiled import compiled
from tests.support.counting import count_weights
from tests.support.gradients import gradients
from tests.support.numerical import numerical_gradient
from tests.support.shaking import shake
from tests.support.streaming import stream

rng = np.random.default_rng(0)
SIZES = dict(embed_size=3, hidden_size=4, num_layers=2, attention_layers=[0, 1])
SIZES |= dict(num_heads=2, state_size=3, mlp_size=5, dropout=0.0)
SECOND = dict(version=2, num_shared_blocks=2, adapter_rank=1)
SECOND |= dict(attention_adapters=True, use_rope=True)
PUBLISHED = {"7b": 7_232_490_496, "2.7b": 2_662_214_560}


def model(**options):
    keras.utils.set_random_seed(0)
    options = {**SIZES, "window_size": None, "return_sequences": True, **options}
    return shake(keras_edifice.build("zamba", **options))


def kernel(model, name):
    return to_numpy(model.get_layer(name).kernel)


def gelu(x):
    return x * (1 + np.vectorize(math.erf)(x / np.sqrt(2))) / 2


def heads_of_mamba(u, w, heads=2):
    """The heads one by one: each is the mixer of Mamba on a part of the matrices."""
    ins = np.split(w["in_proj/kernel"], heads, axis=1)
    outs = np.split(w["out_proj/kernel"], heads, axis=0)
    total = 0.0
    for j in range(heads):
        own = {"in_proj/kernel": ins[j], "out_proj/kernel": outs[j]}
        for name, value in w.items():
            if name.startswith(f"head_{j}/"):
                own[name.removeprefix(f"head_{j}/")] = value
        total = total + mixer(u, own)
    return total


def turned(x):
    """Pairs of features of each head, turned by their position."""
    angles = np.arange(x.shape[1])[:, None] / 10_000 ** np.arange(0, 1, 2 / x.shape[-1])
    a, b = np.split(x, 2, axis=-1)
    cos, sin = np.cos(angles), np.sin(angles)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def attention(q, k, v, rope, heads=2):
    outputs, turn = [], turned if rope else np.array
    for part in np.split(np.arange(q.shape[-1]), heads):
        query, key = turn(q[..., part]), turn(k[..., part])
        scores = query @ key.swapaxes(1, 2) / np.sqrt(len(part) / 2)
        scores = np.exp(np.where(np.tri(q.shape[1]), scores, -np.inf))
        outputs.append(scores / scores.sum(-1, keepdims=True) @ v[..., part])
    return np.concatenate(outputs, axis=-1)


def shared(x, x_0, model, block, i, second):
    """F, with the adapters of layer i."""

    def dense(name, u, adapter):
        y = u @ kernel(model, f"{block}_{name}")
        if second:
            narrow = u @ kernel(model, f"{adapter}_adapter_{i}_in")
            y = y + narrow @ kernel(model, f"{adapter}_adapter_{i}_out")
        return y

    gamma = to_numpy(model.get_layer(f"{block}_norm").gamma)
    u = rms_norm(np.concatenate([x, x_0], axis=-1), gamma)
    qkv = (dense(name, u, name) for name in ("q", "k", "v"))
    u = attention(*qkv, rope=second) @ kernel(model, f"{block}_out")
    u = rms_norm(u, to_numpy(model.get_layer(f"{block}_mlp_norm").gamma))
    gate, value = np.split(dense("gate_up", u, "gate_up"), 2, axis=-1)
    return (gelu(gate) * value) @ kernel(model, f"{block}_down")


def reference(x, model, second=False):
    """The equations of the module for the sizes above, in float64."""
    x = x_0 = x @ kernel(model, "embed")
    for i in range(2):
        block = f"shared_{i}" if second else "shared_0"
        t = shared(x, x_0, model, block, i, second)
        y = x + t @ kernel(model, f"linear_{i}")
        y = rms_norm(y, to_numpy(model.get_layer(f"mamba_{i}_norm").gamma))
        w = named_weights(model.get_layer(f"mamba_{i}"))
        x = x + (mixer_2 if second else heads_of_mamba)(y, w)
    return rms_norm(x, to_numpy(model.get_layer("final_norm").gamma))


def run(layer, x, **options):
    """The call of a layer with options that are no arrays to be traced."""
    return compiled(lambda x: layer(x, **options))(ops.convert_to_tensor(x))


def predict(model, x):
    return model.predict(x, verbose=0)


def inputs(length=9, features=3):
    return rng.normal(size=(2, length, features)).astype("float32")


def copied(source, target):
    """The target with the weights of layers of the same name, and which it has not."""
    names = {z.name for z in source.layers}
    for layer in target.layers:
        if layer.name in names:
            layer.set_weights(source.get_layer(layer.name).get_weights())
    return target


@pytest.mark.parametrize("second", [False, True])
def test_output_is_the_equation(second):
    built, x = model(**(SECOND if second else {})), inputs()
    expected = reference(to_numpy(x), built, second)
    assert_close(predict(built, x), expected, 1e-4)


def test_gradient_is_that_of_the_equation():
    built, x = model(), inputs(4)
    _, by_input = gradients(built, x, lambda y: ops.sum(ops.square(y)))

    def value(z):
        return np.square(reference(z, built)).sum()

    assert difference(by_input, numerical_gradient(value, x)) < 1e-4


def test_a_use_more_costs_its_linear_map_and_its_adapters():
    def count(places, **options):
        sizes = {**SIZES, "attention_layers": places, **options}
        return count_weights("zamba", **sizes)[0]

    rank, width, mlp = 2, 4, 5
    assert count([0, 1]) - count([0]) == width**2
    adapted = width**2 + rank * (width + 2 * mlp)
    assert count([0, 1], adapter_rank=rank) - count([0], adapter_rank=rank) == adapted
    all_adapted = dict(adapter_rank=rank, attention_adapters=True)
    adapted += 3 * rank * (2 * width + 2 * width)
    assert count([0, 1], **all_adapted) - count([0], **all_adapted) == adapted


def test_the_gradient_of_the_shared_weights_is_the_sum_over_its_uses():
    tied, untied = (model(num_shared_blocks=n, num_mamba_heads=1) for n in (1, 2))
    copied(tied, untied)
    for layer in untied.layers:
        if layer.name.startswith("shared_1_"):
            other = tied.get_layer(layer.name.replace("shared_1", "shared_0"))
            layer.set_weights(other.get_weights())
    x, found = inputs(4), {}
    for name, built in (("tied", tied), ("untied", untied)):
        by_weight, _ = gradients(built, x, lambda y: ops.sum(ops.square(y)))
        for variable, gradient in zip(
            built.trainable_variables, by_weight, strict=True
        ):
            found[name, variable.path] = gradient
    paths = [path for name, path in found if name == "tied" and "shared_0" in path]
    assert len(paths) == 8
    for path in paths:
        parts = found["untied", path], found["untied", path.replace("d_0", "d_1")]
        assert all(np.abs(part).max() > 0 for part in parts)
        assert_close(found["tied", path], sum(parts), 1e-4)


def test_without_the_shared_block_it_is_a_stack_of_mamba():
    built, x = model(), inputs()
    plain = copied(built, model(attention_layers=[]))
    assert not [z for z in plain.layers if z.name.startswith(("shared", "linear"))]
    assert difference(predict(built, x), predict(plain, x)) > 1e-2
    built.get_layer("shared_0_down").kernel.assign(np.zeros((5, 4)))
    assert_close(predict(built, x), predict(plain, x), 1e-6)


def test_a_linear_map_of_zeros_removes_its_use():
    built, x = model(), inputs()
    once = copied(built, model(attention_layers=[0]))
    assert difference(predict(built, x), predict(once, x)) > 1e-2
    built.get_layer("linear_1").kernel.assign(np.zeros((4, 4)))
    assert_close(predict(built, x), predict(once, x), 1e-6)


@pytest.mark.parametrize("options", [dict(), SECOND], ids=["first", "second"])
def test_token_by_token_is_the_whole_sequence(options):
    built, x = model(**options), inputs()
    assert_close(stream(built, x), predict(built, x), 2e-5)
    state = keras_edifice.streaming(built, max_length=9).initial_state(1)
    caches = {name for name, part in state.items() if part.ndim == 4}
    places = {name.rpartition("_")[0] for name in caches if "attention" in name}
    assert places == {"attention_0", "attention_1"}  # each use has its own


def test_attention_layers_follow_period_and_offset():
    def places(**options):
        built = keras_edifice.build("zamba", embed_size=4, hidden_size=4, **options)
        names = [z.name for z in built.layers]
        return [i for i in range(8) if f"linear_{i}" in names]

    small = dict(num_heads=2, state_size=2)
    assert places(**small) == [2, 5]
    assert places(**small, attention_every=4, attention_offset=1) == [1, 5]
    assert places(**small, attention_layers=[4, 0]) == [0, 4]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(side):
    x, built = inputs(), model(return_sequences=False)
    valid = slice(4) if side == "right" else slice(5, None)
    mask = np.zeros((2, 9), "bool")
    mask[:, valid] = True
    y = run(built, x, mask=ops.convert_to_tensor(mask))
    assert_close(y, predict(built, x[:, valid]), 2e-5)


def test_segments_with_the_carried_state_are_one_pass():
    mamba, x = MultiHeadMamba(4, state_size=3), inputs(features=4)
    mamba.build((None, None, 4))
    shake(mamba)
    first, state = run(mamba, x[:, :4], return_state=True)
    second, state = run(mamba, x[:, 4:], initial_state=state, return_state=True)
    whole, expected = run(mamba, x, return_state=True)
    assert_close(ops.concatenate([first, second], axis=1), whole)
    for part, whole_part in zip(
        *map(keras.tree.flatten, (state, expected)), strict=True
    ):
        assert_close(part, whole_part)


def test_saving_keeps_one_set_of_shared_weights(tmp_path):
    built = model()
    built.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert [w.path for w in loaded.weights] == [w.path for w in built.weights]
    assert len(loaded.get_layer("shared_0_q")._inbound_nodes) == 2


@pytest.mark.parametrize("variant", PUBLISHED)
def test_published_sizes(variant):
    counted = count_weights("zamba", vocab_size=32_000, variant=variant)
    assert counted == (PUBLISHED[variant], 0)


def test_configs_keep_the_arguments():
    options = dict(num_heads=4, state_size=5, expand_factor=3, conv_size=2, depth=3)
    config = MultiHeadMamba(**options).get_config()
    assert {name: config[name] for name in options} == options
    options = dict(num_heads=4, scale=0.5, rotary={"base": 100.0}, max_length=9)
    config = ProjectedAttention(**options).get_config()
    assert {name: config[name] for name in options} == options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(attention_offset=3), "attention_offset must be below attention_every"),
        (dict(attention_layers=[6]), r"below num_layers, 6, received \[6\]"),
        (dict(num_heads=3), "multiple of num_heads, received 8 and 3"),
        (dict(num_mamba_heads=3), "num_mamba_heads, received 8 and 3"),
        (dict(num_mamba_heads=3, version=2), "num_mamba_heads, received 8 and 3"),
    ],
)
def test_options_that_disagree_are_refused(options, message):
    options = {"num_heads": 2, **options}
    with pytest.raises(ValueError, match=message):
        keras_edifice.build("zamba", embed_size=4, hidden_size=4, **options)
