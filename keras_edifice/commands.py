"""The verbs of `keras-edifice`. They need typer and rich, the optional part `cli`."""

import errno
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console, Group
from rich.panel import Panel
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table

import keras_edifice
from keras_edifice.backends import selection
from keras_edifice.backends.versions import version
from keras_edifice.errors import one_line

WIDE = 200  # columns where there is no terminal, so that no line is broken


class Verbs(typer.core.TyperGroup):
    """Turns errors of the user into one line and exit code 2."""

    def parse_args(self, ctx, args):
        ctx.meta["arguments"] = list(args)
        return super().parse_args(ctx, args)

    def invoke(self, ctx):
        try:
            return super().invoke(ctx)
        except (ValueError, TypeError, ImportError, OSError) as error:
            if ctx.params.get("debug") or getattr(error, "errno", None) == errno.EPIPE:
                raise
            print(f"error: {one_line(error)}", file=sys.stderr)
            raise typer.Exit(2) from None


app = typer.Typer(
    cls=Verbs,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Neural-network architectures for Keras 3: compare, list, describe, export.",
)

Backend = Annotated[
    str | None,
    typer.Option(help="jax, torch or tensorflow, whatever KERAS_BACKEND is."),
]
Options = Annotated[
    list[str] | None,
    typer.Argument(metavar="[OPTION=VALUE]...", help="Options of the architecture."),
]
Json = Annotated[bool, typer.Option("--json", help="JSON instead of text.")]


@app.callback()
def _common(
    debug: Annotated[
        bool, typer.Option(help="Show the traceback of an error.")
    ] = False,
):
    """Neural-network architectures for Keras 3: compare, list, describe, export."""


@app.command()
def compare(
    ctx: typer.Context,
    architectures: Annotated[
        str | None,
        typer.Option(help="a,b,c with options as name:option=value:option=value."),
    ] = None,
    data: Annotated[
        str,
        typer.Option(help="rings, digits, wine, breast_cancer, FILE.csv or FILE.npz."),
    ] = "rings",
    target: Annotated[
        str | None,
        typer.Option(help="Column (array, for NPZ: y) that holds the classes."),
    ] = None,
    epochs: Annotated[int, typer.Option(help="Passes over the training part.")] = 10,
    seed: Annotated[int, typer.Option(help="Of data, split and training.")] = 0,
    batch_size: Annotated[int, typer.Option(help="Examples of a step.")] = 32,
    learning_rate: Annotated[float, typer.Option(help="Of Adam.")] = 1e-2,
    backend: Backend = None,
    report: Annotated[Path, typer.Option(help="Where the HTML report goes.")] = Path(
        "comparison.html"
    ),
    no_report: Annotated[
        bool, typer.Option("--no-report", help="Write no report.")
    ] = False,
    as_json: Json = False,
):
    """Train architectures alike on one data set and rank them."""
    _use(ctx, backend)
    from keras_edifice.comparison import compare as run
    from keras_edifice.comparison.report import report_problem

    out = _console(stderr=as_json)
    _announce(out)
    problem = None if no_report else report_problem()
    if problem:
        out.print(f"no report: {problem}")
    elif not no_report and not report.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "no such folder", str(report.parent))
    with _Bar() as progress:
        outcome = run(
            architectures,
            data=data,
            target=target,
            epochs=epochs,
            seed=seed,
            batch_size=batch_size,
            learning_rate=learning_rate,
            progress=progress,
        )
    if as_json:
        print(outcome.to_json())
    else:
        _show(out, outcome)
    if not (no_report or problem):
        path = outcome.report(report)
        out.print(f"report: {path.resolve()}", soft_wrap=True)
    if outcome.failed:
        raise typer.Exit(1)


