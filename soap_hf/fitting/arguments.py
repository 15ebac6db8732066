"""The arguments of a fit: names, defaults, help and checks, once."""

import math
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..data.arguments import (
    BACKBONE,
    IMAGES,
    RUNNING,
    SCORES,
    ImageArguments,
    argument,
    parse_batch_size,
    parse_bytes,
    parse_dtype,
    parse_mu,
    refuse_bad_seed,
)
from ..runtime.errors import DataError, LayoutError

if TYPE_CHECKING:
    import torch


def parse_fit_mu(text: str) -> float | str:
    """A number of components, `auto`, or `matching`.

    Raises:
        DataError: it is none of them.
    """
    return text if text == "matching" else parse_mu(text)


def parse_channels(text: str) -> tuple[float, ...]:
    """Three numbers, for red, green and blue.

    Example:
        >>> parse_channels("0.5,0.5,0.5")
        (0.5, 0.5, 0.5)
    """
    with suppress(ValueError):
        if len(numbers := tuple(float(part) for part in text.split(","))) == 3:
            return numbers
    raise DataError(f"{text!r} is not a number for each of three channels; give e.g. 0.5,0.5,0.5.")


def parse_named(text: str) -> dict[str, Any]:
    """Arguments by name, as JSON or as a recipe has them.

    Example:
        >>> parse_named('{"pretrained": false}')
        {'pretrained': False}
    """
    import yaml

    with suppress(yaml.YAMLError):
        if isinstance(values := yaml.safe_load(text), dict) and all(isinstance(name, str) for name in values):
            return values
    raise DataError(f"{text!r} is no object of JSON; give arguments by name, e.g. '{{\"pretrained\": true}}'.")


