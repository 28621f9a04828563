import keras
import numpy as np
import torch
from torch import nn

import keras_edifice
from tests.support.close import difference, to_numpy
from tests.support.gradients import gradients

rng = np.random.default_rng(0)
LEVELS, WIDTH = 2, 4


class Convolutions(nn.Sequential):
    """Two 3×3 convolutions, normalised if asked for, each with a ReLU."""

    def __init__(self, source, filters, padding, norm):
        layers = []
        for channels in (source, filters):
            layers += [nn.Conv2d(channels, filters, 3, padding=padding, bias=not norm)]
            layers += [nn.BatchNorm2d(filters)] if norm else []
            layers += [nn.ReLU()]
        super().__init__(*layers)


class Peer(nn.Module):
    """Figure 1 of Ronneberger et al. 2015, of PyTorch's own layers."""

    def __init__(self, padding, norm):
        super().__init__()
        widths, edge = [WIDTH * 2**i for i in range(LEVELS + 1)], padding == "same"
        source = [2, *widths]

        def double(a, b):
            return Convolutions(a, b, int(edge), norm)

        self.down = nn.ModuleList(map(double, source[:LEVELS], widths[:LEVELS]))
        self.middle = double(widths[-2], widths[-1])
        self.up = nn.ModuleList(
            nn.ConvTranspose2d(2 * w, w, 2, stride=2) for w in widths[:LEVELS]
        )
        self.join = nn.ModuleList(double(2 * w, w) for w in widths[:LEVELS])
        self.logits = nn.Conv2d(WIDTH, 3, 1)

    def forward(self, x):
        skips = []
        for down in self.down:
            skips.append(down(x))
            x = nn.functional.max_pool2d(skips[-1], 2)
        x = self.middle(x)
        for up, join, skip in reversed(
            list(zip(self.up, self.join, skips, strict=True))
        ):
            x = up(x)
            top, left = (
                (a - b) // 2 for a, b in zip(skip.shape[2:], x.shape[2:], strict=True)
            )
            skip = skip[:, :, top : top + x.shape[2], left : left + x.shape[3]]
            x = join(torch.cat([skip, x], dim=1))
        return self.logits(x)


def peer(padding, norm):
    model = Peer(padding, norm).eval()
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        if value.dtype == torch.float32:
            matrix = value.ndim > 1  # of He's variance: gradients reach the first layer
            scale = (2 / value[0].numel()) ** 0.5 if matrix else 0.1
            noise = torch.as_tensor(scale * rng.normal(size=value.shape)).float()
            value.data = noise if matrix else value.data + noise
            value.data = value.data.abs() if name.endswith("var") else value.data
    return model


def by_path(model, of):
    """Path of our weight -> `of` the peer's parameter, in our layout."""
    found = {}

    def convolution(path, module):
        found[f"{path}/kernel"] = of(module.weight).permute(2, 3, 1, 0)
        if module.bias is not None:
            found[f"{path}/bias"] = of(module.bias)

    def double(name, module):
        convolutions = [m for m in module if isinstance(m, nn.Conv2d)]
        for i, m in enumerate(convolutions, 1):
            convolution(f"{name}_conv{i}", m)
        norms = [m for m in module if isinstance(m, nn.BatchNorm2d)]
        for i, m in enumerate(norms, 1):
            found[f"{name}_norm{i}/gamma"] = of(m.weight)
            found[f"{name}_norm{i}/beta"] = of(m.bias)
            found[f"{name}_norm{i}/moving_mean"] = m.running_mean
            found[f"{name}_norm{i}/moving_variance"] = m.running_var

    for level in range(LEVELS):
        double(f"down{level + 1}", model.down[level])
        convolution(f"up{level + 1}_up", model.up[level])
        double(f"up{level + 1}", model.join[level])
    double("middle", model.middle)
    convolution("logits", model.logits)
    return {path: value.detach().numpy() for path, value in found.items()}


def differences(padding, norm, side):
    reference = peer(padding, norm)
    model = keras_edifice.build(
        "unet",
        image_size=side,
        num_channels=2,
        out_channels=3,
        base_features=WIDTH,
        num_levels=LEVELS,
        padding=padding,
        norm=norm,
    )
    values = by_path(reference, lambda p: p)
    assert set(values) == {w.path for w in model.weights}
    for weight in model.weights:
        weight.assign(values[weight.path])

    x = rng.normal(size=(2, side, side, 2)).astype("float32")
    pixels = torch.tensor(x.transpose(0, 3, 1, 2), requires_grad=True)
    expected = reference(pixels)
    expected.square().mean().backward()
    assert pixels.grad.abs().max() > 1e-3
    forward = difference(model(x), to_numpy(expected).transpose(0, 2, 3, 1))

    by_weight, by_input = gradients(
        model, x, lambda y: keras.ops.mean(keras.ops.square(y))
    )
    wanted = by_path(reference, lambda p: p.grad)
    pairs = [
        (g, wanted[w.path])
        for g, w in zip(by_weight, model.trainable_variables, strict=True)
    ]
    pairs += [(by_input, pixels.grad.numpy().transpose(0, 2, 3, 1))]
    return forward, max(difference(*pair) for pair in pairs)


def test_unet_is_that_of_torch_layers(fidelity):
    cases = [("same", "batch", 24), ("same", None, 24), ("valid", None, 60)]
    forward, gradient = np.max([differences(*case) for case in cases], axis=0)
    fidelity.record("unet", "torch.nn layers of the paper's figure", forward, gradient)
