"""What there is to see of a moment: pictures, each with a caption and a text for those who do not see it."""

from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from ..evaluation.bilateral_solver import BilateralGrid
from ..evaluation.methods import RAW
from ..figures.panels import Place, coloured, enlarged, faded, laid_over, map_panel, marked, scale_bar
from ..figures.pictures import Picture, colour_axes, colours_of, response_scale
from ..figures.responses import mosaic, share_scale
from ..figures.saliency import all_or_none, found_object
from ..figures.similarity import best_match, similarities, similarity_panel, similarity_scale
from ..runtime.errors import SOAPError
from .session import CLEAN, ORDINALS, Moment

EXTREMES = {"all": "the whole image", "none": "nothing"}

SHARES_MEAN = (
    "P and Q: share of images with a positive response at each place, light where all answer alike and dark at the "
    "coin flip. Where P and Q are alike, the component says where a patch is."
)


@dataclass(frozen=True)
class Panel:
    """One picture.

    Attributes:
        picture (`PIL.Image.Image`): RGB.
        caption (`str`): what is written below it.
        description (`str`): what it shows, in words.
        image (`int`, *optional*): the image whose patches lie where they are seen; a click on it chooses one.
        grid (`(rows, columns)`, *optional*): of these patches.
    """

    picture: Image.Image
    caption: str
    description: str
    image: int | None = None
    grid: tuple[int, int] | None = None


@dataclass(frozen=True)
class Scale:
    """What colours mean: a bar, and words for its two ends."""

    bar: Image.Image
    low: str
    high: str
    meaning: str


@dataclass(frozen=True)
class View:
    """Pictures in rows, a scale if there is one, and sentences below."""

    rows: list[list[Panel]]
    scale: Scale | None = None
    sentences: list[str] = field(default_factory=list)


def similarity_view(moment: Moment) -> View:
    """Cosine of the chosen patch to all patches of both images, raw beside clean, the best matches marked."""
    own = moment.pictures[moment.query_image]
    framed = {number: moment.patch if number == moment.query_image else None for number in moment.pictures}
    maps = {
        (number, method): similarities(own.tokens[method], picture.tokens[method], moment.patch)
        for number, picture in moment.pictures.items()
        for method in (RAW, CLEAN)
    }
    lowest = min(0.0, *(float(cosines.min()) for (_, method), cosines in maps.items() if method == RAW))
    shown, rows, sentences = similarity_scale(lowest), [], []  # the same at every strength
    asked = f"the patch in {_place(moment.patch)} of the {ORDINALS[moment.query_image]} image"
    for number, picture in moment.pictures.items():
        which = f"{ORDINALS[number]} image"
        seen = marked(picture.image, picture.grid, frame=framed[number])
        row = [_panel(picture, number, seen, which, f"The {which}{_framed(framed[number])}.")]
        found = []
        for method in (RAW, CLEAN):
            cosines = maps[number, method]
            over = similarity_panel(picture, cosines, shown, patch=framed[number])
            best = best_match(cosines, framed[number])
            words = f"{_place(best)}, cosine {float(cosines[best]):.2f}" if best else "none, there is no other patch"
            found.append(f"{method} {words}")
            description = f"Cosine of {asked} to all patches of the {which}, {method} tokens. Best match: {words}."
            row.append(_panel(picture, number, over, _caption(moment, method), description))
        rows.append(row)
        sentences.append(f"Best match in the {which}: {'; '.join(found)}.")
    return View(rows, Scale(scale_bar(shown), f"{lowest:.2f} or less", "1", f"cosine to {asked}"), sentences)


