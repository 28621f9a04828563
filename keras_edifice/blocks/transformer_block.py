"""The two residual branches of a transformer: a mixer of tokens, then a feed-forward.

    pre:       x ← x + f(norm(x))          for the mixer, then for the feed-forward
    post:      x ← norm(x + f(x))          Vaswani et al. 2017, arXiv:1706.03762
    parallel:  x ← x + mixer(norm(x)) + ffn(norm(x))     Wang & Komatsuzaki 2021, GPT-J
    sandwich:  x ← x + norm(f(norm(x)))    Ding et al. 2021, arXiv:2105.13290
    adaptive:  x ← x + α ⊙ f(y), (y, α) of `AdaptiveNorm`, arXiv:2212.09748

Any layer that keeps the shape can be the mixer: attention, a convolution, a
recurrence.
"""

import inspect

import keras
from keras import layers, ops

from keras_edifice.blocks.adaptive_norm import AdaptiveNorm
from keras_edifice.blocks.composite import Composite
from keras_edifice.blocks.drop_path import DropPath, drop_path_rates
from keras_edifice.blocks.layer_norm import LayerNorm
from keras_edifice.blocks.layer_scale import LayerScale
from keras_edifice.blocks.rms_norm import RMSNorm

LAYOUTS = ("pre", "post", "parallel", "sandwich", "adaptive")
NORMS = {"layer": LayerNorm, "rms": RMSNorm}


