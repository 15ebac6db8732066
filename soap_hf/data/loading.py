"""From rows to batches: images decoded and prepared one by one, so that a bad one costs itself alone."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset
from transformers.utils import logging

from ..runtime.errors import DataError, SOAPError, first_sentence
from .image_files import BadImage, image_name, image_path, read_image, stop_if_too_many_bad, turned_with_image
from .preprocessing import to_rgb

logger = logging.get_logger(__name__)


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


class Item(NamedTuple):
    """What was made of the image at one position, and its name; or why nothing was."""

    position: int
    value: Any
    name: str = ""
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


@dataclass(frozen=True)
class ExampleReader:
    """Decodes the image of a row, and its mask if there is a column of masks; `modes` are those of the features."""

    column: str
    mask_column: str | None = None
    resize_masks: bool = True
    modes: Mapping[str, str] = field(default_factory=dict)

    @property
    def columns(self) -> list[str]:
        """Those that it reads."""
        return [self.column] if self.mask_column is None else list(dict.fromkeys((self.column, self.mask_column)))

    def __call__(self, row: dict[str, Any], number: int, of: str = "") -> Example | BadImage:
        """What one row holds; a `DataError` if its mask has another size, and masks may not be resized."""
        path, name = image_path(row[self.column]), image_name(row[self.column], f"row {number}{of}")
        image = read_image(row[self.column], name, to_rgb, self.modes.get(self.column))
        if isinstance(image, BadImage):
            return image
        if self.mask_column is None:
            return Example(name, image, row=number, path=path)
        mask = read_image(row[self.mask_column], f"mask of {name}", mode=self.modes.get(self.mask_column))
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


def read_item(
    row: dict[str, Any],
    position: int,
    example_of: Callable[[dict[str, Any], int], Example | BadImage],
    prepare: Callable[[Example], Any],
) -> Item:
    """What `prepare` makes of a row; whatever goes wrong is in the item."""
    try:
        example = example_of(row, position)
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


def collate(items: Iterable[Item]) -> Batch:
    """The batch that some items make."""
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


class Rows(TorchDataset):
    """Rows with numbers, for a `DataLoader`."""

    def __init__(self, rows: Any, read: Callable[[dict[str, Any], int], Item]):
        self.rows, self.read = rows, read

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, position: int) -> Item:
        return self.read(self.rows[position], position)


def load(images: TorchDataset, seed: int = 0, **loading: Any) -> Iterator[Any]:
    """What a `DataLoader` of these arguments gives; it draws nothing from the global generator."""
    generator = torch.Generator().manual_seed(seed)
    pin = torch.cuda.is_available()  # copies to the accelerator then overlap with its work
    yield from DataLoader(images, generator=generator, pin_memory=pin, **loading)


def random_rows(rows: int, count: int | None, seed: int | None, *, in_order: bool = False) -> Sequence[int]:
    """Numbers of rows: a seeded random sample, in its order or that of the data set; without a seed the first."""
    order: Sequence[int] = range(rows)
    if seed is not None:
        order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed)).tolist()
    return sorted(order[:count]) if in_order else order[:count]


def as_data_errors(batches: Iterable[Any]) -> Iterator[Any]:
    """The batches; what goes wrong between them becomes a `DataError`."""
    try:
        yield from batches
    except SOAPError:
        raise
    except Exception as error:  # a connection that drops, a decoding process that dies, a broken archive …
        raise DataError(f"The data set stopped giving images ({first_sentence(error)}).") from error


@dataclass
class Tally:
    """Counts the images that are read, and names in the end those that are left out, or were changed."""

    max_bad_fraction: float
    expected: int  # as far as is known
    bad_images: list[BadImage] = field(default_factory=list)
    _seen: int = 0
    _noted: dict[str, list[str]] = field(default_factory=dict)

    def add(self, batch: Batch) -> None:
        """Counts a batch; a `DataError` if too many images are bad."""
        self.bad_images += batch.bad
        for note, name in batch.notes:
            self._noted.setdefault(note, []).append(name)
        self._seen += batch.num_images
        stop_if_too_many_bad(self.bad_images, self.max_bad_fraction, self._seen, max(self._seen, self.expected))

    def tell(self) -> None:
        """Says what was left out or changed, if anything."""
        if self.bad_images:
            names = ", ".join(map(str, self.bad_images))
            logger.warning(f"{len(self.bad_images)} unreadable images were skipped: {names}.")
        for note, which in self._noted.items():
            logger.warning(f"{len(which)} {note}: {', '.join(which[:5])}{' …' if len(which) > 5 else ''}.")
