"""The arguments of an extraction: names, defaults, help and checks, once."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ..data.arguments import (
    BACKBONE,
    IMAGES,
    RUNNING,
    SHORT_DTYPES,
    ImageArguments,
    argument,
    parse_bytes,
    parse_dtype,
)
from ..runtime.errors import DataError

if TYPE_CHECKING:
    from ..runtime.patch_layout import Pooling

STORED_AS = ("float32", "float16", "bfloat16")


def parse_shard_size(text: str) -> int | str:
    """A number of rows, or a size as `parse_bytes` reads it.

    Raises:
        DataError: it is neither.

    Example:
        >>> parse_shard_size("10000"), parse_shard_size("512MB")
        (10000, '512MB')
    """
    if text.isdecimal() and int(text) > 0:
        return int(text)
    if text.isdecimal() or parse_bytes(text) == 0:
        raise DataError(f"{text!r} is no size of a shard; give a number of rows, or 512MB.")
    return text


@dataclass(kw_only=True)
class ExtractArguments(ImageArguments):
    """Keyword arguments of [`extract_features`], and the options of `soap-hf extract`.

    Args:
        pooling (`str`, defaults to `"mean"`): `"mean"`, `"cls"` or `"cls+mean"`, as in the wrapper; `None` means
            `patches=True`.
        patches (`bool`, defaults to `False`): keep patch tokens instead of one vector per image.
        every (`int`, defaults to 1): of those, every so many rows and columns.
        inside (`str`, *optional*): of those, the ones of which more than half lies inside the object in this column of
            masks (read as [`read_mask`] does).
        layer (list of `int`, *optional*): which of the head's layers, all in one forward pass; default: its only one.
        stored_as (`str`, *optional*): `"float32"`, `"float16"`, or in safetensors `"bfloat16"`; default: float32 for
            one vector per image, float16 for patch tokens.
        normalize (`bool`, defaults to `False`): divide each vector by its L2 norm.
        with_raw (`bool`, defaults to `False`): keep the raw features of the same forward pass, too.
        split (`str`, *optional*), streaming (`bool`): as in `datasets.load_dataset`; default split: the only one, else
            `"train"`.
        num_images (`int`, *optional*): how many, from the beginning; default: all.
        num_workers (`int`, *optional*): processes that decode images, for each that runs the backbone; default: what
            the machine and the data set allow; of a stream 1, since each reads all of it.
        dtype (`str`, *optional*): of the backbone of a head by name; default: that of the fit.
        shard_size (`int` or `str`, defaults to `"512MB"`): rows of a shard, or about how large one gets.
        resume (`bool`, defaults to `False`): go on from the shards that are there.
        overwrite (`bool`, defaults to `False`): replace those that are there.

    The others are those of [`~soap_hf.data.arguments.ImageArguments`].

    Raises:
        DataError: names the argument that is impossible.
    """

    pooling: "Pooling | Literal['none'] | None" = argument(
        "mean", "One vector per image.", kind=str, metavar="mean|cls|cls+mean"
    )
    patches: bool = argument(False, "Keep patch tokens instead, in float16.", flag="--patches")
    every: int = argument(1, "Of patch tokens, every so many rows and columns.", least=1)
    inside: str | None = argument(None, "Of patch tokens, those inside the object in this column of masks.")
    layer: Sequence[int] | int | None = argument(None, "Which of the head's layers.", repeated=int, least=-1)
    stored_as: str | None = argument(
        None, "Default: float32, of patch tokens float16.", kind=str | None, metavar="|".join(STORED_AS)
    )
    normalize: bool = argument(False, "Divide each vector by its L2 norm.", flag="--normalize")
    with_raw: bool = argument(False, "Keep the raw features, too.", flag="--with-raw")
    split: str | None = argument(None, "Split; default: the only one, else train.")
    streaming: bool = argument(False, "Do not download the whole data set first.", flag="--streaming", panel=IMAGES)
    num_images: int | None = argument(None, "How many, from the beginning; default: all.", least=1)
    num_workers: int | None = argument(None, "Processes that decode images.", least=0, panel=RUNNING)
    dtype: str | None = argument(
        None, "Dtype of the backbone; default: that of the fit.", parser=parse_dtype, metavar="DTYPE", panel=BACKBONE
    )
    shard_size: int | str = argument(
        "512MB", "Rows of a shard, or about how large one gets.", parser=parse_shard_size, metavar="ROWS|SIZE"
    )
    resume: bool = argument(False, "Go on from the shards that are there.", flag="--resume")
    overwrite: bool = argument(False, "Replace what is there.", flag="--overwrite")

    def __post_init__(self) -> None:
        from ..runtime.patch_layout import POOLINGS  # here, since reading the help of a command needs no torch

        super().__post_init__()
        self.dtype = parse_dtype(self.dtype) if isinstance(self.dtype, str) else self.dtype
        self.stored_as = SHORT_DTYPES.get(str(self.stored_as), self.stored_as)
        if self.pooling in (None, "none"):  # as in 0.1.0
            self.pooling, self.patches = "mean", True
        if self.pooling not in POOLINGS:
            raise DataError(f"pooling must be one of {', '.join(POOLINGS)} or None, not {self.pooling!r}.")
        if (self.every != 1 or self.inside) and not self.patches:
            raise DataError("every=… and inside=… choose among patch tokens; pass patches=True.")
        if self.every < 1:
            raise DataError(f"every must be at least 1, not {self.every}.")
        if self.stored_as not in (None, *STORED_AS):
            raise DataError(f"stored_as must be one of {', '.join(STORED_AS)}, not {self.stored_as!r}.")
        if self.num_images is not None and self.num_images < 1:
            raise DataError(f"num_images must be at least 1, not {self.num_images}.")
        if self.resume and self.overwrite:
            raise DataError("resume=True keeps what is there, and overwrite=True replaces it; pass one of them.")
        parse_shard_size(str(self.shard_size))

    @property
    def layers(self) -> tuple[int, ...] | None:
        """Those asked for."""
        if self.layer is None:
            return None
        return (self.layer,) if isinstance(self.layer, int) else tuple(dict.fromkeys(self.layer))

    @property
    def numbers_patches(self) -> bool:
        """Whether some patches are left out, so that the others need their numbers."""
        return self.patches and (self.every > 1 or self.inside is not None)

    @property
    def kept_as(self) -> Any:
        """The dtype in which features are stored, by name."""
        return self.stored_as or ("float16" if self.patches else "float32")
