"""Images from data sets: sampling, sharing among processes, decoding, and naming those that cannot be read."""

import multiprocessing
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from datasets import Dataset, IterableDataset
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data import IterableDataset as TorchIterableDataset
from tqdm.auto import tqdm
from transformers.utils import logging

from ..compat import split_stream
from ..runtime.errors import DataError, SOAPError, first_sentence
from .data_sets import undecoded
from .image_files import BadImage, image_name, image_path, read_image, stop_if_too_many_bad, turned_with_image
from .preprocessing import to_rgb

logger = logging.get_logger(__name__)

SHUFFLE_BUFFER = 1000
"""Images held to shuffle a stream."""


class Example(NamedTuple):
    """One image: its name, its pixels (RGB), its mask (as the file has it), if there are masks, its number and path.

    The number is its row in the data set, or its position in a stream; one that is no file has no path.
    """

    name: str
    image: Image.Image
    mask: Image.Image | None = None
    row: int = 0
    path: str | None = None
    notes: Sequence[str] = ()


class Batch(NamedTuple):
    """Some images of a sample: what was made of the readable ones, their names, positions, paths; and the bad ones."""

    values: Any  # a tensor of all of them if it is a tensor each, else a list
    names: list[str]
    positions: list[int]
    bad: list[BadImage]
    paths: list[str | None]
    notes: list[tuple[str, str]]  # what was done to which
    refusal: SOAPError | None  # why the images are not to be used at all

    @property
    def num_images(self) -> int:
        """How many there are, the bad ones among them."""
        return len(self.positions) + len(self.bad)


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
        bad_images (`list[BadImage]`): those that `read` could not read.

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
        self.column, self.mask_column, self.resize_masks = column, mask_column, resize_masks
        self.streamed = isinstance(dataset, IterableDataset)
        self.rows: Sequence[int] | None = None
        self.available: int | None
        self.skipped: IterableDataset | None = None
        images = undecoded(dataset, column, mask_column)
        if isinstance(images, IterableDataset):
            if num_images is None and _repeats_for_ever(images):
                raise DataError("The stream repeats itself for ever; say how many images to read with num_images.")
            stream = images if seed is None else images.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER)
            self.skipped = stream.take(skip) if skip else None
            self._images: Any = stream if num_images is None else stream.take(skip + num_images)
            self.available = num_images
        else:
            order: Any = range(len(images))
            if seed is not None:
                order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed)).tolist()
            self.rows = sorted(order[:num_images]) if in_order else order[:num_images]
            self._images, self.available = images.select(self.rows), len(self.rows)
            if self.available < 2 and seed is not None:
                raise DataError(f"At least 2 images are needed, but the data set has {self.available}.")
        self._seed, self._skip = seed or 0, skip
        self.bad_images: list[BadImage] = []
        # a stream that is read to its end may be split by its files; a sample of it must be the same for any number
        # of processes, so that each reads all files and keeps its share
        self.in_parts = self.streamed and num_images is None and not skip

    def example(self, row: dict[str, Any], position: int) -> Example | BadImage:
        """What one row holds; a `DataError` if its mask has another size, and masks may not be resized."""
        number, of = (position, " of the sample") if self.rows is None else (self.rows[position], "")
        path, name = image_path(row[self.column]), image_name(row[self.column], f"row {number}{of}")
        image = read_image(row[self.column], name, to_rgb)
        if isinstance(image, BadImage):
            return image
        if self.mask_column is None:
            return Example(name, image, row=number, path=path)
        mask = read_image(row[self.mask_column], f"mask of {name}")
        if isinstance(mask, BadImage):
            return mask
        mask, notes = turned_with_image(mask, row[self.mask_column], image, row[self.column])
        if mask.size != image.size:
            if not self.resize_masks:
                raise DataError(
                    f"The mask of {name} has {mask.width} x {mask.height} pixels, but the image {image.width} x "
                    f"{image.height}; mend it, or let masks be resized."
                )
            if abs(mask.width * image.height / mask.height - image.width) > max(2, 0.02 * image.width):
                notes = [*notes, "masks have another aspect ratio than their images, and were stretched"]
            mask = mask.resize(image.size, Image.Resampling.NEAREST)
        return Example(name, image, mask, number, path, notes)

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
        read = partial(_read, sample=self, prepare=prepare)
        images: TorchDataset
        loading: dict[str, Any]
        if self.streamed:
            rows = split_stream(self._images, rank, num_processes, "auto" if self.in_parts else "examples")
            # `skip` of datasets 4.8 passes over other rows than those that `take` gives: they are counted here
            positions = range(rank - self._skip, sys.maxsize, num_processes)
            images = _Stream(rows, read, positions, range(start, stop))
            loading = {"batch_size": batch_size, "num_workers": min(num_workers, 1)}
        else:
            images, stop = _Rows(self._images, read), min(len(self._images), stop)
            turns = range(start + rank * batch_size, stop, num_processes * batch_size)
            shares = [range(first, min(first + batch_size, stop)) for first in turns]
            loading = {"batch_sampler": shares, "num_workers": num_workers}
        generator = torch.Generator().manual_seed(self._seed)  # else it draws from the global one
        pin = torch.cuda.is_available()  # copies to the accelerator then overlap with its work
        for batch in DataLoader(images, collate_fn=_collate, generator=generator, pin_memory=pin, **loading):
            if batch.refusal is not None:
                raise batch.refusal
            yield batch

    def read(
        self,
        prepare: Callable[[Example], Any],
        batch_size: int = 1,
        num_workers: int | None = None,
        *,
        max_bad_fraction: float,
        phase: str = "images",
        progress: bool = False,
    ) -> Iterator[Batch]:
        """All images in this process: batches that hold a readable one; the others are skipped, counted and named.

        A share of `max_bad_fraction` may be unreadable, and one always; a `DataError` names more. `phase` names the
        bar that `progress` shows; the other arguments are those of `batches`.
        """
        self.bad_images = []
        noted: dict[str, list[str]] = {}
        seen, expected = 0, SHUFFLE_BUFFER if self.available is None else self.available
        with tqdm(total=self.available, desc=phase, unit=" images", disable=not progress) as bar:
            for batch in self.batches(prepare, batch_size, num_workers):
                self.bad_images += batch.bad
                for note, name in batch.notes:
                    noted.setdefault(note, []).append(name)
                seen += batch.num_images
                stop_if_too_many_bad(self.bad_images, max_bad_fraction, seen, max(seen, expected))
                if batch.positions:
                    yield batch
                bar.update(batch.num_images)
        if self.bad_images:
            names = ", ".join(map(str, self.bad_images))
            logger.warning(f"{len(self.bad_images)} unreadable images were skipped: {names}.")
        for note, which in noted.items():
            logger.warning(f"{len(which)} {note}: {', '.join(which[:5])}{' …' if len(which) > 5 else ''}.")


