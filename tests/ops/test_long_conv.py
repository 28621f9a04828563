import functools

import keras
import numpy as np
import pytest
from keras import ops

from keras_edifice.exporting import export
from keras_edifice.ops import long_conv as module
from keras_edifice.ops.long_conv import MODES, long_conv, long_conv_step
from keras_edifice.ops.tracing import export_scope
from tests.support.applied import assert_same_gradients
from tests.support.close import assert_close, to_numpy
from tests.support.compiled import compiled

rng = np.random.default_rng(0)
FORMS = [*MODES, "matrices"]


def convolution(x, kernel, backward_kernel=None, past=None):
    """The sum of the module, a loop in float64."""
    seen = x if past is None else np.concatenate([past, x], axis=1)
    kept, y = seen.shape[1] - x.shape[1], np.zeros(seen.shape)
    for t in range(seen.shape[1]):
        for j in range(min(t + 1, len(kernel))):
            y[:, t] += kernel[j] * seen[:, t - j]
        if backward_kernel is not None:
            for j in range(min(seen.shape[1] - t, len(backward_kernel))):
                y[:, t] += backward_kernel[j] * seen[:, t + j]
    return y[:, kept:]


def normal(*shape):
    return rng.normal(size=shape).astype("float32")


def convolved(form, *arrays, **options):
    """`long_conv` in one of its forms."""

    def function(*arrays):
        mode = "fft" if form == "matrices" else form
        with export_scope("onnx" if form == "matrices" else None):
            return long_conv(*arrays, mode=mode, **options)

    return compiled(function)(*(ops.convert_to_tensor(z) for z in arrays))


@pytest.mark.parametrize(
    ("length", "taps"), [(1, 1), (1, 5), (7, 7), (40, 5), (40, 40), (40, 100)]
)
@pytest.mark.parametrize("form", FORMS)
def test_output_is_the_sum(form, length, taps):
    x, kernel = normal(2, length, 3), normal(taps, 3)
    assert_close(convolved(form, x, kernel), convolution(x, kernel))


@pytest.mark.parametrize("taps", [1, 30])
@pytest.mark.parametrize("form", FORMS)
def test_backward_kernel_adds_what_lies_ahead(form, taps):
    x, kernel, ahead = normal(2, 17, 3), normal(5, 3), normal(taps, 3)

    def both(x, kernel, ahead):
        mode = "fft" if form == "matrices" else form
        with export_scope("onnx" if form == "matrices" else None):
            return long_conv(x, kernel, backward_kernel=ahead, mode=mode)

    found = compiled(both)(*(ops.convert_to_tensor(z) for z in (x, kernel, ahead)))
    assert_close(found, convolution(x, kernel, ahead))


@pytest.mark.parametrize("form", FORMS)
def test_kernel_is_shared_along_axes_of_size_one(form):
    x, kernel = normal(2, 9, 3, 2, 4), normal(9, 3, 1, 4)
    assert_close(convolved(form, x, kernel), convolution(x, kernel))


@pytest.mark.parametrize("form", FORMS)
def test_gradients_are_those_of_the_sum(form):
    arrays = [normal(2, 7, 2), normal(5, 1), normal(9, 2)]

    def function(x, kernel, ahead):
        mode = "fft" if form == "matrices" else form
        with export_scope("onnx" if form == "matrices" else None):
            return long_conv(x, kernel, backward_kernel=ahead, mode=mode)

    assert_same_gradients(function, convolution, arrays)


@pytest.mark.parametrize(
    ("form", "taps"), [*((form, 30) for form in FORMS), ("fft", 1), ("direct", 6)]
)
def test_segments_with_the_carried_state_are_one_pass(form, taps):
    x, kernel = normal(2, 20, 3), normal(taps, 3)
    run = functools.partial(convolved, form, return_state=True)
    first, state = run(x[:, :9], kernel)
    assert state.shape == (2, taps - 1, 3)
    second, last = run(x[:, 9:], kernel, to_numpy(state).astype("float32"))
    expected = convolution(x, kernel)
    assert_close(first, expected[:, :9])
    assert_close(second, expected[:, 9:])
    assert_close(last, np.pad(x, [(0, 0), (30, 0), (0, 0)])[:, 51 - taps :], 0)