@keras.saving.register_keras_serializable("keras_edifice")
class TransformerBlock(Composite):
    """(batch, time, features) -> the same. Causal and streaming where the mixer is.

    The state is (that of the mixer, that of the feed-forward), () for a layer without.

    Args:
        mixer: layer that mixes the tokens and keeps the shape.
        ffn: layer for each token, such as `FeedForward` or `GatedFFN`; None for none.
        layout: "pre", "post", "parallel", "sandwich" or "adaptive", see above; the
            last is called with a condition, (batch, c).
        norm: "layer" or "rms".
        epsilon: of the normalisations.
        dropout: rate on the output of each branch, in training.
        drop_path: probability that a branch of an example is dropped, in training.
        layer_scale: initial factor of the branches' channels; None for no such factor.
        remat: in training, keep only the input and compute the branches again for the
            gradient (Chen et al. 2016, arXiv:1604.06174): less memory for more time.

    Raises:
        ValueError: unknown layout or norm; `remat` with a branch that draws random
            numbers, which would be others the second time.
    """

    def __init__(
        self,
        mixer,
        ffn=None,
        layout="pre",
        norm="layer",
        epsilon=1e-5,
        dropout=0.0,
        drop_path=0.0,
        layer_scale=None,
        remat=False,
        **kwargs,
    ):
        super().__init__(**kwargs)
        for name, value, choices in (
            ("layout", layout, LAYOUTS),
            ("norm", norm, NORMS),
        ):
            if value not in choices:
                allowed = ", ".join(map(repr, choices))
                raise ValueError(f"{name} must be one of {allowed}, received {value!r}")
        self.mixer, self.ffn, self.layout = mixer, ffn, layout
        self.norm, self.epsilon = norm, epsilon
        self.dropout, self.drop_path = dropout, drop_path
        self.layer_scale, self.remat = layer_scale, remat
        self.supports_masking = True

    def build(self, x_shape, condition_shape=None):
        self.branches = [name for name in ("mixer", "ffn") if getattr(self, name)]
        for name in self.branches:
            branch = getattr(self, name)
            if not branch.built:
                branch.build(x_shape)
            if name == "mixer" or self.layout != "parallel":
                self._norm(f"{name}_norm", x_shape, condition_shape)
            if self.layout == "sandwich":
                self._norm(f"{name}_post_norm", x_shape)
            if self.layer_scale is not None:
                self._own(f"{name}_scale", LayerScale, self.layer_scale).build(x_shape)
            self._own(f"{name}_dropout", layers.Dropout, self.dropout)
            self._own(f"{name}_drop_path", DropPath, self.drop_path)
        if self.remat and any("seed_generator" in v.path for v in self.variables):
            raise ValueError(
                f"remat=True of {self.name} needs branches without random numbers, "
                "received one that drops; pass rates of 0 or remat=False"
            )

    def _own(self, name, kind, *arguments):
        """Makes a sub-layer that is an attribute of its own name."""
        layer = kind(*arguments, dtype=self.dtype_policy, name=name)
        setattr(self, name, layer)
        return layer

    def _norm(self, name, x_shape, condition_shape=None):
        if self.layout == "adaptive":
            norm = self._own(name, AdaptiveNorm, True, self.epsilon)
            norm.build(x_shape, condition_shape)
        else:
            self._own(name, NORMS[self.norm], self.epsilon).build(x_shape)

    def call(
        self,
        x,
        condition=None,
        mask=None,
        training=False,
        initial_state=None,
        return_state=False,
    ):
        states = dict(zip(("mixer", "ffn"), initial_state or ((), ()), strict=True))
        options = dict(mask=mask, training=training, return_state=return_state)

        def run(name, x):
            branch = getattr(self, name)
            accepted = inspect.signature(branch.call).parameters
            given = {k: v for k, v in options.items() if k in accepted}
            if not hasattr(branch, "initial_state"):
                given.pop("return_state", None)
                return branch(x, **given)
            if initial_state is not None:
                given["initial_state"] = states[name]
            y = branch(x, **given)
            if return_state:
                y, states[name] = y
            return y

        def branches(x):
            return self._layout(x, condition, run, training)

        if self.remat and training and not return_state:
            branches = keras.remat(branches)
        x = branches(x)
        return (x, (states["mixer"], states["ffn"])) if return_state else x

    def _layout(self, x, condition, run, training):
        """The residual stream after both branches; `run(name, x)` computes one."""

        def branch(name, x, gate=None):
            y = run(name, x)
            if self.layout == "sandwich":
                y = getattr(self, f"{name}_post_norm")(y)
            if gate is not None:
                y = gate * y
            if self.layer_scale is not None:
                y = getattr(self, f"{name}_scale")(y)
            y = getattr(self, f"{name}_dropout")(y, training=training)
            return getattr(self, f"{name}_drop_path")(y, training=training)

        if self.layout == "parallel":
            h = self.mixer_norm(x)
            return x + sum(branch(name, h) for name in self.branches)
        for name in self.branches:
            norm = getattr(self, f"{name}_norm")
            if self.layout == "post":
                x = norm(x + branch(name, x))
            elif self.layout == "adaptive":
                x = x + branch(name, *norm(x, condition))
            else:
                x = x + branch(name, norm(x))
        return x

    def initial_state(self, batch_size, max_length=None):
        """The states of mixer and feed-forward before the first step.

        Args:
            batch_size: number of rows.
            max_length: of a mixer that caches tokens; its own if None.
        """

        def of(branch):
            if not hasattr(branch, "initial_state"):
                return ()
            accepted = inspect.signature(branch.initial_state).parameters
            if max_length is None or "max_length" not in accepted:
                return branch.initial_state(batch_size)
            return branch.initial_state(batch_size, max_length=max_length)

        return of(self.mixer), of(self.ffn)

    def step(self, x_t, state):
        """One step: (batch, features) and the state -> the output and the new state.

        Raises:
            TypeError: the mixer has no `step`, or the block takes a condition.
        """
        if not hasattr(self.mixer, "step") or self.layout == "adaptive":
            cause = (
                "its layout 'adaptive' takes a condition"
                if self.layout == "adaptive"
                else f"{self.mixer.name} ({type(self.mixer).__name__}) has no step"
            )
            raise TypeError(f"{self.name} cannot run token by token: {cause}")
        states = dict(zip(("mixer", "ffn"), state, strict=True))

        def run(name, x):
            branch = getattr(self, name)
            if not hasattr(branch, "step"):
                return branch(x)
            y, states[name] = branch.step(x, states[name])
            return y

        y = self._layout(ops.convert_to_tensor(x_t), None, run, training=False)
        return y, (states["mixer"], states["ffn"])

    def compute_mask(self, x, mask=None):
        return mask[0] if isinstance(mask, list | tuple) else mask

    def compute_output_shape(self, x_shape, condition_shape=None):
        return x_shape

    def get_config(self):
        parts = {
            name: keras.saving.serialize_keras_object(getattr(self, name))
            for name in ("mixer", "ffn")
        }
        for part in filter(None, parts.values()):
            part.pop("build_config", None)  # the block builds them, under its own name
        return {**super().get_config(), **parts}

    @classmethod
    def from_config(cls, config):
        parts = {
            name: keras.saving.deserialize_keras_object(config[name])
            for name in ("mixer", "ffn")
        }
        return cls(**{**config, **parts})


def stack(x, make_block, num_layers, drop_path=0.0):
    """Block after block, symbolic.

    Args:
        x: a symbolic tensor.
        make_block: function (index, drop-path rate) -> layer.
        num_layers: number of blocks.
        drop_path: rate at the last block, growing linearly from zero.
    """
    for i, rate in enumerate(drop_path_rates(drop_path, num_layers)):
        x = make_block(i, rate)(x)
    return x
