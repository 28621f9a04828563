"""Echo State Network: a random recurrent network of which the readout alone learns.

    x_t = (1 - a) x_{t-1} + a tanh(u_t W_in + x_{t-1} W + b)
    y_t = [x_t; u_t] W_out + c

W has the spectral radius ρ, the largest modulus of its eigenvalues; below one, states
forget where they started, so that they echo the input alone. Jaeger 2001, The "echo
state" approach to analysing and training recurrent neural networks, GMD Report 148;
Lukoševičius 2012, A Practical Guide to Applying Echo State Networks.
"""

import keras
import numpy as np
from keras import layers, ops

from keras_edifice.blocks.dense import Dense
from keras_edifice.blocks.sequence import SequencePool
from keras_edifice.model import EdificeModel
from keras_edifice.ops.step_scan import step_scan
from keras_edifice.options import Count, Fraction, NonNegative, Positive, Size
from keras_edifice.registry import architecture


@keras.saving.register_keras_serializable("keras_edifice")
class ReservoirLayer(layers.Layer):
    """(batch, time, features) -> (batch, time, units), without trainable weights.

    W, W_in and b are drawn once, in float64 from `seed`, so that they are the same on
    every backend, and are saved with the layer. The state is x, (batch, units), in
    float32. A masked step leaves it as it is.

    Args:
        units: width of the state.
        spectral_radius: ρ of W.
        sparsity: share of zeros in W.
        input_scaling: deviation of the weights of the input.
        input_sparsity: share of zeros in W_in.
        bias_scaling: deviation of b.
        leak_rate: a; 0 keeps the state, 1 replaces it.
        concat_input: give [x_t; u_t], (batch, time, units + features).
        seed: of the random numbers.

    Raises:
        ValueError: W is so sparse that all its eigenvalues are zero.
    """

    def __init__(
        self,
        units,
        spectral_radius=0.9,
        sparsity=0.9,
        input_scaling=1.0,
        input_sparsity=0.0,
        bias_scaling=0.0,
        leak_rate=1.0,
        concat_input=False,
        seed=42,
        **kwargs,
    ):
        super().__init__(autocast=False, **kwargs)  # the state keeps its precision
        self.units, self.spectral_radius = units, spectral_radius
        self.sparsity, self.input_scaling = sparsity, input_scaling
        self.input_sparsity, self.bias_scaling = input_sparsity, bias_scaling
        self.leak_rate, self.concat_input, self.seed = leak_rate, concat_input, seed
        self.supports_masking = True

    def build(self, input_shape):
        drawn = self._draw(input_shape[-1])
        self.W, self.W_in, self.b = (
            self.add_weight(
                values.shape,
                lambda shape, dtype, values=values: ops.convert_to_tensor(
                    values, dtype=dtype
                ),
                trainable=False,
                autocast=False,
                name=name,
            )
            for name, values in drawn.items()
        )

    def _draw(self, features):
        """The fixed weights, float64."""
        rng = np.random.default_rng(self.seed)

        def sparse(shape, zeros):
            return rng.normal(size=shape) * (rng.random(shape) >= zeros)

        W = sparse((self.units, self.units), self.sparsity)
        radius = np.abs(np.linalg.eigvals(W)).max()
        if radius < 1e-6 and self.spectral_radius:
            raise ValueError(
                f"all eigenvalues of W are zero with units={self.units} and "
                f"sparsity={self.sparsity}; pass a lower sparsity or more units"
            )
        W *= self.spectral_radius / radius if self.spectral_radius else 0.0
        W_in = sparse((features, self.units), self.input_sparsity)
        b = rng.normal(size=self.units)
        return {"W": W, "W_in": self.input_scaling * W_in, "b": self.bias_scaling * b}

    def call(self, x, mask=None, initial_state=None, return_state=False):
        u = ops.cast(x, "float32")
        state = initial_state
        if state is None:
            state = ops.zeros_like(u[:, 0, :1]) * self.b
        driven = ops.matmul(u, self.W_in) + self.b
        if mask is not None:
            valid = ops.cast(ops.expand_dims(mask, -1), "float32")
            driven = ops.concatenate([driven, valid], axis=-1)

        def step(now, states):
            new = self._next(now[:, : self.units], states[0])
            if mask is not None:
                valid = now[:, self.units :]
                new = valid * new + (1.0 - valid) * states[0]
            return new, [new]

        y, (state,) = step_scan(step, driven, [state])
        y = self._output(y, x)
        return (y, state) if return_state else y

    def _next(self, driven, state):
        """The new state, from u_t W_in + b and the old one."""
        new = ops.tanh(driven + ops.matmul(state, self.W))
        return (1.0 - self.leak_rate) * state + self.leak_rate * new

    def _output(self, y, x):
        y = ops.cast(y, self.compute_dtype)
        if not self.concat_input:
            return y
        return ops.concatenate([y, ops.cast(x, self.compute_dtype)], axis=-1)

    def initial_state(self, batch_size):
        """The state before the first step: zeros."""
        return ops.zeros((batch_size, self.units), dtype="float32")

    def step(self, x_t, state):
        """One step: (batch, features) and the state -> the output and the new state."""
        driven = ops.matmul(ops.cast(x_t, "float32"), self.W_in) + self.b
        state = self._next(driven, state)
        return self._output(state, x_t), state

    def compute_output_shape(self, input_shape):
        features = input_shape[-1] if self.concat_input else 0
        return (*input_shape[:-1], self.units + features)


