"""Rows of a stage: Markdown tables on the screen and in a file, JSON lines for programs. Imports no library."""

import datetime
import json
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

CONDITIONS = "conditions"  # the table of one row that says what a stage ran on


class Report:
    """The rows of one stage. Each is written and printed at once, so that a stage that is stopped keeps them.

    path: file of JSON lines to append to; None only prints.
    """

    def __init__(self, path: Path | None = None):
        self.rows: list[dict[str, Any]] = []
        self._path = path

    def add(self, table: str, **cells) -> None:
        """Add a row to a table. A list of numbers holds all rounds of a measurement."""
        begins = [] if self.rows and _head(self.rows[-1]) == (table, *cells) else ["", *_title(table, cells)]
        self.rows.append({"table": table, **cells})
        if self._path is not None:  # first: to print can fail or wait
            with open(self._path, "a") as file:
                file.write(json.dumps(self.rows[-1]) + "\n")
        line = _line(table, cells)
        print("\n".join([*begins, line] if table != CONDITIONS else [line]), flush=True)


def read_rows(path: Path, first: int = 0) -> list[dict]:
    """Return the rows that Reports wrote to a file, none if it does not exist.

    Args:
      first: byte of the file that they begin at.
    """
    return [json.loads(line) for line in path.read_bytes()[first:].splitlines()] if path.exists() else []


def to_markdown(rows: Iterable[dict]) -> str:
    """Return rows as Markdown tables, each below its title and the conditions of its stage as a sentence."""
    lines, last = [], None
    for row in rows:
        table, *names = head = _head(row)
        cells = {name: row[name] for name in names}
        if table == CONDITIONS:
            lines += ["", _line(table, cells)]
        else:
            lines += [*([] if head == last else ["", *_title(table, cells)]), _line(table, cells)]
        last = head
    return "\n".join(lines)


def append_section(path: Path, name: str, conditions: str, rows: Iterable[dict]) -> None:
    """Append a benchmark's tables to a Markdown file, below a heading with the date and its name."""
    with open(path, "a") as file:
        file.write(f"\n## {datetime.date.today()}: benchmarks/{name}\n\n{conditions}\n{to_markdown(rows)}\n")


def median(times: list[float]) -> float:
    return statistics.median(times)


def _head(row: dict) -> tuple:
    return tuple(row[name] if name == "table" else name for name in row)


def _title(table: str, cells: dict) -> list[str]:
    return [f"**{table}**", "", f"| {' | '.join(cells)} |", f"| {' | '.join('---' for _ in cells)} |"]


def _line(table: str, cells: dict) -> str:
    if table == CONDITIONS:
        return ", ".join(f"{name} {value}" for name, value in cells.items() if value) + "."
    return f"| {' | '.join(map(_show, cells.values()))} |"


def _show(value) -> str:
    if isinstance(value, bool):
        return "yes" if value else "**no**"
    if value is None:
        return ""
    if isinstance(value, list):  # rounds
        return f"{_show(median(value))} ({_show(min(value))}..{_show(max(value))})"
    if isinstance(value, float):
        size = abs(value)
        return f"{value:.0f}" if size >= 1000 else f"{value:.1e}" if 0 < size < 1e-3 else f"{value:.3g}"
    return str(value)