def colour_view(moment: Moment) -> View:
    """Patch tokens as colours, raw and clean, as in [`~soap_hf.figures.token_colours`]."""
    pictures = list(moment.pictures.values())
    colours = colours_of(pictures, colour_axes(pictures) if moment.axes is None else moment.axes)
    rows = []
    for (number, picture), methods in zip(moment.pictures.items(), colours, strict=True):
        row = [_plain(picture, number)]
        for method, shares in methods.items():
            text = f"Principal components of the {method} tokens of the {ORDINALS[number]} image as colours."
            row.append(_panel(picture, number, coloured(picture.image, shares), _caption(moment, method), text))
        rows.append(row)
    basis = "Red, green and blue are the three leading principal components of the raw tokens of what is shown"
    return View(rows, sentences=[f"{basis}; a colour means the same in every picture."])


def response_view(moment: Moment, rank: int) -> View:
    """Responses of raw tokens to a component, given by its rank among the scores, and its maps P and Q.

    Raises:
        HeadError: the head was saved without statistics.
        SOAPError: no component of this rank was saved.
    """
    known = {component.row["rank"]: component for component in moment.explorer.components[moment.choice.layer]}
    if rank not in known:
        raise SOAPError(f"No component of rank {rank} was saved; choose one of the list.")
    component, shown, rows = known[rank], response_scale(), []
    for number, picture in moment.pictures.items():
        response = component.response(picture.tokens[RAW])
        text = (
            f"Responses of the raw tokens of the {ORDINALS[number]} image to component {component.row['component']}: "
            f"positive on {float((response > 0).double().mean()):.0%} of the patches."
        )
        over = laid_over(picture.image, response, shown)
        rows.append([_plain(picture, number), _panel(picture, number, over, "response", text)])
    share, maps = share_scale(), []
    both = (("P", "real", component.real_response), ("Q", "synthetic", component.synthetic_response))
    for letter, kind, response in both:
        low, high = float(response.min()), float(response.max())
        text = f"Share of {kind} images of the fit with a positive response at each place: {low:.2f} to {high:.2f}."
        maps.append(Panel(map_panel(mosaic(response), share), f"{letter}: {kind} images of the fit", text))
    bar = Scale(scale_bar(shown), "−2", "2", "response in standard deviations")
    caption = component.caption.replace("\n", ", ")
    rows = [[*row, one] for row, one in zip(rows, maps, strict=True)] if len(rows) == len(maps) else [*rows, maps]
    return View(rows, bar, [f"{caption[:1].upper()}{caption[1:]}.", SHARES_MEAN])


def object_view(moment: Moment) -> View:
    """The salient object in raw and in clean tokens: TokenCut, refined by the bilateral solver."""
    rows = []
    for number, picture in moment.pictures.items():
        row, grid = [_plain(picture, number)], BilateralGrid(np.asarray(picture.image))
        for method in (RAW, CLEAN):
            mask = found_object(picture.tokens[method], grid, (picture.image.height, picture.image.width))
            share = EXTREMES.get(all_or_none(mask) or "", f"{mask.mean():.0%} of the image")
            text = f"The salient object of the {ORDINALS[number]} image in {method} tokens: {share}."
            shown = enlarged(faded(picture.image, mask))
            row.append(_panel(picture, number, shown, f"object in {method} tokens: {share}", text))
        rows.append(row)
    return View(rows, sentences=["All is faded that does not belong to the object, as TokenCut finds it."])


def _plain(picture: Picture, number: int) -> Panel:
    which = f"{ORDINALS[number]} image"
    return _panel(picture, number, enlarged(picture.image), which, f"The {which}.")


def _panel(picture: Picture, number: int, shown: Image.Image, caption: str, description: str) -> Panel:
    return Panel(shown, caption, description, number, picture.grid)


def _caption(moment: Moment, method: str) -> str:
    """What the tokens of a picture are."""
    if method == RAW:
        return "raw tokens"
    count = moment.removed
    return f"clean tokens, {count} {'direction' if count == 1 else 'directions'} removed"


def _place(patch: Place) -> str:
    return f"row {patch[0] + 1}, column {patch[1] + 1}"


def _framed(patch: Place | None) -> str:
    return "" if patch is None else f", with a frame around the patch in {_place(patch)}"
