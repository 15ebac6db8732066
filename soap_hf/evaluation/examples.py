"""The images of an evaluation one by one, with names, masks and labels, in the order of their data set."""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import ClassLabel, Dataset, DatasetDict, IterableDataset
from datasets import Image as ImageFeature
from PIL import Image
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset
from tqdm.auto import tqdm
from transformers.utils import logging

from ..data import open_dataset, undecoded
from ..errors import DataError
from ..image_files import BadImage, files_by_split, image_name, read_image, stop_if_too_many_bad
from ..image_sample import default_workers
from ..preprocessing import to_rgb

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Example:
    """One image of an evaluation: its row, its name, its pixels (RGB), and its mask (as the file has it)."""

    number: int
    name: str
    image: Image.Image
    mask: Image.Image | None = None


@dataclass(frozen=True)
class Prepared:
    """What was made of one [`Example`]."""

    number: int
    name: str
    value: Any


class Examples:
    """Images of a data set, with their masks or labels if a column of those is named.

    Args:
        dataset (`Dataset`): where the images are; a stream is refused.
        image_column (`str`, defaults to `"image"`): the column that holds the images.
        mask_column (`str`, *optional*): the column that holds the masks.
        label_column (`str`, *optional*): the column that holds the labels.
        num_images (`int`, *optional*): size of a seeded random sample; default: all.
        seed (`int`, defaults to 0): names the sample.
        resize_masks (`bool`, defaults to `True`): a mask of another size than its image is resized (nearest), else
            refused.
        max_bad_images (`float`, defaults to 0.01): share of unreadable images that are skipped; at least one is.

    Attributes:
        numbers (`list[int]`): rows of the data set, increasing.
        labels (`dict[int, str]`): label of each row, its name if it has one; empty without `label_column`.
        bad_images (`list[BadImage]`): those that could not be read.

    Raises:
        DataError: a stream, no such column, not images, missing labels, or fewer than 2 images.
    """

    def __init__(
        self,
        dataset: Dataset | IterableDataset,
        image_column: str = "image",
        *,
        mask_column: str | None = None,
        label_column: str | None = None,
        num_images: int | None = None,
        seed: int = 0,
        resize_masks: bool = True,
        max_bad_images: float = 0.01,
    ):
        if isinstance(dataset, IterableDataset):
            raise DataError("An evaluation needs a data set with a length, not a stream; load it without streaming.")
        if len(dataset) < 2:
            raise DataError(f"An evaluation needs at least 2 images, but the data set has {len(dataset)}.")
        self._images = undecoded(dataset, image_column)
        self._image_column, self._mask_column = image_column, mask_column
        self._masks = None if mask_column is None else undecoded(dataset, mask_column, "mask_column")
        order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))[:num_images]
        self.numbers: list[int] = sorted(order.tolist())
        self.labels = {} if label_column is None else _labels(dataset.select(self.numbers), label_column, self.numbers)
        self.resize_masks, self.max_bad_images = resize_masks, max_bad_images
        self.bad_images: list[BadImage] = []

    def __len__(self) -> int:
        return len(self.numbers)

    @property
    def has_masks(self) -> bool:
        """Whether a column of masks was named."""
        return self._masks is not None

    def read(self, number: int) -> Example | BadImage:
        """One row of the data set.

        Raises:
            DataError: its mask has another size, and masks may not be resized.
        """
        value = self._images[number][self._image_column]
        name = image_name(value, f"row {number}")
        image = read_image(value, name, to_rgb)
        if isinstance(image, BadImage) or self._masks is None:
            return image if isinstance(image, BadImage) else Example(number, name, image)
        mask = read_image(self._masks[number][self._mask_column], f"mask of {name}")
        if isinstance(mask, BadImage):
            return mask
        if mask.size != image.size:
            if not self.resize_masks:
                raise DataError(
                    f"The mask of {name} has {mask.width} x {mask.height} pixels, but the image {image.width} x "
                    f"{image.height}; mend it, or let masks be resized."
                )
            mask = mask.resize(image.size, Image.Resampling.NEAREST)
        return Example(number, name, image, mask)

    def batches(
        self, prepare: Callable[[Example], Any], batch_size: int = 1, *, phase: str = "images", progress: bool = False
    ) -> Iterator[list[Prepared]]:
        """What `prepare` makes of each readable image, some at a time; the others are skipped, counted and named.

        Args:
            prepare (callable): runs in the processes that decode.
            batch_size (`int`, defaults to 1): images at a time, fewer where some cannot be read.
            phase (`str`): names the bar.
            progress (`bool`, defaults to `False`): show a bar.

        Raises:
            DataError: too many unreadable images; names them.
        """
        loader = DataLoader(
            _PreparedRows(self, prepare),
            batch_size=batch_size,
            collate_fn=list,
            num_workers=default_workers(len(self)),
            generator=torch.Generator().manual_seed(0),  # else it draws from the global one
        )
        self.bad_images = []
        with tqdm(total=len(self), desc=phase, unit=" images", disable=not progress) as bar:
            for items in loader:
                if refused := next((item for item in items if isinstance(item, DataError)), None):
                    raise refused
                self.bad_images += [item for item in items if isinstance(item, BadImage)]
                stop_if_too_many_bad(self.bad_images, self.max_bad_images, bar.n + len(items), len(self))
                if good := [item for item in items if isinstance(item, Prepared)]:
                    yield good
                bar.update(len(items))
        if self.bad_images:
            names = ", ".join(map(str, self.bad_images))
            logger.warning(f"{len(self.bad_images)} unreadable images were skipped: {names}.")


