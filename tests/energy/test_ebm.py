import keras
import numpy as np
import pytest
from keras import ops

import keras_edifice
from keras_edifice.energy.ebm import (
    ClassAffine,
    EBMModel,
    ReplayBuffer,
    SpectralConv2D,
    SpectralDense,
    free_energy,
    langevin,
)
from keras_edifice.ops.gradients import grad_sum
from tests.support.close import assert_close, to_numpy
from tests.support.numerical import numerical_gradient
from tests.support.shaking import shake

rng = np.random.default_rng(0)


def small_model(**options):
    keras.utils.set_random_seed(0)
    sizes = dict(input_size=2, hidden_sizes=[6, 5], langevin_steps=4, buffer_size=16)
    return shake(keras_edifice.build("ebm", seed=3, **{**sizes, **options}))


def points(n=4):
    return rng.uniform(size=(n, 2)).astype("float32")


def energies_in_numpy(x, weights):
    """Dense layers with silu, the last one linear; float64."""
    *hidden, kernel, bias = (np.asarray(w, "float64") for w in weights)
    for w, b in zip(hidden[::2], hidden[1::2], strict=True):
        x = x @ w + b
        x = x / (1.0 + np.exp(-x))
    return x @ kernel + bias


def free_energy_in_numpy(energies):
    return -np.log(np.exp(-energies).sum(-1))


def gradient_in_numpy(x, weights):
    def total(x):
        return free_energy_in_numpy(energies_in_numpy(x, weights)).sum()

    return numerical_gradient(total, x)


def network_weights(model):
    return [to_numpy(w) for w in model.get_layer("network").trainable_variables]


def test_energy_is_a_perceptron():
    model, x = small_model(), points()
    assert_close(model(x), energies_in_numpy(x, network_weights(model)))
    assert_close(model.energy(x), to_numpy(model(x))[:, 0], 1e-6)


@pytest.mark.parametrize("num_classes", [None, 3])
def test_input_gradient_is_the_numerical_one(num_classes):
    model, x = small_model(num_classes=num_classes), points()
    found = grad_sum(model._frozen_energy(), x)
    assert_close(found, gradient_in_numpy(x, network_weights(model)), 1e-4)


def test_classifier_is_a_softmax_of_negative_energies():
    model, x = small_model(num_classes=3), points()
    energies = energies_in_numpy(x, network_weights(model))
    weights = np.exp(-energies)
    assert_close(model(x), weights / weights.sum(-1, keepdims=True))
    assert_close(model.energy(x), free_energy_in_numpy(energies))
    logits = small_model(num_classes=3, classifier_activation=None)
    assert_close(logits(x), -energies_in_numpy(x, network_weights(logits)))


def test_free_energy_of_one_class_is_its_energy():
    energies = np.array([[3.0], [-700.0], [700.0]], "float32")
    assert_close(free_energy(ops.convert_to_tensor(energies)), energies[:, 0], 0)


def quadratic(x):
    return ops.sum(ops.square(x), -1) / 2.0


@pytest.mark.parametrize("clamp", [None, [-0.2, 0.3]])
def test_chain_is_that_of_the_released_sampler(clamp):
    x, noise = rng.normal(size=(3, 2)), rng.normal(size=(5, 3, 2))
    found = langevin(
        quadratic,
        ops.convert_to_tensor(x.astype("float32")),
        ops.convert_to_tensor(noise.astype("float32")),
        step_size=0.4,
        noise_scale=0.1,
        grad_clip=0.5,
        clamp=clamp,
    )
    for e in noise:
        x = x + 0.1 * e
        x = x - 0.4 * np.clip(x, -0.5, 0.5)
        x = x if clamp is None else np.clip(x, *clamp)
    assert_close(found, x)


