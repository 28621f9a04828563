import keras
import numpy as np
import pytest
from keras import ops

import keras_edifice
from tests.support.close import assert_close, to_numpy
from tests.support.gradients import gradients
from tests.support.numerical import numerical_gradient
from tests.support.shaking import shake

rng = np.random.default_rng(0)
SMALL = dict(
    input_dim=3,
    hidden_dim=4,
    output_dim=3,
    phi_sizes=[6, 5],
    rho_sizes=[5],
    activation="tanh",
)
EQUIVARIANT = dict(equivariant_layers=2, mode="equivariant")
FORMS = [{}, dict(equivariant_layers=2), EQUIVARIANT]
POOLS = dict(sum=np.sum, mean=np.mean, max=np.max)


def small_model(**options):
    return shake(keras_edifice.build("deep_sets", **{**SMALL, **options}))


def sets(elements=7):
    return rng.normal(size=(2, elements, 3)).astype("float32")


def masked_sets():
    """Sets of 4 and 6 elements, and numbers in the padding that must not count."""
    x, mask = sets(), np.arange(7) < np.array([[4], [6]])
    x[~mask] = 50.0
    return dict(elements=x, set_mask=mask.astype("float32"))


class Reference:
    """The equations of the module for one set at a time, in float64."""

    def __init__(self, model):
        self.weights = {w.path: to_numpy(w) for w in model.weights}
        self.options = model.options

    def dense(self, x, name):
        y = x @ self.weights[f"{name}/kernel"]
        return y + self.weights.get(f"{name}/bias", 0)

    def equivariant(self, x, name):
        pooled = POOLS[self.options["equivariant_pool"]](x, axis=0)
        if self.options["equivariant_kind"] == 1:
            return self.dense(x - pooled, f"{name}_gamma")
        own = pooled @ self.weights[f"{name}_lambda/kernel"]
        return self.dense(x, f"{name}_gamma") - own

    def one(self, x):
        for i in range(len(self.options["phi_sizes"])):
            x = np.tanh(self.dense(x, f"phi_{i}"))
        for i in range(self.options["equivariant_layers"]):
            x = np.tanh(self.equivariant(x, f"equivariant_{i}"))
        if not self.options["equivariant_layers"]:
            x = self.dense(x, "phi")
        invariant = self.options["mode"] == "invariant"
        if invariant:
            x = POOLS[self.options["pool"]](x, axis=0)
        for i in range(len(self.options["rho_sizes"])):
            x = np.tanh(self.dense(x, f"rho_{i}"))
        return self.dense(x, "rho") if invariant else self.equivariant(x, "rho")

    def __call__(self, x, sizes=None):
        sizes = sizes or [x.shape[1]] * len(x)
        return np.stack([self.one(s[:n]) for s, n in zip(x, sizes, strict=True)])


@pytest.mark.parametrize("pool", POOLS)
def test_output_is_the_equation(pool):
    model, x = small_model(pool=pool), sets()
    assert_close(model(x), Reference(model)(x.astype("float64")))


@pytest.mark.parametrize("mode", ["invariant", "equivariant"])
@pytest.mark.parametrize("kind", [1, 2])
@pytest.mark.parametrize("pool", ["max", "mean"])
def test_equivariant_layers_are_those_of_the_equation(mode, kind, pool):
    model = small_model(
        mode=mode, equivariant_layers=2, equivariant_kind=kind, equivariant_pool=pool
    )
    x = sets()
    assert_close(model(x), Reference(model)(x.astype("float64")))


@pytest.mark.parametrize("options", FORMS)
def test_gradient_is_that_of_the_equation(options):
    model, x = small_model(**options), sets(4)
    _, by_input = gradients(model, x, lambda y: ops.sum(ops.square(y)))
    reference = Reference(model)
    expected = numerical_gradient(lambda x: np.square(reference(x)).sum(), x)
    assert_close(by_input, expected, 1e-4)


