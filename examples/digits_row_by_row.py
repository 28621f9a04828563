"""Trains on handwritten digits read row by row, saves, loads, exports, runs the file.

    KERAS_BACKEND=torch python examples/digits_row_by_row.py --architecture mamba

Needs the extras `cli` (scikit-learn has the digits) and `onnx`, and a backend.
"""

import argparse
import tempfile
from pathlib import Path

import keras
import numpy as np
import onnxruntime
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import keras_edifice


def main():
    """Prints the test accuracy of the model and of the ONNX file."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--architecture",
        default="lstm",
        choices=keras_edifice.list_architectures(kind="sequence"),
    )
    parser.add_argument("--epochs", type=int, default=10)
    arguments = parser.parse_args()

    keras.utils.set_random_seed(0)
    images, labels = load_digits(return_X_y=True)
    rows = (images.reshape(-1, 8, 8) / 16.0).astype("float32")  # 8 steps of 8 pixels
    x, x_test, y, y_test = train_test_split(rows, labels, random_state=0)

    model = keras_edifice.classifier(
        arguments.architecture, 10, embed_size=8, hidden_size=64, window_size=8
    )
    model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    model.fit(x, y, epochs=arguments.epochs, verbose=2)
    print(f"model: {model.evaluate(x_test, y_test, verbose=0)[1]:.3f} of the test set")

    with tempfile.TemporaryDirectory() as folder:
        model.save(Path(folder, "digits.keras"))
        model = keras.saving.load_model(Path(folder, "digits.keras"))
        file = Path(folder, "digits.onnx")
        difference = keras_edifice.export(model, file)
        session = onnxruntime.InferenceSession(file)
        name = session.get_inputs()[0].name
        (scores,) = session.run(None, {name: x_test})
    accuracy = np.mean(scores.argmax(-1) == y_test)
    print(f"ONNX:  {accuracy:.3f} of the test set, differs by {difference:.0e}")


if __name__ == "__main__":
    main()
