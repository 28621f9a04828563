"""Writes the parts of the documentation that follow from the code.

    python guides/generate.py            # writes
    python guides/generate.py --check    # fails if something is out of date

`guides/architectures.md` and the families in README.md come from the registry, the
table in `guides/building_blocks.md` from the blocks, those in `guides/performance.md`
from the measurements beside it, that in `guides/profiling.md` by counting, and
`guides/fidelity.md` from build/fidelity, where there are such measurements.
"""

import argparse
import functools
import inspect
import json
import re
import sys
from pathlib import Path

import keras_edifice
from keras_edifice.benchmark.rows import Row, growth
from keras_edifice.profiling import build_without_weights

ROOT = Path(__file__).parent.parent


def between(text, mark, new):
    """The text with what stands between the comments `mark` replaced."""
    pattern = rf"(<!-- {mark} -->\n).*?(<!-- end of {mark} -->)"
    return re.sub(pattern, lambda m: m[1] + new + m[2], text, flags=re.DOTALL)


def family_title(family):
    """First line of the docstring of the family's folder."""
    entry = keras_edifice.info(keras_edifice.list_architectures(family)[0])
    package = sys.modules[entry.builder.__module__.rpartition(".")[0]]
    return package.__doc__.split("\n")[0].rstrip(".")


def families():
    """The families with their architectures, for the README."""
    lines = []
    for family in keras_edifice.list_families():
        lines.append(f"- **{family_title(family)}**:")
        for name in keras_edifice.list_architectures(family):
            link = f"guides/architectures.md#{name}"
            title = keras_edifice.info(name).title
            lines.append(f"  [`{name}`]({link}) ({title}),")
        lines[-1] = lines[-1].rstrip(",") + "."
    return "\n".join(lines) + "\n"


def cell(text):
    """Text that cannot end a cell of a Markdown table."""
    return text.replace("|", "\\|")


def page(entry):
    """One architecture: paper, shapes, facets and every option."""
    inputs = ", ".join(f"`{k}` `{v}`" for k, v in entry.inputs.items())
    outputs = ", ".join(f"`{k}` `{v}`" for k, v in entry.outputs.items())
    lines = [
        f"### {entry.name}",
        "",
        f"**{entry.title}.** {entry.summary}",
        "",
        f"- Paper: {entry.paper}",
        f"- Input: {inputs}",
        f"- Output: {outputs}",
        f"- Causal: {'yes' if entry.causal else 'no'}; "
        f"streams: {'yes' if entry.streaming else 'no'}",
    ]
    if entry.variants:
        lines.append(f"- Variants: {', '.join(f'`{v}`' for v in entry.variants)}")
    lines += ["", "| option | type | default | meaning |", "|---|---|---|---|"]
    for option in entry.options.values():
        default = "required" if option.required else f"`{option.default!r}`"
        allowed = f" ({option.allowed})" if option.allowed else ""
        meaning = cell(option.meaning + allowed)
        lines.append(f"| `{option.name}` | {option.type} | {default} | {meaning} |")
    return "\n".join(lines) + "\n"


def architectures():
    """The page of all architectures, by family."""
    parts = [
        "# Architectures\n",
        "Made by `python guides/generate.py` from the code. In shapes, `a | b` is a, "
        "or b where a is None.\n",
    ]
    for family in keras_edifice.list_families():
        parts.append(f"## {family_title(family)}\n")
        names = keras_edifice.list_architectures(family)
        parts += [page(keras_edifice.info(name)) for name in names]
    return "\n".join(parts)


def fidelity(folder):
    """The table of measured differences from the independent implementations."""
    rows = [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]
    lines = [
        "# Fidelity",
        "",
        "Each architecture beside an independent implementation, with the same random "
        "weights and inputs, in float32. The figures are the largest differences of "
        "the outputs and of the gradients in weights and inputs, relative to the "
        "largest value; the limit is 1e-4. Measured by `tox -e fidelity`, written by "
        "`python guides/generate.py`.",
        "",
        "| architecture | reference | forward | gradient |",
        "|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| `{row['architecture']}` | {cell(row['reference'])} "
            f"| {row['forward']:.1e} | {row['gradient']:.1e} |"
        )
    return "\n".join(lines) + "\n"


def blocks():
    """The layers of the folder blocks, and what each does to its input."""
    lines = ["| layer | what it does |", "|---|---|"]
    for name in sorted(keras_edifice.layers.__all__):
        layer = getattr(keras_edifice.layers, name)
        if layer.__module__.startswith("keras_edifice.blocks."):
            lines.append(
                f"| `{name}` | {cell(inspect.getdoc(layer).splitlines()[0])} |"
            )
    return "\n".join(lines) + "\n"


