"""Views and heads as HTML: everything that comes from a file or a head is escaped, pictures are inside the text."""

from base64 import b64encode
from html import escape
from io import BytesIO

from PIL import Image

from ..heads.config import SOAPConfig
from ..heads.report import summary
from ..notebooks import html_table, printable
from ..statistics.components import COMPONENT_COLUMNS, component_rows
from .session import Moment, Session
from .views import Panel, View

HOW = (
    "Click a patch of a picture, or move with the arrow keys on the first one of a row. Raw tokens are the backbone’s "
    "own; clean ones are without the directions that say where a patch is."
)

QUALITY = 90
"""Of JPEG files, which are several times smaller than PNG files and faster to make."""


def view_html(view: View, moment: Moment) -> str:
    """Pictures that can be clicked, a scale, and sentences."""
    parts = [_scale(view)] if view.scale else []
    for row in view.rows:
        figures = "".join(_figure(panel, moment, first=not number) for number, panel in enumerate(row))
        parts.append(f'<div class="soap-row of-{len(row)}" style="--count:{len(row)}">{figures}</div>')
    return "".join([*parts, *(f'<p class="soap-text">{escape(line)}</p>' for line in view.sentences)])


def notes_html(session: Session) -> str:
    """What the images are, and what was made of them."""
    photos = [kept.photo for kept in session.images if kept is not None]
    lines = [f"{photo.name}: {', '.join(photo.notes)}." for photo in photos if photo.notes]
    return "".join(f'<p class="soap-note">{escape(line)}</p>' for line in lines)


def message_html(message: str) -> str:
    """A sentence that a screen reader reads out."""
    return f'<p class="soap-message" role="alert">{escape(message)}</p>' if message else ""


def title_html(name: str) -> str:
    """The head of the page."""
    return f'<div class="soap-head"><h1>{escape(printable(name))}</h1><p class="soap-text">{HOW}</p></div>'


def head_html(config: SOAPConfig, layer: int) -> str:
    """The table of components of a layer, what matching says of the head, and where it came from."""
    parts = []
    if config.components:
        rows = component_rows(config.components[config.layers.index(layer)])
        parts = [f'<div class="soap-table">{html_table("Components by score", COMPONENT_COLUMNS, rows)}</div>']
    return "".join([*parts, *(f'<p class="soap-text">{escape(printable(line))}</p>' for line in summary(config))])


def _figure(panel: Panel, moment: Moment, *, first: bool) -> str:
    place = ""
    if panel.image is not None and panel.grid is not None:
        rows, columns = panel.grid
        row, column = moment.patch if panel.image == moment.query_image else (rows // 2, columns // 2)
        place = (
            f' data-image="{panel.image}" data-rows="{rows}" data-columns="{columns}" data-row="{row}" '
            f'data-column="{column}"{" tabindex=0" if first else ""}'
        )
    image = f'<img src="{_data(panel.picture)}" alt="{escape(panel.description)}"{_size(panel.picture)}{place}>'
    return f"<figure>{image}<figcaption>{escape(panel.caption)}</figcaption></figure>"


def _scale(view: View) -> str:
    scale = view.scale
    assert scale is not None
    bar = f'<img src="{_data(scale.bar)}" alt="from dark to light"{_size(scale.bar)}>'
    meaning = f"<span>{escape(scale.meaning)}</span>"
    return f'<p class="soap-scale"><span>{escape(scale.low)}</span>{bar}<span>{escape(scale.high)}</span>{meaning}</p>'


def _size(picture: Image.Image) -> str:
    return f' width="{picture.width}" height="{picture.height}"'


def _data(picture: Image.Image) -> str:
    buffer = BytesIO()
    picture.save(buffer, format="JPEG", quality=QUALITY, subsampling=0)
    return f"data:image/jpeg;base64,{b64encode(buffer.getvalue()).decode()}"
