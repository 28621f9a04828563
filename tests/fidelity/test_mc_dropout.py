import keras
import torch
from keras import ops

import keras_edifice
from tests.support.close import assert_close, difference
from tests.support.shaking import shake

ARCHITECTURE = "mc_dropout"
RATES = (0.1, 0.4, 0.4)


def small_model(**options):
    return shake(
        keras_edifice.build(
            ARCHITECTURE,
            input_size=5,
            hidden_sizes=[16, 12],
            output_size=3,
            input_dropout=RATES[0],
            dropout_rate=RATES[1],
            **options,
        )
    )


def torch_stack(model, activation=torch.nn.ReLU):
    """Dropout and Linear in turn, with the weights of `model`."""
    parts = []
    weights = iter(model.get_weights())
    for rate in RATES:
        kernel, bias = (torch.as_tensor(next(weights)) for _ in range(2))
        linear = torch.nn.Linear(*kernel.shape)
        with torch.no_grad():
            linear.weight.copy_(kernel.T)
            linear.bias.copy_(bias)
        parts += [torch.nn.Dropout(rate), linear, activation()]
    return torch.nn.Sequential(*parts[:-1]).train()


def test_pass_is_that_of_a_torch_stack_with_the_same_masks(fidelity, monkeypatch):
    torch.manual_seed(0)
    model = small_model()
    reference, masks = torch_stack(model), []
    for module in reference:
        if isinstance(module, torch.nn.Dropout):
            module.register_forward_hook(
                lambda module, inputs, output: masks.append(
                    (output.detach() != 0) / (1 - module.p)
                )
            )
    # Away from zero, so that a zero after dropout is a dropped element.
    x = (torch.rand(7, 5) + 0.5).requires_grad_()
    y = reference(x)
    y.square().sum().backward()

    turns = iter(masks)
    monkeypatch.setattr(keras.random, "dropout", lambda x, rate, seed: x * next(turns))
    ours = x.detach().clone().requires_grad_()
    found = model(ours, training=True)
    ops.sum(ops.square(found)).backward()

    pairs = [(ours.grad, x.grad)]
    for own, other in zip(model.layers[2::2], reference[1::3], strict=True):
        pairs.append((own.kernel.value.grad, other.weight.grad.T))
        pairs.append((own.bias.value.grad, other.bias.grad))
    fidelity.record(
        ARCHITECTURE,
        "torch.nn.Dropout and torch.nn.Linear in train mode, same masks",
        forward=difference(found, y),
        gradient=max(difference(a, b) for a, b in pairs),
    )


def test_moments_are_those_of_a_torch_stack():
    torch.manual_seed(0)
    model = small_model(activation="tanh", seed=1)
    reference = torch_stack(model, torch.nn.Tanh)
    x = torch.rand(1, 5) + 0.5
    with torch.no_grad():
        draws = reference(x.repeat(40_000, 1)).numpy()
    found = model.predict_uncertainty(x.numpy(), 40_000)
    # Both are estimates from 40 000 draws: the variance is known to about 1 %.
    assert_close(found["mean"][0], draws.mean(0), 0.03)
    assert_close(found["variance"][0], draws.var(0), 0.04)
