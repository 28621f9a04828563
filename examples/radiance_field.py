"""A radiance field: nerf learns a scene from pictures and shows it from new sides.

    KERAS_BACKEND=jax python examples/radiance_field.py

A ring and three balls have a density and a colour at every point. Pictures of them, by
the volume rendering integral in small steps, are taken from a band of directions; nerf
learns from the rays of their pixels, and is then asked for a turn around the scene, of
which it has seen no picture.

Needs the extra `report` and a backend. Draws the turn, truth above, fine network below.
"""

import argparse

import altair as alt
import keras
import numpy as np

import keras_edifice

NEAR, FAR = 2.4, 5.6  # from cameras at the distance 4 of a scene within the radius 1.6
DENSITY, EDGE = 30.0, 0.03  # of a solid, and the width in which it fades
CENTRES = np.array([[0.9, 0.0, 0.25], [-0.45, 0.78, -0.2], [-0.45, -0.78, 0.1]])
RADII = np.array([0.42, 0.5, 0.34])
COLOURS = np.array(
    [[0.95, 0.65, 0.1], [0.85, 0.15, 0.2], [0.15, 0.55, 0.3], [0.15, 0.3, 0.8]]
)  # of the ring and of the balls


def scene(points):
    """Density and colour: (..., 3) -> (...,), (..., 3)."""
    across = np.hypot(points[..., 0], points[..., 1]) - 0.9
    ring = np.hypot(across, points[..., 2]) - 0.14
    balls = np.linalg.norm(points[..., None, :] - CENTRES, axis=-1) - RADII
    distances = np.concatenate([ring[..., None], balls], axis=-1)  # (..., 4)
    solids = DENSITY / (1 + np.exp(np.clip(distances / EDGE, -40, 40)))
    density = solids.sum(axis=-1)
    return density, solids @ COLOURS / (density[..., None] + 1e-9)


def camera(azimuth, elevation, size):
    """Origins and directions of the rays of a picture: (size², 3) each."""
    back = np.array(
        [
            np.cos(elevation) * np.cos(azimuth),
            np.cos(elevation) * np.sin(azimuth),
            np.sin(elevation),
        ]
    )
    right = np.array([-np.sin(azimuth), np.cos(azimuth), 0.0])
    up = np.cross(back, right)
    steps = 0.4 * ((np.arange(size) + 0.5) / size * 2 - 1)  # 0.4: half the field
    x, y = np.meshgrid(steps, -steps)
    directions = x[..., None] * right + y[..., None] * up - back
    directions /= np.linalg.norm(directions, axis=-1, keepdims=True)
    directions = directions.reshape(-1, 3)
    return np.broadcast_to(4 * back, directions.shape), directions


def picture(origins, directions, samples=200):
    """Pixels (rays, 3) in front of white, by the midpoint rule along the rays."""
    step = (FAR - NEAR) / samples
    depths = NEAR + step * (np.arange(samples) + 0.5)
    density, colour = scene(origins[:, None] + depths[:, None] * directions[:, None])
    thickness = density * step  # (rays, samples)
    seen = np.exp(thickness - np.cumsum(thickness, axis=1))
    weights = seen * (1 - np.exp(-thickness))
    pixels = np.sum(weights[..., None] * colour, axis=1)
    return pixels + 1 - weights.sum(axis=1, keepdims=True)


def pictures(azimuths, elevations, size):
    """Rays, as the inputs of nerf, and their pixels (rays, 3)."""
    cameras = [camera(*view, size) for view in zip(azimuths, elevations, strict=True)]
    pixels = np.concatenate([picture(*rays) for rays in cameras])
    origins, directions = (np.concatenate(part) for part in zip(*cameras, strict=True))
    rays = dict(origins=origins, directions=directions)
    return {k: v.astype("float32") for k, v in rays.items()}, pixels.astype("float32")


def decibels(pixels, truth):
    """Peak signal-to-noise ratio of pixels from 0 to 1."""
    return -10 * np.log10(np.mean((pixels - truth) ** 2))


def in_a_row(pixels, size):
    """Pictures side by side: (views size², 3) -> (size, views size, 3)."""
    views = pixels.reshape(-1, size, size, 3)
    return views.transpose(1, 0, 2, 3).reshape(size, -1, 3)


def chart(image, title, step=3):
    """An image (height, width, 3) of values from 0 to 1, with squares as pixels."""
    values = [
        dict(x=x, y=y, colour="#{:02x}{:02x}{:02x}".format(*pixel))
        for y, row in enumerate(np.rint(255 * image.clip(0, 1)).astype(int).tolist())
        for x, pixel in enumerate(row)
    ]
    return (
        alt.Chart(alt.Data(values=values), title=title)
        .mark_rect()
        .encode(
            alt.X("x:O", axis=None),
            alt.Y("y:O", axis=None),
            alt.Color("colour:N", scale=None),
        )
        .properties(width=alt.Step(step), height=alt.Step(step))
        .configure_view(stroke=None)
        .configure_scale(bandPaddingInner=0, bandPaddingOuter=0)
    )


def main():
    """Prints how near both networks come to the new pictures, and draws those."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", type=int, default=32, help="of a picture's side")
    parser.add_argument("--views", type=int, default=24, help="pictures in training")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--batch-size", type=int, default=256, help="in rays")
    parser.add_argument("--samples", type=int, default=32, help="of each network")
    parser.add_argument("--chart", default="radiance_field.png")
    arguments = parser.parse_args()

    keras.utils.set_random_seed(0)
    turns = np.arange(arguments.views) * np.pi * (3 - 5**0.5)  # by the golden angle
    elevations = np.linspace(0.0, 1.0, arguments.views)
    rays, pixels = pictures(turns, elevations, arguments.size)
    around = np.arange(10) / 10 * 2 * np.pi + 0.1
    new_rays, truth = pictures(around, np.full(10, 0.5), arguments.size)

    model = keras_edifice.build(
        "nerf",
        hidden_size=64,
        num_layers=4,
        skip_layer=1,
        num_frequencies=6,
        num_dir_frequencies=2,
        near=NEAR,
        far=FAR,
        num_coarse=arguments.samples,
        num_fine=arguments.samples,
        white_background=True,
    )
    steps = arguments.epochs * -(-len(pixels) // arguments.batch_size)
    model.compile(
        keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(0.003, steps)),
        {"rgb": "mse", "rgb_coarse": "mse"},
    )
    model.fit(
        rays,
        {"rgb": pixels, "rgb_coarse": pixels},
        batch_size=arguments.batch_size,
        epochs=arguments.epochs,
        verbose=2,
    )
    shown = model.predict(new_rays, batch_size=1024, verbose=0)
    for network, output in {"coarse": "rgb_coarse", "fine": "rgb"}.items():
        ratio = decibels(shown[output], truth)
        print(f"{network}: {ratio:.1f} dB of the held-out views", flush=True)
    rows = [in_a_row(p, arguments.size) for p in (truth, shown["rgb"])]
    title = "A turn around the scene: truth above, fine network below"
    chart(np.concatenate(rows), title).save(arguments.chart)


if __name__ == "__main__":
    main()
