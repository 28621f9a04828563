"""The data of a comparison: rings and clusters, scikit-learn's sets, the user's files.

Every loader ends in `Data`: training and test part, the names of the classes, and one
note for each thing that was done to the data.
"""

import difflib
import zipfile
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from keras_edifice.backends.selection import install_command

VIEWS = {
    "vector": ("vector",),
    "sequence": ("sequence", "set"),
    "image": ("image", "vector", "sequence", "set"),
}
"""Kind of the data -> the kinds of architectures that can take it."""

BUILT_IN = ("rings", "digits", "wine", "breast_cancer")
"""The data sets that need no file."""

TEST_FRACTION = 0.2
MOST_CLASSES = 100
MOST_CATEGORIES = 100
FEWEST_EXAMPLES = 10


@dataclass(frozen=True)
class Data:
    """Examples with their classes, split for training and test.

    Attributes:
        name: what the data is called.
        kind: vector (n, features), sequence (n, steps, features) or image
            (n, height, width, channels).
        x_train: examples to train on, float32.
        y_train: their classes, 0 to len(classes) - 1.
        x_test: examples to measure on.
        y_test: their classes.
        classes: the name of each class.
        features: the name of each feature of vectors.
        notes: what was done to the data, one line each.
        standardised: whether each feature has mean 0 and deviation 1.
    """

    name: str
    kind: str
    x_train: np.ndarray = field(repr=False)
    y_train: np.ndarray = field(repr=False)
    x_test: np.ndarray = field(repr=False)
    y_test: np.ndarray = field(repr=False)
    classes: list[str]
    features: list[str] = field(default_factory=list, repr=False)
    notes: list[str] = field(default_factory=list)
    standardised: bool = False

    def view(self, kind: str) -> tuple[np.ndarray, np.ndarray]:
        """(x_train, x_test) as architectures of `kind` take them.

        An image is a vector of its pixels, or a sequence or a set of its rows.

        Raises:
            ValueError: this data cannot be seen that way.
        """
        if kind not in VIEWS[self.kind]:
            raise ValueError(
                f"it takes {kind} data, {self.name} is {self.kind} data; "
                f"`keras-edifice list --kind {self.kind}` names those that fit"
            )
        return _view(self.x_train, self.kind, kind), _view(self.x_test, self.kind, kind)


def _view(x, have, want):
    if have == "image" and want == "vector":
        return x.reshape(len(x), -1)
    if have == "image" and want != "image":
        return x.reshape(len(x), x.shape[1], -1)
    return x


def load_data(data="rings", target: str | None = None, seed: int = 0) -> Data:
    """Loads a data set and splits it 80/20, each class alike.

    Args:
        data: a name of `BUILT_IN`, the path of a .csv or .npz file, a pair of arrays
            (x, y), or a `Data`, which is returned.
        target: the column of a CSV file, or the array of an NPZ file (its default
            is y), that holds the classes.
        seed: of the split, and of the points of the rings.

    Raises:
        ValueError: no such data set or column, or nothing to classify.
        OSError: the file cannot be read.
        ImportError: the optional package that reads this data is missing.
    """
    if isinstance(data, Data):
        return data
    if isinstance(data, tuple | list):
        if len(data) != 2:
            raise ValueError(f"data must be a pair (x, y), received {len(data)} items")
        return _from_arrays("arrays", *data, seed)
    if data == "rings":
        return _rings_and_clusters(seed)
    if data in BUILT_IN:
        return _from_scikit_learn(data, seed)
    path = Path(data)
    readers = {".csv": _from_csv, ".tsv": _from_csv, ".npz": _from_npz}
    if path.suffix.lower() not in readers:
        raise ValueError(
            f"unknown data {str(data)!r}; it must be one of {', '.join(BUILT_IN)} or a "
            "file that ends in .csv or .npz"
        )
    if not path.is_file():
        raise FileNotFoundError(2, "no such file", str(path))
    return readers[path.suffix.lower()](path, target, seed)


def _rings_and_clusters(seed):
    """Two rings around the origin and three clusters outside, 200 points each."""
    rng, count = np.random.default_rng(seed), 200
    parts = []
    for radius, noise in ((1.0, 0.2), (2.5, 0.25)):
        angle = rng.uniform(0.0, 2.0 * np.pi, count)
        r = radius + noise * rng.normal(size=count)
        parts.append(np.stack([r * np.cos(angle), r * np.sin(angle)], axis=1))
    for centre in ((-3.0, 2.5), (3.0, 2.5), (0.0, -3.5)):
        parts.append(centre + 0.5 * rng.normal(size=(count, 2)))
    classes = [
        "inner ring", "outer ring", "left cluster", "right cluster", "lower cluster"
    ]  # fmt: skip
    return _split(
        "rings",
        "vector",
        np.concatenate(parts),
        np.repeat(np.arange(5), count),
        classes,
        seed,
        features=["x", "y"],
        notes=["two rings and three clusters in the plane, used as they are"],
    )


