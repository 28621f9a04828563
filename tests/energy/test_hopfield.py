import keras
import numpy as np
import pytest

import keras_edifice
from keras_edifice.energy.hopfield import (
    Hopfield,
    HopfieldLayer,
    HopfieldMemory,
    HopfieldPooling,
    associate,
    energy,
)
from tests.support.close import assert_close, difference, to_numpy
from tests.support.gradients import gradients
from tests.support.numerical import numerical_gradient
from tests.support.shaking import shake

rng = np.random.default_rng(0)


def normal(*shape, scale=1.0):
    return (scale * rng.normal(size=shape)).astype("float32")


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def norm(x, gamma=1.0, beta=0.0):
    d = x - x.mean(-1, keepdims=True)
    return gamma * d / np.sqrt((d**2).mean(-1, keepdims=True) + 1e-5) + beta


def reference(layer, state, stored, values=None, mask=None):
    """Eq. 10 in float64: a loop over examples, heads and states."""

    def dense(x, name):
        kernel, bias = (to_numpy(w) for w in getattr(layer, name).weights)
        return x @ kernel + bias

    def normalise(x, name):
        if not layer.normalize or not hasattr(layer, name):
            return x
        return norm(x, *(to_numpy(w) for w in getattr(layer, name).weights))

    values = stored if values is None else values
    state, stored, values = (to_numpy(x) for x in (state, stored, values))
    q = dense(normalise(state, "state_norm"), "state_map")
    k = dense(normalise(stored, "stored_norm"), "stored_map")
    v = dense(normalise(values, "values_norm"), "values_map")
    heads, width = layer.num_heads, layer.hidden_dim // layer.num_heads
    beta = layer.beta or 1 / np.sqrt(width)
    read = np.zeros(q.shape)
    for b, t, h in np.ndindex(q.shape[0], q.shape[1], heads):
        part = slice(h * width, (h + 1) * width)
        kept = slice(None) if mask is None else mask[b] > 0
        xi, patterns = q[b, t, part], k[b % len(k)][kept, part]
        if layer.normalize_association:
            xi, patterns = norm(xi), norm(patterns)
        p = softmax(beta * patterns @ xi)
        steps = layer.max_updates if layer.update_steps is None else layer.update_steps
        for _ in range(steps):
            old, p = p, softmax(beta * patterns @ (patterns.T @ p))
            converged = np.linalg.norm(p - old) <= layer.update_eps
            if layer.update_steps is None and converged:
                break
        read[b, t, part] = p @ v[b % len(v)][kept, part]
    return dense(read, "output_map")


def built(layer, *inputs):
    keras.utils.set_random_seed(0)
    layer.build(*(x.shape for x in inputs))
    return shake(layer)


FORMS = {
    "attention": dict(num_heads=2),
    "two updates": dict(num_heads=2, update_steps=2, beta=0.8),
    "converged": dict(num_heads=2, update_steps=None, beta=1.5, update_eps=1e-2),
    "association": dict(num_heads=2, update_steps=1, normalize_association=True),
    "bare": dict(normalize=False, update_steps=1),
}


@pytest.mark.parametrize("form", FORMS)
def test_layer_is_the_equation(form):
    state, stored = normal(2, 3, 5), normal(2, 7, 4)
    layer = built(Hopfield(8, output_dim=6, **FORMS[form]), state, stored)
    y = layer(state, stored)
    assert y.shape == (2, 3, 6)
    assert_close(y, reference(layer, state, stored))


@pytest.mark.parametrize("form", ["two updates", "association"])
def test_gradient_is_that_of_the_equation(form):
    inputs = keras.Input((None, 5)), keras.Input((None, 4))
    layer = Hopfield(8, output_dim=6, **FORMS[form])
    model = shake(keras.Model(list(inputs), layer(*inputs)))
    state, stored = normal(1, 2, 5), normal(1, 4, 4)
    _, by_state = gradients(
        model, [state, stored], lambda y: keras.ops.sum(keras.ops.square(y))
    )
    expected = numerical_gradient(
        lambda x: np.square(reference(layer, x, stored)).sum(), state
    )
    assert_close(by_state, expected, 1e-4)


