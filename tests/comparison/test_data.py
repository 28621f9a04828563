import numpy as np
import pytest

from keras_edifice.comparison.data import Data, load_data

rng = np.random.default_rng(0)


def all_of(data):
    return (
        np.concatenate([data.x_train, data.x_test]),
        np.concatenate([data.y_train, data.y_test]),
    )


def csv(tmp_path, lines, name="table.csv"):
    path = tmp_path / name
    path.write_text("\n".join(lines) + "\n")
    return path


def numbers(count=20, header="a,b,label", form="{i},{b:.3f},{label}"):
    """A table of two numbers and two classes that follow from the first number."""
    return [header] + [
        form.format(i=i, b=np.sin(i), label="yes" if i % 2 else "no")
        for i in range(count)
    ]


def test_rings_and_clusters_are_those_of_the_original():
    data = load_data("rings", seed=3)
    x, y = all_of(data)
    assert np.bincount(y).tolist() == [200] * 5
    assert np.bincount(data.y_test).tolist() == [40] * 5
    radius = np.hypot(*x.T)
    for label, mean, noise in ((0, 1.0, 0.2), (1, 2.5, 0.25)):
        assert abs(radius[y == label].mean() - mean) < 0.06
        assert abs(radius[y == label].std() - noise) < 0.04
    for label, centre in ((2, (-3, 2.5)), (3, (3, 2.5)), (4, (0, -3.5))):
        assert np.abs(x[y == label].mean(axis=0) - centre).max() < 0.12
        assert np.abs(x[y == label].std(axis=0) - 0.5).max() < 0.08
    assert not data.standardised


def test_a_seed_repeats_and_another_one_differs():
    first, again, other = (load_data("rings", seed=s) for s in (1, 1, 2))
    np.testing.assert_array_equal(first.x_train, again.x_train)
    assert np.abs(first.x_train - other.x_train).max() > 0.1


def test_training_and_test_part_share_no_example():
    data = load_data("rings")
    assert len(np.unique(np.concatenate(all_of(data)[:1]), axis=0)) == 1000
    assert (len(data.x_train), len(data.x_test)) == (800, 200)


@pytest.mark.parametrize(
    "name, count, features, classes",
    [("wine", 178, 13, 3), ("breast_cancer", 569, 30, 2)],
)
def test_tables_of_scikit_learn_are_standardised(name, count, features, classes):
    data = load_data(name)
    x, _ = all_of(data)
    assert x.shape == (count, features)
    assert (len(data.classes), len(data.features)) == (classes, features)
    np.testing.assert_allclose(data.x_train.mean(axis=0), 0.0, atol=1e-5)
    np.testing.assert_allclose(data.x_train.std(axis=0), 1.0, atol=1e-4)
    assert any("standardised" in note for note in data.notes)


def test_digits_can_be_seen_as_image_vector_and_rows():
    data = load_data("digits")
    shapes = {
        kind: data.view(kind)[0].shape[1:]
        for kind in ("image", "vector", "sequence", "set")
    }
    assert shapes == {
        "image": (8, 8, 1),
        "vector": (64,),
        "sequence": (8, 8),
        "set": (8, 8),
    }
    np.testing.assert_array_equal(
        data.view("vector")[0][0], data.view("sequence")[0][0].ravel()
    )
    assert data.x_train.max() == 1.0
    with pytest.raises(ValueError, match="it takes graph data, digits is image data"):
        data.view("graph")


def test_vectors_fit_vector_architectures_alone():
    with pytest.raises(ValueError, match="takes image data, wine is vector data"):
        load_data("wine").view("image")


@pytest.mark.parametrize(
    "name, target, message",
    [
        ("nowhere", None, "unknown data 'nowhere'; it must be one of rings, digits"),
        ("nowhere.csv", "a", "no such file"),
        ("nowhere.npz", None, "no such file"),
    ],
)
def test_data_that_is_not_there_is_one_line(name, target, message):
    with pytest.raises((ValueError, OSError), match=message):
        load_data(name, target)