def operations(rows, shown=("time", "memory")):
    """The measured operations: time, memory or both by length, and their growth."""
    rows = [Row(**row) for row in rows]
    lengths = sorted({row.length for row in rows})
    names = {"time": "{}", "memory": "MB" if "time" in shown else "{}"}
    head = [names[kind].format(n) for n in lengths for kind in shown]
    head = ["operation", "implementation", *head, *(f"{kind} x" for kind in shown)]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    order = list(dict.fromkeys(row.name for row in rows))
    keys = dict.fromkeys((r.name, r.part, r.implementation) for r in rows)
    factors = growth(rows)
    for key in sorted(keys, key=lambda key: order.index(key[0])):
        own = {r.length: r for r in rows if (r.name, r.part, r.implementation) == key}
        cells = []
        for row in map(own.get, lengths):
            values = {"time": row and row.milliseconds, "memory": row and row.megabytes}
            cells += [_digits(values[kind]) for kind in shown]
        for kind in shown:
            factor = factors.get(key, {}).get(kind)
            cells.append("" if factor is None else f"{factor:.2f}")
        lines.append("| " + " | ".join([key[0], key[2], *cells]) + " |")
    return "\n".join(lines) + "\n"


def profiles(rows):
    """Published multiply-accumulates beside those that `profile` counts."""
    lines = [
        "| architecture | options | published | counted | parameters | source |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        model = build_without_weights(row["architecture"], **row["options"])
        found = keras_edifice.profile(model)
        options = ", ".join(f"`{k}={v}`" for k, v in row["options"].items())
        counted = f"{found.multiply_accumulates / 1e6:.1f} M"
        if row["published"].endswith("G"):
            counted = f"{found.multiply_accumulates / 1e9:.3f} G"
        lines.append(
            f"| `{row['architecture']}` | {options} | {row['published']} | {counted} "
            f"| {found.trainable_parameters:,} | {row['source']} |"
        )
    return "\n".join(lines) + "\n"


def compared(rows):
    """Architectures beside independent implementations: one row for each part."""
    rows = [Row(**row) for row in rows]
    lines = [
        "| architecture | part | implementation | ms | MB | this package takes |",
        "|---|---|---|---|---|---|",
    ]
    order = list(dict.fromkeys(row.name for row in rows))
    parts = list(dict.fromkeys(row.part for row in rows))
    for row in sorted(
        rows, key=lambda row: (order.index(row.name), parts.index(row.part))
    ):
        cells = [row.name, row.part, row.implementation, _digits(row.milliseconds)]
        cells += [_digits(row.megabytes), row.ratio_text()]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def per_token(rows):
    """Microseconds of a token by length, and those of the longest by the shortest."""
    rows = [Row(**row) for row in rows]
    lengths = sorted({row.length for row in rows})
    head = "".join(f" {n} |" for n in lengths) + f" {lengths[-1]} / {lengths[0]} |"
    lines = [
        f"| architecture | part | implementation |{head}",
        "|---|---|---|" + "---|" * (len(lengths) + 1),
    ]
    for key in dict.fromkeys((r.name, r.part, r.implementation) for r in rows):
        own = {r.length: r for r in rows if (r.name, r.part, r.implementation) == key}
        tokens = [1 if key[1] == "streaming step" else n for n in lengths]
        times = [
            1000.0 * own[n].fastest / m for n, m in zip(lengths, tokens, strict=True)
        ]
        cells = [*key, *map(_digits, times), f"{times[-1] / times[0]:.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _digits(x):
    """At least three digits; nothing for None."""
    if x is None:
        return ""
    return f"{x:.0f}" if x >= 100.0 else f"{x:.3g}"


def documents():
    """Path -> its text as it should be. The fidelity page only where measured."""
    guides = ROOT / "guides"
    found = {guides / "architectures.md": architectures()}
    parts = [
        (ROOT / "README.md", "families", families()),
        (guides / "building_blocks.md", "blocks", blocks()),
    ]
    published = json.loads((guides / "profiles.json").read_text())
    parts.append((guides / "profiling.md", "profiles", profiles(published)))
    for mark, file, table in (
        ("operations", "performance.json", operations),
        ("growth", "growth.json", functools.partial(operations, shown=("time",))),
        ("memory", "memory.json", functools.partial(operations, shown=("memory",))),
        ("architectures", "architectures.json", compared),
        ("images", "images.json", compared),
        ("tokens", "tokens.json", per_token),
    ):
        measured = json.loads((guides / file).read_text())
        parts.append((guides / "performance.md", mark, table(measured)))
    for path, mark, new in parts:
        found[path] = between(found.get(path) or path.read_text(), mark, new)
    measured = ROOT / "build" / "fidelity"
    if all(
        (measured / f"{n}.json").exists() for n in keras_edifice.list_architectures()
    ):
        found[ROOT / "guides" / "fidelity.md"] = fidelity(measured)
    return found


def main():
    """Writes what is out of date, or with --check names it and fails."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--check", action="store_true", help="only say what would change"
    )
    arguments = parser.parse_args()
    found = documents()
    if arguments.check:  # measured differences vary in their last digits
        found = {p: t for p, t in found.items() if p.name != "fidelity.md"}
    stale = [p for p, t in found.items() if not p.exists() or p.read_text() != t]
    for path in stale:
        if not arguments.check:
            path.write_text(found[path])
        print(f"{'out of date' if arguments.check else 'wrote'}: {path.name}")
    return 1 if stale and arguments.check else 0


if __name__ == "__main__":
    sys.exit(main())