@pytest.mark.parametrize("steps", [0, 2])
def test_masked_patterns_are_not_there(steps):
    state, stored = normal(2, 3, 4), normal(2, 7, 4)
    mask = np.array([[1, 1, 1, 1, 1, 0, 0], [1, 0, 1, 0, 1, 1, 1]], "float32")
    layer = built(Hopfield(8, num_heads=2, update_steps=steps), state, stored)
    y = layer(state, stored, stored_mask=mask)
    assert_close(y, reference(layer, state, stored, mask=mask))
    changed = np.where(mask[..., None] > 0, stored, 50.0)
    assert_close(layer(state, changed, stored_mask=mask), y, 1e-6)
    assert_close(layer(state[:1], stored[:1, :5]), y[:1])


def test_stored_patterns_may_come_in_any_order():
    state, stored = normal(2, 3, 4), normal(2, 7, 4)
    layer = built(Hopfield(8, update_steps=1), state, stored)
    assert_close(layer(state, stored[:, ::-1].copy()), layer(state, stored))


def patterns(number=6, width=16):
    return normal(number, width)


@pytest.mark.parametrize("beta", [0.2, 1.0, 4.0])
def test_energy_is_the_equation_and_never_rises(beta):
    x, state = patterns().astype("float64"), normal(1, 5, 16, scale=2.0)
    memory = HopfieldMemory(10, beta=beta)
    memory.build((None, 16))
    memory.store(x)

    def equation(xi):
        lse = np.log(np.exp(beta * xi @ x.T).sum(-1)) / beta
        largest = 0.5 * np.square(x).sum(-1).max()
        return 0.5 * np.square(xi).sum(-1) - lse + np.log(len(x)) / beta + largest

    energies = [to_numpy(memory.energy(state[0]))]
    assert_close(energies[0], equation(to_numpy(state[0])))
    for _ in range(6):
        state = to_numpy(memory.retrieve(state, steps=1))
        energies += [to_numpy(memory.energy(state[0].astype("float32")))]
        assert_close(energies[-1], equation(state[0]), 1e-4)
    falls = -np.diff(energies, axis=0)
    assert (falls > -1e-4).all()
    assert (falls[0] > 0.1).all()
    assert (np.array(energies) > -1e-4).all()  # the constants make E >= 0


def test_the_update_is_a_step_down_the_gradient_of_the_energy():
    # ξ_new = ξ - ∇E(ξ), which the concave-convex procedure makes of eq. 2.
    x, xi, beta = patterns().astype("float64"), rng.normal(size=16), 0.7

    def equation(xi):
        return 0.5 * xi @ xi - np.log(np.exp(beta * x @ xi).sum()) / beta

    weights = associate(xi[None].astype("float32"), x.astype("float32"), beta)
    updated = to_numpy(weights)[0] @ x
    assert_close(updated, xi - numerical_gradient(equation, xi), 1e-5)


def test_energy_leaves_out_masked_patterns():
    x, state = patterns(), normal(1, 16)
    mask = np.array([1, 1, 0, 1, 0, 1], "float32") > 0
    tensors = map(keras.ops.convert_to_tensor, (state, x, mask))
    state, x, mask = tensors
    kept = keras.ops.convert_to_tensor(to_numpy(x)[to_numpy(mask) > 0])
    assert_close(energy(state, x, 0.7, mask), energy(state, kept, 0.7))


def test_cold_memory_finds_the_nearest_and_hot_memory_the_mean():
    x = patterns()
    x /= np.linalg.norm(x, axis=-1, keepdims=True)  # equal norms: nearest = most alike
    state = normal(4, 16)
    nearest = x[(state @ x.T).argmax(-1)]
    for beta, expected in ((1e3, nearest), (1e-6, np.tile(x.mean(0), (4, 1)))):
        memory = HopfieldMemory(6, beta=beta)
        memory.build((None, 16))
        memory.store(x)
        assert_close(memory(state), expected)


def test_well_separated_patterns_come_back_in_one_step():
    x = np.sign(normal(10, 64))
    memory = HopfieldMemory(10, beta=1.0)
    memory.build((None, 64))
    memory.store(x)
    state = x + normal(10, 64, scale=0.3)
    state[:, :8] = 0.0  # an eighth is missing
    assert_close(memory.retrieve(state, steps=1), x, 1e-3)
    assert_close(memory(state), memory.retrieve(state, steps=1), 1e-6)


