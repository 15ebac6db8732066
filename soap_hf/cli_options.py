"""Arguments and options that commands share."""

import math
from collections.abc import Callable
from functools import wraps
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from .errors import first_sentence


def parse_image_size(text: str) -> tuple[int, int]:
    """`224` or `224x448` as `(height, width)`."""
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise typer.BadParameter(f"{text!r} is no image size; give 224 or HEIGHTxWIDTH, e.g. 224x448.")
    return int(parts[0]), int(parts[-1])


def _parse_mu(text: str) -> float | str:
    if text == "auto":
        return text
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise typer.BadParameter(f'{text!r} is neither a number nor "auto".')
    return number


def _parse_batch_size(text: str) -> int | str:
    if text == "auto" or (text.isdecimal() and int(text) > 0):
        return text if text == "auto" else int(text)
    raise typer.BadParameter(f'{text!r} is neither a number of images nor "auto".')


def _take_recipe(context: typer.Context, path: Path | None) -> None:
    """Takes from a recipe the arguments that the command line does not give."""
    if path is None:
        return
    import yaml

    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise typer.BadParameter(f"{path} cannot be read as YAML ({first_sentence(error)}).") from error
    if not isinstance(recipe, dict):
        raise typer.BadParameter(f"{path} is no list of arguments, such as num_images: 1000.")
    known = {parameter.name for parameter in context.command.params}
    if unknown := sorted(str(name) for name in recipe if name not in known):
        raise typer.BadParameter(f"{path} names what this command does not know: {', '.join(unknown)}.")
    context.default_map = {name: _as_typed(value) for name, value in recipe.items()}


def _as_typed(value: Any) -> Any:
    """A value of a recipe as if it had been typed."""
    if isinstance(value, list):
        return [_as_typed(single) for single in value]
    return value if isinstance(value, bool) else str(value)


Recipe = Annotated[
    Optional[Path],
    typer.Option(
        metavar="FILE",
        callback=_take_recipe,
        is_eager=True,
        help="YAML file of arguments, such as num_images: 1000; what the command line gives goes first.",
    ),
]
Backbone = Annotated[str, typer.Argument(metavar="BACKBONE", help="Hub id or folder of the backbone.")]
DatasetName = Annotated[str, typer.Argument(metavar="DATASET", help="Hub id, folder of images, or parquet file.")]
Head = Annotated[str, typer.Argument(metavar="HEAD", help="Folder or hub id of a head.")]
IncludeBackbone = Annotated[bool, typer.Option("--include-backbone", help="Put the backbone beside the head.")]
BackboneId = Annotated[Optional[str], typer.Option(help="Hub id of the same backbone, if yours is in a folder.")]
Private = Annotated[bool, typer.Option("--private", help="Make a new repository private.")]
Revision = Annotated[Optional[str], typer.Option(help="Branch, tag or commit on the Hub.")]
Token = Annotated[
    Optional[str], typer.Option(envvar="HF_TOKEN", show_envvar=False, help="Hub token; default: HF_TOKEN.")
]


def hide_progress_bars() -> None:
    """No bars from transformers or datasets."""
    from datasets import disable_progress_bars
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    disable_progress_bars()


