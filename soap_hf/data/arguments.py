"""Arguments that are said once: in a dataclass, from which Python keywords, command lines and recipes are made."""

import math
from contextlib import suppress
from dataclasses import dataclass, field, fields
from typing import Any, Literal, TypeVar

from ..runtime.errors import DataError

Arguments = TypeVar("Arguments", bound="ImageArguments")

MAX_IMAGE_SIDE = 8192
"""A longer side is a slip of the pen, and its synthetic images alone would fill the memory."""


IMAGES, BACKBONE, SCORES, RUNNING, HUB = "Images", "Backbone", "Scores", "Running", "Hub"
"""Groups in the help of a command."""


def argument(default: Any, help: str, **metadata: Any) -> Any:
    """A field of an arguments class, with its help for a command line; `MISSING` is no default.

    `metadata` says how a command line treats it: `metavar`, `parser` (from text), `kind`, `flag` (its declaration, if
    it is not the field's name), `repeated` (may be given several times), `hidden`, `envvar`, `least`, `most`, and
    `panel`, the group of its help.
    """
    return field(default=default, metadata={"help": help, **metadata})


def parse_image_size(text: str) -> tuple[int, int]:
    """`224` or `224x448` as `(height, width)`.

    Example:
        >>> parse_image_size("224"), parse_image_size("224x448")
        ((224, 224), (224, 448))
    """
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise DataError(f"{text!r} is no image size; give 224 or HEIGHTxWIDTH, e.g. 224x448.")
    return int(parts[0]), int(parts[-1])


def parse_mu(text: str) -> float | str:
    """A number of components, 0 or more, or `auto`."""
    if text == "auto":
        return text
    number = math.nan
    with suppress(ValueError):
        number = float(text)
    if not math.isfinite(number):
        raise DataError(f'{text!r} is neither a number nor "auto".')
    refuse_negative_mu(number)
    return int(number) if number.is_integer() else number


def parse_strengths(text: str) -> tuple[float | str, ...]:
    """Numbers of components, or `auto`, with commas between them.

    Example:
        >>> parse_strengths("auto,1,2.5")
        ('auto', 1, 2.5)
    """
    return tuple(parse_mu(part.strip()) for part in text.split(","))


SHORT_DTYPES = {"fp16": "float16", "half": "float16", "bf16": "bfloat16", "fp32": "float32", "fp64": "float64"}
DTYPES = ("float32", "bfloat16", "float16", "float64")


def parse_dtype(text: str) -> str:
    """The name that torch has for a floating dtype: `fp16`, `bf16` and `fp32` are short for those.

    Raises:
        DataError: it is none.

    Example:
        >>> parse_dtype("bf16"), parse_dtype("torch.float16"), parse_dtype("auto")
        ('bfloat16', 'float16', 'auto')
    """
    name = text.lower().removeprefix("torch.")
    name = SHORT_DTYPES.get(name, name)
    if name not in (*DTYPES, "auto"):
        raise DataError(f"{text!r} is no dtype of a backbone; give float32, bfloat16 or float16 (fp32, bf16, fp16).")
    return name


def refuse_negative_mu(mu: Any) -> None:
    """Refuses a strength below 0, with a `DataError`."""
    if not isinstance(mu, str) and mu < 0:
        raise DataError(f"mu={mu:g} is below 0, but it is a number of components; 0 removes nothing.")


def parse_batch_size(text: str) -> int | str:
    """A number of images, or `auto`."""
    if text == "auto" or (text.isdecimal() and int(text) > 0):
        return text if text == "auto" else int(text)
    raise DataError(f'{text!r} is neither a number of images nor "auto".')


