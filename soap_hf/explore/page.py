"""The page of `soap-hf explore`: what may be chosen, and what is shown then. All else is below, without gradio."""

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from html import escape
from pathlib import Path
from typing import Any

from transformers.utils import logging

from ..figures.records import is_removed
from ..runtime.errors import DataError, HeadError, MissingExtraError, SOAPError, first_sentence
from .explorer import METHODS, Choice, Explorer
from .html import head_html, message_html, notes_html, title_html, view_html
from .photos import Photo, read_photo
from .session import ORDINALS, Moment, Session
from .views import View, colour_view, object_view, response_view, similarity_view

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # which gradio reads at its import, too
try:
    import gradio as gr
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] != "gradio":
        raise
    raise MissingExtraError('The explorer needs gradio; run pip install "soap-hf[explore]".') from error

logger = logging.get_logger(__name__)

HERE = Path(__file__).parent
PHOTOGRAPHS = sorted((HERE / "photographs").glob("*.jpg"), key=lambda path: path.stem not in ("cup", "saucer"))
"""Examples that come with the package."""

VIEWS = {
    "similarity": "similarity",
    "colours": "tokens as colours",
    "responses": "responses",
    "object": "salient object",
}

LIFETIME = 3600
"""Seconds after which what a session holds is let go."""


def build(explorer: Explorer, images: Sequence[str | os.PathLike] = ()) -> gr.Blocks:
    """The page of a head, not yet served.

    Args:
        explorer ([`Explorer`]): the head.
        images (sequence of paths): examples to choose from; default: four photographs that come with the package.

    Raises:
        DataError: an example cannot be read.
    """
    photos = _named(list(images) or PHOTOGRAPHS)
    names, config = list(photos), explorer.model.config
    default = explorer.layers[-1]
    with gr.Blocks(title=f"soap-hf: {explorer.name}", analytics_enabled=False, delete_cache=(600, 600)) as page:
        session = gr.State(Session(), time_to_live=LIFETIME)
        gr.HTML(title_html(explorer.name))
        with gr.Row():
            with gr.Column(scale=1, min_width=220), gr.Row():
                chosen, uploads = [], []
                for number, ordinal in enumerate(ORDINALS):
                    with gr.Column(min_width=140):
                        value = names[number] if number < len(names) else None
                        chosen.append(gr.Dropdown(names, value=value, label=f"{ordinal.capitalize()} image"))
                        uploads.append(gr.UploadButton(f"Upload the {ordinal}", size="sm"))
            with gr.Column(scale=4, min_width=320):
                view = gr.Radio([(words, name) for name, words in VIEWS.items()], value="similarity", label="Show")
                several = len(explorer.layers) > 1
                layers = [(_layer_name(each), each) for each in explorer.layers]
                with gr.Row():
                    layer = gr.Dropdown(layers, value=default, label="Layer", visible=several)
                    component = _components(explorer, default)
                with gr.Row():
                    removable = [(words, name) for name, words in METHODS.items()]
                    method = gr.Radio(removable, value="soap", label="Remove", min_width=300)
                    strength = _strength(explorer, default)
                message = gr.HTML(elem_classes="soap-said")
                pictures = gr.HTML(js_on_load=(HERE / "templates" / "page.js").read_text(encoding="utf-8"))
                notes = gr.HTML(_no_slider(explorer, default), elem_classes="soap-said")
        with gr.Accordion("The head", open=False):
            head = gr.HTML(head_html(config, default))
        controls = [view, layer, method, strength, component]
        results = [session, pictures, message, notes]

        def show(session: Session, *values: Any) -> tuple[Any, ...]:
            return _answer(explorer, session, lambda: session, values)

        def pick(session: Session, event: gr.EventData, *values: Any) -> tuple[Any, ...]:
            data = event._data if isinstance(event._data, dict) else {}
            place = (data.get("image"), data.get("down"), data.get("across"))
            return _answer(explorer, session, lambda: session.with_query(*place), values)

        def start(session: Session, first: Any, second: Any, *values: Any) -> tuple[Any, ...]:
            def both() -> Session:
                begun = session
                for number, name in enumerate((first, second)):
                    begun = begun.with_photo(number, photos[name]) if name in photos else begun
                return begun

            return _answer(explorer, session, both, values)

        def choose(number: int) -> Callable[..., tuple[Any, ...]]:
            def chosen_one(session: Session, name: Any, *values: Any) -> tuple[Any, ...]:
                return _answer(explorer, session, lambda: session.with_photo(number, photos.get(name)), values)

            return chosen_one

        def upload(number: int) -> Callable[..., tuple[Any, ...]]:
            def uploaded(session: Session, path: str | None, *values: Any) -> tuple[Any, ...]:
                def read() -> Session:
                    with _used_up(path) as name:
                        return session.with_photo(number, read_photo(path or "", name))

                return (*_answer(explorer, session, read, values), None, None)

            return uploaded

        def layer_changed(session: Session, *values: Any) -> tuple[Any, ...]:
            """Another layer has its own strength and its own components."""
            view, layer, method, *_ = values
            fresh = (view, layer, method, explorer.own_strength(layer), _first_component(explorer, layer))
            shown = _answer(explorer, session, lambda: session, fresh)
            components = _components(explorer, layer, visible=view == "responses")
            return (*shown, _strength(explorer, layer), components, head_html(config, layer))

        def view_changed(view: str) -> Any:
            return gr.update(visible=view == "responses")

        quick: dict[str, Any] = {"show_progress": "hidden", "trigger_mode": "always_last"}
        common: dict[str, Any] = {"api_visibility": "private", "concurrency_limit": 1, "concurrency_id": "explorer"}
        gr.on(
            [view.input, method.input, strength.input, component.input],
            show,
            [session, *controls],
            results,
            **quick,
            **common,
        )
        pictures.click(pick, [session, *controls], results, **quick, **common)
        view.input(view_changed, view, component, show_progress="hidden", **common)
        layer.input(layer_changed, [session, *controls], [*results, strength, component, head], **common)
        for number, (dropdown, button) in enumerate(zip(chosen, uploads, strict=True)):
            dropdown.input(choose(number), [session, dropdown, *controls], results, **common)
            button.upload(upload(number), [session, button, *controls], [*results, dropdown, button], **common)
        page.load(start, [session, *chosen, *controls], results, **common)
    return page


