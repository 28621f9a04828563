"""Forward pass, step of training and step of streaming of architectures, measured."""

import keras
import numpy as np
from keras import ops, tree

from keras_edifice import registry
from keras_edifice.backends.peer_models import PEER_MODELS, PeerModel
from keras_edifice.backends.timing import forward, forward_and_backward
from keras_edifice.benchmark.measure import in_turn, keep_freed_memory
from keras_edifice.benchmark.rows import OURS, row
from keras_edifice.samples import sample_inputs
from keras_edifice.streaming import streaming

LENGTHS = (256, 512, 1024)
PARTS = ("forward", "training step", "streaming step")


def measure(
    names,
    options=None,
    lengths=LENGTHS,
    batch=4,
    width=256,
    parts=PARTS,
    peers=False,
    progress=print,
    least=4.0,
):
    """Measures on the active backend.

    The forward pass is that of `predict`, the step of training that of `fit` with Adam
    and the mean squared error, the streaming step that of `keras_edifice.streaming`
    after `length` - 1 steps. Memory is that of the tensors of a forward pass, and of a
    forward and backward pass.

    Args:
        names: of architectures.
        options: of all of them, beside the sizes below.
        lengths: of the sequences, for architectures of sequences.
        batch: examples at once.
        width: `embed_size` and `hidden_size` of architectures of sequences.
        parts: which of `PARTS`.
        peers: whether independent implementations run too, in turn with ours.
        progress: called with a line for each measurement.
        least: seconds that are spent on each measurement at least.

    Returns:
        List of `Row`.

    Raises:
        ValueError: an architecture or a part is unknown.
    """
    for part in parts:
        if part not in PARTS:
            raise ValueError(
                f"unknown part {part!r}; they are {', '.join(map(repr, PARTS))}"
            )
    keep_freed_memory()
    rows = []
    for name in names:
        entry = registry.info(name)
        if peers and name not in PEER_MODELS:
            progress(f"{name}: no independent implementation to run beside it")
        for length in lengths if entry.kind == "sequence" else (None,):
            chosen = entry.resolve({**_sizes(entry, length, width), **(options or {})})
            case = Case(entry, chosen, length, batch, least)
            for part in parts:
                if part == "streaming step" and not entry.streaming:
                    continue
                for found in case.rows(part, peers):
                    rows.append(found)
                    progress(found.line())
    return rows


def _sizes(entry, length, width):
    """The options of an architecture of sequences that say how large it is."""
    if entry.kind != "sequence":
        return {}
    wanted = dict(window_size=length, embed_size=width, hidden_size=width)
    return {name: size for name, size in wanted.items() if name in entry.options}


class Case:
    """An architecture of one size with data, and the implementations beside it.

    Args:
        entry: the architecture.
        options: all of its options.
        length: steps of the sequences; None if they are none.
        batch: examples at once.
        least: seconds that are spent on each measurement at least.
    """

    def __init__(self, entry, options, length, batch, least):
        self.entry, self.options, self.length = entry, options, length
        self.least = least
        self.model = registry.build(entry.name, **options)
        self.model.compile("adam", "mse")
        self.x = sample_inputs(self.model, batch, length or 1)
        shapes = [(batch, *y.shape[1:]) for y in self.model.outputs]
        self.y = [np.zeros(shape, "float32") for shape in shapes]
        self.peers = {}

    def rows(self, part, peers=False):
        """The measurements of a part: ours first, then those of the others."""
        call, peak_bytes = {
            "forward": self._forward,
            "training step": self._training,
            "streaming step": self._streaming,
        }[part]()
        labels, calls, peaks = [OURS.format(keras.backend.backend())], [call], []
        peaks.append(peak_bytes())
        if peers and part != "streaming step":
            for label, peer in self._peers().items():
                labels.append(f"{label} (PyTorch)")
                calls.append(peer.forward if part == "forward" else peer.train)
                peaks.append(None if part == "forward" else peer.peak_bytes())
        times = in_turn(calls, self.least)
        for i, label in enumerate(labels):
            ours = times[0] if i else None
            yield row(
                self.entry.name, part, label, self.length, times[i], peaks[i], ours
            )

    def _peers(self):
        if not self.peers:
            for label, make in PEER_MODELS.get(self.entry.name, {}).items():
                self.peers[label] = PeerModel(make(self.options), self.x, self.y[0])
        return self.peers

    def _forward(self):
        def call():
            self.model.predict_on_batch(self.x)

        return call, self._memory(forward, training=False)

    def _training(self):
        targets = self.y if len(self.y) > 1 else self.y[0]

        def call():
            self.model.train_on_batch(self.x, targets)

        return call, self._memory(forward_and_backward, training=True)

    def _memory(self, run, training):
        """A function that gives the peak of `run`, a way to compute, in bytes."""
        fixed = [v.numpy() for v in self.model.non_trainable_variables]
        weights = [v.numpy() for v in self.model.trainable_variables]
        leaves = tree.flatten(self.x)

        def total(*arrays):
            x = tree.pack_sequence_as(self.x, list(arrays[: len(leaves)]))
            y, _ = self.model.stateless_call(
                arrays[len(leaves) :], fixed, x, training=training
            )
            return sum(ops.sum(part) for part in tree.flatten(y))

        return lambda: run(total, [*leaves, *weights]).peak_bytes()

    def _streaming(self):
        model = streaming(self.model)
        state = model.initial_state(self.x.shape[0])
        if self.length > 1:
            _, state = model.prefill(self.x[:, :-1], state)

        def call():
            y, _ = model.step(self.x[:, -1], state)
            ops.convert_to_numpy(y)

        return call, lambda: None