def test_langevin_on_a_quadratic_has_the_variance_of_the_algorithm():
    chains, steps, eta = 20_000, 40, 0.5
    noise = rng.normal(size=(steps, chains, 2)).astype("float32")
    x = ops.zeros((chains, 2))
    x = langevin(quadratic, x, ops.convert_to_tensor(noise), eta, sampler="ula")
    # Each step scales x by 1 - η/2 and adds η: the variance tends to 1 / (1 - η/4).
    # Of 20 000 draws the deviation is 1 %; without the correction it is 14 % off.
    assert_close(to_numpy(x).var(0), np.full(2, 1 / (1 - eta / 4)), 0.04)
    assert_close(to_numpy(x).mean(0), np.zeros(2), 0.04)


def one_step(model, x, chain=None):
    """The gradient of the loss in each weight, by a step of length one in `fit`."""
    if chain is not None:
        model.chain = chain
    model.compile(keras.optimizers.SGD(1.0))
    before = network_weights(model)
    model.fit(x, batch_size=len(x), verbose=0)
    return [a - b for a, b in zip(before, network_weights(model), strict=True)]


@pytest.mark.parametrize(("alpha", "num_classes"), [(0.0, None), (0.7, 3)])
def test_gradient_of_the_loss_is_data_minus_samples(alpha, num_classes):
    model, x, unreal = (
        small_model(reg_alpha=alpha, num_classes=num_classes),
        points(),
        points() - 2.0,
    )
    weights = network_weights(model)
    found = one_step(model, x, lambda start: ops.convert_to_tensor(unreal))

    def loss(i, w):
        changed = [*weights[:i], w, *weights[i + 1 :]]
        real, fake = (
            free_energy_in_numpy(energies_in_numpy(z, changed)) for z in (x, unreal)
        )
        return real.mean() - fake.mean() + alpha * np.mean(real**2 + fake**2)

    for i, gradient in enumerate(found):
        expected = numerical_gradient(lambda w, i=i: loss(i, w), weights[i])
        assert_close(gradient, expected, 1e-4)


def test_no_gradient_flows_through_the_chain(monkeypatch):
    model = small_model(init="data", step_size=0.5, grad_clip=10.0, reg_alpha=0.0)
    weights, x = network_weights(model), points()
    monkeypatch.setattr(keras.random, "normal", lambda shape, **_: ops.zeros(shape))
    found = one_step(model, x)
    ends = x.astype("float64")
    for _ in range(4):
        ends = np.clip(ends - 0.5 * gradient_in_numpy(ends, weights), 0.0, 1.0)
    assert np.abs(ends - x).max() > 1e-2

    def loss(i, w):
        changed = [*weights[:i], w, *weights[i + 1 :]]
        real, fake = (energies_in_numpy(z, changed) for z in (x, ends))
        return real.mean() - fake.mean()

    for i, gradient in enumerate(found):
        expected = numerical_gradient(lambda w, i=i: loss(i, w), weights[i])
        assert_close(gradient, expected, 1e-4)


def test_chains_of_contrastive_divergence_start_at_the_data():
    model, x, starts = small_model(init="data"), points(), []
    model.chain = lambda start: starts.append(to_numpy(start)) or start
    model.compile("sgd", run_eagerly=True, jit_compile=False)
    model.contrastive_divergence(ops.convert_to_tensor(x), model(x), training=False)
    assert_close(starts[0], x, 0)


def test_energy_falls_on_data_and_rises_far_away():
    keras.utils.set_random_seed(0)
    model = keras_edifice.build(
        "ebm", input_size=2, hidden_sizes=[16], langevin_steps=20, buffer_size=256
    )
    data = (0.3 + 0.03 * rng.normal(size=(256, 2))).astype("float32")
    model.compile(keras.optimizers.Adam(1e-2))
    model.fit(data, batch_size=64, epochs=15, verbose=0)
    near, far = model.energy(data), model.energy(points(256) * 0.3 + 0.6)
    assert near.mean() < far.min()
    samples = model.sample(64, seed=1)
    assert model.energy(samples).mean() < model.energy(points(64)).mean()


