"""All images of a data set in blocks of rows, in order: processes share the blocks, and any may be left out."""

import hashlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import pyarrow as pa
from datasets import Audio, Dataset, Features, IterableDataset, Video
from datasets import Image as ImageFeature
from torch.utils.data import IterableDataset as TorchIterableDataset
from torch.utils.data import get_worker_info
from tqdm.auto import tqdm
from transformers.utils import logging

from ..runtime.errors import DataError
from .data_sets import image_modes, undecoded
from .image_files import BadImage
from .image_sample import default_workers, links_of, refuse_endless
from .loading import Batch, Example, ExampleReader, Item, Rows, Tally, as_data_errors, collate, load, read_item

logger = logging.get_logger(__name__)

FIRST_ROWS = 100
"""Rows of a stream from which the types of its columns are read, if it does not say them."""

KEEP_FILES_APART = {
    f"{name}Iterable"
    for name in (
        *("ArrowExamples", "Examples", "FilteredExamples", "FormattedExamples", "MappedExamples"),
        *("RebatchedArrowExamples", "SelectColumns", "TypedExamples"),
    )
}
"""Links of a stream under which each of its files has the same rows, be it read alone or after others."""


class Block(NamedTuple):
    """Some rows in a row: of which source (a file of a stream that is read by files, else 0), and which of them."""

    source: int
    number: int


class BlockBatch(NamedTuple):
    """A batch of a block's images, the other columns of the readable ones, and whether their source ends with it."""

    block: Block
    batch: Batch
    columns: pa.Table | None
    ends: bool


