"""The command line: `soap-hf fit | score | info`."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from .cli_options import Backbone, DatasetName, Head, Revision, Token, with_fit_options
from .errors import OutputError, SOAPError, first_sentence
from .version import __version__

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Clean patch tokens from any frozen vision backbone (SOAP, arXiv 2604.00172).",
    epilog="Add --debug to any command for the full traceback of an error.",
)


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


@app.command()
@with_fit_options
def fit(
    backbone: Backbone,
    dataset: DatasetName,
    output: Annotated[Path, typer.Option(help="Folder for the head.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Write into a folder that is not empty.")] = False,
    include_backbone: Annotated[bool, typer.Option("--include-backbone", help="Write the backbone as well.")] = False,
    **options: Any,
) -> None:
    """Fit a head on your own images and write it to a folder."""
    is_main = _is_main_process(options["device"])
    if is_main:
        _check_output(output, overwrite)
    options["checkpoint"] = options["checkpoint"] or output.with_name(f"{output.name}.checkpoint")
    model = _fit(backbone, dataset, **options)
    if is_main:
        from .checkpoint import remove_checkpoint

        model.save_pretrained(output, include_backbone=include_backbone)
        remove_checkpoint(options["checkpoint"])
        if not options["quiet"]:
            typer.echo(f"Head written to {output}")


@app.command()
@with_fit_options
def score(
    backbone: Backbone,
    dataset: DatasetName,
    all_layers: Annotated[bool, typer.Option("--all-layers", help="Every layer, in one pass over the data.")] = False,
    **options: Any,
) -> None:
    """Score a backbone's components without writing a head: is there anything to remove?"""
    model = _fit(backbone, dataset, **{**options, "layer": "all" if all_layers else options["layer"]})
    if options["quiet"] and _is_main_process(options["device"]):  # without its table it would say nothing
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

    quiet = quiet or not _is_main_process(options["device"])
    if quiet:
        from datasets import disable_progress_bars
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        disable_progress_bars()
    return fit_soap(backbone, dataset, layer=layer or -1, progress=not quiet, **options)


def _is_main_process(device: str | None) -> bool:
    """Whether this process is the one of `accelerate launch` or `torchrun` that writes and speaks."""
    from .processes import join_processes

    return join_processes(device).is_main_process


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
