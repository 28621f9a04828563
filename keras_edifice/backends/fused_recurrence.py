"""PyTorch's own loops over the steps of LSTM and GRU, where Keras has one of Python."""

import keras

from keras_edifice.backends.running_torch import kept, runs_now


def has_standard_gates(layer):
    """Whether an LSTM or GRU layer of Keras is the one that fused loops compute."""
    return (
        layer.activation is keras.activations.tanh
        and layer.recurrent_activation is keras.activations.sigmoid
        and getattr(layer, "reset_after", True)
    )


class FusedRecurrence:
    """Beside the LSTM or GRU layer of Keras, before it among the bases of a class.

    On PyTorch the steps of a layer run in one call where that computes the same: the
    activations are the standard ones and there is neither mask nor dropout inside. Such
    a call cannot be differentiated twice on CPUs.
    """

    def call(self, sequences, initial_state=None, mask=None, training=False):
        if self.stateful or not self._fusible(sequences, mask, training):
            return super().call(sequences, initial_state, mask, training)
        if initial_state is None:
            initial_state = self.get_initial_state(len(sequences))
        last, outputs, state = self.inner_loop(sequences, initial_state, None, training)
        output = outputs if self.return_sequences else last
        return (output, *state) if self.return_state else output

    def inner_loop(self, sequences, initial_state, mask, training=False):
        if self._fusible(sequences, mask, training):
            return self._fused(sequences, keras.tree.flatten(initial_state))
        return super().inner_loop(sequences, initial_state, mask, training)

    def _fusible(self, sequences, mask, training):
        if not runs_now(sequences):
            return False
        dropped = self.recurrent_dropout or (self.dropout and training)
        return has_standard_gates(self) and mask is None and not dropped

    def _fused(self, sequences, state):
        import torch

        x = torch.flip(sequences, [1]) if self.go_backwards else sequences
        run, count = (torch.lstm, 4) if len(state) == 2 else (torch.gru, 3)
        weights = [w.to(x.dtype) for w in self._weights_in_order(count)]
        state = [part.to(x.dtype)[None] for part in state]
        hidden = state if len(state) == 2 else state[0]
        train = torch.is_grad_enabled()
        outputs, *state = run(
            x, hidden, weights, len(weights) == 4, 1, 0.0, train, False, True
        )
        return outputs[:, -1], outputs, [part[0] for part in state]

    def _weights_in_order(self, count):
        """The weights as PyTorch wants them."""

        def arrange():
            return [_in_order(w, count) for w in self._weights_of_torch()]

        return kept(self, [w.value for w in self.cell.weights], arrange)

    def _weights_of_torch(self):
        """The kernels with the gates along the first axis, and two biases if any."""
        import torch

        cell = self.cell
        kernels = [cell.kernel.value.T, cell.recurrent_kernel.value.T]
        if cell.bias is None:
            return kernels
        bias = cell.bias.value
        biases = list(bias) if bias.ndim == 2 else [bias, torch.zeros_like(bias)]
        return kernels + biases


def _in_order(weight, count):
    """The gates in PyTorch's order: reset before update where there are three."""
    if count == 4:
        return weight.contiguous()
    import torch

    update, reset, new = weight.chunk(3)
    return torch.cat([reset, update, new])