@app.command("list")
def list_verb(
    family: Annotated[str | None, typer.Option(help="Only this family.")] = None,
    pattern: Annotated[str | None, typer.Option(help="Names with * and ?.")] = None,
    causal: Annotated[bool | None, typer.Option(help="Only those that are.")] = None,
    streaming: Annotated[bool | None, typer.Option(help="Only those that do.")] = None,
    kind: Annotated[
        str | None, typer.Option(help="vector, sequence, image, graph or set.")
    ] = None,
    search: Annotated[
        str | None, typer.Option(help="Words of name, title, summary or paper.")
    ] = None,
    as_json: Json = False,
):
    """List the architectures, by family."""
    _use()
    from keras_edifice import registry

    if kind is not None and kind not in registry.KINDS:
        raise ValueError(
            f"kind must be one of {', '.join(registry.KINDS)}, received {kind!r}"
        )
    facets = {"causal": causal, "streaming": streaming, "kind": kind}
    facets = {name: value for name, value in facets.items() if value is not None}
    names = registry.list_architectures(family, pattern=pattern, **facets)
    if search is not None:
        found = set(registry.search(search))
        names = [name for name in names if name in found]
    entries = [registry.info(name) for name in names]
    if as_json:
        print(json.dumps([_brief(entry) for entry in entries], indent=2))
        return
    if not entries:
        raise ValueError("no architecture is like that")
    table = _table("name", "kind", "causal", "streams", "summary")
    previous = None
    for entry in entries:
        if entry.family != previous:
            table.add_section()
            table.add_row(entry.family, "", "", "", "", style="bold")
            previous = entry.family
        table.add_row(
            f"  {entry.name}",
            entry.kind,
            "yes" if entry.causal else "no",
            "yes" if entry.streaming else "no",
            entry.summary,
        )
    out = _console()
    out.print(table)
    families = len({entry.family for entry in entries})
    out.print(f"{len(entries)} architectures, {families} families")


@app.command()
def info(
    name: Annotated[str, typer.Argument(help="An architecture.")],
    as_json: Json = False,
):
    """Describe an architecture: paper, shapes, options, published sizes."""
    _use()
    from keras_edifice import registry

    entry = registry.info(name)
    if as_json:
        print(json.dumps(_description(entry), indent=2))
        return
    out = _console()
    out.print(
        Panel(
            Group(entry.summary, "", _grid(_facts(entry))),
            title=f"{entry.name}: {entry.title}",
            title_align="left",
            expand=False,
        )
    )
    options = _table("option", "type", "default", "meaning", "allowed")
    for option in entry.options.values():
        default = "required" if option.required else repr(option.default)
        options.add_row(
            option.name, option.type, default, option.meaning, option.allowed
        )
    out.print(options)
    if entry.variants:
        variants = _table("variant", "options")
        for variant, values in entry.variants.items():
            variants.add_row(
                variant, ", ".join(f"{k}={v!r}" for k, v in values.items())
            )
        out.print(variants)


@app.command()
def summary(
    ctx: typer.Context,
    name: Annotated[str, typer.Argument(help="An architecture.")],
    options: Options = None,
    expand: Annotated[
        bool, typer.Option("--expand", help="Show what layers are made of.")
    ] = False,
    backend: Backend = None,
):
    """Build an architecture and print its layers."""
    _use(ctx, backend)
    from keras_edifice.comparison.contenders import parse_options

    model = keras_edifice.build(name, **parse_options(options or []))
    if not sys.stdout.isatty():
        os.environ.setdefault("COLUMNS", "120")  # Keras would cut the table at 80
    model.summary(expand_nested=expand)


@app.command()
def profile(
    ctx: typer.Context,
    model: Annotated[str, typer.Argument(help="An architecture or a FILE.keras.")],
    options: Options = None,
    size: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=N", help="Of an axis that the model leaves open."),
    ] = None,
    backend: Backend = None,
    chart: Annotated[
        Path | None, typer.Option(help="FILE.svg, FILE.png or FILE.html for a chart.")
    ] = None,
    as_json: Json = False,
):
    """Count weights, multiply-accumulates and activations, layer by layer."""
    _use(ctx, backend)
    from keras_edifice.comparison.contenders import parse_options
    from keras_edifice.profiling import build_without_weights

    sizes = parse_options(size or [])
    built = _model(model, options, build_without_weights)
    found = keras_edifice.profile(built, **sizes)
    if as_json:
        print(found.to_json())
    else:
        _show_profile(_console(), found)
    if chart is not None:
        found.chart(chart)
        note = _console(stderr=True)
        note.print(f"chart: {chart.resolve()}", soft_wrap=True)


def _show_profile(out, found):
    from keras_edifice.profiling import FIGURES, cells

    table = _table("layer", "class", "output")
    for name in FIGURES:
        table.add_column(name, justify="right")
    for row in found.rows:
        table.add_row(*cells(row))
    out.print(table)
    out.print(_grid({"model": f"{found.model}, one example", **found.facts()}))