@pytest.mark.parametrize("taps", [1, 6, 30])
def test_step_by_step_is_the_convolution(taps):
    x, kernel = normal(2, 9, 3), normal(taps, 3)
    before = normal(2, taps - 1, 3)
    state, outputs = ops.convert_to_tensor(before), []
    step = compiled(long_conv_step)
    for t in range(9):
        now = ops.convert_to_tensor(x[:, t])
        y, state = step(now, ops.convert_to_tensor(kernel), state)
        outputs.append(to_numpy(y))
    assert_close(np.stack(outputs, 1), convolution(x, kernel, past=before))
    _, last = convolved("fft", x, kernel, before, return_state=True)
    assert_close(state, last, 0)


def test_gradient_in_the_state_is_that_of_the_sum():
    arrays = [normal(2, 4, 2), normal(4, 2), normal(2, 3, 2)]
    assert_same_gradients(
        long_conv, lambda x, kernel, past: convolution(x, kernel, past=past), arrays
    )


@pytest.mark.parametrize(("form", "tolerance"), [("direct", 0), ("fft", 1e-6)])
def test_future_steps_do_not_change_the_past(form, tolerance):
    x, kernel = normal(2, 20, 3), normal(20, 3)
    changed = x.copy()
    changed[:, 12:] += 1.0
    found = convolved(form, changed, kernel)[:, :12]
    assert_close(found, convolved(form, x, kernel)[:, :12], tolerance)


@pytest.mark.parametrize("form", ["fft", "matrices"])
def test_4096_steps_stay_near_the_sum(form):
    x, kernel = normal(1, 4096, 2), normal(4096, 2)
    expected = [
        np.convolve(*z.astype("float64"))[:4096]
        for z in np.stack([x[0], kernel], axis=0).transpose(2, 0, 1)
    ]
    # Outputs reach 240; what is lost is relative to that, at every step.
    expected = np.stack(expected, axis=-1)[None] / 240
    assert_close(convolved(form, x, kernel) / 240, expected)


def test_half_precision_is_summed_in_float32():
    x = ops.cast(ops.full((1, 1000, 1), 0.001), "bfloat16")
    kernel = ops.ones((1000, 1), dtype="bfloat16")
    for mode in MODES:
        y, state = convolved(mode, x, kernel, return_state=True)
        for z in (y, state):
            assert keras.backend.standardize_dtype(z.dtype) == "bfloat16"
        kept = to_numpy(ops.cast(x, "float32"))
        # bfloat16 keeps 8 bits; summed in it, the output would stop at 0.25.
        assert_close(ops.cast(y, "float32"), np.cumsum(kept, axis=1), 1e-2)


def test_transforms_are_as_long_as_needed_and_have_small_factors(monkeypatch):
    sizes, rfft = [], module.ops.rfft
    monkeypatch.setattr(
        module.ops, "rfft", lambda x, size: sizes.append(size) or rfft(x, size)
    )
    for taps, past, size in ((50, 0, 120), (4, 0, 60), (50, 49, 120)):
        x, kernel = np.ones((1, 50, 1)), np.ones((taps, 1))
        # What wraps around falls on the steps before, whose outputs are dropped.
        state = [np.ones((1, past, 1))] if past else []
        convolved("fft", *(z.astype("float32") for z in (x, kernel, *state)))
        assert set(sizes) == {size}
        sizes.clear()


def test_wrong_arguments_are_refused():
    x, kernel = ops.ones((1, 5, 1)), ops.ones((5, 1))
    with pytest.raises(ValueError, match="mode must be .* received 'toeplitz'"):
        long_conv(x, kernel, mode="toeplitz")
    with pytest.raises(ValueError, match="backward_kernel has no state"):
        long_conv(x, kernel, return_state=True, backward_kernel=kernel)
    with pytest.raises(ValueError, match="kernel of known length"):
        long_conv(x, keras.Input((1,)), return_state=True)


