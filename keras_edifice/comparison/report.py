"""The report: one HTML file with the table and the charts that needs no network.

The Vega libraries are written into the file once and draw every chart; the policy in
the file's head forbids the browser to load anything.
"""

import json
from html import escape
from pathlib import Path

from keras_edifice.backends.selection import install_command
from keras_edifice.comparison.charts import charts


def report_problem() -> str | None:
    """One line if the report cannot be written here, else None."""
    try:
        import altair  # noqa: F401
        import vl_convert  # noqa: F401
    except ImportError as error:
        return (
            f"the report needs {error.name or 'altair'}, which is not installed; "
            f"run: {install_command('report')}"
        )
    return None


def write_report(comparison, path="comparison.html") -> Path:
    """Writes the report of a comparison.

    Args:
        comparison: what `compare` returned.
        path: the file; its folder must exist.

    Returns:
        The path.

    Raises:
        ImportError: Vega-Altair or vl-convert is not installed.
        OSError: the file cannot be written.
    """
    problem = report_problem()
    if problem:
        raise ImportError(problem)
    path = Path(path)
    path.write_text(report_html(comparison), encoding="utf-8")
    return path


def report_html(comparison) -> str:
    """The report as one HTML text."""
    drawn = charts(comparison)
    specs = {chart["id"]: chart["spec"] for chart in drawn}
    sections = "".join(
        f'<section class="card"><h2>{escape(chart["title"])}</h2>'
        f'<p class="caption">{escape(chart["caption"])}</p>'
        f'<div class="chart" id="chart-{chart["id"]}"></div></section>'
        for chart in drawn
    )
    title = f"Comparison of {len(comparison.rows)} architectures"
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<title>{title}: {escape(comparison.data.name)}</title>
<style>{_STYLE}</style>
</head>
<body>
<main>
<header><p class="kicker">keras_edifice</p><h1>{title}</h1>
<p class="lead">{escape(_lead(comparison))}</p>{_facts(comparison)}</header>
<section class="card"><h2>Ranking</h2>{html_table(comparison)}</section>
{sections}
<section class="card"><h2>How to read this</h2><ul>{_items(comparison.notes)}</ul>
</section>
<noscript><p>The charts need JavaScript; the table does not.</p></noscript>
</main>
<script>{_libraries()}</script>
<script>
const specs = {_embedded(specs)};
const options = {{mode: "vega-lite", renderer: "canvas", actions: false}};
for (const [id, spec] of Object.entries(specs))
  vegaEmbed("#chart-" + id, spec, options).catch(console.error);
</script>
</body>
</html>
"""


def html_table(comparison) -> str:
    """The ranked table as HTML."""
    head = "".join(f"<th>{name}</th>" for name in comparison.HEADER)
    body = "".join(
        _html_row(row, cells)
        for row, cells in zip(comparison.rows, comparison.cells(), strict=True)
    )
    return (
        f'<table class="ranking"><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table>"
    )


def _html_row(row, cells):
    kinds = ("number", "name", "", "number", "accuracy", "number", "number", "notes")
    parts = []
    for kind, text in zip(kinds, cells, strict=True):
        text = escape(text)
        if kind == "accuracy" and row.accuracy is not None:
            text = (
                f'<span class="bar"><i style="width:{100 * row.accuracy:.1f}%"></i>'
                f"</span>{text}"
            )
        parts.append(f'<td class="{kind}">{text}</td>')
    return f'<tr class="{"failed" if row.error else ""}">{"".join(parts)}</tr>'


def _lead(comparison):
    data, settings = comparison.data, comparison.settings
    return (
        f"Trained alike on {data.name}: {len(data.y_train)} training and "
        f"{len(data.y_test)} test examples, {len(data.classes)} classes, "
        f"{settings.epochs} epochs."
    )


def _facts(comparison):
    settings, machine = comparison.settings, comparison.machine
    backend = machine["backend"]
    facts = {
        "backend": f"{backend} {machine[backend]}",
        "keras": machine["keras"],
        "keras_edifice": machine["keras_edifice"],
        "python": machine["python"],
        "machine": f"{machine['system']}, {machine['cpus']} processors",
        "optimiser": f"Adam {settings.learning_rate:g}",
        "loss": settings.loss.replace("_", " "),
        "batch": str(settings.batch_size),
        "epochs": str(settings.epochs),
        "seed": str(settings.seed),
        "started": comparison.started.replace("T", " ").replace("+00:00", " UTC"),
        "took": f"{comparison.seconds:.0f} s",
    }
    return (
        '<dl class="facts">'
        + "".join(
            f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>"
            for name, value in facts.items()
        )
        + "</dl>"
    )


def _items(lines):
    return "".join(f"<li>{escape(line)}</li>" for line in lines)


def _embedded(value):
    """JSON that may stand in a script element."""
    return json.dumps(value, allow_nan=False).replace("<", "\\u003c")


def _libraries():
    """Vega, Vega-Lite and Vega-Embed as one script, in Altair's version."""
    import altair
    import vl_convert

    wanted = ".".join(altair.SCHEMA_VERSION.removeprefix("v").split(".")[:2])
    known = vl_convert.get_vegalite_versions()
    bundle = vl_convert.javascript_bundle(
        vl_version=wanted if wanted in known else known[-1]
    )
    return bundle.replace("</script", "<\\/script")


_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; img-src data: blob:; "
    "script-src 'unsafe-inline' 'unsafe-eval'"
)

_STYLE = """
:root { color: #1f2933; background: #f3f5f7; font: 15px/1.5 system-ui, sans-serif; }
body { margin: 0; }
main { max-width: 1000px; margin: 0 auto; padding: 32px 20px 48px; }
h1 { font-size: 30px; line-height: 1.2; margin: 0 0 6px; }
h2 { font-size: 19px; margin: 0 0 4px; }
.kicker { margin: 0; color: #4c78a8; font-weight: 600; letter-spacing: .04em; }
.lead { margin: 0 0 16px; font-size: 17px; color: #3d4853; }
.facts { display: grid; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr));
  gap: 10px 18px; margin: 0 0 22px; }
.facts dt { color: #66717c; font-size: 12px; }
.facts dd { margin: 0; font-variant-numeric: tabular-nums; }
.card { background: white; border: 1px solid #dfe4e9; border-radius: 8px;
  padding: 20px 24px; margin: 0 0 18px; overflow-x: auto; }
.caption { margin: 0 0 14px; color: #66717c; }
.chart { width: 100%; }
.ranking { border-collapse: collapse; width: 100%; margin-top: 10px; }
.ranking th { text-align: left; font-size: 12px; font-weight: 600; color: #66717c;
  border-bottom: 2px solid #dfe4e9; padding: 6px 10px; white-space: nowrap; }
.ranking td { border-bottom: 1px solid #edf0f3; padding: 7px 10px; }
.ranking th:nth-child(1), .ranking th:nth-child(4), .ranking th:nth-child(6),
.ranking th:nth-child(7), .ranking .number { text-align: right; }
.ranking td { font-variant-numeric: tabular-nums; }
.ranking .name { font-weight: 600; }
.ranking .accuracy { white-space: nowrap; }
.ranking .notes { color: #66717c; font-size: 13px; }
.ranking .failed td { color: #b42318; }
.bar { display: inline-block; width: 72px; height: 8px; margin-right: 9px;
  background: #edf0f3; border-radius: 4px; overflow: hidden; vertical-align: 1px; }
.bar i { display: block; height: 100%; background: #4c78a8; }
ul { margin: 8px 0 0; padding-left: 20px; color: #3d4853; }
@media print { :root { background: white; } .card { break-inside: avoid; } }
"""
