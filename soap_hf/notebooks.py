"""What a notebook shows of an object: its tables as tables, its sentences as sentences, everything escaped."""

from collections.abc import Iterable
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table


def html_of(*parts: "str | Table") -> str:
    """Sentences and tables of rich as HTML, one below the other.

    Example:
        >>> from rich.table import Table
        >>> table = Table("mu", "right", title="matching")
        >>> table.add_row("6", "0.33")
        >>> print(html_of("On 64 photographs:", table))
        <p>On 64 photographs:</p>
        <table><caption>matching</caption><thead><tr><th>mu</th><th>right</th></tr></thead><tbody><tr><td>6</td><td>0.33</td></tr></tbody></table>
    """
    made = []
    for part in parts:
        if isinstance(part, str):
            made.append(f"<p>{escape(printable(part))}</p>")
        else:
            columns = [str(column.header) for column in part.columns]
            rows = zip(*(map(str, column.cells) for column in part.columns), strict=True)
            made.append(html_table(str(part.title or ""), columns, rows))
    return "\n".join(made)


def html_table(caption: str, columns: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table as HTML."""
    title = f"<caption>{escape(printable(caption))}</caption>" if caption else ""
    body = "".join(_cells(row, "td") for row in rows)
    return f"<table>{title}<thead>{_cells(columns, 'th')}</thead><tbody>{body}</tbody></table>"


def printable(text: str) -> str:
    """A text without control characters, which a foreign head could send."""
    return "".join(filter(str.isprintable, text))


def _cells(cells: Iterable[str], tag: str) -> str:
    return f"<tr>{''.join(f'<{tag}>{escape(printable(cell))}</{tag}>' for cell in cells)}</tr>"