def _fit_options(
    image_column: Annotated[str, typer.Option(help="Column that holds the images.")] = "image",
    split: Annotated[Optional[str], typer.Option(help="Split; default: the only one, else train.")] = None,
    config_name: Annotated[Optional[str], typer.Option(help="Configuration of a hub data set.")] = None,
    streaming: Annotated[bool, typer.Option("--streaming", help="Do not download the whole data set first.")] = False,
    num_images: Annotated[int, typer.Option(min=2, help="Size of the random sample of real images.")] = 1000,
    num_synthetic: Annotated[Optional[int], typer.Option(min=2, help="Default: as many as real images.")] = None,
    batch_size: Annotated[
        Any,
        typer.Option(
            parser=_parse_batch_size, metavar="NUMBER|auto", help="Images a forward pass; auto: all that fit."
        ),
    ] = "32",
    image_size: Annotated[
        Any,
        typer.Option(parser=parse_image_size, metavar="SIZE|HxW", help="Input size; default: the image processor's."),
    ] = None,
    layer: Annotated[
        Optional[list[int]],
        typer.Option(min=-1, help="-1: last_hidden_state (default); i: hidden_states\\[i]. May be repeated."),
    ] = None,
    mu: Annotated[Any, typer.Option(parser=_parse_mu, metavar="NUMBER|auto", help="Components to remove.")] = "auto",
    tau: Annotated[float, typer.Option(help="Softness of the cut.")] = 0.05,
    threshold: Annotated[float, typer.Option(help="Score above which auto removes a component.")] = 0.75,
    isotropic: Annotated[
        bool, typer.Option("--isotropic", help="Synthetic gradients without a preferred direction.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of the sample and of the synthetic images.")] = 0,
    dtype: Annotated[Optional[str], typer.Option(help="Dtype of the backbone, e.g. bfloat16.")] = None,
    device: Annotated[Optional[str], typer.Option(help="Default: the accelerator if there is one.")] = None,
    revision: Revision = None,
    token: Token = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with the backbone.")
    ] = False,
    num_workers: Annotated[Optional[int], typer.Option(min=0, help="Processes that decode images.")] = None,
    max_bad_images: Annotated[
        float, typer.Option(min=0, max=1, help="Share of unreadable images that are skipped.")
    ] = 0.01,
    token_cache: Annotated[
        str, typer.Option(metavar="SIZE", help="Memory for tokens of real images, e.g. 500MB; all processes together.")
    ] = "2GB",
    exact: Annotated[bool, typer.Option("--exact", help="Read real images twice instead of keeping tokens.")] = False,
    tolerance: Annotated[
        Optional[float], typer.Option(help="Stop when what is removed moves by less for three checks running.")
    ] = None,
    compile: Annotated[bool, typer.Option("--compile", help="Run the backbone through torch.compile.")] = False,
    checkpoint: Annotated[
        Optional[Path], typer.Option(help="File for what was added up so far; of a fit, default: OUTPUT.checkpoint.")
    ] = None,
    checkpoint_every: Annotated[
        Optional[int], typer.Option(min=1, help="Images between two checkpoints; default: only when interrupted.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the checkpoint.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No bars, and of a fit no table.")] = False,
) -> None:
    """Never called: its parameters are the options that every command that fits shares."""


def _evaluation_options(
    method: Annotated[
        Optional[list[str]],
        typer.Option(help="Arm beside raw: soap (default), zero-image or top-pc. May be repeated."),
    ] = None,
    rank: Annotated[
        Optional[int], typer.Option(min=1, help="Directions of zero-image and top-pc; default: the head's.")
    ] = None,
    mu: Annotated[
        Any,
        typer.Option(
            parser=_parse_mu, metavar="NUMBER|auto", help="Another strength of the head, from its statistics."
        ),
    ] = None,
    layer: Annotated[Optional[int], typer.Option(min=-1, help="Default: the head's last one.")] = None,
    image_column: Annotated[str, typer.Option(help="Column that holds the images.")] = "image",
    config_name: Annotated[Optional[str], typer.Option(help="Configuration of a hub data set.")] = None,
    image_size: Annotated[
        Any,
        typer.Option(parser=parse_image_size, metavar="SIZE|HxW", help="Input size; default: the image processor's."),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images a forward pass.")] = 32,
    seed: Annotated[int, typer.Option(help="Of random samples of the images.")] = 0,
    max_bad_images: Annotated[
        float, typer.Option(min=0, max=1, help="Share of unreadable images that are skipped.")
    ] = 0.01,
    device: Annotated[Optional[str], typer.Option(help="Default: the accelerator if there is one.")] = None,
    revision: Revision = None,
    token: Token = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with the backbone.")
    ] = False,
    output: Annotated[Optional[Path], typer.Option(help="Folder for a CSV (a row an image) and summary.json.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Write into a folder that is not empty.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No bars.")] = False,
) -> None:
    """Never called: its parameters are the options that every evaluation shares."""


def with_fit_options(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command that takes `**options` the parameters of `_fit_options`."""
    return _with_options(command, _fit_options)


def with_evaluation_options(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command that takes `**options` the parameters of `_evaluation_options`."""
    return _with_options(command, _evaluation_options)


def with_single_image_options(command: Callable[..., None]) -> Callable[..., None]:
    """As `with_evaluation_options`, for a command that takes images one at a time."""
    return _with_options(command, _evaluation_options, without="batch_size")


def _with_options(
    command: Callable[..., None], template: Callable[..., None], without: str | None = None
) -> Callable[..., None]:
    own = [
        parameter for parameter in signature(command).parameters.values() if parameter.kind != Parameter.VAR_KEYWORD
    ]
    taken = {without, *(parameter.name for parameter in own)}
    shared = [parameter for parameter in signature(template).parameters.values() if parameter.name not in taken]
    required_first = sorted(own + shared, key=lambda parameter: parameter.default is not Parameter.empty)

    @wraps(command)
    def with_options(**arguments: Any) -> None:
        command(**arguments)

    with_options.__signature__ = Signature(required_first)  # type: ignore[attr-defined]
    with_options.__annotations__ = {parameter.name: parameter.annotation for parameter in required_first}
    return with_options