@app.command()
def export(
    ctx: typer.Context,
    model: Annotated[str, typer.Argument(help="An architecture or a FILE.keras.")],
    options: Options = None,
    format: Annotated[str, typer.Option(help="onnx or saved_model.")] = "onnx",
    out: Annotated[
        Path | None, typer.Option(help="Where it goes; default: by the model's name.")
    ] = None,
    backend: Backend = None,
):
    """Export an architecture or a saved model, and check the file that was written."""
    _use(ctx, backend)
    from keras_edifice.exporting import export as write

    if format not in ("onnx", "saved_model"):
        raise ValueError(f"format must be onnx or saved_model, received {format!r}")
    console = _console()
    _announce(console)
    built = _model(model, options, keras_edifice.build)
    stem = Path(model).stem
    path = out or Path(f"{stem}.onnx" if format == "onnx" else f"{stem}_saved_model")
    difference = write(built, str(path), format=format)
    console.print(
        f"{path}: the largest difference from the Keras model is {difference:.1e}",
        soft_wrap=True,
    )


@app.command()
def bench(
    ctx: typer.Context,
    what: Annotated[
        list[str],
        typer.Argument(
            metavar="ops|NAME... [OPTION=VALUE]...",
            help="The operations over time; or architectures and their options.",
        ),
    ],
    operations: Annotated[
        str | None, typer.Option(help="a,b,c instead of all operations.")
    ] = None,
    lengths: Annotated[
        str | None,
        typer.Option(
            help="Steps of the sequences; default: 512,1024,2048,4096 for operations, "
            "256,512,1024 for architectures."
        ),
    ] = None,
    batch: Annotated[int, typer.Option(help="Examples at once.")] = 4,
    width: Annotated[int, typer.Option(help="Features of a step.")] = 256,
    parts: Annotated[
        str | None,
        typer.Option(
            help="Of architectures: forward,training step,streaming step or fewer."
        ),
    ] = None,
    against: Annotated[
        bool,
        typer.Option(
            "--against",
            help="Run independent PyTorch implementations too; for operations at "
            "length 1024.",
        ),
    ] = False,
    seconds: Annotated[
        float | None,
        typer.Option(
            help="Spent on each measurement at least; default: 0.5 for operations, "
            "4 for architectures."
        ),
    ] = None,
    backend: Backend = None,
    chart: Annotated[
        Path | None, typer.Option(help="FILE.svg, FILE.png or FILE.html for a chart.")
    ] = None,
    as_json: Json = False,
):
    """Measure time and memory of operations or of architectures.

    Without --backend every installed backend is measured, each in its own process.
    """
    if backend is not None:
        _use(ctx, backend)
    _use()
    from keras_edifice.benchmark import rows as measured

    progress = _console(stderr=True)

    def tell(line):
        progress.print(line, soft_wrap=True)

    sizes = [_length(text) for text in lengths.split(",")] if lengths else None
    common = dict(peers=against, progress=tell, **({"lengths": sizes} if sizes else {}))
    common |= {} if seconds is None else {"least": seconds}
    if what == ["ops"]:
        measure = _bench_operations(operations, batch, width, common)
    else:
        measure = _bench_architectures(what, parts, batch, width, common)
    if backend is not None:
        rows = measure()
    else:
        arguments = [*what, "--batch", str(batch), "--width", str(width)]
        given = {"--operations": operations, "--lengths": lengths, "--parts": parts}
        for flag, text in given.items():
            arguments += [flag, text] if text else []
        arguments += ["--against"] if against else []
        arguments += [] if seconds is None else ["--seconds", str(seconds)]
        rows = []
        for name in filter(selection.installed, selection.BACKENDS):
            rows += measured.measure_on(name, arguments)
    if as_json:
        print(measured.to_json(rows))
    else:
        _show_rows(_console(), rows)
    if chart is not None:
        from keras_edifice.benchmark.charts import save_chart

        save_chart(rows, chart)
        progress.print(f"chart: {chart.resolve()}", soft_wrap=True)


def _bench_operations(names, batch, width, common):
    from keras_edifice.benchmark import operations

    names = names.split(",") if names else None
    operations.operations(names)
    draw = operations.Draw(batch, width)
    return lambda: operations.measure(names, draw=draw, **common)


def _bench_architectures(what, parts, batch, width, common):
    from keras_edifice.benchmark import architectures
    from keras_edifice.comparison.contenders import parse_options

    names = [word for word in what if "=" not in word]
    options = parse_options([word for word in what if "=" in word])
    for name in names:
        keras_edifice.info(name)
    if parts:
        common["parts"] = parts.split(",")
    return lambda: architectures.measure(
        names, options, batch=batch, width=width, **common
    )


