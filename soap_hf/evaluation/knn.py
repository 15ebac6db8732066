"""Image classification by weighted k-NN on frozen features: does cleaning help or harm?"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..heads.running import RawTokens
from ..runtime.errors import DataError, SOAPError
from .comparison import Comparison
from .examples import Examples, short_names
from .results import Results

NEIGHBOURS = (1, 5, 10, 20)
"""Numbers of neighbours that are reported."""

TEMPERATURE = 0.07
"""A neighbour's vote weighs `exp(cosine / TEMPERATURE)` (Wu et al. 2018, arXiv 1805.01978)."""

BLOCK = 4096
"""Queries, and vectors that are searched, in one product."""


def evaluate_knn(
    comparison: Comparison,
    train: Examples,
    test: Examples,
    *,
    neighbours: Sequence[int] = NEIGHBOURS,
    batch_size: int = 32,
    progress: bool = True,
    command: str | None = None,
) -> Results:
    """Classifies test images by their nearest training images, on raw and clean features of the same forward pass.

    Features are the CLS token where there is one (`cls`, which cleaning leaves as it is), the mean of the patch tokens
    (`mean`), and both, each of length 1, side by side (`cls_mean`).

    Args:
        comparison ([`Comparison`]): the head and its methods.
        train, test ([`Examples`]): images with labels.
        neighbours (sequence of `int`, defaults to `(1, 5, 10, 20)`): the numbers `k` of neighbours.
        batch_size (`int`, defaults to 32): images in a forward pass.
        progress (`bool`, defaults to `True`): show bars.
        command (`str`, *optional*): noted in the summary.

    Returns:
        [`Results`]: one row per test image; `<method>_<feature>_k<k>` is 1 if it was classified rightly, else 0.

    Raises:
        SOAPError: a `k` below 1.
        DataError: a single class, one with fewer training images than the largest `k`, or one of the test images that
            has none; raised before any image is read.

    Example:
        >>> from datasets import Dataset
        >>> from PIL import Image
        >>> from transformers import ViTConfig, ViTModel
        >>> from soap_hf import SOAPModelWrapper
        >>> vit = ViTModel(ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
        ...                          image_size=32, patch_size=8))
        >>> shades = [(20 * i, 0, 0) for i in range(6)] + [(0, 0, 150 + 20 * i) for i in range(6)]
        >>> images = [Image.new("RGB", (32, 32), shade) for shade in shades]
        >>> images = Dataset.from_dict({"image": images, "label": ["red"] * 6 + ["blue"] * 6})
        >>> halves = (images.shard(2, part, contiguous=False) for part in (0, 1))
        >>> train, test = (Examples(half, label_column="label") for half in halves)
        >>> comparison = Comparison.of(SOAPModelWrapper.from_backbone(vit, None))
        >>> found = evaluate_knn(comparison, train, test, neighbours=(1, 3), progress=False)
        >>> found.summary["means"].keys(), found.summary["counts"]["test_images"]
        (dict_keys(['raw', 'soap']), 6)
    """
    refuse_bad_neighbours(neighbours)
    classes = _classes(train, test, max(neighbours))
    bank_rows, bank = _features(comparison, train, batch_size, "training images", progress)
    query_rows, queries = _features(comparison, test, batch_size, "test images", progress)
    targets = torch.tensor([classes[row["label"]] for row in bank_rows])
    truth = torch.tensor([classes[row["label"]] for row in query_rows])
    for name, wanted in queries.items():
        similarities, found = (part.cpu() for part in nearest(wanted, bank[name], max(neighbours)))
        for k in neighbours:
            guesses = weighted_vote(similarities[:, :k], targets[found[:, :k]], len(classes)).argmax(dim=1)
            for row, right in zip(query_rows, (guesses == truth).tolist(), strict=True):
                row[f"{name}_k{k}"] = int(right)
    metrics = [f"{feature}_k{k}" for feature in ("cls", "mean", "cls_mean") for k in neighbours]
    counts = {
        "test_images": len(query_rows),
        "training_images": len(bank_rows),
        "classes": len(classes),
        "bad_images": len(train.bad_images) + len(test.bad_images),
    }
    return comparison.results("knn", query_rows, metrics, counts=counts, command=command, temperature=TEMPERATURE)


def refuse_bad_neighbours(neighbours: Sequence[int]) -> None:
    """Refuses, with a `SOAPError`, numbers of neighbours of which one is below 1, or none at all."""
    if not neighbours or min(neighbours) < 1:
        raise SOAPError(f"k must be a whole number of neighbours from 1 upwards, not {list(neighbours)}.")


