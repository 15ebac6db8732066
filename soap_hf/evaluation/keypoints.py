"""Matching of key points between images of one class of things: SPair-71k, and folders of its form."""

import json
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import grid_sample

from ..runtime.errors import DataError, first_sentence
from .comparison import Comparison
from .examples import open_image
from .matching import nearest, tokens_of
from .results import Results, column, grouped
from .sharing import measure_items
from .views import patch_centres, resized_view

ALPHAS = (0.1, 0.05)
"""A key point is right if it misses by at most this share of the longer side of the thing's box."""

REMEMBERED = 64
"""Images whose tokens are kept while pairs go through them."""


class KeypointPair(NamedTuple):
    """Two images and what corresponds in them.

    Attributes:
        name, category (`str`): of the pair and of its things.
        source, target (`Path`): the images.
        source_points, target_points (`torch.Tensor` of shape `(K, 2)`, float64): `(x, y)` in pixels.
        longer_side (`float`): of the target's box, in pixels.
    """

    name: str
    category: str
    source: Path
    target: Path
    source_points: Tensor
    target_points: Tensor
    longer_side: float


def evaluate_keypoints(
    comparison: Comparison,
    folder: Path,
    *,
    split: str = "test",
    num_pairs: int | None = None,
    seed: int = 0,
    progress: bool = True,
    command: str | None = None,
) -> Results:
    """Percentage of correct key points (PCK) by nearest neighbour, as for SPair-71k (arXiv 1908.10543), as fractions.

    Images are resized to the size of the head's. A key point's token is read off the source's patches bilinearly, and
    matched by cosine to the patches of the target, whose centres are the answers. `pck_<alpha>` is the share right of
    each pair, averaged over pairs; `point_pck_<alpha>` that of all points. In the rows the latter is a pseudo-value,
    whose mean over pairs is the share.

    Args:
        comparison ([`Comparison`]): the head and its methods.
        folder (`Path`): with `JPEGImages/<category>/` and `PairAnnotation/<split>/*.json`.
        split (`str`, defaults to `"test"`): which pairs.
        num_pairs (`int`, *optional*): size of a seeded random sample; default: all.
        seed (`int`, defaults to 0): of the sample.
        progress (`bool`, defaults to `True`): show a bar.
        command (`str`, *optional*): noted in the summary.

    Returns:
        [`Results`]: one row per pair; `summary["groups"]` by category.

    Raises:
        DataError: no pairs, a malformed annotation, or an image that cannot be read.
    """
    pairs = read_pairs(folder, split, num_pairs, seed)
    grid = comparison.grid

    @lru_cache(maxsize=REMEMBERED)
    def opened(path: Path) -> tuple[Tensor, tuple[int, int]]:
        image = open_image(path, "mend it or remove its pairs")
        views = resized_view(image, comparison.preprocess.size)[None]
        return tokens_of(comparison, views)[comparison.layer][0].cpu(), image.size

    methods = {name: projection.to("cpu") for name, projection in comparison.methods.items()}

    def measure(pair: KeypointPair) -> dict[str, Any]:
        source, source_size = opened(pair.source)
        target, target_size = opened(pair.target)
        points = at_points(source, grid, pair.source_points, source_size)
        places = patch_centres(grid).flip(1) / torch.tensor(grid[::-1]) * torch.tensor(target_size) - 0.5
        row: dict[str, Any] = {"image": pair.name, "category": pair.category, "points": len(points)}
        for name, clean in methods.items():
            answers = places[nearest(clean(points), clean(target))]
            misses = torch.linalg.vector_norm(answers - pair.target_points, dim=1)
            for alpha in ALPHAS:
                row[f"{name}_pck_{alpha:g}"] = float((misses <= alpha * pair.longer_side).double().mean())
        return row

    rows = measure_items(pairs, measure, share=comparison.share, phase="pairs", progress=progress)
    for name in methods:
        for alpha in ALPHAS:
            _add_pseudo_values(rows, f"{name}_pck_{alpha:g}", f"{name}_point_pck_{alpha:g}")
    metrics = [f"{kind}_{alpha:g}" for kind in ("pck", "point_pck") for alpha in ALPHAS]
    counts = {"images": len(rows), "points": sum(row["points"] for row in rows)}
    results = comparison.results("matching", rows, metrics, counts=counts, command=command, split=split, seed=seed)
    return grouped(results, "category", [f"pck_{alpha:g}" for alpha in ALPHAS])


def at_points(tokens: Tensor, grid: tuple[int, int], points: Tensor, size: tuple[int, int]) -> Tensor:
    """Tokens at points of an image, bilinear between patch centres, `(K, D)` float32.

    `tokens` `(rows · columns, D)` are of the image's patches, `points` `(K, 2)` are `(x, y)` in pixels, whose centres
    are whole numbers, and `size` is the image's `(width, height)`.

    Example:
        >>> tokens = torch.tensor([[0.0], [1.0]])  # one row of two patches
        >>> at_points(tokens, (1, 2), torch.tensor([[24.5, 3.0], [49.5, 3.0]]), (100, 8))
        tensor([[0.0000],
                [0.5000]])
    """
    maps = tokens.float().T.reshape(1, -1, *grid)
    shares = (points.double() + 0.5) / torch.tensor(size)
    places = (2 * shares - 1).float()[None, None]
    return grid_sample(maps, places, mode="bilinear", padding_mode="border", align_corners=False)[0, :, 0].T


def read_pairs(folder: Path, split: str, num_pairs: int | None = None, seed: int = 0) -> list[KeypointPair]:
    """The annotated pairs of a split, sorted by source, so that an image's tokens are made once.

    Raises:
        DataError: no pairs, or a malformed annotation.
    """
    annotations = folder / "PairAnnotation"
    files = sorted((annotations / split).glob("*.json"))
    if not files:
        known = ", ".join(sorted(path.name for path in annotations.glob("*") if path.is_dir())) or "none"
        raise DataError(f"{annotations / split} holds no pairs; the splits of {folder} are: {known}.")
    if num_pairs is not None:
        drawn = torch.randperm(len(files), generator=torch.Generator().manual_seed(seed))[:num_pairs]
        files = [files[number] for number in sorted(drawn.tolist())]
    return sorted((_read_pair(path, folder) for path in files), key=lambda pair: (pair.source, pair.target))


def _read_pair(path: Path, folder: Path) -> KeypointPair:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        images = folder / "JPEGImages" / found["category"]
        first, second = (
            torch.tensor(found[key], dtype=torch.float64).reshape(-1, 2) for key in ("src_kps", "trg_kps")
        )
        left, top, right, bottom = map(float, found["trg_bndbox"])
        paths, side = (images / found["src_imname"], images / found["trg_imname"]), max(right - left, bottom - top)
        pair = KeypointPair(path.stem, found["category"], *paths, first, second, side)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise DataError(f"{path} is no annotated pair ({first_sentence(error)}); mend or remove it.") from error
    if not len(first) or len(first) != len(second) or not pair.longer_side > 0:
        raise DataError(f"{path} has no key points, other numbers of them, or an empty box; mend or remove it.")
    return pair


def _add_pseudo_values(rows: list[dict[str, Any]], share: str, name: str) -> None:
    """What each pair contributes to the share of all points, so that the mean over pairs is that share."""
    points = column(rows, "points")
    right = points * column(rows, share)
    whole = right.sum() / points.sum()
    for row, value in zip(rows, whole + (right - whole * points) / points.mean(), strict=True):
        row[name] = float(value)
