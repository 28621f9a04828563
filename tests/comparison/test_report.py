import builtins
import json
import re

import numpy as np
import pytest

from keras_edifice.comparison import Comparison, Row, load_data
from keras_edifice.comparison.charts import _label_sides, _overlap, _runs
from keras_edifice.comparison.contest import Settings, _machine
from keras_edifice.comparison.report import report_html

ALWAYS = ["accuracy", "curves", "data", "losses", "time"]


class Nearest:
    """Stands for a trained model: the class whose mean is nearest."""

    def __init__(self, data):
        labels = range(len(data.classes))
        self.means = np.stack(
            [data.x_train[data.y_train == label].mean(axis=0) for label in labels]
        )

    def predict(self, x, **_):
        return -np.square(x[:, None] - self.means).sum(axis=-1)


def finished(data, count=6, epochs=2):
    """A comparison that needed no training, with one failure at its end."""
    rows = [
        Row(
            f"contender {i}",
            "mlp",
            rank=i,
            family=("feedforward", "energy", "recurrent")[i % 3],
            parameters=100 * i,
            accuracy=1.0 - 0.05 * i,
            training_seconds=1.5 * i,
            prediction_milliseconds=2.0,
            curve={
                name: [1.0 / (i + epoch) for epoch in range(epochs)]
                for name in ("loss", "accuracy", "val_loss", "val_accuracy")
            },
            model=Nearest(data),
        )
        for i in range(1, count)
    ]
    rows.append(Row("broken", "nope", error="unknown architecture 'nope'"))
    return Comparison(
        rows=rows,
        data=data,
        settings=Settings(epochs, 32, 0.01, seed=0),
        machine=_machine(),
        started="2026-01-01T00:00:00+00:00",
        seconds=3.0,
    )


@pytest.fixture(scope="module")
def outcome():
    return finished(load_data("rings"))


@pytest.fixture(scope="module")
def html(outcome):
    return report_html(outcome)


def values(spec):
    """All rows of data in a specification."""
    if isinstance(spec, list):
        return [row for item in spec for row in values(item)]
    if not isinstance(spec, dict):
        return []
    found = []
    for name, item in spec.items():
        if name == "datasets":
            found += [row for rows in item.values() for row in rows]
        elif name == "data" and "values" in item:
            found += item["values"]
        else:
            found += values(item)
    return found


def specs(html):
    return json.loads(re.search(r"^const specs = (.*);$", html, re.MULTILINE).group(1))


def test_the_report_loads_nothing(html):
    page = html.replace(re.search(r"<script>.*?</script>", html, re.DOTALL).group(), "")
    assert not re.search(r"<(link|img|iframe|object|embed)\b", page)
    assert not re.search(r"<script[^>]+src", html)
    assert not re.search(r"https?:", page)
    assert "default-src 'none'" in page


def test_the_libraries_are_in_the_file_once(html):
    assert html.count("<script>") == html.count("</script>") == 2
    assert html.count("vegaEmbed(") == 1
    assert 500_000 < len(html) < 2_500_000


def test_every_chart_has_its_place_and_its_specification(html):
    found = specs(html)
    assert sorted(found) == sorted([*ALWAYS, "regions"])
    for chart in found:
        assert f'id="chart-{chart}"' in html


def test_the_table_has_every_contender_and_what_was_run(outcome, html):
    for row in outcome.rows:
        assert f'<td class="name">{row.label}</td>' in html
    assert "unknown architecture &#x27;nope&#x27;" in html
    for fact in ("backend", "keras_edifice", "seed", "epochs", "optimiser"):
        assert f"<dt>{fact}</dt>" in html


def test_the_bars_are_the_accuracies(outcome, html):
    rows = values(specs(html)["accuracy"])
    drawn = {row["architecture"]: row["accuracy"] for row in rows}
    assert drawn == {r.label: r.accuracy for r in outcome.rows if not r.error}


def test_accuracy_stands_against_time(outcome, html):
    drawn = {
        row["architecture"]: (row["seconds"], row["accuracy"])
        for row in values(specs(html)["time"])
    }
    assert drawn == {
        r.label: (r.training_seconds, r.accuracy) for r in outcome.rows if not r.error
    }


def test_every_point_of_the_data_is_drawn(outcome, html):
    rows = values(specs(html)["data"])
    assert len(rows) == 1000
    assert {row["class"] for row in rows} == set(outcome.data.classes)
    assert sum(row["part"] == "test" for row in rows) == 200


def test_a_family_has_one_colour_in_all_charts(html):
    scales = re.findall(r'"domain": \["energy", [^]]*\], "range": \[[^]]*\]', html)
    assert len(scales) >= 4
    assert len(set(scales)) == 1