BAD_TABLES = {
    "no target": (
        numbers(),
        None,
        r"--target COLUMN\), one of its columns: a, b, label",
    ),
    "another target": (
        numbers(),
        "lable",
        "'lable'; did you mean 'label'.*a, b, label",
    ),
    "one class": (
        ["a,label", *(f"{i},x" for i in range(20))],
        "label",
        r"column 'label' holds a single class \(x\)",
    ),
    "a quantity": (
        ["a,price", *(f"{i},{i * 1.37}" for i in range(40))],
        "price",
        "40 different values in 40 examples: a quantity or a name",
    ),
    "nothing to learn from": (
        ["label", *("xy"[i % 2] for i in range(20))],
        "label",
        "no column to learn from besides 'label'",
    ),
    "few rows": (numbers(5), "label", "has 5 rows; at least 10 are needed"),
    "empty": ([], "label", "cannot be read as CSV: No columns to parse"),
    "ragged": (
        ["a,b", *(["1,2"] * 12), "1,2,3,4"],
        "b",
        "cannot be read as CSV: Error tokenizing",
    ),
}


@pytest.mark.parametrize("case", BAD_TABLES)
def test_a_bad_table_is_one_line(tmp_path, case):
    lines, target, message = BAD_TABLES[case]
    with pytest.raises(ValueError, match=message) as caught:
        load_data(csv(tmp_path, lines), target)
    assert "\n" not in str(caught.value)


def test_bytes_that_are_no_text_are_one_line(tmp_path):
    path = tmp_path / "table.csv"
    path.write_bytes(b"a,b\n\xff\xfe\x00\x81,2\n" * 12)
    with pytest.raises(ValueError, match="cannot be read as CSV"):
        load_data(path, "b")


def test_text_columns_are_one_hot_encoded(tmp_path):
    lines = ["colour,size,label"] + [
        f"{('red', 'blue', '')[i % 3]},{i},{'ab'[i % 2]}" for i in range(24)
    ]
    data = load_data(csv(tmp_path, lines), "label")
    assert data.features == ["colour=blue", "colour=missing", "colour=red", "size"]
    assert any(
        "text column colour one-hot encoded: 3 categories (missing is one" in note
        for note in data.notes
    )
    x, _ = all_of(data)
    hot = x[:, :3] > 0
    assert (hot.sum(axis=1) == 1).all()


def test_missing_numbers_become_the_median_of_the_training_part(tmp_path):
    lines = numbers(40)
    lines[3] = ",0.5,yes"
    lines[8] = "?,0.5,no"
    data = load_data(csv(tmp_path, lines), "label")
    assert any(
        "2 missing values replaced by the training median, in: a" in note
        for note in data.notes
    )
    x, _ = all_of(data)
    values, counts = np.unique(x[:, 0].round(4), return_counts=True)
    median = values[counts.argmax()]
    assert counts.max() >= 2
    assert abs(median - np.median(data.x_train[:, 0])) < 0.2


def test_rows_without_a_class_are_left_out(tmp_path):
    lines = numbers(20)
    lines[4] = "3,0.1,"
    data = load_data(csv(tmp_path, lines), "label")
    assert len(data.y_train) + len(data.y_test) == 19
    assert data.classes == ["no", "yes"]
    assert any("1 row without a label left out" in note for note in data.notes)


@pytest.mark.parametrize(
    "labels, classes",
    [
        (["3", "7"], ["3", "7"]),
        (["1.0", "2.0"], ["1", "2"]),
        (["True", "False"], ["False", "True"]),
        (["1.5", "0.5"], ["0.5", "1.5"]),
        (["b", "a"], ["a", "b"]),
    ],
)
def test_classes_may_be_numbers_or_text(tmp_path, labels, classes):
    lines = ["a,label", *(f"{i},{labels[i % 2]}" for i in range(20))]
    data = load_data(csv(tmp_path, lines), "label")
    assert data.classes == classes
    assert np.bincount(all_of(data)[1]).tolist() == [10, 10]


