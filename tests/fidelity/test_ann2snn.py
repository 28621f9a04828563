import keras
import numpy as np
import torch
from spikingjelly.activation_based import ann2snn, functional

import keras_edifice
from keras_edifice.neuromorphic.ann2snn import convert
from tests.support.close import difference
from tests.support.gradients import gradients


def converted(network, calibration):
    recipe = ann2snn.RateCodingRecipe(
        dataloader=[torch.tensor(calibration)], mode="max"
    )
    return ann2snn.Converter(recipe).convert(network).eval()


def mean_output(network, x, steps):
    functional.reset_net(network)
    with torch.no_grad():
        return sum(network(torch.tensor(x)) for _ in range(steps)) / steps


def multi_layer(sizes, weights):
    modules = []
    for a, b in zip(sizes, sizes[1:], strict=False):
        modules += [torch.nn.Linear(a, b), torch.nn.ReLU()]
    network = torch.nn.Sequential(*modules[:-1])
    values = [torch.tensor(w.numpy().T) for w in weights]
    for parameter, value in zip(network.parameters(), values, strict=True):
        parameter.data = value
    return network


def test_network_and_its_conversion(fidelity):
    model = keras_edifice.build(
        "ann2snn",
        input_size=6,
        output_size=4,
        hidden_sizes=[24, 16],
        percentile=100.0,
        v_init=0.0,
    )
    random = np.random.default_rng(0)
    for weight in model.trainable_variables:
        weight.assign(0.5 * random.normal(size=weight.shape))
    calibration = random.normal(size=(200, 6)).astype("float32")
    x = random.normal(size=(8, 6)).astype("float32")
    network = multi_layer([6, 24, 16, 4], model.weights)

    def total(y):
        return keras.ops.sum(keras.ops.square(y))

    theirs = torch.tensor(x, requires_grad=True)
    y = network(theirs)
    parameters = list(network.parameters())
    *by_weight, by_input = torch.autograd.grad(total(y), [*parameters, theirs])
    weights, inputs = gradients(model, x, total)
    backward = [difference(a, b.T) for a, b in zip(weights, by_weight, strict=True)] + [
        difference(inputs, by_input)
    ]
    forward = [difference(model(x), y.detach())]
    spiking = converted(network, calibration)
    for steps in (1, 10, 100):
        expected = mean_output(spiking, x, steps)
        for mode in ("threshold", "weight"):
            ours = model.convert(calibration, num_timesteps=steps, mode=mode)
            forward.append(difference(ours.predict(x, verbose=0), expected))
    fidelity.record(
        "ann2snn",
        "spikingjelly ann2snn.Converter",
        forward=max(forward),
        gradient=max(backward),
    )


def test_convolutions_with_batch_norm_and_pooling():
    random = np.random.default_rng(3)
    network = torch.nn.Sequential(
        torch.nn.Conv2d(2, 5, 3),
        torch.nn.BatchNorm2d(5),
        torch.nn.ReLU(),
        torch.nn.AvgPool2d(2),
        torch.nn.Conv2d(5, 3, 2),
    ).eval()
    for parameter in network.parameters():
        parameter.data = torch.tensor(random.normal(size=parameter.shape)).float()
    norm = network[1]
    norm.running_mean.data = torch.tensor(random.normal(size=5)).float()
    norm.running_var.data = torch.tensor(random.uniform(0.5, 2, size=5)).float()
    model = keras.Sequential(
        [
            keras.Input((8, 8, 2)),
            keras.layers.Conv2D(5, 3),
            keras.layers.BatchNormalization(epsilon=1e-5),
            keras.layers.ReLU(),
            keras.layers.AveragePooling2D(2),
            keras.layers.Conv2D(3, 2),
        ]
    )
    first, last = network[0], network[4]
    values = [
        first.weight.permute(2, 3, 1, 0),
        first.bias,
        *(norm.weight, norm.bias, norm.running_mean, norm.running_var),
        last.weight.permute(2, 3, 1, 0),
        last.bias,
    ]
    model.set_weights([value.detach().numpy() for value in values])
    calibration = random.normal(size=(50, 2, 8, 8)).astype("float32")
    x = random.normal(size=(4, 2, 8, 8)).astype("float32")
    expected = mean_output(converted(network, calibration), x, 30)
    snn = convert(
        model,
        calibration.transpose(0, 2, 3, 1),
        num_timesteps=30,
        percentile=100.0,
        v_init=0.0,
    )
    ours = snn.predict(x.transpose(0, 2, 3, 1), verbose=0)
    assert difference(ours, expected.permute(0, 2, 3, 1)) < 1e-4