class ImageBlocks:
    """A data set's images and other columns, in its order.

    Args:
        dataset (`Dataset` or `IterableDataset`): where they are.
        column, mask_column (`str`): those that hold the images, and the masks if they are wanted.
        num_images (`int`, *optional*): how many to read, from the beginning; default: all.
        by_files (`bool`, defaults to `False`): read a stream file by file, so that a process need not read the files
            of others. Where its files cannot be told apart (after `take`, say), or `num_images` counts across them,
            it is read as one.

    Attributes:
        num_rows (`int`, *optional*): how many there are; `None` for a stream.
        num_sources (`int`): files of a stream that is read file by file, else 1.
        columns (`Features`): the other columns; images, sounds and videos are left out.

    Raises:
        DataError: no column of images, an endless stream without `num_images`, or a transform.
    """

    def __init__(
        self,
        dataset: Dataset | IterableDataset,
        column: str,
        *,
        mask_column: str | None = None,
        num_images: int | None = None,
        by_files: bool = False,
    ):
        undecoded(dataset, column, mask_column)  # refuses
        if isinstance(dataset, IterableDataset) and num_images is None:
            refuse_endless(dataset)
        dataset = _with_types(dataset.with_format(None))
        others = {name: kind for name, kind in dataset.features.items() if name not in (column, mask_column)}
        self.columns = Features({name: kind for name, kind in others.items() if not _is_media(kind)})
        left_out = [name for name in others if name not in self.columns]
        if left_out:
            logger.warning(f"Columns of images, sounds or videos are left out of the features: {', '.join(left_out)}.")
        self._images = undecoded(dataset, column, mask_column, list(self.columns))
        self.column, self.num_images = column, num_images
        self._example_of = ExampleReader(column, mask_column, modes=image_modes(self._images))
        self.num_rows, self.num_sources = None, 1
        if isinstance(self._images, IterableDataset):
            if by_files and num_images is None and _keeps_files_apart(self._images):
                self.num_sources = self._images.num_shards
        else:
            self.num_rows = len(dataset) if num_images is None else min(len(dataset), num_images)
            self._others = self._images.select_columns(list(self.columns)).with_format("arrow")

    def bytes_per_row(self) -> float:
        """What the other columns take, as far as it is known before they are read."""
        if self.num_rows is None or not self.columns or not self.num_rows:
            return 0
        first = self._others[: min(FIRST_ROWS, self.num_rows)]
        return first.nbytes / first.num_rows

    def digest_of_first(self) -> str | None:
        """Names the first image by its content; `None` of a stream, or if it cannot be read."""
        if not self.num_rows:
            return None
        image = self._example_of(self._images[0], 0)
        return None if isinstance(image, BadImage) else hashlib.sha256(image.image.tobytes()).hexdigest()[:16]

    def tables(self, columns: list[str]) -> Iterator[pa.Table]:
        """Some of the other columns, part by part; nothing of a stream, which would be read for it."""
        if self.num_rows and columns:
            yield from self._others.select(range(self.num_rows)).select_columns(columns).iter(batch_size=100_000)

    def read(
        self,
        prepare: Callable[[Example], Any],
        batch_size: int,
        num_workers: int | None,
        *,
        size: int,
        wanted: Callable[[Block], bool],
        sources: Callable[[int], bool] = lambda source: True,
        max_bad_fraction: float,
        phase: str,
        progress: bool,
    ) -> Iterator[BlockBatch]:
        """The batches of the blocks that are wanted, in order; none lies across the border of a block.

        Args:
            prepare: makes of each image what the batch holds, in one of the `num_workers` processes that decode.
            batch_size, size (`int`): images of a batch, and of a block.
            wanted, sources: which blocks and which sources are to be read.
            max_bad_fraction, phase, progress: as in [`ImageSample.read`]; batches without a readable image come, too.

        Raises:
            DataError: too many unreadable images, or the data set stopped giving any.
        """
        if num_workers is None:
            num_workers = default_workers(self.num_rows)
            num_workers = min(num_workers, 1) if self.num_rows is None else num_workers  # each would read the stream
        read = partial(read_item, example_of=self._example_of, prepare=prepare)
        how: dict[str, Any] = {"size": size, "wanted": wanted, "num_workers": num_workers}
        if isinstance(self._images, IterableDataset):
            batches = self._stream_batches(self._images, read, batch_size, sources=sources, **how)
        else:
            batches = self._row_batches(self._images, read, batch_size, **how)
        tally = Tally(max_bad_fraction, self.num_rows or self.num_images or 1000)
        total = None if self.num_rows is None else sum(1 for _ in self._positions(size, wanted))
        with tqdm(total=total, desc=phase, unit=" images", disable=not progress) as bar:
            for part in as_data_errors(batches):
                if part.batch.refusal is not None:
                    raise part.batch.refusal
                tally.add(part.batch)
                yield part
                bar.update(part.batch.num_images)
        tally.tell()

    def _positions(self, size: int, wanted: Callable[[Block], bool]) -> Iterator[int]:
        for start in range(0, self.num_rows or 0, size):
            if wanted(Block(0, start // size)):
                yield from range(start, min(start + size, self.num_rows or 0))

    def _row_batches(
        self, images: Dataset, read: Any, batch_size: int, *, size: int, wanted: Any, num_workers: int
    ) -> Iterator[BlockBatch]:
        count = self.num_rows or 0
        shares = [
            range(first, min(first + batch_size, start + size, count))
            for start in range(0, count, size)
            if wanted(Block(0, start // size))
            for first in range(start, min(start + size, count), batch_size)
        ]
        rows = Rows(images.select_columns(self._example_of.columns), read)
        loaded = load(rows, collate_fn=collate, batch_sampler=shares, num_workers=num_workers)
        for share, batch in zip(shares, loaded, strict=True):
            others = self._others[batch.positions] if self.columns and batch.positions else None
            yield BlockBatch(Block(0, share.start // size), batch, others, share.stop == count)

    def _stream_batches(
        self,
        images: IterableDataset,
        read: Any,
        batch_size: int,
        *,
        size: int,
        wanted: Any,
        num_workers: int,
        sources: Callable[[int], bool],
    ) -> Iterator[BlockBatch]:
        chosen = [source for source in range(self.num_sources) if sources(source)]
        parts = [
            (source, images if self.num_sources == 1 else images.shard(self.num_sources, source)) for source in chosen
        ]
        stream = _StreamBlocks(parts, self, read, batch_size, size, wanted)
        yield from load(stream, batch_size=None, num_workers=num_workers)


class _StreamBlocks(TorchIterableDataset):
    """The batches of a stream's blocks; of the processes that decode, each reads every row and decodes its batches."""

    def __init__(
        self,
        parts: list[tuple[int, IterableDataset]],
        blocks: ImageBlocks,
        read: Callable[[dict[str, Any], int], Item],
        batch_size: int,
        size: int,
        wanted: Callable[[Block], bool],
    ):
        self.parts, self.read, self.batch_size, self.size, self.wanted = parts, read, batch_size, size, wanted
        self.columns, self.limit = blocks.columns, blocks.num_images

    def __iter__(self) -> Iterator[BlockBatch]:
        info = get_worker_info()
        mine, workers = (0, 1) if info is None else (info.id, info.num_workers)
        number = 0
        for source, rows in self.parts:
            for start, columns, ends in _with_end(self._pieces(rows)):
                block = Block(source, start // self.size)
                if self.wanted(block):
                    if number % workers == mine:  # a DataLoader takes batches from its processes in turns
                        yield self._loaded(block, start, columns, ends)
                    number += 1

    def _pieces(self, rows: IterableDataset) -> Iterator[tuple[int, dict[str, list]]]:
        """Columns of at most a batch's rows, cut where blocks end, and the position of the first."""
        position = 0
        # unlike iterating over the rows themselves, `iter` gives one order in every process
        for columns in rows.iter(batch_size=self.batch_size):
            count, start = len(next(iter(columns.values()))), 0
            if self.limit is not None:
                count = min(count, self.limit - position)
            while start < count:
                stop = min(count, start + self.size - position % self.size)
                yield position, {name: values[start:stop] for name, values in columns.items()}
                position, start = position + stop - start, stop
            if position == self.limit:
                return

    def _loaded(self, block: Block, start: int, columns: dict[str, list], ends: bool) -> BlockBatch:
        rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        batch = collate(self.read(row, start + number) for number, row in enumerate(rows))
        others = None
        if self.columns and batch.positions:
            kept = {name: [columns[name][at - start] for at in batch.positions] for name in self.columns}
            others = Dataset.from_dict(kept, features=self.columns).with_format("arrow")[:]
        return BlockBatch(block, batch, others, ends)


def _with_end(pieces: Iterator[tuple[int, dict[str, list]]]) -> Iterator[tuple[int, dict[str, list], bool]]:
    """The pieces, and whether each is the last one."""
    before = next(pieces, None)
    for piece in pieces:
        if before is not None:
            yield *before, False
        before = piece
    if before is not None:
        yield *before, True


def _with_types(dataset: Dataset | IterableDataset) -> Dataset | IterableDataset:
    """A data set that knows the types of its columns; of a stream that does not, those of its first rows."""
    if dataset.features is not None:
        return dataset
    first = next(iter(dataset.with_format("arrow").iter(batch_size=FIRST_ROWS)), None)
    if first is None:
        raise DataError("The stream holds no images.")
    return dataset.cast(Features.from_arrow_schema(first.schema))


def _is_media(kind: Any) -> bool:
    is_file = isinstance(kind, dict) and set(kind) == {"bytes", "path"}
    return is_file or isinstance(kind, (ImageFeature, Audio, Video))


def _keeps_files_apart(stream: IterableDataset) -> bool:
    return all(
        type(link).__name__ in KEEP_FILES_APART and not getattr(link, "with_indices", False)
        for link in links_of(stream)
    )