@dataclass(kw_only=True)
class FitArguments(ImageArguments):
    """Keyword arguments of [`fit_soap`]; the options of `soap-hf fit` and the keys of a recipe have the same names.

    Args:
        image_column (`str`, defaults to `"image"`): the column that holds the images.
        split, config_name (`str`, *optional*), streaming (`bool`): as in `datasets.load_dataset`; the default split is
            the only one, else `"train"`.
        num_images (`int`, defaults to 1000): size of the seeded random sample; all images if there are fewer, or if
            `None`.
        num_synthetic (`int`, *optional*): default: as many as real images whose responses count.
        batch_size (`int` or `"auto"`, defaults to 32): images in a forward pass; `"auto"` looks for the largest that
            an accelerator holds.
        image_size (`int` or `(height, width)`, *optional*): the model's input size; default: the processor's.
        layer (`int`, list of them, or `"all"`; defaults to -1): -1 for `last_hidden_state`, `i >= 0` for
            `hidden_states[i]`; `"all"` is every one of them whose patch tokens are found.
        mu (`float`, `"auto"` or `"matching"`), tau (`float`), threshold (`float`): as in `suppression_weights`;
            `"matching"` takes what [`~soap_hf.evaluation.strength.choose_mu`] chooses on 100 images of the data set
            that the fit does not see.
        check (`int`, defaults to 64): images that the fit does not see, on which matching between views says whether
            the head helps: those left after the sample, else a fifth of all at most; 0 leaves the check out.
        isotropic (`bool`, defaults to `False`): synthetic gradients without a preferred direction.
        seed (`int`, defaults to 0): of the sample and of the synthetic images.
        dtype (`str` or `torch.dtype`, *optional*): of the backbone; default: float32 on CPU, the checkpoint's on an
            accelerator.
        device (`str` or `torch.device`, *optional*): default: the accelerator if there is one.
        revision, token, trust_remote_code: for the backbone on the Hub.
        num_workers (`int`, *optional*): processes that decode images; default: what the machine and the sample allow.
        max_bad_fraction (`float`, defaults to 0.01): share of unreadable images that are skipped; at least one is.
        token_cache (`int` or `str`, defaults to `"2GB"`): memory of all processes together for the tokens of real
            images, until their components are known. All count for the components; for the responses those that fit:
            the first of the random order.
        exact (`bool`, defaults to `False`): read all real images a second time for their responses instead.
        tolerance (`float`, *optional*): stop reading real images when what would be removed has moved by less for
            three checks running (see `Convergence`).
        compile (`bool`, defaults to `False`): run the backbone through `torch.compile`.
        checkpoint (`str`, *optional*): file for what was added up so far, written when SIGINT, SIGTERM or an error
            ends the fit; it is left to the caller to remove it.
        checkpoint_every (`int`, *optional*): write it after so many images, too.
        resume (`bool`, defaults to `False`): go on from there.
        tokens (`str`, *optional*): of a module of another library, where its patch tokens are; see [`fit_soap`].
        mean, std (three `float`, *optional*): of the pixels' channels, instead of the image processor's.
        backbone_arguments (`dict`, *optional*): what makes a backbone by reference is called with.
        progress (`bool`, defaults to `True`): show bars, and a table of components at the end.

    Raises:
        DataError, LayoutError, SOAPError: names the argument that is impossible.

    Example:
        >>> FitArguments(num_images=500).mu
        'auto'
    """

    split: str | None = argument(None, "Split; default: the only one, else train.")
    streaming: bool = argument(False, "Do not download the whole data set first.", flag="--streaming", panel=IMAGES)
    num_images: int | None = argument(1000, "Size of the random sample of real images.", kind=int, least=2)
    num_synthetic: int | None = argument(None, "Default: as many as real images.", least=2, panel=IMAGES)
    batch_size: int | Literal["auto"] = argument(
        32,
        "Images in a forward pass; auto: all that fit.",
        parser=parse_batch_size,
        metavar="NUMBER|auto",
        panel=RUNNING,
    )
    layer: int | Sequence[int] | Literal["all"] = argument(
        -1, "-1: last_hidden_state; i: hidden_states\\[i].", repeated=int, least=-1
    )
    mu: float | Literal["auto", "matching"] = argument(
        "auto", "Components to remove.", parser=parse_fit_mu, metavar="NUMBER|auto|matching"
    )
    check: int = argument(64, "Images not seen by the fit, on which matching says whether the head helps.", least=0)
    tau: float = argument(0.05, "Softness of the cut.", panel=SCORES)
    threshold: float = argument(0.75, "Score above which auto removes a component.", panel=SCORES)
    isotropic: bool = argument(
        False, "Synthetic gradients without a preferred direction.", flag="--isotropic", panel=SCORES
    )
    seed: int = argument(0, "Of the sample and of the synthetic images.", panel=IMAGES)
    dtype: "str | torch.dtype | None" = argument(
        None, "Dtype of the backbone: fp32, bf16 or fp16.", parser=parse_dtype, metavar="DTYPE", panel=BACKBONE
    )
    num_workers: int | None = argument(None, "Processes that decode images.", least=0, panel=RUNNING)
    token_cache: int | str = argument(
        "2GB",
        "Memory for tokens of real images, e.g. 500MB; all processes together.",
        kind=str,
        metavar="SIZE",
        panel=RUNNING,
    )
    exact: bool = argument(False, "Read real images twice instead of keeping tokens.", flag="--exact", panel=RUNNING)
    tolerance: float | None = argument(
        None, "Stop when what is removed moves by less for three checks running.", panel=SCORES
    )
    compile: bool = argument(False, "Run the backbone through torch.compile.", flag="--compile", panel=RUNNING)
    checkpoint: str | os.PathLike | None = argument(
        None,
        "File for what was added up so far; of a fit, default: OUTPUT.checkpoint.",
        kind=Path | None,
        panel=RUNNING,
    )
    checkpoint_every: int | None = argument(
        None, "Images between two checkpoints; default: only when interrupted.", least=1, panel=RUNNING
    )
    resume: bool = argument(False, "Go on from the checkpoint.", flag="--resume", panel=RUNNING)
    tokens: str | None = argument(
        None,
        "Of a plain module: where its tokens are, e.g. blocks.11 or forward_features:x_norm_patchtokens.",
        panel=BACKBONE,
    )
    mean: Sequence[float] | None = argument(
        None,
        "Mean of the channels; default: the image processor's.",
        parser=parse_channels,
        metavar="R,G,B",
        panel=BACKBONE,
    )
    std: Sequence[float] | None = argument(
        None, "Standard deviation of the channels, likewise.", parser=parse_channels, metavar="R,G,B", panel=BACKBONE
    )
    backbone_arguments: dict[str, Any] | None = argument(
        None, "What a backbone by reference is made with.", parser=parse_named, metavar="JSON", panel=BACKBONE
    )

    def __post_init__(self) -> None:
        import torch  # here, since reading the help of a command needs no torch

        from ..statistics.semantic_invariance import suppression_weights

        super().__post_init__()
        self.dtype = parse_dtype(self.dtype) if isinstance(self.dtype, str) else self.dtype
        suppression_weights(torch.ones(1), **self.strength)  # refuses bad ones
        if not isinstance(self.check, int) or self.check < 0:
            raise DataError(f"check is a number of images from 0 upwards, not {self.check!r}.")
        if any(number is not None and number < 2 for number in (self.num_images, self.num_synthetic)):
            raise DataError("A fit needs at least 2 real and 2 synthetic images; raise num_images or num_synthetic.")
        refuse_bad_seed(self.seed)
        layers: Any = [self.layer] if isinstance(self.layer, int) else self.layer
        if layers != "all" and not (len(layers) and all(isinstance(one, int) and one >= -1 for one in layers)):
            raise LayoutError(
                f'layer must be -1, the number of a hidden state, a list of those, or "all", not {self.layer!r}.'
            )
        if self.tolerance is not None and not 0 < self.tolerance < 1:
            raise DataError(f"tolerance must lie between 0 and 1, not {self.tolerance}.")
        if self.checkpoint is None and (self.checkpoint_every is not None or self.resume):
            raise DataError(
                "checkpoint_every and resume=True need to know where the checkpoint lies; pass checkpoint=…."
            )
        if self.checkpoint_every is not None and self.checkpoint_every < 1:
            raise DataError(f"checkpoint_every must be at least 1 image, not {self.checkpoint_every}.")
        for name in ("mean", "std"):
            values = getattr(self, name)
            if values is not None and (len(values) != 3 or not all(math.isfinite(value) for value in values)):
                raise DataError(f"{name} has a finite number for each of three channels, not {values}.")
        if self.std is not None and min(self.std) <= 0:
            raise DataError(f"std must be positive, not {self.std}.")
        parse_bytes(self.token_cache)

    @property
    def strength(self) -> dict[str, Any]:
        """What `suppression_weights` takes; until matching has chosen, `"auto"`."""
        return {"mu": "auto" if self.mu == "matching" else self.mu, "tau": self.tau, "threshold": self.threshold}
