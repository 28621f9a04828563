"""What must hold for every registered architecture, from its smallest example alone."""

import functools
import gc

import keras
import numpy as np
import pytest

import keras_edifice
from keras_edifice.samples import sample_inputs
from tests.support.close import assert_close, difference, to_numpy
from tests.support.shaking import shake

BACKEND = keras.backend.backend()
EXPORT_LIMIT = 1e-4


def for_each(but=(), **facets):
    """Runs a test for each architecture of these facets."""
    names = keras_edifice.list_architectures(**facets)
    return pytest.mark.parametrize("name", [name for name in names if name not in but])


every_architecture = for_each()
every_sequence = for_each(kind="sequence")
every_other = for_each(but=keras_edifice.list_architectures(kind="sequence"))
every_causal = for_each(causal=True)


def new_model(name, seed=1, **options):
    keras.utils.set_random_seed(seed)
    tiny = keras_edifice.info(name).tiny
    return keras_edifice.build(name, **{**tiny, **options})


@functools.lru_cache(maxsize=1)
def shared_model(name):
    """Built once, weights shaken; the checks that use it leave it as it is."""
    return shake(new_model(name))


@functools.lru_cache(maxsize=1)
def shared_outputs(name):
    model = shared_model(name)
    return flat(model.predict(sample_inputs(model), verbose=0))


def flat(outputs):
    return [to_numpy(y) for y in keras.tree.flatten(outputs)]


def has_objective(model):
    """Whether the model brings its own loss, so that `fit(x)` trains it."""
    own = type(model).compute_loss is not keras.Model.compute_loss
    return own and "num_classes" not in {
        k for k, v in model.options.items() if v is not None
    }


def targets(model, batch_size, seed=2):
    rng = np.random.default_rng(seed)
    shapes = [y.shape[1:] for y in shared_outputs(model.architecture)]
    flat = [rng.uniform(size=(batch_size, *shape)) for shape in shapes]
    return keras.tree.pack_sequence_as(
        model.output, [y.astype("float32") for y in flat]
    )


def compiled(model, optimizer, **options):
    loss = None if has_objective(model) else "mean_squared_error"
    model.compile(optimizer, loss=loss, **options)
    optimizer.build(model.trainable_variables)  # TensorFlow traces twice else
    return model


def training_data(model, batch_size=4):
    x = sample_inputs(model, batch_size)
    if has_objective(model):
        return dict(x=x)
    return dict(x=x, y=targets(model, batch_size))


@every_architecture
def test_builds(name):
    model = shared_model(name)
    assert model.architecture == name
    assert set(model.options) == set(keras_edifice.info(name).options)
    for layer in model._flatten_layers():
        assert not isinstance(layer, keras.layers.Lambda), f"{layer.name} is a Lambda"
        assert_registered(type(layer))


def assert_registered(cls):
    known = keras.saving.get_registered_object(keras.saving.get_registered_name(cls))
    built_in = cls.__module__.startswith("keras.")
    assert built_in or known is cls, f"{cls.__name__} is not registered"


@every_architecture
def test_output_is_as_info_says(name):
    model, entry = shared_model(name), keras_edifice.info(name)
    shapes = [entry.shape(spec, model.options) for spec in entry.outputs.values()]
    if len(shapes) > 1:
        assert set(model.output) == set(entry.outputs)
        shapes = [
            entry.shape(entry.outputs[k], model.options) for k in sorted(model.output)
        ]
    outputs = keras.tree.flatten(model.predict(sample_inputs(model), verbose=0))
    symbolic = keras.tree.flatten(model.output)
    for y, tensor, shape in zip(outputs, symbolic, shapes, strict=True):
        assert y.dtype == tensor.dtype == "float32"
        assert len(y.shape) == len(tensor.shape) == len(shape)
        for size, declared, said in zip(y.shape, tensor.shape, shape, strict=True):
            assert declared in (None, size)
            assert said in (None, size), f"info says {shape}, the output is {y.shape}"


@every_architecture
def test_other_batch_sizes(name):
    model = shared_model(name)
    first = keras.tree.map_structure(lambda a: a[:1], sample_inputs(model))
    outputs = flat(model.predict(first, verbose=0))
    for part, all_rows in zip(outputs, shared_outputs(name), strict=True):
        # relative to the largest: a convolution sums in an order that suits the batch
        assert difference(part, all_rows[:1]) <= 1e-5


@every_architecture
def test_output_is_finite(name):
    model = shared_model(name)
    for scale in (0.0, 1.0, 100.0):
        x = keras.tree.map_structure(
            lambda a, s=scale: (a * s).astype(a.dtype) if a.dtype.kind == "f" else a,
            sample_inputs(model),
        )
        for y in flat(model.predict(x, verbose=0)):
            assert np.isfinite(y).all(), f"not finite for inputs of size {scale}"


@every_architecture
def test_same_seed_gives_the_same_weights(name):
    first, second = new_model(name, 3).get_weights(), new_model(name, 3).get_weights()
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        assert np.array_equal(a, b)
    if first:
        other = new_model(name, 4).get_weights()
        assert any(not np.array_equal(a, b) for a, b in zip(first, other, strict=True))


@functools.lru_cache(maxsize=1)
def shared_training(name):
    """A new model whose step of training is compiled once for the checks below."""
    model = new_model(name)
    # TensorFlow compiles by XLA on accelerators alone; ask for it here as well.
    return compiled(model, keras.optimizers.Adam(1e-2), jit_compile=BACKEND != "torch")


