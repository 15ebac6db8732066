"""The arguments that evaluations share."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..data.arguments import ImageArguments, argument, parse_mu, refuse_bad_seed


@dataclass(kw_only=True)
class EvaluationArguments(ImageArguments):
    """The options that every `soap-hf evaluate …` takes.

    Args:
        method (list of `str`, defaults to `["soap"]`): what is measured beside raw tokens, as in `method_projections`.
        rank (`int`, *optional*): directions of the baselines; default: the head's.
        mu (`float` or `"auto"`, *optional*): another strength of the head, from its statistics.
        layer (`int`, *optional*): default: the head's last one.
        seed (`int`, defaults to 0): of random samples of the images.
        output (`Path`, *optional*): folder for the results.
        overwrite (`bool`, defaults to `False`): write into a folder that is not empty.

    The others are those of [`~soap_hf.data.arguments.ImageArguments`].
    """

    method: Sequence[str] = argument(
        ("soap",), "Method beside raw: soap, or a baseline, zero-image or top-pc.", repeated=str
    )
    rank: int | None = argument(None, "Directions of zero-image and top-pc; default: the head's.", least=1)
    mu: float | Literal["auto"] | None = argument(
        None, "Another strength of the head, from its statistics.", parser=parse_mu, metavar="NUMBER|auto"
    )
    layer: int | None = argument(None, "Default: the head's last one.", least=-1)
    seed: int = argument(0, "Of random samples of the images.")
    output: Path | None = argument(None, "Folder for a CSV (one row per image) and summary.json.")
    overwrite: bool = argument(False, "Write into a folder that is not empty.", flag="--overwrite")

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_bad_seed(self.seed)

    @property
    def reading(self) -> dict[str, Any]:
        """What [`Examples`] take."""
        names = ("image_column", "seed", "max_bad_fraction")
        return {name: getattr(self, name) for name in names}
