"""The command line: `soap-hf fit | score | info | extract | evaluate | figures | push`."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer
from rich.console import Console

from .cli_evaluate import app as evaluate
from .cli_extract import extract
from .cli_figures import draw_figures
from .cli_options import (
    Backbone,
    BackboneId,
    DatasetName,
    Head,
    IncludeBackbone,
    Private,
    Recipe,
    Revision,
    Token,
    hide_progress_bars,
    with_fit_options,
)
from .errors import SOAPError, first_sentence
from .version import __version__

if TYPE_CHECKING:
    from .hub import Push

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Clean patch tokens from any frozen vision backbone (SOAP, arXiv 2604.00172).",
    epilog="Add --debug to any command for the full traceback of an error.",
)
app.add_typer(evaluate, name="evaluate")
app.command("figures")(draw_figures)


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
    include_backbone: IncludeBackbone = False,
    push_to_hub: Annotated[
        Optional[str], typer.Option(metavar="REPO", help="Then push it, e.g. to me/soap-vit-mae-base.")
    ] = None,
    backbone_id: BackboneId = None,
    private: Private = False,
    figures: Annotated[bool, typer.Option(help="Draw figures for the head, which needs matplotlib.")] = True,
    recipe: Recipe = None,
    **options: Any,
) -> None:
    """Fit a head on your own images and write it to a folder."""
    push = None
    if push_to_hub is not None:
        from .hub import Push

        push = Push(
            push_to_hub,
            backbone_id=backbone_id,
            include_backbone=include_backbone,
            private=private or None,
            token=options["token"],
        )
    is_main = _is_main_process(options["device"])
    if is_main:
        _check_targets(backbone, output, overwrite, push)
    options["checkpoint"] = options["checkpoint"] or output.with_name(f"{output.name}.checkpoint")
    model = _fit(backbone, dataset, **options)
    if not is_main:
        return
    from .checkpoint import remove_checkpoint

    model.save_pretrained(output, include_backbone=include_backbone, figures=_figures(model) if figures else None)
    remove_checkpoint(options["checkpoint"])
    if not options["quiet"]:
        typer.echo(f"Head written to {output}")
    if push is not None:
        from .hub import push_head

        typer.echo(f"Head pushed to {push_head(output, push)}")


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


app.command()(extract)


@app.command()
def push(
    head: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder of the head.")],
    repo_id: Annotated[str, typer.Argument(metavar="REPO", help="e.g. me/soap-vit-mae-base; made if need be.")],
    backbone_id: BackboneId = None,
    include_backbone: IncludeBackbone = False,
    statistics: Annotated[bool, typer.Option(help="Push the statistics, so that others can reweight.")] = True,
    private: Private = False,
    revision: Annotated[Optional[str], typer.Option(help="Branch, made if need be; default: main.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request.")] = False,
    commit_message: Annotated[Optional[str], typer.Option(help="Default: what was fitted.")] = None,
    license: Annotated[Optional[str], typer.Option(help="Default: the card's, else the backbone's.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Write over a repository of something else.")] = False,
    token: Token = None,
) -> None:
    """Push a head to the Hub, with its card and the code that loads it."""
    from .hub import Push, push_head

    target = Push(
        repo_id,
        backbone_id=backbone_id,
        include_backbone=include_backbone,
        statistics=statistics,
        private=private or None,
        revision=revision,
        create_pr=create_pr,
        commit_message=commit_message,
        license=license,
        force=force,
        token=token,
    )
    typer.echo(f"Head pushed to {push_head(head, target)}")


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
        hide_progress_bars()
    return fit_soap(backbone, dataset, layer=layer or -1, progress=not quiet, **options)


def _is_main_process(device: str | None) -> bool:
    """Whether this process is the one of `accelerate launch` or `torchrun` that writes and speaks."""
    from .processes import join_processes

    return join_processes(device).is_main_process


def _check_targets(backbone: str, output: Path, overwrite: bool, push: Optional["Push"]) -> None:
    """Refuses, before any work, a folder that cannot take the head, or a push that would fail."""
    from .saved_head import refuse_other_model
    from .tensor_files import check_output_folder

    check_output_folder(output, overwrite)
    refuse_other_model(output)
    if push is not None:
        from .hub import check_push

        check_push(push, backbone)


def _figures(model: Any) -> dict[str, bytes]:
    """The figures to save beside a head; none, and that is said, if they cannot be drawn: they must not cost a fit."""
    try:
        from .figures import head_figures

        return head_figures(model)
    except Exception as error:
        typer.echo(f"No figures: {first_sentence(error)}.", err=True)
        return {}


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
