"""What the commands print: errors as sentences, tables for terminals and for pipes."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from orchestrator.errors import OrchestratorError
from orchestrator.wording import duration, plural

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence

__all__ = ["duration", "plural", "print_table", "printable", "reported_errors"]

# Beyond this many characters a table is hard to read; the files hold every value whole.
CELL_LIMIT = 60
# Sentences (errors) and lists of metrics get more room.
WIDE_LIMIT = 160


@contextmanager
def reported_errors() -> Iterator[None]:
    """Print an OrchestratorError as one sentence (exit code 1), not as a traceback."""
    for stream in (sys.stdout, sys.stderr):
        # A terminal of another encoding gets escapes where it lacks a letter, not a crash.
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")
    try:
        yield
    except OrchestratorError as error:
        raise click.ClickException(printable(str(error), limit=None)) from error


def print_table(
    headers: Sequence[str],
    rows: Sequence[Sequence[str]],
    right: Collection[int] = (),
    wide: Collection[int] = (),
) -> None:
    """A rich table on a terminal, aligned text elsewhere.

    Args:
        headers: one per column.
        rows: cells as text; control characters are escaped and long ones cut.
        right: the columns that are aligned to the right.
        wide: the columns whose cells are cut later.
    """
    cells = [
        [
            printable(cell, WIDE_LIMIT if index in wide else CELL_LIMIT)
            for index, cell in enumerate(row)
        ]
        for row in (headers, *rows)
    ]
    if sys.stdout.isatty():
        _print_rich(cells, right)
    else:
        _print_plain(cells, right)


def _print_plain(cells: Sequence[Sequence[str]], right: Collection[int]) -> None:
    widths = [max(len(cell) for cell in column) for column in zip(*cells, strict=True)]
    for row in cells:
        line = "  ".join(
            cell.rjust(width) if index in right else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        click.echo(line.rstrip())


def _print_rich(cells: Sequence[Sequence[str]], right: Collection[int]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    headers, *rows = cells
    table = Table(box=box.SIMPLE_HEAD)
    for index, header in enumerate(headers):
        table.add_column(Text(header), justify="right" if index in right else "left")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    Console().print(table)


def printable(text: str, limit: int | None = CELL_LIMIT) -> str:
    """Text without control characters (a name must not steer the terminal), cut at ``limit``."""
    if not text.isprintable():
        text = "".join(
            char
            if char.isprintable()
            else char.encode("unicode_escape", "backslashreplace").decode("ascii")
            for char in text
        )
    return text if limit is None or len(text) <= limit else f"{text[: limit - 3]}..."
