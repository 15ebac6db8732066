"""The command line of the figures: `soap-hf figures`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from ..heads.printing import show
from ..runtime.errors import DataError, HeadError, MissingExtraError, OutputError
from .evaluate import load_head
from .options import (
    Command,
    Device,
    Head,
    Overwrite,
    OwnSize,
    Progress,
    Revision,
    Token,
    TrustRemoteCode,
    hide_progress_bars,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_IMAGES = 20
"""Each is a row of its figures."""

FILES = tuple(
    f"{name}.{kind}"
    for name in (
        *("score_curve", "response_maps", "score_by_layer"),
        *("responses", "patch_tokens", "saliency", "matching", "similarity"),
    )
    for kind in ("png", "svg", "pdf")
)
"""All that the command may write."""


class Format(str, Enum):
    """Kinds of files."""

    png, svg, pdf = "png", "svg", "pdf"


@dataclass(kw_only=True)
class Figures(Command):
    """Draw a head's scores and response maps, and what it does to images of yours."""

    head: Head
    images: Annotated[
        Optional[list[Path]], typer.Argument(metavar="IMAGE", help="Images to show the head's work on.")
    ] = None
    output: Annotated[Optional[Path], typer.Option(help="Folder for the figures.")] = None
    into_card: Annotated[
        bool, typer.Option("--into-card", help="Draw into HEAD/figures instead, and show them in the head's card.")
    ] = False
    format: Annotated[Format, typer.Option(help="Kind of files; a card takes png.")] = Format.png
    centred: Annotated[
        bool, typer.Option("--centred", help="For salient objects, take the fit's mean token away first.")
    ] = False
    compare: Annotated[
        Optional[list[str]], typer.Option(metavar="HEAD", help="Another head for the score curves. May be repeated.")
    ] = None
    layer: Annotated[Optional[int], typer.Option(min=-1, help="For the images; default: the head's last one.")] = None
    image_size: OwnSize = None
    device: Device = None
    revision: Revision = None
    token: Token = None
    trust_remote_code: TrustRemoteCode = False
    overwrite: Overwrite = False
    progress: Progress = True

    def __post_init__(self) -> None:
        if (self.output is None) != self.into_card:
            raise OutputError("Say where to draw: --output FOLDER, or --into-card for the head's own folder and card.")
        if self.into_card and self.format != Format.png:
            raise OutputError("A card shows png; leave out --format, or draw elsewhere with --output.")

    def plan(self) -> str:
        """What is drawn where."""
        return f"Drawing the head {self.head} into {self.output or 'its card'}"

    def run(self) -> None:
        """Draws, and writes all that could be drawn."""
        from .. import figures as draw  # matplotlib comes with an extra
        from ..evaluation.examples import open_image
        from ..files import check_output_folder, staging_folder
        from ..heads.card import refresh_card
        from ..heads.opening import FIGURES_FOLDER, HeadRecord

        if self.into_card and not Path(self.head).is_dir():
            raise OutputError(
                f"--into-card draws into the head's own folder, and {self.head} is none here; download it, or draw "
                "elsewhere with --output."
            )
        output = self.output or Path(self.head, FIGURES_FOLDER)
        check_output_folder(output, self.overwrite or self.into_card)
        paths = self.images or []
        if len(paths) > MOST_IMAGES:
            raise DataError(f"A figure shows up to {MOST_IMAGES} images, not {len(paths)}; choose some of them.")
        opened = [open_image(path, "choose another") for path in paths]
        record = HeadRecord.open(self.head, revision=self.revision, token=self.token)
        others = {other: HeadRecord.open(other, token=self.token) for other in self.compare or []}
        heads = {self.head: record, **others}
        labels = [draw.backbone_label(single.config) for single in heads.values()]
        if len(set(labels)) == len(labels):  # where two have one backbone, heads have their own names
            heads = dict(zip(labels, heads.values(), strict=True))
        drawings: dict[str, Callable[[], Figure]] = {
            "score_curve": partial(draw.score_curve, heads),
            "response_maps": partial(draw.response_maps, record),
        }
        if deep := {label: single for label, single in heads.items() if len(single.config.layers) > 1}:
            drawings["score_by_layer"] = partial(draw.score_by_layer, deep)
        if opened:
            drawings |= self._of_images(opened, record)
        drawn = _drawn({f"{name}.{self.format.value}": one for name, one in drawings.items()}, self.format.value)
        with staging_folder(output, FILES) as staging:
            for name, content in drawn.items():
                (staging / name).write_bytes(content)
        if self.into_card:
            refresh_card(Path(self.head))
        if self.progress:
            for name in drawn:
                show(f"Figure written to {output / name}")

    def _of_images(self, opened: list[Any], record: Any) -> dict[str, Callable[[], "Figure"]]:
        """How to draw what the head does to images."""
        from .. import figures as draw

        if not self.progress:
            hide_progress_bars()
        hub_kwargs = {"revision": self.revision, "token": self.token}
        model = load_head(self.head, self.device, **hub_kwargs, trust_remote_code=self.trust_remote_code or None)
        chosen: dict[str, Any] = {"layer": self.layer, "image_size": self.image_size}
        pictures = draw.look_at(model, opened, **chosen)
        drawings: dict[str, Callable[[], Figure]] = {
            "responses": partial(draw.response_overlay, pictures, record),
            "patch_tokens": partial(draw.token_colours, pictures),
            "matching": partial(draw.matching_views, model, opened, layer=self.layer),
        }
        if len(opened) > 1:
            drawings["similarity"] = partial(draw.similarity_maps, model, opened, layer=self.layer)
        drawings["saliency"] = partial(draw.saliency_masks, model, opened, **chosen, centred=self.centred)
        return drawings


def _drawn(drawings: Mapping[str, Callable[[], "Figure"]], kind: str) -> dict[str, bytes]:
    """Draws the figures, as files of a kind; says which cannot be drawn of this head, and why.

    Raises:
        HeadError: none can be drawn.
    """
    from ..figures import rendered

    drawn, reasons = {}, {}
    for name, draw in drawings.items():
        try:
            drawn[name] = rendered(draw(), kind)
        except (DataError, HeadError, MissingExtraError) as error:
            reasons[name] = str(error)
    if not drawn:
        raise HeadError(next(iter(reasons.values())))
    for name, reason in reasons.items():
        show(f"No {name}: {reason}", to_stderr=True)
    return drawn
