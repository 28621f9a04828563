import pytest

from keras_edifice.benchmark.charts import save_chart
from keras_edifice.benchmark.rows import Row

ROWS = [
    Row("scan", part, "ours", n, n / 512, 1.0, 4.0, 4.0)
    for part in ("forward", "training step")
    for n in (512, 1024)
]


@pytest.mark.parametrize("ending", ["svg", "html"])
def test_chart_is_written(ending, tmp_path):
    path = tmp_path / f"chart.{ending}"
    save_chart(ROWS, path)
    assert "ours" in path.read_text() and "scan, training step" in path.read_text()


def test_one_part_stands_in_the_title(tmp_path):
    path = tmp_path / "chart.svg"
    save_chart(ROWS[:2], path)
    assert "Time of forward, ms" in path.read_text()
    assert "scan, forward" not in path.read_text()


def test_chart_of_another_kind_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"\.svg, \.png or \.html, received a\.gif"):
        save_chart(ROWS, tmp_path / "a.gif")


def test_rows_without_a_length_alone_are_refused(tmp_path):
    rows = [Row("image", "forward", "ours", None, 1.0, 1.0, 1.0)]
    with pytest.raises(ValueError, match="a chart is drawn against length"):
        save_chart(rows, tmp_path / "a.svg")