def nearest(queries: Tensor, bank: Tensor, k: int, *, block: int = BLOCK) -> tuple[Tensor, Tensor]:
    """Exact search for the `k` vectors of largest cosine; no product is larger than `block` x `block`.

    `queries` `(Q, D)` and `bank` `(N, D)` hold vectors of length 1. Gives cosines and rows of the bank, both `(Q, k)`,
    by decreasing cosine.

    Raises:
        DataError: the bank has fewer than `k` vectors.

    Example:
        >>> cosines, rows = nearest(torch.tensor([[1.0, 0.0]]), torch.eye(2), k=1)
        >>> cosines.item(), rows.item()
        (1.0, 0)
    """
    if len(bank) < k:
        raise DataError(f"A search for {k} neighbours needs as many vectors, but there are {len(bank)}.")
    found = []
    for part in queries.split(block):
        best, rows = part.new_empty(len(part), 0), part.new_empty(len(part), 0, dtype=torch.int64)
        for start in range(0, len(bank), block):
            cosines, places = (part @ bank[start : start + block].T).topk(min(k, len(bank) - start, block))
            best, rows = torch.cat((best, cosines), dim=1), torch.cat((rows, places + start), dim=1)
            best, order = best.topk(min(k, best.shape[1]))
            rows = rows.gather(1, order)
        found.append((best, rows))
    return torch.cat([cosines for cosines, _ in found]), torch.cat([rows for _, rows in found])


def weighted_vote(similarities: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Share of the votes that each class gets from the neighbours, whose votes weigh `exp(similarity / 0.07)`.

    `similarities` `(Q, k)` are the neighbours' cosines, `labels` `(Q, k)` int64 their classes; shares are `(Q, C)`.
    """
    weights = torch.softmax(similarities / TEMPERATURE, dim=1)
    return weights.new_zeros(len(weights), num_classes).scatter_add_(1, labels, weights)


def _classes(train: Examples, test: Examples, k: int) -> dict[str, int]:
    """Numbers of the classes by name."""
    sizes = Counter(train.labels)
    drawn = len(train) < train.num_available
    among = f" in the sample of {len(train)} of {train.num_available}" if drawn else ""
    more = "draw more (--num-train, num_images=…), " if drawn else ""
    if len(sizes) < 2:
        way_out = f"; {more.removesuffix(', ')}" if drawn else ""
        raise DataError(f"The training images{among} are of {len(sizes)} class, but k-NN needs at least 2{way_out}.")
    name, size = min(sizes.items(), key=lambda item: item[1])
    if size < k:
        few = f"Class {name!r} has {size} training images{among}, fewer than k = {k}"
        raise DataError(f"{few}; {more}leave it out or lower k.")
    if unknown := sorted(set(test.labels) - set(sizes)):
        lacking = f"Class {unknown[0]!r} of the test images has no training image{among}"
        raise DataError(f"{lacking}; {more}leave it out or add some.")
    return {name: number for number, name in enumerate(sorted(sizes))}


def _features(
    comparison: Comparison, examples: Examples, batch_size: int, phase: str, progress: bool
) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """The images, one row per image, and their features of length 1, `(N, ·)`, by `<method>_<feature>`."""

    def measure(raw: RawTokens) -> tuple[Tensor, Tensor | None]:
        return raw.patches.flatten(1, -2).mean(dim=1).cpu(), None if raw.cls is None else raw.cls.cpu().clone()

    parts = comparison.measured(examples, measure, batch_size, phase=phase, progress=progress)
    names = short_names([name for part in parts for name in part.names])
    labels = [examples.labels[position] for part in parts for position in part.positions]
    rows = [{"image": name, "label": label} for name, label in zip(names, labels, strict=True)]
    device = comparison.model.device
    mean = torch.cat([part.value[0] for part in parts]).to(device)
    cls = [part.value[1] for part in parts if part.value[1] is not None]
    features = {"raw_cls": normalize(torch.cat(cls).to(device), dim=-1)} if cls else {}
    for name, projection in comparison.methods.items():
        clean = normalize(projection(mean), dim=-1)  # the mean of clean tokens: a projection is linear
        features[f"{name}_mean"] = clean
        if cls:
            features[f"{name}_cls_mean"] = normalize(torch.cat((features["raw_cls"], clean), dim=-1), dim=-1)
    return rows, features