def _length(text):
    if not text.isdigit() or int(text) < 1:
        raise ValueError(f"lengths must be numbers such as 512,1024, received {text!r}")
    return int(text)


def _show_rows(out, rows):
    from keras_edifice.benchmark.rows import growth

    compared = any(row.ratio is not None for row in rows)
    names = ["measured", "implementation", "length", "ms", "range", "MB"]
    table = _table(*names, *(["this package takes"] if compared else []))
    previous = None
    order = sorted(rows, key=lambda row: (row.name, row.part, row.implementation))
    for row in order:
        what = f"{row.name}, {row.part}"
        if what != previous:
            table.add_section()
        same, previous = what == previous, what
        table.add_row(
            "" if same else what,
            row.implementation,
            "" if row.length is None else str(row.length),
            f"{row.milliseconds:.3g}",
            f"{row.fastest:.3g} to {row.slowest:.3g}",
            "" if row.megabytes is None else f"{row.megabytes:.0f}",
            *([row.ratio_text()] if compared else []),
        )
    out.print(table)
    for (name, part, implementation), factors in growth(rows).items():
        text = ", ".join(f"{kind} {factor:.2f}x" for kind, factor in factors.items())
        out.print(
            f"{name}, {part}, {implementation}: twice the length costs at most {text}",
            soft_wrap=True,
        )


@app.command()
def doctor(as_json: Json = False):
    """Say what is installed, and what each missing part costs."""
    unusable = _unusable()
    parts = [
        {"package": package, "version": version(package), "extra": extra, "for": use}
        for package, extra, use in PARTS
    ]
    facts = {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cpus",
        "keras_edifice": keras_edifice.__version__,
        "keras": version("keras"),
        "numpy": version("numpy"),
        "backend": unusable or _backend_line(),
    }
    if unusable is None:
        facts["architectures"] = str(len(keras_edifice.list_architectures()))
    if as_json:
        print(json.dumps({**facts, "parts": parts}, indent=2))
    else:
        _show_doctor(facts, parts)
    if unusable:
        raise typer.Exit(1)


PARTS = [
    ("jax", "jax", "the backend jax"),
    ("torch", "torch", "the backend torch"),
    ("tensorflow", "tensorflow", "the backend tensorflow; SavedModel from any backend"),
    ("typer", "cli", "the command keras-edifice"),
    ("rich", "cli", "the command keras-edifice"),
    ("pandas", "report", "compare --data FILE.csv"),
    ("sklearn", "report", "compare --data digits, wine and breast_cancer"),
    ("altair", "report", "the HTML report of compare"),
    ("vl_convert", "report", "the HTML report of compare"),
    ("onnx", "onnx", "export to ONNX"),
    ("onnxruntime", "onnx", "checking exported ONNX files"),
    ("tf2onnx", "onnx", "export to ONNX on the backend tensorflow"),
    ("jax2onnx", "onnx", "export to ONNX on the backend jax"),
    ("onnxscript", "onnx", "export to ONNX on the backend torch"),
]
"""Optional packages: (import name, the extra that installs it, what it is for)."""


def _show_doctor(facts, parts):
    out = _console()
    out.print(_grid(facts))
    table = _table("package", "version", "for", "to install")
    for part in parts:
        if part["version"]:
            table.add_row(part["package"], part["version"], part["for"], "")
        else:
            command = selection.install_command(part["extra"])
            cost = f"without it, not: {part['for']}"
            table.add_row(part["package"], "missing", cost, command, style="yellow")
    out.print(table)


def _use(ctx=None, backend=None):
    """Makes sure that a backend is there; another one takes a process of its own.

    Raises:
        ValueError: `backend` is none that Keras has.
        ImportError: its package, or that of the chosen one, is not installed.
    """
    if backend is not None and backend not in selection.BACKENDS:
        raise ValueError(
            f"backend must be one of {', '.join(selection.BACKENDS)}, "
            f"received {backend!r}"
        )
    if backend is not None and not selection.installed(backend):
        raise ImportError(
            f"the backend {backend} is not installed; "
            f"run: {selection.install_command(backend)}"
        )
    if backend is not None and backend != _loaded():
        command = [sys.executable, "-m", "keras_edifice", *ctx.meta["arguments"]]
        environment = {**os.environ, "KERAS_BACKEND": backend}
        raise typer.Exit(subprocess.run(command, env=environment).returncode)
    if _unusable():
        raise ImportError(_unusable())


