"""Digits read row by row: tcn and lstm learn, are saved, loaded, exported and run.

    KERAS_BACKEND=jax python examples/digits_row_by_row.py
    KERAS_BACKEND=torch python examples/digits_row_by_row.py --architectures mamba

The 8x8 images of scikit-learn are sequences of 8 steps of 8 pixels. The ONNX file is
exported from the model that was saved and loaded, and runs on the whole test set.

Needs the extras `cli` (scikit-learn has the digits), `onnx` and `report`, and a
backend. Draws the test accuracy by the epoch.
"""

import argparse
import tempfile
from pathlib import Path

import altair as alt
import keras
import numpy as np
import onnxruntime
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import keras_edifice


def trained(architecture, data, epochs):
    """The model, and its accuracies on the test set, one after each epoch."""
    keras.utils.set_random_seed(0)
    x, x_test, y, y_test = data
    model = keras_edifice.classifier(
        architecture, 10, embed_size=8, hidden_size=64, window_size=8
    )
    rate = keras.optimizers.schedules.CosineDecay(0.003, epochs * -(-len(x) // 32))
    model.compile(
        keras.optimizers.Adam(rate),
        "sparse_categorical_crossentropy",
        metrics=["accuracy"],
    )
    history = model.fit(
        x, y, epochs=epochs, validation_data=(x_test, y_test), verbose=2
    )
    return model, history.history["val_accuracy"]


def accuracy_of_export(model, x_test, y_test):
    """Of the ONNX file of the saved model, and how far its outputs are from Keras'."""
    with tempfile.TemporaryDirectory() as folder:
        model.save(Path(folder, "digits.keras"))
        model = keras.saving.load_model(Path(folder, "digits.keras"))
        file = Path(folder, "digits.onnx")
        difference = keras_edifice.export(model, file)
        session = onnxruntime.InferenceSession(file)
        name = session.get_inputs()[0].name
        (scores,) = session.run(None, {name: x_test})
    return np.mean(scores.argmax(axis=-1) == y_test), difference


def main():
    """Prints the test accuracy of the models and of their files, and draws it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--architectures", default="tcn,lstm")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--chart", default="digits_row_by_row.svg")
    arguments = parser.parse_args()

    images, labels = load_digits(return_X_y=True)
    steps = (images.reshape(-1, 8, 8) / 16.0).astype("float32")
    data = train_test_split(steps, labels, random_state=0)

    rows = []
    for architecture in arguments.architectures.split(","):
        model, accuracies = trained(architecture, data, arguments.epochs)
        accuracy, difference = accuracy_of_export(model, *data[1::2])
        print(
            f"{architecture}: {accuracies[-1]:.3f} of the test set, its ONNX file: "
            f"{accuracy:.3f} of the test set, differs by {difference:.0e}",
            flush=True,
        )
        rows += [
            dict(architecture=architecture, epoch=i + 1, accuracy=value)
            for i, value in enumerate(accuracies)
        ]
    alt.Chart(
        alt.Data(values=rows), title="Digits, read in 8 rows of 8 pixels"
    ).mark_line(point=True).encode(
        alt.X("epoch:Q", title="epoch").axis(tickMinStep=1),
        alt.Y("accuracy:Q", title="test accuracy").axis(format="%").scale(zero=False),
        alt.Color("architecture:N").sort(None),
    ).save(arguments.chart)


if __name__ == "__main__":
    main()