@pytest.mark.parametrize("options", FORMS)
def test_order_does_not_matter(options):
    model, x = small_model(**options), sets()
    order = rng.permutation(7)
    y, moved = to_numpy(model(x)), to_numpy(model(x[:, order]))
    equivariant = options.get("mode") == "equivariant"
    assert_close(moved, y[:, order] if equivariant else y, 1e-6)


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("options", FORMS)
def test_padding_has_no_influence(options, pool):
    model, inputs = small_model(use_mask=True, pool=pool, **options), masked_sets()
    y, reference = to_numpy(model(inputs)), Reference(model)
    x = inputs["elements"].astype("float64")
    if options.get("mode") == "equivariant":
        assert_close(y[0, :4], reference.one(x[0, :4]))
        assert_close(y[1, :6], reference.one(x[1, :6]))
        assert_close(y[inputs["set_mask"] == 0], np.zeros((4, 3)), 0)
    else:
        assert_close(y, reference(x, sizes=[4, 6]))


@pytest.mark.parametrize("options", FORMS)
def test_padding_gets_no_gradient(options):
    model, inputs = small_model(use_mask=True, **options), masked_sets()
    _, by_input = gradients(model, inputs, lambda y: ops.sum(ops.square(y)))
    padding = inputs["set_mask"] == 0
    assert_close(by_input[padding], np.zeros((4, 3)), 0)
    assert (np.abs(by_input[~padding]).max(-1) > 0).all()


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("options", FORMS)
def test_empty_set_is_finite(options, pool):
    model = small_model(use_mask=True, pool=pool, **options)
    inputs = dict(elements=sets(), set_mask=np.zeros((2, 7), "float32"))
    y = to_numpy(model(inputs))
    assert np.isfinite(y).all()
    if options.get("mode") != "equivariant":
        reference = Reference(model)
        h = np.tanh(reference.dense(np.zeros((2, 4)), "rho_0"))
        assert_close(y, reference.dense(h, "rho"))
    by_weight, _ = gradients(model, inputs, lambda y: ops.sum(ops.square(y)))
    assert all(np.isfinite(g).all() for g in by_weight)


def test_duplicates_double_the_sum_alone():
    x = sets()
    twice = np.concatenate([x, x], axis=1)
    for pool in ("mean", "max"):
        model = small_model(pool=pool)
        assert_close(model(twice), model(x), 1e-5)
    # Without layers in ρ the output is W_ρ Σ φ(x_i) + b_ρ.
    model = small_model(pool="sum", rho_sizes=[])
    bias = to_numpy(model.get_layer("rho").bias)
    assert_close(to_numpy(model(twice)) - bias, 2 * (to_numpy(model(x)) - bias), 1e-5)


def test_any_number_of_elements():
    model = small_model()
    for elements in (1, 2, 11):
        x = sets(elements)
        assert_close(model(x), Reference(model)(x.astype("float64")))


def test_call_of_the_learning_path():
    model = keras_edifice.build(
        "deep_sets", input_dim=3, hidden_dim=64, output_dim=10, pool="mean"
    )
    assert model(rng.normal(size=(4, 20, 3)).astype("float32")).shape == (4, 10)


def test_dropout_acts_in_training_alone():
    model, x = small_model(dropout=0.5, rho_sizes=[64]), sets()
    assert_close(model(x), Reference(model)(x.astype("float64")))
    assert np.abs(to_numpy(model(x, training=True)) - to_numpy(model(x))).max() > 1e-3
    # One before each of the two dense layers of ρ.
    drops = [d for d in model.layers if isinstance(d, keras.layers.Dropout)]
    assert len(drops) == 2


def test_masked_model_saves_and_loads(tmp_path):
    model, inputs = small_model(use_mask=True, **EQUIVARIANT), masked_sets()
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras", safe_mode=True)
    assert_close(loaded(inputs), model(inputs), 1e-6)


def test_masked_model_trains_on_sets_of_any_size():
    model = small_model(use_mask=True, pool="mean")
    model.compile(keras.optimizers.Adam(1e-2), loss="mse")
    x, y = masked_sets(), np.zeros((2, 3), "float32")
    losses = model.fit(x, y, epochs=5, verbose=0).history["loss"]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("format", ["onnx", "saved_model"])
@pytest.mark.parametrize("options", FORMS)
def test_masked_model_exports(tmp_path, format, options):
    model = small_model(use_mask=True, **options)
    path = tmp_path / ("model.onnx" if format == "onnx" else "model")
    assert keras_edifice.export(model, path, format) < 1e-5
    assert path.exists()


def test_published_size():
    # Point clouds of ModelNet40: the layout of the released code.
    model = keras_edifice.build("deep_sets", variant="modelnet40")
    assert model.count_params() == 340_520
    assert model.output_shape == (None, 40)
