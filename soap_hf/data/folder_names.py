"""What the names of folders say of the images in them: splits and classes, by the words of `datasets`."""

import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import takewhile
from pathlib import Path, PurePath
from typing import NamedTuple, NoReturn

from datasets.data_files import NON_WORDS_CHARS, SPLIT_KEYWORDS
from transformers.utils import logging

from ..runtime.errors import DataError

logger = logging.get_logger(__name__)

_SPLITS = {keyword: str(split) for split, keywords in SPLIT_KEYWORDS.items() for keyword in keywords}
_BETWEEN_WORDS = re.compile(f"[{NON_WORDS_CHARS}]+")

Names = list[tuple[str, ...]]
"""Paths below a folder, in parts."""


class PlacedImage(NamedTuple):
    """An image, and its name below the folder of its split: that of a class goes first, if there are classes."""

    path: Path
    name: PurePath


def split_name(name: str) -> str | None:
    """The split that a user calls so, by the words of datasets in any case; `None` if it is none.

    Example:
        >>> split_name("Training"), split_name("val2017"), split_name("train_station")
        ('train', 'validation', None)
    """
    return _SPLITS.get(re.sub(f"[{NON_WORDS_CHARS}]+$", "", name.lower()))


def split_within(name: str) -> str | None:
    """The split that a word in the name of a folder says; `None` if there is none, or more than one.

    Example:
        >>> [split_within(name) for name in ("training_set", "seg_test", "testimony", "train-val")]
        ['train', 'test', None, None]
    """
    found = {_SPLITS[word] for word in _BETWEEN_WORDS.split(name.lower()) if word in _SPLITS}
    return found.pop() if len(found) == 1 else None


def images_by_split(folder: Path, images: Sequence[Path], split: str | None = None) -> dict[str, list[PlacedImage]]:
    """The images of each split, with their names below it.

    All are of one split, `"train"`, unless folders are named as splits: those that hold all images, or those within
    each class. A picture that lies beside such folders is passed over. A folder with another word in its name, too,
    and one within a class, are no splits if they are the only ones beside others.

    Raises:
        DataError: folders named as splits lie beside others with images, and no `split` is asked for.
    """
    names = [image.parts[len(folder.parts) :] for image in images]
    at = dict(_split_parts(folder, names, 0, split is None, True))
    if at and split is None:
        around = {name[:end] for name in at for end in range(at[name] + 1)}
        strays = [name for name in names if name not in at and name[:-1] in around]
        others = [name for name in names if name not in at and name[:-1] not in around]
        if others or len(strays) > len(at):
            _refuse(folder, (name[: at[name] + 1] for name in at), (name[:-1] for name in others or strays))
    found: dict[str, Names] = {}
    for name in at or names:
        found.setdefault((at and split_within(name[at[name]])) or "train", []).append(name)
    below, paths = _without_splits(found, at), dict(zip(names, images, strict=True))
    return {kind: [PlacedImage(paths[name], below[name]) for name in some] for kind, some in found.items()}


def _split_parts(
    folder: Path, names: Names, depth: int, may_ask: bool, is_all: bool
) -> Iterator[tuple[tuple[str, ...], int]]:
    """Names with a part that says a split, and which part that is; they begin with the same `depth` parts."""
    tops: dict[str, Names] = {}
    for name in names:
        if len(name) > depth + 1:
            tops.setdefault(name[depth], []).append(name)
    splits = {top: said for top in tops if (said := split_within(top))}
    if splits and (others := [top for top in tops if top not in splits]):
        if len(set(splits.values())) > 1 or (is_all and any(map(split_name, splits))):
            if may_ask:
                _refuse(folder.joinpath(*names[0][:depth]), zip(splits), zip(others))
        else:
            if is_all:
                logger.warning(f"Folder {next(iter(splits))!a} is a class and no split, as others lie beside it.")
            splits = {}
    for top, some in tops.items():
        if top in splits:
            yield from ((name, depth) for name in some)
        elif not splits:
            yield from _split_parts(folder, some, depth + 1, may_ask, is_all and len(some) == len(names))


def _without_splits(found: dict[str, Names], at: dict[tuple[str, ...], int]) -> dict[tuple[str, ...], PurePath]:
    """Names without the parts that say splits, and without folders that hold everything."""
    owners: dict[tuple[str, ...], set[str]] = {}  # the splits within each folder around those of splits
    for split, names in found.items():
        for name in names:
            owners.setdefault(name[: at.get(name, 0)], set()).add(split)
    are_classes = len(found) == 1 or any(len(splits) > 1 for splits in owners.values())
    short = {}
    for split, names in found.items():
        rest = {name: name[at[name] + 1 :] if name in at else name for name in names}
        first = next(iter(rest.values()))[0]
        while split_within(first) == split and all(name[0] == first and name[1:] for name in rest.values()):
            rest = {name: parts[1:] for name, parts in rest.items()}  # seg_train/seg_train/…
            first = next(iter(rest.values()))[0]
        for name, parts in rest.items():
            short[name] = (name[: at.get(name, 0)] if are_classes else ()) + parts
    pairs = zip(*(pick(short.values(), default=())[:-1] for pick in (min, max)), strict=False)
    common = len([*takewhile(lambda pair: pair[0] == pair[1], pairs)])  # then it is so of those between, too
    return {name: PurePath(*parts[common:]) for name, parts in short.items()}


def _refuse(folder: Path, splits: Iterable[tuple[str, ...]], others: Iterable[tuple[str, ...]]) -> NoReturn:
    named, rest = ([*dict.fromkeys("/".join(name) or "." for name in names)] for names in (splits, others))
    raise DataError(
        f"Folder {folder} has images in folders named as splits ({_some(named)}) and in others ({_some(rest)}); "
        "choose a split, rename those that are none, or give a folder that holds one kind."
    )


def _some(names: Sequence[str]) -> str:
    return f"{', '.join(names[:5])}{' …' if len(names) > 5 else ''}"