def _from_scikit_learn(name, seed):
    try:
        from sklearn import datasets
    except ImportError:
        raise ImportError(
            f"the data set {name} comes with scikit-learn, which is not installed; "
            f"run: {install_command('report')}"
        ) from None
    bunch = getattr(datasets, f"load_{name}")()
    classes = [str(label) for label in bunch.target_names]
    if name == "digits":
        return _split(
            name,
            "image",
            bunch.images[..., None] / 16.0,
            bunch.target,
            classes,
            seed,
            notes=["images of 8x8 pixels, divided by 16"],
        )
    return _standardised(
        _split(
            name,
            "vector",
            bunch.data,
            bunch.target,
            classes,
            seed,
            features=[str(feature) for feature in bunch.feature_names],
        )
    )


def _from_npz(path, target, seed):
    try:
        with np.load(path) as file:
            arrays = {key: file[key] for key in file.files}
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path.name} cannot be read as NPZ: {error}") from None
    for key in ("x", target or "y"):
        if key not in arrays:
            raise ValueError(
                f"{path.name} has no array {key!r}; it holds "
                f"{', '.join(arrays) or 'nothing'}"
            )
    return _from_arrays(path.name, arrays["x"], arrays[target or "y"], seed)


def _from_arrays(name, x, y, seed):
    x, y = np.asarray(x), np.asarray(y)
    kinds = {2: "vector", 3: "sequence", 4: "image"}
    if x.ndim not in kinds:
        raise ValueError(
            f"x of {name} must have rank 2 (vectors), 3 (sequences) or 4 (images), "
            f"received shape {x.shape}"
        )
    if y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    if y.shape != x.shape[:1]:
        raise ValueError(
            f"y of {name} must hold one class for each of the {len(x)} examples, "
            f"received shape {y.shape}"
        )
    if x.dtype.kind not in "fiub" or not np.isfinite(x).all():
        raise ValueError(
            f"x of {name} must hold finite numbers; remove missing values and text"
        )
    labels, classes = _encode_classes(y, f"y of {name}")
    kind = kinds[x.ndim]
    features = [f"feature {i}" for i in range(x.shape[1])] if kind == "vector" else []
    return _standardised(_split(name, kind, x, labels, classes, seed, features))


def _from_csv(path, target, seed):
    table, notes = _read_table(path)
    columns = list(table.columns)
    if target is None:
        raise ValueError(
            f"{path.name} needs a target (--target COLUMN), one of its columns: "
            f"{_listed(columns)}"
        )
    if target not in columns:
        near = difflib.get_close_matches(target, columns, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(
            f"{path.name} has no column {target!r}; {hint}its columns are: "
            f"{_listed(columns)}"
        )
    missing = table[target].isna()
    if missing.any():
        table = table[~missing]
        notes.append(f"{_rows(missing.sum())} without a {target} left out")
    labels, classes = _encode_classes(table[target].to_numpy(), f"column {target!r}")
    names, x, encoding_notes = _encode_features(table.drop(columns=target))
    if not names:
        raise ValueError(f"{path.name} has no column to learn from besides {target!r}")
    data = _split(
        path.name, "vector", x, labels, classes, seed, names, notes + encoding_notes
    )
    return _standardised(_imputed(data))


def _read_table(path):
    try:
        import pandas
    except ImportError:
        raise ImportError(
            "CSV files are read by pandas, which is not installed; "
            f"run: {install_command('report')}"
        ) from None
    separator = "\t" if path.suffix.lower() == ".tsv" else ","
    options = dict(skipinitialspace=True, na_values=["?"], low_memory=False)
    try:
        table = pandas.read_csv(path, sep=separator, **options)
        if table.shape[1] == 1:
            header = str(table.columns[0])
            other = next((s for s in (";", "\t", "|") if s in header), None)
            if other:
                decimal = "," if other == ";" else "."
                table = pandas.read_csv(path, sep=other, decimal=decimal, **options)
    except (ValueError, UnicodeError) as error:  # pandas' own errors are ValueErrors
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path.name} cannot be read as CSV: {reason}") from None
    table.columns = [str(column).strip() for column in table.columns]
    if len(table) < FEWEST_EXAMPLES:
        raise ValueError(
            f"{path.name} has {_rows(len(table))}; "
            f"at least {FEWEST_EXAMPLES} are needed"
        )
    first = table.columns[0]
    if first.startswith("Unnamed") and (table[first] == np.arange(len(table))).all():
        return table.drop(columns=first), ["the column of row numbers left out"]
    return table, []


