"""The command line of the figures: `soap-hf figures`."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from ..evaluation.examples import open_image
from ..files import check_output_folder, staging_folder
from ..heads.opening import HeadRecord
from ..heads.printing import show
from ..runtime.errors import DataError, HeadError, MissingExtraError
from .evaluate import load_head
from .options import Device, Head, OwnSize, Revision, Token, hide_progress_bars

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_IMAGES = 20
"""Each is a row of its figures."""

FILES = (
    *("score_curve.png", "response_maps.png", "score_by_layer.png"),
    *("responses.png", "patch_tokens.png", "saliency.png", "matching.png", "similarity.png"),
)
"""All that the command may write."""


def draw_figures(
    head: Head,
    images: Annotated[
        Optional[list[Path]], typer.Argument(metavar="IMAGE", help="Images to show the head's work on.")
    ] = None,
    *,
    output: Annotated[Path, typer.Option(help="Folder for the figures.")],
    compare: Annotated[
        Optional[list[str]], typer.Option(metavar="HEAD", help="Another head for the score curves. May be repeated.")
    ] = None,
    layer: Annotated[Optional[int], typer.Option(min=-1, help="For the images; default: the head's last one.")] = None,
    image_size: OwnSize = None,
    device: Device = None,
    revision: Revision = None,
    token: Token = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with the backbone.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Write into a folder that is not empty.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No bars, and no names of files.")] = False,
) -> None:
    """Draw a head's scores and response maps, and what it does to images of yours."""
    from .. import figures as draw  # matplotlib comes with an extra

    check_output_folder(output, overwrite)
    paths = images or []
    if len(paths) > MOST_IMAGES:
        raise DataError(f"A figure shows up to {MOST_IMAGES} images, not {len(paths)}; choose some of them.")
    opened = [open_image(path, "choose another") for path in paths]
    record = HeadRecord.open(head, revision=revision, token=token)
    heads = {head: record, **{other: HeadRecord.open(other, token=token) for other in compare or []}}
    labels = [draw.backbone_label(single.config) for single in heads.values()]
    if len(set(labels)) == len(labels):  # where two have one backbone, heads have their own names
        heads = dict(zip(labels, heads.values(), strict=True))
    drawings: dict[str, Callable[[], Figure]] = {
        "score_curve.png": partial(draw.score_curve, heads),
        "response_maps.png": partial(draw.response_maps, record),
    }
    if deep := {label: single for label, single in heads.items() if len(single.config.layers) > 1}:
        drawings["score_by_layer.png"] = partial(draw.score_by_layer, deep)
    if opened:
        if quiet:
            hide_progress_bars()
        model = load_head(head, device, revision=revision, token=token, trust_remote_code=trust_remote_code or None)
        pictures = draw.look_at(model, opened, layer=layer, image_size=image_size)
        drawings["responses.png"] = partial(draw.response_overlay, pictures, record)
        drawings["patch_tokens.png"] = partial(draw.token_colours, pictures)
        drawings["matching.png"] = partial(draw.matching_views, model, opened, layer=layer)
        if len(opened) > 1:
            drawings["similarity.png"] = partial(draw.similarity_maps, model, opened, layer=layer)
        drawings["saliency.png"] = partial(draw.saliency_masks, model, opened, layer=layer, image_size=image_size)
    drawn = _drawn(drawings)
    with staging_folder(output, FILES) as staging:
        for name, content in drawn.items():
            (staging / name).write_bytes(content)
    if not quiet:
        for name in drawn:
            show(f"Figure written to {output / name}")


def _drawn(drawings: Mapping[str, Callable[[], "Figure"]]) -> dict[str, bytes]:
    """Draws the figures; says which cannot be drawn of this head, and why.

    Raises:
        HeadError: none can be drawn.
    """
    from ..figures import to_png

    drawn, reasons = {}, {}
    for name, draw in drawings.items():
        try:
            drawn[name] = to_png(draw())
        except (DataError, HeadError, MissingExtraError) as error:
            reasons[name] = str(error)
    if not drawn:
        raise HeadError(next(iter(reasons.values())))
    for name, reason in reasons.items():
        show(f"No {name}: {reason}", to_stderr=True)
    return drawn
