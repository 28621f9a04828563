"""The contest: every contender gets the same data, loss, optimiser and epochs."""

import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime

import keras
import numpy as np

from keras_edifice.backends.versions import version
from keras_edifice.comparison.contenders import Contender, contenders
from keras_edifice.comparison.data import Data, load_data
from keras_edifice.errors import one_line
from keras_edifice.registry import info

PREDICTIONS = 5
BATCH_OF_PREDICTION = 256


@dataclass
class Row:
    """One contender: its place, what it cost, how it learned; or why it failed.

    Attributes:
        label: what it is called in the comparison.
        architecture: name of the architecture.
        options: options given for it, beside the defaults of the comparison.
        rank: place, from 1; None if it failed.
        family: family of the architecture.
        parameters: weights of the model, trained or not.
        accuracy: part of the test set that it classifies rightly.
        training_seconds: wall time of `fit`.
        prediction_milliseconds: median wall time of `predict` on the test set.
        curve: loss, accuracy, val_loss and val_accuracy after each epoch.
        notes: what is special about this row.
        error: one line that says why it failed.
        model: the trained model.
    """

    label: str
    architecture: str
    options: dict = field(default_factory=dict)
    rank: int | None = None
    family: str = ""
    parameters: int | None = None
    accuracy: float | None = None
    training_seconds: float | None = None
    prediction_milliseconds: float | None = None
    curve: dict[str, list[float]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    error: str | None = None
    model: keras.Model | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Settings:
    """What all contenders share."""

    epochs: int
    batch_size: int
    learning_rate: float
    seed: int
    optimizer: str = "adam"
    loss: str = "sparse_categorical_crossentropy"


@dataclass(frozen=True)
class Comparison:
    """The outcome: `print` it, show it in a notebook, or write a `report`.

    Attributes:
        rows: the contenders, best first, failed ones last.
        data: what they were trained and tested on.
        settings: what they shared.
        machine: versions and machine.
        started: time of the start, UTC.
        seconds: wall time of the whole.
    """

    rows: list[Row]
    data: Data
    settings: Settings
    machine: dict[str, str]
    started: str
    seconds: float

    HEADER = (
        "rank", "architecture", "family", "parameters", "test accuracy",
        "training s", "prediction ms", "notes",
    )  # fmt: skip

    @property
    def failed(self) -> bool:
        """Whether no contender reached the end."""
        return all(row.error for row in self.rows)

    @property
    def notes(self) -> list[str]:
        """How to read the numbers."""
        epochs, count = self.settings.epochs, len(self.data.y_test)
        return [
            *self.data.notes,
            "same test accuracy: the contender with fewer parameters comes first",
            f"training: wall time of fit over {epochs} epochs, with the compilation "
            "and with the test after each epoch",
            f"prediction: median wall time of {PREDICTIONS} calls of predict on the "
            f"{count} test examples, after a warm-up",
        ]

    def cells(self) -> list[list[str]]:
        """The table as text: one list per row, in the order of `HEADER`."""
        return [_cells(row) for row in self.rows]

    def table(self) -> str:
        """The ranked table as plain text."""
        lines = [list(self.HEADER), *self.cells()]
        if not any(cells[-1] for cells in lines[1:]):
            lines = [cells[:-1] for cells in lines]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        lines.insert(1, ["-" * width for width in widths])
        return "\n".join(
            "  ".join(
                cell.rjust(width) if i in (0, 3, 4, 5, 6) else cell.ljust(width)
                for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
            ).rstrip()
            for cells in lines
        )

    def __str__(self):
        return "\n".join([self.headline, "", self.table(), "", *self.notes])

    @property
    def headline(self) -> str:
        """One line: data, split, backend, epochs and seed."""
        data, settings = self.data, self.settings
        return (
            f"{data.name}: {len(data.y_train)} training and {len(data.y_test)} test "
            f"examples, {len(data.classes)} classes; {settings.epochs} epochs, batch "
            f"{settings.batch_size}, Adam {settings.learning_rate:g}, seed "
            f"{settings.seed}; {self.machine['backend']}"
        )

    def _repr_html_(self):
        from keras_edifice.comparison.report import html_table

        return html_table(self)

    def to_json(self, indent: int | None = 2) -> str:
        """Everything but the data and the models, as JSON."""
        rows = []
        for row in self.rows:
            fields = {name: getattr(row, name) for name in _fields_without_model()}
            rows.append(fields)
        data = self.data
        return json.dumps(
            _plain(
                {
                    "data": {
                        "name": data.name,
                        "kind": data.kind,
                        "classes": data.classes,
                        "example_shape": list(data.x_train.shape[1:]),
                        "training_examples": len(data.y_train),
                        "test_examples": len(data.y_test),
                    },
                    "settings": asdict(self.settings),
                    "machine": self.machine,
                    "started": self.started,
                    "seconds": self.seconds,
                    "notes": self.notes,
                    "rows": rows,
                }
            ),
            indent=indent,
            allow_nan=False,
        )

    def report(self, path="comparison.html"):
        """Writes the HTML report. Returns its path.

        Raises:
            ImportError: Vega-Altair or vl-convert is not installed.
        """
        from keras_edifice.comparison.report import write_report

        return write_report(self, path)


def compare(
    architectures=None,
    *,
    data="rings",
    target: str | None = None,
    epochs: int = 10,
    seed: int = 0,
    batch_size: int = 32,
    learning_rate: float = 1e-2,
    progress: bool | Callable = True,
) -> Comparison:
    """Trains architectures alike and ranks them by their accuracy on the test set.

    >>> outcome = keras_edifice.compare("mlp,tabnet:num_steps=5", data="wine")
    >>> print(outcome)
    >>> outcome.report("wine.html")

    Args:
        architectures: "mlp,tabnet:num_steps=5", a list of such names, or a mapping of
            names to options; None is the contenders of the original comparison.
        data: rings, digits, wine, breast_cancer, the path of a .csv or .npz file, or
            a pair of arrays (x, y).
        target: column of the CSV file, or array of the NPZ file, with the classes.
        epochs: passes over the training part.
        seed: of the data, of the split and of each contender.
        batch_size: examples of a step.
        learning_rate: of Adam.
        progress: True shows a bar, False nothing; a function is called after every
            epoch as f(done, total, row, logs).

    Returns:
        The rows with everything measured, best first.

    Raises:
        ValueError: no such data, or nothing to compare.
        TypeError: `architectures` is of the wrong type.
        OSError: the file of the data cannot be read.
    """
    for name, value in (("epochs", epochs), ("batch_size", batch_size)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a whole number >= 1, received {value!r}")
    if not learning_rate > 0:
        raise ValueError(f"learning_rate must be > 0, received {learning_rate!r}")
    started, start = datetime.now(UTC), time.perf_counter()
    data = load_data(data, target, seed)
    settings = Settings(epochs, batch_size, learning_rate, seed)
    entrants = contenders(architectures, data.kind)
    tell = _Bar() if progress is True else progress or (lambda *_: None)
    rows = []
    for place, contender in enumerate(entrants):
        steps = _Steps(tell, place * epochs, len(entrants) * epochs)
        rows.append(_run(contender, data, settings, steps))
    return Comparison(
        rows=_ranked(rows),
        data=data,
        settings=settings,
        machine=_machine(),
        started=started.isoformat(timespec="seconds"),
        seconds=time.perf_counter() - start,
    )


def _run(contender: Contender, data, settings, steps) -> Row:
    """Trains and measures one contender; whatever goes wrong becomes its error."""
    row = Row(contender.label, contender.name, contender.options)
    keras.utils.set_random_seed(settings.seed)
    try:
        entry = info(contender.name)
        row.family = entry.family
        model = contender.classifier(data)
        _train(model, row, data.view(entry.kind), data, settings, steps)
        _measure(model, row, data.view(entry.kind), data)
    except Exception as error:  # a contender that fails must not stop the others
        row.error, row.accuracy, row.model = one_line(error), None, None
    steps.finished(row, settings.epochs)
    return row


def _train(model, row, inputs, data, settings, steps):
    x_train, x_test = inputs
    model.compile(
        optimizer=keras.optimizers.Adam(settings.learning_rate),
        loss=settings.loss,
        metrics=["accuracy"],
    )
    start = time.perf_counter()
    history = model.fit(
        x_train,
        data.y_train,
        validation_data=(x_test, data.y_test),
        epochs=settings.epochs,
        batch_size=settings.batch_size,
        verbose=0,
        callbacks=[
            keras.callbacks.LambdaCallback(
                on_epoch_end=lambda epoch, logs: steps.epoch(row, epoch, logs)
            )
        ],
    )
    row.training_seconds = time.perf_counter() - start
    row.parameters = model.count_params()
    fixed = sum(math.prod(weight.shape) for weight in model.non_trainable_weights)
    if 10 * fixed > row.parameters:
        row.notes.append(f"{fixed:,} of the parameters are state that is not trained")
    row.curve = {
        name: [float(value) for value in values]
        for name, values in history.history.items()
    }
    if not math.isfinite(row.curve["loss"][-1]):
        row.notes.append("diverged: the training loss is not finite")


def _measure(model, row, inputs, data):
    """Accuracy and speed of what the architecture is used as.

    An architecture whose model has `convert` is used as the converted model.
    """
    x_train, x_test = inputs
    if hasattr(model, "convert"):
        before = _accuracy(_predict(model, x_test), data.y_test)
        model = model.convert(x_train)
        row.notes.append(f"{100 * before:.1f} % before the conversion")
    row.accuracy = _accuracy(_predict(model, x_test), data.y_test)
    times = []
    for _ in range(PREDICTIONS):
        start = time.perf_counter()
        _predict(model, x_test)
        times.append(1000.0 * (time.perf_counter() - start))
    row.prediction_milliseconds = statistics.median(times)
    row.model = model


def _predict(model, x):
    return np.asarray(model.predict(x, batch_size=BATCH_OF_PREDICTION, verbose=0))


def _accuracy(scores, labels):
    return float(np.mean(np.argmax(scores, axis=-1) == labels))


def _ranked(rows):
    """Best first; those that failed last, in the order in which they ran."""
    good = [row for row in rows if row.error is None]
    good.sort(key=lambda row: (-row.accuracy, row.parameters, row.label))
    for rank, row in enumerate(good, start=1):
        row.rank = rank
    return good + [row for row in rows if row.error is not None]


def _cells(row):
    def text(value, form):
        return "-" if value is None else format(value, form)

    notes = [f"failed: {row.error}"] if row.error else row.notes
    return [
        text(row.rank, "d"),
        row.label,
        row.family or "-",
        text(row.parameters, ",d"),
        "-" if row.accuracy is None else f"{100 * row.accuracy:.1f} %",
        text(row.training_seconds, ".1f"),
        text(row.prediction_milliseconds, ".1f"),
        "; ".join(notes),
    ]


def _fields_without_model():
    return [name for name in Row.__dataclass_fields__ if name != "model"]


def _plain(value):
    """`value` for strict JSON: a number that is not finite becomes null."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _machine():
    from keras_edifice import __version__

    backend = keras.backend.backend()
    return {
        "backend": backend,
        backend: version(backend) or "unknown",
        "keras": keras.__version__,
        "keras_edifice": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpus": str(os.cpu_count()),
    }


class _Steps:
    """Counts the epochs of all contenders for the progress bar."""

    def __init__(self, tell, before, total):
        self.tell, self.before, self.total = tell, before, total

    def epoch(self, row, epoch, logs):
        self.tell(self.before + epoch + 1, self.total, row, dict(logs or {}))

    def finished(self, row, epochs):
        self.tell(self.before + epochs, self.total, row, {})


class _Bar:
    """A bar in a terminal or a notebook, a line for each contender elsewhere."""

    def __init__(self):
        self.live = sys.stdout.isatty() or "ipykernel" in sys.modules
        self.bar = None

    def __call__(self, done, total, row, logs):
        if not self.live:
            if not logs:
                print(progress_line(row), flush=True)
            return
        if self.bar is None:
            self.bar = keras.utils.Progbar(
                total, unit_name="epoch", stateful_metrics=["loss", "accuracy"]
            )
        if logs:
            values = [(name, logs[name]) for name in ("loss", "accuracy")]
            self.bar.update(done, values, finalize=False)
        elif done == total:
            self.bar.update(done, finalize=True)


def progress_line(row: Row) -> str:
    """What there is to say when a contender has finished."""
    if row.error:
        return f"{row.label}: failed: {row.error}"
    return (
        f"{row.label}: {100 * row.accuracy:.1f} % of the test set, "
        f"{row.training_seconds:.1f} s"
    )