def _encode_classes(values, where):
    """(class numbers, names of the classes) of numbers or text."""
    numeric = values.dtype.kind in "fiu"
    if numeric and not np.isfinite(values).all():
        raise ValueError(f"{where} holds missing or infinite values")
    values = values if numeric else values.astype(str)
    found, labels = np.unique(values, return_inverse=True)
    if len(found) < 2:
        raise ValueError(
            f"{where} holds a single class ({found[0] if len(found) else 'none'}); "
            "two or more are needed"
        )
    fractions = numeric and (found != np.round(found)).any() and len(found) > 20
    if fractions or len(found) > min(MOST_CLASSES, len(values) / 2):
        raise ValueError(
            f"{where} holds {len(found)} different values in {len(values)} examples: "
            "a quantity or a name, not a class; choose one that holds classes"
        )
    whole = numeric and (found == np.round(found)).all()
    return labels, [str(int(v)) if whole else str(v) for v in found]


def _encode_features(table):
    """(names, numbers with NaN where missing, notes) of the feature columns."""
    from pandas.api import types

    names, columns, left_out, notes = [], [], [], []
    for column in table.columns:
        values = table[column]
        if values.isna().all():
            left_out.append(f"{column} (empty)")
        elif types.is_bool_dtype(values) or types.is_numeric_dtype(values):
            numbers = values.to_numpy("float64", na_value=np.nan)
            columns.append(np.where(np.isfinite(numbers), numbers, np.nan))
            names.append(column)
        else:
            texts = values.astype(object).where(~values.isna(), "missing").astype(str)
            categories = sorted(texts.unique())
            if len(categories) > min(MOST_CATEGORIES, 0.9 * len(texts)):
                left_out.append(f"{column} ({len(categories)} different texts)")
                continue
            own = " (missing is one of them)" if values.isna().any() else ""
            notes.append(
                f"text column {column} one-hot encoded: {len(categories)} "
                f"categories{own}"
            )
            for category in categories:
                columns.append((texts == category).to_numpy("float64"))
                names.append(f"{column}={category}")
    if left_out:
        notes.append(f"columns left out: {', '.join(left_out)}")
    return names, np.stack(columns, axis=1) if columns else None, notes


def _imputed(data):
    """Missing numbers become the median of the column in the training part."""
    gaps = np.isnan(data.x_train).any(axis=0) | np.isnan(data.x_test).any(axis=0)
    if not gaps.any():
        return data
    medians = np.zeros(gaps.size, "float32")
    for i in np.flatnonzero(gaps):
        known = data.x_train[:, i][~np.isnan(data.x_train[:, i])]
        medians[i] = np.median(known) if known.size else 0.0
    count = int(np.isnan(data.x_train).sum() + np.isnan(data.x_test).sum())
    columns = _listed([data.features[i] for i in np.flatnonzero(gaps)])
    data.notes.append(
        f"{count} missing values replaced by the training median, in: {columns}"
    )
    return _replaced(data, lambda x: np.where(np.isnan(x), medians, x))


def _standardised(data):
    """Features (channels of images) get mean 0 and deviation 1 in the training part."""
    axes = tuple(range(data.x_train.ndim - 1))
    mean = data.x_train.mean(axes, dtype="float64")
    deviation = data.x_train.std(axes, dtype="float64")
    deviation[deviation < 1e-12] = 1.0
    data.notes.append(
        "features standardised by the mean and deviation of the training part"
    )
    data = _replaced(data, lambda x: ((x - mean) / deviation).astype("float32"))
    return replace(data, standardised=True)


def _replaced(data, function):
    return replace(data, x_train=function(data.x_train), x_test=function(data.x_test))


def _split(name, kind, x, y, classes, seed, features=(), notes=()):
    """80/20 in each class; a class with a single example is only trained on."""
    rng, train, test, notes = np.random.default_rng([seed, 1]), [], [], list(notes)
    for label, class_name in enumerate(classes):
        members = rng.permutation(np.flatnonzero(y == label))
        count = max(1, round(TEST_FRACTION * len(members)))
        if len(members) == 1:
            count = 0
            notes.append(f"class {class_name} has one example, kept for training")
        test.append(members[:count])
        train.append(members[count:])
    train, test = rng.permutation(np.concatenate(train)), np.concatenate(test)
    x, y = x.astype("float32"), y.astype("int32")
    return Data(
        name,
        kind,
        x[train],
        y[train],
        x[test],
        y[test],
        list(classes),
        list(features),
        notes,
    )


def _listed(names, most=20):
    names = list(map(str, names))
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def _rows(count):
    return f"{count} row" if count == 1 else f"{count} rows"
