"""Components in words: the cells of a table of those that score highest."""

from collections.abc import Iterable
from typing import Any

from rich.table import Column, Table

from . import NEGLIGIBLE_WEIGHT

COMPONENT_COLUMNS = ("rank", "component", "score", "std. error", "variance", "weight", "")


def component_table(components: list[dict[str, Any]], title: str | None = None) -> Table:
    """A table of what `SOAPStatistics.table` gives."""
    return table_of(title, COMPONENT_COLUMNS, component_rows(components))


def component_rows(components: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """The cells of a table of components, in `COMPONENT_COLUMNS`; the last one says which are removed."""
    rows: list[tuple[str, ...]] = []
    for row in components:
        removed = "removed" if row["weight"] > NEGLIGIBLE_WEIGHT else ""
        rows.append((str(row["rank"]), str(row["component"]), *measured(row), f"{row['weight']:.4f}", removed))
    return rows


def measured(row: dict[str, Any]) -> tuple[str, str, str]:
    """Score, standard error and share of the variance of one component."""
    return f"{row['score']:.4f}", f"{row['standard_error']:.4f}", f"{row['variance_share']:.2%}"


def table_of(title: str | None, columns: Iterable[str], rows: Iterable[tuple[Any, ...]]) -> Table:
    """A table whose cells stand to the right."""
    table = Table(*(Column(name, justify="right") for name in columns), title=title)
    for row in rows:
        table.add_row(*map(str, row))
    return table
