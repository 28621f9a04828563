"""LSTM and GRU with all their steps as one operation, where loops compile."""

import keras
from keras import ops, tree

from keras_edifice.backends.fused_recurrence import has_standard_gates
from keras_edifice.backends.traits import COMPILES_LOOPS
from keras_edifice.ops.tracing import exporting


class ScannedRecurrence:
    """Beside the LSTM or GRU layer of Keras, before it among the bases of a class.

    On JAX and TensorFlow `scan`, a method of the class, takes the place of Keras's loop
    unless there is a mask, dropout inside, another activation, a GPU, for which Keras
    has kernels, or an export. It gives the same numbers, and in float32 whatever the
    precision of the layer.
    """

    def inner_loop(self, sequences, initial_state, mask, training=False):
        if not self._scannable(mask, training):
            return super().inner_loop(sequences, initial_state, mask, training)
        x = ops.flip(sequences, axis=1) if self.go_backwards else sequences
        x = ops.swapaxes(x, 0, 1)  # before they grow to the gates
        outputs, *state = self.scan(x, *tree.flatten(initial_state))
        return state[0], ops.swapaxes(outputs, 0, 1), state

    def _scannable(self, mask, training):
        dropped = training and (self.dropout or self.recurrent_dropout)
        if not COMPILES_LOOPS or exporting() or self.unroll or mask is not None:
            return False
        return has_standard_gates(self) and not dropped and not self._has_kernels()

    def _has_kernels(self):
        devices = keras.distribution.list_devices()
        gpu = any(device.startswith("gpu") for device in devices)
        return self.use_cudnn is True or (self.use_cudnn == "auto" and gpu)
