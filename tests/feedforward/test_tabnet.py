import keras
import numpy as np
import pytest
from keras import ops

import keras_edifice
from keras_edifice.feedforward.tabnet import (
    AttentiveTransformer,
    GhostBatchNorm,
    RootFanIn,
)
from tests.support.close import assert_close, to_numpy
from tests.support.gradients import gradients
from tests.support.numerical import numerical_gradient
from tests.support.shaking import shake

rng = np.random.default_rng(0)
SMALL = dict(
    input_size=5,
    hidden_size=4,
    attention_size=3,
    num_steps=3,
    relaxation_factor=1.5,
    virtual_batch_size=4,
)


def small_model(**options):
    model = shake(keras_edifice.build("tabnet", **{**SMALL, **options}))
    for weight in model.non_trainable_variables:
        if "moving" in weight.name:
            weight.assign(rng.uniform(0.5, 1.5, weight.shape))
    return model


def batch(rows=8, columns=5):
    return rng.normal(size=(rows, columns)).astype("float32")


class Reference:
    """The equations of the module in float64, with the weights of a model."""

    def __init__(self, model, training=False):
        self.weights = {w.path: to_numpy(w) for w in model.weights}
        self.options, self.training = model.options, training

    def norm(self, x, name, chunk=None):
        w = {
            k: self.weights[f"{name}/{k}"]
            for k in ("gamma", "beta", "moving_mean", "moving_variance")
        }
        if not self.training:
            y = (x - w["moving_mean"]) / np.sqrt(w["moving_variance"] + 1e-5)
            return y * w["gamma"] + w["beta"]
        size = chunk if chunk and len(x) % chunk == 0 else len(x)
        parts = [
            (p - p.mean(0)) / np.sqrt(p.var(0) + 1e-5)
            for p in (x[i : i + size] for i in range(0, len(x), size))
        ]
        return np.concatenate(parts) * w["gamma"] + w["beta"]

    def transform(self, x, name, shared="shared_{}", depths=None):
        num_shared, num_own = depths or (
            self.options["num_shared"],
            self.options["num_independent"],
        )
        kernels = [shared.format(i) for i in range(num_shared)]
        kernels += [f"{name}_dense_{i}" for i in range(num_own)]
        for i, kernel in enumerate(kernels):
            z = x @ self.weights[f"{kernel}/kernel"]
            z = self.norm(z, f"{name}_gate_{i}", self.options["virtual_batch_size"])
            u, v = np.split(z, 2, -1)
            gated = u / (1 + np.exp(-v))
            x = gated if i == 0 else (x + gated) * np.sqrt(0.5)
        return x

    def select(self, z):
        """Sparsemax or entmax by bisection on the threshold."""
        entmax = self.options["mask_type"] == "entmax15"
        z, power = (z / 2, 2) if entmax else (z, 1)
        low, high = z.max(-1, keepdims=True) - 1, z.max(-1, keepdims=True)
        for _ in range(80):
            middle = (low + high) / 2
            total = (np.maximum(z - middle, 0) ** power).sum(-1, keepdims=True)
            low, high = (
                np.where(total > 1, middle, low),
                np.where(total > 1, high, middle),
            )
        return np.maximum(z - low, 0) ** power

    def encode(self, x, visible=None, share=None):
        """(decisions, masks); `share` is each feature's part in each column."""
        share = np.eye(x.shape[1]) if share is None else share
        n_d = self.options["hidden_size"]
        chunk = self.options["virtual_batch_size"]
        x = self.norm(x, "norm")
        prior = np.ones((len(x), len(share))) if visible is None else visible
        a = self.transform(x, "initial")[:, n_d:]
        decisions, masks = [], []
        for s in range(self.options["num_steps"]):
            scores = a @ self.weights[f"attention_{s}/dense/kernel"]
            scores = self.norm(scores, f"attention_{s}/norm", chunk)
            masks.append(self.select(prior * scores))
            prior = prior * (self.options["relaxation_factor"] - masks[-1])
            o = self.transform((masks[-1] @ share) * x, f"step_{s}")
            decisions.append(np.maximum(o[:, :n_d], 0))
            a = o[:, n_d:]
        return np.stack(decisions, 1), np.stack(masks, 1)

    def __call__(self, x):
        return self.encode(np.asarray(x, "float64"))[0].sum(1)


