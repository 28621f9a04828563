"""The charts of the report, as Vega-Lite specifications made with Vega-Altair.

Values go in as plain rows, so that no data frame is needed. A family has one colour in
all charts, a class another set of colours.
"""

import numpy as np

FAMILY_COLOURS = (
    "#4c78a8", "#f58518", "#54a24b", "#e45756", "#b279a2", "#439894", "#9d755d",
    "#d67195", "#b79a20", "#79706e", "#3b5b92", "#83bcb6", "#8c4a2f", "#5a9e6f",
    "#7a5195", "#bc5090", "#2f4b7c", "#6b8e23", "#a05d56",
)  # fmt: skip
CLASS_COLOURS = (
    "#2878b5", "#e0731d", "#2e9e5b", "#c83e4d", "#7b5ea7", "#8a6d3b", "#d16ba5",
    "#6b7280", "#a3a01c", "#17a2b8",
)  # fmt: skip
WIDTH = 920
MOST_POINTS = 1500
GRID = 120
TOP = 4


def charts(comparison) -> list[dict]:
    """The charts that there is data for: dicts with title, caption and spec.

    Raises:
        ImportError: Vega-Altair is not installed.
    """
    import altair as alt

    good = [row for row in comparison.rows if row.error is None]
    data, found = comparison.data, [_scatter(alt, comparison.data)]
    if good:
        colour = _family_colour(alt, comparison.rows)
        found.append(_bars(alt, good, colour))
        if len(data.features) == 2:
            found.append(_regions(alt, good[:TOP], data))
        found += [
            _time(alt, good, colour),
            _curves(alt, good, colour),
            _losses(alt, good, colour),
        ]
    for chart in found:
        chart["spec"] = _styled(chart["spec"]).to_dict()
        chart["spec"].pop("$schema", None)
    return found


def _styled(chart):
    return (
        chart.configure(font="system-ui, sans-serif", background="white")
        .configure_view(stroke="#d8dde3")
        .configure_axis(
            gridColor="#edf0f3",
            domainColor="#98a2ad",
            tickColor="#98a2ad",
            labelColor="#3d4853",
            titleColor="#3d4853",
            labelFontSize=12,
            titleFontSize=13,
            titleFontWeight=500,
            titlePadding=10,
        )
        .configure_legend(labelFontSize=12, titleFontSize=12, titleFontWeight=500)
        .configure_header(labelFontSize=13, labelFontWeight=600, labelColor="#1f2933")
    )


def _values(alt, rows):
    return alt.Data(values=rows)


def _family_colour(alt, rows):
    families = sorted({row.family for row in rows if row.family})
    colours = [FAMILY_COLOURS[i % len(FAMILY_COLOURS)] for i, _ in enumerate(families)]
    return (
        alt.Color("family:N", title="family")
        .scale(domain=families, range=colours)
        .legend(orient="top", symbolType="circle", symbolStrokeWidth=0)
    )


def _class_scale(alt, classes):
    colours = [CLASS_COLOURS[i % len(CLASS_COLOURS)] for i, _ in enumerate(classes)]
    return alt.Scale(domain=classes, range=colours)


def _light(colour, part=0.72):
    """A colour mixed with white."""
    channels = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return "#" + "".join(f"{round(c + (255 - c) * part):02x}" for c in channels)


def _axis_titles(data):
    suffix = " (standardised)" if data.standardised else ""
    return [f"{feature}{suffix}" for feature in data.features]


def _plane(data):
    """(points of training and test in two axes, titles of the axes)."""
    x = np.concatenate([data.x_train, data.x_test]).reshape(
        len(data.x_train) + len(data.x_test), -1
    )
    if len(data.features) == 2:
        return x, _axis_titles(data)
    centred = x.astype("float64") - x.mean(axis=0, dtype="float64")
    _, strengths, axes = np.linalg.svd(centred, full_matrices=False)
    share = np.square(strengths) / max(np.square(strengths).sum(), 1e-12)
    axes, share = np.pad(axes, [(0, 1), (0, 0)])[:2], np.pad(share, (0, 1))
    titles = [
        f"{word} principal component ({100 * part:.0f} % of the variance)"
        for word, part in zip(("first", "second"), share, strict=False)
    ]
    return centred @ axes.T, titles


