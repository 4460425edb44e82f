"""The table that ends a run, from the content of summary.json, and tables of plain text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.table import Table

from align.protocols.trainer import CI95


def _metric(name: str, form: str) -> Callable[[Mapping[str, Any]], str | None]:
    def cell(entry: Mapping[str, Any]) -> str | None:
        value = entry.get("metrics", {}).get(name)
        return None if value is None else format(value, form)

    return cell


def _field(name: str, form: str) -> Callable[[Mapping[str, Any]], str | None]:
    def cell(entry: Mapping[str, Any]) -> str | None:
        return format(entry[name], form) if entry.get(name) else None

    return cell


def _idle(entry: Mapping[str, Any]) -> str | None:
    """Steps that trained nothing."""
    return f"{sum(entry['idle'].values()):,d}" if entry.get("idle") else None


COLUMNS: dict[str, Callable[[Mapping[str, Any]], str | None]] = {
    "steps": _field("steps", ",d"),
    "without training": _idle,
    "seconds": _field("seconds", ",.0f"),
    "tokens/s": _field("tokens_per_second", ",.0f"),
    "loss": _metric("loss/total", ".3f"),
}


EXAM_COLUMNS = {"length": ("mean_length", ".1f"), "loss": ("eval/loss", ".4f")}


def stage_table(summary: Mapping[str, Any]) -> Table:
    """One row a stage; a column that no stage fills is left out."""
    stages: Mapping[str, Mapping[str, Any]] = summary["stages"]
    cells = {title: [cell(entry) for entry in stages.values()] for title, cell in COLUMNS.items()}
    shown = {title: column for title, column in cells.items() if any(value is not None for value in column)}
    table = Table()
    table.add_column("stage", no_wrap=True)
    for title in shown:
        table.add_column(title, justify="right", no_wrap=True)
    for row, stage in enumerate(stages):
        table.add_row(stage, *(column[row] or "" for column in shown.values()))
    return table


def exam_tables(summary: Mapping[str, Any]) -> list[Table]:
    """One for each evaluate stage: a row for each of what it judged, what is known with its 95 % interval first."""
    return [_exam(name, entry) for name, entry in summary["stages"].items() if entry.get("of")]


def _exam(name: str, entry: Mapping[str, Any]) -> Table:
    judged: Sequence[str] = entry["of"]
    metrics: Mapping[str, float] = entry.get("metrics", {})
    found = {
        of: {key[len(of) + 1 :]: value for key, value in metrics.items() if key.startswith(f"{of}/")} for of in judged
    }
    sure = [key.removesuffix(CI95) for of in judged for key in found[of] if key.endswith(CI95)]
    table = Table()
    table.add_column(name, no_wrap=True)
    cells: dict[str, list[str]] = {
        title: [f"{found[of][title]:.3f}±{found[of][title + CI95]:.2f}" if title in found[of] else "" for of in judged]
        for title in dict.fromkeys(sure)
    }
    for title, (key, form) in EXAM_COLUMNS.items():
        if any(key in found[of] for of in judged):
            cells[title] = [format(found[of][key], form) if key in found[of] else "" for of in judged]
    for title in cells:
        table.add_column(title.removeprefix("eval/"), justify="right", overflow="fold")
    for row, of in enumerate(judged):
        table.add_row(of, *(column[row] for column in cells.values()))
    return table


def artefact_lines(summary: Mapping[str, Any]) -> list[str]:
    """`<stage>: <name> in <path>` for everything a user may want to load."""
    lines = []
    for stage, entry in summary["stages"].items():
        for name, path in entry.get("artefacts", {}).items():
            lines.append(f"{stage}: {name} in {path}")
    return lines


def forward_lines(summary: Mapping[str, Any]) -> list[str]:
    """`layout shared (sdpa): sft, dpo`, and `<stage>: slower ...` for each stage that was computed slower than it could
    be, and why. Lines, as the table has no room for another column in 80 characters."""
    stages: dict[str, list[str]] = {}
    slower = []
    for stage, entry in summary["stages"].items():
        forward = entry.get("forward") or {}
        if forward:
            stages.setdefault(f"{forward['layout']} ({forward['attention']})", []).append(stage)
        if forward.get("slower"):
            slower.append(f"{stage}: slower than it could be: {forward['words']}; {'; '.join(forward['slower'])}")
    return [f"layout {layout}: {', '.join(names)}" for layout, names in stages.items()] + slower


def text_table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of left-aligned columns."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