def entropy(masks):
    return -(masks * np.log(masks + 1e-15)).sum(-1).mean()


@pytest.mark.parametrize("mask_type", ["sparsemax", "entmax15"])
def test_decisions_and_masks_are_those_of_the_equations(mask_type):
    model, x = small_model(mask_type=mask_type, return_masks=True), batch()
    decisions, masks = Reference(model).encode(x.astype("float64"))
    y = model(x)
    assert_close(y["outputs"], decisions.sum(1), 1e-4)
    assert_close(y["masks"], masks, 1e-4)
    importance = (masks * decisions.sum(-1, keepdims=True)).sum(1)
    assert_close(y["importance"], importance, 1e-4)


@pytest.mark.parametrize("rows", [8, 6])
def test_training_normalises_by_virtual_batches(rows):
    model, x = small_model(), batch(rows)
    expected = Reference(model, training=True)(x)
    # A masked feature hardly varies in a virtual batch of four rows, and the division
    # by its deviation multiplies rounding by up to 300.
    assert_close(model(x, training=True), expected, 1e-3)


@pytest.mark.parametrize("depths", [(0, 2), (2, 0), (1, 1)])
def test_number_of_shared_and_independent_layers(depths):
    model = small_model(num_shared=depths[0], num_independent=depths[1])
    x = batch()
    assert_close(model(x), Reference(model)(x), 1e-4)
    kernels = [w for w in model.weights if w.path.startswith("shared")]
    assert len(kernels) == depths[0]


def test_gradient_is_that_of_the_equations():
    model, x = small_model(num_steps=2), batch(2)
    _, by_input = gradients(model, x, lambda y: ops.sum(ops.square(y)))
    reference = Reference(model)
    expected = numerical_gradient(lambda x: np.square(reference(x)).sum(), x)
    assert_close(by_input, expected, 1e-4)


def test_gradient_through_virtual_batches():
    model, x = small_model(num_steps=1, virtual_batch_size=3), batch(6)
    _, by_input = gradients(model, x, lambda y: ops.sum(ops.square(y)), training=True)
    reference = Reference(model, training=True)
    expected = numerical_gradient(lambda x: np.square(reference(x)).sum(), x)
    # Normalising over three rows amplifies what float32 rounds off.
    assert_close(by_input, expected, 2e-3)


def test_masks_sum_to_one_with_exact_zeros():
    masks = to_numpy(small_model(return_masks=True)(batch())["masks"])
    assert masks.shape == (8, 3, 5)
    assert_close(masks.sum(-1), np.ones((8, 3)), 1e-6)
    assert (masks == 0.0).any()
    assert (masks >= 0.0).all()


def masks_of_scores(scores, relaxation_factor):
    """The masks of a row, where the scores of every step are `scores`."""
    model = small_model(relaxation_factor=relaxation_factor, return_masks=True)
    for s in range(3):
        norm = model.get_layer("encoder").get_layer(f"attention_{s}").norm
        norm.gamma.assign(np.zeros(5))
        norm.beta.assign(np.array(scores, "float32"))
    return to_numpy(model(batch())["masks"])[0]  # (steps, features)


def test_relaxation_of_one_uses_no_feature_twice():
    masks = masks_of_scores([9.0, 7.0, 5.0, 3.0, 1.0], 1.0)
    assert_close(masks, np.eye(5)[:3], 0)


