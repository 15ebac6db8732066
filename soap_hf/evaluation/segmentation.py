"""Semantic segmentation by k-NN of patches: each patch of a test image takes the class of labelled patches like it."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from ..data.loading import Example
from ..runtime.errors import DataError, LayoutError
from .comparison import Comparison
from .examples import Examples, short_names
from .knn import nearest, refuse_bad_neighbours, weighted_vote
from .methods import RAW
from .results import Results, interval, resamples, verdict
from .sharing import Part
from .views import resized_view

IGNORE_LABEL = 255
"""Pixels of this class count nowhere."""

NEIGHBOURS = (10,)
"""Numbers of neighbours that are reported."""


def evaluate_segmentation(
    comparison: Comparison,
    train: Examples,
    test: Examples,
    *,
    neighbours: Sequence[int] = NEIGHBOURS,
    ignore_label: int = IGNORE_LABEL,
    batch_size: int = 32,
    progress: bool = True,
    command: str | None = None,
) -> Results:
    """Segments test images by the nearest labelled patches of training images, raw and clean of one forward pass.

    Images and masks are resized to the model's input size, without a crop (bicubic and nearest). A training patch has
    the class of most of its pixels; every pixel of a test image gets the class of its patch. The tokens of all
    training patches are held in memory, once for each method.

    Args:
        comparison ([`Comparison`]): the head and its methods.
        train, test ([`Examples`]): images with masks of one channel, whose values are numbers of classes.
        neighbours (sequence of `int`, defaults to `(10,)`): the numbers `k` of neighbours; they vote as in
            `weighted_vote`.
        ignore_label (`int`, defaults to 255): pixels of this class count nowhere.
        batch_size (`int`, defaults to 32): images in a forward pass.
        progress (`bool`, defaults to `True`): show bars.
        command (`str`, *optional*): noted in the summary.

    Returns:
        [`Results`]: one row per test image, with `<method>_accuracy_k<k>`, the share of its pixels that are right, and
        `<method>_image_miou_k<k>`, the mean IoU over its own classes. The summary adds `miou_k<k>`: the IoU of each
        class over the pixels of all images, then the mean over classes.

    Raises:
        SOAPError: a `k` below 1.
        DataError: a mask that holds no numbers of classes, or fewer than 2 classes, or 2 images, with labels.
        LayoutError: the tokens lie on no grid of rows and columns.
    """
    refuse_bad_neighbours(neighbours)
    if not (train.has_masks and test.has_masks):
        raise DataError("Segmentation needs images with masks, but these have no masks; name their mask_column.")
    options: dict[str, Any] = {"batch_size": batch_size, "progress": progress}
    classes, targets, banks = _labelled_patches(comparison, train, ignore_label, **options)

    def segment(raw: Tensor, truth: Tensor) -> list[dict[tuple[str, int], Overlap]]:
        """Of each image the overlap of truth and guess by method and `k`; of one without labels nothing."""
        places = patch_of_pixel((truth.shape[1], truth.shape[2]), (raw.shape[1], raw.shape[2]))
        counted = truth != ignore_label
        overlaps: list[dict[tuple[str, int], Overlap]] = [{} for _ in truth]
        labelled = counted.flatten(1).any(dim=1).nonzero().flatten().tolist()
        for method, projection in comparison.methods.items():
            queries = normalize(projection(raw).flatten(0, 2), dim=-1)
            cosines, found = (part.cpu() for part in nearest(queries, banks[method], max(neighbours)))
            for k in neighbours:
                votes = weighted_vote(cosines[:, :k], targets[found[:, :k]], len(classes))
                guesses = classes[votes.argmax(dim=1)].view(len(raw), -1)
                for number in labelled:
                    own = counted[number]
                    overlaps[number][method, k] = Overlap.of(truth[number][own], guesses[number][places][own])
        return overlaps

    parts = _measured(comparison, test, segment, phase="test images", **options)
    of_each = [(name, found) for part in parts for name, found in zip(part.names, part.value, strict=True) if found]
    names = [name for name, _ in of_each]
    overlaps = {(method, k): [found[method, k] for _, found in of_each] for method in banks for k in neighbours}
    if len(names) < 2:
        raise DataError(f"An evaluation needs at least 2 test images with labelled pixels, but found {len(names)}.")
    rows: list[dict[str, Any]] = [{"image": name} for name in short_names(names)]
    for (method, k), of_images in overlaps.items():
        for row, overlap in zip(rows, of_images, strict=True):
            row |= {f"{method}_accuracy_k{k}": overlap.accuracy(), f"{method}_image_miou_k{k}": overlap.mean_iou()}
    metrics = [f"{metric}_k{k}" for metric in ("accuracy", "image_miou") for k in neighbours]
    counts = {
        "test_images": len(rows),
        "unlabelled_test_images": len(test) - len(test.bad_images) - len(rows),
        "training_images": len(train) - len(train.bad_images),
        "training_patches": len(targets),
        "classes": len(classes),
        "bad_images": len(train.bad_images) + len(test.bad_images),
    }
    settings: dict[str, Any] = {"command": command, "ignore_label": ignore_label}
    results = comparison.results("segmentation", rows, metrics, counts=counts, **settings)
    for k in neighbours:
        whole = {method: mean_iou_resamples(overlaps[method, k]) for method in comparison.methods}
        for method, (value, resampled) in whole.items():
            results.summary["means"][method][f"miou_k{k}"] = value
            if method != RAW:
                difference = interval(value - whole[RAW][0], resampled - whole[RAW][1])
                results.summary["differences"][method][f"miou_k{k}"] = difference
                results.summary["verdicts"][method][f"miou_k{k}"] = verdict(difference, "miou", len(rows))
    return results


def _labelled_patches(
    comparison: Comparison, train: Examples, ignore_label: int, **options: Any
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The classes, the number of that of each patch of the training images, and their tokens for each method."""

    def label(raw: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
        classes = torch.stack([patch_classes(one, (raw.shape[1], raw.shape[2])) for one in truth]).flatten()
        counted = classes != ignore_label
        return raw.flatten(0, 2)[counted.to(raw.device)].cpu(), classes[counted]

    parts = _measured(comparison, train, label, phase="training images", **options)
    tokens, labels = zip(*(part.value for part in parts), strict=True)
    classes, targets = torch.cat(labels).unique(return_inverse=True)
    if len(classes) < 2:
        raise DataError(
            f"The training patches are of {len(classes)} class, {ignore_label} left out, but k-NN needs 2: "
            "give masks whose values are numbers of classes, or another ignore label."
        )
    raw = torch.cat(tokens).to(comparison.model.device)
    banks = {method: normalize(projection(raw), dim=-1) for method, projection in comparison.methods.items()}
    return classes, targets, banks


class Overlap(NamedTuple):
    """Numbers of the classes of an image, their pixels in both truth and guess, and their pixels in either."""

    classes: Tensor
    both: Tensor
    either: Tensor

    @classmethod
    def of(cls, truth: Tensor, guess: Tensor) -> "Overlap":
        """The overlap of two maps of classes, int64 of one shape."""
        classes, places = torch.stack((truth, guess)).unique(return_inverse=True)
        true, guessed = places.flatten(1)
        both, in_truth, in_guess = (
            part.bincount(minlength=len(classes)) for part in (true[true == guessed], true, guessed)
        )
        return cls(classes, both, in_truth + in_guess - both)

    def accuracy(self) -> float:
        """Share of the pixels that have the right class."""
        right, counted = int(self.both.sum()), int(self.either.sum())
        return 2 * right / (counted + right)  # a wrong pixel is counted for two classes, a right one for one

    def mean_iou(self) -> float:
        """Intersection over union, mean over the classes of the image."""
        return float((self.both / self.either).mean())


def _measured(
    comparison: Comparison,
    examples: Examples,
    measure: Callable[[Tensor, Tensor], Any],
    batch_size: int,
    phase: str,
    progress: bool,
) -> list[Part]:
    """What `measure` makes of raw patch tokens `(B, rows, columns, D)` and of each pixel's class, `(B, H, W)`."""

    def of_batch(values: list[tuple[Tensor, Tensor]]) -> Any:
        images, labels = zip(*values, strict=True)
        raw = comparison.raw_tokens(comparison.preprocess.normalize(torch.stack(images).float() / 255)).patches
        if raw.ndim != 4:
            raise LayoutError(f"Segmentation needs patches in rows and columns, not on a grid of {raw.ndim - 2} axes.")
        return measure(raw, torch.stack(labels))

    prepare = partial(_resized, size=comparison.preprocess.size)
    options: dict[str, Any] = {"share": comparison.share, "phase": phase, "progress": progress}
    return examples.measured(prepare, of_batch, batch_size, **options)


def _resized(example: Example, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The image, `(3, H, W)` uint8, and the class of each pixel, `(H, W)` int64."""
    mask = cast(Image.Image, example.mask)
    if mask.mode not in ("1", "L", "P", "I", "I;16"):
        raise DataError(
            f"The mask of {example.name} is of mode {mask.mode}; give masks of one channel whose values are numbers "
            "of classes."
        )
    labels = np.array(mask.resize(size[::-1], Image.Resampling.NEAREST)).astype(np.int64)
    return resized_view(example.image, size), torch.from_numpy(labels)


def patch_of_pixel(size: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """Number of the patch that each pixel lies in, `(H, W)` int64, on a grid that covers the image evenly.

    Example:
        >>> patch_of_pixel((2, 4), (1, 2))
        tensor([[0, 0, 1, 1],
                [0, 0, 1, 1]])
    """
    rows, columns = (torch.arange(length) * cells // length for length, cells in zip(size, grid, strict=True))
    return rows[:, None] * grid[1] + columns


def patch_classes(labels: Tensor, grid: tuple[int, int]) -> Tensor:
    """The class of most pixels of each patch, `(patches,)` int64; of two with as many, the one of lower number.

    `labels` `(H, W)` int64 are the classes of the pixels.

    Example:
        >>> patch_classes(torch.tensor([[7, 7, 3, 7], [7, 3, 3, 3]]), (1, 2))
        tensor([7, 3])
    """
    classes, numbers = labels.unique(return_inverse=True)
    places = patch_of_pixel((labels.shape[0], labels.shape[1]), grid) * len(classes) + numbers
    counts = places.flatten().bincount(minlength=grid[0] * grid[1] * len(classes))
    return classes[counts.view(-1, len(classes)).argmax(dim=1)]


def mean_iou_resamples(overlaps: Sequence[Overlap]) -> tuple[float, Tensor]:
    """Mean IoU over the classes of all images, and that of each bootstrap resample of the images, `(repeats,)`."""
    classes = torch.cat([one.classes for one in overlaps]).unique()
    both, either = torch.zeros(2, len(overlaps), len(classes), dtype=torch.float64)
    for number, one in enumerate(overlaps):
        columns = torch.searchsorted(classes, one.classes)
        both[number, columns], either[number, columns] = one.both.double(), one.either.double()
    values = [((counts @ both) / (counts @ either)).nanmean(dim=1) for counts in resamples(len(overlaps))]
    return float((both.sum(dim=0) / either.sum(dim=0)).mean()), torch.cat(values)
