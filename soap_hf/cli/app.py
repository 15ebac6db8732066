"""The command line: `soap-hf fit | score | tune | evaluate | figures | explore | info | extract | push | convert`."""

import sys
from typing import Annotated, Any

import typer

from ..compat import argument_error
from ..heads.printing import failure, patient_streams, show
from ..runtime.errors import SOAPError, first_sentence
from ..version import __version__
from .convert import Convert
from .evaluate import Knn, Matching, Position, Saliency, Segmentation
from .explore import Explore
from .extract import Extract
from .figures import Figures
from .fit import Fit, Score
from .heads import Info, PushHead
from .options import Command
from .tune import Tune


def _start(command: Any, **_: Any) -> Any:
    """Starts what was asked for; help, the version and completions have been given already."""
    try:
        return command.start() if isinstance(command, Command) else command
    except KeyboardInterrupt:
        show("Interrupted.", to_stderr=True)
        raise typer.Exit(130) from None  # as shells count it


app = typer.Typer(
    result_callback=_start,
    pretty_exceptions_enable=False,
    help="Clean patch tokens from any frozen vision backbone (SOAP, arXiv 2604.00172).",
    epilog="Add --debug to any command for the full traceback of an error.",
)
evaluate = typer.Typer(help="Measure what a head does: raw, clean and baselines side by side.", no_args_is_help=True)

app.command("fit")(Fit)
app.command("score")(Score)
app.command("tune")(Tune)
app.command("extract")(Extract)
app.command("figures")(Figures)
app.command("info")(Info)
app.command("explore")(Explore)
app.command("push")(PushHead)
app.command("convert")(Convert)
app.add_typer(evaluate, name="evaluate")
for evaluation in (Matching, Position, Knn, Segmentation, Saliency):
    evaluate.command(evaluation.__name__.lower())(evaluation)


def _print_version(wanted: bool) -> None:
    if wanted:
        show(__version__)
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options of `soap-hf` itself."""


def main() -> None:
    """Entry point: one sentence and a non-zero exit for an error, the traceback with `--debug`."""
    debug = "--debug" in sys.argv
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    with patient_streams():
        status = _status_of(arguments or ["--help"], debug)
    problem = failure()
    if problem is not None and not isinstance(problem, BrokenPipeError):
        show(f"Error: not everything could be printed ({first_sentence(problem)}).", to_stderr=True)
        failure()
    sys.exit(status or int(problem is not None))


def _status_of(arguments: list[str], debug: bool) -> int | None:
    """Runs a command line, and tells what went wrong; the exit status, if there is one."""
    try:
        return app(arguments, standalone_mode=False)
    except Exception as error:
        if debug:
            raise
        message, status = str(error), 1
        if isinstance(error, argument_error()):  # about the arguments
            message, status = error.format_message(), error.exit_code
        elif not isinstance(error, SOAPError):
            message = f"{type(error).__name__}: {first_sentence(error)} (run again with --debug for the traceback)"
        if message:  # none comes with the help that stands for a missing command
            show(f"Error: {message}", to_stderr=True)
        return status