def test_relaxation_bounds_the_use_of_a_feature():
    # The prior scales scores, so it bounds the masks of scores of at most one.
    once = masks_of_scores([1.0, 0.9, 0.8, 0.7, 0.6], 1.0)
    assert 0.4 < once.sum(0).max() <= 1.0 + 1e-6
    twice = masks_of_scores([1.0, 0.2, 0.1, 0.1, 0.1], 1.5)[:2]
    assert 1.0 < twice.sum(0).max() <= 1.5 + 1e-6


def test_higher_relaxation_keeps_a_feature_in_use():
    masks = masks_of_scores([9.0, 1.0, 0.0, 0.0, 0.0], 2.0)
    assert_close(masks, np.eye(5)[[0, 0, 0]], 0)


def test_constant_features_leave_every_gradient_finite():
    model, x = small_model(num_steps=1), batch()
    x[:, :2] = [3.3, 0.0]
    by_weight, by_input = gradients(
        model, x, lambda y: ops.sum(ops.square(y)), training=True
    )
    for gradient in (*by_weight, by_input):
        assert np.isfinite(gradient).all()
    names = [w.path for w in model.trainable_variables]
    assert np.abs(by_weight[names.index("attention_0/dense/kernel")]).max() > 1e-4


def test_batch_of_one_trains():
    model = small_model(num_steps=1, virtual_batch_size=1)
    by_weight, by_input = gradients(
        model, batch(1), lambda y: ops.sum(y), training=True
    )
    assert all(np.isfinite(g).all() for g in (*by_weight, by_input))


@pytest.mark.parametrize("training", [False, True])
def test_entropy_of_the_masks_is_a_loss(training):
    model, x = small_model(lambda_sparse=0.7), batch()
    _, masks = Reference(model, training).encode(x.astype("float64"))
    model(x, training=training)
    assert_close(sum(model.losses), 0.7 * entropy(masks), 1e-4)


def test_evaluation_includes_the_entropy():
    model, x = small_model(lambda_sparse=0.7), batch()
    _, masks = Reference(model).encode(x.astype("float64"))
    model.compile("sgd", loss="mse", run_eagerly=keras.backend.backend() != "jax")
    y = np.zeros((8, 4), "float32")
    expected = np.square(Reference(model)(x)).mean() + 0.7 * entropy(masks)
    assert_close(model.evaluate(x, y, verbose=0), expected, 1e-4)


def test_no_weight_no_loss():
    model = small_model(lambda_sparse=0.0)
    model(batch())
    assert not model.losses


def ghost_norm(**options):
    norm = GhostBatchNorm(**options)
    norm.build((None, 3))
    return norm


def test_ghost_norm_follows_its_chunks_in_turn():
    norm, x = ghost_norm(virtual_batch_size=4, momentum=0.9), batch(12, 3) + 2
    y = to_numpy(norm(x, training=True))
    mean, variance = np.zeros(3), np.ones(3)
    for i in range(0, 12, 4):
        part = x[i : i + 4].astype("float64")
        expected = (part - part.mean(0)) / np.sqrt(part.var(0) + 1e-5)
        assert_close(y[i : i + 4], expected)
        mean = 0.9 * mean + 0.1 * part.mean(0)
        variance = 0.9 * variance + 0.1 * part.var(0)
    assert_close(norm.moving_mean, mean)
    assert_close(norm.moving_variance, variance)
    expected = (x - mean) / np.sqrt(variance + 1e-5)
    assert_close(norm(x), expected)


@pytest.mark.parametrize("rows", [1, 3, 5, 7])
def test_ghost_norm_takes_other_batches_whole(rows):
    x = batch(rows, 3)
    ghost, plain = ghost_norm(virtual_batch_size=4), ghost_norm()
    assert_close(ghost(x, training=True), plain(x, training=True), 0)
    assert_close(ghost.moving_mean, plain.moving_mean, 0)
    assert_close(plain.moving_mean, 0.02 * x.astype("float64").mean(0))


def test_ghost_norm_without_momentum_keeps_the_last_chunk():
    norm, x = ghost_norm(virtual_batch_size=4, momentum=0.0), batch(8, 3)
    norm(x, training=True)
    assert_close(norm.moving_mean, x[4:].mean(0))


