"""A table that is printed on a terminal, or written as Markdown for the documents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from rich import box
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text


@dataclass
class Table:
    """Rows of text. Columns that begin with '<' are left-aligned, the others right."""

    title: str
    columns: Sequence[str]
    rows: list[Sequence[str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def print(self, console: Console) -> None:
        table = RichTable(title=Text(self.title), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
        for column in self.columns:
            left = column.startswith("<")
            table.add_column(Text(column.removeprefix("<")), justify="left" if left else "right", no_wrap=True)
        for row in self.rows:
            table.add_row(*map(Text, row))
        console.print(table)
        for note in self.notes:
            console.print(Text(note, style="dim"))

    def markdown(self) -> str:
        heads = [column.removeprefix("<") for column in self.columns]
        rules = [":--" if column.startswith("<") else "--:" for column in self.columns]
        lines = [f"**{self.title}**", "", *(f"| {' | '.join(row)} |" for row in (heads, rules, *self.rows))]
        return "\n".join([*lines, "", *(note + "  " for note in self.notes)]).rstrip() + "\n"


def console(stderr: bool = False) -> Console:
    """As wide as the terminal; wide where there is none, so that no table is cut in a log."""
    wide = Console(markup=False, stderr=stderr)
    return wide if wide.is_terminal else Console(width=240, soft_wrap=True, markup=False, stderr=stderr)


def microseconds(nanoseconds: float) -> str:
    """Three significant digits: 0.81, 12.3, 345, 5,640."""
    value = nanoseconds / 1000
    if value < 10:
        return f"{value:.2f}"
    return f"{value:.1f}" if value < 100 else f"{float(f'{value:.3g}'):,.0f}"


def times(value: float) -> str:
    """A ratio: 0.93, 4.1, 12."""
    return f"{value:.2f}" if value < 2 else f"{value:.1f}" if value < 10 else f"{value:.0f}"
