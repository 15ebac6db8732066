"""Images from data sets: sampling, sharing among processes, decoding, and naming those that cannot be read."""

import multiprocessing
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from datasets import Dataset, IterableDataset
from datasets.distributed import split_dataset_by_node
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data import IterableDataset as TorchIterableDataset

from .data import undecoded
from .errors import DataError
from .image_files import BadImage, read_image
from .preprocessing import ImagePreprocessor, to_rgb

SHUFFLE_BUFFER = 1000
"""Images held to shuffle a stream."""


class Batch(NamedTuple):
    """Images of a sample: `pixels` `(B, 3, H, W)` float32 of the readable ones (`None` if there is none), their
    `positions` in the order of the sample, and those that are `bad`."""

    pixels: Tensor | None
    bad: list[BadImage]
    positions: list[int]


class ImageSample:
    """A seeded random sample of a data set's images, read in the same order each time.

    Args:
        dataset (`Dataset` or `IterableDataset`): where the images are. A stream is shuffled through a buffer.
        column (`str`): the image column.
        num_images (`int`, *optional*): how many to draw; all if there are fewer, or if `None`.
        seed (`int`, *optional*): names the sample; `None` keeps the order of the data set.

    Raises:
        DataError: no such column, not images, a stream without end, or fewer than 2 for a random sample.
    """

    def __init__(self, dataset: Dataset | IterableDataset, column: str, num_images: int | None, seed: int | None):
        self.column = column
        self.streamed = isinstance(dataset, IterableDataset)
        dataset = undecoded(dataset, column)
        if isinstance(dataset, IterableDataset):
            if num_images is None and _repeats_for_ever(dataset):
                raise DataError("The stream repeats itself for ever; say how many images to read with num_images.")
            stream = dataset if seed is None else dataset.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER)
            self._rows: Any = stream if num_images is None else stream.take(num_images)
            self.available = num_images
        else:
            self._rows = dataset.select(_order(len(dataset), seed)[:num_images])
            self.available = len(self._rows)
            if self.available < 2 and seed is not None:
                raise DataError(f"A fit needs at least 2 images, but the data set has {self.available}.")
        self._seed = seed or 0
        # a stream that is read to its end may be split by its files; a sample of it must be the same for any number
        # of processes, so that each reads all files and keeps its share
        self.in_parts = self.streamed and num_images is None

    def batches(
        self,
        preprocess: ImagePreprocessor,
        batch_size: int,
        num_workers: int = 0,
        *,
        start: int = 0,
        stop: int | None = None,
        rank: int = 0,
        num_processes: int = 1,
    ) -> Iterator[Batch]:
        """Reads the images from position `start` up to `stop`, or this process's share of them.

        Processes take turns: batch by batch, or image by image of a stream. After equally many batches each, they have
        read every position up to a common one.
        """
        read = partial(_read, column=self.column, preprocess=preprocess)
        how: dict[str, Any]
        if self.streamed:
            strategy = "auto" if self.in_parts else "examples"
            rows = split_dataset_by_node(self._rows, rank, num_processes, strategy=strategy)
            images: TorchDataset = _Stream(rows, read, start, stop, rank, num_processes)
            how = {"batch_size": batch_size, "num_workers": min(num_workers, 1)}
        else:
            images, end = _Rows(self._rows, read), min(len(self._rows), sys.maxsize if stop is None else stop)
            turns = range(start + rank * batch_size, end, num_processes * batch_size)
            shares = [range(first, min(first + batch_size, end)) for first in turns]
            how = {"batch_sampler": shares, "num_workers": num_workers}
        generator = torch.Generator().manual_seed(self._seed)
        pin = torch.cuda.is_available()  # copies to the accelerator then overlap with its work
        yield from DataLoader(images, collate_fn=_collate, generator=generator, pin_memory=pin, **how)


def default_workers(num_images: int | None) -> int:
    """Processes that decode so many images (`None`: nobody knows how many) for this process."""
    # starting a process costs more than decoding a few images
    if num_images is not None and num_images < 200:
        return 0
    if multiprocessing.get_start_method() != "fork":  # others run an unguarded script again in each process
        return 0
    on_this_machine = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return min(4, max(1, (os.cpu_count() or 1) // on_this_machine - 1))


def _order(length: int, seed: int | None) -> Sequence[int]:
    if seed is None:
        return range(length)
    return torch.randperm(length, generator=torch.Generator().manual_seed(seed)).tolist()


def _read(row: dict[str, Any], number: int, column: str, preprocess: ImagePreprocessor) -> Tensor | BadImage:
    image = read_image(row[column], f"row {number} of the sample", to_rgb)
    return image if isinstance(image, BadImage) else preprocess(image)


def _repeats_for_ever(stream: IterableDataset) -> bool:
    link = getattr(stream, "_ex_iterable", None)
    while link is not None:
        if type(link).__name__ == "RepeatExamplesIterable" and link.num_times is None:
            return True
        link = getattr(link, "ex_iterable", None)
    return False


Item = tuple[int, Tensor | BadImage]
"""Position in the sample, and what was read there."""


class _Rows(TorchDataset):
    def __init__(self, rows: Dataset, read: Any):
        self.rows, self.read = rows, read

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> Item:
        return number, self.read(self.rows[number], number)


class _Stream(TorchIterableDataset):
    def __init__(self, rows: IterableDataset, read: Any, start: int, stop: int | None, rank: int, num_processes: int):
        self.rows, self.read = rows, read
        self.wanted = range(start, sys.maxsize if stop is None else stop)
        self.positions = range(rank, sys.maxsize, num_processes)

    def __iter__(self) -> Iterator[Item]:
        # unlike iterating over the rows themselves, `iter` gives one order in every process
        for number, batch in zip(self.positions, self.rows.iter(batch_size=1), strict=False):
            if number >= self.wanted.stop:
                return
            if number in self.wanted:
                yield number, self.read({name: values[0] for name, values in batch.items()}, number)


def _collate(items: Iterable[Item]) -> Batch:
    items = list(items)
    bad = [item for _, item in items if isinstance(item, BadImage)]
    good = {position: item for position, item in items if isinstance(item, Tensor)}
    return Batch(torch.stack(list(good.values())) if good else None, bad, list(good))