def test_frozen_ghost_norm_infers():
    norm, x = ghost_norm(), batch(8, 3) + 5
    norm.trainable = False
    assert_close(norm(x, training=True), x / np.sqrt(1 + 1e-5))
    assert_close(norm.moving_mean, np.zeros(3), 0)


def test_ghost_norm_in_fit_with_a_smaller_last_batch():
    # 100 rows in batches of 32: three of two chunks each, and one of four rows, whole.
    norm = GhostBatchNorm(virtual_batch_size=16, momentum=0.9)
    model = keras.Sequential([keras.Input((3,)), norm])
    model.compile(keras.optimizers.SGD(0.0), loss="mse")
    x = batch(100, 3) * 2 + 1
    model.fit(x, x, batch_size=32, shuffle=False, verbose=0)
    mean, variance = np.zeros(3), np.ones(3)
    for i in range(0, 100, 16):
        part = x[i : i + 16].astype("float64")
        mean = 0.9 * mean + 0.1 * part.mean(0)
        variance = 0.9 * variance + 0.1 * part.var(0)
    assert_close(norm.moving_mean, mean)
    assert_close(norm.moving_variance, variance)


CATEGORIES = dict(cat_idxs=[3, 0], cat_dims=[6, 4], cat_emb_dim=[3, 2])


def table(rows=8):
    x = batch(rows)
    x[:, 0], x[:, 3] = rng.integers(0, 4, rows), rng.integers(0, 6, rows)
    return x


def columns_of(model, x):
    """The table with embeddings in the place of its categories."""
    weights = {w.path: to_numpy(w) for w in model.weights}
    first = weights["embedding_0/embeddings"][x[:, 0].astype(int)]
    fourth = weights["embedding_3/embeddings"][x[:, 3].astype(int)]
    return np.concatenate([first, x[:, 1:3], fourth, x[:, 4:]], -1).astype("float64")


def test_categories_are_embedded_in_their_places():
    model, x = small_model(return_masks=True, **CATEGORIES), table()
    share = np.zeros((5, 8))
    share[0, :2], share[1, 2], share[2, 3] = 1 / 2, 1, 1
    share[3, 4:7], share[4, 7] = 1 / 3, 1
    decisions, masks = Reference(model).encode(columns_of(model, x), share=share)
    y = model(x)
    assert_close(y["outputs"], decisions.sum(1), 1e-4)
    assert_close(y["masks"], masks, 1e-4)


def test_unknown_categories_are_the_nearest():
    model, x = small_model(**CATEGORIES), table()
    known, unknown = x.copy(), x.copy()
    known[:, 3], unknown[:, 3] = 5, 9
    assert_close(model(unknown), model(known), 0)


@pytest.mark.parametrize("format", ["onnx", "saved_model"])
def test_masks_and_categories_export(tmp_path, format):
    shallow = dict(num_steps=2, num_shared=1, num_independent=0)
    model = small_model(
        mask_type="entmax15", return_masks=True, **shallow, **CATEGORIES
    )
    path = tmp_path / ("model.onnx" if format == "onnx" else "model")
    assert keras_edifice.export(model, path, format) < 1e-4
    assert path.exists()


def test_one_embedding_width_for_all():
    model = small_model(cat_idxs=[1, 4], cat_dims=[3, 3], cat_emb_dim=2)
    assert model.get_layer("encoder").get_layer("embedding_4").output_dim == 2


