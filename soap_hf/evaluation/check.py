"""Does a head help? Matching between views, on photographs that its fit did not see, kept with the head."""

from collections.abc import Sequence
from typing import Any

from ..data.preprocessing import ImagePreprocessor
from ..heads.model import SOAPModelWrapper
from .comparison import Comparison
from .examples import Examples
from .matching import HEADLINE, match_views
from .methods import RAW
from .results import Interval, column, paired_difference
from .strength import StrengthChoice
from .views import ViewRule

CLEAN = "soap"


def check_head(
    model: SOAPModelWrapper,
    images: Examples,
    preprocess: ImagePreprocessor,
    *,
    batch_size: int = 32,
    seed: int = 0,
    progress: bool = False,
) -> list[dict[str, Any]]:
    """What matching says of each layer of a head, for its config, from one forward pass over the views.

    Args:
        model ([`SOAPModelWrapper`]): the head and its backbone.
        images ([`Examples`]): photographs that the fit did not see.
        preprocess ([`ImagePreprocessor`]): of the fit.
        batch_size, seed, progress: as in `evaluate_matching`.

    Returns:
        One dict for each layer of the head: `images`, `raw` and `clean` (shares of patches matched within one patch),
        `mean`, `low` and `high` (of their difference, with its 95 % interval), `raw_stuck` and `clean_stuck`, `seed`,
        and `unseen`, which is true.

    Raises:
        DataError, LayoutError: as `match_views`.
        SOAPError: fewer than 2 photographs.
    """
    comparisons = [Comparison.of(model, layer=layer, preprocess=preprocess) for layer in model.config.layers]
    options: dict[str, Any] = {"rule": ViewRule(), "batch_size": batch_size, "seed": seed, "progress": progress}
    checks = []
    for rows in match_views(comparisons, images, **options).rows:
        raw, clean = (column(rows, f"{method}_{HEADLINE}") for method in (RAW, CLEAN))
        stuck = (column(rows, f"{method}_stuck").nan_to_num(0) for method in (RAW, CLEAN))
        means = [float(values.mean()) for values in (raw, clean, *stuck)]
        checks.append(_check(len(rows), means, paired_difference(raw, clean), seed=seed, unseen=True))
    return checks


def check_of_choice(choice: StrengthChoice, layers: int, seed: int) -> list[dict[str, Any]]:
    """What a choice of strength says, for the config of a head that is given this strength.

    Only a head of one layer gets it: of several, one was measured.
    """
    if layers > 1:
        return []
    raw, clean = choice.curve[0], choice.chosen
    means = [raw.right, clean.right, raw.stuck, clean.stuck]
    return [_check(choice.num_images, means, clean.gain, seed=seed, unseen=False)]


def _check(images: int, means: Sequence[float], gain: Interval, **how: Any) -> dict[str, Any]:
    names = ("raw", "clean", *gain._fields, "raw_stuck", "clean_stuck")
    return {"images": images, **dict(zip(names, (*means[:2], *gain, *means[2:]), strict=True)), **how}
