"""Long memory: s4 and s5 classify digits that they read pixel by pixel.

    KERAS_BACKEND=jax python examples/long_memory.py
    KERAS_BACKEND=jax python examples/long_memory.py --upsample 4 --hidden-size 32 \
        --layers 2 --batch-size 8

The 8x8 images of scikit-learn are sequences of 64 steps of one pixel; enlarged four
times, by the second command, of 1,024. The head sees the mean over the steps, so each
step may tell what it has read so far, and a digit's strokes are one row, up to 32
steps, apart.

Needs the extras `cli` (scikit-learn has the digits) and `report`, and a backend. Draws
the test accuracy by the epoch.
"""

import argparse

import altair as alt
import keras
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import keras_edifice

OPTIONS = {"s4": dict(num_ssm=1), "s5": dict()}  # s4: one Λ, P and B for all features


def accuracy_by_epoch(architecture, data, arguments):
    """Accuracies on the test set, one after each epoch."""
    keras.utils.set_random_seed(0)
    x, x_test, y, y_test = data
    model = keras_edifice.classifier(
        architecture,
        10,
        embed_size=1,
        hidden_size=arguments.hidden_size,
        num_layers=arguments.layers,
        dropout=0.0,
        pool="mean",
        window_size=x.shape[1],
        **OPTIONS[architecture],
    )
    rate = keras.optimizers.schedules.CosineDecay(
        0.004, arguments.epochs * -(-len(x) // arguments.batch_size)
    )
    model.compile(
        keras.optimizers.AdamW(rate),
        "sparse_categorical_crossentropy",
        metrics=["accuracy"],
    )
    history = model.fit(
        x,
        y,
        batch_size=arguments.batch_size,
        epochs=arguments.epochs,
        validation_data=(x_test, y_test),
        verbose=2,
    )
    return history.history["val_accuracy"]


def main():
    """Prints the test accuracy of both and draws it by the epoch."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--architectures", default="s4,s5")
    parser.add_argument("--upsample", type=int, default=1, help="of each image side")
    parser.add_argument("--hidden-size", type=int, default=48)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--chart", default="long_memory.svg")
    arguments = parser.parse_args()

    images, labels = load_digits(return_X_y=True)
    images = (images.reshape(-1, 8, 8) / 16.0).astype("float32")
    for axis in (1, 2):  # nearest neighbour
        images = images.repeat(arguments.upsample, axis=axis)
    pixels = images.reshape(len(images), -1, 1)
    data = train_test_split(pixels, labels, random_state=0)

    rows = []
    for architecture in arguments.architectures.split(","):
        accuracies = accuracy_by_epoch(architecture, data, arguments)
        print(f"{architecture}: {accuracies[-1]:.3f} of the test set", flush=True)
        rows += [
            dict(architecture=architecture, epoch=i + 1, accuracy=accuracy)
            for i, accuracy in enumerate(accuracies)
        ]
    alt.Chart(
        alt.Data(values=rows), title=f"Digits, read in {pixels.shape[1]:,} pixels"
    ).mark_line(point=True).encode(
        alt.X("epoch:Q", title="epoch").axis(tickMinStep=1),
        alt.Y("accuracy:Q", title="test accuracy").axis(format="%"),
        alt.Color("architecture:N").sort(None),
    ).save(arguments.chart)


if __name__ == "__main__":
    main()
