"""Images from data sets: sampling, sharing among processes, decoding, and naming those that cannot be read."""

import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from datasets import Dataset, IterableDataset
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data import IterableDataset as TorchIterableDataset

from ..compat import split_stream
from ..runtime.errors import DataError
from .data_sets import image_modes, undecoded
from .image_files import BadImage
from .loading import Batch, Example, ExampleReader, Item, Rows, collate, load, random_rows, read_item

SHUFFLE_BUFFER = 1000
"""Images held to shuffle a stream."""


class ImageSample:
    """A seeded random sample of a data set's images, read in the same order each time.

    Args:
        dataset (`Dataset` or `IterableDataset`): where the images are. A stream is shuffled through a buffer.
        column, mask_column (`str`): those that hold the images, and the masks if there are any.
        num_images (`int`, *optional*): how many to draw; all if there are fewer, or if `None`.
        seed (`int`, *optional*): names the sample; `None` keeps the order of the data set.
        in_order (`bool`, defaults to `False`): read a random sample in the order of the data set.
        skip (`int`, defaults to 0): images at the start of a stream's random order that are left out.
        resize_masks (`bool`, defaults to `True`): resize (nearest) a mask of another size than its image, or refuse.

    Attributes:
        rows (sequence of `int`, *optional*): rows of the data set in the order of reading; `None` for a stream.
        available (`int`, *optional*): how many images there are; `None` if nobody knows.
        skipped (`IterableDataset`, *optional*): of a stream, what was left out, undecoded.

    A `DataError` refuses other columns than of images, a stream without end, and fewer than 2 for a random sample.
    """

    def __init__(
        self,
        dataset: Dataset | IterableDataset,
        column: str,
        num_images: int | None,
        seed: int | None,
        *,
        in_order: bool = False,
        skip: int = 0,
        mask_column: str | None = None,
        resize_masks: bool = True,
    ):
        self.column = column
        self.streamed = isinstance(dataset, IterableDataset)
        self.rows: Sequence[int] | None = None
        self.available: int | None
        self.skipped: IterableDataset | None = None
        images = undecoded(dataset, column, mask_column)
        self._example_of = ExampleReader(column, mask_column, resize_masks, image_modes(images))
        if isinstance(images, IterableDataset):
            if num_images is None:
                refuse_endless(images)
            stream = images if seed is None else images.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER)
            self.skipped = stream.take(skip) if skip else None
            self._images: Any = stream if num_images is None else stream.take(skip + num_images)
            self.available = num_images
        else:
            self.rows = random_rows(len(images), num_images, seed, in_order=in_order)
            self._images, self.available = images.select(self.rows), len(self.rows)
            if self.available < 2 and seed is not None:
                raise DataError(f"At least 2 images are needed, but the data set has {self.available}.")
        self._seed, self._skip = seed or 0, skip
        # a stream that is read to its end may be split by its files; a sample of it must be the same for any number
        # of processes, so that each reads all files and keeps its share
        self.in_parts = self.streamed and num_images is None and not skip

    def example(self, row: dict[str, Any], position: int) -> Example | BadImage:
        """What one row holds; a `DataError` if its mask has another size, and masks may not be resized."""
        number, of = (position, " of the sample") if self.rows is None else (self.rows[position], "")
        return self._example_of(row, number, of)

    def batches(
        self,
        prepare: Callable[[Example], Any],
        batch_size: int,
        num_workers: int | None = None,
        *,
        start: int = 0,
        stop: int = sys.maxsize,
        rank: int = 0,
        num_processes: int = 1,
    ) -> Iterator[Batch]:
        """What `prepare` makes of the images from position `start` up to `stop`, or of this process's share of them.

        Processes take turns: batch by batch, or image by image of a stream. After equally many batches each, they have
        read every position up to a common one.

        `prepare` runs in the `num_workers` processes that decode; default: what the machine and the sample allow. A
        batch has fewer than `batch_size` images where some cannot be read. A `SOAPError` of `prepare` is
        raised; what else it raises makes the image a bad one.
        """
        num_workers = default_workers(self.available) if num_workers is None else num_workers
        read = partial(read_item, example_of=self.example, prepare=prepare)
        images: TorchDataset
        loading: dict[str, Any]
        if self.streamed:
            rows = split_stream(self._images, rank, num_processes, "auto" if self.in_parts else "examples")
            # `skip` of datasets 4.8 passes over other rows than those that `take` gives: they are counted here
            positions = range(rank - self._skip, sys.maxsize, num_processes)
            images = _Stream(rows, read, positions, range(start, stop))
            loading = {"batch_size": batch_size, "num_workers": min(num_workers, 1)}
        else:
            images, stop = Rows(self._images, read), min(len(self._images), stop)
            turns = range(start + rank * batch_size, stop, num_processes * batch_size)
            shares = [range(first, min(first + batch_size, stop)) for first in turns]
            loading = {"batch_sampler": shares, "num_workers": num_workers}
        for batch in load(images, self._seed, collate_fn=collate, **loading):
            if batch.refusal is not None:
                raise batch.refusal
            yield batch


def default_workers(num_images: int | None) -> int:
    """Processes that decode so many images (`None`: nobody knows how many) for this process."""
    # starting one costs more than decoding a few images, and unless forked it runs an unguarded script again
    if (num_images is not None and num_images < 200) or multiprocessing.get_start_method() != "fork":
        return 0
    on_this_machine = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return min(4, max(1, (os.cpu_count() or 1) // on_this_machine - 1))


def links_of(stream: IterableDataset) -> Iterator[Any]:
    """What `datasets` has linked up to make a stream, from its end to its source."""
    link = getattr(stream, "_ex_iterable", None)
    while link is not None:
        yield link
        link = getattr(link, "ex_iterable", None)


def refuse_endless(stream: IterableDataset) -> None:
    """Refuses a stream that has no end; a `DataError` says the way out."""
    if any(type(link).__name__ == "RepeatExamplesIterable" and link.num_times is None for link in links_of(stream)):
        raise DataError("The stream repeats itself for ever; say how many images to read with num_images.")


class _Stream(TorchIterableDataset):
    def __init__(self, rows: Any, read: Any, positions: range, wanted: range):
        self.rows, self.read, self.positions, self.wanted = rows, read, positions, wanted

    def __iter__(self) -> Iterator[Item]:
        # unlike iterating over the rows themselves, `iter` gives one order in every process
        for position, batch in zip(self.positions, self.rows.iter(batch_size=1), strict=False):
            if position >= self.wanted.stop:
                return
            if position in self.wanted:
                yield self.read({name: values[0] for name, values in batch.items()}, position)
