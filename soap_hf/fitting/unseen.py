"""Images that a fit does not see: for the check of its head, and for the choice of a strength."""

from typing import NamedTuple

from datasets import Dataset, IterableDataset
from transformers.utils import logging

from ..data.data_sets import undecoded
from ..data.image_sample import ImageSample
from ..evaluation.examples import Examples
from ..evaluation.matching import FEW_IMAGES
from ..processes import on_main
from ..runtime.errors import DataError
from .arguments import FitArguments

logger = logging.get_logger(__name__)

LARGEST_SHARE = 5
"""A fifth of the images at most is kept from the fit."""

TUNING_IMAGES = 100
"""Photographs by which `mu="matching"` chooses."""


class Split(NamedTuple):
    """A data set in parts that share no image."""

    fitted: ImageSample
    checked: Examples | None  # for the check of the head
    tuned: Examples | None  # for the choice of its strength


def split_images(images: Dataset | IterableDataset, chosen: FitArguments) -> Split:
    """Divides a data set: the fit's sample first; what is left, or else a part set aside, is for check and choice.

    Of a stream, whose end nobody knows, the first images of the random order are set aside.

    Raises:
        DataError: the images cannot be read, or are too few for `mu="matching"`.
    """
    tuning = TUNING_IMAGES if chosen.mu == "matching" else 0
    wanted, column, seed = chosen.check + tuning, chosen.image_column, chosen.seed
    least = min(wanted, FEW_IMAGES * ((chosen.check > 0) + (tuning > 0)))
    if isinstance(images, IterableDataset):
        enough = wanted and sum(1 for _ in undecoded(images, column).take(2 * wanted)) == 2 * wanted
        found = wanted if enough else 0
        fitted = ImageSample(images, column, chosen.num_images, seed, skip=found)
        order, rows = None, fitted.skipped
    else:
        whole = ImageSample(images, column, None, seed)
        order, asked = list(whole.rows or ()), min(chosen.num_images or len(images), len(images))
        found = min(wanted, len(order) - asked)
        if found < least:
            found = min(wanted, len(order) // LARGEST_SHARE)
            found = found if found >= least else 0
            asked = min(asked, len(order) - found)
        fitted = ImageSample(images, column, asked, seed)
        rows = images.select(order[asked : asked + found])
        _say_what_is_fitted(chosen, len(order), asked, found)
    if not found and wanted:
        least_of = f"a stream of at least {2 * wanted}" if order is None else f"at least {least * LARGEST_SHARE}"
        needed = f"{least_of} images"
        if tuning:
            raise DataError(f'mu="matching" chooses on images that the fit does not see: give {needed}, or mu="auto".')
        on_main(
            logger.warning,
            f"Whether the head helps is not checked, which needs {needed}: give more, or run "
            "`soap-hf evaluate matching` on others (check=0 leaves the check out).",
        )
    checked = found * chosen.check // wanted if wanted else 0
    return Split(fitted, _examples(rows, range(checked), chosen), _examples(rows, range(checked, found), chosen))


def _examples(rows: Dataset | IterableDataset | None, numbers: range, chosen: FitArguments) -> Examples | None:
    if rows is None or not len(numbers):
        return None
    if isinstance(rows, IterableDataset):  # few enough to be held as files
        rows = Dataset.from_list(list(rows), features=rows.features)
    # a bad image must not cost the fit
    return Examples(rows.select(numbers), chosen.image_column, seed=chosen.seed, max_bad_fraction=0.5)


def _say_what_is_fitted(chosen: FitArguments, available: int, asked: int, found: int) -> None:
    """Says when fewer images are fitted on than asked for."""
    wanted, told = chosen.num_images, f"The data set has {available} images"
    if wanted is not None and asked < wanted and not found:
        on_main(logger.warning, f"{told}, fewer than the {wanted} asked for: all are used.")
    elif found and asked + found == available and (wanted is None or asked < wanted):
        purpose = "check the head (check=0 fits on all)" if chosen.check else "choose its strength"
        kept = f"{asked} are fitted on, and {found} are kept to {purpose}"
        on_main(logger.warning, f"{told}: {kept}.")
