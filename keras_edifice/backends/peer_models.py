"""Independent implementations of architectures in PyTorch, to measure ours against.

Each is a function of the resolved options of the architecture; it gives a module with
the same sizes. Those of sequences are (batch, length, embed_size) -> (batch, length,
hidden_size), where `embed_size` is `hidden_size`; those of images (batch, channels,
height, width) -> (batch, classes). Their packages are imported when they are asked for.
"""

import importlib
import math

import numpy as np

from keras_edifice.backends.timing import torch_peak_bytes
from keras_edifice.convolutional.resnet import stage_blocks


class PeerModel:
    """A module with data, trained with Adam on the mean squared error of its output.

    Args:
        module: of sequences or of images; of a sequence the last step is its output.
        x: its input, an array; images have their channels last.
        y: targets of its output, (batch, width).
    """

    def __init__(self, module, x, y):
        import torch

        self.module = module
        if x.ndim == 4:
            x = np.ascontiguousarray(x.transpose(0, 3, 1, 2))
        self.x, self.y = torch.as_tensor(x), torch.as_tensor(y)
        self.optimizer = torch.optim.Adam(module.parameters())

    def forward(self):
        """The output of inference, without gradients, as an array."""
        import torch

        self.module.eval()
        with torch.no_grad():
            return np.asarray(self._output())

    def train(self):
        """One step of training; the loss as a number."""
        self.module.train()
        self.optimizer.zero_grad()
        loss = self._backward()
        self.optimizer.step()
        return loss.item()

    def peak_bytes(self):
        """The most memory that tensors take in a forward and backward pass."""
        self.module.train()
        self.optimizer.zero_grad()
        return torch_peak_bytes(self._backward)

    def _output(self):
        y = self.module(self.x)
        return y[:, -1] if y.ndim == 3 else y

    def _backward(self):
        loss = (self._output() - self.y).square().mean()
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
        config = getattr(transformers, config_name)(vocab_size=3, **translate(options))
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


def _jamba_config(options):
    every = options["attention_every"]
    if options["attention_ratio"] is not None:
        every = round(1.0 / options["attention_ratio"])
    offset = options["attention_offset"]
    return dict(
        hidden_size=options["hidden_size"],
        intermediate_size=options["mlp_size"] or int(3.5 * options["hidden_size"]),
        num_hidden_layers=options["num_layers"],
        num_attention_heads=options["num_heads"],
        num_key_value_heads=options["num_kv_heads"] or options["num_heads"],
        attn_layer_period=every,
        attn_layer_offset=every // 2 if offset is None else offset,
        num_experts=options["num_experts"],
        num_experts_per_tok=options["num_experts_per_token"],
        expert_layer_period=options["expert_every"],
        expert_layer_offset=options["expert_offset"],
        mamba_d_state=options["state_size"],
    )


def _xlstm(options):
    """The stack of the authors, whose blocks are those of `mlstm`."""
    if options["block_style"] != "original":
        raise ValueError(
            "the implementation beside mlstm has block_style='original', received "
            f"{options['block_style']!r}; leave it out"
        )
    stack = _package("xlstm.xlstm_block_stack")
    block = _package("xlstm.blocks.mlstm.block")
    layer = _package("xlstm.blocks.mlstm.layer")
    layer = layer.mLSTMLayerConfig(
        conv1d_kernel_size=options["conv_size"],
        qkv_proj_blocksize=options["qkv_block_size"],
        num_heads=options["num_heads"],
        proj_factor=options["mlstm_proj_factor"],
    )
    return stack.xLSTMBlockStack(
        stack.xLSTMBlockStackConfig(
            mlstm_block=block.mLSTMBlockConfig(mlstm=layer),
            context_length=options["window_size"],
            num_blocks=options["num_layers"],
            embedding_dim=options["hidden_size"],
            slstm_at=[],
        )
    )