def test_no_update_is_attention():
    state, stored = normal(2, 3, 4), normal(2, 7, 4)
    ours = built(Hopfield(8, num_heads=2, normalize=False), state, stored)
    theirs = keras.layers.MultiHeadAttention(2, 4, value_dim=4)
    theirs.build(state.shape, stored.shape)
    maps = [ours.state_map, ours.stored_map, ours.values_map]
    weights = []
    for dense in maps:  # Keras' order: query, key, value, output
        kernel, bias = (to_numpy(w) for w in dense.weights)
        weights += [kernel.reshape(4, 2, 4), bias.reshape(2, 4)]
    kernel, bias = (to_numpy(w) for w in ours.output_map.weights)
    theirs.set_weights([*weights, kernel.reshape(2, 4, 4), bias])
    assert_close(ours(state, stored), theirs(state, stored))


def test_until_convergence_is_many_updates():
    state, stored = normal(2, 3, 4), normal(2, 7, 4)
    options = dict(num_heads=2, beta=2.0)
    layer = built(Hopfield(8, update_steps=64, **options), state, stored)
    until = built(
        Hopfield(8, update_steps=None, update_eps=1e-6, **options), state, stored
    )
    until.set_weights(layer.get_weights())
    # Each step that would follow the last one is smaller, but there are many.
    assert_close(until(state, stored), layer(state, stored), 1e-4)
    early = built(
        Hopfield(8, update_steps=None, max_updates=1, **options), state, stored
    )
    early.set_weights(layer.get_weights())
    assert difference(early(state, stored), layer(state, stored)) > 1e-4


def test_each_state_converges_on_its_own():
    state, stored = normal(3, 2, 4, scale=3.0), normal(3, 7, 4)
    layer = built(
        Hopfield(8, beta=2.0, update_steps=None, max_updates=8), state, stored
    )
    y = layer(state, stored)
    assert_close(layer(state[1:2], stored[1:2]), y[1:2], 1e-6)
    assert_close(layer(state[:, :1], stored), y[:, :1], 1e-6)


def test_trained_patterns_are_a_fixed_memory():
    state = normal(3, 2)
    layer = built(HopfieldLayer(5, 8, num_heads=2, output_dim=6), state)
    y = layer(state)
    assert y.shape == (3, 6)
    stored = np.tile(to_numpy(layer.stored), (3, 1, 1))
    assert_close(y, reference(layer, state[:, None], stored)[:, 0])
    assert_close(layer(state[:, None]), to_numpy(y)[:, None], 1e-6)


def test_what_is_read_may_have_patterns_of_its_own():
    state = normal(3, 2)
    layer = built(HopfieldLayer(5, 8, shared_patterns=False), state)
    expected = reference(layer, state[:, None], layer.stored, layer.values)[:, 0]
    assert_close(layer(state), expected)
    shared = HopfieldLayer(5, 8)
    shared.build(state.shape)
    assert layer.count_params() == shared.count_params() + 5 * 8


def test_pooling_is_one_state_for_every_set():
    stored = normal(3, 7, 4)
    mask = np.ones((3, 7), "float32")
    mask[1, 4:] = 0.0
    layer = built(HopfieldPooling(8, num_heads=2, update_steps=1), stored)
    y = layer(stored, mask=mask)
    assert y.shape == (3, 4)
    state = np.tile(to_numpy(layer.state), (3, 1, 1))
    assert_close(y, reference(layer, state, stored, mask=mask)[:, 0])
    assert_close(layer(stored[:, ::-1].copy(), mask=mask[:, ::-1].copy()), y)


def test_modes_have_the_shapes_that_they_promise():
    options = dict(input_dim=4, hidden_dim=8, num_patterns=5)

    def build(mode, **more):
        return keras_edifice.build("hopfield", mode=mode, **options, **more)

    state, stored, mask = normal(2, 3, 4), normal(2, 7, 4), np.ones((2, 7), "float32")
    assert build("layer")(normal(2, 4)).shape == (2, 8)
    pair = {"state": state, "stored": stored}
    assert build("attention")(pair).shape == (2, 3, 4)
    masked = build("attention", use_mask=True)
    assert masked({**pair, "stored_mask": mask}).shape == (2, 3, 4)
    assert build("pooling")(stored).shape == (2, 4)
    masked = build("pooling", use_mask=True)
    assert masked({"inputs": stored, "stored_mask": mask}).shape == (2, 4)
    assert build("memory")(normal(2, 4)).shape == (2, 4)


