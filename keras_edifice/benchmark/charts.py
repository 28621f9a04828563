"""Charts: measurements against length by implementation, and profiles of models."""

from pathlib import Path

from keras_edifice.backends.selection import install_command

COLUMNS = 3
SIZE = 210


def save_chart(rows, path):
    """Writes time and memory against length as SVG, PNG or HTML.

    Args:
        rows: list of `Row`; those without a length are left out.
        path: the file; its ending says what it is.

    Raises:
        ImportError: Vega-Altair or vl-convert is not installed.
        ValueError: the ending is another one, or no row has a length.
    """
    alt, path = _library(path)
    rows = [row for row in rows if row.length is not None]
    if not rows:
        raise ValueError("a chart is drawn against length, and no row has one")
    panels = [_panels(alt, rows, "milliseconds", "ms")]
    if any(row.megabytes is not None for row in rows):
        panels.append(_panels(alt, rows, "megabytes", "MB"))
    _write(alt.vconcat(*panels), path)


def save_profile(profile, path):
    """Writes the multiply-accumulates of the layers that have some, in their order.

    Args:
        profile: of `keras_edifice.profile`.
        path: as for `save_chart`.

    Raises:
        ImportError: as `save_chart`.
        ValueError: the ending is another one, or no layer multiplies.
    """
    alt, path = _library(path)
    rows = [row for row in profile.rows if row.multiply_accumulates]
    if not rows:
        raise ValueError(f"no layer of {profile.model} multiplies; there is no chart")
    values = [
        {
            "layer": row.layer,
            "class": row.kind,
            "multiply-accumulates": row.multiply_accumulates,
        }
        for row in rows
    ]
    bars = (
        alt.Chart(alt.Data(values=values))
        .mark_bar()
        .encode(
            x=alt.X("multiply-accumulates:Q").axis(format="~s"),
            y=alt.Y("layer:N", title=None, sort=[row.layer for row in rows]).axis(
                labelLimit=400
            ),
            color=alt.Color("class:N", title=None).legend(
                orient="top", columns=COLUMNS
            ),
        )
        .properties(
            title=f"{profile.model}: {profile.multiply_accumulates:,} "
            "multiply-accumulates",
            width=2 * SIZE,
            height=alt.Step(14),
        )
    )
    _write(bars, path)


def _library(path):
    """Vega-Altair, and the path if a chart can be written there."""
    path = Path(path)
    if path.suffix not in (".svg", ".png", ".html"):
        raise ValueError(f"chart must end in .svg, .png or .html, received {path.name}")
    try:
        import altair as alt
        import vl_convert  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"the chart needs {error.name}, which is not installed; "
            f"run: {install_command('report')}"
        ) from None
    return alt, path


def _write(chart, path):
    chart = chart.configure(font="sans-serif", background="white")
    chart.save(str(path), **({"scale_factor": 2} if path.suffix == ".png" else {}))


def _panels(alt, rows, field, unit):
    """A panel for each name and part: `field` against length, both logarithmic."""
    several = len({row.part for row in rows}) > 1
    values = [
        {
            "measured": f"{row.name}, {row.part}" if several else row.name,
            "implementation": row.implementation,
            "length": row.length,
            field: max(getattr(row, field), 0.01),
        }
        for row in rows
        if getattr(row, field) is not None
    ]
    lengths = sorted({row.length for row in rows})
    lines = (
        alt.Chart(alt.Data(values=values))
        .mark_line(point=True)
        .encode(
            x=alt.X("length:Q")
            .scale(type="log", base=2, domain=[lengths[0], lengths[-1]])
            .axis(values=lengths, format="d"),
            y=alt.Y(f"{field}:Q", title=unit).scale(type="log"),
            color=alt.Color("implementation:N", title=None).legend(
                orient="top", columns=COLUMNS, labelLimit=400
            ),
        )
        .properties(width=SIZE, height=SIZE * 0.7)
    )
    title = {"milliseconds": "Time", "megabytes": "Memory"}[field]
    if not several:
        title += f" of {rows[0].part}"
    return lines.facet(alt.Facet("measured:N", title=None), columns=COLUMNS).properties(
        title=f"{title}, {unit}"
    )