def test_the_regions_are_those_of_the_four_best(outcome, html):
    panels = specs(html)["regions"]["concat"]
    titles = [panel["title"]["text"] for panel in panels]
    assert titles == [f"{row.rank}. {row.label}" for row in outcome.rows[:4]]
    assert specs(html)["regions"]["columns"] == 2


def test_the_ground_is_the_class_that_is_predicted(outcome, html):
    panel = specs(html)["regions"]["concat"][0]
    rectangles = [row for row in values(panel) if "a" in row]
    if not rectangles:  # Altair keeps all data at the top
        rectangles = [row for row in values(specs(html)["regions"]) if "a" in row]
    data, model = outcome.data, outcome.rows[0].model
    centres = [((r["a"] + r["b"]) / 2, (r["c"] + r["d"]) / 2) for r in rectangles]
    guesses = model.predict(np.array(centres)).argmax(axis=-1)
    classes = [data.classes[guess] for guess in guesses]
    assert classes == [row["class"] for row in rectangles]


def test_the_curves_hold_every_epoch(outcome, html):
    for chart in ("curves", "losses"):
        rows = values(specs(html)[chart])
        assert len(rows) == 5 * 2 * 2
        assert {row["epoch"] for row in rows} == {1, 2}


def test_a_loss_that_is_not_finite_leaves_a_gap(outcome):
    broken = finished(outcome.data)
    broken.rows[0].curve["loss"][1] = float("nan")
    rows = values(specs(report_html(broken))["losses"])
    assert sum(row["value"] is None for row in rows) == 1


@pytest.mark.parametrize("name", ["wine", "digits"])
def test_data_with_many_features_is_drawn_in_its_principal_components(name):
    data = load_data(name)
    found = specs(report_html(finished(data)))
    assert sorted(found) == ALWAYS
    assert "first principal component (" in json.dumps(found["data"])
    assert len(values(found["data"])) == min(1500, len(data.y_train) + len(data.y_test))


def test_a_report_without_any_success_still_shows_the_data(outcome):
    assert sorted(specs(report_html(finished(outcome.data, count=1)))) == ["data"]


def test_the_file_is_written_where_it_is_wanted(outcome, tmp_path):
    path = outcome.report(tmp_path / "out.html")
    assert path.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")


def test_a_missing_charting_library_is_one_line(outcome, tmp_path, monkeypatch):
    load = builtins.__import__

    def without_altair(name, *rest):
        if name == "altair":
            raise ImportError("No module named 'altair'", name="altair")
        return load(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without_altair)
    with pytest.raises(ImportError, match="the report needs altair.*pip install") as e:
        outcome.report(tmp_path / "out.html")
    assert "\n" not in str(e.value)
    assert not (tmp_path / "out.html").exists()


def test_text_of_the_data_cannot_break_the_page():
    labels = np.array(["</script><b>", "a & b"] * 20)
    x = np.random.default_rng(0).normal(size=(40, 2))
    html = report_html(finished(load_data((x, labels))))
    assert html.count("</script>") == 2
    assert "</script><b>" in {row["class"] for row in values(specs(html)["data"])}


def test_equal_neighbours_of_the_grid_become_one_rectangle():
    edges = np.stack([np.arange(4.0), np.arange(4.0)], axis=1)
    found = _runs(np.array([[0, 0, 1], [1, 1, 1], [0, 1, 0]]), edges, ["p", "q"])
    rectangles = [(r["a"], r["b"], r["c"], r["d"], r["class"]) for r in found]
    assert rectangles == [
        (0, 2, 0, 1.3, "p"),
        (2, 3, 0, 1.3, "q"),
        (0, 3, 1, 2.3, "q"),
        (0, 1, 2, 3, "p"),
        (1, 2, 2, 3, "q"),
        (2, 3, 2, 3, "p"),
    ]


def test_labels_of_points_close_together_do_not_hide_each_other():
    x, y = np.array([100.0, 104.0, 108.0]), np.array([50.0, 52.0, 54.0])
    labels = ["first", "second", "third"]
    boxes = []
    for px, py, text, (align, dx, dy) in zip(
        x, y, labels, _label_sides(x, y, labels), strict=True
    ):
        long = 7 * len(text)
        left = px + dx - {"left": 0, "right": long, "center": long / 2}[align]
        boxes.append((left, py + dy - 8, left + long, py + dy + 8))
    pairs = [(a, b) for i, a in enumerate(boxes) for b in boxes[:i]]
    assert not any(_overlap(a, b) for a, b in pairs)