def test_category_numbers_survive_half_precision():
    # bfloat16 has eight bits and would take 257 for 256.
    policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        model = keras_edifice.build(
            "tabnet",
            input_size=1,
            hidden_size=4,
            num_steps=1,
            cat_idxs=[0],
            cat_dims=[300],
            pretraining_ratio=0.5,
        )
        columns = model.predict(np.array([[256.0], [257.0]], "float32"), verbose=0)
    finally:
        keras.config.set_dtype_policy(policy)
    embeddings = to_numpy(
        model.get_layer("encoder").get_layer("embedding_0").embeddings
    )
    assert_close(columns["features"], embeddings[256:258], 0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(cat_idxs=[0], cat_dims=[3, 4]), "one length"),
        (dict(cat_idxs=[0], cat_dims=[3], cat_emb_dim=[1, 2]), "one length"),
        (dict(cat_idxs=[5], cat_dims=[3]), "below input_size 5"),
        (dict(cat_idxs=[1, 1], cat_dims=[3, 3]), "different columns"),
        (dict(num_shared=0, num_independent=0), "above 0"),
        (dict(pretraining_ratio=0.2, num_classes=2), "num_classes"),
        (dict(pretraining_ratio=0.2, return_masks=True), "return_masks"),
        (dict(relaxation_factor=0.9), "relaxation_factor must be >= 1"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, words):
    with pytest.raises(ValueError, match=words) as caught:
        keras_edifice.build("tabnet", **{**SMALL, **options})
    assert "\n" not in str(caught.value)


def pretraining_loss(x, y):
    """The objective of the paper: a sum over the batch, relative to its deviations."""
    scale = np.sqrt(np.square(x - x.mean(0)).sum(0))
    scale[scale < 1e-4] = np.sqrt(len(x))
    errors = (to_numpy(y["reconstruction"]) - x) * (1 - to_numpy(y["visible"])) / scale
    return np.square(errors).sum()


def test_pretraining_loss_is_that_of_the_paper():
    model, x = small_model(pretraining_ratio=0.4), batch()
    x[:, 1] = 3.3
    y = model(x, training=True)
    hidden = 1 - to_numpy(y["visible"])
    assert 0 < hidden.mean() < 1
    loss = model.compute_loss(x=x, y_pred=y, training=True)
    assert_close(loss, pretraining_loss(x.astype("float64"), y))


def test_evaluation_of_pretraining_counts_every_column():
    model, x = small_model(pretraining_ratio=0.4), batch()
    y = model(x)
    assert_close(y["visible"], np.ones((8, 5)), 0)
    expected = pretraining_loss(x.astype("float64"), {**y, "visible": np.zeros((8, 5))})
    assert_close(model.compute_loss(x=x, y_pred=y, training=False), expected)
    weights = np.array([1.0] + [0.0] * 7, "float32")
    first = model.compute_loss(x=x, y_pred=y, sample_weight=weights, training=False)
    errors = np.square(to_numpy(y["reconstruction"]) - x) / x.astype("float64").var(0)
    assert_close(first, errors[0].sum() / 8)


def test_decoder_is_that_of_the_equations():
    model, x = small_model(pretraining_ratio=0.4), batch()
    reference = Reference(model)
    decisions, _ = reference.encode(x.astype("float64"))
    restored = sum(
        reference.transform(decisions[:, s], f"decoder_{s}", "decoder_shared", (1, 1))
        for s in range(3)
    )
    restored = restored @ reference.weights["reconstruction/kernel"]
    assert_close(model(x)["reconstruction"], restored, 1e-4)


def test_hidden_features_are_not_seen():
    model, x = small_model(pretraining_ratio=0.4), batch()
    encoder = model.get_layer("encoder")
    visible = np.ones((8, 5), "float32")
    visible[:, 2] = 0
    changed = x.copy()
    changed[:, 2] += 1
    first, second = encoder([x, visible]), encoder([changed, visible])
    assert_close(first["decisions"], second["decisions"], 0)
    expected, masks = Reference(model).encode(
        x.astype("float64") * visible, visible.astype("float64")
    )
    assert_close(first["decisions"], expected, 1e-4)
    assert_close(first["masks"], masks, 1e-4)


def test_embedded_features_are_hidden_together():
    keras.utils.set_random_seed(0)
    model = small_model(pretraining_ratio=0.5, **CATEGORIES)
    visible = to_numpy(model(table(), training=True)["visible"])
    assert visible.shape == (8, 8)
    assert (visible[:, :2].std(1) == 0).all()
    assert (visible[:, 4:7].std(1) == 0).all()
    assert (visible[:, 2] != visible[:, 3]).any()


