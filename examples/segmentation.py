"""Segmentation: unet finds the discs, rectangles and triangles in noisy images.

    KERAS_BACKEND=jax python examples/segmentation.py

One to three shapes of random size, place and colour, of which later ones may cover
earlier ones, lie on a noisy background of another colour; every pixel is to be
labelled with its shape. The colour of a pixel says nothing about that: a corner of a
triangle is known only by what lies around it.

The result is the intersection over union (IoU): pixels that are of a class and said to
be, over pixels that are or are said to be. It is counted over all test images together
and averaged over the four classes, the background among them.

Needs the extra `report` and a backend. Draws test images, their masks, and those found.
"""

import argparse

import altair as alt
import keras
import numpy as np

import keras_edifice

CLASSES = ["background", "disc", "rectangle", "triangle"]
COLOURS = ["#dddddd", "#4c78a8", "#f58518", "#54a24b"]


def shape_mask(rng, kind, size):
    """(size, size), true in one shape of the kind 1 to 3, named in CLASSES."""
    row, column = np.mgrid[:size, :size]
    y, x = rng.uniform(0.2, 0.8, 2) * size  # its centre
    if kind == 1:
        return np.hypot(row - y, column - x) < rng.uniform(0.14, 0.25) * size
    if kind == 2:
        height, width = rng.uniform(0.12, 0.25, 2) * size
        return (abs(row - y) < height) & (abs(column - x) < width)
    angles = rng.uniform(0, 2 * np.pi) + np.array([0, 2, 4]) * np.pi / 3
    distances = rng.uniform(0.1, 0.16) * size  # of the sides from the centre
    across = [np.sin(a) * (row - y) + np.cos(a) * (column - x) for a in angles]
    return np.max(across, axis=0) < distances


def shapes(rng, count, size, most):
    """Images (count, size, size, 3) of at most `most` shapes, and their masks."""
    images = np.empty((count, size, size, 3), "float32")
    masks = np.zeros((count, size, size), "int32")
    for image, mask in zip(images, masks, strict=True):
        image[:] = ground = rng.uniform(size=3)
        for kind in rng.integers(1, len(CLASSES), rng.integers(1, most + 1)):
            colour = rng.uniform(size=3)
            while np.linalg.norm(colour - ground) < 0.4:  # too like the background
                colour = rng.uniform(size=3)
            inside = shape_mask(rng, kind, size)
            image[inside], mask[inside] = colour, kind
        image += rng.normal(scale=0.05, size=image.shape)
    return images, masks


def main():
    """Prints the IoU on the test images and draws some of them."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", type=int, default=32, help="pixels of a side")
    parser.add_argument("--shapes", type=int, default=3, help="at most, in an image")
    parser.add_argument("--images", type=int, default=3000, help="to train on")
    parser.add_argument("--features", type=int, default=16, help="of the first level")
    parser.add_argument("--levels", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--rate", type=float, default=0.003)
    parser.add_argument("--chart", default="segmentation.png")
    arguments = parser.parse_args()

    keras.utils.set_random_seed(0)
    rng, options = np.random.default_rng(0), (arguments.size, arguments.shapes)
    x, y = shapes(rng, arguments.images, *options)
    x_test, y_test = shapes(rng, 500, *options)
    model = keras_edifice.build(
        "unet",
        image_size=arguments.size,
        out_channels=len(CLASSES),
        base_features=arguments.features,
        num_levels=arguments.levels,
    )
    rate = keras.optimizers.schedules.CosineDecay(
        arguments.rate, arguments.epochs * -(-len(x) // arguments.batch_size)
    )
    model.compile(
        keras.optimizers.Adam(rate),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    model.fit(x, y, batch_size=arguments.batch_size, epochs=arguments.epochs, verbose=2)

    found = model.predict(x_test, verbose=0).argmax(-1)  # (images, size, size)
    iou = keras.metrics.MeanIoU(len(CLASSES))
    iou.update_state(y_test, found)
    print(f"unet: IoU {float(iou.result()):.3f} of the test images")
    draw(x_test[:6], y_test[:6], found[:6], arguments.chart)


def draw(images, masks, found, path):
    """One column for each image: itself, its mask, and the mask found."""
    colours = np.array(COLOURS)
    pixels = np.clip(images * 255, 0, 255).astype(int)
    rows = {
        "image": [
            [[f"rgb({p[0]},{p[1]},{p[2]})" for p in r] for r in x] for x in pixels
        ],
        "true": colours[masks].tolist(),
        "found": colours[found].tolist(),
    }
    values = [
        dict(row=name, image=i, y=y, x=x, colour=colour)
        for name, panels in rows.items()
        for i, panel in enumerate(panels)
        for y, line in enumerate(panel)
        for x, colour in enumerate(line)
    ]
    side = 2 * images.shape[1]
    chart = alt.Chart(alt.Data(values=values)).mark_rect(strokeWidth=0)
    chart = chart.encode(
        alt.X("x:O", axis=None),
        alt.Y("y:O", axis=None),
        alt.Color("colour:N", scale=None),
        alt.Row("row:N", sort=list(rows), title=None).header(labelFontSize=14),
        alt.Column("image:N", title=None).header(labels=False),
    )
    legend = alt.Chart(alt.Data(values=[dict(kind=kind) for kind in CLASSES]))
    legend = legend.mark_square(size=150, opacity=1).encode(
        alt.Y("kind:N", sort=CLASSES, title=None).axis(
            orient="right", domain=False, ticks=False
        ),
        alt.Color("kind:N", legend=None).scale(domain=CLASSES, range=COLOURS),
    )
    chart = chart.properties(width=side, height=side, spacing=4)
    alt.hconcat(chart, legend).resolve_scale(color="independent").save(path)


if __name__ == "__main__":
    main()