def default_workers(num_images: int | None) -> int:
    """Processes that decode so many images (`None`: nobody knows how many) for this process."""
    # starting one costs more than decoding a few images, and unless forked it runs an unguarded script again
    if (num_images is not None and num_images < 200) or multiprocessing.get_start_method() != "fork":
        return 0
    on_this_machine = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return min(4, max(1, (os.cpu_count() or 1) // on_this_machine - 1))


def _repeats_for_ever(stream: IterableDataset) -> bool:
    link = getattr(stream, "_ex_iterable", None)
    while link is not None and not (type(link).__name__ == "RepeatExamplesIterable" and link.num_times is None):
        link = getattr(link, "ex_iterable", None)
    return link is not None


class Item(NamedTuple):
    """What was made of the image at one position, and its name; or why nothing was."""

    position: int
    value: Any
    name: str = ""
    path: str | None = None
    notes: Sequence[str] = ()


def _read(row: dict[str, Any], position: int, sample: ImageSample, prepare: Callable[[Example], Any]) -> Item:
    try:
        example = sample.example(row, position)
    except SOAPError as error:  # raised in a process that decodes, it would bring that one's traceback along
        return Item(position, error)
    try:
        if isinstance(example, BadImage):
            return Item(position, example, example.name)
        return Item(position, prepare(example), example.name, example.path, example.notes)
    except SOAPError as error:
        return Item(position, error)
    except Exception as error:  # resizing raises what it likes, and a MemoryError means this image alone
        return Item(position, BadImage(example.name, first_sentence(error)))


class _Rows(TorchDataset):
    def __init__(self, rows: Dataset, read: Any):
        self.rows, self.read = rows, read

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, position: int) -> Item:
        return self.read(self.rows[position], position)


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


def _collate(items: Iterable[Item]) -> Batch:
    items = list(items)
    refusal = next((item.value for item in items if isinstance(item.value, SOAPError)), None)
    bad = [item.value for item in items if isinstance(item.value, BadImage)]
    good = [item for item in items if not isinstance(item.value, (BadImage, SOAPError))]
    values: Any = [item.value for item in good]
    if good and refusal is None and all(isinstance(value, Tensor) for value in values):
        values = torch.stack(values)
    names, positions, paths = ([getattr(item, part) for item in good] for part in ("name", "position", "path"))
    notes = [(note, item.name) for item in good for note in item.notes]
    return Batch(values, names, positions, bad, paths, notes, refusal)