def _answer(
    explorer: Explorer, session: Session, change: Callable[[], Session], values: Sequence[Any]
) -> tuple[Any, Any, str, Any]:
    """The session after a change, what it shows, a message and notes; after an error the message alone changes."""
    try:
        view, layer, method, strength, component = values
        choice = Choice(layer, method, None if strength is None else float(strength))
        explorer.projection(choice)
        changed, moment, seen = _seen(explorer, change(), view, choice, component)
        notes = _no_slider(explorer, layer) + notes_html(changed)
        return changed, view_html(seen, moment), message_html(""), notes
    except SOAPError as error:
        return session, gr.skip(), message_html(str(error)), gr.skip()
    except Exception as error:
        logger.warning(f"The explorer failed: {type(error).__name__}: {error}", exc_info=True)
        said = f"That did not work ({type(error).__name__}: {first_sentence(error)}); the terminal says more."
        return session, gr.skip(), message_html(said), gr.skip()


def _seen(
    explorer: Explorer, session: Session, view: str, choice: Choice, component: Any
) -> tuple[Session, Moment, View]:
    fine = view == "object"
    session = session.kept_at(explorer, choice.layer, fine=fine)
    if view == "colours":
        session = session.with_axes(explorer, choice.layer)
    moment = session.at(explorer, choice, fine=fine)
    if view == "responses":
        explorer.components  # noqa: B018 - says why there are none
        return session, moment, response_view(moment, -1 if component is None else int(component))
    draw = {"similarity": similarity_view, "colours": colour_view, "object": object_view}
    if view not in draw:
        raise SOAPError(f"There is no view {view!r}; choose from {', '.join(VIEWS)}.")
    return session, moment, draw[view](moment)


def _named(images: Sequence[str | os.PathLike]) -> dict[str, Photo]:
    """Examples by name; of two of one name the second is numbered."""
    photos: dict[str, Photo] = {}
    for path in images:
        photo = read_photo(path)
        name, number = photo.name, 2
        while name in photos:
            name, number = f"{photo.name} ({number})", number + 1
        photos[name] = photo
    return photos


def _strength(explorer: Explorer, layer: int) -> gr.Slider:
    own = explorer.own_strength(layer)
    try:
        reach = explorer.reach(layer)
    except HeadError:
        return gr.Slider(0, max(1, own), own, label="Directions removed", visible=False)
    step = 1 if own == round(own) else 0.1
    return gr.Slider(
        0, max(1, reach, own), own, step=step, label="Directions removed", visible=True, buttons=["reset"]
    )


def _no_slider(explorer: Explorer, layer: int) -> str:
    """Why there is no slider, if so."""
    try:
        explorer.reach(layer)
    except HeadError as error:
        return f'<p class="soap-note">{escape(str(error))}</p>'
    return ""


def _components(explorer: Explorer, layer: int, *, visible: bool = False) -> gr.Dropdown:
    try:
        known = explorer.components[layer]
    except HeadError:
        return gr.Dropdown([], label="Component", visible=visible)
    choices = [(_component_name(each.row), each.row["rank"]) for each in known]
    return gr.Dropdown(choices, value=_first_component(explorer, layer), label="Component", visible=visible)


def _first_component(explorer: Explorer, layer: int) -> int | None:
    with suppress(HeadError):
        return explorer.components[layer][0].row["rank"]
    return None


def _component_name(row: dict[str, Any]) -> str:
    return f"component {row['component']}: {row['score']:.3f}{', removed' if is_removed(row) else ''}"


def _layer_name(layer: int) -> str:
    return "last_hidden_state" if layer == -1 else f"hidden_states[{layer}]"


@contextmanager
def _used_up(path: str | None) -> Iterator[str]:
    """The name of an uploaded file, which is deleted whatever happens to it."""
    if path is None:
        raise DataError("No file arrived; upload one again.")
    try:
        yield Path(path).name
    finally:
        folder = os.path.realpath(os.environ.get("GRADIO_TEMP_DIR", tempfile.gettempdir()))
        if os.path.commonpath([folder, os.path.realpath(path)]) == folder:
            with suppress(OSError):
                os.unlink(path)
                os.rmdir(os.path.dirname(path))