def test_fit_fills_the_buffer_and_evaluate_leaves_it(tmp_path):
    model, x = small_model(), points(6)
    buffer = model.get_layer("replay_buffer")
    model.compile(keras.optimizers.Adam(1e-3))
    model.evaluate(x, verbose=0)
    assert to_numpy(buffer.count) == 0
    model.fit(x, batch_size=4, verbose=0)
    assert [int(to_numpy(w)) for w in (buffer.count, buffer.pointer)] == [6, 6]
    kept = to_numpy(buffer.samples)
    assert (kept[:6] != 0).any(-1).all()
    assert (kept[6:] == 0).all()

    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert type(loaded) is EBMModel
    again = loaded.get_layer("replay_buffer")
    assert_close(again.samples, kept, 0)
    assert [int(to_numpy(w)) for w in (again.count, again.pointer)] == [6, 6]
    assert_close(loaded.sample(3, seed=5), model.sample(3, seed=5), 1e-5)


def filled_buffer(*batches, size=5):
    buffer = ReplayBuffer(size, low=-1.0, high=1.0, seed=1)
    buffer.build((None, 2))
    for batch in batches:
        buffer.push(ops.convert_to_tensor(np.asarray(batch, "float32")))
    return buffer


def test_the_oldest_samples_give_way():
    numbered = np.arange(14.0).reshape(7, 2)
    buffer = filled_buffer(numbered[:3], numbered[3:7])
    assert_close(buffer.samples, numbered[[5, 6, 2, 3, 4]], 0)
    assert [int(to_numpy(w)) for w in (buffer.pointer, buffer.count)] == [2, 5]
    at_once = filled_buffer(numbered)
    assert {tuple(row) for row in to_numpy(at_once.samples)} == {
        tuple(row) for row in numbered[2:]
    }


def test_chains_start_from_noise_until_there_are_samples():
    drawn = to_numpy(filled_buffer().draw(500, replay_prob=1.0))
    assert np.abs(drawn).max() <= 1.0
    assert_close(drawn.mean(0), np.zeros(2), 0.1)
    assert drawn.std(0).min() > 0.5


def test_chains_start_from_samples_with_the_given_probability():
    kept = [[5.0, 5.0], [6.0, 6.0], [7.0, 7.0]]
    drawn = to_numpy(filled_buffer(kept).draw(4000, replay_prob=0.75))
    counts = [(drawn[:, 0] == value).mean() for value in (5.0, 6.0, 7.0)]
    assert_close(counts, np.full(3, 0.25), 0.03)
    assert np.abs(drawn[drawn[:, 0] < 5.0]).max() <= 1.0


def test_samples_keep_to_the_range_and_repeat_under_a_seed():
    model = small_model(clamp=[0.2, 0.7], noise_scale=0.5)
    first, second = model.sample(20, seed=1), model.sample(20, seed=1)
    assert_close(first, second, 0)
    assert first.shape == (20, 2)
    assert (first >= 0.2 - 1e-6).all()
    assert (first <= 0.7 + 1e-6).all()
    assert np.abs(model.sample(20) - first).max() > 1e-3


def test_labels_and_a_loss_train_a_classifier():
    model, x = small_model(num_classes=2), points(64)
    y = (x[:, 0] > 0.5).astype("int32")
    model.compile(keras.optimizers.Adam(3e-2), "sparse_categorical_crossentropy")
    history = model.fit(x, y, epochs=20, verbose=0).history["loss"]
    assert history[-1] < 0.5 * history[0]
    assert to_numpy(model.get_layer("replay_buffer").count) == 0


def test_labels_without_a_loss_are_refused():
    model, x = small_model(), points()
    model.compile("sgd")
    with pytest.raises(ValueError, match="received y and has no loss for it"):
        model.compute_loss(x, x, model(x))


def test_weights_of_examples_are_refused_without_labels():
    model, x = small_model(), points()
    model.compile("sgd")
    with pytest.raises(ValueError, match="does not take; pass x alone"):
        model.compute_loss(x, None, model(x), sample_weight=np.ones(4))


def test_energies_are_float32_under_half_precision():
    policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        model = small_model()
    finally:
        keras.config.set_dtype_policy(policy)
    assert keras.backend.standardize_dtype(model(points()).dtype) == "float32"
    assert model.get_layer("replay_buffer").samples.dtype == "float32"


def largest_singular_value(kernel):
    return np.linalg.svd(kernel.reshape(-1, kernel.shape[-1]))[1][0]


