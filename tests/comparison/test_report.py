import builtins
import json
import re

import numpy as np
import pytest

from keras_edifice.comparison import compare
from keras_edifice.comparison.charts import _label_sides, _overlap, _runs
from keras_edifice.comparison.report import report_html

FOUR = [f"mlp:hidden_sizes=[{size}]" for size in (8, 7, 6, 5)]
ALWAYS = ["accuracy", "curves", "data", "losses", "time"]


@pytest.fixture(scope="module")
def outcome():
    return compare([*FOUR, "mlp:hidden_sizes=[1]", "nope"], epochs=2, progress=False)


@pytest.fixture(scope="module")
def html(outcome):
    return report_html(outcome)


def specs(html):
    return json.loads(re.search(r"^const specs = (.*);$", html, re.MULTILINE).group(1))


def test_the_report_loads_nothing(html):
    page = html.replace(re.search(r"<script>.*?</script>", html, re.DOTALL).group(), "")
    assert not re.search(r"<(link|img|iframe|object|embed)\b", page)
    assert not re.search(r"<script[^>]+src", html)
    assert "http" not in page
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
    (values,) = (
        specs(html)["accuracy"]["datasets"].values()
        if ("datasets" in specs(html)["accuracy"])
        else [specs(html)["accuracy"]["layer"][0]["data"]["values"]]
    )
    drawn = {value["architecture"]: value["accuracy"] for value in values}
    assert drawn == {r.label: r.accuracy for r in outcome.rows if not r.error}


def test_the_regions_are_those_of_the_four_best(outcome, html):
    panels = specs(html)["regions"]["concat"]
    titles = [panel["title"]["text"] for panel in panels]
    assert titles == [f"{row.rank}. {row.label}" for row in outcome.rows[:4]]
    assert specs(html)["regions"]["columns"] == 2


def test_the_values_of_the_curves_are_every_epoch(outcome, html):
    text = json.dumps(specs(html)["curves"])
    assert text.count('"part": "test"') == 5 * 2
    assert text.count('"part": "training"') == 5 * 2


def test_data_with_many_features_is_drawn_in_its_principal_components():
    outcome = compare("mlp", data="wine", epochs=1, progress=False)
    found = specs(report_html(outcome))
    assert sorted(found) == ALWAYS
    assert "first principal component (" in json.dumps(found["data"])


def test_a_report_without_any_success_still_shows_the_data():
    outcome = compare("nope", epochs=1, progress=False)
    assert sorted(specs(report_html(outcome))) == ["data"]


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


def test_text_of_the_data_cannot_break_the_page(tmp_path):
    labels = np.array(["</script><b>", "a & b"] * 20)
    x = np.random.default_rng(0).normal(size=(40, 2))
    outcome = compare("mlp", data=(x, labels), epochs=1, progress=False)
    html = report_html(outcome)
    assert html.count("</script>") == 2
    assert "</script><b>" in json.dumps(specs(html)["data"])


def test_equal_neighbours_of_the_grid_become_one_rectangle():
    edges = np.stack([np.arange(4.0), np.arange(4.0)], axis=1)
    found = _runs(np.array([[0, 0, 1], [1, 1, 1], [0, 1, 0]]), edges, ["p", "q"])
    rectangles = [(r["a"], r["b"], r["c"], r["d"], r["class"]) for r in found]
    assert rectangles == [
        (0, 2, 0, 1, "p"),
        (2, 3, 0, 1, "q"),
        (0, 3, 1, 2, "q"),
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