def _titans(options):
    """Memories of titans-pytorch, each before a gated feed-forward of PyTorch."""
    if options["memory_as"] != "alone":
        raise ValueError(
            "the implementation beside titans is that of the memory, received "
            f"memory_as={options['memory_as']!r}; pass memory_as=alone"
        )
    import torch

    package = _package("titans_pytorch")
    features, size = options["hidden_size"], options["memory_size"]

    def memory():
        model = package.MemoryMLP(
            size,
            depth=options["memory_depth"],
            expansion_factor=options["memory_expansion"],
        )
        return package.NeuralMemory(
            dim=features,
            dim_head=size,
            heads=options["num_heads"],
            chunk_size=1,
            batch_size=options["chunk_size"],
            model=model,
            default_step_transform_max_lr=options["max_lr"],
            activation=torch.nn.SiLU(),
        )

    multiple = 256 if features >= 256 else 8  # as that of ours
    width = 2 * options["mlp_ratio"] * features / 3
    width = multiple * math.ceil(width / multiple)
    stack = torch.nn.ModuleList(
        torch.nn.ModuleList(
            [
                memory(),
                torch.nn.RMSNorm(features),
                torch.nn.Linear(features, 2 * width, bias=False),
                torch.nn.Linear(width, features, bias=False),
            ]
        )
        for _ in range(options["num_layers"])
    )
    for weight in stack.parameters():  # the heads share theirs; an optimizer cannot
        weight.data = weight.data.contiguous()

    def run(stack, x):
        for recurrent, norm, up, down in stack:
            x = x + recurrent(x)[0]
            gate, value = up(norm(x)).chunk(2, dim=-1)
            x = x + down(torch.nn.functional.silu(gate) * value)
        return x

    return _module(run, stack)


def _classifier(config_name, model_name, translate):
    """An image classifier of transformers, which gives logits."""

    def make(options):
        transformers = _package("transformers")
        config = getattr(transformers, config_name)(
            num_labels=options["num_classes"], **translate(options)
        )
        model = getattr(transformers, model_name)(config)
        return _module(lambda model, x: model(x).logits, model)

    return make


def _resnet_config(options):
    block_type, sizes = stage_blocks(
        options["depth"], options["block_type"], options["block_sizes"]
    )
    width = options["hidden_size"]
    expansion = 4 if block_type == "bottleneck" else 1
    return dict(
        num_channels=options["input_channels"],
        embedding_size=width,
        hidden_sizes=[width * 2**stage * expansion for stage in range(len(sizes))],
        depths=sizes,
        layer_type=block_type,
        downsample_in_bottleneck=options["stride_on"] == "1x1",
    )


def _vit_config(options):
    return dict(
        image_size=options["image_size"],
        patch_size=options["patch_size"],
        num_channels=options["num_channels"],
        hidden_size=options["embed_size"],
        num_hidden_layers=options["num_layers"],
        num_attention_heads=options["num_heads"],
        intermediate_size=int(options["mlp_ratio"] * options["embed_size"]),
    )


def _swin_config(options):
    names = dict(
        image_size="image_size",
        patch_size="patch_size",
        num_channels="num_channels",
        embed_dim="embed_size",
        depths="depths",
        num_heads="num_heads",
        window_size="window_size",
        mlp_ratio="mlp_ratio",
        drop_path_rate="drop_path",
    )
    return {theirs: options[ours] for theirs, ours in names.items()}


def _convnext_config(options):
    names = dict(
        num_channels="num_channels",
        patch_size="patch_size",
        hidden_sizes="hidden_sizes",
        depths="depths",
        layer_scale_init_value="layer_scale",
        drop_path_rate="drop_path",
    )
    config = {theirs: options[ours] for theirs, ours in names.items()}
    return {**config, "num_stages": len(options["depths"])}


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
    "jamba": {
        "transformers": _transformers("JambaConfig", "JambaModel", _jamba_config),
    },
    "mlstm": {"xlstm": _xlstm},
    "titans": {"titans-pytorch": _titans},
    **{
        name: {"transformers": _classifier(f"{kind}Config", model, translate)}
        for name, kind, translate in (
            ("resnet", "ResNet", _resnet_config),
            ("vit", "ViT", _vit_config),
            ("swin", "Swin", _swin_config),
            ("convnext", "ConvNext", _convnext_config),
        )
        for model in [f"{kind}ForImageClassification"]
    },
}
"""Architecture -> its implementations by name."""
