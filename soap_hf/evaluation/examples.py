"""The images of an evaluation: a random sample in the order of the data set, with masks or labels."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset, DatasetDict, IterableDataset
from datasets import Image as ImageFeature
from PIL import Image

from ..data.data_sets import open_dataset
from ..data.folder_names import images_by_split
from ..data.folders import FolderFiles
from ..data.image_files import BadImage, read_image
from ..data.image_sample import ImageSample
from ..data.in_memory import data_set_of, is_torch
from ..data.loading import Example, random_rows
from ..data.named_files import image_file
from ..data.preprocessing import to_rgb
from ..runtime.errors import DataError
from .sharing import Part, measure_images


class Examples:
    """Images of a data set, with their masks or labels if a column of those is named.

    Args:
        dataset (`Dataset`, list or torch data set): where the images are; a stream is refused. A list holds paths, PIL
            images or arrays; of a data set of torch the images alone are taken, those of the sample into memory.
        image_column (`str`, defaults to `"image"`): the column that holds the images.
        mask_column (`str`, *optional*): the column that holds the masks.
        label_column (`str`, *optional*): the column that holds the labels.
        num_images (`int`, *optional*): size of a seeded random sample; default: all.
        seed (`int`, defaults to 0): names the sample.
        resize_masks (`bool`, defaults to `True`): a mask of another size than its image is resized (nearest), else
            refused.
        max_bad_fraction (`float`, defaults to 0.01): share of unreadable images that are skipped; at least one is.

    Attributes:
        labels (`list[str]`): label of each image by its position, its name if it has one; empty without
            `label_column`.
        num_available (`int`): images of the data set, of which these are a sample.
        bad_images (`list[BadImage]`): those that could not be read when they were measured last.

    Raises:
        DataError: a stream, no such column, not images, missing labels, or fewer than 2 images.
    """

    def __init__(
        self,
        dataset: Any,
        image_column: str = "image",
        *,
        mask_column: str | None = None,
        label_column: str | None = None,
        num_images: int | None = None,
        seed: int = 0,
        resize_masks: bool = True,
        max_bad_fraction: float = 0.01,
    ):
        if is_torch(dataset) and hasattr(dataset, "__len__"):
            dataset = data_set_of(dataset, image_column, random_rows(len(dataset), num_images, seed, in_order=True))
        elif isinstance(dataset, (list, tuple)):
            dataset = data_set_of(dataset, image_column)
        if isinstance(dataset, IterableDataset):
            raise DataError("An evaluation needs a data set with a length, not a stream; load it without streaming.")
        masks: dict[str, Any] = {"mask_column": mask_column, "resize_masks": resize_masks}
        self._sample = ImageSample(dataset, image_column, num_images, seed, in_order=True, **masks)
        self.has_masks, self.max_bad_fraction = mask_column is not None, max_bad_fraction
        self.bad_images: list[BadImage] = []
        self.num_available = len(dataset)
        self.labels = (
            [] if label_column is None else _labels(dataset.with_format(None).select(self.numbers), label_column)
        )

    def __len__(self) -> int:
        return self._sample.available or 0

    @property
    def numbers(self) -> list[int]:
        """Rows of the data set, increasing."""
        return list(self._sample.rows or ())

    def measured(
        self, prepare: Callable[[Example], Any], measure: Callable[[Any], Any], batch_size: int = 1, **options: Any
    ) -> list[Part]:
        """What `measure` makes of each batch of what `prepare` makes of the readable images, in their order.

        `options` are those of [`~soap_hf.evaluation.sharing.measure_images`]: `share`, `phase` and `progress`.

        Raises:
            DataError: too many unreadable images; names them.
        """
        limit = self.max_bad_fraction
        parts, self.bad_images = measure_images(
            self._sample, prepare, measure, batch_size, max_bad_fraction=limit, **options
        )
        return parts


def _labels(dataset: Dataset, column: str) -> list[str]:
    if column not in dataset.features:
        raise DataError(
            f"The data set has no column {column!r} of labels; choose one of {', '.join(dataset.features)} with "
            "label_column=…, or put the images of each class into a folder of its own."
        )
    kind = dataset.features[column]
    if getattr(kind, "dtype", None) not in ("int64", "int32", "int16", "int8", "uint8", "bool", "string"):
        raise DataError(f"Column {column!r} holds {kind}, not labels; choose another with label_column=….")
    labels = dataset[column][:]
    named = isinstance(kind, ClassLabel)
    missing = sum(label is None or (named and label < 0) for label in labels)
    if missing:
        raise DataError(f"{missing} of {len(labels)} images have no label in column {column!r}; leave them out.")
    return [kind.int2str(label) if named else str(label) for label in labels]


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
    for split, placed in images_by_split(Path(folder), FolderFiles.of(Path(folder)).images).items():
        for file, name in placed:
            key = split, name.with_suffix("").as_posix()
            if key in found:
                raise DataError(f"{found[key]} and {file} have one name; remove one of them, so that {what} pair up.")
            found[key] = image_file(file)
    if not found:
        raise DataError(f"Folder {folder} holds no {what}; give a folder that does.")
    return found


def open_image(path: Path, way_out: str) -> Image.Image:
    """One image in RGB, read at once; a `DataError` if it cannot be read, with the way out."""
    image = read_image({"path": str(path), "bytes": None}, str(path), to_rgb)
    if isinstance(image, BadImage):
        raise DataError(f"Image {image} cannot be read; {way_out}.")
    return image


def short_names(names: Sequence[str]) -> list[str]:
    """Names of files below the folder that holds them all; other names as they are.

    Example:
        >>> short_names(["/home/me/birds/ibis/1.jpg", "/home/me/birds/crane/1.jpg"])
        ['ibis/1.jpg', 'crane/1.jpg']
    """
    if not all(map(os.path.isabs, names)) or len(names) < 2:
        return list(names)
    return [Path(os.path.relpath(name, os.path.commonpath(names))).as_posix() for name in names]
