"""The command line: `soap-hf fit | score | info`."""

import math
import sys
from collections.abc import Callable
from functools import wraps
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import Annotated, Any, Optional

import typer
from rich.console import Console

from .errors import OutputError, SOAPError, first_sentence
from .version import __version__

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Clean patch tokens from any frozen vision backbone (SOAP, arXiv 2604.00172).",
    epilog="Add --debug to any command for the full traceback of an error.",
)


def _parse_image_size(text: str) -> tuple[int, int]:
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


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options of `soap-hf` itself."""


Backbone = Annotated[str, typer.Argument(metavar="BACKBONE", help="Hub id or folder of the backbone.")]
DatasetName = Annotated[str, typer.Argument(metavar="DATASET", help="Hub id, folder of images, or parquet file.")]
Head = Annotated[str, typer.Argument(metavar="HEAD", help="Folder or hub id of a head.")]
Revision = Annotated[Optional[str], typer.Option(help="Branch, tag or commit on the Hub.")]
Token = Annotated[
    Optional[str], typer.Option(envvar="HF_TOKEN", show_envvar=False, help="Hub token; default: HF_TOKEN.")
]


def _fit_options(
    image_column: Annotated[str, typer.Option(help="Column that holds the images.")] = "image",
    split: Annotated[Optional[str], typer.Option(help="Split; default: the only one, else train.")] = None,
    config_name: Annotated[Optional[str], typer.Option(help="Configuration of a hub data set.")] = None,
    streaming: Annotated[bool, typer.Option("--streaming", help="Do not download the whole data set first.")] = False,
    num_images: Annotated[int, typer.Option(min=2, help="Size of the random sample of real images.")] = 1000,
    num_synthetic: Annotated[Optional[int], typer.Option(min=2, help="Default: as many as real images.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images a forward pass.")] = 32,
    image_size: Annotated[
        Any,
        typer.Option(parser=_parse_image_size, metavar="SIZE|HxW", help="Input size; default: the image processor's."),
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
    quiet: Annotated[bool, typer.Option("--quiet", help="No bars, and of a fit no table.")] = False,
) -> None:
    """Never called: its parameters are the options that every command that fits shares."""


def _with_fit_options(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command that takes `**options` the parameters of `_fit_options`."""
    own = [
        parameter for parameter in signature(command).parameters.values() if parameter.kind != Parameter.VAR_KEYWORD
    ]
    shared = list(signature(_fit_options).parameters.values())
    required_first = sorted(own + shared, key=lambda parameter: parameter.default is not Parameter.empty)

    @wraps(command)
    def with_options(**arguments: Any) -> None:
        command(**arguments)

    with_options.__signature__ = Signature(required_first)  # type: ignore[attr-defined]
    with_options.__annotations__ = {parameter.name: parameter.annotation for parameter in required_first}
    return with_options


@app.command()
@_with_fit_options
def fit(
    backbone: Backbone,
    dataset: DatasetName,
    output: Annotated[Path, typer.Option(help="Folder for the head.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Write into a folder that is not empty.")] = False,
    include_backbone: Annotated[bool, typer.Option("--include-backbone", help="Write the backbone as well.")] = False,
    **options: Any,
) -> None:
    """Fit a head on your own images and write it to a folder."""
    _check_output(output, overwrite)
    model = _fit(backbone, dataset, **options)
    model.save_pretrained(output, include_backbone=include_backbone)
    if not options["quiet"]:
        typer.echo(f"Head written to {output}")


@app.command()
@_with_fit_options
def score(
    backbone: Backbone,
    dataset: DatasetName,
    all_layers: Annotated[bool, typer.Option("--all-layers", help="Every layer, in one pass over the data.")] = False,
    **options: Any,
) -> None:
    """Score a backbone's components without writing a head: is there anything to remove?"""
    model = _fit(backbone, dataset, **{**options, "layer": "all" if all_layers else options["layer"]})
    if options["quiet"]:  # without its table it would say nothing
        from .report import print_report

        print_report(model.config)


@app.command()
def info(head: Head, revision: Revision = None, token: Token = None) -> None:
    """Show what a head removes and how it was fitted."""
    from .head_files import HeadSource, read_config, read_projections
    from .report import print_report

    reach = {name: value for name, value in {"revision": revision, "token": token}.items() if value}
    source = HeadSource(head, reach)
    config = read_config(source)
    read_projections(source, config)  # a table of a head that cannot be loaded would mislead
    print_report(config)


def _fit(backbone: str, dataset: str, *, quiet: bool, layer: Any, **options: Any) -> Any:
    from .fitting import fit_soap

    if quiet:
        from datasets import disable_progress_bars
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        disable_progress_bars()
    return fit_soap(backbone, dataset, layer=layer or -1, progress=not quiet, **options)


def _check_output(output: Path, overwrite: bool) -> None:
    """Refuses, before any work, a folder that holds something or cannot be written."""
    if output.exists() and not output.is_dir():
        raise OutputError(f"{output} is a file; choose a folder.")
    if output.exists() and any(output.iterdir()) and not overwrite:
        raise OutputError(f"{output} is not empty; choose another folder or pass --overwrite.")
    from .saved_head import refuse_other_model
    from .tensor_files import staging_folder

    refuse_other_model(output)
    is_new = not output.exists()
    with staging_folder(output):
        pass
    if is_new:  # a fit that fails leaves no empty head
        output.rmdir()


def main() -> None:
    """Entry point: one sentence and a non-zero exit for an error, the traceback with `--debug`."""
    debug = "--debug" in sys.argv
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    try:
        sys.exit(app(arguments or ["--help"], standalone_mode=False))
    except Exception as error:
        if debug:
            raise
        _fail(error)


def _fail(error: Exception) -> None:
    message, status = str(error), 1
    if isinstance(error, typer.TyperException):  # about the arguments
        message, status = error.format_message(), error.exit_code
    elif not isinstance(error, SOAPError):
        message = f"{type(error).__name__}: {first_sentence(error)} (run again with --debug for the traceback)"
    Console(stderr=True, soft_wrap=True).print(f"Error: {message}", markup=False, highlight=False)
    sys.exit(status)
