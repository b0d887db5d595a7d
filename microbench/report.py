"""One self-contained HTML page of records: pictures and tables, each figure with its label."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from microbench import stages
from microbench.record import Record
from microbench.table import show
from tpukit import chips

STYLE = """
:root { --ink: #1b1f24; --soft: #5c6670; --line: #d9dee3; --bar: #3b6ea5; --good: #2e7d4f;
        --bad: #b3261e; --ground: #ffffff; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ec; --soft: #9aa4ae; --line: #39414a;
        --bar: #6ea3da; --good: #6cc08b; --bad: #f2847c; --ground: #14181c; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--ground);
       max-width: 1180px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: 0; } h2 { margin-top: 2.5rem; font-size: 1.2rem; }
p.note, footer { color: var(--soft); max-width: 60rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: 13px; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid var(--line); text-align: left;
         white-space: nowrap; }
th { color: var(--soft); font-weight: 600; } td.n { text-align: right;
     font-variant-numeric: tabular-nums; }
.track { display: inline-block; width: 60px; text-align: left; margin-left: .3em; }
.bar { display: inline-block; height: .65em; background: var(--bar); border-radius: 2px; }
.good { color: var(--good); } .bad { color: var(--bad); font-weight: 600; }
img { max-width: 100%; background: #fff; border-radius: 6px; }
code { font-size: 12px; }
"""
UNITS = ("MXU %", "HBM %", "VALU %", "DMA wait %")


def write(records: Sequence[Record], path: Path) -> list[Path]:
    """Writes the page, and its pictures as files beside it.

    Returns:
      what was written, the page first.

    Raises:
      ValueError: there are no records.
    """
    if not records:
        raise ValueError("there are no records to report; run a command with --json first")
    pictures = _pictures(records)
    written = [path]
    for name, png in pictures.items():
        written.append(path.with_name(f"{path.stem}-{name}.png"))
        written[-1].write_bytes(png)
    path.write_text(page(records, pictures))
    return written


def page(records: Sequence[Record], pictures: Mapping[str, bytes]) -> str:
    """The page's HTML."""
    kinds = {kind: [one for one in records if one["kind"] == kind] for kind in _SECTIONS}
    parts = [_head(records)]
    for name, png in pictures.items():
        data = base64.b64encode(png).decode()
        alt = html.escape(name.replace("-", " "))
        parts.append(f'<p><img alt="{alt}" src="data:image/png;base64,{data}"></p>')
    parts.append(_section("Where it runs", _MATRIX_NOTE, matrix(records)))
    for kind, (title, note, rows) in _SECTIONS.items():
        if kinds[kind]:
            parts.append(_section(title, note, rows(kinds[kind])))
    parts.append(_commands(records))
    body = "\n".join(parts)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>microbench report</title><style>{STYLE}</style></head><body>{body}</body></html>\n"
    )


def _head(records: Sequence[Record]) -> str:
    versions = records[-1]["versions"]
    facts = [f"{name} {versions.get(name, '-')}" for name in ("jax", "libtpu", "python")]
    commits = ", ".join(sorted({one["commit"] for one in records}))
    labels = ", ".join(sorted({one["label"] for one in records}))
    return (
        "<h1>microbench report</h1>"
        f'<p class="note">{html.escape(" · ".join(facts))} · commit {html.escape(commits)} · '
        f"{len(records)} records up to {html.escape(records[-1]['time'])}. Figures here are: "
        f"{html.escape(labels)}. Predicted is replayed from the compiler's final schedule, static "
        "is counted in it; neither was measured on a chip.</p>"
    )


