"""Explanations: where in a photograph a resnet and a vit look.

    KERAS_BACKEND=jax python examples/explanations.py

Both learn to tell scikit-learn's two photographs, a Chinese temple and a flower, apart
by crops of their left parts; crops of their right parts are the test set.

resnet, Grad-CAM (Selvaraju et al. 2017, arXiv:1610.02391): the last feature maps A_k
are weighted by how much the score y_c of class c grows with them,

    α_k = 1/Z Σ_ij ∂y_c / ∂A_kij    (eq. 1),        L = ReLU(Σ_k α_k A_k)    (eq. 2)

With a global average and a linear head α_k is the head's weight over Z, and L the class
activation map of Zhou et al. 2016 (arXiv:1512.04150), but for ReLU and the factor.

vit, attention rollout (Abnar & Zuidema 2020, arXiv:2005.00928, section 3): A_l is the
attention of layer l, the mean of its heads, with the residual connection,

    R_l = (A_l / 2 + I / 2) R_{l-1}

and the map is the row of the class token. It does not depend on the class.

A map is worth something if the model needs what it marks: the three
quarters of each test crop with the highest, or the lowest, values of its map are hidden
by the crop's mean colour, and accuracy and loss are measured again.

Needs the extra `report` (Pillow reads the photographs) and a backend. Draws the
photographs lit by both maps.
"""

import argparse
import base64
import io

import altair as alt
import keras
import numpy as np
from keras import ops
from sklearn.datasets import load_sample_images

import keras_edifice
from keras_edifice.ops.gradients import grad_sum

REDUCED = 4  # times, each side of the photographs
CROP, PATCH = 32, 4  # pixels
HIDDEN = 0.75  # of a crop
CLASSES = ["temple", "flower"]