def test_columns_that_say_nothing_are_left_out(tmp_path):
    lines = [",a,name,empty,label"] + [
        f"{i},{i % 5},person {i},,{'xy'[i % 2]}" for i in range(20)
    ]
    data = load_data(csv(tmp_path, lines), "label")
    assert data.features == ["a"]
    notes = " ".join(data.notes)
    assert "row numbers left out" in notes
    assert "name (20 different texts), empty (empty)" in notes


def test_other_separators_are_found(tmp_path):
    lines = [
        "a;b;label",
        *(f"{i},5;{i % 3};{'xy'[i % 2]}" for i in range(20)),
    ]
    data = load_data(csv(tmp_path, lines), "label")
    assert data.features == ["a", "b"]
    tabs = ["a\tlabel", *(f"{i}\t{'xy'[i % 2]}" for i in range(20))]
    assert load_data(csv(tmp_path, tabs, "t.tsv"), "label").features == ["a"]


def test_a_class_with_one_example_is_only_trained_on(tmp_path):
    lines = [*numbers(20), "99,0.1,rare"]
    data = load_data(csv(tmp_path, lines), "label")
    rare = data.classes.index("rare")
    assert (data.y_train == rare).sum() == 1
    assert (data.y_test == rare).sum() == 0
    assert any("class rare has one example" in note for note in data.notes)


def test_every_class_of_two_is_in_both_parts(tmp_path):
    lines = [*numbers(20), "98,0.1,rare", "99,0.1,rare"]
    data = load_data(csv(tmp_path, lines), "label")
    rare = data.classes.index("rare")
    assert (data.y_train == rare).sum() == (data.y_test == rare).sum() == 1


@pytest.mark.parametrize(
    "shape, kind",
    [((30, 4), "vector"), ((30, 5, 4), "sequence"), ((30, 6, 6, 2), "image")],
)
def test_npz_files_tell_their_kind_by_the_rank(tmp_path, shape, kind):
    path = tmp_path / "arrays.npz"
    x = 5.0 + 3.0 * rng.normal(size=shape)
    np.savez(path, x=x, y=np.arange(30) % 3, other=np.arange(30) % 2)
    data = load_data(path)
    assert (data.kind, len(data.classes)) == (kind, 3)
    axes = tuple(range(len(shape) - 1))
    np.testing.assert_allclose(data.x_train.mean(axis=axes), 0.0, atol=1e-5)
    assert len(load_data(path, "other").classes) == 2


@pytest.mark.parametrize(
    "arrays, target, message",
    [
        (dict(y=np.zeros(20)), None, "has no array 'x'; it holds y"),
        (dict(x=np.zeros((20, 2))), None, "has no array 'y'; it holds x"),
        (dict(x=np.zeros((20, 2)), y=np.zeros(20)), "z", "no array 'z'"),
        (dict(x=np.zeros((20, 2)), y=np.zeros(20)), None, r"a single class \(0.0\)"),
        (dict(x=np.zeros(20), y=np.zeros(20)), None, r"received shape \(20,\)"),
        (
            dict(x=np.zeros((20, 2)), y=np.zeros(7)),
            None,
            "one class for each of the 20",
        ),
        (dict(x=np.full((20, 2), np.nan), y=np.arange(20) % 2), None, "finite numbers"),
    ],
)
def test_bad_npz_files_are_one_line(tmp_path, arrays, target, message):
    path = tmp_path / "arrays.npz"
    np.savez(path, **arrays)
    with pytest.raises(ValueError, match=message):
        load_data(path, target)


def test_a_file_that_is_no_npz_is_one_line(tmp_path):
    path = tmp_path / "arrays.npz"
    path.write_bytes(b"PK nothing of the kind")
    with pytest.raises(ValueError, match="cannot be read as NPZ"):
        load_data(path)


def test_a_pair_of_arrays_will_do():
    data = load_data((rng.normal(size=(40, 3)), np.array(["a", "b"] * 20)))
    assert isinstance(data, Data)
    assert data.classes == ["a", "b"]
    assert load_data(data) is data
