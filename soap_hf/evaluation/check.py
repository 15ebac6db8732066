"""Does a head help? Matching between views, on photographs that its fit did not see, kept with the head."""

from typing import Any

import torch

from ..data.preprocessing import ImagePreprocessor
from ..heads.model import SOAPModelWrapper
from ..runtime.projection import SOAPProjection
from .examples import Examples
from .matching import HEADLINE, Row, match_views
from .methods import RAW, own_projection
from .results import paired_difference
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
    methods = {
        layer: {RAW: SOAPProjection.identity(width), CLEAN: own_projection(model, layer)}
        for layer, width in zip(model.config.layers, model.config.hidden_sizes, strict=True)
    }
    options: dict[str, Any] = {"rule": ViewRule(), "batch_size": batch_size, "seed": seed, "progress": progress}
    found = match_views(model, preprocess, methods, images, **options)
    return [_check(found.rows[layer], seed) for layer in model.config.layers]


def check_of_choice(choice: StrengthChoice, layers: int, seed: int) -> list[dict[str, Any]]:
    """What a choice of strength says, for the config of a head that is given this strength.

    Only a head of one layer gets it: of several, one was measured.
    """
    if layers > 1:
        return []
    raw, clean = choice.curve[0], choice.chosen
    return [
        {
            "images": choice.num_images,
            "raw": raw.right,
            "clean": clean.right,
            **clean.gain._asdict(),
            "raw_stuck": raw.stuck,
            "clean_stuck": clean.stuck,
            "seed": seed,
            "unseen": False,
        }
    ]


def _check(rows: list[Row], seed: int) -> dict[str, Any]:
    values = {
        f"{method}_{metric}": torch.tensor([row[f"{method}_{metric}"] for row in rows], dtype=torch.float64)
        for method in (RAW, CLEAN)
        for metric in (HEADLINE, "stuck")
    }
    before, after = (values[f"{method}_{HEADLINE}"] for method in (RAW, CLEAN))
    stuck = {method: values[f"{method}_stuck"].nan_to_num(0).mean() for method in (RAW, CLEAN)}
    return {
        "images": len(rows),
        "raw": float(before.mean()),
        "clean": float(after.mean()),
        **paired_difference(before, after)._asdict(),
        "raw_stuck": float(stuck[RAW]),
        "clean_stuck": float(stuck[CLEAN]),
        "seed": seed,
        "unseen": True,
    }
