import numpy as np
import torch

import keras_edifice
from tests.support.close import difference, to_numpy
from tests.support.gradients import gradients
from tests.support.shaking import shake

rng = np.random.default_rng(0)
COARSE, FINE, LAYERS, SKIP = 8, 6, 4, 2


def encode(p, octaves):
    """Equation 4 as the authors' code has it."""
    parts = [f(2.0**k * p) for k in range(octaves) for f in (torch.sin, torch.cos)]
    return torch.cat([p, *parts], dim=-1)


def field(x, d, w, name):
    """Figure 7 of the paper: colour and density."""

    def dense(h, part):
        return h @ w[f"{name}_{part}/kernel"] + w[f"{name}_{part}/bias"]

    h = x = encode(x, 3)
    for i in range(LAYERS):
        h = torch.relu(dense(h, f"layer{i}"))
        if i == SKIP:
            h = torch.cat([x, h], dim=-1)
    d = encode(d / d.norm(dim=-1, keepdim=True), 2)
    view = torch.relu(dense(torch.cat([dense(h, "feature"), d], dim=-1), "view"))
    colour = torch.sigmoid(dense(view, "colour"))
    return colour, torch.relu(dense(h, "density"))[..., 0]


def look(origins, directions, depths, w, name):
    """Equation 3, with the transparency as a product."""
    points = origins[:, None] + depths[..., None] * directions[:, None]
    views = directions[:, None].expand_as(points)
    colour, density = field(points, views, w, name)
    steps = torch.diff(depths, append=torch.full_like(depths[:, :1], 1e10))
    alpha = 1 - torch.exp(-density * steps * directions.norm(dim=-1, keepdim=True))
    seen = torch.cumprod(1 - alpha, dim=-1)
    seen = torch.cat([torch.ones_like(seen[:, :1]), seen[:, :-1]], dim=-1)
    weights = seen * alpha
    return (weights[..., None] * colour).sum(1), weights


def finer(depths, weights):
    """Section 5.2: the inverse distribution function at even places."""
    edges, mass = (depths[:, 1:] + depths[:, :-1]) / 2, weights[:, 1:-1] + 1e-5
    mass = mass / mass.sum(-1, keepdim=True)
    ends = torch.cumsum(torch.cat([torch.zeros_like(mass[:, :1]), mass], dim=-1), -1)
    u = torch.linspace(0, 1, FINE, dtype=depths.dtype).repeat(len(depths), 1)
    i = (torch.searchsorted(ends, u, right=True) - 1).clamp(max=mass.shape[1] - 1)
    part = ((u - ends.gather(1, i)) / mass.gather(1, i)).clamp(max=1)
    left, right = edges.gather(1, i), edges.gather(1, i + 1)
    return torch.cat([depths, left + part * (right - left)], dim=-1).sort(-1).values


def reference(origins, directions, w):
    depths = torch.linspace(2, 6, COARSE, dtype=origins.dtype).repeat(len(origins), 1)
    coarse, weights = look(origins, directions, depths, w, "coarse")
    depths = finer(depths, weights).detach()
    pixels, weights = look(origins, directions, depths, w, "fine")
    total, depth = weights.sum(-1), (weights * depths).sum(-1)
    return dict(rgb=pixels, rgb_coarse=coarse, acc=total, depth=depth)


def loss(outputs):
    return sum((y * y).sum() for y in (outputs["rgb"], outputs["rgb_coarse"]))


def test_nerf_is_the_equations_in_float64(fidelity):
    model = shake(
        keras_edifice.build(
            "nerf",
            hidden_size=10,
            num_layers=LAYERS,
            skip_layer=SKIP,
            num_frequencies=3,
            num_dir_frequencies=2,
            num_coarse=COARSE,
            num_fine=FINE,
        ),
        scale=0.2,
    )
    origins, directions = rng.normal(size=(2, 32, 3)).astype("float32")
    w = {
        v.path: torch.tensor(to_numpy(v), requires_grad=True)
        for v in model.trainable_variables
    }
    o = torch.tensor(origins.astype("float64"), requires_grad=True)
    expected = reference(o, torch.tensor(directions.astype("float64")), w)
    loss(expected).backward()

    x = dict(origins=origins, directions=directions)
    outputs = model(x)
    assert expected["acc"].max() > 0.5
    forward = max(
        difference(outputs[name], to_numpy(y.detach())) for name, y in expected.items()
    )
    by_weight, _ = gradients(model, x, loss)
    pairs = [
        (g, to_numpy(w[v.path].grad))
        for g, v in zip(by_weight, model.trainable_variables, strict=True)
    ]
    fidelity.record(
        "nerf",
        "PyTorch, float64, from the equations",
        forward,
        max(difference(*pair) for pair in pairs),
    )