def _labels(dataset: Dataset, column: str, numbers: Sequence[int]) -> dict[int, str]:
    if column not in dataset.features:
        raise DataError(
            f"The data set has no column {column!r} of labels; choose one of {', '.join(dataset.features)} with "
            "label_column=…, or sort the images into a folder a class."
        )
    kind = dataset.features[column]
    if getattr(kind, "dtype", None) not in ("int64", "int32", "int16", "int8", "uint8", "bool", "string"):
        raise DataError(f"Column {column!r} holds {kind}, not labels; choose another with label_column=….")
    labels = dataset[column][:]
    named = isinstance(kind, ClassLabel)
    missing = sum(label is None or (named and label < 0) for label in labels)
    if missing:
        raise DataError(f"{missing} of {len(labels)} images have no label in column {column!r}; leave them out.")
    names = [kind.int2str(label) if named else str(label) for label in labels]
    return dict(zip(numbers, names, strict=True))


class _PreparedRows(TorchDataset):
    def __init__(self, examples: Examples, prepare: Callable[[Example], Any]):
        self.examples, self.prepare = examples, prepare

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, place: int) -> Prepared | BadImage | DataError:
        try:
            example = self.examples.read(self.examples.numbers[place])
            if isinstance(example, BadImage):
                return example
            return Prepared(example.number, example.name, self.prepare(example))
        except DataError as error:  # raised in a process that decodes, it would bring that one's traceback along
            return error


def open_pairs(
    dataset: str | os.PathLike | Dataset | DatasetDict,
    masks: str | os.PathLike | None = None,
    *,
    image_column: str = "image",
    mask_column: str = "mask",
    **kwargs: Any,
) -> Dataset | IterableDataset:
    """Images and masks: two columns of a data set, or two folders.

    Args:
        dataset: as in `open_dataset`, or a folder of images.
        masks (`str` or `os.PathLike`, *optional*): a folder of masks, each with the path of its image but for the
            extension.
        image_column, mask_column (`str`): names of the columns of the result.
        kwargs: handed to `open_dataset`.

    Raises:
        DataError: the folders do not pair up (names the first orphans), or the data set cannot be opened.
    """
    if masks is None:
        return open_dataset(dataset, **kwargs)
    pictures, truths = _files_by_key(dataset, "images"), _files_by_key(masks, "masks")
    for here, there, folder, kind in ((pictures, truths, dataset, "mask"), (truths, pictures, masks, "image")):
        if orphans := [here[key] for key in here if key not in there]:
            names = ", ".join(os.path.relpath(path, folder) for path in orphans[:5])
            names += " …" if len(orphans) > 5 else ""
            raise DataError(
                f"{len(orphans)} of {len(here)} files have no {kind} of the same name ({names}); images in {dataset} "
                f"and masks in {masks} must pair up."
            )
    paired = DatasetDict()
    for split in dict.fromkeys(split for split, _ in pictures):
        keys = [key for key in pictures if key[0] == split]
        columns = {image_column: [pictures[key] for key in keys], mask_column: [truths[key] for key in keys]}
        paired[split] = Dataset.from_dict(columns, split=split)
        for column in columns:
            paired[split] = paired[split].cast_column(column, ImageFeature())
    return open_dataset(paired, split=kwargs.get("split"))


def _files_by_key(folder: Any, what: str) -> dict[tuple[str, str], str]:
    """Image files of a folder by split and path without extension."""
    if not isinstance(folder, (str, os.PathLike)) or not Path(folder).is_dir():
        raise DataError(f"{folder} is no folder; images and masks must be two folders, or two columns of a data set.")
    found: dict[tuple[str, str], str] = {}
    for split, (root, files) in files_by_split(Path(folder)).items():
        for file in files:
            key = split, file.relative_to(root).with_suffix("").as_posix()
            if key in found:
                raise DataError(f"{found[key]} and {file} have one name; remove one of them, so that {what} pair up.")
            found[key] = str(file)
    if not found:
        raise DataError(f"Folder {folder} holds no {what}; give a folder that does.")
    return found


def short_names(names: Sequence[str]) -> list[str]:
    """Names of files below the folder that holds them all; other names as they are.

    Example:
        >>> short_names(["/home/me/birds/ibis/1.jpg", "/home/me/birds/crane/1.jpg"])
        ['ibis/1.jpg', 'crane/1.jpg']
    """
    if not all(map(os.path.isabs, names)) or len(names) < 2:
        return list(names)
    return [Path(os.path.relpath(name, os.path.commonpath(names))).as_posix() for name in names]