def _section(title: str, note: str, rows: Sequence[Mapping[str, Any]]) -> str:
    columns = list(dict.fromkeys(column for row in rows for column in row))
    numeric = {c: all(isinstance(row.get(c), int | float | None) for row in rows) for c in columns}
    head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
    lines = []
    for row in rows:
        cells = (_cell(column, row.get(column), numeric[column]) for column in columns)
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return (
        f'<h2>{html.escape(title)}</h2><p class="note">{html.escape(note)}</p>'
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _cell(column: str, value: Any, numeric: bool) -> str:
    text = html.escape(show(value))
    if isinstance(value, bool):
        return f'<td class="{"good" if value else "bad"}">{text}</td>'
    if column in UNITS and isinstance(value, int | float):
        width = max(0.0, min(100.0, float(value))) * 0.6
        bar = f'<span class="bar" style="width:{width:.0f}px"></span>'
        return f'<td class="n">{text}<span class="track">{bar}</span></td>'
    return f'<td class="n">{text}</td>' if numeric else f"<td>{text}</td>"


def _plain(records: Iterable[Record]) -> list[dict[str, Any]]:
    """A row per record: where, and its single values."""
    return [
        {"kernel": one["kernel"], "case": one["case"], **_chip(one), **stages.single(one["values"])}
        for one in records
    ]


def _chip(one: Record) -> dict[str, str]:
    return {"chip": one["chip"]} if one.get("chip") else {}


def _chosen(*columns: str) -> Any:
    """Rows with these columns only, besides kernel, case and chip."""
    kept = ("kernel", "case", "chip", *columns)
    return lambda records: [{c: row[c] for c in kept if c in row} for row in _plain(records)]


def matrix(records: Iterable[Record]) -> list[dict[str, Any]]:
    """A row per case, a column per chip: the furthest that the case got there."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for one in records:
        if one["kind"] not in ("check", "aot", "predict"):
            continue
        row = found.setdefault((one["kernel"], one["case"]), {"runs here": None})
        values = one["values"]
        if one["kind"] == "check":
            row["runs here"] = values.get("ok", False) and row["runs here"] is not False
        elif values.get("predicted us") is not None:
            row[one["chip"]] = f"predicted {show(float(values['predicted us']))} us"
        elif one["kind"] == "aot":
            earlier = row.get(one["chip"], "not predicted")
            known = "compiles" if earlier == "not predicted" else earlier
            row[one["chip"]] = known if values["compiles"] else "refused"
        else:
            row.setdefault(one["chip"], "not predicted")
    return [{"kernel": kernel, "case": case, **row} for (kernel, case), row in found.items()]


def _commands(records: Sequence[Record]) -> str:
    commands = dict.fromkeys(one["command"] for one in records)
    items = "".join(f"<li><code>{html.escape(command)}</code></li>" for command in commands)
    return f"<h2>Commands</h2><details><summary>one per row</summary><ul>{items}</ul></details>"


_MATRIX_NOTE = (
    "runs here: the kernel itself, interpreted strictly where there is no TPU, agrees with its "
    "specification. Per chip: compiled by the real compiler, and its time predicted."
)
_SECTIONS: dict[str, tuple[str, str, Any]] = {
    "predict": (
        "Where the time goes",
        "Predicted. Floor: the schedule's own bytes and products at data-sheet peaks.",
        _chosen("predicted us", "floor us", "of floor %", "bound by", *UNITS, "HBM MB", "error"),
    ),
    "compare": (
        "Beside what one would use instead",
        "Predicted, the same chip, compiler and inputs; whole calls.",
        _chosen("who", "predicted us", "times as slow", "note"),
    ),
    "tune": (
        "What tuning gained over the cost model",
        "A change has to pay more than the predictor's error.",
        _plain,
    ),
    "check": (
        "Numerics",
        "Against the specification or a float64 oracle; at reduced size where interpreted.",
        _chosen("check", "error", "limit", "ok"),
    ),
    "time": ("Times on this machine", "Measured; by which clock, says what.", _plain),
    "aot": (
        "What the compiler made",
        "Static: counted in the final schedule.",
        _chosen("compiles", "compile s", "bundles", "VMEM MiB", "code KiB", "spills", "fills"),
    ),
}


def _pictures(records: Sequence[Record]) -> dict[str, bytes]:
    """PNGs by name: a roofline per chip, and bars against peers."""
    found = {}
    predicted = [
        one for one in records if one["kind"] == "predict" and one["values"].get("predicted us")
    ]
    for chip in dict.fromkeys(one["chip"] for one in predicted):
        found[f"roofline-{chip}"] = _roofline(chip, [x for x in predicted if x["chip"] == chip])
    rivals = [x for x in records if x["kind"] == "compare" and x["values"].get("times as slow")]
    if rivals:
        found["peers"] = _bars(rivals)
    return found


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure  # noqa: PLC0415  (only where pictures are made)

    return Figure(figsize=(width, height), dpi=120, layout="constrained")


def _png(figure: Any) -> bytes:
    data = io.BytesIO()
    figure.savefig(data, format="png")
    return data.getvalue()


def _roofline(name: str, records: Sequence[Record]) -> bytes:
    chip = chips.chip(name)
    figure = _figure(9.6, 5.2)
    axes = figure.subplots()
    ridge = chip.bf16_tflops * 1e3 / chip.hbm_gb_per_s
    points = []
    for one in records:
        seconds = one["values"]["predicted us"] * 1e-6
        flops, size = one["cost"]["flops"], one["cost"]["hbm_bytes"]
        if flops:
            points.append((one["kernel"], one["case"], flops / size, flops / seconds / 1e12))
    low = min([ridge / 8, *(x for _, _, x, _ in points)]) / 2
    high = max([ridge * 8, *(x for _, _, x, _ in points)]) * 2
    roof = [min(x * chip.hbm_gb_per_s / 1e3, chip.bf16_tflops) for x in (low, ridge, high)]
    axes.loglog([low, ridge, high], roof, color="#5c6670", lw=1.5)
    for kernel in dict.fromkeys(point[0] for point in points):
        mine = [point for point in points if point[0] == kernel]
        axes.loglog([x for *_, x, _ in mine], [y for *_, y in mine], "o", ms=6, label=kernel)
        for _, case, x, y in mine:
            axes.annotate(case, (x, y), (5, -3), textcoords="offset points", fontsize=7)
    axes.set_title(f"{name}: predicted, against data-sheet peaks", loc="left", fontsize=11)
    axes.set_xlabel("operations per byte that must move")
    axes.set_ylabel("Top/s of operations that must be done")
    axes.grid(True, which="major", color="#e3e7eb", lw=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    if points:
        axes.legend(frameon=False, fontsize=8, loc="lower right")
    return _png(figure)


def _bars(records: Sequence[Record]) -> bytes:
    figure = _figure(9.6, 0.9 + 0.32 * len(records))
    axes = figure.subplots()
    names = [f"{x['kernel']} {x['case']}, {x['chip']}: {x['values']['who']}" for x in records]
    ratios = [x["values"]["times as slow"] for x in records]
    colours = ["#3b6ea5" if ratio >= 1 else "#b3261e" for ratio in ratios]
    bars = axes.barh(names, ratios, color=colours, height=0.6)
    axes.bar_label(bars, [f" {ratio:.2f}x" for ratio in ratios], fontsize=8)
    axes.axvline(1.0, color="#1b1f24", lw=1)
    axes.set_xscale("log")
    axes.invert_yaxis()
    axes.tick_params(labelsize=8)
    axes.set_title("Predicted time as a multiple of this kernel's", loc="left", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    return _png(figure)