def test_pretraining_learns_and_its_encoder_fits_a_classifier():
    keras.utils.set_random_seed(0)
    common = dict(
        input_size=4,
        hidden_size=8,
        num_steps=1,
        num_shared=1,
        num_independent=1,
    )
    model = keras_edifice.build("tabnet", pretraining_ratio=0.3, **common)
    first = batch(64, 2)
    x = np.concatenate([first, first + 0.1 * batch(64, 2)], -1)  # pairs tell each other
    model.compile(keras.optimizers.Adam(5e-2))
    losses = model.fit(x, epochs=60, batch_size=64, verbose=0).history["loss"]
    assert np.mean(losses[-6:]) < 0.7 * np.mean(losses[:6])

    network = keras_edifice.build("tabnet", num_classes=3, return_masks=True, **common)
    pretrained = model.get_layer("encoder")
    network.get_layer("encoder").set_weights(pretrained.get_weights())
    encoded = pretrained([x, np.ones_like(x)])
    assert_close(network(x)["masks"], encoded["masks"], 1e-6)


def test_pretraining_saves_and_loads(tmp_path):
    model, x = small_model(pretraining_ratio=0.4, **CATEGORIES), table()
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras", safe_mode=True)
    assert type(loaded) is type(model)
    assert_close(loaded(x)["reconstruction"], model(x)["reconstruction"], 1e-6)
    y = model(x, training=True)
    losses = [m.compute_loss(x=x, y_pred=y, training=True) for m in (model, loaded)]
    assert_close(losses[0], losses[1], 1e-6)


def test_attention_keeps_its_configuration():
    layer = AttentiveTransformer(5, "entmax15", 0.1, 1e-9, 16, 0.7)
    again = AttentiveTransformer.from_config(layer.get_config())
    assert again.get_config() == layer.get_config()
    assert (again.norm.virtual_batch_size, again.norm.momentum) == (16, 0.7)


def test_kernels_start_with_the_variance_of_the_released_code():
    kernel = to_numpy(RootFanIn(2.0)((400, 300)))
    assert abs(kernel.std() / np.sqrt(2 / np.sqrt(400)) - 1) < 0.01
    model = keras_edifice.build("tabnet", input_size=400, num_steps=1)
    deviations = {w.path: to_numpy(w).std() for w in model.weights}
    assert abs(deviations["shared_0/kernel"] / (2 / 20) ** 0.5 - 1) < 0.05
    assert abs(deviations["attention_0/dense/kernel"] / (1 / 8) ** 0.5 - 1) < 0.05


def test_head_gives_probabilities():
    model, x = small_model(num_classes=3), batch()
    assert_close(ops.sum(model(x), -1), np.ones(8))
    assert not model.get_layer("predictions").use_bias


def test_dropout_acts_in_training_alone():
    model, x = small_model(dropout=0.9), batch()
    assert_close(model(x), Reference(model)(x), 1e-4)
    dropped = to_numpy(model(x, training=True))
    assert (dropped == 0).mean() > 0.5


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ((16, 2, 8, 8, 3), 6_672),
        ((21, 1, 8, 8, 3), 6_984),  # Sarcos
        ((21, 1, 64, 64, 7), 588_624),
        ((21, 1, 128, 128, 5), 1_753_084),
        ((28, 2, 24, 26, 5), 76_624),  # Higgs
        ((28, 2, 96, 32, 8), 656_056),
        ((54, 7, 64, 64, 5), 470_472),  # Forest
    ],
)
def test_published_sizes(sizes, expected):
    names = ("input_size", "num_classes", "hidden_size", "attention_size", "num_steps")
    model = keras_edifice.build("tabnet", **dict(zip(names, sizes, strict=True)))
    trainable = sum(np.prod(w.shape) for w in model.trainable_variables)
    assert trainable == expected