@keras.saving.register_keras_serializable("keras_edifice")
class ReservoirModel(EdificeModel):
    """A reservoir and its readout, the last layer."""

    def fit_readout(self, x, y, ridge=None, batch_size=32):
        """Sets the readout to the ridge regression of y on the states, in closed form.

        Solves (XᵀX + λ I) W = XᵀY with X and Y less their means, in float64.

        Args:
            x: (examples, time, features).
            y: what the model is to give for x, of the shape of its output.
            ridge: λ; that of the options if None.
            batch_size: examples that run at once.

        Returns:
            The model.

        Raises:
            ValueError: y is not of the shape of the output.
        """
        readout = self.layers[-1]
        states = keras.Model(self.input, readout.input)
        X = np.asarray(states.predict(x, batch_size=batch_size, verbose=0), "float64")
        Y = np.asarray(y, "float64")
        expected = (*X.shape[:-1], readout.units)
        if Y.shape != expected:
            raise ValueError(f"y must have the shape {expected}, received {Y.shape}")
        X, Y = (z.reshape(-1, z.shape[-1]) for z in (X, Y))
        means = X.mean(axis=0), Y.mean(axis=0)
        X, Y = X - means[0], Y - means[1]
        ridge = self.options["ridge"] if ridge is None else ridge
        kernel = np.linalg.solve(X.T @ X + ridge * np.eye(X.shape[1]), X.T @ Y)
        readout.set_weights([kernel, means[1] - means[0] @ kernel])
        return self


@architecture(
    paper="Jaeger 2001, The echo state approach to analysing and training recurrent "
    "neural networks, GMD Report 148",
    kind="sequence",
    inputs="(batch, window_size, input_size)",
    outputs="(batch, output_size | reservoir_size)",
    causal=True,
    streaming=True,
    tiny=dict(
        input_size=3,
        reservoir_size=6,
        output_size=2,
        sparsity=0.5,
        bias_scaling=0.3,
        leak_rate=0.6,
        concat_input=True,
        window_size=7,
    ),
)
def reservoir(
    *,
    input_size: Size,
    reservoir_size: Size = 500,
    output_size: Size | None = None,
    spectral_radius: NonNegative = 0.9,
    sparsity: Fraction = 0.9,
    input_scaling: Positive = 1.0,
    input_sparsity: Fraction = 0.0,
    bias_scaling: NonNegative = 0.0,
    leak_rate: Fraction = 1.0,
    washout: Count = 0,
    concat_input: bool = False,
    ridge: NonNegative = 1e-6,
    seed: int = 42,
    return_sequences: bool = False,
    window_size: Size | None = None,
) -> EdificeModel:
    """A fixed random recurrence and a linear readout, the only part that learns.

    Train it by `fit`, or at once by `model.fit_readout(x, y)`.

    Args:
        input_size: features of each step.
        reservoir_size: width of the recurrence.
        output_size: width of the readout; None for reservoir_size.
        spectral_radius: largest modulus of the eigenvalues of the recurrence; below
            one, it forgets where it started.
        sparsity: share of zeros among the weights of the recurrence.
        input_scaling: deviation of the weights of the input.
        input_sparsity: share of zeros among them.
        bias_scaling: deviation of the biases.
        leak_rate: share of a state that each step replaces.
        washout: first steps that are left out, while the state forgets its start.
        concat_input: the readout sees the input as well.
        ridge: regularisation of `fit_readout`.
        seed: of the fixed weights.
        return_sequences: give every step, (batch, window_size - washout, output_size),
            instead of the last.
        window_size: steps of the input, None for any number.

    Raises:
        ValueError: washout leaves no step of the window.
    """
    if window_size is not None and washout >= window_size:
        raise ValueError(
            f"washout must be below window_size, received {washout} and {window_size}"
        )
    inputs = keras.Input((window_size, input_size), name="inputs")
    x = ReservoirLayer(
        reservoir_size,
        spectral_radius=spectral_radius,
        sparsity=sparsity,
        input_scaling=input_scaling,
        input_sparsity=input_sparsity,
        bias_scaling=bias_scaling,
        leak_rate=leak_rate,
        concat_input=concat_input,
        seed=seed,
        name="reservoir",
    )(inputs)
    if not return_sequences:
        x = SequencePool("last", name="pool")(x)
    elif washout:
        x = layers.Cropping1D((washout, 0), name="washout")(x)
    y = Dense(output_size or reservoir_size, name="readout")(x)
    return ReservoirModel(inputs, y, name="reservoir")