def _scatter(alt, data):
    points, (x_title, y_title) = _plane(data)
    labels = np.concatenate([data.y_train, data.y_test])
    parts = ["training"] * len(data.y_train) + ["test"] * len(data.y_test)
    chosen = np.arange(len(points))
    if len(chosen) > MOST_POINTS:
        chosen = np.sort(np.random.default_rng(0).permutation(chosen)[:MOST_POINTS])
    rows = [
        {
            "x": round(float(points[i, 0]), 4),
            "y": round(float(points[i, 1]), 4),
            "class": data.classes[labels[i]],
            "part": parts[i],
        }
        for i in chosen
    ]
    spec = (
        alt.Chart(_values(alt, rows))
        .mark_point(filled=True, size=34, opacity=0.75)
        .encode(
            alt.X("x:Q", title=x_title).scale(zero=False, nice=True),
            alt.Y("y:Q", title=y_title).scale(zero=False, nice=True),
            alt.Color("class:N", title="class", scale=_class_scale(alt, data.classes)),
            alt.Shape("part:N", title="part").scale(
                domain=["training", "test"], range=["circle", "triangle-up"]
            ),
            tooltip=["class:N", "part:N", "x:Q", "y:Q"],
        )
        .properties(width=WIDTH - 190, height=460)
    )
    shown = "" if len(chosen) == len(points) else f", {len(chosen)} of them drawn"
    caption = (
        f"{len(data.y_train)} training and {len(data.y_test)} test examples in "
        f"{len(data.classes)} classes{shown}."
    )
    return {"id": "data", "title": "Data", "caption": caption, "spec": spec}


def _bars(alt, rows, colour):
    values = [
        {
            "architecture": row.label,
            "family": row.family,
            "accuracy": row.accuracy,
            "text": f"{100 * row.accuracy:.1f} %",
        }
        for row in rows
    ]
    base = alt.Chart(_values(alt, values)).encode(
        alt.Y("architecture:N", title=None, sort=[row.label for row in rows]).axis(
            labelLimit=260, labelFontSize=13
        ),
        alt.X("accuracy:Q", title="test accuracy")
        .scale(domain=[0, 1])
        .axis(format="%", values=[0, 0.2, 0.4, 0.6, 0.8, 1.0]),
    )
    bars = base.mark_bar(cornerRadiusEnd=2).encode(
        colour, tooltip=["architecture:N", "family:N", "text:N"]
    )
    inside = base.mark_text(align="right", dx=-6, color="white", fontWeight=600)
    outside = base.mark_text(align="left", dx=5, color="#3d4853", fontWeight=600)
    spec = alt.layer(
        bars,
        inside.encode(text="text:N").transform_filter("datum.accuracy >= 0.15"),
        outside.encode(text="text:N").transform_filter("datum.accuracy < 0.15"),
    ).properties(width=WIDTH - 140, height=alt.Step(30))
    return {
        "id": "accuracy",
        "title": "Test accuracy by family",
        "caption": "Best first; the colour is the family.",
        "spec": spec,
    }


def _epochs(rows, measure):
    return [
        {
            "architecture": row.label,
            "family": row.family,
            "epoch": epoch,
            "part": part,
            "value": float(value) if np.isfinite(value) else None,
        }
        for row in rows
        for part, key in (("training", measure), ("test", f"val_{measure}"))
        for epoch, value in enumerate(row.curve.get(key, ()), start=1)
    ]