@dataclass(kw_only=True)
class ImageArguments:
    """What everything takes that reads images and runs a backbone on them; an error names an impossible argument.

    Args:
        image_column (`str`, defaults to `"image"`): the column that holds the images.
        config_name (`str`, *optional*): configuration of a hub data set.
        image_size (`int` or `(height, width)`, *optional*): the model's input size; default: the processor's.
        batch_size (`int`, defaults to 32): images in a forward pass.
        max_bad_fraction (`float`, defaults to 0.01): share of unreadable images that are skipped; at least one is.
        device (`str` or `torch.device`, *optional*): default: the accelerator if there is one.
        revision, token, trust_remote_code: for what is loaded from the Hub.
        progress (`bool`, defaults to `True`): show bars.
    """

    image_column: str = argument("image", "Column that holds the images.", panel=IMAGES)
    config_name: str | None = argument(None, "Configuration of a hub data set.", panel=IMAGES)
    image_size: int | tuple[int, int] | None = argument(
        None, "Input size; default: the image processor's.", parser=parse_image_size, metavar="SIZE|HxW"
    )
    batch_size: int | Literal["auto"] = argument(32, "Images in a forward pass.", kind=int, least=1, panel=RUNNING)
    max_bad_fraction: float = argument(
        0.01, "Share of unreadable images that are skipped.", least=0, most=1, panel=IMAGES
    )
    max_bad_images: float | None = argument(None, "The old name of --max-bad-fraction.", hidden=True)
    device: Any = argument(None, "Default: the accelerator if there is one.", kind=str | None, panel=RUNNING)
    revision: str | None = argument(None, "Branch, tag or commit on the Hub.", panel=HUB)
    token: Any = argument(None, "Hub token; default: HF_TOKEN.", kind=str | None, envvar="HF_TOKEN", panel=HUB)
    trust_remote_code: bool = argument(
        False, "Run code that comes with the backbone.", flag="--trust-remote-code", panel=HUB
    )
    progress: bool = argument(
        True, "Show no bars, and say nothing but results.", flag="--progress/--quiet", panel=RUNNING
    )

    def __post_init__(self) -> None:
        from ..runtime.patch_layout import as_size  # here, since reading the help of a command needs no torch

        if self.max_bad_images is not None:
            _warn("max_bad_images is called max_bad_fraction now, since it is a share; use that.")
            self.max_bad_fraction, self.max_bad_images = self.max_bad_images, None
        if not 0 <= self.max_bad_fraction <= 1:
            raise DataError(f"max_bad_fraction is a share from 0 to 1, not {self.max_bad_fraction}.")
        if self.batch_size != "auto" and (not isinstance(self.batch_size, int) or self.batch_size < 1):
            raise DataError(f'batch_size must be at least 1, or "auto", not {self.batch_size}.')
        if max(as_size(self.image_size) or (0,)) > MAX_IMAGE_SIDE:
            size = "x".join(map(str, as_size(self.image_size) or ()))
            raise DataError(f"image_size={size} is beyond {MAX_IMAGE_SIDE} pixels a side; choose a smaller one.")

    @classmethod
    def of(cls: type[Arguments], caller: str, given: dict[str, Any]) -> Arguments:
        """The arguments from the keywords of a function, which a `TypeError` names if it has no such argument."""
        if unknown := sorted(set(given) - {single.name for single in fields(cls)}):
            raise TypeError(f"{caller}() got an unexpected keyword argument {unknown[0]!r}")
        return cls(**given)

    @property
    def hub_kwargs(self) -> dict[str, Any]:
        """What reaches the Hub, of that which was given."""
        named = {"revision": self.revision, "token": self.token, "trust_remote_code": self.trust_remote_code}
        return {name: value for name, value in named.items() if value}


def _warn(message: str) -> None:
    """Warns as transformers does, which a command line that only reads its help does not import."""
    from transformers.utils import logging

    logging.get_logger(__name__).warning(message)


def refuse_bad_seed(seed: int) -> None:
    """Refuses a seed that a generator does not take."""
    if not 0 <= seed < 2**63:
        raise DataError(f"seed must lie between 0 and 2**63 - 1, not {seed}.")


def parse_bytes(size: int | str) -> int:
    """A number of bytes from `"2GB"`, `"64MB"`, `"1GiB"` or the number itself.

    Raises:
        DataError: it is no size.

    Example:
        >>> parse_bytes("64MB")
        64000000
    """
    from accelerate.utils import convert_file_size_to_int  # slow to import, and a command line only reads its help

    try:
        number = size if isinstance(size, int) else convert_file_size_to_int(size)
    except ValueError:
        number = -1
    if number < 0:
        raise DataError(f"{size!r} is no size; give one as 2GB, 500MB or 1GiB.")
    return number
