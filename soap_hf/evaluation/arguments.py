"""The arguments that evaluations share, and the rule by which views are drawn."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data.arguments import IMAGES, ImageArguments, argument, parse_strengths, refuse_bad_seed
from ..runtime.errors import DataError

VIEWS = "Views"
"""The group of its rule in the help of a command."""


@dataclass(kw_only=True)
class EvaluationArguments(ImageArguments):
    """The options that every `soap-hf evaluate …` takes.

    Args:
        method (list of `str`, *optional*): what is measured beside raw tokens, as in `method_projections`.
        rank (`int`, *optional*): directions of the baselines; default: the head's.
        mu (list of `float` or `"auto"`, *optional*): further strengths of the head, from its statistics.
        layer (`int`, *optional*): default: the head's last one.
        seed (`int`, defaults to 0): of random samples of the images.
        output (`Path`, *optional*): folder for the results.
        overwrite (`bool`, defaults to `False`): write into a folder that is not empty.

    The others are those of [`~soap_hf.data.arguments.ImageArguments`].
    """

    method: Sequence[str] = argument(
        (), "Method beside raw: soap, or a baseline, zero-image or top-pc; default: the head's.", repeated=str
    )
    rank: int | None = argument(None, "Directions of zero-image and top-pc; default: the head's.", least=1)
    mu: Sequence[Any] = argument(
        (),
        "Further strengths beside the head's own, from its statistics, e.g. auto,1,2,4.",
        parser=parse_strengths,
        repeated=Any,
        metavar="NUMBER|auto,…",
    )
    layer: int | None = argument(None, "Default: the head's last one.", least=-1)
    seed: int = argument(0, "Of random samples of the images.", panel=IMAGES)
    output: Path | None = argument(None, "Folder for a CSV (one row per image) and summary.json.")
    overwrite: bool = argument(False, "Write into a folder that is not empty.", flag="--overwrite")

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_bad_seed(self.seed)
        self.mu = [one for given in self.mu for one in (given if isinstance(given, tuple) else (given,))]

    @property
    def reading(self) -> dict[str, Any]:
        """What [`Examples`] take."""
        names = ("image_column", "seed", "max_bad_fraction")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True, kw_only=True)
class ViewRule:
    """How the two views of a photograph are drawn, and which pairs of them count.

    Args:
        smallest_crop, largest_crop (`float`, default to 0.5 and 0.9): side of a crop, as a share of the largest that
            the photograph holds (of a square one: of its shorter side).
        jitter (`float`, defaults to 0.3): largest relative change of brightness, contrast and colour of a view.
        least_overlap (`float`, defaults to 0.3): share of the first view's patch centres that must lie in the second.
        least_move (`float`, defaults to 1.5): patches by which those must move on average (the larger of both axes);
            only patches that move further than this can be stuck.
        flip (`bool`, defaults to `False`): mirror half of the second views.

    Raises:
        DataError: names the value that is impossible.

    Example:
        >>> ViewRule(flip=True).smallest_crop
        0.5
    """

    smallest_crop: float = argument(0.5, "Smallest crop, as a share of the largest one that fits.", panel=VIEWS)
    largest_crop: float = argument(0.9, "Largest crop.", panel=VIEWS)
    jitter: float = argument(0.3, "Largest change of brightness, contrast and colour.", panel=VIEWS)
    least_overlap: float = argument(0.3, "Share of patch centres that both views must show.", panel=VIEWS)
    least_move: float = argument(1.5, "Patches by which they must move on average.", panel=VIEWS)
    flip: bool = argument(False, "Mirror half of the second views.", flag="--flip", panel=VIEWS)

    def __post_init__(self) -> None:
        if not 0 < self.smallest_crop <= self.largest_crop <= 1:
            raise DataError(
                f"Crops must go from above 0 up to 1, not from {self.smallest_crop} to {self.largest_crop}."
            )
        for name, highest in (("jitter", 1), ("least_overlap", 1), ("least_move", float("inf"))):
            if not 0 <= getattr(self, name) <= highest:
                raise DataError(f"{name} must lie between 0 and {highest}, not {getattr(self, name)}.")