def _facets(alt, rows, colour, values, y):
    columns = min(4, len(rows))
    return (
        alt.Chart(_values(alt, values))
        .mark_line(strokeWidth=2, point=alt.OverlayMarkDef(size=14))
        .encode(
            alt.X("epoch:Q", title="epoch")
            .scale(zero=False)
            .axis(format="d", tickMinStep=1, tickCount=5),
            y,
            colour,
            alt.StrokeDash("part:N", legend=None).scale(
                domain=["test", "training"], range=[[1, 0], [4, 3]]
            ),
            tooltip=["architecture:N", "part:N", "epoch:Q", "value:Q"],
        )
        .properties(width=(WIDTH - 30) // columns - 52, height=150)
        .facet(
            alt.Facet("architecture:N", title=None, sort=[row.label for row in rows]),
            columns=columns,
        )
    )


def _curves(alt, rows, colour):
    y = alt.Y("value:Q", title="accuracy").scale(domain=[0, 1]).axis(format="%")
    return {
        "id": "curves",
        "title": "Training curves: accuracy",
        "caption": "After each epoch: on the test part (solid) and, as the mean over "
        "the running epoch, on the training part (dashed).",
        "spec": _facets(alt, rows, colour, _epochs(rows, "accuracy"), y),
    }


def _losses(alt, rows, colour):
    y = alt.Y("value:Q", title="loss")
    spec = _facets(alt, rows, colour, _epochs(rows, "loss"), y)
    return {
        "id": "losses",
        "title": "Training curves: loss",
        "caption": "Cross-entropy and whatever an architecture adds to it, so each has "
        "a scale of its own.",
        "spec": spec.resolve_scale(y="independent"),
    }


def _time(alt, rows, colour):
    width, height = WIDTH - 90, 380
    seconds = np.array([row.training_seconds for row in rows])
    accuracy = np.array([row.accuracy for row in rows])
    low = max(0.0, accuracy.min() - 0.15 * max(accuracy.max() - accuracy.min(), 0.1))
    high = min(1.02, accuracy.max() + 0.02)
    far = seconds.max() > 8 * seconds.min()
    x_low = seconds.min() / 1.4 if far else 0.0
    x_high = seconds.max() * (1.8 if far else 1.15)
    x = alt.X("seconds:Q", title="training time in seconds").scale(
        type="log" if far else "linear", domain=[x_low, x_high], nice=False
    )
    y = alt.Y("accuracy:Q", title="test accuracy").scale(domain=[low, high], nice=False)
    values = [
        {
            "architecture": row.label,
            "family": row.family,
            "seconds": round(row.training_seconds, 3),
            "accuracy": row.accuracy,
            "parameters": row.parameters,
        }
        for row in rows
    ]
    base = alt.Chart(_values(alt, values)).encode(
        x.axis(tickCount=8), y.axis(format=".0%", tickCount=6), colour
    )
    scaled = np.log if far else np.asarray
    across = (scaled(seconds) - scaled(x_low)) / (scaled(x_high) - scaled(x_low))
    up = (accuracy - low) / (high - low)
    sides = _label_sides(across * width, (1 - up) * height, [r.label for r in rows])
    layers = [
        base.mark_circle(size=150, opacity=0.9).encode(
            tooltip=["architecture:N", "seconds:Q", "accuracy:Q", "parameters:Q"]
        )
    ]
    for align, dx, dy in dict.fromkeys(sides):
        here = [
            v for v, side in zip(values, sides, strict=True) if side[1:] == (dx, dy)
        ]
        layers.append(
            base.properties(data=_values(alt, here))
            .mark_text(align=align, dx=dx, dy=dy, baseline="middle", fontSize=12)
            .encode(text="architecture:N")
        )
    return {
        "id": "time",
        "title": "Accuracy against time",
        "caption": "Up and to the left is better. The time includes the compilation"
        f"{'; its axis is logarithmic' if far else ''}.",
        "spec": alt.layer(*layers).properties(width=width, height=height),
    }


def _label_sides(x, y, labels):
    """For each point where its label hides no other: (align, dx, dy) in pixels."""
    options = [("left", 10, 0), ("right", -10, 0)]
    for dy in (-15, 15, -30, 30, -45, 45, -60, 60):
        options += [("center", 0, dy), ("left", 10, dy), ("right", -10, dy)]
    taken = [(px - 7, py - 7, px + 7, py + 7) for px, py in zip(x, y, strict=True)]
    sides = []
    for px, py, label in zip(x, y, labels, strict=True):
        long = 7.0 * len(label)
        for align, dx, dy in options:
            left = px + dx - {"left": 0, "right": long, "center": long / 2}[align]
            box = (left, py + dy - 8, left + long, py + dy + 8)
            inside = box[0] >= 0 and box[1] >= 0
            if inside and not any(_overlap(box, other) for other in taken):
                break
        else:
            align, dx, dy = options[0]
        taken.append(box)
        sides.append((align, dx, dy))
    return sides


def _overlap(a, b):
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _regions(alt, rows, data):
    """Which class the best contenders give to each point of the plane, 2x2."""
    points = np.concatenate([data.x_train, data.x_test])
    low, high = points.min(axis=0), points.max(axis=0)
    margin = 0.06 * np.maximum(high - low, 1e-6)
    edges = np.linspace(low - margin, high + margin, GRID + 1).astype("float64")
    x_title, y_title = _axis_titles(data)
    panels = [
        _region(alt, row, data, edges, x_title, y_title).properties(
            width=(WIDTH - 150) // 2,
            height=330,
            title=alt.Title(
                f"{row.rank}. {row.label}", subtitle=f"{100 * row.accuracy:.1f} %"
            ),
        )
        for row in rows
    ]
    spec = alt.concat(*panels, columns=2, spacing=28).resolve_scale(color="shared")
    return {
        "id": "regions",
        "title": f"Decision regions of the best {len(rows)}",
        "caption": "The ground has the colour of the class that is predicted there. "
        "The points are the test examples; those with a black edge are wrong.",
        "spec": spec,
    }


def _region(alt, row, data, edges, x_title, y_title):
    centres = (edges[:-1] + edges[1:]) / 2
    grid = np.stack(np.meshgrid(centres[:, 0], centres[:, 1]), axis=-1)
    predicted = _classes(row.model, grid.reshape(-1, 2)).reshape(GRID, GRID)
    scale = _class_scale(alt, data.classes)
    ground = alt.Scale(domain=data.classes, range=[_light(c) for c in scale.range])
    xs, ys = (
        {
            "scale": alt.Scale(domain=edges[[0, -1], axis].tolist(), nice=False),
            "title": title,
        }
        for axis, title in enumerate((x_title, y_title))
    )
    area = (
        alt.Chart(_values(alt, _runs(predicted, edges, data.classes)))
        .mark_rect()
        .encode(
            alt.X("a:Q", **xs),
            alt.X2("b:Q"),
            alt.Y("c:Q", **ys),
            alt.Y2("d:Q"),
            alt.Fill("class:N", legend=None, scale=ground),
        )
    )
    found = _classes(row.model, data.x_test)
    points = [
        {
            "x": round(float(x), 4),
            "y": round(float(y), 4),
            "class": data.classes[truth],
            "predicted": data.classes[guess],
            "wrong": bool(truth != guess),
        }
        for (x, y), truth, guess in zip(data.x_test, data.y_test, found, strict=True)
    ]
    dots = (
        alt.Chart(_values(alt, points))
        .mark_point(filled=True, size=42, opacity=1)
        .encode(
            alt.X("x:Q", **xs),
            alt.Y("y:Q", **ys),
            alt.Color("class:N", title="class", scale=scale).legend(orient="top"),
            stroke=alt.condition("datum.wrong", alt.value("black"), alt.value("white")),
            strokeWidth=alt.condition("datum.wrong", alt.value(1.8), alt.value(0.6)),
            tooltip=["class:N", "predicted:N", "x:Q", "y:Q"],
        )
    )
    return alt.layer(area, dots).resolve_scale(fill="independent")


def _classes(model, x):
    scores = model.predict(x.astype("float32"), batch_size=4096, verbose=0)
    return np.argmax(np.asarray(scores), axis=-1)


def _runs(predicted, edges, classes):
    """Rectangles of equal class: neighbours in a row of the grid become one."""
    found, overlap = [], 0.3 * (edges[1, 1] - edges[0, 1])  # hides seams between rows
    for i, line in enumerate(predicted):
        bounds = [0, *(np.flatnonzero(np.diff(line)) + 1), len(line)]
        for start, end in zip(bounds[:-1], bounds[1:], strict=True):
            found.append(
                {
                    "a": round(float(edges[start, 0]), 4),
                    "b": round(float(edges[end, 0]), 4),
                    "c": round(float(edges[i, 1]), 4),
                    "d": round(float(min(edges[i + 1, 1] + overlap, edges[-1, 1])), 4),
                    "class": classes[line[start]],
                }
            )
    return found
