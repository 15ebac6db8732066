"""Does a head help? Matching between views, on photographs that its fit did not see, kept with the head."""

from collections.abc import Sequence
from typing import Any

from ..data.preprocessing import ImagePreprocessor
from ..heads.model import SOAPModelWrapper
from .arguments import ViewRule
from .comparison import Comparison
from .examples import Examples
from .matching import HEADLINE, match_views
from .methods import RAW, own_method
from .results import Interval, column, paired_difference
from .strength import StrengthChoice


def check_head(
    model: SOAPModelWrapper,
    images: Examples,
    preprocess: ImagePreprocessor,
    *,
    batch_size: int = 32,
    seed: int = 0,
    progress: bool = False,
    unseen: bool = True,
    share: bool = False,
) -> list[dict[str, Any]]:
    """What matching says of each layer of a head, for its config, from one forward pass over the views.

    Args:
        model ([`SOAPModelWrapper`]): the head and its backbone.
        images ([`Examples`]): photographs that the fit did not see.
        preprocess ([`ImagePreprocessor`]): of the fit.
        batch_size, seed, progress: as in `evaluate_matching`.
        unseen (`bool`, defaults to `True`): whether neither the fit nor the choice of the strength has used them.
        share (`bool`, defaults to `False`): as in [`Comparison`].

    Returns:
        One dict for each layer of the head: `images`, `raw` and `clean` (shares of patches matched within one patch),
        `mean`, `low` and `high` (of their difference, with its 95 % interval), `raw_stuck` and `clean_stuck`, `seed`,
        and `unseen`.

    Raises:
        DataError, LayoutError: as `match_views`.
        SOAPError: fewer than 2 photographs.
    """
    shown: dict[str, Any] = {"preprocess": preprocess, "share": share}
    comparisons = [Comparison.of(model, layer=layer, **shown) for layer in model.config.layers]
    options: dict[str, Any] = {"rule": ViewRule(), "batch_size": batch_size, "seed": seed, "progress": progress}
    checks, methods = [], (RAW, own_method(model))
    for rows in match_views(comparisons, images, **options).rows:
        raw, clean = (column(rows, f"{method}_{HEADLINE}") for method in methods)
        gain, right = paired_difference(raw, clean), [float(values.mean()) for values in (raw, clean)]
        stuck = [float(column(rows, f"{method}_stuck").nanmean()) for method in methods]
        checks.append(_check(len(rows), right, gain, stuck, seed, unseen=unseen))
    return checks


def check_of_choice(choice: StrengthChoice, seed: int) -> list[dict[str, Any]]:
    """What a choice of strength says, for the config of a head of one layer that is given this strength."""
    raw, clean = choice.curve[0], choice.chosen
    right, stuck = (raw.right, clean.right), (raw.stuck, clean.stuck)
    return [_check(choice.num_images, right, clean.gain, stuck, seed, unseen=False)]


def _check(
    images: int, right: Sequence[float], gain: Interval, stuck: Sequence[float], seed: int, *, unseen: bool
) -> dict[str, Any]:
    """`right` and `stuck` are of raw and of clean tokens."""
    matched = {"raw": right[0], "clean": right[1], **gain._asdict(), "raw_stuck": stuck[0], "clean_stuck": stuck[1]}
    return {"images": images, **matched, "seed": seed, "unseen": unseen}