def test_memory_stays_after_saving(tmp_path):
    model = keras_edifice.build(
        "hopfield", input_dim=8, mode="memory", num_patterns=5, beta=2.0
    )
    memory, x = model.get_layer("memory"), patterns(3, 8)
    memory.store(x)
    model.save(tmp_path / "memory.keras")
    loaded = keras.saving.load_model(tmp_path / "memory.keras")
    query = normal(4, 8)
    assert_close(
        loaded.predict(query, verbose=0), model.predict(query, verbose=0), 1e-6
    )
    assert_close(loaded.get_layer("memory").energy(query), memory.energy(query), 1e-6)
    assert not model.trainable_variables


def test_memory_refuses_what_it_cannot_do():
    memory = HopfieldMemory(3, name="memory")
    memory.build((None, 4))
    with pytest.raises(ValueError, match="empty; call store"):
        memory.energy(normal(2, 4))
    assert_close(memory(normal(2, 4)), np.zeros((2, 4)), 0)  # nothing to retrieve
    for bad in (normal(4, 4), normal(2, 5), normal(4)):
        with pytest.raises(ValueError, match="stores up to 3 patterns") as caught:
            memory.store(bad)
        assert str(bad.shape) in str(caught.value)
    with pytest.raises(ValueError, match="steps must be >= 1"):
        memory.retrieve(normal(2, 4), steps=0)


def test_heads_must_divide_the_association_space():
    with pytest.raises(ValueError, match="hidden_dim must be a multiple of num_heads"):
        Hopfield(7, num_heads=2)


def test_dropout_is_on_the_read():
    state, stored = normal(2, 3, 4), normal(2, 7, 4)
    layer = built(Hopfield(8, dropout=0.5), state, stored)
    assert_close(layer(state, stored), reference(layer, state, stored))
    drawn = layer(state, stored, training=True)
    assert difference(drawn, layer(state, stored)) > 1e-3


def test_initial_maps_and_patterns_are_small_and_biases_zero():
    keras.utils.set_random_seed(0)
    layer = HopfieldLayer(200, 64, shared_patterns=False)
    layer.build((None, 64))
    matrices = [w for w in layer.weights if len(w.shape) > 1]
    assert len(matrices) == 6
    for weight in matrices:
        assert_close(to_numpy(weight).std(), 0.02, 0.002)  # 4096 draws: 1 % of 0.02
    biases = [w for w in layer.weights if w.name == "bias"]
    assert len(biases) == 4
    assert not any(to_numpy(w).any() for w in biases)


def test_published_sizes():
    layer = Hopfield(8, num_heads=2, output_dim=8)
    layer.build((None, None, 8), (None, None, 8))
    assert layer.count_params() == 336


def test_default_options_learn_two_features():
    # Rings of radius 1 and 2.5 around each other: a state without its scale could not
    # tell them apart.
    angle, radius = rng.uniform(0, 2 * np.pi, 400), np.repeat([1.0, 2.5], 200)
    x = (radius * [np.cos(angle), np.sin(angle)]).T + 0.2 * rng.normal(size=(400, 2))
    y, order = np.repeat([0, 1], 200), rng.permutation(400)
    keras.utils.set_random_seed(0)
    model = keras_edifice.classifier("hopfield", 2, input_dim=2, hidden_dim=64)
    model.compile(
        keras.optimizers.Adam(1e-2),
        "sparse_categorical_crossentropy",
        metrics=["accuracy"],
    )
    x, y = x[order].astype("float32"), y[order]
    logs = model.fit(x[:300], y[:300], batch_size=32, epochs=15, verbose=0).history
    assert logs["accuracy"][-1] > 0.9
    assert model.evaluate(x[300:], y[300:], verbose=0)[1] > 0.9


@pytest.mark.skipif(
    keras.backend.backend() != "tensorflow",
    reason="a matrix that examples share ends the process on TensorFlow alone",
)
def test_examples_do_not_share_a_right_hand_side():
    import tensorflow as tf

    layer = HopfieldLayer(4, hidden_dim=6, num_heads=2)
    x = rng.normal(size=(3, 2, 5)).astype("float32")
    layer(x)
    graph = tf.function(layer).get_concrete_function(tf.constant(x)).graph
    products = [op for op in graph.get_operations() if "BatchMatMul" in op.type]
    assert products
    for product in products:
        left, right = (y.shape[:-2] for y in product.inputs)
        assert left == right