@keras.saving.register_keras_serializable("tests")
class Filters(keras.layers.Layer):
    """(batch, time, features) -> the same: a learned filter in both directions."""

    def __init__(self, mode, taps=60, **kwargs):
        super().__init__(**kwargs)
        self.mode, self.taps = mode, taps

    def build(self, input_shape):
        shape = (2, self.taps, input_shape[-1])
        self.kernel = self.add_weight(shape, "random_normal", name="kernel")

    def call(self, x):
        kernel = ops.convert_to_tensor(self.kernel)
        both = long_conv(x, kernel[0], backward_kernel=kernel[1], mode=self.mode)
        return both + long_conv(x, kernel[1], mode=self.mode)

    def compute_output_shape(self, input_shape):
        return input_shape


def model_of(mode, length):
    inputs = keras.Input((length, 3), name="inputs")
    return keras.Model(inputs, Filters(mode, name="filters")(inputs), name="model")


@pytest.mark.parametrize("mode", MODES)
def test_unknown_length_trains_and_predicts(mode):
    model = model_of(mode, None)
    model.compile("sgd", "mse")
    tensorflow = keras.backend.backend() == "tensorflow"
    # TensorFlow forgets the length after the second; the others trace each anew.
    for length in (9, 5, 12) if tensorflow else (9,):
        x, before = normal(2, length, 3), model.get_weights()[0]
        model.fit(x, np.ones((2, length, 3)), verbose=0)
        kernel = model.get_weights()[0]
        assert np.abs(kernel - before).max() > 0
        expected = convolution(x, kernel[0] + kernel[1], kernel[1])
        assert_close(model.predict(x, verbose=0), expected)


def test_unknown_length_takes_no_matrices_in_training(monkeypatch):
    if keras.backend.backend() != "tensorflow":
        pytest.skip("only TensorFlow trains without knowing the length")
    monkeypatch.setattr(module, "_by_matrices", None)
    model = model_of("fft", None)
    model.compile("sgd", "mse")
    for length in (9, 5, 12):
        x = normal(2, length, 3)
        model.fit(x, x, verbose=0)


@pytest.mark.parametrize("mode", MODES)
def test_compiled_training_is_that_of_the_sum(mode):
    model = model_of(mode, 9)
    on_tensorflow = keras.backend.backend() == "tensorflow"
    model.compile("sgd", "mse", jit_compile=on_tensorflow or "auto")
    x, (kernel,), target = normal(2, 9, 3), model.get_weights(), np.ones((2, 9, 3))
    y = convolution(x, kernel[0] + kernel[1], kernel[1])
    loss = model.fit(x, target, verbose=0).history["loss"][0]
    assert_close(loss, np.square(y - target).mean())
    assert model.evaluate(x, target, verbose=0) < loss


@pytest.mark.parametrize(
    ("mode", "format", "length"),
    [("fft", "onnx", None), ("direct", "onnx", 9), ("fft", "saved_model", 9)],
)
def test_filters_are_exported(mode, format, length, tmp_path):
    path = tmp_path / ("model.onnx" if format == "onnx" else "model")
    assert export(model_of(mode, length), path, format) <= 1e-5


def test_float64_is_computed_in_float64():
    if keras.backend.backend() == "jax":
        pytest.skip("JAX has float64 only if the whole process asks for it")
    x, kernel = rng.normal(size=(1, 9, 2)), rng.normal(size=(9, 2))
    arrays = [ops.convert_to_tensor(z, dtype="float64") for z in (x, kernel)]
    # Not the matrices: files hold float32, and on PyTorch their positions come from
    # Keras' cumsum, which rounds to it.
    for form in MODES:
        y = convolved(form, *arrays)
        assert keras.backend.standardize_dtype(y.dtype) == "float64"
        assert_close(y, convolution(x, kernel), 1e-12)