@pytest.mark.parametrize("convolution", [False, True])
def test_spectral_norm_divides_by_the_largest_singular_value(convolution):
    layer = SpectralConv2D(4, 3, padding="same") if convolution else SpectralDense(4)
    shape = (2, 5, 5, 3) if convolution else (2, 3)
    layer.build(shape)
    shake(layer, 1.0)
    x = rng.normal(size=shape).astype("float32")
    before = to_numpy(layer.u)
    layer(x)
    assert_close(layer.u, before, 0)
    for _ in range(60):
        layer(x, training=True)
    found = to_numpy(layer(x)) - to_numpy(layer.bias)
    kernel = to_numpy(layer.kernel)
    plain = (
        ops.conv(x, kernel.astype("float32"), padding="same")
        if convolution
        else (ops.convert_to_tensor(x @ kernel))
    )
    assert_close(found, to_numpy(plain) / largest_singular_value(kernel), 1e-4)


@pytest.mark.parametrize(("scale", "norm"), [(0.1, 0.1), (10.0, 1.0)])
def test_bounded_norm_leaves_small_kernels(scale, norm):
    layer = SpectralConv2D(4, 1, bound=True, use_bias=False)
    layer.build((None, 1, 1, 4))
    kernel = rng.normal(size=(1, 1, 4, 4))
    kernel = scale * kernel / largest_singular_value(kernel)
    layer.kernel.assign(kernel.astype("float32"))
    x = np.eye(4, dtype="float32").reshape(4, 1, 1, 4)
    for _ in range(60):
        layer(x, training=True)
    assert_close(largest_singular_value(to_numpy(layer(x))), norm, 1e-4)


def test_each_class_has_its_scale_and_shift():
    layer, x = ClassAffine(3), rng.normal(size=(6, 2, 2, 4)).astype("float32")
    layer.build((None, 2, 2, 4))
    shake(layer)
    scale, shift = (to_numpy(w).reshape(3, 4) for w in layer.weights)
    y = to_numpy(layer(x))
    for row in range(6):
        assert_close(y[row], x[row] * scale[row % 3] + shift[row % 3])


@pytest.mark.parametrize("num_classes", [None, 3])
def test_images_train_and_have_an_energy_each(num_classes, tmp_path):
    model = small_model(
        input_size=None,
        backbone="conv",
        spectral_norm=True,
        image_size=4,
        num_channels=2,
        hidden_sizes=[3],
        dropout=0.1,
        num_classes=num_classes,
    )
    x = rng.uniform(size=(4, 4, 4, 2)).astype("float32")
    before = model.predict(x, verbose=0)
    assert before.shape == (4, num_classes or 1)
    assert_close(model.predict(x[1:2], verbose=0), before[1:2])
    model.compile(keras.optimizers.Adam(1e-2))
    history = model.fit(x, batch_size=2, verbose=0).history
    after = model.predict(x, verbose=0)
    assert np.isfinite(history["loss"]).all()
    assert np.abs(after - before).max() > 1e-4
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert_close(loaded.predict(x, verbose=0), after, 1e-6)
    for old, new in zip(model.weights, loaded.weights, strict=True):
        assert_close(new, old, 0)


@pytest.mark.parametrize(("classes", "size"), [(None, 5_134_593), (10, 5_183_233)])
def test_published_sizes(classes, size):
    model = keras_edifice.build(
        "ebm", variant="igebm_cifar10", num_classes=classes, buffer_size=1
    )
    assert sum(np.prod(w.shape) for w in model.trainable_variables) == size


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        (dict(), TypeError, "ebm needs input_size .* pass it by name"),
        (
            dict(backbone="conv", image_size=2, hidden_sizes=[4, 4]),
            ValueError,
            "image_size must be >= 2 .* = 4, received 2",
        ),
        (
            dict(input_size=2, clamp=[1.0, 0.0]),
            ValueError,
            "clamp must be .low, high. with low < high, received",
        ),
    ],
)
def test_impossible_options_are_refused(options, error, words):
    with pytest.raises(error, match=words):
        keras_edifice.build("ebm", **options)
