"""Images in memory as data sets: lists of paths or images, and the data sets of torch."""

from collections.abc import Iterator, Sequence
from typing import Any

from datasets import Dataset, Features, IterableDataset
from datasets import Image as ImageFeature
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data import IterableDataset as TorchIterableDataset
from torch.utils.data import Subset

from ..runtime.errors import DataError
from .loading import random_rows
from .pictures import as_file, picture_of


def is_torch(dataset: Any) -> bool:
    """Whether this is a data set of torch, and none of `datasets`."""
    return isinstance(dataset, TorchDataset) and not isinstance(dataset, (Dataset, IterableDataset))


def data_set_of(items: Sequence[Any] | TorchDataset, column: str = "image", rows: Sequence[int] | None = None) -> Any:
    """Images as a data set with one column: files by their paths, others as bytes in memory.

    Args:
        items (sequence or torch data set): images, as `open_picture` takes them, tuples that start with one, or dicts.
        column (`str`): of the result, and of dicts.
        rows (sequence of `int`, *optional*): those that are wanted; default: all.

    Raises:
        DataError: an item is no image, or is not there.
    """
    numbers = range(len(items)) if rows is None else rows  # type: ignore[arg-type]
    named = ((f"item {number}", items[number]) for number in numbers)
    files = [as_file(picture_of(item, name, column), name) for name, item in named]
    return Dataset.from_dict({column: files}, features=Features({column: ImageFeature()}))


def stream_of(dataset: TorchDataset, column: str = "image") -> IterableDataset:
    """A data set of torch as a stream, in its order; each item is made when it is read."""
    if not isinstance(dataset, TorchIterableDataset) and not hasattr(dataset, "__len__"):
        raise DataError(f"{type(dataset).__name__} has neither a length nor an order of its own; give it __len__.")
    how: Any = {"features": Features({column: ImageFeature()})}
    return IterableDataset.from_generator(_rows, gen_kwargs={"dataset": dataset, "column": column}, **how)


def in_random_order(dataset: Any, seed: int) -> Any:
    """A data set of torch of known length in a random order, since it may be sorted; another as it is."""
    if not is_torch(dataset) or isinstance(dataset, TorchIterableDataset) or not hasattr(dataset, "__len__"):
        return dataset
    return Subset(dataset, random_rows(len(dataset), None, seed))


def _rows(dataset: Any, column: str) -> Iterator[dict[str, Any]]:
    items = dataset if isinstance(dataset, TorchIterableDataset) else (dataset[at] for at in range(len(dataset)))
    for number, item in enumerate(items):
        name = f"item {number}"
        yield {column: as_file(picture_of(item, name, column), name)}
