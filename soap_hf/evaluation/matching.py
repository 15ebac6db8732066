"""Matching between views: does a patch find the same thing in another view of its photograph, or the same place?"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers.utils import logging

from ..data.data_sets import open_dataset
from ..data.in_memory import is_torch
from ..data.loading import Example
from ..heads.running import read_raw_tokens
from ..layout.probing import evaluation_mode
from ..processes import on_main
from ..runtime.errors import DataError
from .arguments import ViewRule
from .comparison import Comparison
from .examples import Examples, short_names
from .results import FEW_IMAGES, Interval, Results
from .views import ViewPair, draw_views, patch_centres, true_places

logger = logging.get_logger(__name__)

RADII = (0.5, 1.0, 2.0)
"""Patches by which a match may miss and still be right."""

HEADLINE = "right_1"
"""The metric that a strength is chosen by."""

Row = dict[str, Any]


def evaluate_matching(
    comparison: Comparison,
    images: Any,
    *,
    rule: ViewRule | None = None,
    radii: Sequence[float] = RADII,
    batch_size: int = 32,
    seed: int = 0,
    progress: bool = True,
    command: str | None = None,
) -> Results:
    """How often a patch finds the same thing in another view of its photograph, by nearest neighbour; needs no labels.

    Each patch of the first view whose centre lies in the second is matched, by cosine, to all patches of the second.
    `right_<radius>` is the share whose match has its centre within so many patches of the true place, in rows as well
    as in columns (patches of the second view). `stuck` is the share, of the patches that moved by more than
    `rule.least_move`, that are matched to their own place: tokens that say where a patch is do that.

    Args:
        comparison ([`Comparison`]): the head and its methods.
        images ([`Examples`], or what `open_dataset` opens): photographs that the head was not fitted on.
        rule ([`ViewRule`], *optional*): how views are drawn; those of an image depend on its row and `seed` alone.
        radii (sequence of `float`, defaults to 0.5, 1 and 2): of `right_<radius>`.
        batch_size (`int`, defaults to 32): views in a forward pass.
        seed (`int`, defaults to 0): of the views.
        progress (`bool`, defaults to `True`): show bars.
        command (`str`, *optional*): noted in the summary.

    Returns:
        [`Results`]: one row per photograph, the summary's means and differences over photographs.

    Raises:
        DataError: no photograph gives two views.
        LayoutError: the patches have no rows and columns.

    Example:
        >>> from datasets import Dataset
        >>> from PIL import Image
        >>> from transformers import ViTConfig, ViTModel
        >>> from soap_hf import SOAPModelWrapper
        >>> vit = ViTModel(ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
        ...                          image_size=32, patch_size=8))
        >>> images = Dataset.from_dict({"image": [Image.new("RGB", (64, 64), (9 * i, 0, 0)) for i in range(8)]})
        >>> comparison = Comparison.of(SOAPModelWrapper.from_backbone(vit, None))
        >>> found = evaluate_matching(comparison, images, progress=False)
        >>> list(found.rows[0])[:5]
        ['image', 'raw_right_0.5', 'raw_right_1', 'raw_right_2', 'raw_stuck']
    """
    examples, rule = as_examples(images), rule or ViewRule()
    options: dict[str, Any] = {"rule": rule, "batch_size": batch_size, "seed": seed, "progress": progress}
    (rows,), skipped = match_views([comparison], examples, radii=radii, **options)
    counts = {"images": len(rows), "skipped_images": len(skipped), "bad_images": len(examples.bad_images)}
    metrics = (*map(right, radii), "stuck")
    settings = {**asdict(rule), "seed": seed}
    results = comparison.results("matching", rows, metrics, counts=counts, command=command, **settings)
    headline = HEADLINE if HEADLINE in metrics else metrics[0]
    warn_if_few(len(rows), {name: own[headline] for name, own in results.summary["differences"].items()})
    return results


class MatchedViews(NamedTuple):
    """What matching found: rows of each comparison, one per photograph, and which gave no two views, and why."""

    rows: list[list[Row]]
    skipped: list[str]


def match_views(
    comparisons: Sequence[Comparison],
    images: Examples,
    *,
    rule: ViewRule,
    radii: Sequence[float] = RADII,
    batch_size: int = 32,
    seed: int = 0,
    progress: bool = False,
) -> MatchedViews:
    """Matches the views of each photograph by all methods of some layers, from one forward pass.

    Args:
        comparisons (list of [`Comparison`]): a layer each, of one head; views have the size and colours of its images.
        images ([`Examples`]): photographs.
        rule, radii, batch_size, seed, progress: as in `evaluate_matching`. The views are drawn for the layer that has
            the most patches.

    Raises:
        DataError: no photograph gives two views.
        LayoutError: the patches have no rows and columns.
    """
    grids = [comparison.grid for comparison in comparisons]
    size, finest = comparisons[0].preprocess.size, max(grids, key=math.prod)
    prepare = partial(_views_of, rule=rule, size=size, grid=finest, seed=seed)

    def measure(drawn: list[ViewPair | str]) -> list[list[Row] | str]:
        """Of each photograph a row for each comparison, or why there is none."""
        pairs = [pair for pair in drawn if isinstance(pair, ViewPair)]
        if not pairs:
            return cast(Any, drawn)
        tokens = tokens_of(comparisons[0], torch.cat([pair.views for pair in pairs]))  # first, second, first …
        found: list[list[Row]] = [[] for _ in pairs]
        for comparison, grid in zip(comparisons, grids, strict=True):
            cleaned = {name: clean(tokens[comparison.layer]) for name, clean in comparison.methods.items()}
            for number, pair in enumerate(pairs):
                both = {name: (own[2 * number], own[2 * number + 1]) for name, own in cleaned.items()}
                found[number].append(matching_row(both, pair.homography, grid, rule.least_move, radii))
        rows = iter(found)
        return [pair if isinstance(pair, str) else next(rows) for pair in drawn]

    options: dict[str, Any] = {"share": comparisons[0].share, "phase": "views", "progress": progress}
    parts = images.measured(prepare, measure, max(1, batch_size // 2), **options)
    of_each = [one for part in parts for one in zip(part.names, part.value, strict=True)]
    skipped = [f"{name}: {reason}" for name, reason in of_each if isinstance(reason, str)]
    names = [name for name, found in of_each if not isinstance(found, str)]
    rows = list(zip(*(found for _, found in of_each if not isinstance(found, str)), strict=True))
    if skipped:
        some = "; ".join(skipped[:3]) + ("; …" if len(skipped) > 3 else "")
        of_all = f"{len(skipped)} of {len(names) + len(skipped)} photographs"
        on_main(logger.warning, f"{of_all} give no two views: {some}.")
    if not names:
        raise DataError("No photograph gives two views to match; give larger ones, or choose a smaller image_size.")
    shown = short_names(names)
    named = [[{"image": name, **row} for name, row in zip(shown, own, strict=True)] for own in rows]
    return MatchedViews(named, skipped)


def matching_row(
    tokens: Mapping[str, tuple[Tensor, Tensor]],
    homography: Tensor,
    grid: tuple[int, int],
    least_move: float = 1.5,
    radii: Sequence[float] = RADII,
) -> Row:
    """What each method gets right between two views, `<method>_right_<radius>` and `<method>_stuck`.

    `tokens` are by method the patch tokens of both views, `(rows · columns, D)`; the homography is as in [`ViewPair`],
    `least_move` and `radii` as in `evaluate_matching`. `stuck` is NaN if no patch moved that far.

    Example:
        >>> shifted = torch.tensor([[1.0, 0.0, 0.5], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]).double()  # right by 2 of 4
        >>> content = torch.eye(4), torch.eye(4).roll(2, dims=0)
        >>> matching_row({"raw": content}, shifted, (1, 4), radii=[1])
        {'raw_right_1': 1.0, 'raw_stuck': 0.0}
        >>> matching_row({"raw": (torch.eye(4), torch.eye(4))}, shifted, (1, 4), radii=[1])
        {'raw_right_1': 0.0, 'raw_stuck': 1.0}
    """
    places, inside = true_places(homography, grid)
    centres = patch_centres(grid)
    moved = (places - centres).abs().amax(dim=1)[inside] > least_move
    own = inside.nonzero().squeeze(1)
    row: Row = {}
    for name, (first, second) in tokens.items():
        chosen = nearest(first[inside.to(first.device)], second).cpu()
        misses = (centres[chosen] - places[inside]).abs().amax(dim=1)
        row |= {f"{name}_{right(radius)}": float((misses <= radius).double().mean()) for radius in radii}
        row[f"{name}_stuck"] = float((chosen == own)[moved].double().mean())
    return row


def nearest(tokens: Tensor, others: Tensor) -> Tensor:
    """For each token `(N, D)` the number of the one among `(M, D)` whose cosine is highest, `(N,)`."""
    return (normalize(tokens.float(), dim=-1) @ normalize(others.float(), dim=-1).T).argmax(dim=1)


def right(radius: float) -> str:
    """Name of the share of matches that miss by at most so many patches."""
    return f"right_{radius:g}"


def as_examples(images: Any) -> Examples:
    """Images to measure on, from whatever names a data set."""
    return images if isinstance(images, Examples) else Examples(images if is_torch(images) else open_dataset(images))


def warn_if_few(images: int, gains: Mapping[str, Interval]) -> None:
    """Warns that few photographs tell little, with the intervals."""
    if images < FEW_IMAGES:
        told = [f"{name} {gain.mean:+.2f}, 95 % {gain.low:+.2f} to {gain.high:+.2f}" for name, gain in gains.items()]
        what = f"Only {images} photographs give two views, which says little ({'; '.join(told)})"
        on_main(logger.warning, f"{what}; use {FEW_IMAGES} or more.")


def _views_of(
    example: Example, rule: ViewRule, size: tuple[int, int], grid: tuple[int, int], seed: int
) -> ViewPair | str:
    return draw_views(example.image, rule, size, grid, np.random.default_rng([seed, example.row]))


@torch.no_grad()
def tokens_of(comparison: Comparison, views: Tensor) -> dict[int, Tensor]:
    """Raw patch tokens of views by layer, `(B, rows · columns, D)` float32; of clips, means over their frames.

    Views are RGB, `(B, 3, H, W)` uint8, in the size of the head's images.
    """
    pixels = comparison.preprocess.normalize(views.to(comparison.model.device, torch.float32) / 255)
    with evaluation_mode(comparison.model):
        read = read_raw_tokens(comparison.model, pixels, "these views")
    found = {layer: of_layer.patches.float() for layer, of_layer in read.items()}
    return {layer: (own.mean(dim=1) if own.ndim == 5 else own).flatten(1, -2) for layer, own in found.items()}