def photographs():
    """(2, height, width, 3) of values from 0 to 1; the sides are multiples of CROP."""
    images = np.stack(load_sample_images().images).astype("float32") / 255
    height, width = (side // REDUCED // CROP * CROP for side in images.shape[1:3])
    images = images[:, : height * REDUCED, : width * REDUCED]
    images = images.reshape(2, height, REDUCED, width, REDUCED, 3)
    return images.mean(axis=(2, 4))


def crops(rng, images, count):
    """Random crops (count, CROP, CROP, 3), half of them mirrored, and their classes."""
    classes = rng.integers(2, size=count).astype("int32")
    tops, lefts = (rng.integers(s - CROP + 1, size=count) for s in images.shape[1:3])
    views = np.lib.stride_tricks.sliding_window_view(images, (CROP, CROP), (1, 2))
    x = np.moveaxis(views[classes, tops, lefts], 1, -1).copy()
    x[::2] = x[::2, :, ::-1]
    return x, classes


def grad_cam(model, images, classes):
    """Equation 2 for each image and its class: (images, rows, columns)."""
    pool, head = model.get_layer("pool"), model.get_layer("predictions")
    maps = keras.Model(model.input, pool.input)(images)  # A, (b, rows, columns, k)
    chosen = ops.one_hot(classes, len(CLASSES))
    slopes = grad_sum(lambda maps: ops.sum(head(pool(maps)) * chosen, axis=-1), maps)
    weights = ops.mean(slopes, axis=(1, 2), keepdims=True)  # α
    return ops.convert_to_numpy(ops.relu(ops.sum(weights * maps, axis=-1)))


def rollout(model, images):
    """What the class token sees of each patch: (images, rows, columns)."""
    attentions = [x for x in model.layers if x.name.endswith("_attention")]
    inputs = keras.Model(model.input, [layer.input for layer in attentions])(images)
    seen = None
    for layer, tokens in zip(attentions, inputs, strict=True):
        weights = ops.mean(layer.attention_weights(tokens), axis=1)  # (b, t, t)
        weights = (weights + ops.eye(weights.shape[-1])) / 2
        seen = weights if seen is None else weights @ seen
    side = CROP // PATCH
    return ops.convert_to_numpy(seen)[:, 0, 1:].reshape(-1, side, side)


def rollout_of_photographs(model, images):
    """The rollouts of the crops that tile each photograph, put together."""
    count, height, width, _ = images.shape
    tiles = images.reshape(count, height // CROP, CROP, width // CROP, CROP, 3)
    tiles = tiles.swapaxes(2, 3)
    maps = rollout(model, tiles.reshape(-1, CROP, CROP, 3))
    maps = maps.reshape(*tiles.shape[:3], *maps.shape[1:]).swapaxes(2, 3)
    return maps.reshape(count, height // PATCH, width // PATCH)


def enlarged(maps, images):
    """The maps in the size of the images, by repeated pixels."""
    times = images.shape[1] // maps.shape[1]
    return maps.repeat(times, axis=1).repeat(times, axis=2)


def hidden(images, maps, sign):
    """Images without what sign * maps is highest on."""
    maps = sign * enlarged(maps, images)
    maps += 1e-9 * np.random.default_rng(0).uniform(size=maps.shape)  # decides ties
    hide = maps > np.quantile(maps, 1 - HIDDEN, axis=(1, 2), keepdims=True)
    return np.where(hide[..., None], images.mean(axis=(1, 2), keepdims=True), images)


def trained(model, data, epochs):
    """The model after training."""
    model.compile(
        keras.optimizers.Adam(0.001),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    model.fit(*data, batch_size=32, epochs=epochs, verbose=2)
    return model


def main():
    """Prints the accuracies, whole and with much hidden, and draws the maps."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--crops", type=int, default=960, help="to train on")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--chart", default="explanations.png")
    arguments = parser.parse_args()

    keras.utils.set_random_seed(0)
    rng, images = np.random.default_rng(0), photographs()
    left = images.shape[2] * 3 // 5
    data = crops(rng, images[:, :, :left], arguments.crops)
    x, y = crops(rng, images[:, :, left:], 384)
    resnet = keras_edifice.build(
        "resnet",
        num_classes=2,
        classifier_activation=None,
        hidden_size=8,
        depth=20,
        block_sizes=[1, 1, 1],
        stem="cifar",
    )
    vit = keras_edifice.build(
        "vit",
        image_size=CROP,
        patch_size=PATCH,
        embed_size=48,
        num_layers=3,
        num_heads=3,
        num_classes=2,
        classifier_activation=None,
    )
    for model in (resnet, vit):
        trained(model, data, arguments.epochs)
        maps = grad_cam(model, x, y) if model is resnet else rollout(model, x)
        for what, shown in {
            "": x,
            ", without what it looks at": hidden(x, maps, 1),
            ", without the rest": hidden(x, maps, -1),
        }.items():
            loss, accuracy = model.evaluate(shown, y, verbose=0)
            result = f"{accuracy:.3f} of the test crops, loss {loss:.3f}"
            print(f"{model.name}{what}: {result}", flush=True)
    draw(
        images,
        {
            "resnet, Grad-CAM": grad_cam(resnet, images, np.arange(2)),
            "vit, attention rollout": rollout_of_photographs(vit, images),
        },
        arguments.chart,
    )


def draw(images, maps, path):
    """One row for each photograph: itself, and lit by each of the maps.

    Full light is the 95th percentile of the map, darkness its smallest value.
    """
    columns = {"photograph": images}
    for name, values in maps.items():
        low, high = np.quantile(values, [0, 0.95], axis=(1, 2), keepdims=True)
        light = np.clip((values - low) / (high - low), 0.15, 1)
        columns[name] = images * enlarged(light, images)[..., None]
    panels = [
        dict(column=name, row=CLASSES[i], image=data_url(image))
        for name, column in columns.items()
        for i, image in enumerate(column)
    ]
    height, width = (1.25 * side for side in images.shape[1:3])
    chart = alt.Chart(alt.Data(values=panels))
    chart = chart.mark_image(width=width, height=height, align="left", baseline="top")
    chart.encode(
        alt.Url("image:N"),
        alt.XValue(0),
        alt.YValue(0),
        alt.Row("row:N", sort=CLASSES, title=None),
        alt.Column("column:N", sort=list(columns), title=None),
    ).properties(width=width, height=height).save(path)


def data_url(image):
    """The image as a text that an image's address may be."""
    file = io.BytesIO()
    keras.utils.array_to_img(image * 255, scale=False).save(file, "jpeg")
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


if __name__ == "__main__":
    main()
