"""Independent implementations of architectures in PyTorch, to measure ours against.

Each is a function of the resolved options of the architecture; it gives a module of
(batch, length, embed_size) -> (batch, length, hidden_size) with the same sizes, where
`embed_size` is `hidden_size`. Their packages are imported when they are asked for.
"""

import importlib

import numpy as np

from keras_edifice.backends.timing import torch_peak_bytes


class PeerModel:
    """A module with data, trained with Adam on the mean squared error of its last step.

    Args:
        module: (batch, length, features) -> (batch, length, width).
        x: its input, an array.
        y: targets of the last step, (batch, width).
    """

    def __init__(self, module, x, y):
        import torch

        self.module = module
        self.x, self.y = torch.as_tensor(x), torch.as_tensor(y)
        self.optimizer = torch.optim.Adam(module.parameters())

    def forward(self):
        """The last step, without gradients, as an array."""
        import torch

        with torch.no_grad():
            return np.asarray(self.module(self.x)[:, -1])

    def train(self):
        """One step of training; the loss as a number."""
        self.optimizer.zero_grad()
        loss = self._backward()
        self.optimizer.step()
        return loss.item()

    def peak_bytes(self):
        """The most memory that tensors take in a forward and backward pass."""
        self.optimizer.zero_grad()
        return torch_peak_bytes(self._backward)

    def _backward(self):
        loss = (self.module(self.x)[:, -1] - self.y).square().mean()
        loss.backward()
        return loss.detach()


def _module(function, inner):
    """`inner` as a part of a module that calls function(inner, x)."""
    import torch

    class Peer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return function(self.inner, x)

    return Peer()


def _package(name):
    """The module of an optional package."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f"a comparison needs {error.name}, which is not installed; "
            f"run: pip install {error.name}"
        ) from None


def _torch_recurrent(name):
    def make(options):
        import torch

        layer = getattr(torch.nn, name)(
            options["embed_size"],
            options["hidden_size"],
            options["num_layers"],
            batch_first=True,
            bidirectional=options["bidirectional"],
        )
        return _module(lambda layer, x: layer(x)[0], layer)

    return make


def _transformers(config_name, model_name, translate):
    def make(options):
        transformers = _package("transformers")
        config = getattr(transformers, config_name)(vocab_size=1, **translate(options))
        model = getattr(transformers, model_name)(config)
        return _module(
            lambda model, x: model(inputs_embeds=x, use_cache=False)[0], model
        )

    return make


def _mamba_config(options):
    return dict(
        hidden_size=options["hidden_size"],
        state_size=options["state_size"],
        num_hidden_layers=options["num_layers"],
        expand=options["expand_factor"],
        conv_kernel=options["conv_size"],
    )


def _mamba_2_config(options):
    inner = options["expand_factor"] * options["hidden_size"]
    return dict(
        hidden_size=options["hidden_size"],
        state_size=options["state_size"],
        num_hidden_layers=options["num_layers"],
        expand=options["expand_factor"],
        conv_kernel=options["conv_size"],
        head_dim=options["head_dim"],
        num_heads=inner // options["head_dim"],
        n_groups=options["num_groups"],
        chunk_size=options["chunk_size"],
    )


def _mambapy(options):
    mambapy = _package("mambapy.mamba")
    return mambapy.Mamba(
        mambapy.MambaConfig(
            d_model=options["hidden_size"],
            n_layers=options["num_layers"],
            d_state=options["state_size"],
            expand_factor=options["expand_factor"],
            d_conv=options["conv_size"],
        )
    )


PEER_MODELS = {
    "lstm": {"torch.nn.LSTM": _torch_recurrent("LSTM")},
    "gru": {"torch.nn.GRU": _torch_recurrent("GRU")},
    "mamba": {
        "transformers": _transformers("MambaConfig", "MambaModel", _mamba_config),
        "mambapy": _mambapy,
    },
    "mamba_ssd": {
        "transformers": _transformers("Mamba2Config", "Mamba2Model", _mamba_2_config),
    },
}
"""Architecture -> its implementations by name."""
