"""What one person looks at: two images, their raw tokens, and a patch. Every change gives a new session."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from ..evaluation.methods import RAW
from ..figures.panels import Place
from ..figures.pictures import Picture, colour_axes
from ..figures.similarity import patch_at
from ..runtime.errors import DataError
from .explorer import Choice, Explorer
from .photos import Photo

CLEAN = "clean"
ORDINALS = ("first", "second")
MOST_KEPT = 4
"""Grids of tokens that are kept of each image; others are computed again."""


@dataclass(frozen=True)
class Query:
    """A patch: in which image, and where, as shares of the height and the width, so that it outlives other grids."""

    image: int = 0
    down: float = 0.5
    across: float = 0.5


@dataclass(frozen=True)
class Kept:
    """An image and its raw tokens, by layer and by whether they are the fine ones."""

    photo: Photo
    pictures: Mapping[tuple[int, bool], Picture] = field(default_factory=dict)

    def at(self, explorer: Explorer, layer: int, fine: bool) -> "Kept":
        """With the tokens of a layer, from a forward pass if they are not there."""
        if (layer, fine) in self.pictures:
            return self
        others = list(self.pictures.items())[-MOST_KEPT + 1 :]
        looked = explorer.look(self.photo.image, layer, fine=fine)
        return replace(self, pictures={**dict(others), (layer, fine): looked})


@dataclass(frozen=True)
class Session:
    """Two images at most, and a patch of one of them.

    Attributes:
        images (`(Kept, Kept)`): either may be `None`.
        query ([`Query`]): the patch that is compared with all others.
        axes (`dict[int, torch.Tensor]`): by layer, the basis of colours that `with_axes` has found.
    """

    images: tuple[Kept | None, Kept | None] = (None, None)
    query: Query = Query()
    axes: Mapping[int, Tensor] = field(default_factory=dict)

    def with_photo(self, number: int, photo: Photo | None) -> "Session":
        """Another image in the place of the first (0) or the second (1), or none."""
        images = list(self.images)
        images[number] = None if photo is None else Kept(photo)
        present = [place for place, kept in enumerate(images) if kept is not None]
        stays = self.query.image in present and self.query.image != number
        return Session((images[0], images[1]), self.query if stays else Query((present or [0])[0]))

    def with_query(self, image: Any, down: Any, across: Any) -> "Session":
        """Another patch, at shares of the height and of the width of an image, from a click on it.

        Raises:
            DataError: it does not lie in an image.
        """
        known = type(image) is int and 0 <= image < len(self.images) and self.images[image] is not None
        if not known or not all(isinstance(share, (int, float)) and 0 <= share <= 1 for share in (down, across)):
            raise DataError("That is no place in an image; click inside one.")
        return replace(self, query=Query(image, float(down), float(across)))

    def kept_at(self, explorer: Explorer, layer: int, *, fine: bool = False) -> "Session":
        """With the raw tokens of a layer for each image, as `Explorer.look` gives them."""
        first, second = (kept and kept.at(explorer, layer, fine) for kept in self.images)
        return replace(self, images=(first, second))

    def with_axes(self, explorer: Explorer, layer: int) -> "Session":
        """With the basis of colours of a layer, which the raw tokens of all images make: one for raw and clean."""
        if layer in self.axes:
            return self
        session = self.kept_at(explorer, layer)
        raw = [kept.pictures[layer, False] for kept in session.images if kept is not None]
        return replace(session, axes={**self.axes, layer: colour_axes(raw)}) if raw else session

    def at(self, explorer: Explorer, choice: Choice, *, fine: bool = False) -> "Moment":
        """What is seen at a choice, without a forward pass where `kept_at` has been.

        Raises:
            DataError: there is no image yet.
            SOAPError: as in `Explorer.projection` and `Explorer.look`.
        """
        present = [number for number, kept in enumerate(self.images) if kept is not None]
        if not present:
            raise DataError("There is no image yet; upload one or choose an example.")
        clean, pictures = explorer.projection(choice), {}
        for number in present:
            kept = self.images[number]
            assert kept is not None
            raw = kept.at(explorer, choice.layer, fine).pictures[choice.layer, fine]
            pictures[number] = replace(raw, tokens={RAW: raw.tokens[RAW], CLEAN: clean(raw.tokens[RAW])})
        own = self.query if self.query.image in pictures else Query(present[0])
        patch = patch_at((own.down, own.across), pictures[own.image].grid)
        return Moment(explorer, choice, clean.rank, pictures, own.image, patch, self.axes.get(choice.layer))


@dataclass(frozen=True)
class Moment:
    """What is seen at a choice: the same raw tokens as before, and clean ones.

    Attributes:
        explorer ([`Explorer`]), choice ([`Choice`]): where it came from.
        removed (`int`): number of directions.
        pictures (`dict[int, Picture]`): by the number of the image; tokens are `"raw"` and `"clean"`.
        query_image (`int`), patch (`(row, column)`): the patch that is compared with all others.
        axes (`torch.Tensor` of shape `(D, 3)`, *optional*): the basis of colours, if the session knew it.
    """

    explorer: Explorer
    choice: Choice
    removed: int
    pictures: dict[int, Picture]
    query_image: int
    patch: Place
    axes: Tensor | None = None
