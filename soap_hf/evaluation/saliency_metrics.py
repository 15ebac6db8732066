"""How well a mask or a saliency map finds an object: IoU, accuracy, F, S- and E-measure. Higher is better in all.

`mask` is a map `(H, W)` of bool, `saliency` one of floats in [0, 1], `truth` one of bool: the object.
"""

import numpy as np

LEVELS = 256
"""Thresholds of an F-measure curve: 0, 1/255, …, 1."""

BETA_SQUARED = 0.3
"""Weight of recall against precision, as all of salient object detection has it."""


def iou(mask: np.ndarray, truth: np.ndarray) -> float:
    """Intersection over union; 1 if both are empty.

    Example:
        >>> iou(np.array([[True, True, False]]), np.array([[False, True, True]]))
        0.3333333333333333
    """
    union = np.count_nonzero(mask | truth)
    return float(np.count_nonzero(mask & truth) / union) if union else 1.0


def accuracy(mask: np.ndarray, truth: np.ndarray) -> float:
    """Share of the pixels that are right."""
    return float(np.count_nonzero(mask == truth) / truth.size)


def f_measures(saliency: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """F-measure, (1 + b) P R / (b P + R) with b = 0.3, of what is at or above each of 256 thresholds; `(256,)`.

    Where nothing is right, as for an empty `truth`, it is 0. Maximal F is the largest value of the mean of such curves
    over images: one threshold holds for all. The first takes every pixel, so that no map does worse than that.
    """
    levels = (saliency * (LEVELS - 1)).astype(np.uint8)
    right, found = (
        np.cumsum(np.bincount(part, minlength=LEVELS)[::-1])[::-1] for part in (levels[truth], levels.ravel())
    )
    return (1 + BETA_SQUARED) * right / np.maximum(BETA_SQUARED * np.count_nonzero(truth) + found, 1)


def e_measure(mask: np.ndarray, truth: np.ndarray) -> float:
    """Enhanced-alignment measure (Fan et al., IJCAI 2018, arXiv 1805.10421, equations 2 to 5).

    It is defined for masks, and that of a saliency map is that of its mask. Of an empty or full `truth` it is the
    accuracy.
    """
    if truth.all() or not truth.any():
        return accuracy(mask, truth)
    of_mask, of_truth, of_both = (np.count_nonzero(part) / truth.size for part in (mask, truth, mask & truth))
    shares = {
        (0, 0): 1 - of_mask - of_truth + of_both,
        (0, 1): of_truth - of_both,
        (1, 0): of_mask - of_both,
        (1, 1): of_both,
    }
    total = 0.0
    for (found, true), share in shares.items():
        deviations = found - of_mask, true - of_truth
        alignment = 2 * deviations[0] * deviations[1] / (deviations[0] ** 2 + deviations[1] ** 2)
        total += share * (1 + alignment) ** 2 / 4
    return float(total)


def s_measure(saliency: np.ndarray, truth: np.ndarray) -> float:
    """Structure measure (Fan et al., ICCV 2017, arXiv 1708.00786): half likeness of the object, half of four regions.

    Of an empty `truth` it is the mean of `1 - saliency`, of a full one the mean of `saliency`.
    """
    share = float(truth.mean())
    if share in (0, 1):
        return float(np.abs(1 - share - saliency).mean())
    as_object = share * _object_likeness(saliency[truth]) + (1 - share) * _object_likeness(1 - saliency[~truth])
    return max(0.0, (as_object + _region_likeness(saliency, truth)) / 2)


def _object_likeness(values: np.ndarray) -> float:
    """How near to 1 all values are (equation 4)."""
    mean = values.mean()
    deviation = values.std(ddof=1) if len(values) > 1 else 0.0
    return float(2 * mean / (mean**2 + 1 + deviation))


def _region_likeness(saliency: np.ndarray, truth: np.ndarray) -> float:
    """Structural similarity in the four regions that meet at the object's centre of mass, weighted by their areas."""
    row, column = (int(centre.round()) + 1 for centre in np.argwhere(truth).mean(axis=0))
    total = 0.0
    for rows in (slice(row), slice(row, None)):
        for columns in (slice(column), slice(column, None)):
            part, true = saliency[rows, columns], truth[rows, columns]
            if part.size:
                total += part.size / truth.size * _structural_similarity(part, true.astype(np.float64))
    return total


def _structural_similarity(part: np.ndarray, true: np.ndarray) -> float:
    """SSIM of two regions without its stabilising constants; 1 if neither has contrast, as in the released code."""
    means, freedom = (part.mean(), true.mean()), max(part.size - 1, 1)
    deviations = part - means[0], true - means[1]
    variances = [np.square(deviation).sum() / freedom for deviation in deviations]
    covariance = (deviations[0] * deviations[1]).sum() / freedom
    numerator = 4 * means[0] * means[1] * covariance
    denominator = (means[0] ** 2 + means[1] ** 2) * (variances[0] + variances[1])
    if numerator == 0:
        return float(denominator == 0)
    return float(numerator / denominator)