def _unusable():
    return vars(keras_edifice)["_unusable"]


def _loaded():
    """The backend of this process; None if there is none."""
    if _unusable():
        return None
    import keras

    return keras.backend.backend()


def _backend_line():
    if selection.picked is None:
        return _loaded()
    return (
        f"{_loaded()} (KERAS_BACKEND is not set; the first installed of "
        f"{', '.join(selection.BACKENDS)})"
    )


def _announce(out):
    out.print(f"backend: {_backend_line()}", soft_wrap=True)


def _model(name, options, build):
    """The model in a file, or that which `build` makes of an architecture."""
    from keras_edifice.comparison.contenders import parse_options

    given = parse_options(options or [])
    if not name.endswith(".keras"):
        return build(name, **given)
    if given:
        raise ValueError(f"{name} is a saved model, which takes no options")
    return _load(name)


def _load(path):
    import keras

    if not Path(path).is_file():
        raise FileNotFoundError(errno.ENOENT, "no such file", path)
    return keras.saving.load_model(path, compile=False)


def _console(stderr=False):
    """No markup, since option values hold brackets; wide where there is no terminal."""
    console = Console(stderr=stderr, markup=False, highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = WIDE
    return console


def _grid(facts):
    grid = Table.grid(padding=(0, 2))
    for key, value in facts.items():
        grid.add_row(key, value)
    return grid


def _table(*columns):
    table = Table(header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _show(out, outcome):
    """The table; where the screen is narrow, the notes of its rows below it."""
    cells = outcome.cells()
    remarks = [(row[1], row[7]) for row in cells if row[7]]
    inside = bool(remarks) and out.width >= 140
    table = Table(header_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for i, name in enumerate(outcome.HEADER[: 8 if inside else 7]):
        right = i in (0, 3, 4, 5, 6)
        table.add_column(
            name,
            justify="right" if right else "left",
            overflow="fold",
            min_width=max(map(len, name.split())),
            no_wrap=i == 2,
        )
    for row, line in zip(outcome.rows, cells, strict=True):
        table.add_row(*line[: len(table.columns)], style="red" if row.error else None)
    out.print(outcome.headline, soft_wrap=True)
    out.print(table)
    for name, remark in [] if inside else remarks:
        out.print(f"{name}: {remark}", soft_wrap=True)
    for note in outcome.notes:
        out.print(note, soft_wrap=True)


class _Bar:
    """The progress on stderr: a bar in a terminal, else a line for each contender."""

    def __init__(self):
        self.console = _console(stderr=True)
        self.bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("epochs"),
            TimeElapsedColumn(),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )
        self.task = self.bar.add_task("preparing", total=None)

    def __enter__(self):
        self.bar.start()
        return self

    def __exit__(self, *_):
        self.bar.stop()

    def __call__(self, done, total, row, logs):
        from keras_edifice.comparison.contest import progress_line

        text = row.label
        if logs:
            text += f"  loss {logs['loss']:.3f}  accuracy {logs['accuracy']:.3f}"
        else:
            self.console.print(progress_line(row), soft_wrap=True)
        self.bar.update(self.task, completed=done, total=total, description=text)


def _brief(entry):
    names = ("name", "family", "title", "summary", "paper", "kind", "causal")
    return {name: getattr(entry, name) for name in (*names, "streaming")}


def _description(entry):
    options = [
        {
            "name": option.name,
            "type": option.type,
            "required": option.required,
            "default": None if option.required else option.default,
            "meaning": option.meaning,
            "allowed": option.allowed,
        }
        for option in entry.options.values()
    ]
    return {
        **_brief(entry),
        "inputs": dict(entry.inputs),
        "outputs": dict(entry.outputs),
        "multiples": dict(entry.multiples),
        "variants": dict(entry.variants),
        "options": options,
    }


def _facts(entry):
    def shapes(named):
        if len(named) == 1:
            return next(iter(named.values()))
        return ", ".join(f"{name} {shape}" for name, shape in named.items())

    return {
        "family": entry.family,
        "paper": entry.paper,
        "kind": entry.kind,
        "input": shapes(entry.inputs),
        "output": shapes(entry.outputs),
        "causal": "yes" if entry.causal else "no",
        "streams": "yes, token by token" if entry.streaming else "no",
    }