def from_the_start(model, start):
    """The model with the weights and seeds of `start`, its optimizer as if new."""
    for variable, first in zip(model.variables, start.variables, strict=True):
        variable.assign(to_numpy(first))
    for state in model.optimizer.variables:
        if state is not model.optimizer.learning_rate:
            state.assign(np.zeros(state.shape))
    return model


@every_architecture
def test_every_weight_gets_a_gradient(name):
    model = from_the_start(shared_training(name), shared_model(name))
    model.fit(**training_data(model, 8), batch_size=8, verbose=0)
    # After one step the momentum of Adam is the gradient times 1 - beta_1.
    states = [to_numpy(v) for v in model.optimizer.variables if "momentum" in v.name]
    for weight, gradient in zip(model.trainable_variables, states, strict=True):
        assert np.isfinite(gradient).all(), f"{weight.path}: not finite"
        assert np.any(gradient != 0), f"{weight.path}: no gradient"


def loss_of(evaluated):
    return evaluated[0] if isinstance(evaluated, list) else evaluated


@every_architecture
def test_fit_lowers_the_loss(name):
    model = from_the_start(shared_training(name), new_model(name))
    data = training_data(model, 8)
    before = loss_of(model.evaluate(**data, batch_size=8, verbose=0))
    history = model.fit(**data, batch_size=8, epochs=12, shuffle=False, verbose=0)
    after = loss_of(model.evaluate(**data, batch_size=8, verbose=0))
    if any(weight.name.startswith("moving_") for weight in model.weights):
        # A few batches are too few for moving statistics: as training sees it.
        before, after = history.history["loss"][0], history.history["loss"][-1]
    assert np.isfinite(after)
    assert after < before, f"{before} did not fall: {after}"


@every_architecture
def test_saves_and_loads(name, tmp_path):
    model, path = shared_model(name), tmp_path / "model.keras"
    model.save(path)
    loaded = keras.saving.load_model(path, safe_mode=True)
    assert type(loaded) is type(model)
    assert (loaded.architecture, loaded.options) == (model.architecture, model.options)
    outputs = flat(loaded.predict(sample_inputs(loaded), verbose=0))
    for y, expected in zip(outputs, shared_outputs(name), strict=True):
        assert_close(y, expected, 1e-6)


@every_architecture
def test_int8_weights_survive_saving(name, tmp_path, monkeypatch):
    model, path = shake(new_model(name)), tmp_path / "model.keras"
    try:
        with monkeypatch.context() as without:  # Keras collects garbage for every layer
            without.setattr(gc, "collect", lambda *_: 0)
            model.quantize("int8")
    except ValueError as error:  # Keras has no int8 form of any layer of this model
        pytest.skip(f"{name} has nothing to quantise: {error}")
    outputs = flat(model.predict(sample_inputs(model), verbose=0))
    for y, expected in zip(outputs, shared_outputs(name), strict=True):
        assert np.isfinite(y).all()
        assert y.shape == expected.shape
    model.save(path)
    loaded = keras.saving.load_model(path)
    reloaded = flat(loaded.predict(sample_inputs(loaded), verbose=0))
    for y, expected in zip(reloaded, outputs, strict=True):
        assert_close(y, expected, 1e-6)


@every_architecture
def test_half_precision_stays_near(name):
    policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        model = new_model(name)
        model.set_weights(shared_model(name).get_weights())
        outputs = flat(model.predict(sample_inputs(model), verbose=0))
        compiled(model, keras.optimizers.SGD(1e-3), run_eagerly=BACKEND == "tensorflow")
        history = model.fit(**training_data(model), batch_size=4, verbose=0).history
    finally:
        keras.config.set_dtype_policy(policy)
    assert np.isfinite(history["loss"]).all()
    for y, expected in zip(outputs, shared_outputs(name), strict=True):
        # bfloat16 keeps 8 bits: a few layers of it leave about one part in thirty. The
        # mean square, because one spike that rounding flips moves one output far.
        distance = np.sqrt(np.mean(np.square(y - expected)))
        assert distance < 0.06 * np.abs(expected).max()


@every_architecture
def test_onnx_agrees(name, tmp_path):
    path = tmp_path / "model.onnx"
    assert keras_edifice.export(shared_model(name), path, "onnx") <= EXPORT_LIMIT
    assert path.exists()


@every_other  # those of sequences are written below, for every length
def test_saved_model_agrees(name, tmp_path):
    path = tmp_path / "model"
    assert keras_edifice.export(shared_model(name), path, "saved_model") <= EXPORT_LIMIT
    assert (path / "saved_model.pb").exists()


@every_sequence
@pytest.mark.parametrize("format", ["onnx", "saved_model"])
def test_open_length_exports(name, format, tmp_path):
    model = shake(new_model(name, window_size=None))
    assert None in model.input_shape[1:]
    path = tmp_path / "model.onnx"
    assert keras_edifice.export(model, path, format) <= EXPORT_LIMIT


@every_causal
def test_causal_means_blind_to_the_future(name):
    model = shake(new_model(name, return_sequences=True))
    x = sample_inputs(model, length=9)
    cut = x.shape[1] // 2
    changed = x.copy()
    changed[:, cut:] += 1.0
    before, after = model.predict(x, verbose=0), model.predict(changed, verbose=0)
    assert_close(after[:, :cut], before[:, :cut], 1e-5)
    assert difference(after[:, cut:], before[:, cut:]) > 1e-4
